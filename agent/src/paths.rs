//! Where things lie on a node. Every path that more than one room uses stands here.

use std::path::{Path, PathBuf};

/// Root of everything the agent keeps, in Layer0.
pub const RUN_DIR: &str = "/run/layercake";
/// Site configuration that overlays bring into the image: CA certificates, keys, authorised users.
pub const CONFIG_DIR: &str = "/etc/layercake";
/// CA certificates (PEM) that TLS trusts, put there by `build-image --ca` or an overlay.
pub const CA_DIR: &str = "/etc/layercake/ca";
/// The registry table ([`protocol::registries`]), put there by `build-image --registries` or an overlay. Has secrets in it.
pub const REGISTRIES_FILE: &str = "/etc/layercake/registries.json";
/// Public keys (PEM) one of which must have signed an ImageSet, put there by `build-image --imageset-key` or an overlay.
/// Without any, sets need not be signed.
pub const KEYS_DIR: &str = "/etc/layercake/keys";
/// The ImageAPI over TCP: `listen` with ADDRESS:PORT, and the PEM files `cert.pem`, `key.pem` and `clients.pem` (the authority of
/// its clients), put there by an overlay. Without `listen` there is only its Unix socket.
pub const IMAGEAPI_DIR: &str = "/etc/layercake/imageapi";
/// Modules that are loaded at start whatever the hardware says, one name a line.
pub const MODULES_LOAD: &str = "/etc/layercake/modules";
/// Starts ssh: put there by an overlay, and run by the rescue shell.
pub const SSH: &str = "/etc/layercake/ssh";
/// Where this is, ssh is started with the agent.
pub const SSH_ALWAYS: &str = "/etc/layercake/ssh.always";
/// A program that says whether the node is busy: it ends with 0 when the node is free, otherwise the first line that it writes
/// is the reason. Put there by an overlay; absent: the node is free.
pub const BUSY_PROGRAM: &str = "/etc/layercake/busy";

/// The site's configuration: [`CONFIG_DIR`] in Layer0; any directory with `--config-dir`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigDir(PathBuf);

impl Default for ConfigDir {
    fn default() -> Self {
        Self(PathBuf::from(CONFIG_DIR))
    }
}

impl ConfigDir {
    /// The configuration in this directory.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// As [`CA_DIR`].
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.0.join("ca")
    }

    /// As [`KEYS_DIR`].
    #[must_use]
    pub fn keys(&self) -> PathBuf {
        self.0.join("keys")
    }

    /// The site's network ([`protocol::network::Network::parse_file`]), put there by an overlay: `network.toml`.
    #[must_use]
    pub fn network(&self) -> PathBuf {
        self.0.join("network.toml")
    }

    /// As [`REGISTRIES_FILE`].
    #[must_use]
    pub fn registries(&self) -> PathBuf {
        self.0.join("registries.json")
    }
}

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

    /// File system blobs of mount forms, by digest.
    #[must_use]
    pub fn file_systems(&self) -> PathBuf {
        self.root.join("filesystems")
    }

    /// Where these are mounted, one directory a blob.
    #[must_use]
    pub fn lowers(&self) -> PathBuf {
        self.root.join("lowers")
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

    /// Where the disk labelled LAYERCAKE is mounted, when there is one: blobs and directories that outlive reboots.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.root.join("disk")
    }

    /// Files and secrets that the server gave the node: a memory file system of its own.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.root.join("files")
    }

    /// Agents that were fetched to be started in the place of the image's, by digest.
    #[must_use]
    pub fn agents(&self) -> PathBuf {
        self.root.join("agents")
    }

    /// The agent's own notes that survive its death: desired and observed state, counters.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }
}
