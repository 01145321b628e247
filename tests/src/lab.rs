//! The lab itself, and the frame in which a case runs.
//!
//! ```text
//!            private network namespace, no way out
//!   10.9.0.1/24, fd00:9::1/64
//!   br0 ---- tap1 ---- node 1   52:54:00:00:00:01
//!    |  \--- tap2 ---- node 2   52:54:00:00:00:02
//!    |
//!   layercake serve :8080, docker-registry :5000, router advertisements, packet capture
//! ```

use std::fs::{self, DirBuilder, File};
use std::net::Ipv6Addr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cable::Cable;
use crate::capture::Capture;
use crate::client::Client;
use crate::evidence;
use crate::namespace::{Entrance, Namespace};
use crate::prerequisites::{self, Need};
use crate::router::{self, Router};

/// The bridge.
pub const BRIDGE: &str = "br0";
/// The address of everything that is not a node.
pub const ADDRESS: &str = "10.9.0.1";
/// The lab's subnet.
pub const SUBNET: &str = "10.9.0.0/24";
/// Base URL of the boot server.
pub const SERVER_URL: &str = "http://10.9.0.1:8080";
/// The lab's IPv6 prefix, a /64.
const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 0);
/// How lab directories begin; the process id and a number follow.
const DIR_PREFIX: &str = "layercake-lab.";

/// A private cluster: a network with nobody on it yet.
#[derive(Debug)]
pub struct Lab {
    // In the order in which they are to go.
    capture: Option<Capture>,
    _router: Router,
    namespace: Namespace,
    /// Whether the machines have taps; without, their frames are relayed.
    taps: bool,
    dir: LabDir,
}

impl Lab {
    /// A new lab. Dropped, it is gone; killed with SIGKILL, it is gone but for its directory, which the next lab removes.
    ///
    /// # Errors
    /// No right to make namespaces, or no network for the machines, with what to do about it.
    pub fn new() -> Result<Self> {
        Self::with_router(router::UNASKED)
    }

    /// A lab whose router speaks unasked as rarely as routers do (RFC 4861 section 6.2.1, MaxRtrAdvInterval), for machines that are to
    /// have nothing to do.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn quiet() -> Result<Self> {
        Self::with_router(Duration::from_secs(600))
    }

    fn with_router(unasked: Duration) -> Result<Self> {
        check_network()?;
        let dir = LabDir::new()?;
        let namespace = Namespace::new()?;
        for args in [
            "link set lo up",
            "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            "addr add 10.9.0.1/24 dev br0",
            "addr add fd00:9::1/64 dev br0 nodad",
            "link set br0 up",
        ] {
            namespace.run("ip", &args.split(' ').collect::<Vec<_>>())?;
        }
        let entrance = namespace.entrance();
        let router = Router::start(&entrance, BRIDGE, PREFIX, unasked)?;
        let capture = Capture::start(&entrance, BRIDGE, &dir.path.join("lab.pcap"))?;
        let taps = tun_opens();
        Ok(Self { capture: Some(capture), _router: router, namespace, taps, dir })
    }

    /// Where the lab's files lie, until it ends.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir.path
    }

    /// The namespace that everything runs in.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// A way in.
    #[must_use]
    pub fn entrance(&self) -> Entrance {
        self.namespace.entrance()
    }

    /// A client of the lab's boot server.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::new(self.entrance(), SERVER_URL)
    }

    /// A machine's cable to the bridge, whose files lie in `dir`; the interface of a machine that is off is used again.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn add_cable(&self, name: &str, dir: &Path) -> Result<Cable> {
        if self.taps {
            Cable::tap(&self.namespace, name, BRIDGE)
        } else {
            Cable::relay(&self.namespace, name, BRIDGE, dir)
        }
    }

    /// Keeps the evidence of a failure and says where.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep_evidence(&mut self, case: &str) -> Result<PathBuf> {
        self.capture = None; // Which writes what it still holds.
        evidence::keep(self.dir(), case)
    }
}

/// Runs a case in a lab of its own. Only one runs at a time: emulated machines starve each other. When it fails or
/// panics its evidence is kept and the error says where.
///
/// # Errors
/// The case's, or that there can be no lab.
pub fn case(name: &str, needs: &[Need], body: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    prerequisites::ensure(needs)?;
    evidence::clear(name)?;
    let mut framed = Framed { lab: Lab::new()?, name, failed: true };
    let result = body(&framed.lab);
    framed.failed = result.is_err();
    result.with_context(|| format!("{name}: the evidence is in {}", evidence::dir(name).display()))
}

/// A lab whose evidence is kept unless the case passed, panics included.
struct Framed<'a> {
    lab: Lab,
    name: &'a str,
    failed: bool,
}

impl Drop for Framed<'_> {
    fn drop(&mut self) {
        if self.failed {
            // The case's own error is what matters.
            drop(self.lab.keep_evidence(self.name));
        }
    }
}

/// Makes sure that the machines can have a network.
///
/// # Errors
/// Neither taps nor what takes their place: what to do about it.
pub fn check_network() -> Result<()> {
    if tun_opens() {
        return Ok(());
    }
    prerequisites::ensure(&[Need::Ethtool])
        .context("/dev/net/tun does not open, so the machines' frames are relayed")
}

/// Whether taps can be made.
fn tun_opens() -> bool {
    File::options().read(true).write(true).open("/dev/net/tun").is_ok()
}

/// A directory that goes with the lab.
#[derive(Debug)]
struct LabDir {
    path: PathBuf,
}

impl LabDir {
    fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let parent = std::env::temp_dir();
        sweep(&parent);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{DIR_PREFIX}{}.{number}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for LabDir {
    fn drop(&mut self) {
        // What is left the next lab sweeps.
        drop(fs::remove_dir_all(&self.path));
    }
}

/// Removes the directories of labs of ours that were killed.
fn sweep(parent: &Path) {
    let own = nix::unistd::geteuid().as_raw();
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let dead = name.to_str().is_some_and(|name| {
            owner(name).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
        });
        if dead && entry.metadata().is_ok_and(|data| data.is_dir() && data.uid() == own) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

/// The process that a lab directory belongs to.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(DIR_PREFIX)?.split_once('.')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_a_dead_lab_is_swept_and_that_of_a_living_one_is_not() {
        let parent = tempfile::tempdir().expect("tempdir");
        let own = format!("{DIR_PREFIX}{}.0", std::process::id());
        // Beyond the kernel's largest pid.
        let names =
            [own.as_str(), "layercake-lab.4999999.0", "layercake-lab.x.0", "other.4999999.0"];
        for name in names {
            fs::create_dir(parent.path().join(name)).expect("mkdir");
        }
        sweep(parent.path());
        let left: Vec<bool> = names.iter().map(|name| parent.path().join(name).exists()).collect();
        assert_eq!(left, [true, false, true, true]);
    }

    #[test]
    fn a_lab_has_a_bridge_with_cables_and_leaves_no_file() {
        let lab = Lab::new().expect("lab");
        let dir = lab.dir().to_path_buf();
        drop(lab.add_cable("tap7", &dir).expect("cable"));
        drop(lab.add_cable("tap7", &dir).expect("the same again"));
        let links = lab.namespace().run("ip", &["-o", "link", "show", "master", BRIDGE]);
        assert!(links.expect("links").contains("tap7"));
        assert!(dir.join("lab.pcap").exists());
        drop(lab);
        assert!(!dir.exists());
    }
}
