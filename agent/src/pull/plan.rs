//! What a set needs: its documents read one by one and checked against each other, and the layers that follow from them.
//!
//! Pure but for the `load` it is given: the same code reads a set from a registry and from the store alone.

use std::collections::{BTreeMap, BTreeSet};

use protocol::ids::{Digest, Name};
use protocol::imageset::ImageSet;
use protocol::oci::{
    self, Descriptor, ImageConfig, MEDIA_IMAGESET_CONFIG, Manifest, OciError, RunConfig,
};

use super::PullError;
use super::unpack::Compression;

pub(super) mod image;

/// A layer to fetch.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) diff_id: Digest,
    pub(super) compression: Compression,
}

/// The documents of a set, read and checked against each other.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) set: ImageSet,
    pub(super) digest: Digest,
    pub(super) images: BTreeMap<Name, (RunConfig, Vec<Digest>)>,
    pub(super) layers: BTreeMap<Digest, Job>,
    /// Everything the set needs: documents and layers.
    pub(super) closure: BTreeSet<Digest>,
}

/// Which endpoint a document comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DocumentKind {
    Manifest,
    Blob,
}

/// A document by digest, declared size (where a descriptor says it) and endpoint.
pub(super) type Load<'a> =
    dyn FnMut(&Digest, Option<u64>, DocumentKind) -> Result<Vec<u8>, PullError> + 'a;

/// Reads all documents of a set and checks that they fit together. Pure but for `load`.
pub(super) fn plan(digest: &Digest, load: &mut Load<'_>) -> Result<Plan, PullError> {
    fn document(digest: &Digest) -> impl Fn(OciError) -> PullError {
        let digest = *digest;
        move |source| PullError::Document { digest, source }
    }
    let index = load(digest, None, DocumentKind::Manifest)?;
    let index = oci::parse_index(&index).map_err(document(digest))?;
    let entries = oci::resolve_set(&index, architecture()).map_err(document(digest))?;
    let mut closure = BTreeSet::from([*digest]);
    let mut read = |descriptor: &Descriptor, kind| {
        closure.insert(descriptor.digest);
        load(&descriptor.digest, Some(descriptor.size), kind)
    };
    let entry = &entries.description;
    let manifest = read(entry, DocumentKind::Manifest)?;
    let manifest = oci::parse_manifest(&manifest).map_err(document(&entry.digest))?;
    if manifest.config.media_type != MEDIA_IMAGESET_CONFIG {
        let reason = format!("its config is `{}`", manifest.config.media_type);
        return Err(PullError::Set { digest: entry.digest, reason });
    }
    let set = read(&manifest.config, DocumentKind::Blob)?;
    let set = oci::parse_imageset(&set).map_err(document(&manifest.config.digest))?;
    let (mut images, mut layers) = (BTreeMap::new(), BTreeMap::new());
    for image in &set.images {
        let entry = entries.images.get(&image.name).ok_or_else(|| PullError::Set {
            digest: *digest,
            reason: format!("image `{}` has no linux/{} manifest", image.name, architecture()),
        })?;
        let manifest = read(entry, DocumentKind::Manifest)?;
        let manifest = oci::parse_manifest(&manifest).map_err(document(&entry.digest))?;
        let config = read(&manifest.config, DocumentKind::Blob)?;
        let config = oci::parse_image_config(&config).map_err(document(&manifest.config.digest))?;
        let digests = add_jobs(entry, &manifest, &config, &mut layers)?;
        images.insert(image.name.clone(), (config.config, digests));
    }
    closure.extend(layers.keys());
    Ok(Plan { set, digest: *digest, images, layers, closure })
}

/// Adds an image's layers to what is to be there, and returns their digests, lowest first.
fn add_jobs(
    entry: &Descriptor,
    manifest: &Manifest,
    config: &ImageConfig,
    layers: &mut BTreeMap<Digest, Job>,
) -> Result<Vec<Digest>, PullError> {
    let wrong = |reason| PullError::Set { digest: entry.digest, reason };
    let (blobs, diffs) = (&manifest.layers, &config.rootfs.diff_ids);
    if blobs.len() != diffs.len() {
        let reason = format!("{} layers, but the config has {} diff ids", blobs.len(), diffs.len());
        return Err(wrong(reason));
    }
    for (blob, diff_id) in blobs.iter().zip(diffs) {
        let compression = Compression::of(&blob.media_type)
            .ok_or_else(|| wrong(format!("a layer has the media type `{}`", blob.media_type)))?;
        let (digest, size, diff_id) = (blob.digest, blob.size, *diff_id);
        let job = layers.entry(digest).or_insert(Job { digest, size, diff_id, compression });
        if (job.size, job.diff_id, job.compression) != (size, diff_id, compression) {
            return Err(wrong(format!("layer {digest} is described in two ways")));
        }
    }
    Ok(blobs.iter().map(|blob| blob.digest).collect())
}

/// Go's name of this machine's architecture, as image indexes have it.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
