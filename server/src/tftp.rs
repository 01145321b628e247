//! A read-only TFTP server (RFC 1350 with options) for the first file that firmware loads.
//!
//! | module | what it holds |
//! |---|---|
//! | [`packet`] | packets, options, safe names |
//! | [`window`] | blocks on their way |
//! | `transfer` | one transfer's socket and file |
//!
//! There is no writing and no netascii. Each transfer has its own socket, connected to its client.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use packet::{ErrorCode, Opening, Wishes, error_packet, parse_opening};
use transfer::TransferError;

pub mod packet;
mod transfer;
pub mod window;

/// The port that firmware asks (RFC 1350 section 4).
pub const PORT: u16 = 69;
/// Transfers at a time; further clients wait for their own retransmission.
pub const MAX_TRANSFERS: usize = 256;
/// How often a window is sent again before a transfer is given up.
pub const MAX_RETRIES: u32 = 5;
/// Longest opening packet that is read, in bytes (RFC 2347 section 1: 512, with room for sloppy clients).
const MAX_OPENING: usize = 1024;
/// Pause after a failed receive, so that a lasting failure does not take a whole core.
const RECEIVE_PAUSE: Duration = Duration::from_millis(100);

/// What is served and where.
#[derive(Debug, Clone)]
pub struct TftpConfig {
    /// Address and port to listen on; port 0 takes any free one.
    pub bind: SocketAddr,
    /// Directory of files, if any. Symbolic links out of it are not followed, but for those of `linked`.
    pub root: Option<PathBuf>,
    /// Files directly in `root` that are served wherever they lead: the boot programs that DHCP names. In Debian's package of iPXE
    /// `ipxe.efi` is a link into `/boot`.
    pub linked: BTreeSet<String>,
    /// Files held in memory by name (no leading `/`); they win over those on disk.
    pub builtin: BTreeMap<String, Bytes>,
}

/// Why TFTP cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TftpError {
    /// The port is taken.
    #[error(
        "{bind} (TFTP, udp) is in use: stop the other TFTP server (`ss -ulpn sport = :{}` names it) \
         or choose another address",
        bind.port()
    )]
    PortInUse {
        /// Where it was to listen.
        bind: SocketAddr,
    },
    /// Not allowed.
    #[error("not allowed to serve TFTP on {bind} (udp): run as root or with CAP_NET_BIND_SERVICE")]
    Denied {
        /// Where it was to listen.
        bind: SocketAddr,
    },
    /// The machine does not have the address.
    #[error("no interface has the address {} to serve TFTP on: `ip addr` lists them", bind.ip())]
    NoAddress {
        /// Where it was to listen.
        bind: SocketAddr,
    },
    /// The directory of files is not there.
    #[error("TFTP root {path}")]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why it cannot be read.
        #[source]
        source: io::Error,
    },
    /// Anything else about the socket.
    #[error("TFTP on {bind} (udp): {action}")]
    Socket {
        /// Where it listens.
        bind: SocketAddr,
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// What transfers read from.
#[derive(Debug)]
struct Content {
    root: Option<PathBuf>,
    linked: BTreeSet<String>,
    builtin: BTreeMap<String, Bytes>,
}

/// A bound server: the port is taken, nothing is answered until [`Server::run`].
#[derive(Debug)]
pub struct Server {
    bind: SocketAddr,
    content: Content,
    socket: UdpSocket,
}

/// Takes the port.
///
/// # Errors
/// When the port is taken or not allowed, the address is not this machine's, or the root is not a readable directory.
pub fn bind(config: TftpConfig) -> Result<Server, TftpError> {
    let TftpConfig { bind, root, linked, builtin } = config;
    if let Some(path) = &root {
        std::fs::read_dir(path).map_err(|source| TftpError::Root { path: path.clone(), source })?;
    }
    let fail = |action| {
        move |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => TftpError::PortInUse { bind },
            io::ErrorKind::PermissionDenied => TftpError::Denied { bind },
            io::ErrorKind::AddrNotAvailable => TftpError::NoAddress { bind },
            _ => TftpError::Socket { bind, action, source },
        }
    };
    let socket = Socket::new(Domain::for_address(bind), Type::DGRAM, Some(Protocol::UDP))
        .map_err(fail("cannot make a socket"))?;
    socket.set_nonblocking(true).map_err(fail("cannot make the socket non-blocking"))?;
    socket.bind(&bind.into()).map_err(fail("cannot bind"))?;
    Ok(Server { bind, content: Content { root, linked, builtin }, socket: socket.into() })
}

/// Binds and serves until `shutdown` is true or its sender is gone.
///
/// # Errors
/// As [`bind`] and [`Server::run`].
pub async fn serve(config: TftpConfig, shutdown: watch::Receiver<bool>) -> Result<(), TftpError> {
    bind(config)?.run(shutdown).await
}

impl Server {
    /// Where it listens.
    ///
    /// # Errors
    /// When the socket does not tell.
    pub fn local_addr(&self) -> Result<SocketAddr, TftpError> {
        self.socket.local_addr().map_err(|source| TftpError::Socket {
            bind: self.bind,
            action: "cannot tell its address",
            source,
        })
    }

    /// Answers clients until `shutdown` is true or its sender is gone; running transfers end with it.
    ///
    /// # Errors
    /// When the socket cannot be used at all. What goes wrong in one transfer is logged.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>) -> Result<(), TftpError> {
        let Self { bind, content, socket } = self;
        let fail = |action| move |source| TftpError::Socket { bind, action, source };
        let local = socket.local_addr().map_err(fail("cannot tell its address"))?;
        let socket =
            tokio::net::UdpSocket::from_std(socket).map_err(fail("cannot register the socket"))?;
        let mut desk = Desk {
            content: Arc::new(content),
            local,
            active: Arc::default(),
            slots: Arc::new(Semaphore::new(MAX_TRANSFERS)),
            transfers: JoinSet::new(),
        };
        let mut buffer = [0; MAX_OPENING];
        tracing::info!(%local, "serving TFTP");
        loop {
            let received = tokio::select! {
                received = socket.recv_from(&mut buffer) => received,
                Some(_) = desk.transfers.join_next() => continue,
                () = stopped(&mut shutdown) => return Ok(()),
            };
            let (len, peer) = match received {
                Ok(received) => received,
                Err(error) => {
                    tracing::warn!(%local, %error, "TFTP: cannot receive");
                    tokio::time::sleep(RECEIVE_PAUSE).await;
                    continue;
                }
            };
            match parse_opening(buffer.get(..len).unwrap_or_default()) {
                Opening::Read { name, wishes } => desk.start(peer, name, wishes),
                Opening::Refused(code, text) => refuse(&socket, peer, code, text).await,
                Opening::Ignored => {}
            }
        }
    }
}

async fn refuse(socket: &tokio::net::UdpSocket, peer: SocketAddr, code: ErrorCode, text: &str) {
    tracing::info!(%peer, "TFTP: refused: {text}");
    if let Err(error) = socket.send_to(&error_packet(code, text), peer).await {
        tracing::debug!(%peer, %error, "TFTP: cannot send a refusal");
    }
}

/// Waits until the flag is true or its sender is gone.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    let _gone_or_true = shutdown.wait_for(|stop| *stop).await.is_ok();
}

/// Starts transfers and knows which run.
struct Desk {
    content: Arc<Content>,
    local: SocketAddr,
    active: Arc<Mutex<HashSet<SocketAddr>>>,
    slots: Arc<Semaphore>,
    transfers: JoinSet<()>,
}

impl Desk {
    fn start(&mut self, peer: SocketAddr, name: String, wishes: Wishes) {
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            tracing::warn!(%peer, name, "TFTP: {MAX_TRANSFERS} transfers run already: not answered");
            return;
        };
        // A repeated request of a running transfer must not start a second one.
        if !self.active.lock().unwrap_or_else(PoisonError::into_inner).insert(peer) {
            return;
        }
        let (content, active, local) =
            (Arc::clone(&self.content), Arc::clone(&self.active), self.local);
        self.transfers.spawn(async move {
            match transfer::send(&content, local, peer, &name, wishes).await {
                Ok(bytes) => tracing::info!(%peer, name, bytes, "TFTP: sent"),
                Err(TransferError::Io(action, error)) => {
                    tracing::warn!(%peer, name, %error, "TFTP: {action}");
                }
                Err(error) => tracing::info!(%peer, name, "TFTP: {error}"),
            }
            active.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
            drop(slot);
        });
    }
}
