//! The socket between the agent and PID 1: power-off, reboot, pivot.
//!
//! A SEQPACKET pair that PID 1 makes anew for every agent; the agent finds its end by the number in the environment. One
//! JSON message a packet, one reply a request. PID 1 trusts the agent but not its luck: every message is bounded and may
//! be refused. A pivot that works has no reply: PID 1 becomes the image's init and its end of the pair closes.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use serde::{Deserialize, Serialize};

use crate::sys::session::inherited_fd;

/// The environment variable with the number of the agent's end.
pub const FD_VARIABLE: &str = "LAYERCAKE_INIT_FD";
/// Longest message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Where the old root stands after a pivot, until [`detach_layer0`].
pub const OLD_ROOT: &str = "/run/layercake/layer0";

/// What the agent asks of PID 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// End everything in order and switch the machine off.
    PowerOff,
    /// End everything in order and start the machine again.
    Reboot,
    /// Make this root the root of the machine and become its init.
    Pivot {
        /// A mount point; it is moved away from here.
        root: PathBuf,
        /// The program, as a path in that root, and its arguments; not empty.
        argv: Vec<String>,
        /// Its environment, `NAME=value`.
        env: Vec<String>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Reply {
    Ok,
    Error(String),
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A message is too long.
    #[error("a message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    /// A message is not what was agreed.
    #[error("a message to or from PID 1 makes no sense")]
    Format(#[source] serde_json::Error),
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
}

impl Control {
    /// The end that PID 1 handed to this process. `None` outside Layer0 and on a second call.
    #[must_use]
    pub fn from_env() -> Option<Self> {
        static TAKEN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
        let number = std::env::var(FD_VARIABLE).ok()?.parse().ok()?;
        if TAKEN.swap(true, std::sync::atomic::Ordering::SeqCst) {
            return None;
        }
        inherited_fd(number).map(|socket| Self { socket })
    }

    /// Sends a request and waits for the answer. Power-off and reboot are answered before they begin; the agent is then
    /// told to end by SIGTERM. A pivot returns with `Ok` once PID 1 has become the image's init, in the new root.
    ///
    /// # Errors
    /// [`ControlError::Refused`] with PID 1's reason (nothing has changed then), or what happened to the socket.
    pub fn call(&self, request: &Request) -> Result<(), ControlError> {
        send_bytes(&self.socket, &encode(request)?)?;
        match recv_bytes(&self.socket) {
            Err(ControlError::Closed) if matches!(request, Request::Pivot { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(bytes) => match serde_json::from_slice(&bytes).map_err(ControlError::Format)? {
                Reply::Ok => Ok(()),
                Reply::Error(reason) => Err(ControlError::Refused(reason)),
            },
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
pub fn pair() -> std::io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// PID 1: reads one request.
///
/// # Errors
/// [`ControlError::Closed`] when the agent is gone, [`ControlError::Format`] and [`ControlError::TooLong`] for a
/// message that should be answered with an error.
pub fn receive(socket: impl AsFd) -> Result<Request, ControlError> {
    decode(&recv_bytes(socket)?)
}

/// PID 1: answers. An agent that does not read the answer (or is gone) is not waited for.
///
/// # Errors
/// What happened to the socket.
pub fn answer(socket: impl AsFd, result: Result<(), String>) -> Result<(), ControlError> {
    let reply = match result {
        Ok(()) => Reply::Ok,
        Err(reason) => Reply::Error(reason.chars().take(4096).collect()),
    };
    let bytes = serde_json::to_vec(&reply).map_err(ControlError::Format)?;
    send_bytes(socket, &bytes)
}

/// A request as bytes.
///
/// # Errors
/// [`ControlError::TooLong`]; [`ControlError::Format`] for a root that is not UTF-8.
pub fn encode(request: &Request) -> Result<Vec<u8>, ControlError> {
    let bytes = serde_json::to_vec(request).map_err(ControlError::Format)?;
    if bytes.len() > MAX_MESSAGE { Err(ControlError::TooLong(bytes.len())) } else { Ok(bytes) }
}

/// A request from bytes.
///
/// # Errors
/// [`ControlError::TooLong`] and [`ControlError::Format`].
pub fn decode(bytes: &[u8]) -> Result<Request, ControlError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(ControlError::TooLong(bytes.len()));
    }
    serde_json::from_slice(bytes).map_err(ControlError::Format)
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
        let result = Control { socket: theirs }.call(request);
        server.join().unwrap();
        result
    }

    #[test]
    fn requests_survive_the_way_and_back() {
        for request in [Request::PowerOff, Request::Reboot, pivot()] {
            assert_eq!(decode(&encode(&request).unwrap()).unwrap(), request);
        }
    }

    #[test]
    fn nonsense_and_overlong_messages_are_refused() {
        for text in ["", "{}", "{\"request\":\"dance\"}", "{\"request\":\"pivot\"}", "[1"] {
            assert!(matches!(decode(text.as_bytes()), Err(ControlError::Format(_))), "{text}");
        }
        let long = vec![b' '; MAX_MESSAGE + 1];
        assert!(matches!(decode(&long), Err(ControlError::TooLong(_))));
        let env = vec!["x".repeat(MAX_MESSAGE)];
        let request = Request::Pivot { root: "/".into(), argv: Vec::new(), env };
        assert!(matches!(encode(&request), Err(ControlError::TooLong(_))));
    }

    #[test]
    fn a_refusal_brings_its_reason() {
        let result = exchange(&Request::PowerOff, |socket| {
            assert_eq!(receive(&socket).unwrap(), Request::PowerOff);
            answer(&socket, Err("not now".to_owned())).unwrap();
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
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(0_u8.., 0..400)) {
            if let Ok(request) = decode(&bytes) {
                assert_eq!(decode(&encode(&request).unwrap()).unwrap(), request);
            }
        }
    }
}
