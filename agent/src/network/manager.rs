//! Interfaces as they come and go: starts a task for each, merges what they are given into the files of `/etc`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures_util::{Stream, StreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use protocol::boot_args::IpConfig;
use protocol::ids::{Mac, NodeId};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use super::links::{self, Link};
use super::message::Grant;
use super::nic::{self, Mode, Nic, Report};
use super::{NetworkError, NetworkEvent, Settings, files};

/// Metric of the boot interface's default route: it wins.
const BOOT_METRIC: u32 = 100;
/// Metric of the others' default routes, plus their index.
const OTHER_METRIC: u32 = 200;

/// Receives what happened.
pub(super) type Sink = Box<dyn Fn(NetworkEvent) + Send>;
type Notifications = std::pin::Pin<
    Box<dyn Stream<Item = (NetlinkMessage<RouteNetlinkMessage>, rtnetlink::sys::SocketAddr)>>,
>;

/// An interface that is looked after. Its task ends when this is dropped.
#[derive(Debug)]
struct Known {
    link: Link,
    carrier: watch::Sender<bool>,
    metric: u32,
    grant: Option<Grant>,
}

pub(super) struct Manager {
    ip: IpConfig,
    bootif: Option<Mac>,
    settings: Settings,
    sink: Sink,
    handle: Handle,
    notifications: Notifications,
    reports: UnboundedReceiver<Report>,
    reporter: UnboundedSender<Report>,
    known: BTreeMap<u32, Known>,
    static_taken: Arc<AtomicBool>,
}

impl Manager {
    /// Connects to the kernel, brings loopback up and takes on the interfaces that exist.
    pub(super) async fn begin(
        ip: IpConfig,
        bootif: Option<Mac>,
        settings: Settings,
        sink: Sink,
    ) -> Result<Self, NetworkError> {
        let (connection, handle, notifications) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
                .map_err(|source| NetworkError::Start { action: "open netlink", source })?;
        tokio::spawn(connection);
        let fail =
            |action| move |source| NetworkError::Netlink { action, source: Box::new(source) };
        links::loopback_up(&handle).await.map_err(fail("bring up loopback"))?;
        let (reporter, reports) = unbounded_channel();
        let mut manager = Self {
            ip,
            bootif,
            settings,
            sink,
            handle,
            notifications: Box::pin(notifications),
            reports,
            reporter,
            known: BTreeMap::new(),
            static_taken: Arc::default(),
        };
        manager.write_files();
        if manager.ip != IpConfig::Off {
            manager.look().await.map_err(fail("list interfaces"))?;
            if manager.known.is_empty() {
                (manager.sink)(NetworkEvent::Waiting(manager.nothing_yet()));
            }
        }
        Ok(manager)
    }

    /// Serves until the process ends.
    pub(super) async fn run(mut self) {
        if self.ip == IpConfig::Off {
            return;
        }
        loop {
            tokio::select! {
                notification = self.notifications.next() => match notification {
                    Some((message, _)) => self.notified(message).await,
                    None => {
                        log::error!("network: netlink has ended; leases are no longer renewed");
                        return;
                    }
                },
                Some(report) = self.reports.recv() => self.reported(report),
            }
        }
    }

    fn nothing_yet(&self) -> String {
        match &self.ip {
            IpConfig::DhcpOn(device) => format!("{device}: there is no such interface yet"),
            IpConfig::Static(ip) if ip.device.is_some() => {
                let device = ip.device.as_deref().unwrap_or_default();
                format!("{device}: there is no such interface yet")
            }
            _ => "no Ethernet interface yet: is its driver in the image?".to_owned(),
        }
    }

    async fn look(&mut self) -> Result<(), rtnetlink::Error> {
        for link in links::list(&self.handle).await? {
            self.link(link);
        }
        Ok(())
    }

    async fn notified(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) {
        match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                if let Some(link) = links::read(&message) {
                    self.link(link);
                }
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) => {
                if let Some(known) = self.known.remove(&message.header.index) {
                    self.gone(&known);
                }
            }
            // Notifications were lost: ask how things are.
            NetlinkPayload::Overrun(_) => {
                if let Err(error) = self.look().await {
                    log::error!("network: cannot list interfaces: {error}");
                }
            }
            _ => {}
        }
    }

    fn gone(&mut self, known: &Known) {
        log::warn!("{}: the interface is gone", known.link.name);
        self.write_files();
        if let Some(grant) = &known.grant {
            let address = IpAddr::V4(grant.address);
            (self.sink)(NetworkEvent::Lost { link: known.link.name.clone(), address });
        }
    }

    /// How this interface is to get its address; `None` to leave it alone.
    fn mode(&self, link: &Link) -> Option<Mode> {
        let is_boot = self.bootif == Some(link.mac);
        match &self.ip {
            IpConfig::Off => None,
            IpConfig::Dhcp => (is_boot || !link.is_virtual).then_some(Mode::Dhcp),
            IpConfig::DhcpOn(device) => (*device == link.name).then_some(Mode::Dhcp),
            IpConfig::Static(ip) => {
                let wanted = match (&ip.device, self.bootif) {
                    (Some(device), _) => *device == link.name,
                    (None, Some(_)) => is_boot,
                    (None, None) => !link.is_virtual,
                };
                wanted.then(|| Mode::Static(ip.clone(), Arc::clone(&self.static_taken)))
            }
        }
    }

    /// Takes an interface on, or notes that its carrier has changed.
    fn link(&mut self, link: Link) {
        if let Some(known) = self.known.get_mut(&link.index) {
            let is_up = link.carrier && !known.link.carrier;
            known.link = link.clone();
            known.carrier.send_if_modified(|carrier| {
                let changed = *carrier != link.carrier;
                *carrier = link.carrier;
                changed
            });
            if is_up {
                (self.sink)(NetworkEvent::LinkUp { link: link.name, mac: link.mac });
            }
            return;
        }
        let Some(mode) = self.mode(&link) else { return };
        log::info!("{}: {} found", link.name, link.mac);
        let metric = if self.bootif == Some(link.mac) {
            BOOT_METRIC
        } else {
            OTHER_METRIC.saturating_add(link.index)
        };
        let (carrier, watched) = watch::channel(link.carrier);
        let nic = Nic {
            link: link.clone(),
            metric,
            handle: self.handle.clone(),
            reports: self.reporter.clone(),
        };
        tokio::spawn(nic::run(nic, mode, watched));
        if link.carrier {
            (self.sink)(NetworkEvent::LinkUp { link: link.name.clone(), mac: link.mac });
        }
        self.known.insert(link.index, Known { link, carrier, metric, grant: None });
    }

    fn reported(&mut self, report: Report) {
        match report {
            Report::Waiting(what) => (self.sink)(NetworkEvent::Waiting(what)),
            Report::Configured(index, grant) => {
                let Some(known) = self.known.get_mut(&index) else { return };
                if known.grant.as_ref() == Some(&grant) {
                    return;
                }
                known.grant = Some(grant.clone());
                let (link, mac) = (known.link.name.clone(), known.link.mac);
                let hostname = self.write_files();
                (self.sink)(NetworkEvent::Configured {
                    link,
                    mac,
                    addresses: vec![IpAddr::V4(grant.address)],
                    router: grant.router,
                    hostname,
                });
            }
            Report::Lost(index, address) => {
                let Some(known) = self.known.get_mut(&index) else { return };
                known.grant = None;
                let link = known.link.name.clone();
                self.write_files();
                (self.sink)(NetworkEvent::Lost { link, address: IpAddr::V4(address) });
            }
        }
    }

    /// Interfaces that have an address, the boot interface first.
    fn configured(&self) -> Vec<(&Known, &Grant)> {
        let mut all: Vec<_> = self
            .known
            .values()
            .filter_map(|known| known.grant.as_ref().map(|grant| (known, grant)))
            .collect();
        all.sort_by_key(|(known, _)| known.metric);
        all
    }

    /// The node's id, else what the network calls it, else a name made from the boot interface.
    fn hostname(&self, configured: &[(&Known, &Grant)]) -> Option<String> {
        if let Some(node) = &self.settings.node {
            return Some(node.to_string());
        }
        let given = configured.iter().find_map(|(_, grant)| grant.hostname.clone());
        let mac = self.bootif.or(configured.first().map(|(known, _)| known.link.mac));
        given.or(mac.map(|mac| NodeId::from_mac(mac).to_string()))
    }

    /// Writes what is known now; returns the host name.
    fn write_files(&self) -> Option<String> {
        let configured = self.configured();
        let hostname = self.hostname(&configured);
        let name = hostname.as_deref().unwrap_or("localhost");
        let address = configured.first().map(|(_, grant)| grant.address);
        let resolv_conf = files::resolv_conf(configured.iter().map(|(_, grant)| *grant));
        for (file, text) in [
            ("resolv.conf", resolv_conf),
            ("hosts", files::hosts(name, address)),
            ("hostname", format!("{name}\n")),
        ] {
            if let Err(error) = files::write(&self.settings.etc, file, &text) {
                let path = self.settings.etc.join(file);
                log::error!("network: cannot write {}: {error}", path.display());
            }
        }
        if self.settings.set_hostname
            && let Err(error) = rustix::system::sethostname(name.as_bytes())
        {
            log::error!("network: cannot set the host name `{name}`: {error}");
        }
        hostname
    }
}
