//! Where things lie on a node. Every path that more than one room uses stands here.

use std::path::{Path, PathBuf};

/// Root of everything the agent keeps, in Layer0.
pub const RUN_DIR: &str = "/run/layercake";
/// Site configuration that overlays bring into the image: CA certificates, keys, authorised users.
pub const CONFIG_DIR: &str = "/etc/layercake";
/// CA certificates (PEM) that TLS trusts, put there by `build-image --ca` or an overlay.
pub const CA_DIR: &str = "/etc/layercake/ca";
/// Public keys (PEM) one of which must have signed an ImageSet, put there by `build-image --imageset-key` or an overlay.
/// Without any, sets need not be signed.
pub const KEYS_DIR: &str = "/etc/layercake/keys";
/// Modules that are loaded at start whatever the hardware says, one name a line.
pub const MODULES_LOAD: &str = "/etc/layercake/modules";

/// The directories under the run directory. `/run/layercake` in Layer0; any directory with `--standalone`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDirs {
    root: PathBuf,
}

impl RunDirs {
    /// The directories below this root.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The root itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Blobs being fetched or kept whole, by digest.
    #[must_use]
    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// Unpacked layers, by the digest of their blob.
    #[must_use]
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Signatures of sets, by the digest of the set's index.
    #[must_use]
    pub fn signatures(&self) -> PathBuf {
        self.root.join("signatures")
    }

    /// Mounted roots, one directory a container instance.
    #[must_use]
    pub fn mounts(&self) -> PathBuf {
        self.root.join("mounts")
    }

    /// Container instances: spec, control socket, exit record.
    #[must_use]
    pub fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    /// Container logs, by set and container name.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    /// Persistent directories of containers in memory, by set and name.
    #[must_use]
    pub fn persistent(&self) -> PathBuf {
        self.root.join("persistent")
    }

    /// Where the disk labelled LAYERCAKE is mounted, when there is one.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.root.join("disk")
    }

    /// Files and secrets that the server gave the node: a memory file system of its own.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.root.join("files")
    }

    /// The agent's own notes that survive its death: desired and observed state, counters.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }
}
