//! What an ImageSet consists of, read without its layers.

use protocol::ids::{Digest, Name};
use protocol::imageset::ImageSet;
use protocol::oci::mount::MountForm;
use protocol::oci::{self, Descriptor, OciError, Platform, RunConfig};
use serde::Serialize;

use crate::client::Options;
use crate::place::{Found, Origin, Place, PlaceError, find_in, signatures};

/// An ImageSet, as far as it can be seen without fetching a layer.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// Where it was read.
    pub place: String,
    /// Digest of the index, which is the set's.
    pub digest: Digest,
    /// Bytes of all its blobs, each counted once.
    pub bytes: u64,
    /// Tags of the signature objects of its index and manifests.
    pub signatures: Vec<String>,
    /// Whether one of these is the index's, which is the one that nodes ask for.
    pub signed: bool,
    /// The description that nodes read.
    pub set: ImageSet,
    /// Its images, one entry for each platform.
    pub images: Vec<InspectedImage>,
}

/// One image for one platform.
#[derive(Debug, Clone, Serialize)]
pub struct InspectedImage {
    /// Its name in the set.
    pub name: Name,
    /// `linux/amd64`.
    pub platform: String,
    /// Digest of its manifest.
    pub digest: Digest,
    /// What it was made from, for an image out of a registry: reference and digest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Bytes of its layers as they are stored.
    pub bytes: u64,
    /// Its layers, lowest first.
    pub layers: Vec<InspectedLayer>,
    /// The file systems that a node may mount in the place of the layers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<InspectedMount>,
    /// How it is run.
    pub config: RunConfig,
}

/// One mount form.
#[derive(Debug, Clone, Serialize)]
pub struct InspectedMount {
    /// Which file system.
    pub form: MountForm,
    /// Digest of the blob.
    pub digest: Digest,
    /// Its size in bytes.
    pub bytes: u64,
}

/// One layer.
#[derive(Debug, Clone, Serialize)]
pub struct InspectedLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// What it is.
    pub media_type: String,
    /// Its size in bytes, as it is stored.
    pub bytes: u64,
}

/// Reads the set at `place`.
///
/// # Errors
/// If it cannot be read, or is no ImageSet.
pub async fn inspect(place: &Place, options: &Options) -> Result<Inspection, PlaceError> {
    let origin = Origin::open(place, options)?;
    let found = find_in(&origin, place).await?;
    let signatures = signatures(&origin, &found).await?;
    let mut images = Vec::new();
    for (name, entry) in found.images() {
        images.push(image(&origin, &found, name, entry).await?);
    }
    let signatures: Vec<String> = signatures.into_iter().map(|(tag, ..)| tag).collect();
    Ok(Inspection {
        place: place.to_string(),
        digest: found.index.digest,
        bytes: found.blobs().iter().map(|blob| blob.size).sum(),
        signed: signatures.contains(&crate::place::signature_tag(&found.index.digest)),
        signatures,
        set: found.set,
        images,
    })
}

async fn image(
    origin: &Origin,
    found: &Found,
    name: Name,
    entry: &Descriptor,
) -> Result<InspectedImage, PlaceError> {
    let wrong = |source: OciError| PlaceError::NotASet { place: found.place.to_string(), source };
    let manifest = found.manifests.get(&entry.digest).ok_or_else(|| {
        let reason = format!("entry {} has no manifest", entry.digest);
        wrong(OciError::Wrong { what: "ImageSet index", reason })
    })?;
    let config = origin.config(&manifest.config).await?;
    let config = oci::parse_image_config(&config).map_err(wrong)?;
    let layers: Vec<InspectedLayer> = manifest
        .layers
        .iter()
        .map(|layer| InspectedLayer {
            digest: layer.digest,
            media_type: layer.media_type.clone(),
            bytes: layer.size,
        })
        .collect();
    let mounts = found.mounts(entry).map(|(mount, blob)| InspectedMount {
        form: mount.form,
        digest: blob.digest,
        bytes: blob.size,
    });
    let annotation = |key: &str| entry.annotations.get(key);
    let base = annotation(crate::build::ANNOTATION_BASE_NAME)
        .zip(annotation(crate::build::ANNOTATION_BASE_DIGEST))
        .map(|(name, digest)| format!("{name}@{digest}"));
    Ok(InspectedImage {
        name,
        platform: platform(entry.platform.as_ref()),
        digest: entry.digest,
        base,
        bytes: layers.iter().map(|layer| layer.bytes).sum(),
        layers,
        mounts: mounts.collect(),
        config: config.config,
    })
}

/// `linux/arm64/v8`; `any` where there is none.
pub(crate) fn platform(platform: Option<&Platform>) -> String {
    let Some(platform) = platform else { return "any".to_owned() };
    let variant = platform.variant.as_ref().map(|variant| format!("/{variant}"));
    format!("{}/{}{}", platform.os, platform.architecture, variant.unwrap_or_default())
}
