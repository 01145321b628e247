//! What changed between two versions of an ImageSet: by the digests of their layers first; only images whose layers
//! differ are looked into, entry by entry, as a node would see them (`tree`).

mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::Arc;

use protocol::ids::{Digest, Name, Version};
use protocol::oci::mount::MountForm;
use protocol::oci::{Descriptor, Manifest};
use serde::Serialize;

use self::tree::Tree;
use crate::blob::BlobDir;
use crate::client::Options;
use crate::inspect::platform;
use crate::place::{Found, Origin, Place, PlaceError, find_in};
use crate::progress::Counter;

/// What changed from one set to another.
#[derive(Debug, Clone, Serialize)]
pub struct Diff {
    /// The older one.
    pub from: Side,
    /// The newer one.
    pub to: Side,
    /// Whether the description differs in more than the version.
    pub description_changed: bool,
    /// Bytes of blobs that a node which has the older set's layers fetches for the newer one.
    pub bytes_to_fetch: u64,
    /// Bytes of the newer set's mount forms that the older one does not have, by form: what a node which mounts all images
    /// fetches in the place of layers.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub mount_bytes_to_fetch: BTreeMap<MountForm, u64>,
    /// The images of both, by name and platform.
    pub images: Vec<ImageDiff>,
}

/// One of the two sets.
#[derive(Debug, Clone, Serialize)]
pub struct Side {
    /// Where it was read.
    pub place: String,
    /// Its name.
    pub name: Name,
    /// Its version.
    pub version: Version,
    /// Its digest.
    pub digest: Digest,
}

/// What happened to something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// The older set does not have it.
    Added,
    /// The newer set does not have it.
    Removed,
    /// Both have it, and it differs.
    Changed,
    /// Both have it as it is.
    Same,
}

/// What changed in an image.
#[derive(Debug, Clone, Serialize)]
pub struct ImageDiff {
    /// Its name.
    pub name: Name,
    /// Its platform, `linux/amd64`.
    pub platform: String,
    /// What happened to it.
    pub change: Change,
    /// Whether the config (command, environment, user and so on) differs.
    pub config_changed: bool,
    /// Layers that both have.
    pub layers_kept: usize,
    /// Layers that only the newer one has.
    pub layers_added: Vec<LayerSize>,
    /// Layers that only the older one has.
    pub layers_removed: Vec<LayerSize>,
    /// Files, directories and links that differ, by path.
    pub entries: Vec<EntryDiff>,
}

/// A layer and its size in bytes, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerSize {
    /// Digest of the blob.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
}

/// What happened to a file, directory or link. Times do not count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EntryDiff {
    /// Its path, with a leading `/`.
    pub path: String,
    /// What happened to it.
    pub change: Change,
    /// Its size in the older set, in bytes; 0 for what is no file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<u64>,
    /// Its size in the newer set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<u64>,
}

type Images<'a> = BTreeMap<(Name, String), &'a Manifest>;

/// A set that is being compared.
struct Opened {
    origin: Origin,
    found: Found,
}

impl Opened {
    async fn open(place: &Place, options: &Options) -> Result<Self, PlaceError> {
        let origin = Origin::open(place, options)?;
        let found = find_in(&origin, place).await?;
        Ok(Self { origin, found })
    }

    fn images(&self) -> Images<'_> {
        let images = self.found.images().filter_map(|(name, entry)| {
            let manifest = self.found.manifests.get(&entry.digest)?;
            Some(((name, platform(entry.platform.as_ref())), manifest))
        });
        images.collect()
    }

    fn side(&self) -> Side {
        Side {
            place: self.found.place.to_string(),
            name: self.found.set.name.clone(),
            version: self.found.set.version.clone(),
            digest: self.found.index.digest,
        }
    }
}

/// Compares the sets at two places. Layers of a registry are fetched to a temporary directory, one at a time.
///
/// # Errors
/// If one of them cannot be read, or is no ImageSet.
pub async fn diff(from: &Place, to: &Place, options: &Options) -> Result<Diff, PlaceError> {
    let (before, after) = (Opened::open(from, options).await?, Opened::open(to, options).await?);
    let (old, new) = (before.images(), after.images());
    let names: BTreeSet<&(Name, String)> = old.keys().chain(new.keys()).collect();
    let mut images = Vec::new();
    for key in names {
        let sides = [(&before, old.get(key)), (&after, new.get(key))];
        let sides = sides.map(|(opened, manifest)| (opened, manifest.copied()));
        images.push(image(key, sides).await?);
    }
    let had: BTreeSet<Digest> = before.found.blobs().iter().map(|blob| blob.digest).collect();
    let mut mounts: BTreeMap<Digest, (MountForm, u64)> = BTreeMap::new();
    let mut mount_bytes_to_fetch = BTreeMap::new();
    for (_, image) in after.found.images() {
        let forms = after.found.mounts(image);
        mounts.extend(forms.map(|(mount, blob)| (blob.digest, (mount.form, blob.size))));
    }
    for (digest, (form, size)) in &mounts {
        let bytes = mount_bytes_to_fetch.entry(*form).or_insert(0);
        *bytes += if had.contains(digest) { 0 } else { *size };
    }
    let new_blobs = after
        .found
        .blobs()
        .into_iter()
        .filter(|blob| !had.contains(&blob.digest) && !mounts.contains_key(&blob.digest));
    let bytes_to_fetch = new_blobs.map(|blob| blob.size).sum();
    let mut described = before.found.set.clone();
    described.version.clone_from(&after.found.set.version);
    let description_changed = described != after.found.set;
    let (from, to) = (before.side(), after.side());
    Ok(Diff { from, to, description_changed, bytes_to_fetch, mount_bytes_to_fetch, images })
}

async fn image(
    (name, platform): &(Name, String),
    [(before, old), (after, new)]: [(&Opened, Option<&Manifest>); 2],
) -> Result<ImageDiff, PlaceError> {
    let layers = |manifest: Option<&Manifest>| -> Vec<Descriptor> {
        manifest.map(|manifest| manifest.layers.clone()).unwrap_or_default()
    };
    let (old_layers, new_layers) = (layers(old), layers(new));
    let only = |these: &[Descriptor], those: &[Descriptor]| -> Vec<LayerSize> {
        let others: BTreeSet<Digest> = those.iter().map(|layer| layer.digest).collect();
        let only = these.iter().filter(|layer| !others.contains(&layer.digest));
        only.map(|layer| LayerSize { digest: layer.digest, bytes: layer.size }).collect()
    };
    let layers_added = only(&new_layers, &old_layers);
    let layers_removed = only(&old_layers, &new_layers);
    let digests = |layers: &[Descriptor]| -> Vec<Digest> {
        layers.iter().map(|layer| layer.digest).collect()
    };
    let mut entries = Vec::new();
    if digests(&old_layers) != digests(&new_layers) {
        entries = compare((before, &old_layers), (after, &new_layers)).await?;
    }
    let config = |manifest: Option<&Manifest>| manifest.map(|manifest| manifest.config.digest);
    let change = match (old, new) {
        (None, _) => Change::Added,
        (_, None) => Change::Removed,
        (Some(old), Some(new)) if old == new => Change::Same,
        _ => Change::Changed,
    };
    Ok(ImageDiff {
        name: name.clone(),
        platform: platform.clone(),
        change,
        config_changed: change == Change::Changed && config(old) != config(new),
        layers_kept: new_layers.len() - layers_added.len(),
        layers_added,
        layers_removed,
        entries,
    })
}

async fn compare(
    (before, old): (&Opened, &[Descriptor]),
    (after, new): (&Opened, &[Descriptor]),
) -> Result<Vec<EntryDiff>, PlaceError> {
    let common = old.iter().zip(new).take_while(|(a, b)| a.digest == b.digest).count();
    let mut base = Tree::default();
    for layer in old.iter().take(common) {
        apply(&mut base, before, layer).await?;
    }
    let mut trees = [base.clone(), base];
    let [one, other] = &mut trees;
    for (tree, opened, layers) in [(one, before, old), (other, after, new)] {
        for layer in layers.iter().skip(common) {
            apply(tree, opened, layer).await?;
        }
    }
    let [one, other] = trees;
    Ok(one.diff(&other))
}

async fn apply(tree: &mut Tree, opened: &Opened, layer: &Descriptor) -> Result<(), PlaceError> {
    let dir = tempfile::tempdir().map_err(PlaceError::Scratch)?;
    let unseen = Counter::new(0, Arc::new(|_| {})).meter();
    let path = opened.origin.blob(layer, &BlobDir::new(dir.path()), &unseen).await?;
    let failed = |source| PlaceError::Layer { digest: layer.digest, source };
    tree.apply(File::open(path).map_err(failed)?).map_err(failed)
}
