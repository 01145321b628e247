//! Why a set was not pulled, and whether another try may help.

use super::budget::Refusal;
use protocol::ids::Digest;
use protocol::oci::OciError;
use protocol::oci::mount::MountForm;
use protocol::signature::SignatureError;

use super::TRIES;
use crate::layer::LayerError;
use crate::mounts::MountError;
use crate::registry::RegistryError;
use crate::store::StoreError;

/// Why a set was not pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry did not give what was asked for.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The store could not keep it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A document of the set is not what it should be.
    #[error("{digest}")]
    Document {
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        #[source]
        source: OciError,
    },
    /// Documents of the set do not fit together.
    #[error("{digest}: {reason}")]
    Set {
        /// The document that says so.
        digest: Digest,
        /// What is wrong.
        reason: String,
    },
    /// No installed key vouches for the set.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// A blob is not what its digest says.
    #[error("{url}: the blob's digest is {found}, expected {expected}")]
    Digest {
        /// Where it came from.
        url: String,
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// A blob is longer or shorter than its descriptor says.
    #[error("{url}: the blob has {found} bytes, its descriptor says {expected}")]
    Size {
        /// Where it came from.
        url: String,
        /// The size declared, in bytes.
        expected: u64,
        /// The size found; one more than declared if it was cut off there.
        found: u64,
    },
    /// The connection broke or stalled too often at the same place.
    #[error("{url}: broke off at byte {at} of {size}, {TRIES} times")]
    Broken {
        /// Where it came from.
        url: String,
        /// The byte that did not come.
        at: u64,
        /// The blob's size, in bytes.
        size: u64,
        /// The last failure.
        #[source]
        source: std::io::Error,
    },
    /// A layer could not be applied although its bytes are right.
    #[error("layer {digest}")]
    Layer {
        /// The layer's blob.
        digest: Digest,
        /// What is wrong.
        #[source]
        source: LayerError,
    },
    /// A file system could not be written.
    #[error("cannot keep the file system {digest}")]
    FileSystem {
        /// Its blob.
        digest: Digest,
        /// What went wrong.
        #[source]
        source: std::io::Error,
    },
    /// A file system has come as it was published, but this kernel does not mount it.
    #[error("file system {digest}")]
    Unmountable {
        /// Its blob.
        digest: Digest,
        /// Which file system.
        form: MountForm,
        /// The kernel's answer.
        #[source]
        source: MountError,
    },
    /// A layer's content is not what the image's config says.
    #[error("layer {digest} unpacks to {found}, the image's config says {expected}")]
    DiffId {
        /// The layer's blob.
        digest: Digest,
        /// `diff_id` in the config.
        expected: Digest,
        /// The digest of the uncompressed content.
        found: Digest,
    },
    /// What is missing cannot fit.
    #[error(transparent)]
    NoSpace(Box<Refusal>),
    /// The caller cancelled, or another layer failed first.
    #[error("the pull was cancelled")]
    Cancelled,
}

impl PullError {
    /// Whether the same blob may be right the next time.
    pub(super) fn is_worth_a_retry(&self) -> bool {
        match self {
            Self::Registry(error) => error.is_transient(),
            Self::Digest { .. } => true,
            _ => false,
        }
    }
}
