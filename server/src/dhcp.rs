//! The DHCPv4 server of the boot network (RFC 2131, RFC 4578): addresses and boot files for one subnet on one interface.
//!
//! | module | what it holds |
//! |---|---|
//! | [`packet`] | reading requests, writing replies |
//! | [`leases`] | the table of leases |
//! | [`engine`] | what is answered |
//! | [`router`] | optional: "no IPv6 router here", so that iPXE does not wait for one |
//!
//! Here: the configuration and the socket. Leases live in memory only; see [`engine`] for why that is enough. There is
//! no proxyDHCP and no port 4011 yet.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::Instant;

use protocol::ids::{Mac, NodeId};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{mpsc::UnboundedSender, watch};

use engine::Note;
use leases::Leases;
use packet::SERVER_PORT;

pub mod engine;
pub mod leases;
pub mod packet;
pub mod router;

/// Longest datagram that is read, in bytes; longer ones are cut and then fail to parse.
const MAX_PACKET: usize = 4096;

/// What the server serves.
#[derive(Debug, Clone)]
pub struct DhcpConfig {
    /// The interface that clients are on; nothing is served or sent elsewhere.
    pub interface: String,
    /// The server's address on it: server identifier and next-server.
    pub server: Ipv4Addr,
    /// Network address and prefix length in bits.
    pub subnet: (Ipv4Addr, u8),
    /// First and last address given to machines without a reservation.
    pub range: (Ipv4Addr, Ipv4Addr),
    /// Option 3.
    pub router: Option<Ipv4Addr>,
    /// Option 6.
    pub dns: Vec<Ipv4Addr>,
    /// Time servers (option 42).
    pub ntp_servers: Vec<Ipv4Addr>,
    /// Option 15.
    pub domain: Option<String>,
    /// Lease time in seconds.
    pub lease_s: u32,
    /// Base URL of the boot server (`http://10.9.0.1:8080`), for UEFI HTTP Boot.
    pub http_base: String,
    /// Machines with an address of their own.
    pub reservations: Vec<Reservation>,
    /// What firmware is told to load.
    pub boot_files: BootFiles,
}

/// A machine with an address of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// The interface that asks.
    pub mac: Mac,
    /// The address it gets, in the subnet; in the range or not.
    pub address: Ipv4Addr,
    /// The node's id, sent as its host name (option 12).
    pub node: Option<NodeId>,
}

/// Names of the boot files, as TFTP serves them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFiles {
    /// For iPXE itself.
    pub ipxe_script: String,
    /// For BIOS firmware.
    pub bios: String,
    /// For UEFI firmware; also below `/boot/` by HTTP.
    pub efi: String,
}

impl Default for BootFiles {
    fn default() -> Self {
        Self {
            ipxe_script: "boot.ipxe".to_owned(),
            bios: "undionly.kpxe".to_owned(),
            efi: "ipxe.efi".to_owned(),
        }
    }
}

impl DhcpConfig {
    /// The network mask.
    #[must_use]
    pub fn mask(&self) -> Ipv4Addr {
        let host_bits = 32_u32.saturating_sub(u32::from(self.subnet.1));
        Ipv4Addr::from(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }

    /// The subnet's broadcast address.
    #[must_use]
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet.0) | !u32::from(self.mask()))
    }

    /// Whether an address is of the subnet.
    #[must_use]
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let mask = u32::from(self.mask());
        u32::from(address) & mask == u32::from(self.subnet.0) & mask
    }

    /// Whether an address is in the range.
    #[must_use]
    pub fn in_range(&self, address: Ipv4Addr) -> bool {
        (self.range.0..=self.range.1).contains(&address)
    }

    /// Checks that the parts agree.
    ///
    /// # Errors
    /// [`DhcpError::Config`] with every problem found.
    pub fn check(&self) -> Result<(), DhcpError> {
        let mut problems = Vec::new();
        let subnet = format!("{}/{}", self.subnet.0, self.subnet.1);
        if !(1..=30).contains(&self.subnet.1) {
            problems.push(format!("the subnet {subnet} must have a prefix length of 1 to 30"));
        }
        let named = [("server address", self.server), ("first of range", self.range.0)];
        let named = named.into_iter().chain([("last of range", self.range.1)]);
        let named = named.chain(self.router.map(|router| ("router", router)));
        let named = named.chain(self.reservations.iter().map(|r| ("reservation", r.address)));
        for (what, address) in named {
            if !self.contains(address) {
                problems.push(format!("the {what} {address} is not in the subnet {subnet}"));
            } else if address == self.subnet.0 || address == self.broadcast() {
                problems.push(format!("the {what} {address} is no host address of {subnet}"));
            }
        }
        if self.range.0 > self.range.1 {
            problems.push(format!("the range {} to {} is empty", self.range.0, self.range.1));
        }
        if self.lease_s == 0 {
            problems.push("the lease time is 0".to_owned());
        }
        for (index, entry) in self.reservations.iter().enumerate() {
            let earlier = self.reservations.iter().take(index);
            if let Some(other) =
                earlier.into_iter().find(|e| e.mac == entry.mac || e.address == entry.address)
            {
                problems.push(format!(
                    "two reservations clash: {} {} and {} {}",
                    other.mac, other.address, entry.mac, entry.address
                ));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(DhcpError::Config(problems.join("; "))) }
    }
}

/// What the server learned about a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DhcpSeen {
    /// It looks for a server.
    Discover {
        /// The interface.
        mac: Mac,
        /// Its SMBIOS UUID, if it said so (option 97), as iPXE and Linux write it.
        uuid: Option<String>,
        /// Its firmware's architecture (option 93, RFC 4578).
        arch: Option<u16>,
        /// It is firmware or iPXE asking what to boot.
        boot: bool,
    },
    /// It has an address, new or renewed.
    Leased {
        /// The interface.
        mac: Mac,
        /// The address.
        address: Ipv4Addr,
        /// It is firmware or iPXE.
        boot: bool,
    },
}

/// Why DHCP cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum DhcpError {
    /// The configuration contradicts itself.
    #[error("DHCP configuration: {0}")]
    Config(String),
    /// The port is taken.
    #[error(
        "udp port {SERVER_PORT} (DHCP) on `{interface}` is in use: stop the other DHCP server there \
         (`ss -ulpn sport = :67` names it) or choose another interface"
    )]
    PortInUse {
        /// The interface.
        interface: String,
    },
    /// Not allowed.
    #[error(
        "not allowed to serve DHCP on udp port {SERVER_PORT} of `{interface}`: run as root or with \
         CAP_NET_BIND_SERVICE and CAP_NET_RAW"
    )]
    Denied {
        /// The interface.
        interface: String,
    },
    /// No such interface.
    #[error("no interface `{interface}` to serve DHCP on: `ip link` lists those that exist")]
    NoInterface {
        /// The interface.
        interface: String,
    },
    /// Anything else about the socket.
    #[error("DHCP on udp port {SERVER_PORT} of `{interface}`: {action}")]
    Socket {
        /// The interface.
        interface: String,
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A bound server: the port is taken, nothing is answered until [`Server::run`].
#[derive(Debug)]
pub struct Server {
    config: DhcpConfig,
    socket: UdpSocket,
}

/// Takes the port on the interface.
///
/// # Errors
/// When the configuration contradicts itself, the interface does not exist, or the port is taken or not allowed.
pub fn bind(config: DhcpConfig) -> Result<Server, DhcpError> {
    config.check()?;
    let interface = config.interface.clone();
    let fail = |action| {
        let interface = interface.clone();
        move |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => DhcpError::PortInUse { interface },
            io::ErrorKind::PermissionDenied => DhcpError::Denied { interface },
            _ if source.raw_os_error() == Some(ENODEV) => DhcpError::NoInterface { interface },
            _ => DhcpError::Socket { interface, action, source },
        }
    };
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))
        .map_err(fail("cannot make a socket"))?;
    // Bound to the device, so that a broadcast leaves there and other interfaces are not served.
    socket
        .bind_device(Some(config.interface.as_bytes()))
        .map_err(fail("cannot bind to the device"))?;
    socket.set_broadcast(true).map_err(fail("cannot allow broadcasts"))?;
    socket.set_nonblocking(true).map_err(fail("cannot make the socket non-blocking"))?;
    let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, SERVER_PORT);
    socket.bind(&address.into()).map_err(fail("cannot bind"))?;
    Ok(Server { config, socket: socket.into() })
}

/// `ENODEV` of Linux: no such device.
const ENODEV: i32 = 19;

/// Binds and serves until `shutdown` is true or its sender is gone.
///
/// # Errors
/// As [`bind`] and [`Server::run`].
pub async fn serve(
    config: DhcpConfig,
    seen: UnboundedSender<DhcpSeen>,
    shutdown: watch::Receiver<bool>,
) -> Result<(), DhcpError> {
    bind(config)?.run(seen, shutdown).await
}

impl Server {
    /// Answers clients until `shutdown` is true or its sender is gone. What is learned goes to `seen`; a receiver that
    /// is gone does not matter.
    ///
    /// # Errors
    /// When the socket cannot be used at all. Failures to send one reply are logged.
    pub async fn run(
        self,
        seen: UnboundedSender<DhcpSeen>,
        mut shutdown: watch::Receiver<bool>,
    ) -> Result<(), DhcpError> {
        let Self { config, socket } = self;
        let fail = |action| {
            let interface = config.interface.clone();
            move |source| DhcpError::Socket { interface, action, source }
        };
        let socket =
            tokio::net::UdpSocket::from_std(socket).map_err(fail("cannot register the socket"))?;
        let mut leases = Leases::default();
        let mut buffer = vec![0; MAX_PACKET];
        tracing::info!(interface = config.interface, server = %config.server, "serving DHCP");
        loop {
            let received = tokio::select! {
                received = socket.recv_from(&mut buffer) => received,
                () = stopped(&mut shutdown) => return Ok(()),
            };
            // A link that goes down and the like pass; the socket stays good.
            let len = match received {
                Ok((len, _)) => len,
                Err(error) => {
                    tracing::warn!(interface = config.interface, %error, "DHCP: cannot receive");
                    tokio::time::sleep(RECEIVE_PAUSE).await;
                    continue;
                }
            };
            let packet = buffer.get(..len).unwrap_or_default();
            let decision = engine::decide(&mut leases, &config, packet, Instant::now());
            log(decision.note);
            if let Some(reply) = decision.reply
                && let Err(error) = socket.send_to(&reply.bytes, reply.destination).await
            {
                tracing::warn!(destination = %reply.destination, %error, "DHCP: cannot send a reply");
            }
            if let Some(what) = decision.seen
                && seen.send(what).is_err()
            {
                tracing::debug!("DHCP: nobody listens for what is seen");
            }
        }
    }
}

/// Waits until the flag is true or its sender is gone.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    let _gone_or_true = shutdown.wait_for(|stop| *stop).await.is_ok();
}

/// Pause after a failed receive, so that a lasting failure does not take a whole core.
const RECEIVE_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

fn log(note: Option<Note>) {
    match note {
        Some(Note::Info(text)) => tracing::info!("DHCP: {text}"),
        Some(Note::Warn(text)) => tracing::warn!("DHCP: {text}"),
        Some(Note::Debug(text)) => tracing::debug!("DHCP: {text}"),
        None => {}
    }
}
