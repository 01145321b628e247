//! What agent and monitor say to each other over `control.sock`: one JSON document a line. Pure.
//!
//! A connection carries one request. Every request but [`Request::Watch`] has one reply, after which the monitor closes.
//! `Watch` is answered when the container stands at its exec barrier (or failed to), and again when it has ended.

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
}

/// From the monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "lowercase")]
pub enum Reply {
    /// How it stands.
    Status(Status),
    /// It has ended.
    Ended(ExitRecord),
    /// Not done, and why: one sentence.
    Error {
        /// The sentence.
        message: String,
    },
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

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(parse_request(&bytes));
        }
    }
}
