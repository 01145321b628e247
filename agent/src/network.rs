//! The node's network: loopback, every Ethernet and InfiniBand interface, bonds and VLANs, DHCP or fixed addresses, and the
//! files that name it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`client`], [`client6`] | the state machines of the DHCP and the DHCPv6 client, pure |
//! | [`message`], [`message6`] | their messages, pure |
//! | [`advertisement`], `six` | what IPv6 routers say, and what is known of an interface's IPv6, pure |
//! | [`frame`] | IPv4 and UDP headers, pure |
//! | [`early`], [`lease`] | the first address, before there is an agent, and how it is handed on |
//! | `manager`, `nic`, `nic6` | the thread: interfaces as they come and go, bonds, VLANs; a task for each interface |
//! | `links`, `kernel`, `socket`, `socket6`, `files` | rtnetlink, packet, UDP and ICMPv6 sockets, `/etc` |
//!
//! Everything is driven by netlink notifications and timers; nothing polls. An agent that starts again finds the
//! address of its earlier life, keeps it in use and asks for it again. What is wished for is
//! [`protocol::network`]'s; virtual interfaces (bridges, veths) are left alone unless the wish names or makes them. IPv6
//! addresses by router advertisement are the kernel's work; name servers and DHCPv6 are ours.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use protocol::boot_args::BootArgs;
use protocol::ids::{Mac, NodeId};
use protocol::network::Network;

pub mod advertisement;
pub mod client;
pub mod client6;
pub mod early;
mod files;
pub mod frame;
mod kernel;
pub mod lease;
mod links;
mod manager;
pub mod message;
pub mod message6;
mod nic;
mod nic6;
mod six;
mod socket;
mod socket6;

/// What belongs to the place that the agent runs in rather than to the command line.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where `resolv.conf`, `hosts` and `hostname` are written: `/etc` in Layer0.
    pub etc: PathBuf,
    /// Whether to set the kernel's host name.
    pub set_hostname: bool,
    /// The node's id; it is the host name when known.
    pub node: Option<NodeId>,
    /// The site's wishes, [`crate::paths::ConfigDir::network`]; need not exist.
    pub wishes: PathBuf,
    /// Where leases are kept, [`crate::paths::RunDirs::state`].
    pub state: PathBuf,
}

/// Metric of the boot interface's default route: it wins.
const BOOT_METRIC: u32 = 100;
/// Metric of the others' default routes, plus their index.
const OTHER_METRIC: u32 = 200;

/// The metric of an interface's default route.
fn metric(is_boot: bool, index: u32) -> u32 {
    if is_boot { BOOT_METRIC } else { OTHER_METRIC.saturating_add(index) }
}

/// What happened on the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkEvent {
    /// An interface has a carrier.
    LinkUp {
        /// Its name.
        link: String,
        /// Its address on the link.
        mac: Mac,
    },
    /// An interface has addresses, new or changed. The files in `/etc` are written before this is said.
    Configured {
        /// Its name.
        link: String,
        /// Its address on the link.
        mac: Mac,
        /// What it has now.
        addresses: Vec<IpAddr>,
        /// The default gateway.
        router: Option<Ipv4Addr>,
        /// The node's host name.
        hostname: Option<String>,
        /// Time servers.
        ntp: Vec<IpAddr>,
    },
    /// What is waited for, of all interfaces, the boot interface first.
    Waiting(String),
    /// What one interface waits for, or that it does not any more.
    LinkWaits {
        /// Its name.
        link: String,
        /// Its address on the link.
        mac: Mac,
        /// What for.
        why: Option<String>,
    },
    /// An interface is there no more. Before, where it had an address, this was [`NetworkEvent::Lost`].
    Gone(String),
    /// An interface has lost its last address or has disappeared.
    Lost {
        /// Its name.
        link: String,
        /// The address that is gone, the first of them.
        address: IpAddr,
    },
}

/// Why the network cannot be looked after at all.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No thread or runtime.
    #[error("network: cannot {action}")]
    Start {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel does not speak netlink with us.
    #[error("network: cannot {action} by netlink")]
    Netlink {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// The thread ended before it was ready.
    #[error("network: the thread ended at its start")]
    Died,
}

/// Starts the network's thread, which lives as long as the process. Returns when loopback is up; what happens then is told
/// to `sink`, from that thread.
///
/// # Errors
/// When there is no thread to be had or the kernel refuses netlink. Whatever goes wrong on one interface is said as
/// [`NetworkEvent::Waiting`] or logged, and tried again.
pub fn start(
    args: &BootArgs,
    settings: Settings,
    sink: impl Fn(NetworkEvent) + Send + 'static,
) -> Result<(), NetworkError> {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let (wish, bootif) = (args.network.clone().before(read_wishes(&settings.wishes)), args.bootif);
    let body = move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(source) => {
                let error = NetworkError::Start { action: "make a runtime", source };
                return tell(&ready, Err(error));
            }
        };
        runtime.block_on(async {
            match manager::Manager::begin(wish, bootif, settings, Box::new(sink)).await {
                Ok(manager) => {
                    tell(&ready, Ok(()));
                    manager.run().await;
                }
                Err(error) => tell(&ready, Err(error)),
            }
        });
    };
    std::thread::Builder::new()
        .name("network".to_owned())
        .spawn(body)
        .map_err(|source| NetworkError::Start { action: "start a thread", source })?;
    is_ready.recv().map_err(|_| NetworkError::Died)?
}

/// The site's wishes; what is wrong with them is said, and the rest holds.
fn read_wishes(path: &Path) -> Network {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Network::default(),
        Err(error) => {
            log::error!("network: cannot read {}: {error}", path.display());
            return Network::default();
        }
    };
    let (network, problems) = Network::parse_file(&text);
    for problem in problems {
        log::error!("network: {}: {problem}", path.display());
    }
    network
}

fn tell(
    ready: &std::sync::mpsc::Sender<Result<(), NetworkError>>,
    result: Result<(), NetworkError>,
) {
    if ready.send(result).is_err() {
        log::error!("network: whoever started it has gone");
    }
}

#[cfg(test)]
mod tests;
