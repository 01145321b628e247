//! What agent and monitor say to each other over `control.sock`: one JSON document a line. Pure.
//!
//! A connection carries one request. Every request but [`Request::Watch`] has one reply, after which the monitor closes.
//! `Watch` is answered when the container stands at its exec barrier (or failed to), whenever its program says something new
//! of itself, and when it has ended. Agent and monitor may be versions apart: either ignores what it does not know.

use protocol::node::ContainerState;
use serde::{Deserialize, Serialize};

use super::ExitRecord;

/// Longest line either side reads, in bytes.
pub const MAX_LINE: usize = 64 << 10;

/// From the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Request {
    /// Tell me when it is ready, and when it has ended.
    Watch,
    /// Let it pass the exec barrier; answered when the program runs.
    Release,
    /// Ask it to end; answered when it has.
    Stop {
        /// The signal.
        signal: i32,
        /// Milliseconds until SIGKILL.
        timeout_ms: u64,
    },
    /// Send a signal and nothing else.
    Kill {
        /// The signal.
        signal: i32,
    },
    /// How does it stand?
    Status,
    /// Give me its held sockets.
    Sockets,
}

/// From the monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "lowercase")]
pub enum Reply {
    /// How it stands.
    Status(Status),
    /// It has ended.
    Ended(ExitRecord),
    /// Its held sockets, as many, come with this line's first byte (unix(7), SCM_RIGHTS), in the order of its spec.
    Sockets {
        /// How many.
        count: usize,
    },
    /// Not done, and why: one sentence.
    Error {
        /// The sentence.
        message: String,
    },
    /// What a later version says and this one does not know.
    #[serde(other)]
    Unknown,
}

/// How a container stands, as its monitor knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Created, Running or Stopping.
    pub state: ContainerState,
    /// Process id on the node of the container's first process.
    pub pid: u32,
    /// When its program was executed, nanoseconds of CLOCK_BOOTTIME.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_at_ns: Option<u64>,
    /// When its program first said READY=1 (sd_notify(3)), same clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_at_ns: Option<u64>,
    /// Whether its program said STOPPING=1.
    #[serde(default)]
    pub stopping: bool,
    /// The last STATUS= of its program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// What could not be had on this machine, `limits_unavailable: …`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A document as a line.
#[must_use]
pub fn line<T: Serialize>(document: &T) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(document).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Reads a request from a line without its end.
///
/// # Errors
/// serde's sentence about what is wrong.
pub fn parse_request(line: &[u8]) -> Result<Request, serde_json::Error> {
    serde_json::from_slice(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_look_like_this() {
        let table = [
            (Request::Watch, r#"{"op":"watch"}"#),
            (
                Request::Stop { signal: 15, timeout_ms: 5 },
                r#"{"op":"stop","signal":15,"timeout_ms":5}"#,
            ),
        ];
        for (request, text) in table {
            assert_eq!(line(&request), format!("{text}\n").into_bytes());
            assert_eq!(parse_request(text.as_bytes()).expect("parse"), request);
        }
    }

    #[test]
    fn a_reply_of_another_version_is_no_error() {
        let reply = |text: &str| serde_json::from_str::<Reply>(text).expect(text);
        assert_eq!(reply(r#"{"reply":"colour","red":1}"#), Reply::Unknown);
        let old = reply(r#"{"reply":"status","state":"running","pid":7,"later":true}"#);
        assert!(matches!(old, Reply::Status(status) if status.ready_at_ns.is_none()));
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(parse_request(&bytes));
        }
    }
}
