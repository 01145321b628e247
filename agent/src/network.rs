//! The node's network: loopback, every Ethernet interface, DHCP or a fixed address, and the files that name it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`client`] | the DHCP client's state machine, pure |
//! | [`message`] | DHCP messages, pure |
//! | [`frame`] | IPv4 and UDP headers, pure |
//! | `manager`, `nic` | the thread: interfaces as they come and go, one task each |
//! | `links`, `socket`, `files` | rtnetlink, packet and UDP sockets, `/etc` |
//!
//! Everything is driven by netlink notifications and timers; nothing polls. An agent that starts again finds the
//! address of its earlier life, keeps it in use and asks for it again. There is no IPv6 beyond what the kernel does by
//! itself, and virtual interfaces (bridges, veths) are left alone unless `BOOTIF=` or `ip=` names them.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use protocol::boot_args::BootArgs;
use protocol::ids::{Mac, NodeId};

pub mod client;
mod files;
pub mod frame;
mod links;
mod manager;
pub mod message;
mod nic;
mod socket;

/// What belongs to the place that the agent runs in rather than to the command line.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where `resolv.conf`, `hosts` and `hostname` are written: `/etc` in Layer0.
    pub etc: PathBuf,
    /// Whether to set the kernel's host name.
    pub set_hostname: bool,
    /// The node's id; it is the host name when known.
    pub node: Option<NodeId>,
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
    /// An interface has an address, new or changed. The files in `/etc` are written before this is said.
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
    },
    /// Nothing goes on until something happens; one sentence what.
    Waiting(String),
    /// An interface has lost its address or has disappeared.
    Lost {
        /// Its name.
        link: String,
        /// The address that is gone.
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

/// Starts the network's thread, which lives as long as the process. Returns when loopback is up and the interfaces that
/// exist are known; what happens then is told to `sink`, from that thread.
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
    let (ip, bootif) = (args.ip.clone(), args.bootif);
    let body = move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(source) => {
                let error = NetworkError::Start { action: "make a runtime", source };
                return tell(&ready, Err(error));
            }
        };
        runtime.block_on(async {
            match manager::Manager::begin(ip, bootif, settings, Box::new(sink)).await {
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
