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

#[cfg(test)]
mod tests {
    use protocol::oci::{MEDIA_CONFIG, MEDIA_LAYER_GZIP};
    use serde_json::{Value, json};

    use super::*;

    #[derive(Default)]
    struct Documents(BTreeMap<Digest, Vec<u8>>);

    impl Documents {
        /// Keeps a document and describes it.
        fn add(&mut self, media_type: &str, document: &Value) -> Value {
            let bytes = document.to_string().into_bytes();
            let digest = Digest::of(&bytes);
            let size = bytes.len();
            self.0.insert(digest, bytes);
            json!({"mediaType": media_type, "digest": digest.to_string(), "size": size})
        }

        fn image(&mut self, architecture: &str) -> Value {
            let diff_id = Digest::of(architecture.as_bytes()).to_string();
            let config = json!({"architecture": architecture, "os": "linux",
                "config": {"Cmd": ["sh"]}, "rootfs": {"type": "layers", "diff_ids": [diff_id]}});
            let config = self.add(MEDIA_CONFIG, &config);
            let layer = Digest::of(b"layer").to_string();
            let layer = json!({"mediaType": MEDIA_LAYER_GZIP, "digest": layer, "size": 7});
            let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
            let mut entry = self.add(MEDIA_MANIFEST, &manifest);
            entry["platform"] = json!({"os": "linux", "architecture": architecture});
            entry
        }

        fn plan(&self, descriptor: &Value) -> Result<Plan, String> {
            let digest = descriptor["digest"].as_str().expect("digest").parse().expect("digest");
            plan(&digest, &mut |digest, _, _| Ok(self.0.get(digest).cloned().unwrap_or_default()))
                .map_err(|error| crate::agent::chain(&error))
        }
    }

    #[test]
    fn a_manifest_and_an_index_stand_for_the_image_of_this_machine() {
        let mut documents = Documents::default();
        let (ours, other) = (documents.image(architecture()), documents.image("pdp11"));
        let index = json!({"schemaVersion": 2, "manifests": [other, ours]});
        let index = documents.add("index", &index);
        for descriptor in [&ours, &index] {
            let plan = documents.plan(descriptor).expect("plan");
            assert_eq!((plan.images.len(), plan.layers.len()), (1, 1));
            assert!(plan.closure.contains(&Digest::of(b"layer")));
        }
        let error = documents.plan(&other).expect_err("another machine's");
        assert!(error.contains("linux/pdp11"), "{error}");
    }

    #[test]
    fn what_is_no_image_of_this_machine_is_refused() {
        let mut documents = Documents::default();
        let other = documents.image("pdp11");
        let index = json!({"schemaVersion": 2, "manifests": [other]});
        let set = json!({"schemaVersion": 2, "artifactType": ARTIFACT_IMAGESET, "manifests": []});
        for (document, expected) in [
            (index, "it has no linux/"),
            (set, "it is an ImageSet: name one image"),
            (json!({"schemaVersion": 1}), "image manifest"),
        ] {
            let descriptor = documents.add("x", &document);
            let error = documents.plan(&descriptor).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }
}
