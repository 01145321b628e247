//! Containers as the agent sees them: what one is ([`Spec`]), how one ended ([`ExitRecord`]), and the handles on those that live.
//!
//! The agent holds nothing that a container needs. Each has a monitor process of its own ([`crate::monitor`]), which is its
//! parent and keeps its log, its exit status and a control socket; an agent that starts anew finds them by their directories:
//! ```text
//! <run>/containers/ID/spec.json      what it is; written before the monitor starts
//!                     lock           locked as long as the monitor lives; holds its pid
//!                     control.sock   one request a connection (control)
//!                     notify.sock    where its program says that it is ready
//!                     exit.json      how it ended; written by rename, last
//! ```
//! Pulling, mounting and deciding what should run are not done here.

mod adopt;
pub mod cgroup;
pub mod control;
mod create;
pub mod files;
mod handle;
pub mod idmap;
pub mod keep;
mod plan;
pub mod policy;
pub mod sockets;
pub mod view;

use std::io;
use std::path::{Path, PathBuf};

use protocol::ids::{Digest, Name};
use protocol::imageset::{DEFAULT_LOG_SIZE, Profile, Restart, Socket};
use protocol::node::ExitStatus;
use serde::{Deserialize, Serialize};

pub use adopt::{Adopted, adopt, remove};
pub use create::{create, create_with};
pub use files::NodeFacts;
pub(crate) use handle::read_reply;
pub use handle::{Handle, OnEnd, OnStatus, Released};
pub use plan::{Place, PlanError};
pub use sockets::HeldSockets;
pub use view::{Keeping, View};

/// Longest container id.
pub const MAX_ID: usize = 64;
/// The file with the [`Spec`] in a container's directory.
pub const SPEC_FILE: &str = "spec.json";
/// The file with the [`ExitRecord`].
pub const EXIT_FILE: &str = "exit.json";
/// The monitor's socket.
pub const SOCKET_FILE: &str = "control.sock";
/// The socket at which the container's program speaks of itself (sd_notify(3)); bound into the container.
pub const NOTIFY_FILE: &str = "notify.sock";
/// The file whose lock says that the monitor lives.
pub const LOCK_FILE: &str = "lock";

/// Everything a monitor needs to know about a container. Made by [`Spec::plan`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Unique on the node: letters, digits, `.`, `_`, `-`, beginning with a letter or digit, at most [`MAX_ID`].
    pub id: String,
    /// The ImageSet it belongs to.
    pub set: Name,
    /// Its name in the set.
    pub name: Name,
    /// The digest of the set.
    pub set_digest: Digest,
    /// Its mounted root on the node.
    pub root: PathBuf,
    /// Program and arguments; the program is looked up in the container's PATH.
    pub argv: Vec<String>,
    /// Its environment, `KEY=VALUE`. HOME is added from the image's passwd.
    pub env: Vec<String>,
    /// `USER[:GROUP]` by name or number in the image; root when absent.
    pub user: Option<String>,
    /// Working directory, absolute; made when missing.
    pub workdir: String,
    /// Its host name.
    pub hostname: String,
    /// What it may do, as a whole.
    pub profile: Profile,
    /// Capabilities beyond the profile's, `CAP_NET_ADMIN`.
    pub capabilities: Vec<String>,
    /// The signal that asks it to end.
    pub stop_signal: i32,
    /// Seconds between that and SIGKILL.
    pub stop_timeout_s: u32,
    /// Where `NAME.log` is written.
    pub log_dir: PathBuf,
    /// Most bytes of it that are kept.
    #[serde(default = "default_log_size")]
    pub log_size: u64,
    /// What happens when it ends.
    pub restart: Restart,
    /// How often it was started again before this instance.
    pub restarts: u32,
    /// The held sockets it gets, in order.
    #[serde(default)]
    pub sockets: Vec<Socket>,
    /// Whether its program speaks of itself as sd_notify(3) has it.
    #[serde(default)]
    pub notify: bool,
    /// Milliseconds between two WATCHDOG=1 that it is asked for.
    #[serde(default)]
    pub watchdog_ms: Option<u32>,
    /// What is built around it. Specs of older agents have none; their containers are adopted all the same.
    #[serde(default)]
    pub view: view::View,
    /// Files over the image's. In memory until the container is made, never in `spec.json`: they may be secrets.
    #[serde(skip)]
    pub files: Vec<files::PlacedFile>,
}

fn default_log_size() -> u64 {
    DEFAULT_LOG_SIZE
}

/// How a container ended: `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Code, signal, or why it could not start.
    pub status: ExitStatus,
    /// When, in nanoseconds of CLOCK_BOOTTIME.
    pub ended_at_ns: u64,
    /// When its program was executed, same clock; none when it never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_at_ns: Option<u64>,
    /// Whether it was asked to end.
    pub asked: bool,
    /// Bytes of its log that could not be written.
    #[serde(default)]
    pub log_dropped_bytes: u64,
}

/// Why something could not be done with a container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The id cannot name a directory.
    #[error("`{0}` is not a container id")]
    InvalidId(String),
    /// There is one already.
    #[error("container {0} exists already")]
    Exists(String),
    /// A file of the container's directory.
    #[error("container {id}: cannot {action} {path}")]
    File {
        /// The container.
        id: String,
        /// `write`, `read`, …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Its monitor could not be started or spoken to.
    #[error("container {id}: its monitor {what}")]
    Monitor {
        /// The container.
        id: String,
        /// What the monitor did not do.
        what: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The monitor refused, or the container could not be set up: its own sentence.
    #[error("container {id}: {reason}")]
    Refused {
        /// The container.
        id: String,
        /// The sentence.
        reason: String,
    },
    /// It had ended before that.
    #[error("container {id} has ended")]
    Ended {
        /// The container.
        id: String,
        /// How.
        record: Box<ExitRecord>,
    },
    /// It runs, and this is only for ended ones.
    #[error("container {0} has not ended")]
    NotEnded(String),
}

/// Whether a text may be a container's id.
#[must_use]
pub fn valid_id(id: &str) -> bool {
    id.len() <= MAX_ID
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Nanoseconds of CLOCK_BOOTTIME: since the kernel started, suspension included.
#[must_use]
pub fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(now.tv_nsec).unwrap_or_default())
}

/// Writes a JSON file so that a reader sees all of it or the one before: temporary name, sync, rename. Mode 0600.
///
/// # Errors
/// The kernel's error of any step.
pub fn write_json<T: Serialize>(path: &Path, document: &T) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let temporary = path.with_extension("tmp");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&serde_json::to_vec(document)?)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

/// Reads a JSON file of a container's directory.
///
/// # Errors
/// The kernel's error, or `InvalidData` with serde's sentence.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&std::fs::read(path)?).map_err(io::Error::from)
}

/// Makes [`ContainerError::File`]s of one container.
fn file_errors(id: &str) -> impl Fn(&'static str, PathBuf, io::Error) -> ContainerError + use<> {
    let id = id.to_owned();
    move |action, path, source| ContainerError::File { id: id.clone(), action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain_file_names() {
        for id in ["a", "hello-web-1", "0.x_y", &"a".repeat(64)] {
            assert!(valid_id(id), "{id}");
        }
        for id in ["", ".", "..", "-a", "a/b", "a b", "ä", &"a".repeat(65)] {
            assert!(!valid_id(id), "{id}");
        }
    }
}
