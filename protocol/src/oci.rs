//! OCI words: descriptors, manifests, indexes and image configs (OCI image spec 1.1), and how an ImageSet is read out
//! of its index.
//!
//! Only what Layercake uses is typed; fields of others are ignored when read, and nothing that was read is ever
//! re-serialised to be verified.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{Digest, Name};

pub mod mount;
pub mod unpacked;

use mount::MountEntry;

/// Media type of an OCI image index.
pub const MEDIA_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI image manifest.
pub const MEDIA_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image config.
pub const MEDIA_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of an uncompressed layer.
pub const MEDIA_LAYER_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// Media type of a gzip layer.
pub const MEDIA_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Media type of a zstd layer.
pub const MEDIA_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Media type of the empty JSON object, `{}`.
pub const MEDIA_EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// Docker's manifest list, read as an index.
pub const MEDIA_DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker's image manifest, schema 2, read as a manifest.
pub const MEDIA_DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's gzip layer.
pub const MEDIA_DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// `artifactType` of an ImageSet's index and of the manifest that its entry 0 points to.
pub const ARTIFACT_IMAGESET: &str = "application/vnd.layercake.imageset.v1+json";
/// Media type of the ImageSet description, the config blob of entry 0.
pub const MEDIA_IMAGESET_CONFIG: &str = "application/vnd.layercake.imageset.config.v1+json";
/// Annotation of an index entry: the image's name in the set.
pub const ANNOTATION_IMAGE_NAME: &str = "org.layercake.image.name";
/// Largest manifest, index or config that is read, in bytes.
pub const MAX_MANIFEST_BYTES: usize = 4 << 20;
/// Most layers of one image (overlayfs takes 500 lower directories; Docker makes at most 127).
pub const MAX_LAYERS: usize = 256;

/// Platform of an index entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Go's name of the architecture, `amd64`.
    pub architecture: String,
    /// Go's name of the operating system, `linux`.
    pub os: String,
    /// `v8` of arm64, where given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// A pointer to content: type, digest and exact size (descriptor.md).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the content is.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// `artifactType` of the manifest it points to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Platform, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// A descriptor of these bytes.
    #[must_use]
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            artifact_type: None,
            platform: None,
            annotations: BTreeMap::new(),
        }
    }

    /// The descriptor of `{}`, the empty layer of artifacts (manifest.md, "Guidance for an empty descriptor").
    #[must_use]
    pub fn empty() -> Self {
        Self::of(MEDIA_EMPTY, b"{}")
    }
}

/// An image manifest (manifest.md).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// [`MEDIA_MANIFEST`]; absent in some old images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Type of an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The config blob.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// An image index (image-index.md).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// [`MEDIA_INDEX`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// [`ARTIFACT_IMAGESET`] for an ImageSet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The entries, in order.
    pub manifests: Vec<Descriptor>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// The part of an image config that says how the image is run (config.md, `config`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    /// `USER[:GROUP]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// `KEY=VALUE` each.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Program and first arguments.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Further arguments.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Stop signal by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Labels.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub labels: BTreeMap<String, String>,
}

/// Docker writes `null` where OCI says "absent".
fn null_as_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// The layers of an image as uncompressed content (config.md, `rootfs`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Digest of each layer's uncompressed tar, lowest first.
    pub diff_ids: Vec<Digest>,
}

/// An image config (config.md).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Go's name of the architecture.
    pub architecture: String,
    /// Go's name of the operating system.
    pub os: String,
    /// When it was made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// How it is run.
    #[serde(default)]
    pub config: RunConfig,
    /// Its layers.
    pub rootfs: RootFs,
}

/// Why bytes are not the document they should be.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The document is larger than [`MAX_MANIFEST_BYTES`].
    #[error("{what} is {size} bytes, more than the {MAX_MANIFEST_BYTES} that are read")]
    TooLarge {
        /// Which document.
        what: &'static str,
        /// Its size in bytes.
        size: usize,
    },
    /// The document is not the JSON it should be.
    #[error("{what} is malformed")]
    Malformed {
        /// Which document.
        what: &'static str,
        /// The parser's words.
        #[source]
        source: serde_json::Error,
    },
    /// The document is well-formed but not what it should be.
    #[error("{what}: {reason}")]
    Wrong {
        /// Which document.
        what: &'static str,
        /// What is wrong, with names and digests.
        reason: String,
    },
}

fn parse<T: serde::de::DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, OciError> {
    if bytes.len() > MAX_MANIFEST_BYTES {
        return Err(OciError::TooLarge { what, size: bytes.len() });
    }
    serde_json::from_slice(bytes).map_err(|source| OciError::Malformed { what, source })
}

/// Reads an image index.
///
/// # Errors
/// If the bytes are too large, malformed, or `schemaVersion` is not 2.
pub fn parse_index(bytes: &[u8]) -> Result<Index, OciError> {
    let index: Index = parse("image index", bytes)?;
    if index.schema_version != 2 {
        let reason = format!("schemaVersion is {}, expected 2", index.schema_version);
        return Err(OciError::Wrong { what: "image index", reason });
    }
    Ok(index)
}

/// Reads an image manifest.
///
/// # Errors
/// If the bytes are too large, malformed, `schemaVersion` is not 2, or there are more than [`MAX_LAYERS`] layers.
pub fn parse_manifest(bytes: &[u8]) -> Result<Manifest, OciError> {
    let manifest: Manifest = parse("image manifest", bytes)?;
    let wrong = |reason| OciError::Wrong { what: "image manifest", reason };
    if manifest.schema_version != 2 {
        return Err(wrong(format!("schemaVersion is {}, expected 2", manifest.schema_version)));
    }
    if manifest.layers.len() > MAX_LAYERS {
        return Err(wrong(format!("{} layers, at most {MAX_LAYERS}", manifest.layers.len())));
    }
    Ok(manifest)
}

/// Reads an image config.
///
/// # Errors
/// If the bytes are too large or malformed.
pub fn parse_image_config(bytes: &[u8]) -> Result<ImageConfig, OciError> {
    parse("image config", bytes)
}

/// Reads an ImageSet description.
///
/// # Errors
/// If the bytes are too large or malformed, or the set has problems; all of them are named.
pub fn parse_imageset(bytes: &[u8]) -> Result<crate::imageset::ImageSet, OciError> {
    let set: crate::imageset::ImageSet = parse("ImageSet description", bytes)?;
    let problems = set.problems();
    if problems.is_empty() {
        return Ok(set);
    }
    Err(OciError::Wrong { what: "ImageSet description", reason: problems.join("; ") })
}

/// The entries of an ImageSet's index, sorted out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetEntries {
    /// Entry 0: the artifact manifest whose config is the description.
    pub description: Descriptor,
    /// The image manifests of one platform, by name.
    pub images: BTreeMap<Name, Descriptor>,
    /// What can be mounted in the place of these, by name; none of an image that has none.
    pub mounts: BTreeMap<Name, Vec<MountEntry>>,
}

/// Sorts out an ImageSet's index for one platform (`linux` and this architecture).
///
/// # Errors
/// If the index is not an ImageSet's, entry 0 is not the description, an entry is a nested index, or an image of this
/// platform, or a mount form of one, appears twice.
pub fn resolve_set(index: &Index, architecture: &str) -> Result<SetEntries, OciError> {
    let wrong = |reason: String| OciError::Wrong { what: "ImageSet index", reason };
    if index.artifact_type.as_deref() != Some(ARTIFACT_IMAGESET) {
        let found = index.artifact_type.as_deref().unwrap_or("none");
        return Err(wrong(format!("artifactType is {found}, expected {ARTIFACT_IMAGESET}")));
    }
    let description =
        index.manifests.first().ok_or_else(|| wrong("it has no entries".to_owned()))?;
    // We write no artifactType into entry 0: skopeo 1.9 drops the key from entries, writes the index anew, and with it
    // loses the index's own artifactType and digest.
    let other = description.artifact_type.as_deref().is_some_and(|kind| kind != ARTIFACT_IMAGESET);
    if other || description.platform.is_some() || description.media_type != MEDIA_MANIFEST {
        return Err(wrong("entry 0 is not the ImageSet description".to_owned()));
    }
    let mut images = BTreeMap::new();
    for entry in index.manifests.iter().skip(1) {
        if entry.media_type == MEDIA_INDEX || entry.media_type == MEDIA_DOCKER_LIST {
            return Err(wrong(format!(
                "entry {} is a nested index; an ImageSet is flat",
                entry.digest
            )));
        }
        let Some(platform) = &entry.platform else { continue };
        if platform.os != "linux" || platform.architecture != architecture {
            continue;
        }
        let name = entry.annotations.get(ANNOTATION_IMAGE_NAME).ok_or_else(|| {
            wrong(format!("entry {} has no annotation {ANNOTATION_IMAGE_NAME}", entry.digest))
        })?;
        let name: Name = name.parse().map_err(|error| wrong(format!("{error}")))?;
        if images.insert(name.clone(), entry.clone()).is_some() {
            return Err(wrong(format!("image `{name}` appears twice for linux/{architecture}")));
        }
    }
    let mounts = mount::mounts(index, architecture, &images)?;
    Ok(SetEntries { description: description.clone(), images, mounts })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = include_str!("../golden/v1/index.json");

    #[test]
    fn the_golden_index_resolves_for_its_platform() {
        let index = parse_index(INDEX.as_bytes()).expect("golden");
        assert_eq!(serde_json::to_string_pretty(&index).expect("render") + "\n", INDEX);
        let entries = resolve_set(&index, "amd64").expect("resolve");
        assert_eq!(entries.images.keys().map(Name::as_str).collect::<Vec<_>>(), ["hello"]);
        assert!(resolve_set(&index, "arm64").expect("resolve").images.is_empty());
    }

    #[track_caller]
    fn wrong(change: impl FnOnce(&mut Index), expected: &str) {
        let mut index = parse_index(INDEX.as_bytes()).expect("golden");
        change(&mut index);
        let error = resolve_set(&index, "amd64").expect_err("wrong").to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn what_is_not_an_imageset_is_refused_by_name() {
        wrong(|index| index.artifact_type = None, "artifactType is none");
        wrong(|index| index.manifests.clear(), "no entries");
        wrong(|index| index.manifests.swap(0, 1), "entry 0 is not");
        wrong(|index| index.manifests[0].media_type = MEDIA_INDEX.to_owned(), "entry 0 is not");
        wrong(|index| index.manifests[0].artifact_type = Some("x/y".to_owned()), "entry 0 is not");
        wrong(|index| index.manifests[1].media_type = MEDIA_INDEX.to_owned(), "nested index");
        wrong(|index| index.manifests[1].annotations.clear(), "no annotation");
        wrong(|index| index.manifests.push(index.manifests[1].clone()), "appears twice");
    }

    #[test]
    fn docker_nulls_count_as_absent() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Entrypoint":null,"Cmd":["/x"],"Labels":null},
            "rootfs":{"type":"layers","diff_ids":[]}}"#;
        let config = parse_image_config(text.as_bytes()).expect("config");
        assert_eq!((config.config.entrypoint.len(), config.config.cmd.len()), (0, 1));
    }

    #[test]
    fn the_empty_descriptor_is_the_specs() {
        assert_eq!(
            Descriptor::empty().digest.to_string(),
            "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        );
    }

    #[test]
    fn too_large_a_manifest_is_refused_before_it_is_parsed() {
        let error = parse_manifest(&vec![b' '; MAX_MANIFEST_BYTES + 1]).expect_err("large");
        assert!(matches!(error, OciError::TooLarge { .. }));
    }

    proptest::proptest! {
        #[test]
        fn damaged_documents_never_panic(at in 0..INDEX.len(), byte: u8) {
            let mut bytes = INDEX.as_bytes().to_vec();
            bytes[at] = byte;
            if let Ok(index) = parse_index(&bytes) {
                let _ = resolve_set(&index, "amd64");
            }
            let _ = parse_manifest(&bytes);
            let _ = parse_image_config(&bytes);
            let _ = parse_imageset(&bytes);
        }
    }
}
