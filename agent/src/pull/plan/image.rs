//! What one image outside of any ImageSet needs: what a reference stands for is an image's manifest, or an index with one for
//! this machine. Pure but for the `load` it is given, as the plan of a set.

use std::collections::{BTreeMap, BTreeSet};

use protocol::ids::{Digest, Name};
use protocol::oci::{self, ARTIFACT_IMAGESET, Descriptor, Index, MEDIA_MANIFEST, OciError};

use super::{DocumentKind, Load, Plan, Root, add_jobs, architecture};
use crate::pull::PullError;

/// The name of the only image in the set that is made of it.
pub(in crate::pull) const NAME: &str = "image";

/// Reads all documents of an image and checks that they fit together. The plan's set is one of this image alone.
pub(in crate::pull) fn plan(digest: &Digest, load: &mut Load<'_>) -> Result<Plan, PullError> {
    let wrong = |reason: String| PullError::Set { digest: *digest, reason };
    let document = |digest: Digest| move |source: OciError| PullError::Document { digest, source };
    let mut closure = BTreeSet::from([*digest]);
    let first = load(digest, None, DocumentKind::Manifest)?;
    let (entry, bytes) = match oci::parse_index(&first) {
        Ok(index) => {
            let entry = of_this_machine(&index).map_err(wrong)?;
            closure.insert(entry.digest);
            let bytes = load(&entry.digest, Some(entry.size), DocumentKind::Manifest)?;
            (entry, bytes)
        }
        Err(_) => (Descriptor::of(MEDIA_MANIFEST, &first), first),
    };
    let manifest = oci::parse_manifest(&bytes).map_err(document(entry.digest))?;
    let config = &manifest.config;
    closure.insert(config.digest);
    let bytes = load(&config.digest, Some(config.size), DocumentKind::Blob)?;
    let config = oci::parse_image_config(&bytes).map_err(document(config.digest))?;
    if config.architecture != architecture() || config.os != "linux" {
        let found = format!("{}/{}", config.os, config.architecture);
        return Err(wrong(format!("the image is for {found}, not for linux/{}", architecture())));
    }
    let mut layers = BTreeMap::new();
    let digests = add_jobs(&entry, &manifest, &config, &mut layers)?;
    closure.extend(layers.keys());
    let text = format!(r#"{{"name":"{NAME}","version":"1","image":[{{"name":"{NAME}"}}]}}"#);
    // Neither can fail: both are our own text.
    let set = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let name: Name = NAME.parse().map_err(|error| wrong(format!("{error}")))?;
    let images = BTreeMap::from([(name, (config.config, Root::Layers(digests)))]);
    Ok(Plan { set, digest: *digest, images, layers, closure })
}

fn of_this_machine(index: &Index) -> Result<Descriptor, String> {
    if index.artifact_type.as_deref() == Some(ARTIFACT_IMAGESET) {
        return Err(
            "it is an ImageSet: name one image of it by the tag VERSION-IMAGENAME".to_owned()
        );
    }
    let fits = |entry: &&Descriptor| {
        entry.platform.as_ref().is_some_and(|platform| {
            platform.os == "linux" && platform.architecture == architecture()
        })
    };
    let entry = index.manifests.iter().find(fits);
    entry.cloned().ok_or_else(|| format!("it has no linux/{} manifest", architecture()))
}
