//! The first address of a boot, before there is an agent: PID 1's first child loads the network's drivers, asks by DHCP, and
//! ends. While it waits for hardware and servers PID 1 prepares the machine and starts the agent, whose `manager` goes on
//! with the [lease](super::lease) that it finds.
//!
//! It does the common case alone: the interface that booted, or the only one, which is to have an address by DHCP. Whatever
//! else is wished for, or takes longer than a few seconds, is the agent's. Both speak by the same state machine and messages.
//! The child is a fork of PID 1 without an exec, which would cost as much as the rest.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use protocol::boot_args::BootArgs;
use protocol::ids::Mac;
use protocol::network::{Addressing, Looks, Network, Role};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};

use super::client::{Action, Client, Event};
use super::kernel::Kernel;
use super::lease::Leases;
use super::links;
use super::message::{self, Answer, Grant, Outgoing, Station};
use super::socket::EarlySocket;
use super::{files, metric, nic};
use crate::modules;
use crate::paths::{ConfigDir, RUN_DIR, RunDirs};
use crate::sys::start::{self, Child};

/// How long all of it may take. Then the agent does it, and says what it waits for.
pub(super) const WITHIN: Duration = Duration::from_secs(4);
/// Where the kernel shows interfaces.
const INTERFACES: &str = "/sys/class/net";
/// In the run directory's state: locked while the child lives.
const LOCK: &str = "first-address";
/// Before the second look for a card, and before the first one for its carrier: each look waits twice as long as the one before.
const LOOKS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));
/// Longest time between two looks.
const MAX_PAUSE: Duration = Duration::from_millis(50);

/// Starts the child. Everything that it needs is mounted.
///
/// # Errors
/// What was being done, and why it failed.
pub fn start() -> Result<Child, String> {
    let state = RunDirs::new(RUN_DIR).state();
    let path = state.join(LOCK);
    let fail = |error: io::Error| format!("{}: {error}", path.display());
    fs::create_dir_all(&state).map_err(fail)?;
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
    let lock = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR);
    let lock = lock.map_err(|error| fail(error.into()))?;
    // The child's from now on as well: it is free when both have let go of it.
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| fail(error.into()))?;
    start::fork(move || {
        if let Err(reason) = run(Instant::now() + WITHIN, &state) {
            // For whoever looks there: the agent does it all again, and says what is wrong.
            rustix::io::write(&lock, reason.as_bytes()).unwrap_or_default();
        }
        drop(lock);
    })
    .map_err(|error| format!("the first address: fork: {error}"))
}

/// Whether the child is at work: what it does must not be done twice.
#[must_use]
pub(super) fn is_at_work(state: &Path) -> bool {
    let Ok(file) = fs::File::open(state.join(LOCK)) else { return false };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err()
}

fn run(deadline: Instant, state: &Path) -> Result<(), String> {
    let line = fs::read_to_string("/proc/cmdline").map_err(|error| error.to_string())?;
    let args = BootArgs::parse(&line);
    if ConfigDir::default().network().exists() || !is_common(&args.network) {
        return Err("the network is not to be as usual".to_owned());
    }
    modules::load_network_drivers();
    let card = find(Path::new(INTERFACES), args.bootif, deadline)?;
    let ip = addressing(&args, &card).ok_or("the interface is not to have an address by DHCP")?;
    if !ip.slaac {
        // What the kernel does by itself is to be prevented. What is beyond that, the agent sets in time.
        files::set_ipv6(&card.name, &ip);
    }
    let metric = metric(args.bootif == Some(card.mac), card.number);
    obtain(&card, metric, &Leases::new(state), deadline)
}

/// An address for this interface; the lease is kept for the agent.
fn obtain(card: &Card, metric: u32, leases: &Leases, deadline: Instant) -> Result<(), String> {
    let index = card.number;
    let mut kernel = Kernel::open().map_err(|error| format!("netlink: {error}"))?;
    kernel.ask(links::up_message(index), 0).map_err(|error| format!("up: {error}"))?;
    // The socket goes later: the kernel takes a while to be sure that nobody is using it.
    let (socket, grant, ack) = lease(card, &mut kernel, deadline)?;
    set(&mut kernel, index, &grant, metric)
        .map_err(|error| format!("the address {}: {error}", grant.address))?;
    leases.keep(index, &ack);
    drop(socket);
    Ok(())
}

fn set(kernel: &mut Kernel, index: u32, grant: &Grant, metric: u32) -> io::Result<()> {
    if let Some(mtu) = grant.mtu {
        kernel.ask(links::mtu_message(index, mtu.into()), 0)?;
    }
    let (address, flags) = links::address_message(index, grant);
    kernel.ask(address, flags)?;
    match links::granted_route_message(index, grant, metric) {
        Some((route, flags)) => kernel.ask(route, flags),
        None => Ok(()),
    }
}

/// Whether no interface is built on others.
fn is_common(wish: &Network) -> bool {
    !wish.is_off && wish.bonds.is_empty() && wish.vlans.is_empty() && !wish.asks_for_drivers()
}

/// An Ethernet interface that is hardware.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Card {
    name: String,
    number: u32,
    mac: Mac,
}

/// The interface that booted, or the only one that there is.
fn wanted(interfaces: &Path, bootif: Option<Mac>) -> Option<Card> {
    let mut cards = cards(interfaces);
    if let Some(boot) = bootif {
        return cards.into_iter().find(|card| card.mac == boot);
    }
    let card = cards.pop()?;
    cards.is_empty().then_some(card)
}

fn cards(interfaces: &Path) -> Vec<Card> {
    /// Of `/sys/class/net/NAME/type`: `ARPHRD_ETHER` of `linux/if_arp.h`.
    const ETHERNET: &str = "1";
    let Ok(entries) = fs::read_dir(interfaces) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let (path, name) = (entry.path(), entry.file_name().into_string().ok()?);
            let read = |file: &str| fs::read_to_string(path.join(file)).ok();
            if read("type")?.trim() != ETHERNET || !path.join("device").exists() {
                return None;
            }
            let number = read("ifindex")?.trim().parse().ok()?;
            Some(Card { name, number, mac: read("address")?.trim().parse().ok()? })
        })
        .collect()
}

/// How the interface is to have its addresses, where that is by DHCP without more.
fn addressing(args: &BootArgs, card: &Card) -> Option<Addressing> {
    let looks = Looks {
        name: &card.name,
        mac: card.mac,
        driver: None,
        is_virtual: false,
        is_boot: args.bootif == Some(card.mac),
    };
    match args.network.role(&looks, args.bootif.is_some()) {
        Role::Address { ip, .. } if ip.dhcp4 && ip.addresses.is_empty() && ip.mtu.is_none() => {
            Some(ip)
        }
        _ => None,
    }
}

/// Waits for the interface.
fn find(interfaces: &Path, bootif: Option<Mac>, deadline: Instant) -> Result<Card, String> {
    let mut pause = LOOKS.0;
    loop {
        if let Some(card) = wanted(interfaces, bootif) {
            return Ok(card);
        }
        if Instant::now() >= deadline {
            return Err(format!("no interface of its own within {WITHIN:?}"));
        }
        std::thread::sleep(pause);
        pause = longer(pause);
    }
}

fn longer(pause: Duration) -> Duration {
    (pause * 2).min(MAX_PAUSE)
}

/// Waits until something can be read, or it is too late.
fn wait(fd: impl AsFd, until: Instant) -> bool {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).ok();
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, timeout.as_ref()).is_ok_and(|ready| ready > 0)
}

/// What the conversation with the servers goes through.
struct Line<'a> {
    socket: EarlySocket,
    station: Station,
    kernel: &'a mut Kernel,
    index: u32,
    /// What was sent last. It is sent without a look at the carrier, which costs as much as the rest of the conversation,
    /// and once more when there is a carrier: what was sent before that is lost.
    last: Option<Outgoing>,
    /// The next look for the carrier, and how long the one after it waits.
    look: Option<(Instant, Duration)>,
}

impl Line<'_> {
    fn send(&mut self, outgoing: Outgoing) {
        let bytes = outgoing.encode(&self.station);
        // One that is not sent is sent again, as one that is lost.
        self.socket.broadcast(&bytes, outgoing.ciaddr).unwrap_or_default();
        self.last = Some(outgoing);
    }

    /// Looks for the carrier, if it is time.
    fn look(&mut self) {
        let now = Instant::now();
        let Some((_, pause)) = self.look.filter(|(at, _)| *at <= now) else { return };
        self.look = Some((now + pause, longer(pause)));
        if self.kernel.has_carrier(self.index).unwrap_or(false) {
            self.look = None;
            if let Some(last) = self.last.take() {
                self.send(last);
            }
        }
    }

    /// The next answer, with the bytes it came in; none when it is too late.
    fn hear(&mut self, until: Instant) -> Result<Option<(u32, Answer, Vec<u8>)>, String> {
        loop {
            let due = self.look.map_or(until, |(at, _)| at.min(until));
            if wait(&self.socket, due) {
                let received = self.socket.receive();
                let received = received.map_err(|error| format!("packet socket: {error}"))?;
                let answer = received
                    .and_then(|bytes| Some((message::decode(&bytes, &self.station)?, bytes)));
                if let Some(((xid, answer), bytes)) = answer {
                    self.look = None;
                    return Ok(Some((xid, answer, bytes)));
                }
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            self.look();
        }
    }
}

/// DISCOVER, OFFER, REQUEST, ACK: the client's state machine over a socket. Returns that, too, and the ACK as it came.
fn lease(
    card: &Card,
    kernel: &mut Kernel,
    deadline: Instant,
) -> Result<(EarlySocket, Grant, Vec<u8>), String> {
    let (index, station) = (card.number, Station::Ethernet(card.mac));
    let socket = EarlySocket::open(index, station.everyone());
    let socket = socket.map_err(|error| format!("packet socket: {error}"))?;
    let begin = Instant::now();
    let look = Some((begin + LOOKS.1, longer(LOOKS.1)));
    let mut line = Line { socket, station, kernel, index, last: None, look };
    let mut client = Client::new(None, nic::seed(), begin);
    let (mut event, mut last) = (Event::CarrierUp, Vec::new());
    loop {
        for action in client.handle(event, Instant::now()) {
            match action {
                Action::Broadcast(outgoing) => line.send(outgoing),
                Action::Configure(grant) => return Ok((line.socket, grant, last)),
                Action::Say(_) | Action::Unicast(..) | Action::Deconfigure(_) => {}
            }
        }
        let due = client.deadline().map_or(deadline, |due| due.min(deadline));
        event = match line.hear(due)? {
            Some((xid, answer, bytes)) => {
                last = bytes;
                Event::Heard(xid, answer)
            }
            None => Event::Timer,
        };
        if Instant::now() >= deadline {
            return Err(format!("no DHCP server answered within {WITHIN:?}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);

    fn put(dir: &Path, name: &str, files: &[(&str, &str)]) {
        let dir = dir.join(name);
        fs::create_dir(&dir).expect("directory");
        for (file, text) in files {
            fs::write(dir.join(file), text).expect("file");
        }
    }

    #[test]
    fn the_card_that_booted_is_found_or_the_only_one() {
        let dir = tempfile::tempdir().expect("directory");
        let found = |boot| wanted(dir.path(), boot).map(|card| (card.name, card.number));
        assert_eq!(found(None), None);
        let card =
            |number, mac| [("type", "1\n"), ("ifindex", number), ("address", mac), ("device", "")];
        put(dir.path(), "eth0", &card("2\n", "52:54:00:00:00:01\n"));
        put(dir.path(), "lo", &[("type", "772\n"), ("ifindex", "1\n"), ("address", "0\n")]);
        let bridge = [("type", "1\n"), ("ifindex", "7\n"), ("address", "52:54:00:00:00:07\n")];
        put(dir.path(), "br0", &bridge);
        let first = Some(("eth0".to_owned(), 2));
        assert_eq!(found(None), first);
        assert_eq!(found(Some(Mac([9; 6]))), None, "another one booted");
        put(dir.path(), "eth1", &card("3\n", "52:54:00:00:00:02\n"));
        assert_eq!(found(None), None, "which of the two?");
        assert_eq!(found(Some(MAC)), first);
    }

    #[test]
    fn only_dhcp_and_nothing_else_is_done_so_early() {
        let card = Card { name: "eth0".to_owned(), number: 2, mac: MAC };
        let boot = "BOOTIF=01-52-54-00-00-00-01";
        for (line, expected) in [
            (String::new(), true),
            (boot.to_owned(), true),
            (format!("{boot} ip=dhcp nameserver=10.0.0.1"), true),
            (format!("{boot} ip=off"), false),
            (format!("{boot} ip=10.0.0.9::10.0.0.1:24::eth0:none"), false),
            (format!("{boot} ip=eth0:auto6"), false),
            (format!("{boot} layercake.mtu=9000"), false),
            (format!("{boot} vlan=eth0.5:eth0"), false),
            (format!("{boot} bond=bond0:eth0"), false),
        ] {
            let args = BootArgs::parse(&line);
            assert_eq!(args.problems, Vec::<String>::new(), "{line}");
            let done = is_common(&args.network) && addressing(&args, &card).is_some();
            assert_eq!(done, expected, "{line}");
        }
    }

    #[test]
    fn the_child_is_at_work_as_long_as_it_holds_its_lock() {
        let dir = tempfile::tempdir().expect("directory");
        assert!(!is_at_work(dir.path()), "there was none");
        fs::File::create(dir.path().join(LOCK)).expect("file");
        assert!(!is_at_work(dir.path()));
        let lock = testing::lock(dir.path());
        assert!(is_at_work(dir.path()));
        drop(lock);
        assert!(!is_at_work(dir.path()));
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// The child's lock.
    pub(in crate::network) fn lock(state: &Path) -> fs::File {
        let lock = fs::File::create(state.join(LOCK)).expect("lock");
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("flock");
        lock
    }

    /// What the child does with an interface that has been found.
    pub(in crate::network) fn first_address(
        name: &str,
        mac: Mac,
        state: &Path,
    ) -> Result<(), String> {
        let number = nix::net::if_::if_nametoindex(name).map_err(|error| error.to_string())?;
        let card = Card { name: name.to_owned(), number, mac };
        let deadline = Instant::now() + Duration::from_secs(60);
        obtain(&card, metric(true, number), &Leases::new(state), deadline)
    }
}
