//! Interfaces as they come and go: what happens to them, and the files of `/etc` that come of what they are given.
//! What an interface is to do, `adopt` sees to; what a task of an interface does, `nic` and `nic6`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use protocol::ids::{Mac, NodeId};
use protocol::network::{Addressing, Network, Role};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use super::lease::Leases;
use super::links::{self, Link, Standing};
use super::message::Grant;
use super::nic::{Nic, Report};
use super::six::Six;
use super::socket6::RouterSocket;
use super::{
    NetworkError, NetworkEvent, Settings, advertisement, client6, early, files, message6, nic6,
};

mod adopt;

/// How often is looked whether [`early`] is still at work.
const LOOK: Duration = Duration::from_millis(10);

/// Receives what happened.
pub(super) type Sink = Box<dyn Fn(NetworkEvent) + Send>;
type Notifications = std::pin::Pin<
    Box<dyn Stream<Item = (NetlinkMessage<RouteNetlinkMessage>, rtnetlink::sys::SocketAddr)>>,
>;

/// An interface that is looked after. Its tasks end when this is dropped.
#[derive(Debug)]
struct Known {
    link: Link,
    /// Its address before a bond gave it another one.
    own: Mac,
    role: Role,
    carrier: watch::Sender<bool>,
    metric: u32,
    grant: Option<Grant>,
    /// Fixed IPv4 addresses that the kernel took.
    fixed: Vec<IpAddr>,
    six: Six,
    /// Its DHCPv6 task, once a router has offered something.
    asks: Option<UnboundedSender<client6::Event>>,
    /// What it waits for.
    waits: Option<String>,
    /// The addresses that were told last.
    told: Vec<IpAddr>,
}

impl Known {
    fn ip(&self) -> Option<&Addressing> {
        match &self.role {
            Role::Address { ip, .. } => Some(ip),
            _ => None,
        }
    }

    fn addresses(&self) -> Vec<IpAddr> {
        let granted = self.grant.iter().map(|grant| IpAddr::V4(grant.address));
        let six = self.six.addresses.iter().copied().map(IpAddr::V6);
        granted.chain(self.fixed.iter().copied()).chain(six).collect()
    }
}

pub(super) struct Manager {
    wish: Network,
    bootif: Option<Mac>,
    settings: Settings,
    sink: Sink,
    handle: Handle,
    notifications: Notifications,
    /// None where the kernel has no IPv6.
    routers: Option<RouterSocket>,
    reports: UnboundedReceiver<Report>,
    reporter: UnboundedSender<Report>,
    known: BTreeMap<u32, Known>,
    shared: Arc<AtomicBool>,
    /// What could not be made, and why.
    troubles: BTreeMap<String, String>,
    /// What was said to be waited for.
    said: String,
}

impl Manager {
    /// Connects to the kernel and brings loopback up.
    pub(super) async fn begin(
        wish: Network,
        bootif: Option<Mac>,
        settings: Settings,
        sink: Sink,
    ) -> Result<Self, NetworkError> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv6Ifaddr];
        let (connection, handle, notifications) = rtnetlink::new_multicast_connection(&groups)
            .map_err(|source| NetworkError::Start { action: "open netlink", source })?;
        tokio::spawn(connection);
        let fail =
            |action| move |source| NetworkError::Netlink { action, source: Box::new(source) };
        links::loopback_up(&handle).await.map_err(fail("bring up loopback"))?;
        let (reporter, reports) = unbounded_channel();
        let mut manager = Self {
            wish,
            bootif,
            settings,
            sink,
            handle,
            notifications: Box::pin(notifications),
            routers: None,
            reports,
            reporter,
            known: BTreeMap::new(),
            shared: Arc::default(),
            troubles: BTreeMap::new(),
            said: String::new(),
        };
        manager.write_files();
        if !manager.wish.is_off {
            manager.routers = RouterSocket::open()
                .inspect_err(|error| log::warn!("network: no IPv6: {error}"))
                .ok();
        }
        Ok(manager)
    }

    /// Makes bonds and takes on the interfaces that exist, once nobody else is at work on them.
    async fn take_over(&mut self) {
        let begin = Instant::now();
        if early::is_at_work(&self.settings.state) {
            "the first address is being asked for".clone_into(&mut self.said);
            (self.sink)(NetworkEvent::Waiting(self.said.clone()));
        }
        while early::is_at_work(&self.settings.state) && begin.elapsed() < early::WITHIN * 2 {
            tokio::time::sleep(LOOK).await;
        }
        self.make_bonds().await;
        self.look_again().await;
        self.say_waits();
    }

    async fn look_again(&mut self) {
        if let Err(error) = self.look().await {
            log::error!("network: cannot list interfaces: {error}");
        }
    }

    /// Serves until the process ends.
    pub(super) async fn run(mut self) {
        if self.wish.is_off {
            return;
        }
        self.take_over().await;
        loop {
            let deadline = self.known.values().filter_map(|known| known.six.deadline()).min();
            tokio::select! {
                notification = self.notifications.next() => match notification {
                    Some((message, _)) => self.notified(message).await,
                    None => {
                        log::error!("network: netlink has ended; leases are no longer renewed");
                        return;
                    }
                },
                Some(report) = self.reports.recv() => match report {
                    Report::Up => self.look_again().await,
                    report => self.reported(report),
                },
                said = async {
                    match &self.routers {
                        Some(routers) => routers.receive().await,
                        None => std::future::pending().await,
                    }
                } => match said {
                    Ok((index, bytes)) => self.advertised(index, &bytes),
                    Err(error) => {
                        log::error!("network: routers are not heard any more: {error}");
                        self.routers = None;
                    }
                },
                () = async {
                    match deadline {
                        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                        None => std::future::pending().await,
                    }
                } => self.expire(),
            }
            self.say_waits();
        }
    }

    async fn look(&mut self) -> Result<(), rtnetlink::Error> {
        let mut found = links::list(&self.handle).await?;
        // Bonds before their slaves, and the slave that booted before the others, whose address the bond would take.
        found.sort_by_key(|link| {
            let is_bond = self.wish.bonds.iter().any(|bond| bond.name == link.name);
            (!is_bond, self.bootif != Some(link.mac()))
        });
        for link in found {
            self.link(link).await;
        }
        for message in links::addresses(&self.handle).await? {
            self.address(&message, true);
        }
        Ok(())
    }

    async fn notified(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) {
        match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                if let Some(link) = links::read(&message) {
                    self.link(link).await;
                }
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) => {
                // A bridge says so too when it lets go of a port.
                if links::read(&message).is_some()
                    && let Some(known) = self.known.remove(&message.header.index)
                {
                    self.gone(&known);
                }
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) => {
                self.address(&message, true);
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(message)) => {
                self.address(&message, false);
            }
            // Notifications were lost: ask how things are.
            NetlinkPayload::Overrun(_) => self.look_again().await,
            _ => {}
        }
    }

    fn gone(&mut self, known: &Known) {
        log::warn!("{}: the interface is gone", known.link.name);
        self.write_files();
        if let Some(address) = known.told.first() {
            (self.sink)(NetworkEvent::Lost { link: known.link.name.clone(), address: *address });
        }
        (self.sink)(NetworkEvent::Gone(known.link.name.clone()));
    }

    /// The kernel has an IPv6 address, or has it no more.
    fn address(&mut self, message: &AddressMessage, exists: bool) {
        let Some((index, address, standing)) = links::read_v6(message) else { return };
        let Some(known) = self.known.get_mut(&index) else { return };
        if standing == Standing::Duplicate
            && let Some(asks) = &known.asks
        {
            send(asks, client6::Event::Duplicate(address));
        }
        if known.six.address(address, exists && standing == Standing::Good) {
            self.tell(index);
        }
    }

    /// A router has spoken.
    fn advertised(&mut self, index: u32, bytes: &[u8]) {
        let Some(said) = advertisement::decode(bytes) else { return };
        let Some(known) = self.known.get_mut(&index) else { return };
        let Some(ip) = known.ip().filter(|ip| ip.slaac || ip.dhcp6) else { return };
        let (managed, other) = (said.managed, said.other);
        if ip.dhcp6 && (managed || other) {
            let event = client6::Event::Offered { managed, other };
            match &known.asks {
                Some(asks) => send(asks, event),
                None => self.ask(index, event),
            }
        }
        let Some(known) = self.known.get_mut(&index) else { return };
        if known.six.advertised(said, Instant::now()) {
            self.write_files();
        }
    }

    /// Starts an interface's DHCPv6 task.
    fn ask(&mut self, index: u32, event: client6::Event) {
        let Some(nic) = self.nic(index) else { return };
        let (asks, news) = unbounded_channel();
        send(&asks, event);
        let mac = nic.link.mac();
        let who = message6::Client::new(self.bootif.unwrap_or(mac), &nic.link.name, mac);
        tokio::spawn(nic6::run(nic, who, news));
        if let Some(known) = self.known.get_mut(&index) {
            known.asks = Some(asks);
        }
    }

    /// An interface and its surroundings, for a task.
    fn nic(&self, index: u32) -> Option<Nic> {
        let known = self.known.get(&index)?;
        Some(Nic {
            link: known.link.clone(),
            metric: known.metric,
            handle: self.handle.clone(),
            reports: self.reporter.clone(),
            leases: Leases::new(&self.settings.state),
        })
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let mut ended = false;
        for known in self.known.values_mut() {
            ended |= known.six.expire(now);
        }
        if ended {
            self.write_files();
        }
    }

    fn reported(&mut self, report: Report) {
        match report {
            Report::Up => {}
            Report::Waiting(index, what) => self.waits(index, Some(what)),
            Report::Configured(index, grant) => {
                let Some(known) = self.known.get_mut(&index) else { return };
                if known.grant.as_ref() != Some(&grant) {
                    known.grant = Some(grant);
                    known.told.clear();
                    self.tell(index);
                }
            }
            Report::Fixed(index, addresses) => {
                let Some(known) = self.known.get_mut(&index) else { return };
                known.fixed = addresses;
                known.told.clear();
                self.tell(index);
            }
            Report::Names(index, servers, domains) => {
                let Some(known) = self.known.get_mut(&index) else { return };
                known.six.given = (servers, domains);
                self.write_files();
            }
            Report::Lost(index) => {
                let Some(known) = self.known.get_mut(&index) else { return };
                known.grant = None;
                self.tell(index);
            }
        }
    }

    /// Tells what addresses an interface has, if that is new, after `/etc` says it.
    fn tell(&mut self, index: u32) {
        let hostname = self.write_files();
        let Some(known) = self.known.get_mut(&index) else { return };
        let addresses = known.addresses();
        if addresses == known.told {
            return;
        }
        let told = std::mem::replace(&mut known.told, addresses.clone());
        let link = known.link.name.clone();
        if let (true, Some(address)) = (addresses.is_empty(), told.first()) {
            (self.sink)(NetworkEvent::Lost { link, address: *address });
        } else if !addresses.is_empty() {
            let router = known.grant.as_ref().and_then(|grant| grant.router);
            let ntp = known.grant.iter().flat_map(|grant| &grant.ntp);
            let ntp = ntp.copied().map(IpAddr::from).collect();
            let mac = known.link.mac();
            (self.sink)(NetworkEvent::Configured { link, mac, addresses, router, hostname, ntp });
            self.waits(index, None);
        }
    }

    /// Notes what an interface waits for.
    fn waits(&mut self, index: u32, why: Option<String>) {
        let Some(known) = self.known.get_mut(&index) else { return };
        if known.waits == why {
            return;
        }
        known.waits.clone_from(&why);
        let (link, mac) = (known.link.name.clone(), known.link.mac());
        (self.sink)(NetworkEvent::LinkWaits { link, mac, why });
    }

    /// Interfaces that have an address, the boot interface first.
    fn configured(&self) -> Vec<&Known> {
        let mut all: Vec<_> =
            self.known.values().filter(|known| !known.addresses().is_empty()).collect();
        all.sort_by_key(|known| known.metric);
        all
    }

    /// The node's id, else what the site or the network calls it, else a name made from the boot interface.
    fn hostname(&self, configured: &[&Known]) -> Option<String> {
        if let Some(node) = &self.settings.node {
            return Some(node.to_string());
        }
        let given = configured.iter().find_map(|known| {
            let fixed = known.ip().and_then(|ip| ip.hostname.clone());
            fixed.or_else(|| known.grant.as_ref().and_then(|grant| grant.hostname.clone()))
        });
        let mac = self.bootif.or(configured.first().map(|known| known.link.mac()));
        given.or(mac.map(|mac| NodeId::from_mac(mac).to_string()))
    }

    fn resolv_conf(&self, configured: &[&Known]) -> String {
        let mut servers: Vec<String> = self.wish.dns.iter().map(ToString::to_string).collect();
        let mut domains: Vec<&String> = self.wish.search.iter().collect();
        for known in configured {
            if let Some(ip) = known.ip() {
                servers.extend(ip.dns.iter().map(ToString::to_string));
                domains.extend(&ip.search);
            }
            if let Some(grant) = &known.grant {
                servers.extend(grant.dns.iter().map(ToString::to_string));
                domains.extend(&grant.domain);
            }
            servers.extend(known.six.servers(&known.link.name));
            domains.extend(known.six.domains());
        }
        files::resolv_conf(&servers, &domains)
    }

    /// Writes what is known now; returns the host name.
    fn write_files(&self) -> Option<String> {
        let configured = self.configured();
        let hostname = self.hostname(&configured);
        let name = hostname.as_deref().unwrap_or("localhost");
        let address = configured.first().and_then(|known| known.addresses().first().copied());
        for (file, text) in [
            ("resolv.conf", self.resolv_conf(&configured)),
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

/// A task that is gone needs no news.
fn send(asks: &UnboundedSender<client6::Event>, event: client6::Event) {
    let _gone = asks.send(event);
}
