//! What a set needs: its documents read one by one and checked against each other, and the layers that follow from them.
//!
//! Pure but for the `load` it is given: the same code reads a set from a registry and from the store alone.

use std::collections::{BTreeMap, BTreeSet};

use protocol::ids::{Digest, Name};
use protocol::imageset::ImageSet;
use protocol::oci::mount::{MountEntry, MountForm};
use protocol::oci::unpacked::Unpacked;
use protocol::oci::{
    self, Descriptor, ImageConfig, MEDIA_IMAGESET_CONFIG, Manifest, OciError, RunConfig,
};

use super::PullError;
use super::forms::{self, Forms};
use super::unpack::Compression;

pub(super) mod image;

/// A layer or a file system to fetch.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) content: Content,
    /// What it takes unpacked, where it says so.
    pub(super) unpacked: Option<Unpacked>,
}

/// What a blob is, and so what is done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// A tar that is unpacked.
    Layer { diff_id: Digest, compression: Compression },
    /// A whole image that is mounted as it is.
    FileSystem(MountForm),
}

/// What an image's root is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Root {
    /// Layers, lowest first.
    Layers(Vec<Digest>),
    /// One file system.
    FileSystem(MountForm, Digest),
}

/// The documents of a set, read and checked against each other.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) set: ImageSet,
    pub(super) digest: Digest,
    pub(super) images: BTreeMap<Name, (RunConfig, Root)>,
    /// Layers and file systems.
    pub(super) layers: BTreeMap<Digest, Job>,
    /// Everything the set needs: documents, layers and file systems.
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

/// Reads all documents of a set and checks that they fit together. Pure but for `load` and what `forms` asks.
pub(super) fn plan(
    digest: &Digest,
    forms: Forms<'_>,
    load: &mut Load<'_>,
) -> Result<Plan, PullError> {
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
        let mounts = entries.mounts.get(&image.name).map_or(&[][..], Vec::as_slice);
        let root = match mount_job(forms, mounts, &mut read)? {
            Some((form, job)) => {
                let root = Root::FileSystem(form, job.digest);
                add_job(entry, &mut layers, job)?;
                root
            }
            None => Root::Layers(add_jobs(entry, &manifest, &config, &mut layers)?),
        };
        images.insert(image.name.clone(), (config.config, root));
    }
    closure.extend(layers.keys());
    Ok(Plan { set, digest: *digest, images, layers, closure })
}

/// The file system to take in the place of an image's layers, where there is one that can be had and mounted.
fn mount_job(
    forms: Forms<'_>,
    entries: &[MountEntry],
    read: &mut impl FnMut(&Descriptor, DocumentKind) -> Result<Vec<u8>, PullError>,
) -> Result<Option<(MountForm, Job)>, PullError> {
    for entry in forms.candidates(entries) {
        let bytes = match read(&entry.manifest, DocumentKind::Manifest) {
            // A set that is re-opened has what was pulled of it.
            Err(_) if forms.stored.is_some() => continue,
            read => read?,
        };
        let wrong = |source| PullError::Document { digest: entry.manifest.digest, source };
        let manifest = oci::parse_manifest(&bytes).map_err(wrong)?;
        let blob = entry.blob(&manifest).map_err(wrong)?;
        if forms.allows(entry.form, blob) {
            return Ok(Some((entry.form, forms::job(entry.form, blob))));
        }
    }
    Ok(None)
}

/// Adds one job; the same blob may be needed by several images, but for the same.
fn add_job(
    entry: &Descriptor,
    layers: &mut BTreeMap<Digest, Job>,
    job: Job,
) -> Result<(), PullError> {
    let known = layers.entry(job.digest).or_insert_with(|| job.clone());
    if (known.size, known.content) != (job.size, job.content) {
        let reason = format!("layer {} is described in two ways", job.digest);
        return Err(PullError::Set { digest: entry.digest, reason });
    }
    Ok(())
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
        let content = Content::Layer { diff_id: *diff_id, compression };
        let (digest, size, unpacked) = (blob.digest, blob.size, Unpacked::of(blob));
        add_job(entry, layers, Job { digest, size, content, unpacked })?;
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
