//! Where an ImageSet stands, an OCI layout or a registry, and reading one from there without its layers.
//!
//! Not here: moving one ([`crate::transfer`]).

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use protocol::ids::{Digest, Name};
use protocol::imageset::ImageSet;
use protocol::oci::mount::MountEntry;
use protocol::oci::{
    self, ARTIFACT_IMAGESET, Descriptor, Index, MEDIA_DOCKER_LIST, MEDIA_INDEX, Manifest, OciError,
};
use protocol::reference::{InvalidReference, Reference};

use crate::blob::BlobDir;
use crate::build::{self, BuildError, BuiltSet, image_tags, layout_tag};
use crate::client::{Options, Registry, RegistryError};
use crate::progress::Meter;
use crate::source::read_blob;

/// Most documents of one tree: a set has at most a few hundred.
const MAX_DOCUMENTS: usize = 10_000;

/// Where an ImageSet stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An OCI layout.
    Layout {
        /// Its directory.
        path: PathBuf,
        /// The set's tag, its version; needed where the layout has several sets.
        tag: Option<String>,
    },
    /// A registry.
    Registry(Reference),
}

impl Place {
    /// Reads `oci:DIR[:VERSION]`, the path of a directory, or a reference.
    ///
    /// # Errors
    /// If the text is neither.
    pub fn parse(text: &str) -> Result<Self, InvalidReference> {
        if let Some(rest) = text.strip_prefix("oci:") {
            return Ok(match rest.rsplit_once(':') {
                Some((path, tag)) if !path.is_empty() && !tag.is_empty() && !tag.contains('/') => {
                    Self::Layout { path: path.into(), tag: Some(tag.to_owned()) }
                }
                _ => Self::Layout { path: rest.into(), tag: None },
            });
        }
        let is_path = text.starts_with(['/', '.']) || Path::new(text).join("oci-layout").is_file();
        match is_path {
            true => Ok(Self::Layout { path: text.into(), tag: None }),
            false => text.parse().map(Self::Registry),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Layout { path, tag: None } => write!(f, "oci:{}", path.display()),
            Self::Layout { path, tag: Some(tag) } => write!(f, "oci:{}:{tag}", path.display()),
        }
    }
}

/// Why an ImageSet cannot be read or moved.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// A layout cannot be read or written.
    #[error(transparent)]
    Layout(#[from] BuildError),
    /// A registry does not do what it is asked.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// What is there is no ImageSet.
    #[error("{place} is not an ImageSet")]
    NotASet {
        /// Where.
        place: String,
        /// What is wrong with it.
        #[source]
        source: OciError,
    },
    /// A layer cannot be read.
    #[error("layer {digest} cannot be read")]
    Layer {
        /// The layer.
        digest: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A directory for what is on its way cannot be made.
    #[error("cannot make a temporary directory")]
    Scratch(#[source] io::Error),
}

/// A place that is open for reading.
pub(crate) enum Origin {
    Layout(PathBuf),
    Registry(Box<Registry>),
}

/// A document as it stands in its place.
#[derive(Debug, Clone)]
pub(crate) struct Document {
    pub(crate) descriptor: Descriptor,
    pub(crate) bytes: Vec<u8>,
}

/// An ImageSet as it stands in its place, without layers.
#[derive(Debug, Clone)]
pub struct Found {
    /// Where it was read.
    pub place: Place,
    /// The description.
    pub set: ImageSet,
    /// The index. Its digest is the set's.
    pub index: Descriptor,
    /// The index's entries and annotations.
    pub entries: Index,
    /// Every manifest of the index by digest.
    pub manifests: BTreeMap<Digest, Manifest>,
    pub(crate) documents: Vec<Document>,
}

impl Origin {
    pub(crate) fn open(place: &Place, options: &Options) -> Result<Self, RegistryError> {
        Ok(match place {
            Place::Layout { path, .. } => Self::Layout(path.clone()),
            Place::Registry(reference) => {
                Self::Registry(Box::new(Registry::new(reference, options)?))
            }
        })
    }

    /// The index of a set.
    async fn root(&self, place: &Place) -> Result<Document, PlaceError> {
        match (self, place) {
            (Self::Registry(registry), Place::Registry(reference)) => {
                let (descriptor, bytes) = registry.manifest(&reference.manifest_key()).await?;
                Ok(Document { descriptor, bytes })
            }
            (Self::Layout(path), Place::Layout { tag, .. }) => {
                let built = BuiltSet::open(path, tag.as_deref())?;
                let bytes = built.document(&built.index)?;
                let descriptor = Descriptor::of(MEDIA_INDEX, &bytes);
                Ok(Document { descriptor, bytes })
            }
            _ => Err(BuildError::CutOff.into()),
        }
    }

    /// A manifest that a descriptor points to.
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Vec<u8>, PlaceError> {
        Ok(match self {
            Self::Registry(registry) => registry.manifest(&descriptor.digest.to_string()).await?.1,
            Self::Layout(path) => read_blob(path, descriptor).map_err(BuildError::Blob)?,
        })
    }

    /// A config.
    pub(crate) async fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>, PlaceError> {
        Ok(match self {
            Self::Registry(registry) => registry.document(descriptor).await?,
            Self::Layout(path) => read_blob(path, descriptor).map_err(BuildError::Blob)?,
        })
    }

    /// What stands under a tag, where there is such a tag.
    async fn tagged(&self, tag: &str) -> Result<Option<Document>, PlaceError> {
        match self {
            Self::Registry(registry) => match registry.manifest(tag).await {
                Ok((descriptor, bytes)) => Ok(Some(Document { descriptor, bytes })),
                Err(RegistryError::NotFound { .. }) => Ok(None),
                Err(error) => Err(error.into()),
            },
            Self::Layout(path) => {
                let Some(mut descriptor) = layout_tag(path, tag)? else { return Ok(None) };
                descriptor.annotations.clear();
                let bytes = read_blob(path, &descriptor).map_err(BuildError::Blob)?;
                Ok(Some(Document { descriptor, bytes }))
            }
        }
    }

    /// The file in which a blob stands; one of a registry is fetched into `scratch` first.
    pub(crate) async fn blob(
        &self,
        blob: &Descriptor,
        scratch: &BlobDir,
        meter: &Meter,
    ) -> Result<PathBuf, PlaceError> {
        match self {
            Self::Layout(path) => Ok(BlobDir::new(&path.join("blobs/sha256")).path(&blob.digest)),
            Self::Registry(registry) => {
                registry.fetch_blob(blob, scratch, meter).await?;
                Ok(scratch.path(&blob.digest))
            }
        }
    }
}

/// Reads the ImageSet of a place: its index, every manifest and the description.
///
/// # Errors
/// If it cannot be read, or is no ImageSet.
pub async fn find(place: &Place, options: &Options) -> Result<Found, PlaceError> {
    let origin = Origin::open(place, options)?;
    find_in(&origin, place).await
}

pub(crate) async fn find_in(origin: &Origin, place: &Place) -> Result<Found, PlaceError> {
    let wrong = |source| PlaceError::NotASet { place: place.to_string(), source };
    let reason = |reason: String| wrong(OciError::Wrong { what: "ImageSet index", reason });
    let root = origin.root(place).await?;
    let entries = oci::parse_index(&root.bytes).map_err(wrong)?;
    if entries.artifact_type.as_deref() != Some(ARTIFACT_IMAGESET) {
        let found = entries.artifact_type.as_deref().unwrap_or("none");
        return Err(reason(format!("artifactType is {found}, expected {ARTIFACT_IMAGESET}")));
    }
    if entries.manifests.len() > MAX_DOCUMENTS {
        return Err(reason(format!("{} entries", entries.manifests.len())));
    }
    let (mut manifests, mut documents) = (BTreeMap::new(), Vec::new());
    for entry in &entries.manifests {
        if is_index(entry) {
            return Err(reason(format!("entry {} is a nested index", entry.digest)));
        }
        let bytes = origin.manifest(entry).await?;
        manifests.insert(entry.digest, oci::parse_manifest(&bytes).map_err(wrong)?);
        documents.push(Document { descriptor: entry.clone(), bytes });
    }
    let first = entries.manifests.first().and_then(|entry| manifests.get(&entry.digest));
    let first = first.ok_or_else(|| reason("it has no entries".to_owned()))?;
    let config = origin.config(&first.config).await?;
    let set = oci::parse_imageset(&config).map_err(wrong)?;
    let index = root.descriptor.clone();
    documents.push(root);
    Ok(Found { place: place.clone(), set, index, entries, manifests, documents })
}

pub(crate) fn is_index(descriptor: &Descriptor) -> bool {
    matches!(descriptor.media_type.as_str(), MEDIA_INDEX | MEDIA_DOCKER_LIST)
}

/// Tag of the signatures of a manifest (cosign's layout): `sha256-HEX.sig`.
#[must_use]
pub fn signature_tag(digest: &Digest) -> String {
    format!("sha256-{}.sig", digest.hex())
}

impl Found {
    /// The blobs that the manifests point to, each once.
    #[must_use]
    pub fn blobs(&self) -> Vec<Descriptor> {
        unique(self.entries.manifests.iter().filter_map(|entry| self.manifests.get(&entry.digest)))
    }

    /// The entries of images, with their names, in the index's order.
    pub fn images(&self) -> impl Iterator<Item = (Name, &Descriptor)> {
        let images = self.entries.manifests.iter().filter(|entry| entry.platform.is_some());
        images.filter_map(|entry| {
            let name = entry.annotations.get(oci::ANNOTATION_IMAGE_NAME)?;
            Some((name.parse().ok()?, entry))
        })
    }

    /// The mount forms of the image of this entry, each with its blob, in the index's order.
    pub(crate) fn mounts(
        &self,
        image: &Descriptor,
    ) -> impl Iterator<Item = (MountEntry, &Descriptor)> {
        let entries = self.entries.manifests.iter().filter_map(MountEntry::of_entry);
        entries.filter(|entry| entry.of == image.digest).filter_map(|entry| {
            let blob = entry.blob(self.manifests.get(&entry.manifest.digest)?).ok()?;
            Some((entry, blob))
        })
    }

    /// What is tagged beside the index: the images.
    pub(crate) fn image_tags(&self) -> Result<Vec<(String, Document)>, PlaceError> {
        let mut tags = Vec::new();
        for (name, (descriptor, bytes)) in image_tags(&self.entries.manifests)? {
            let known = |document: &&Document| document.descriptor.digest == descriptor.digest;
            let bytes = bytes.or_else(|| {
                self.documents.iter().find(known).map(|document| document.bytes.clone())
            });
            let tag = build::image_tag(&self.set, &name);
            tags.push((tag, Document { descriptor, bytes: bytes.unwrap_or_default() }));
        }
        Ok(tags)
    }
}

/// The blobs of manifests, each once, in their order.
pub(crate) fn unique<'a>(manifests: impl Iterator<Item = &'a Manifest>) -> Vec<Descriptor> {
    let mut seen = std::collections::BTreeSet::new();
    manifests
        .flat_map(|manifest| std::iter::once(&manifest.config).chain(&manifest.layers))
        .filter(|blob| seen.insert(blob.digest))
        .cloned()
        .collect()
}

/// The signatures of the index and of every manifest, as far as there are any: tag, manifest, blobs.
pub(crate) async fn signatures(
    origin: &Origin,
    found: &Found,
) -> Result<Vec<(String, Document, Manifest)>, PlaceError> {
    let mut signatures: Vec<(String, Document, Manifest)> = Vec::new();
    let digests = found.documents.iter().map(|document| document.descriptor.digest);
    for tag in digests.map(|digest| signature_tag(&digest)) {
        if signatures.iter().any(|(known, ..)| *known == tag) {
            continue;
        }
        let Some(document) = origin.tagged(&tag).await? else { continue };
        let manifest = oci::parse_manifest(&document.bytes).map_err(|source| {
            PlaceError::NotASet { place: format!("{}, tag {tag},", found.place), source }
        })?;
        signatures.push((tag, document, manifest));
    }
    Ok(signatures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_layout_or_a_reference() {
        let layout = |path: &str, tag: Option<&str>| Place::Layout {
            path: path.into(),
            tag: tag.map(str::to_owned),
        };
        for (text, expected, shown) in [
            ("oci:a/b", layout("a/b", None), "oci:a/b"),
            ("oci:a/b:1", layout("a/b", Some("1")), "oci:a/b:1"),
            ("oci:a:b/c", layout("a:b/c", None), "oci:a:b/c"),
            ("./x", layout("./x", None), "oci:./x"),
            ("/x:1", layout("/x:1", None), "oci:/x:1"),
        ] {
            let place = Place::parse(text).expect(text);
            assert_eq!(place, expected);
            assert_eq!(place.to_string(), shown);
        }
        let place = Place::parse("http://r:1/a:2").expect("reference");
        assert_eq!(place.to_string(), "http://r:1/a:2");
        assert!(Place::parse("hello").is_err());
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("oci-layout"), "{}").expect("write");
        let text = dir.path().to_str().expect("text");
        assert!(matches!(Place::parse(text), Ok(Place::Layout { .. })));
    }

    #[test]
    fn a_signature_stands_under_cosigns_tag() {
        let tag = signature_tag(&Digest::of(b""));
        assert_eq!(
            tag,
            "sha256-e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855.sig"
        );
    }
}
