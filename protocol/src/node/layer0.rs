//! The part of the node documents that is about Layer0 itself: which one a node should run and which one it runs.
//!
//! A Layer0 is known by the digest of its `manifest.json` ([`crate::layer0`]): the digests of kernel, initramfs and agent follow
//! from it. A node knows its own from `layercake.layer0=` on its kernel command line, because no file in an image can hold the
//! image's digest.

use serde::{Deserialize, Serialize};

use crate::ids::Digest;

/// How a node gets from the Layer0 that it runs to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer0How {
    /// By kexec; where that is refused, by a reboot. The default.
    #[default]
    Auto,
    /// By kexec or not at all.
    Kexec,
    /// By a reboot: the firmware fetches it from the boot server.
    Reboot,
    /// Only its agent, in place of the one that runs. The rest comes with the next boot.
    Agent,
}

impl Layer0How {
    /// Its name in tables and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kexec => "kexec",
            Self::Reboot => "reboot",
            Self::Agent => "agent",
        }
    }
}

/// An archive that the kernel unpacks after the initramfs: an overlay of the site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer0Archive {
    /// sha256 of the file.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Where it is fetched: a URL, or a path on the server that gave the document.
    pub url: String,
}

/// The Layer0 that a node should run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredLayer0 {
    /// sha256 of its `manifest.json`, which lies at [`crate::layer0::path`] on the server.
    pub digest: Digest,
    /// How to get there.
    #[serde(default)]
    pub how: Layer0How,
    /// The boot that may be ended for it, once; another boot only says that it is stale. So nothing that a node boots can make
    /// it boot again and again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// Changes with every request of an operator, so that what failed is tried again when it is asked for again.
    #[serde(default)]
    pub request: u64,
    /// sha256 of its agent; given with [`Layer0How::Agent`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Digest>,
    /// Go there although the node is busy.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
    /// Archives of the site, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub archives: Vec<Layer0Archive>,
}

/// How the Layer0 that runs stands to the one that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer0State {
    /// It is the one, or none is wanted.
    Current,
    /// It is another one; `reason` says what the node does about it, or waits for.
    Stale,
    /// It is another one and stays so until an operator asks again; `reason` says why.
    Failed,
}

/// The Layer0 that a node runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedLayer0 {
    /// sha256 of its `manifest.json`; none when nobody told its kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// The version that the image says it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// sha256 of the agent that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Digest>,
    /// Whether it was started by kexec, not by firmware.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kexec: bool,
    /// How it stands to what is wanted.
    pub state: Layer0State,
    /// Why, or what is done about it: one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
