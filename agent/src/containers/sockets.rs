//! Held sockets: listening sockets that are the node's, not a program's, so that no connection is refused while a program
//! crashes, restarts or is replaced by its next version.
//!
//! ```text
//!   agent: makes each once ──SCM_RIGHTS──▶ monitor: holds them ──from descriptor 3 on──▶ program
//!     ▲ keeps copies over restarts           │
//!     └────────── a new agent asks ──────────┘
//! ```
//! A socket is told by where it listens: the next version that listens there gets the very same one, with every connection
//! that waits in it. They are made in the node's own network, whatever network the container is in. This makes and passes
//! them; it decides nothing about containers.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use protocol::imageset::{Listen, MAX_SOCKETS, Socket};
use rustix::cmsg_space;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Connections that wait where the description does not say (SOMAXCONN of current kernels).
const DEFAULT_BACKLOG: u32 = 4096;
/// Permissions of a Unix socket's path where the description does not say.
const DEFAULT_MODE: u32 = 0o666;
/// Room for the descriptors of one message.
const RIGHTS_SPACE: usize = cmsg_space!(ScmRights(MAX_SOCKETS));

/// Why a socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The kernel refused a step.
    #[error("socket {listen}: cannot {action}")]
    Refused {
        /// Where it should listen.
        listen: Listen,
        /// The step.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another program listens there already.
    #[error("socket {0}: another program listens there; stop it, or listen elsewhere")]
    Taken(Listen),
    /// The path of a Unix socket is something else.
    #[error("socket {0}: there is a file that is no socket; remove it, or listen elsewhere")]
    InTheWay(Listen),
}

/// One held socket.
#[derive(Debug, Clone)]
struct Held {
    listen: Listen,
    fd: Arc<OwnedFd>,
}

/// The held sockets of a container, in the order of its description. Cheap to clone: clones are the same sockets.
#[derive(Debug, Clone, Default)]
pub struct HeldSockets(Vec<Held>);

impl HeldSockets {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Where they listen.
    pub fn places(&self) -> impl Iterator<Item = &Listen> {
        self.0.iter().map(|held| &held.listen)
    }

    /// Their descriptors, in order.
    #[must_use]
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(|held| held.fd.as_fd()).collect()
    }

    /// What the descriptors of a message are, which come in the order of the description. `None` if there are more or fewer.
    pub(super) fn of(described: &[Socket], descriptors: Vec<OwnedFd>) -> Option<Self> {
        let held = |(socket, fd): (&Socket, OwnedFd)| Held {
            listen: socket.listen.clone(),
            fd: Arc::new(fd),
        };
        (described.len() == descriptors.len())
            .then(|| Self(described.iter().zip(descriptors).map(held).collect()))
    }

    /// Removes the paths of those Unix sockets that `next` does not keep. To be called when the container that had them is
    /// gone for good; nobody listens there once its program and its monitor have ended.
    pub fn retire(self, next: &Self) {
        for held in self.0 {
            let Listen::Unix(path) = &held.listen else { continue };
            if next.places().all(|kept| *kept != held.listen)
                && let Err(error) = fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                log::warn!("socket {}: {error}", held.listen);
            }
        }
    }
}

/// The sockets of a description: those of `have` that listen at the same places, and new ones for the others. Those of
/// `have` that are no longer described close when the last who holds them ends.
///
/// # Errors
/// [`SocketError`] names the socket; none that was made stays then.
pub fn obtain(described: &[Socket], have: &HeldSockets) -> Result<HeldSockets, SocketError> {
    let mut sockets = Vec::with_capacity(described.len());
    for socket in described {
        let known = have.0.iter().find(|held| held.listen == socket.listen).cloned();
        let held = match known {
            Some(held) => {
                set_backlog(&held.fd, socket)?;
                held
            }
            None => Held { listen: socket.listen.clone(), fd: Arc::new(make(socket)?) },
        };
        sockets.push(held);
    }
    Ok(HeldSockets(sockets))
}

/// Those of several containers together.
impl<'a> FromIterator<&'a HeldSockets> for HeldSockets {
    fn from_iter<T: IntoIterator<Item = &'a HeldSockets>>(several: T) -> Self {
        Self(several.into_iter().flat_map(|sockets| sockets.0.iter().cloned()).collect())
    }
}

fn refused<E: Into<io::Error>>(
    socket: &Socket,
    action: &'static str,
) -> impl FnOnce(E) -> SocketError {
    let listen = socket.listen.clone();
    move |source| {
        let source = source.into();
        match source.kind() {
            io::ErrorKind::AddrInUse => SocketError::Taken(listen),
            _ => SocketError::Refused { listen, action, source },
        }
    }
}

fn backlog(socket: &Socket) -> i32 {
    i32::try_from(socket.backlog.unwrap_or(DEFAULT_BACKLOG)).unwrap_or(i32::MAX)
}

/// Listening anew on what listens already only changes how many connections may wait.
fn set_backlog(fd: &OwnedFd, socket: &Socket) -> Result<(), SocketError> {
    match socket.listen {
        Listen::Udp(_) => Ok(()),
        Listen::Tcp(_) | Listen::Unix(_) => {
            rustix::net::listen(fd, backlog(socket)).map_err(refused(socket, "listen"))
        }
    }
}

fn make(socket: &Socket) -> Result<OwnedFd, SocketError> {
    let new = |family, kind| {
        rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)
            .map_err(refused(socket, "make it"))
    };
    let fd = match &socket.listen {
        Listen::Tcp(address) | Listen::Udp(address) => {
            let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let tcp = matches!(socket.listen, Listen::Tcp(_));
            let fd = new(family, if tcp { SocketType::STREAM } else { SocketType::DGRAM })?;
            if tcp {
                rustix::net::sockopt::set_socket_reuseaddr(&fd, true)
                    .map_err(refused(socket, "set SO_REUSEADDR"))?;
            }
            rustix::net::bind(&fd, address).map_err(refused(socket, "bind"))?;
            fd
        }
        Listen::Unix(path) => {
            let fd = new(AddressFamily::UNIX, SocketType::STREAM)?;
            bind_path(&fd, Path::new(path), socket)?;
            fd
        }
    };
    set_backlog(&fd, socket)?;
    Ok(fd)
}

/// Binds at a path. One that a program left behind, at which nobody listens any more, is taken away first.
fn bind_path(fd: &OwnedFd, path: &Path, socket: &Socket) -> Result<(), SocketError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)
            .map_err(refused::<io::Error>(socket, "make the directory it is in"))?;
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(refused(socket, "look at its path")(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::InTheWay(socket.listen.clone()));
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
                .map_err(refused::<io::Error>(socket, "remove the one left there"))?,
            _ => return Err(SocketError::Taken(socket.listen.clone())),
        },
    }
    let address = SocketAddrUnix::new(path).map_err(refused(socket, "bind"))?;
    rustix::net::bind(fd, &address).map_err(refused(socket, "bind"))?;
    let mode = fs::Permissions::from_mode(socket.mode.map_or(DEFAULT_MODE, |mode| mode.0));
    fs::set_permissions(path, mode).map_err(refused::<io::Error>(socket, "set its permissions"))
}

/// Sends these bytes, which must not be empty, with descriptors attached to the first of them; the receiver gets copies.
///
/// # Errors
/// The kernel's error; `WriteZero` when not all bytes went.
pub(crate) fn send_with(
    stream: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); RIGHTS_SPACE];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    let sent =
        rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives up to `most` bytes and the descriptors that came with them, marked close-on-exec. No bytes: the other side has
/// closed.
///
/// # Errors
/// The kernel's error.
pub(crate) fn receive_with(stream: impl AsFd, most: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); RIGHTS_SPACE];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; most];
    let received = rustix::net::recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    bytes.truncate(received.bytes);
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok((bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn described(listen: &str) -> Socket {
        Socket {
            name: "http".parse().expect("name"),
            listen: listen.parse().expect("listen"),
            backlog: None,
            mode: None,
        }
    }

    fn numbers(sockets: &HeldSockets) -> Vec<i32> {
        sockets.descriptors().iter().map(AsRawFd::as_raw_fd).collect()
    }

    fn address(sockets: &HeldSockets) -> SocketAddr {
        let fd = sockets.0[0].fd.try_clone().expect("clone");
        TcpListener::from(fd).local_addr().expect("address")
    }

    #[test]
    fn a_socket_is_kept_by_its_place_and_others_are_made() {
        let have = obtain(&[described("tcp://127.0.0.1:0")], &HeldSockets::default()).expect("one");
        let next = [described("udp://127.0.0.1:0"), described("tcp://127.0.0.1:0")];
        let next = obtain(&next, &have).expect("two");
        assert_eq!(next.len(), 2);
        assert_eq!(numbers(&next)[1], numbers(&have)[0]);
        assert_ne!(numbers(&next)[0], numbers(&have)[0]);
        let address = address(&have);
        drop((have, next));
        TcpStream::connect(address).expect_err("the last holder is gone");
    }

    #[test]
    fn a_connection_waits_where_nobody_accepts_yet() {
        let held = obtain(&[described("tcp://127.0.0.1:0")], &HeldSockets::default()).expect("one");
        let mut client = TcpStream::connect(address(&held)).expect("connect");
        let listener = TcpListener::from(held.0[0].fd.try_clone().expect("clone"));
        drop(listener.accept().expect("it waits"));
        assert_eq!(client.read(&mut [0]).expect("closed"), 0);
    }

    #[test]
    fn a_place_that_is_taken_is_said_by_its_name() {
        let other = TcpListener::bind("127.0.0.1:0").expect("other");
        let place = format!("tcp://{}", other.local_addr().expect("address"));
        let error = obtain(&[described(&place)], &HeldSockets::default()).expect_err("taken");
        assert!(error.to_string().starts_with(&format!("socket {place}: another")), "{error}");
    }

    #[test]
    fn a_path_that_was_left_behind_is_used_again_and_nothing_else_is_removed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("sub/app.sock");
        let socket = Socket {
            mode: Some(protocol::imageset::FileMode(0o660)),
            ..described(&format!("unix:{}", path.display()))
        };
        let one = obtain(std::slice::from_ref(&socket), &HeldSockets::default()).expect("one");
        assert_eq!(fs::metadata(&path).expect("path").permissions().mode() & 0o777, 0o660);
        let taken = obtain(std::slice::from_ref(&socket), &HeldSockets::default());
        assert!(matches!(taken, Err(SocketError::Taken(_))), "{taken:?}");
        drop(one);
        assert!(path.exists(), "a program that died leaves its path");
        let two = obtain(std::slice::from_ref(&socket), &HeldSockets::default()).expect("two");
        UnixStream::connect(&path).expect("connect");
        two.clone().retire(&two);
        assert!(path.exists(), "the next version keeps it");
        two.retire(&HeldSockets::default());
        assert!(!path.exists());
        fs::write(&path, "a file").expect("write");
        let error = obtain(&[socket], &HeldSockets::default()).expect_err("a file");
        assert!(matches!(error, SocketError::InTheWay(_)), "{error}");
        assert!(path.exists());
    }

    #[test]
    fn descriptors_travel_with_a_message_and_are_the_same_sockets() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let places = [described("tcp://127.0.0.1:0"), described("udp://127.0.0.1:0")];
        let held = obtain(&places, &HeldSockets::default()).expect("two");
        send_with(&ours, b"x", &held.descriptors()).expect("send");
        let (bytes, descriptors) = receive_with(&theirs, 10).expect("receive");
        assert_eq!((bytes.as_slice(), descriptors.len()), (&b"x"[..], 2));
        let got = HeldSockets::of(&places, descriptors).expect("as many");
        assert_eq!(address(&got), address(&held));
        assert!(HeldSockets::of(&places, Vec::new()).is_none());
        drop(ours);
        assert!(receive_with(&theirs, 10).expect("closed").0.is_empty());
    }
}
