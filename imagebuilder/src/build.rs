//! An ImageSet into an OCI layout directory (image-layout.md). The same sources give the same bytes and digests.
//!
//! Everything is made in a directory beside the layout; the layout itself changes only by renames, `index.json` last, so
//! that an interrupted build leaves nothing visible. Registries are not spoken to here: see [`crate::push`].

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use protocol::ids::{Digest, Name};
use protocol::imageset::ImageSet;
use protocol::oci::{
    self, ANNOTATION_IMAGE_NAME, ARTIFACT_IMAGESET, Descriptor, ImageConfig, Index, MAX_LAYERS,
    MEDIA_CONFIG, MEDIA_EMPTY, MEDIA_IMAGESET_CONFIG, MEDIA_INDEX, MEDIA_MANIFEST, Manifest,
    OciError, Platform, RootFs, RunConfig,
};

use crate::blob::BlobDir;
use crate::client::Options;
use crate::description::{ImageSource, SetSource};
use crate::mount::{self, MountError};
use crate::source::{ANNOTATION_REF_NAME, Content, SourceError, localize, read_blob};

/// Annotation of the index: the set's name (annotations.md).
const ANNOTATION_TITLE: &str = "org.opencontainers.image.title";
/// Annotation of the index: the set's version (annotations.md).
const ANNOTATION_VERSION: &str = "org.opencontainers.image.version";
/// Annotation of an index entry: the reference that its image was made from (annotations.md).
pub(crate) const ANNOTATION_BASE_NAME: &str = "org.opencontainers.image.base.name";
/// Annotation of an index entry: the digest that this reference stood for (annotations.md).
pub(crate) const ANNOTATION_BASE_DIGEST: &str = "org.opencontainers.image.base.digest";

mod layout;

use self::layout::read_layout_index;
pub(crate) use self::layout::{Staged, layout_tag};

/// An ImageSet in an OCI layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltSet {
    /// The layout's directory.
    pub layout: PathBuf,
    /// The description that nodes will read.
    pub set: ImageSet,
    /// The index, tagged VERSION. Its digest is the set's.
    pub index: Descriptor,
    /// The manifests of the index in its order; entry 0 is the description's.
    pub manifests: Vec<Descriptor>,
    /// What is tagged VERSION-IMAGENAME, by image: its manifest, or an index where it has several platforms.
    pub images: BTreeMap<Name, Descriptor>,
}

/// Why a set cannot be built, or a layout not be read.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A source of an image gives no layers.
    #[error("image `{image}`")]
    Source {
        /// The image.
        image: Name,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// An image has more layers than a node takes.
    #[error("image `{image}` has {layers} layers, at most {MAX_LAYERS}")]
    Layers {
        /// The image.
        image: Name,
        /// How many.
        layers: usize,
    },
    /// A file of the layout cannot be read or written.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The output exists and is something else.
    #[error("{} exists and is not an OCI layout", path.display())]
    NotALayout {
        /// The output.
        path: PathBuf,
    },
    /// A document of the layout is malformed.
    #[error("{}", path.display())]
    Document {
        /// The layout.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: OciError,
    },
    /// A blob of the layout cannot be read or is corrupt.
    #[error("the layout is damaged")]
    Blob(#[source] SourceError),
    /// The layout does not hold the ImageSet that is asked for.
    #[error("{} has {found}, expected {expected}", path.display())]
    NoSet {
        /// The layout.
        path: PathBuf,
        /// What it has.
        found: String,
        /// What was asked for.
        expected: String,
    },
    /// A document cannot be written as JSON.
    #[error("cannot write JSON")]
    Json(#[from] serde_json::Error),
    /// An image could not be made into a file system.
    #[error("image `{image}`: no mount form")]
    Mount {
        /// The image.
        image: Name,
        /// Why.
        #[source]
        source: MountError,
    },
    /// The thread that built ended without a result.
    #[error("the build was cut off")]
    CutOff,
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io { what, path, source }
}

/// Builds the set into the OCI layout `out`, which is made when it is not there and added to when it is.
///
/// # Errors
/// If a source cannot be read, is not what it says, or the layout cannot be written. Nothing is left behind then.
pub async fn to_layout(
    set: &SetSource,
    out: &Path,
    options: &Options,
) -> Result<BuiltSet, BuildError> {
    let (set, out, options) = (set.clone(), out.to_owned(), options.clone());
    tokio::task::spawn_blocking(move || build(&set, &out, &options))
        .await
        .map_err(|_| BuildError::CutOff)?
}

/// [`to_layout`] for callers without a tokio runtime, and without credentials for `registry:` sources.
///
/// # Errors
/// As [`to_layout`].
pub fn to_layout_blocking(source: &SetSource, out: &Path) -> Result<BuiltSet, BuildError> {
    build(source, out, &Options::default())
}

fn build(source: &SetSource, out: &Path, options: &Options) -> Result<BuiltSet, BuildError> {
    let staged = Staged::new(out)?;
    let scratch = tempfile::tempdir().map_err(io_error("cannot make a directory for", out))?;
    let (mut images, mut mounts) = (Vec::new(), Vec::new());
    for image in &source.images {
        let local = localize(image, &source.base, options, scratch.path())
            .map_err(|error| BuildError::Source { image: image.name.clone(), source: error })?;
        for image in &local.images {
            let mut entry = build_image(source, image, &staged.blobs)?;
            if let Some(base) = &local.base {
                let (name, digest) = (base.reference.to_string(), base.digest.to_string());
                entry.annotations.insert(ANNOTATION_BASE_NAME.to_owned(), name);
                entry.annotations.insert(ANNOTATION_BASE_DIGEST.to_owned(), digest);
            }
            let name = || image.name.clone();
            let forms =
                mount::entries(&image.mount, &image.name, &entry, source.epoch, &staged.blobs);
            mounts.extend(forms.map_err(|source| BuildError::Mount { image: name(), source })?);
            images.push(entry);
        }
    }
    // Behind all images: what takes the first entry that fits takes an image.
    images.extend(mounts);
    let built = write_index(source, images, &staged.blobs, out)?;
    let entries = layout_entries(&built);
    staged.install(entries)?;
    Ok(built)
}

/// Writes an image's blobs; its entry of the index comes back.
fn build_image(
    source: &SetSource,
    image: &ImageSource,
    blobs: &BlobDir,
) -> Result<Descriptor, BuildError> {
    let mut whole = Content::default();
    for one in &image.sources {
        let content = one
            .content(image, &source.base, source.epoch, blobs)
            .map_err(|error| BuildError::Source { image: image.name.clone(), source: error })?;
        whole.layers.extend(content.layers);
        whole.config = content.config.or(whole.config);
        whole.original = content.original;
    }
    if whole.layers.len() > MAX_LAYERS {
        let layers = whole.layers.len();
        return Err(BuildError::Layers { image: image.name.clone(), layers });
    }
    let write = |media_type: &str, bytes: &[u8]| {
        blobs.put(media_type, bytes).map_err(io_error("cannot write a blob of", &source.base))
    };
    let original = whole.original.as_ref().and_then(|it| it.manifest.platform.as_ref());
    let variant = original.and_then(|platform| platform.variant.clone());
    let mut entry = match whole.original {
        Some(original) if image.sources.len() == 1 && image.is_unchanged() => {
            write(&original.config_type, &original.config_bytes)?;
            write(&original.manifest.media_type, &original.manifest_bytes)?
        }
        _ => {
            let config = image_config(image, whole.config, &whole.layers, source.epoch);
            let config = write(MEDIA_CONFIG, &serde_json::to_vec(&config)?)?;
            let manifest = Manifest {
                schema_version: 2,
                media_type: Some(MEDIA_MANIFEST.to_owned()),
                artifact_type: None,
                config,
                layers: whole.layers.into_iter().map(|layer| layer.descriptor).collect(),
                annotations: BTreeMap::new(),
            };
            write(MEDIA_MANIFEST, &serde_json::to_vec(&manifest)?)?
        }
    };
    entry.platform = Some(Platform {
        architecture: image.architecture().to_owned(),
        os: "linux".to_owned(),
        variant,
    });
    entry.annotations.insert(ANNOTATION_IMAGE_NAME.to_owned(), image.name.to_string());
    Ok(entry)
}

fn image_config(
    image: &ImageSource,
    base: Option<ImageConfig>,
    layers: &[crate::layer::Layer],
    epoch: u64,
) -> ImageConfig {
    ImageConfig {
        architecture: image.architecture().to_owned(),
        os: "linux".to_owned(),
        created: Some(rfc3339(epoch)),
        config: run_config(image, base.map(|base| base.config).unwrap_or_default()),
        rootfs: RootFs {
            kind: "layers".to_owned(),
            diff_ids: layers.iter().map(|layer| layer.diff_id).collect(),
        },
    }
}

fn run_config(image: &ImageSource, mut run: RunConfig) -> RunConfig {
    if let Some(entrypoint) = &image.entrypoint {
        run.entrypoint.clone_from(entrypoint);
        run.cmd.clear();
    }
    if let Some(cmd) = &image.cmd {
        run.cmd.clone_from(cmd);
    }
    for (key, value) in &image.env {
        let prefix = format!("{key}=");
        run.env.retain(|variable| !variable.starts_with(&prefix));
        run.env.push(format!("{key}={value}"));
    }
    run.labels.extend(image.labels.clone());
    run.user = image.user.clone().or(run.user);
    run.working_dir = image.workdir.clone().or(run.working_dir);
    run.stop_signal = image.stop_signal.clone().or(run.stop_signal);
    run
}

/// Writes the description, its manifest and the index.
fn write_index(
    source: &SetSource,
    images: Vec<Descriptor>,
    blobs: &BlobDir,
    out: &Path,
) -> Result<BuiltSet, BuildError> {
    let write = |media_type: &str, bytes: &[u8]| {
        blobs.put(media_type, bytes).map_err(io_error("cannot write a blob of", out))
    };
    let config = write(MEDIA_IMAGESET_CONFIG, &serde_json::to_vec(&source.set)?)?;
    write(MEDIA_EMPTY, b"{}")?;
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MEDIA_MANIFEST.to_owned()),
        artifact_type: Some(ARTIFACT_IMAGESET.to_owned()),
        config,
        layers: vec![Descriptor::empty()],
        annotations: BTreeMap::new(),
    };
    // Its descriptor has no artifactType: skopeo 1.9 would drop the key and write another index.
    let description = write(MEDIA_MANIFEST, &serde_json::to_vec(&manifest)?)?;
    let mut by_name = BTreeMap::new();
    for (name, (descriptor, bytes)) in image_tags(&images)? {
        if let Some(bytes) = bytes {
            write(MEDIA_INDEX, &bytes)?;
        }
        by_name.insert(name, descriptor);
    }
    let mut manifests = vec![description];
    manifests.extend(images);
    let annotations = BTreeMap::from([
        (ANNOTATION_TITLE.to_owned(), source.set.name.to_string()),
        (ANNOTATION_VERSION.to_owned(), source.set.version.to_string()),
    ]);
    let index = Index {
        schema_version: 2,
        media_type: Some(MEDIA_INDEX.to_owned()),
        artifact_type: Some(ARTIFACT_IMAGESET.to_owned()),
        manifests: manifests.clone(),
        annotations,
    };
    let mut index = write(MEDIA_INDEX, &serde_json::to_vec(&index)?)?;
    index.artifact_type = Some(ARTIFACT_IMAGESET.to_owned());
    Ok(BuiltSet {
        layout: out.to_owned(),
        set: source.set.clone(),
        index,
        manifests,
        images: by_name,
    })
}

/// The tag of an image's manifest, `VERSION-IMAGENAME`.
#[must_use]
pub fn image_tag(set: &ImageSet, image: &Name) -> String {
    format!("{}-{image}", set.version)
}

fn layout_entries(built: &BuiltSet) -> Vec<(String, Descriptor)> {
    let mut entries = vec![(built.set.version.to_string(), built.index.clone())];
    for (name, descriptor) in &built.images {
        entries.push((image_tag(&built.set, name), descriptor.clone()));
    }
    entries
}

/// What the images of a set are tagged as, by name: the manifest of an image, or an index of its own where it has
/// several platforms. The bytes of such an index come along; it is the same whenever it is made.
///
/// # Errors
/// If it cannot be written as JSON.
pub(crate) fn image_tags(entries: &[Descriptor]) -> Result<Vec<ImageTag>, BuildError> {
    let mut by_name: BTreeMap<Name, Vec<Descriptor>> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.platform.is_some()) {
        let name = entry.annotations.get(ANNOTATION_IMAGE_NAME);
        if let Some(name) = name.and_then(|name| name.parse().ok()) {
            by_name.entry(name).or_default().push(entry.clone());
        }
    }
    let mut tags = Vec::new();
    for (name, mut entries) in by_name {
        if let [one] = entries.as_slice() {
            tags.push((name, (one.clone(), None)));
            continue;
        }
        entries.iter_mut().for_each(|entry| entry.annotations.clear());
        let index = Index {
            schema_version: 2,
            media_type: Some(MEDIA_INDEX.to_owned()),
            artifact_type: None,
            manifests: entries,
            annotations: BTreeMap::new(),
        };
        let bytes = serde_json::to_vec(&index)?;
        tags.push((name, (Descriptor::of(MEDIA_INDEX, &bytes), Some(bytes))));
    }
    Ok(tags)
}

/// An image's name, what is tagged, and its bytes where they are made for the tag.
pub(crate) type ImageTag = (Name, (Descriptor, Option<Vec<u8>>));

fn is_imageset(layout: &Path, entry: &Descriptor) -> Result<bool, BuildError> {
    let bytes = read_blob(layout, entry).map_err(BuildError::Blob)?;
    let index = oci::parse_index(&bytes)
        .map_err(|source| BuildError::Document { path: layout.to_owned(), source })?;
    Ok(index.artifact_type.as_deref() == Some(ARTIFACT_IMAGESET))
}

impl BuiltSet {
    /// Reads a set back from a layout: the one tagged `version`, or the only one.
    ///
    /// # Errors
    /// If the layout cannot be read, or does not hold exactly one such set.
    pub fn open(layout: &Path, version: Option<&str>) -> Result<Self, BuildError> {
        let tag = |entry: &Descriptor| entry.annotations.get(ANNOTATION_REF_NAME).cloned();
        let mut found = Vec::new();
        for mut entry in read_layout_index(layout)?.manifests {
            let wanted = version.is_none_or(|version| tag(&entry).as_deref() == Some(version));
            if wanted && entry.media_type == MEDIA_INDEX && is_imageset(layout, &entry)? {
                entry.annotations.clear();
                // Other tools leave it out of `index.json`.
                entry.artifact_type = Some(ARTIFACT_IMAGESET.to_owned());
                found.push(entry);
            }
        }
        let [index] = found.as_slice() else {
            return Err(BuildError::NoSet {
                path: layout.to_owned(),
                found: format!("{} such ImageSets", found.len()),
                expected: version.map_or_else(
                    || "exactly one ImageSet".to_owned(),
                    |version| format!("one ImageSet of version {version}"),
                ),
            });
        };
        let index = index.clone();
        let document = |source| BuildError::Document { path: layout.to_owned(), source };
        let read = |descriptor| read_blob(layout, descriptor).map_err(BuildError::Blob);
        let manifests = oci::parse_index(&read(&index)?).map_err(document)?.manifests;
        let first = manifests.first().cloned().unwrap_or_else(Descriptor::empty);
        let description = oci::parse_manifest(&read(&first)?).map_err(document)?;
        let set = oci::parse_imageset(&read(&description.config)?).map_err(document)?;
        let images = image_tags(&manifests)?.into_iter();
        let images = images.map(|(name, (descriptor, _))| (name, descriptor)).collect();
        Ok(Self { layout: layout.to_owned(), set, index, manifests, images })
    }

    /// Where a blob of this digest stands.
    #[must_use]
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.layout.join("blobs/sha256").join(digest.hex())
    }

    /// The blobs that the set's manifests point to, each once, in their order.
    ///
    /// # Errors
    /// If a manifest cannot be read or is malformed.
    pub fn blobs(&self) -> Result<Vec<Descriptor>, BuildError> {
        let mut found: Vec<Descriptor> = Vec::new();
        for entry in &self.manifests {
            let manifest = oci::parse_manifest(&self.document(entry)?)
                .map_err(|source| BuildError::Document { path: self.layout.clone(), source })?;
            for blob in std::iter::once(manifest.config).chain(manifest.layers) {
                if !found.iter().any(|known| known.digest == blob.digest) {
                    found.push(blob);
                }
            }
        }
        Ok(found)
    }

    /// A manifest or the index, byte for byte, its digest checked.
    ///
    /// # Errors
    /// If it cannot be read or is corrupt.
    pub fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, BuildError> {
        read_blob(&self.layout, descriptor).map_err(BuildError::Blob)
    }
}

/// Seconds since 1970 as `2026-11-22T18:00:00Z` (RFC 3339; days to civil by H. Hinnant's algorithm).
fn rfc3339(seconds: u64) -> String {
    const DAY: u64 = 86_400;
    let (days, rest) = (seconds / DAY + 719_468, seconds % DAY);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests;
