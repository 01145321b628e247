//! The socket between the agent and PID 1: power-off, reboot, kexec, pivot, another agent in this one's place.
//!
//! A SEQPACKET pair that PID 1 makes anew for every agent; the agent finds its end by the number in the environment. One
//! message a packet, one reply a request. A message is a row of fields, each ended by a NUL byte, the first of them the
//! verb: so that PID 1 can read it where it lies, without memory of its own, and whatever version either side has. PID 1
//! trusts the agent but not its luck: every message is bounded and may be refused. A pivot that works has no reply: PID 1
//! becomes the image's init and its end of the pair closes.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use super::resident::message::{self, Asked};
use super::shutdown::End;
use crate::logging::Line;
use crate::sys::session::inherited_fd;

/// The environment variable with the number of the agent's end.
pub const FD_VARIABLE: &str = "LAYERCAKE_INIT_FD";
/// The same as an entry of the environment: the first descriptor behind the standard ones.
pub(super) const FD_ENTRY: &std::ffi::CStr = c"LAYERCAKE_INIT_FD=3";
/// The environment variable with the number of the pulse, an eventfd(2).
pub const PULSE_VARIABLE: &str = "LAYERCAKE_PULSE_FD";
/// The same as an entry of the environment.
pub(super) const PULSE_ENTRY: &std::ffi::CStr = c"LAYERCAKE_PULSE_FD=4";
/// Longest message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Longest path of an agent in [`Request::ReplaceAgent`], in bytes.
pub const MAX_PROGRAM: usize = 255;
/// Where the old root stands after a pivot, until [`detach_layer0`].
pub const OLD_ROOT: &str = "/run/layercake/layer0";

/// What the agent asks of PID 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// End everything in order and switch the machine off.
    PowerOff,
    /// End everything in order and start the machine again.
    Reboot,
    /// End everything in order and start the kernel that kexec_file_load(2) has loaded. Where the kernel refuses that, the
    /// machine is rebooted.
    Kexec,
    /// Make this root the root of the machine and become its init.
    Pivot {
        /// A mount point; it is moved away from here.
        root: PathBuf,
        /// The program, as a path in that root, and its arguments; not empty.
        argv: Vec<String>,
        /// Its environment, `NAME=value`.
        env: Vec<String>,
    },
    /// From now on start agents from this file. The present agent is killed at once, without its containers, and the new
    /// one started. If that dies three times within a minute without having said [`Request::Steady`], or keeps failing
    /// later, PID 1 goes back to its own program for the rest of this boot, and says so.
    ReplaceAgent {
        /// An executable file, absolute, at most [`MAX_PROGRAM`] bytes. It must stay where it is.
        path: PathBuf,
    },
    /// The agent has reached its work: it took over what it found, and its loop turns.
    Steady,
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A message is too long.
    #[error("a message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    /// A message is not what was agreed.
    #[error("a message to or from PID 1 makes no sense: {0}")]
    Format(&'static str),
    /// The socket failed.
    #[error("the socket to PID 1 failed")]
    Socket(#[source] std::io::Error),
    /// PID 1 closed the socket.
    #[error("PID 1 has closed the socket")]
    Closed,
    /// PID 1 said no.
    #[error("PID 1 refused: {0}")]
    Refused(String),
}

/// The agent's end.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    pulse: Option<OwnedFd>,
}

impl Control {
    /// The end that PID 1 handed to this process. `None` outside Layer0 and on a second call.
    #[must_use]
    pub fn from_env() -> Option<Self> {
        static TAKEN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
        let inherited = |variable| inherited_fd(std::env::var(variable).ok()?.parse().ok()?);
        if TAKEN.swap(true, std::sync::atomic::Ordering::SeqCst) {
            return None;
        }
        Some(Self { socket: inherited(FD_VARIABLE)?, pulse: inherited(PULSE_VARIABLE) })
    }

    /// A sign of life, to be given every ten seconds or so. It wakes nobody: PID 1 counts the signs when it feeds the watchdog,
    /// kills an agent that has given none for 45 s, and after ten minutes without an agent lets the watchdog reset the machine.
    pub fn beat(&self) {
        if let Some(pulse) = &self.pulse
            && let Err(error) = rustix::io::write(pulse, &1_u64.to_ne_bytes())
        {
            log::debug!("sign of life: {error}");
        }
    }

    /// Sends a request and waits for the answer. Power-off, reboot and kexec are answered before they begin; the agent is
    /// then told to end by SIGTERM. So is the replacing of the agent, which ends by SIGKILL then. A pivot returns with `Ok` once PID 1 has become the image's init, in the new root.
    ///
    /// # Errors
    /// [`ControlError::Refused`] with PID 1's reason (nothing has changed then), or what happened to the socket.
    pub fn call(&self, request: &Request) -> Result<(), ControlError> {
        send_bytes(&self.socket, &encode(request)?)?;
        match recv_bytes(&self.socket) {
            Err(ControlError::Closed) if matches!(request, Request::Pivot { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(bytes) => parse_reply(&bytes),
        }
    }
}

/// Takes the old root away after a pivot, once nothing is left to return to.
///
/// # Errors
/// What umount2 says.
pub fn detach_layer0() -> std::io::Result<()> {
    rustix::mount::unmount(OLD_ROOT, rustix::mount::UnmountFlags::DETACH)?;
    std::fs::remove_dir(OLD_ROOT)
}

/// A new pair: PID 1's end, the agent's end. Both close on exec.
///
/// # Errors
/// What socketpair says.
pub fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// PID 1: reads one request.
///
/// # Errors
/// [`ControlError::Closed`] when the agent is gone, [`ControlError::Format`] and [`ControlError::TooLong`] for a
/// message that should be answered with an error.
pub fn receive(socket: impl AsFd) -> Result<Request, ControlError> {
    decode(&recv_bytes(socket)?)
}

/// PID 1: answers. An agent that does not read the answer (or is gone) is not waited for. Allocates nothing.
///
/// # Errors
/// What the kernel says.
pub fn answer(socket: impl AsFd, result: Result<(), &str>) -> rustix::io::Result<()> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let line = match result {
        Ok(()) => Line::of(format_args!("ok")),
        Err(reason) => Line::of(format_args!("no {reason}")),
    };
    send(socket, line.ended(0).as_bytes(), flags).map(drop)
}

fn parse_reply(bytes: &[u8]) -> Result<(), ControlError> {
    match Fields::new(bytes)?.next() {
        Some("ok") => Ok(()),
        Some(text) => Err(match text.strip_prefix("no ") {
            Some(reason) => ControlError::Refused(reason.to_owned()),
            None => ControlError::Format("the reply is neither ok nor no"),
        }),
        None => Err(ControlError::Format("an empty reply")),
    }
}

/// A request as bytes.
///
/// # Errors
/// [`ControlError::TooLong`]; [`ControlError::Format`] for a text with a NUL byte or a path that is not UTF-8.
pub fn encode(request: &Request) -> Result<Vec<u8>, ControlError> {
    match request {
        Request::PowerOff => fields(["poweroff"]),
        Request::Reboot => fields(["reboot"]),
        Request::Kexec => fields(["kexec"]),
        Request::Steady => fields(["steady"]),
        Request::ReplaceAgent { path } => fields(["agent", utf8(path)?]),
        Request::Pivot { root, argv, env } => {
            let count = argv.len().to_string();
            let head = ["pivot", utf8(root)?, &count];
            fields(head.into_iter().chain(argv.iter().chain(env).map(String::as_str)))
        }
    }
}

fn utf8(path: &std::path::Path) -> Result<&str, ControlError> {
    path.to_str().ok_or(ControlError::Format("a path is not UTF-8"))
}

fn fields<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Vec<u8>, ControlError> {
    let mut bytes = Vec::new();
    for text in texts {
        if text.contains('\0') {
            return Err(ControlError::Format("a text has a NUL byte in it"));
        }
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
    }
    if bytes.len() > MAX_MESSAGE { Err(ControlError::TooLong(bytes.len())) } else { Ok(bytes) }
}

/// The fields of a message, in their order. Allocates nothing.
#[derive(Debug, Clone)]
pub struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    /// The fields of this message.
    ///
    /// # Errors
    /// [`ControlError::Format`] for what is not UTF-8 or does not end with a NUL byte.
    pub fn new(bytes: &'a [u8]) -> Result<Self, ControlError> {
        let text = std::str::from_utf8(bytes).map_err(|_| ControlError::Format("not UTF-8"))?;
        if text.ends_with('\0') { Ok(Self(text)) } else { Err(ControlError::Format("cut off")) }
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let (field, rest) = self.0.split_once('\0')?;
        self.0 = rest;
        Some(field)
    }
}

/// A request from bytes.
///
/// # Errors
/// [`ControlError::TooLong`] and [`ControlError::Format`].
pub fn decode(bytes: &[u8]) -> Result<Request, ControlError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(ControlError::TooLong(bytes.len()));
    }
    Ok(match message::parse(bytes)? {
        Asked::End(End::PowerOff) => Request::PowerOff,
        Asked::End(End::Reboot) => Request::Reboot,
        Asked::End(End::Kexec) => Request::Kexec,
        Asked::End(End::Halt) => return Err(ControlError::Format("unknown request")),
        Asked::Steady => Request::Steady,
        Asked::Agent(path) => Request::ReplaceAgent { path: path.into() },
        Asked::Pivot(mut fields) => pivot(&mut fields)?,
    })
}

fn pivot(fields: &mut Fields<'_>) -> Result<Request, ControlError> {
    let root = fields.next().ok_or(ControlError::Format("a pivot without root"))?;
    let count = fields.next().and_then(|count| count.parse::<usize>().ok());
    let count = count.ok_or(ControlError::Format("a pivot without number of arguments"))?;
    let argv: Vec<String> = fields.take(count).map(str::to_owned).collect();
    if argv.len() != count {
        return Err(ControlError::Format("a pivot with too few arguments"));
    }
    Ok(Request::Pivot { root: root.into(), argv, env: fields.map(str::to_owned).collect() })
}

/// Feeds any bytes to the readers of requests and replies.
pub fn fuzz_control(bytes: &[u8]) {
    let _ = (decode(bytes).is_ok(), parse_reply(bytes).is_ok());
}

fn send_bytes(socket: impl AsFd, bytes: &[u8]) -> Result<(), ControlError> {
    match send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::PIPE) => Err(ControlError::Closed),
        Err(error) => Err(ControlError::Socket(error.into())),
    }
}

fn recv_bytes(socket: impl AsFd) -> Result<Vec<u8>, ControlError> {
    let mut buffer = vec![0_u8; MAX_MESSAGE];
    let length = loop {
        match recv(&socket, buffer.as_mut_slice(), RecvFlags::TRUNC) {
            Ok((_, length)) => break length,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Err(ControlError::Closed),
            Err(error) => return Err(ControlError::Socket(error.into())),
        }
    };
    if length == 0 {
        return Err(ControlError::Closed);
    }
    if length > MAX_MESSAGE {
        return Err(ControlError::TooLong(length));
    }
    buffer.truncate(length);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pivot() -> Request {
        Request::Pivot {
            root: "/run/layercake/mounts/x/root".into(),
            argv: vec!["/sbin/init".to_owned()],
            env: vec!["A=b".to_owned()],
        }
    }

    /// One exchange over a real pair; `serve` plays PID 1.
    fn exchange(
        request: &Request,
        serve: impl FnOnce(OwnedFd) + Send + 'static,
    ) -> Result<(), ControlError> {
        let (ours, theirs) = pair().unwrap();
        let server = std::thread::spawn(move || serve(ours));
        let result = Control { socket: theirs, pulse: None }.call(request);
        server.join().unwrap();
        result
    }

    #[test]
    fn requests_survive_the_way_and_back() {
        let agent = Request::ReplaceAgent { path: "/run/layercake/agent/2".into() };
        let simple = [Request::PowerOff, Request::Reboot, Request::Kexec, Request::Steady];
        for request in simple.into_iter().chain([agent, pivot()]) {
            assert_eq!(decode(&encode(&request).unwrap()).unwrap(), request);
        }
    }

    #[test]
    fn nonsense_and_overlong_messages_are_refused() {
        for text in [
            "",
            "\0",
            "poweroff",
            "dance\0",
            "reboot\0now\0",
            "agent\0",
            "agent\0bin/x\0",
            "pivot\0/r\0",
            "pivot\0/r\0x\0",
            "pivot\0/r\x002\0a\0",
            "{\"request\":\"reboot\"}",
        ] {
            assert!(matches!(decode(text.as_bytes()), Err(ControlError::Format(_))), "{text}");
        }
        let long = format!("agent\0/{}\0", "x".repeat(MAX_PROGRAM));
        assert!(matches!(decode(long.as_bytes()), Err(ControlError::Format(_))));
        assert!(matches!(decode(b"\xff\0"), Err(ControlError::Format(_))));
        let long = vec![b' '; MAX_MESSAGE + 1];
        assert!(matches!(decode(&long), Err(ControlError::TooLong(_))));
        let request = Request::ReplaceAgent { path: "/a\0b".into() };
        assert!(matches!(encode(&request), Err(ControlError::Format(_))));
        let env = vec!["x".repeat(MAX_MESSAGE)];
        let request = Request::Pivot { root: "/".into(), argv: Vec::new(), env };
        assert!(matches!(encode(&request), Err(ControlError::TooLong(_))));
    }

    #[test]
    fn a_refusal_brings_its_reason() {
        let result = exchange(&Request::PowerOff, |socket| {
            assert_eq!(receive(&socket).unwrap(), Request::PowerOff);
            answer(&socket, Err("not now")).unwrap();
        });
        assert!(matches!(result, Err(ControlError::Refused(reason)) if reason == "not now"));
    }

    #[test]
    fn an_ok_is_an_ok_and_a_vanished_pid_1_is_one_only_for_a_pivot() {
        let ok = exchange(&Request::Reboot, |socket| {
            receive(&socket).unwrap();
            answer(&socket, Ok(())).unwrap();
        });
        assert!(ok.is_ok());
        let gone = exchange(&Request::Reboot, |socket| drop(receive(&socket)));
        assert!(matches!(gone, Err(ControlError::Closed)));
        assert!(exchange(&pivot(), |socket| drop(receive(&socket))).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(
            verb in "(poweroff|steady|agent|pivot|)",
            tail in proptest::collection::vec(0_u8..60, 0..400),
        ) {
            fuzz_control(&tail);
            let bytes = [verb.as_bytes(), b"\0/", &tail, b"\0"].concat();
            fuzz_control(&bytes);
            if let Ok(request) = decode(&bytes) {
                assert_eq!(decode(&encode(&request).unwrap()).unwrap(), request);
            }
        }
    }
}
