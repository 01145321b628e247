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

/// A firmware file that modules ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareFile {
    /// Its path below `/lib/firmware`, or the pattern a module has instead.
    pub file: String,
    /// The modules that ask for it.
    pub modules: Vec<String>,
    /// Its size in the image in bytes; none where it was not found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
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
    /// What this kernel lacks that Layer0 can do without, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lacks: Vec<String>,
    /// The firmware that these modules ask for, where the build was given any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub firmware: Vec<FirmwareFile>,
    /// The files.
    pub artifacts: Vec<Artifact>,
}
