//! `manifest.json` of a built Layer0: what the files are and what they were made of.

use serde::{Deserialize, Serialize};

use crate::ids::Digest;

/// A file of a Layer0 build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// File name beside the manifest.
    pub name: String,
    /// Its sha256.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// `manifest.json`. The same inputs give the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `layer0`.
    pub name: String,
    /// Version of Layercake that built it.
    pub version: String,
    /// The kernel's release, `6.12.117+deb12-cloud-amd64`.
    pub kernel: String,
    /// Where the kernel came from: package name, version and sha256 of the package, or, for a kernel given as a file,
    /// its file name and sha256.
    pub kernel_source: String,
    /// `cloud`, `generic` or `custom`.
    pub flavour: String,
    /// Version of the agent in it.
    pub agent: String,
    /// sha256 of the agent binary.
    pub agent_digest: Digest,
    /// Modules in the initramfs, by the kernel's name, sorted.
    pub modules: Vec<String>,
    /// The files.
    pub artifacts: Vec<Artifact>,
}
