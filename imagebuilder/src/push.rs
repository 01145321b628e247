//! An ImageSet out of an OCI layout into a registry: blobs that it lacks, several at a time, then manifests, then tags.
//!
//! A push that breaks off leaves no tag behind; the next one sends only what is missing.

use protocol::ids::Digest;
use protocol::reference::Reference;

use crate::build::BuiltSet;
use crate::client::Options;
use crate::place::{Place, PlaceError};
use crate::transfer;

pub use crate::progress::{OnProgress, Progress};

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The set, pinned: VERSION and digest.
    pub reference: Reference,
    /// Digest of the set's index.
    pub digest: Digest,
    /// Bytes sent and skipped.
    pub progress: Progress,
}

/// Pushes the set to the registry and repository of `reference`. The index is tagged VERSION, every image manifest
/// VERSION-IMAGENAME; a tag in `reference` other than VERSION is set on the index too. A digest in it is ignored.
///
/// # Errors
/// If the layout cannot be read, or the registry cannot be reached or refuses.
pub async fn push(
    built: &BuiltSet,
    reference: &Reference,
    options: &Options,
    on_progress: OnProgress,
) -> Result<Pushed, PlaceError> {
    let version = built.set.version.to_string();
    let from = Place::Layout { path: built.layout.clone(), tag: Some(version.clone()) };
    let to = Place::Registry(reference.clone());
    let done = transfer::copy(&from, &to, options, on_progress).await?;
    let reference = reference.with_tag(&version).with_digest(done.digest);
    Ok(Pushed { reference, digest: done.digest, progress: done.progress })
}
