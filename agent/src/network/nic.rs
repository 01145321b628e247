//! One interface's task: its fixed addresses and its DHCP client, between the kernel and the manager. DHCPv6 has its own.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use protocol::network::Addressing;
use rtnetlink::Handle;
use tokio::sync::{mpsc::UnboundedSender, watch};

use super::client::{Action, Client, Event};
use super::lease::Leases;
use super::links::{self, Link};
use super::message::{self, Grant, Outgoing};
use super::socket::{PacketSocket, RenewSocket};

/// Pause after a socket failed, so that a lasting failure does not take a whole core.
pub(super) const SOCKET_PAUSE: Duration = Duration::from_secs(1);

/// What is said of an interface without a cable.
const NO_CARRIER: &str = "no carrier";

/// How long a carrier may take to come up before a person is told that there is none.
const CARRIER_PATIENCE: Duration = Duration::from_secs(2);
/// A lease that is as young as this needs no verifying: the cable is where it was.
const FRESH: Duration = Duration::from_secs(10);

/// What a task tells the manager.
#[derive(Debug)]
pub(super) enum Report {
    /// The interface was brought up. It may have its carrier already, of which the kernel tells up to a second late.
    Up,
    /// DHCP has set the interface up like this (again).
    Configured(u32, Grant),
    /// The kernel has these fixed IPv4 addresses.
    Fixed(u32, Vec<IpAddr>),
    /// DHCPv6 gave these name servers and search domains.
    Names(u32, Vec<Ipv6Addr>, Vec<String>),
    /// DHCP's address is gone.
    Lost(u32),
    /// It waits; what for.
    Waiting(u32, String),
}

/// An interface and its surroundings.
#[derive(Debug)]
pub(super) struct Nic {
    pub(super) link: Link,
    /// Of its default route.
    pub(super) metric: u32,
    pub(super) handle: Handle,
    pub(super) reports: UnboundedSender<Report>,
    pub(super) leases: Leases,
}

/// Serves an interface until it disappears. `shared` is common to all interfaces that may take one fixed address.
pub(super) async fn run(
    nic: Nic,
    ip: Addressing,
    shared: Option<Arc<AtomicBool>>,
    mut carrier: watch::Receiver<bool>,
) {
    if let Some(mtu) = ip.mtu.filter(|mtu| *mtu != nic.link.mtu)
        && let Err(error) = links::set_mtu(&nic.handle, nic.link.index, mtu).await
    {
        log::warn!("{}: the MTU {mtu} was refused: {error}", nic.link.name);
    }
    if let Err(error) = links::up(&nic.handle, nic.link.index).await {
        nic.say(&format!("cannot be brought up: {error}"));
    }
    nic.report(Report::Up);
    // It mostly comes a millisecond after the interface is up.
    if tokio::time::timeout(CARRIER_PATIENCE, carrier.wait_for(|up| *up)).await.is_err() {
        nic.say(NO_CARRIER);
    }
    if !ip.addresses.is_empty() {
        let came = carrier.wait_for(|up| *up).await.is_ok();
        if !came || shared.is_some_and(|taken| taken.swap(true, Ordering::SeqCst)) {
            return;
        }
        nic.fixed(&ip).await;
    }
    if !ip.dhcp4 {
        while carrier.changed().await.is_ok() {
            if !*carrier.borrow_and_update() {
                nic.say(NO_CARRIER);
            }
        }
        return;
    }
    let old = links::address(&nic.handle, nic.link.index).await.unwrap_or_else(|error| {
        log::warn!("{}: cannot read its addresses: {error}", nic.link.name);
        None
    });
    let client = Client::new(old.map(|(address, _)| address), seed(), Instant::now());
    let has_mtu = ip.mtu.is_some();
    let last = Vec::new();
    let mut task = DhcpTask { nic, client, has_mtu, set: old, packet: None, renew: None, last };
    task.run(carrier).await;
}

/// Unpredictable, for a client's transactions.
pub(super) fn seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

impl Nic {
    pub(super) fn say(&self, what: &str) {
        self.report(Report::Waiting(self.link.index, what.to_owned()));
    }

    pub(super) fn report(&self, report: Report) {
        if self.reports.send(report).is_err() {
            log::debug!("{}: the network manager has ended", self.link.name);
        }
    }

    /// Sets fixed addresses and gateways; what is refused is said, and the rest goes on.
    async fn fixed(&self, ip: &Addressing) {
        let (handle, index) = (&self.handle, self.link.index);
        let mut taken = Vec::new();
        for (address, prefix_len) in &ip.addresses {
            match links::set_fixed(handle, index, *address, *prefix_len).await {
                Ok(()) if address.is_ipv4() => taken.push(*address),
                // The kernel says when it is sure of it.
                Ok(()) => {}
                Err(error) => {
                    self.say(&format!("the address {address}/{prefix_len} was refused: {error}"));
                }
            }
        }
        for gateway in &ip.gateways {
            let result = match gateway {
                IpAddr::V6(gateway) => {
                    links::set_default_v6(handle, index, *gateway, self.metric).await
                }
                IpAddr::V4(gateway) => {
                    let first = ip.addresses.iter().find_map(|(address, len)| match address {
                        IpAddr::V4(address) => Some((*address, *len)),
                        IpAddr::V6(_) => None,
                    });
                    let Some(from) = first else { continue };
                    links::set_default_route(handle, index, from, *gateway, self.metric).await
                }
            };
            if let Err(error) = result {
                log::warn!(
                    "{}: the default route by {gateway} was refused: {error}",
                    self.link.name
                );
            }
        }
        self.report(Report::Fixed(index, taken));
    }

    /// Tells the kernel; says what it refuses and goes on, because half a network is better than none.
    async fn apply(&self, grant: &Grant, has_mtu: bool) {
        let (handle, index) = (&self.handle, self.link.index);
        if let Some(mtu) = grant.mtu.filter(|_| !has_mtu)
            && let Err(error) = links::set_mtu(handle, index, mtu.into()).await
        {
            log::warn!("{}: the MTU {mtu} was refused: {error}", self.link.name);
        }
        if let Err(error) = links::set_address(handle, index, grant).await {
            let Grant { address, prefix_len, .. } = grant;
            self.say(&format!("the address {address}/{prefix_len} was refused: {error}"));
            return;
        }
        let from = (grant.address, grant.prefix_len);
        if let Some(router) = grant.router
            && let Err(error) =
                links::set_default_route(handle, index, from, router, self.metric).await
        {
            log::warn!("{}: the default route by {router} was refused: {error}", self.link.name);
        }
        self.report(Report::Configured(index, grant.clone()));
    }
}

struct DhcpTask {
    nic: Nic,
    client: Client,
    /// The MTU is the site's to say, not the server's.
    has_mtu: bool,
    /// The address that the interface has.
    set: Option<(Ipv4Addr, u8)>,
    packet: Option<PacketSocket>,
    renew: Option<RenewSocket>,
    /// The last answer as it came.
    last: Vec<u8>,
}

enum Wake {
    Carrier(bool),
    Gone,
    Bytes(std::io::Result<Vec<u8>>),
    Timer,
}

impl DhcpTask {
    async fn run(&mut self, mut carrier: watch::Receiver<bool>) {
        let fresh = self.resume().await;
        if *carrier.borrow_and_update() && !fresh {
            self.step(Event::CarrierUp).await;
        }
        loop {
            let event = match self.wait(&mut carrier).await {
                Wake::Gone => return,
                Wake::Carrier(true) => Event::CarrierUp,
                Wake::Carrier(false) => {
                    self.nic.say(NO_CARRIER);
                    Event::CarrierLost
                }
                Wake::Timer => Event::Timer,
                Wake::Bytes(Ok(bytes)) => match message::decode(&bytes, &self.nic.link.station) {
                    Some((xid, answer)) => {
                        self.last = bytes;
                        Event::Heard(xid, answer)
                    }
                    None => continue,
                },
                Wake::Bytes(Err(error)) => {
                    log::warn!("{}: cannot receive: {error}", self.nic.link.name);
                    tokio::time::sleep(SOCKET_PAUSE).await;
                    continue;
                }
            };
            self.step(event).await;
        }
    }

    /// Goes on with the lease that an earlier process has left. Whether it needs no verifying.
    async fn resume(&mut self) -> bool {
        let Nic { link, leases, .. } = &self.nic;
        let Some(kept) = leases.kept(link.index, &link.station) else { return false };
        let fresh = kept.age < FRESH;
        for action in self.client.resume(kept, Instant::now()) {
            self.act(action).await;
        }
        fresh
    }

    async fn wait(&self, carrier: &mut watch::Receiver<bool>) -> Wake {
        let deadline = self.client.deadline();
        tokio::select! {
            changed = carrier.changed() => match changed {
                Ok(()) => Wake::Carrier(*carrier.borrow_and_update()),
                Err(_) => Wake::Gone,
            },
            bytes = async {
                match &self.packet {
                    Some(socket) => socket.receive().await,
                    None => std::future::pending().await,
                }
            } => Wake::Bytes(bytes),
            bytes = async {
                match &self.renew {
                    Some(socket) => socket.receive().await,
                    None => std::future::pending().await,
                }
            } => Wake::Bytes(bytes),
            () = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            } => Wake::Timer,
        }
    }

    async fn step(&mut self, event: Event) {
        let actions = self.client.handle(event, Instant::now());
        self.open_sockets().await;
        for action in actions {
            self.act(action).await;
        }
    }

    /// Opens and closes the sockets as the client's state wants.
    async fn open_sockets(&mut self) {
        if !self.client.listens_to_broadcasts() {
            self.packet = None;
        } else if self.packet.is_none() {
            match PacketSocket::open(self.nic.link.index, self.nic.link.station.everyone()) {
                Ok(socket) => self.packet = Some(socket),
                Err(error) => self.nic.say(&format!("DHCP: cannot open a packet socket: {error}")),
            }
        }
        match self.client.renewing() {
            None => self.renew = None,
            Some(address) if self.renew.as_ref().is_some_and(|s| s.address() == address) => {}
            Some(address) => match RenewSocket::open(address).await {
                Ok(socket) => self.renew = Some(socket),
                // Rebinding, which needs no UDP socket, follows.
                Err(error) => log::warn!(
                    "{}: DHCP: cannot renew from {address} port 68: {error}",
                    self.nic.link.name
                ),
            },
        }
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Say(what) => self.nic.say(&what),
            Action::Broadcast(outgoing) => {
                let Some(socket) = &self.packet else { return };
                let bytes = outgoing.encode(&self.nic.link.station);
                let sent = socket.broadcast(&bytes, outgoing.ciaddr);
                self.log_sent(&outgoing, sent);
            }
            Action::Unicast(server, outgoing) => {
                let Some(socket) = &self.renew else { return };
                let bytes = outgoing.encode(&self.nic.link.station);
                let sent = socket.send(&bytes, server).await;
                self.log_sent(&outgoing, sent);
            }
            Action::Configure(grant) => {
                if let Some((old, prefix_len)) = self.set
                    && old != grant.address
                {
                    self.take(old, prefix_len).await;
                }
                self.set = Some((grant.address, grant.prefix_len));
                if !self.last.is_empty() {
                    self.nic.leases.keep(self.nic.link.index, &self.last);
                }
                self.nic.apply(&grant, self.has_mtu).await;
            }
            Action::Deconfigure(grant) => {
                self.set = None;
                self.nic.leases.forget(self.nic.link.index);
                self.take(grant.address, grant.prefix_len).await;
                self.nic.report(Report::Lost(self.nic.link.index));
            }
        }
    }

    async fn take(&self, address: Ipv4Addr, prefix_len: u8) {
        let nic = &self.nic;
        if let Err(error) =
            links::delete_address(&nic.handle, nic.link.index, address, prefix_len).await
        {
            log::warn!("{}: cannot take {address} away: {error}", nic.link.name);
        }
    }

    /// A send that fails is like a packet that is lost: the timer tries again.
    fn log_sent(&self, outgoing: &Outgoing, sent: std::io::Result<()>) {
        let name = &self.nic.link.name;
        match sent {
            Ok(()) => log::debug!("{name}: DHCP: sent {:?}", outgoing.kind),
            Err(error) => log::warn!("{name}: DHCP: cannot send {:?}: {error}", outgoing.kind),
        }
    }
}
