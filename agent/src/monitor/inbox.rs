//! The socket at which a container's program speaks of itself: NOTIFY_SOCKET of sd_notify(3). What the words mean is
//! [`super::notify`]'s.

use std::fs::{self, Permissions};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::notify::{MAX_DATAGRAM, Message, parse};
use crate::containers::NOTIFY_FILE;

/// Most datagrams that are read before other things get their turn.
const MOST_AT_ONCE: usize = 32;
/// Most parents that are looked at on the way from a sender to the container's first process.
const MOST_PARENTS: usize = 64;

/// The socket.
#[derive(Debug)]
pub(super) struct Inbox {
    socket: UnixDatagram,
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Inbox {
    /// Makes it in the container's directory, which only root can enter; container-init binds it into the container, where
    /// every user may write to it.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let path = dir.join(NOTIFY_FILE);
        let socket = UnixDatagram::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o666))?;
        socket.set_nonblocking(true)?;
        rustix::net::sockopt::set_socket_passcred(&socket, true)?;
        Ok(Self { socket })
    }

    /// What processes of the container, whose first process is `init`, have sent.
    pub(super) fn receive(&self, init: u32) -> Vec<Message> {
        let mut messages = Vec::new();
        for _ in 0..MOST_AT_ONCE {
            // One byte more than is read, to tell what is too long.
            let mut bytes = [0; MAX_DATAGRAM + 1];
            // Room for credentials only: the kernel closes descriptors that do not fit.
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmCredentials(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut into = [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let Ok(received) = recvmsg(&self.socket, &mut into, &mut ancillary, flags) else {
                break;
            };
            let sender = ancillary.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmCredentials(who) => Some(who.pid.as_raw_nonzero().get()),
                _ => None,
            });
            if sender
                .and_then(|pid| u32::try_from(pid).ok())
                .is_some_and(|pid| may_speak(pid, init))
            {
                messages.push(parse(bytes.get(..received.bytes).unwrap_or_default()));
            }
        }
        messages
    }
}

/// Whether a process may speak for the container: it is the first process or descends from it. One that has ended already
/// (systemd-notify(1) sends and ends) could only have reached the socket from inside, so it may as well.
fn may_speak(sender: u32, init: u32) -> bool {
    let mut pid = sender;
    for _ in 0..MOST_PARENTS {
        if pid == init {
            return true;
        }
        match parent(pid) {
            Some(0 | 1) => return false,
            Some(next) => pid = next,
            None => return true,
        }
    }
    false
}

/// The parent of a process (proc_pid_status(5), PPid); none when it has ended.
fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_speak_for_those_it_descends_from_only() {
        let me = std::process::id();
        let above = parent(me).expect("a parent");
        assert!(may_speak(me, me) && may_speak(me, above));
        assert!(!may_speak(1, me) && !may_speak(above, me));
    }

    #[test]
    fn what_comes_is_read_and_descriptors_are_closed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let inbox = Inbox::open(dir.path()).expect("open");
        let me = std::process::id();
        assert!(inbox.receive(me).is_empty());
        let program = UnixDatagram::unbound().expect("socket");
        program.connect(dir.path().join(NOTIFY_FILE)).expect("connect");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("pair");
        crate::containers::sockets::send_with(&program, b"FDSTORE=1\nREADY=1", &[theirs.as_fd()])
            .expect("send");
        drop(theirs);
        program.send(&[b'x'; MAX_DATAGRAM + 1]).expect("a long one");
        program.send(b"STATUS=well").expect("send");
        let messages = inbox.receive(me);
        assert_eq!(messages.len(), 3);
        assert!(messages[0].ready && messages[1] == Message::default());
        assert_eq!(messages[2].text.as_deref(), Some("well"));
        let closed = io::Read::read(&mut &ours, &mut [0]).expect("end of file");
        assert_eq!(closed, 0, "nobody holds the descriptor that was sent");
    }
}
