//! An ImageSet from one place to another, byte for byte: the index, every manifest and blob, the tags of its images, and
//! its signatures. Only what is missing moves. What breaks off leaves no tag behind.

use std::fs;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use protocol::ids::Digest;
use protocol::imageset::ImageSet;
use protocol::oci::Descriptor;
use protocol::reference::Reference;

use crate::blob::BlobDir;
use crate::build::Staged;
use crate::client::{Options, Registry};
use crate::place::{Document, Found, Origin, Place, PlaceError, find_in, signatures, unique};
use crate::progress::{Counter, OnProgress, Progress};

/// What a transfer did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transferred {
    /// The set's description.
    pub set: ImageSet,
    /// Digest of its index.
    pub digest: Digest,
    /// Signature objects that came along.
    pub signatures: usize,
    /// Bytes moved, and bytes that were there.
    pub progress: Progress,
}

/// All that moves.
struct Load {
    found: Found,
    blobs: Vec<Descriptor>,
    /// Manifests that are put under their digest, before any tag.
    documents: Vec<Document>,
    /// What is put under tags, the set's own last.
    tags: Vec<(String, Document)>,
    signatures: usize,
}

/// Copies the set at `from` to `to`. In a registry the index is tagged VERSION, and with the tag of `to` where that is
/// another one. A layout is made when it is not there and added to when it is; the tag of `to` counts for nothing there.
///
/// # Errors
/// If the set cannot be read whole, or the other place does not take it.
pub async fn copy(
    from: &Place,
    to: &Place,
    options: &Options,
    on_progress: OnProgress,
) -> Result<Transferred, PlaceError> {
    let origin = Origin::open(from, options)?;
    let load = Load::read(&origin, from).await?;
    let total = load.blobs.iter().map(|blob| blob.size).sum();
    let counter = Counter::new(total, on_progress);
    match to {
        Place::Registry(reference) => {
            into_registry(&origin, &load, (from, reference), options, &counter).await?;
        }
        Place::Layout { path, .. } => into_layout(&origin, &load, path, options, &counter).await?,
    }
    let progress = counter.now();
    let Load { found: Found { set, index, .. }, signatures, .. } = load;
    Ok(Transferred { set, digest: index.digest, signatures, progress })
}

impl Load {
    async fn read(origin: &Origin, place: &Place) -> Result<Self, PlaceError> {
        let found = find_in(origin, place).await?;
        let signed = signatures(origin, &found).await?;
        let mut blobs = found.blobs();
        blobs.extend(unique(signed.iter().map(|(.., manifest)| manifest)));
        let mut seen = std::collections::BTreeSet::new();
        blobs.retain(|blob| seen.insert(blob.digest));
        let index = found.documents.last().cloned();
        let mut documents = found.documents.clone();
        // The index is put under its tags, after all else.
        documents.pop();
        let mut tags = found.image_tags()?;
        let signatures = signed.len();
        tags.extend(signed.into_iter().map(|(tag, document, _)| (tag, document)));
        tags.extend(index.map(|index| (found.set.version.to_string(), index)));
        Ok(Self { found, blobs, documents, tags, signatures })
    }
}

fn scratch() -> Result<(tempfile::TempDir, BlobDir), PlaceError> {
    let dir = tempfile::tempdir().map_err(PlaceError::Scratch)?;
    let blobs = BlobDir::new(dir.path());
    Ok((dir, blobs))
}

async fn into_registry(
    origin: &Origin,
    load: &Load,
    (from, to): (&Place, &Reference),
    options: &Options,
    counter: &Counter,
) -> Result<(), PlaceError> {
    let registry = Registry::new(to, options)?;
    registry.log_in().await?;
    let neighbour = match from {
        Place::Registry(from) if registry.is_same_as(from) && from.repository != to.repository => {
            Some(from.repository.as_str())
        }
        _ => None,
    };
    let (_dir, scratch) = scratch()?;
    let send = async |blob: &Descriptor| -> Result<(), PlaceError> {
        if registry.has_blob(blob).await? {
            counter.skip(blob.size);
            return Ok(());
        }
        if let Some(neighbour) = neighbour
            && registry.mount(blob, neighbour).await?
        {
            counter.skip(blob.size);
            return Ok(());
        }
        // Counted when it is sent, not when it is fetched.
        let unseen = Counter::new(0, Arc::new(|_| {})).meter();
        let path = origin.blob(blob, &scratch, &unseen).await?;
        registry.send_blob(blob, &path, &counter.meter()).await?;
        if matches!(origin, Origin::Registry(_)) {
            fs::remove_file(&path).map_err(PlaceError::Scratch)?;
        }
        Ok(())
    };
    stream::iter(&load.blobs)
        .map(send)
        .buffer_unordered(options.parallel.max(1))
        .try_collect::<()>()
        .await?;
    let put = async |key: &str, document: &Document| {
        let bytes = Bytes::from(document.bytes.clone());
        registry.put_manifest(key, &document.descriptor.media_type, &bytes).await
    };
    for document in &load.documents {
        put(&document.descriptor.digest.to_string(), document).await?;
    }
    for (tag, document) in &load.tags {
        put(tag, document).await?;
    }
    if let (Some(tag), Some((version, index))) = (&to.tag, load.tags.last())
        && tag != version
    {
        put(tag, index).await?;
    }
    Ok(())
}

async fn into_layout(
    origin: &Origin,
    load: &Load,
    out: &std::path::Path,
    options: &Options,
    counter: &Counter,
) -> Result<(), PlaceError> {
    let staged = Staged::new(out)?;
    let fetch = async |blob: &Descriptor| -> Result<(), PlaceError> {
        if staged.has(blob)? {
            counter.skip(blob.size);
            return Ok(());
        }
        let meter = counter.meter();
        let path = origin.blob(blob, &staged.blobs, &meter).await?;
        if let Origin::Layout(_) = origin {
            staged.take(blob, &path)?;
            meter.set(blob.size);
        }
        Ok(())
    };
    stream::iter(&load.blobs)
        .map(fetch)
        .buffer_unordered(options.parallel.max(1))
        .try_collect::<()>()
        .await?;
    let mut entries = Vec::new();
    for document in load.documents.iter().chain(load.tags.iter().map(|(_, document)| document)) {
        staged.put(&document.descriptor.media_type, &document.bytes)?;
    }
    // The set's own first, as `build` has it.
    for (tag, document) in load.tags.iter().rev().take(1).chain(&load.tags) {
        if !entries.iter().any(|(known, _): &(String, Descriptor)| known == tag) {
            entries.push((tag.clone(), document.descriptor.clone()));
        }
    }
    Ok(staged.install(entries)?)
}
