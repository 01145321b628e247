//! One probe of one container: a connection or a request from inside the container's network, or a command in the container,
//! without ever blocking for more than the start of a process.
//!
//! The socket is made in the container's network namespace, to which it then belongs; the thread is back in its own before
//! anything else is done.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::imageset::{Probe, http_address};
use rustix::event::PollFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::command::Command;
use crate::containers::Spec;

/// Most bytes of an answer that are looked at: the status line is in them.
const MAX_ANSWER: usize = 1024;

/// Where probes of a container start from.
#[derive(Debug)]
pub(super) struct Place {
    /// Its network namespace; none: the agent's own.
    network: Option<OwnedFd>,
    /// What commands in it are run by.
    spec: Spec,
    pid: u32,
}

impl Place {
    /// The place of the container whose first process this is. A process that has ended has none: its probes come from the
    /// agent's own network, for the moment until it is forgotten.
    pub(super) fn of(spec: &Spec, pid: u32) -> Self {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let open = |path: String| rustix::fs::open(path, flags, Mode::empty());
        let theirs = open(format!("/proc/{pid}/ns/net")).ok();
        let same = |theirs: &OwnedFd| {
            let ours =
                rustix::fs::statat(CWD, "/proc/thread-self/ns/net", rustix::fs::AtFlags::empty());
            match (rustix::fs::fstat(theirs), ours) {
                (Ok(theirs), Ok(ours)) => theirs.st_ino == ours.st_ino,
                _ => false,
            }
        };
        Self { network: theirs.filter(|theirs| !same(theirs)), spec: spec.clone(), pid }
    }

    /// Does this in the container's network.
    fn inside<T>(&self, work: impl FnOnce() -> Result<T, Errno>) -> Result<T, String> {
        let plain = |error: Errno| error.to_string();
        let Some(network) = &self.network else { return work().map_err(plain) };
        let enter = |fd: BorrowedFd<'_>| {
            move_into_link_name_space(fd, Some(LinkNameSpaceType::Network))
                .map_err(|error| format!("enter its network: {error}"))
        };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let home = rustix::fs::open("/proc/thread-self/ns/net", flags, Mode::empty())
            .map_err(|error| format!("/proc/thread-self/ns/net: {error}"))?;
        enter(network.as_fd())?;
        let result = work().map_err(plain);
        enter(home.as_fd())?;
        result
    }
}

/// A probe under way.
#[derive(Debug)]
pub(super) enum Attempt {
    /// It could not even begin.
    Failed(String),
    /// A connection is being made; then this is sent, if anything.
    Connecting { socket: OwnedFd, request: Option<Vec<u8>> },
    /// A command runs.
    Running(Box<Command>),
    /// The answer is awaited; what came of it so far.
    Answering { socket: OwnedFd, answer: Vec<u8> },
}

impl Attempt {
    /// Begins a probe.
    pub(super) fn begin(probe: &Probe, place: &Place) -> Self {
        let begun = match probe {
            Probe::Tcp(address) => connect(*address, place).map(|socket| (socket, None)),
            Probe::Http(url) => match http_address(url) {
                Some((address, path)) => {
                    connect(address, place).map(|socket| (socket, Some(request(address, path))))
                }
                None => Err(format!("`{url}` is not a URL that can be asked")),
            },
            Probe::Exec(argv) => {
                return match Command::start(&place.spec, place.pid, argv) {
                    Ok(command) => Self::Running(Box::new(command)),
                    Err(why) => Self::Failed(why),
                };
            }
        };
        match begun {
            Ok((socket, request)) => Self::Connecting { socket, request },
            Err(why) => Self::Failed(why),
        }
    }

    /// What is to be waited for before it goes on; none: nothing.
    pub(super) fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match self {
            Self::Failed(_) => None,
            Self::Connecting { socket, .. } => Some((socket.as_fd(), PollFlags::OUT)),
            Self::Answering { socket, .. } => Some((socket.as_fd(), PollFlags::IN)),
            Self::Running(command) => Some((command.as_fd(), PollFlags::IN)),
        }
    }

    /// Does what can be done without waiting. The outcome, once there is one.
    pub(super) fn go_on(&mut self) -> Option<Result<(), String>> {
        match self {
            Self::Failed(why) => Some(Err(std::mem::take(why))),
            Self::Connecting { socket, request } => {
                match connected(socket) {
                    Ok(false) => return None,
                    Ok(true) => {}
                    Err(error) => return Some(Err(format!("connect: {error}"))),
                }
                let Some(request) = request.take() else { return Some(Ok(())) };
                // A request this small goes into the buffer of a connection just made, or there is no connection.
                if let Err(error) = rustix::net::send(&*socket, &request, SendFlags::NOSIGNAL) {
                    return Some(Err(format!("send: {error}")));
                }
                match socket.try_clone() {
                    Ok(socket) => {
                        *self = Self::Answering { socket, answer: Vec::new() };
                        None
                    }
                    Err(error) => Some(Err(error.to_string())),
                }
            }
            Self::Answering { socket, answer } => receive(socket, answer),
            Self::Running(command) => command.go_on(),
        }
    }
}

fn connect(address: SocketAddr, place: &Place) -> Result<OwnedFd, String> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = place
        .inside(|| rustix::net::socket_with(family, SocketType::STREAM, flags, None))
        .map_err(|error| format!("connect: {error}"))?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(format!("connect: {error}")),
    }
}

/// Whether the connection stands; an error when it will not.
fn connected(socket: &OwnedFd) -> io::Result<bool> {
    rustix::net::sockopt::socket_error(socket)??;
    match rustix::net::getpeername(socket) {
        Ok(_) => Ok(true),
        Err(Errno::NOTCONN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn request(address: SocketAddr, path: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nhost: {address}\r\nuser-agent: layercake-health/{}\r\nconnection: close\r\n\r\n",
        env!("CARGO_PKG_VERSION")
    )
    .into_bytes()
}

fn receive(socket: &OwnedFd, answer: &mut Vec<u8>) -> Option<Result<(), String>> {
    let mut buffer = [0; MAX_ANSWER];
    let room = buffer.get_mut(..MAX_ANSWER.saturating_sub(answer.len())).unwrap_or_default();
    match rustix::net::recv(socket, room, RecvFlags::empty()) {
        Ok((_, count)) => {
            answer.extend(buffer.iter().take(count));
            judge(answer, count == 0 || answer.len() >= MAX_ANSWER)
        }
        Err(Errno::AGAIN | Errno::INTR) => None,
        Err(error) => Some(Err(format!("receive: {error}"))),
    }
}

/// What the beginning of an answer says (RFC 9112, section 4): 200 to 399 is good. None: not enough yet, unless `whole`.
fn judge(answer: &[u8], whole: bool) -> Option<Result<(), String>> {
    let Some(end) = answer.iter().position(|byte| *byte == b'\n') else {
        return whole.then(|| Err("no answer of HTTP".to_owned()));
    };
    let line = String::from_utf8_lossy(answer.get(..end).unwrap_or_default());
    let status = line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1))
        .and_then(|status| status.trim_end().parse::<u16>().ok());
    Some(match status {
        Some(200..400) => Ok(()),
        Some(status) => Err(format!("it answered {status}")),
        None => Err("no answer of HTTP".to_owned()),
    })
}

/// A target for fuzzing.
pub fn fuzz_http_answer(answer: &[u8]) {
    let _ = judge(answer, true);
    let _ = judge(answer, false);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use proptest::prelude::*;
    use rustix::event::{PollFd, Timespec, poll};

    use super::*;

    /// Drives a probe to its outcome.
    #[track_caller]
    fn outcome(probe: &Probe) -> Result<(), String> {
        let mut attempt = Attempt::begin(
            probe,
            &Place { network: None, spec: crate::health::tests::spec(), pid: 0 },
        );
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some((fd, flags)) = attempt.waits_for() {
                let second = Timespec { tv_sec: 1, tv_nsec: 0 };
                poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&second)).expect("poll");
            }
            if let Some(outcome) = attempt.go_on() {
                return outcome;
            }
            assert!(Instant::now() < until, "no outcome: {attempt:?}");
        }
    }

    /// A server that answers one request with these bytes, in two pieces.
    fn answering(answer: &'static str) -> Probe {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let url = format!("http://{}/ready?x=1", listener.local_addr().expect("address"));
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut head = [0; 4096];
            let count = stream.read(&mut head).expect("request");
            assert!(head[..count].starts_with(b"GET /ready?x=1 HTTP/1.1\r\nhost: 127.0.0.1:"));
            let (one, two) = answer.split_at(answer.len() / 2);
            drop(stream.write_all(one.as_bytes()));
            drop(stream.write_all(two.as_bytes()));
        });
        Probe::Http(url)
    }

    #[test]
    fn an_answer_from_200_to_399_is_good() {
        assert_eq!(outcome(&answering("HTTP/1.1 200 OK\r\n\r\n")), Ok(()));
        assert_eq!(outcome(&answering("HTTP/1.0 302 Found\r\nlocation: /\r\n\r\n")), Ok(()));
        let bad = outcome(&answering("HTTP/1.1 503 Service Unavailable\r\n\r\n"));
        assert_eq!(bad, Err("it answered 503".to_owned()));
        for text in
            ["", "SSH-2.0-OpenSSH\r\n", "HTTP/1.1 \r\n", "HTTP/1.1 70000\r\n", "HTTP/1.1 200"]
        {
            assert_eq!(
                judge(text.as_bytes(), true),
                Some(Err("no answer of HTTP".to_owned())),
                "{text}"
            );
        }
        assert_eq!(judge(b"HTTP/1.1 20", false), None);
    }

    #[test]
    fn a_port_that_accepts_is_good_and_one_that_nobody_has_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        assert_eq!(outcome(&Probe::Tcp(address)), Ok(()));
        drop(listener);
        let refused = outcome(&Probe::Tcp(address)).expect_err("refused");
        assert!(refused.starts_with("connect: Connection refused"), "{refused}");
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_judge_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            fuzz_http_answer(&bytes);
            fuzz_http_answer(&[b"HTTP/1.1 ", &bytes[..]].concat());
        }
    }
}
