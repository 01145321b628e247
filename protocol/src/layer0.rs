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

/// Something the operator gave to a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// The option of `cargo xtask build-image` that it was given by, without the dashes: `overlay`.
    pub option: String,
    /// sha256 of what it put into the image.
    pub digest: Digest,
}

/// What a Layer0 was built from besides agent and kernel, as far as the files alone do not tell: `cargo xtask verify-image` builds the
/// same again. No path is in it, so the same inputs give the same manifest wherever they lie.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Inputs {
    /// Forms that were asked for, by their words: `uki`, `iso`.
    pub forms: Vec<String>,
    /// Kernel command line of the forms that carry one.
    pub command_line: String,
    /// How the initramfs is compressed: `zstd:19`.
    pub compression: String,
    /// Lists of modules that were added.
    pub with: Vec<String>,
    /// Time of last change of everything in it, in seconds since 1970.
    pub mtime: u32,
    /// What the operator gave, in the order in which it was added.
    pub files: Vec<Input>,
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
    /// The files: `vmlinuz` and `initramfs.img`, and of the forms that were asked for `layer0.efi` (UKI), `layer0-kernel.efi` (the
    /// initramfs inside the kernel), `layer0.iso` and `layer0-usb.img`. The bundle holds the manifest and is not in it.
    pub artifacts: Vec<Artifact>,
    /// What else it was built from; absent in manifests of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs: Option<Inputs>,
}
