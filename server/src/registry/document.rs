//! What a manifest or index says that the registry must know: its type, what it needs, its subject. Pure.

use std::collections::BTreeMap;

use protocol::ids::Digest;
use protocol::oci::{
    self, Descriptor, MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST, MEDIA_INDEX, MEDIA_MANIFEST,
};
use serde::Deserialize;

use super::answer::{Code, Refusal};

/// Layers of these types lie elsewhere, under a URL that the manifest names.
const FOREIGN: [&str; 2] = [
    "application/vnd.oci.image.layer.nondistributable.",
    "application/vnd.docker.image.rootfs.foreign.",
];

/// What a manifest needs to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    Blob(Digest),
    Manifest(Digest),
}

/// A manifest, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Document {
    pub(super) media_type: String,
    pub(super) needs: Vec<Needs>,
    /// The manifest that this one is about.
    pub(super) subject: Option<Digest>,
    /// How a list of referrers describes this one.
    pub(super) descriptor: Descriptor,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<Typed>,
    subject: Option<Subject>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Typed {
    media_type: String,
}

#[derive(Deserialize)]
struct Subject {
    digest: Digest,
}

/// Reads a manifest. The Content-Type counts, without its parameters; the document's own `mediaType` must agree.
pub(super) fn read(bytes: &[u8], content_type: Option<&str>) -> Result<Document, Refusal> {
    let invalid = |reason: String| Refusal::new(Code::ManifestInvalid, reason);
    let outline: Outline = serde_json::from_slice(bytes)
        .map_err(|error| invalid(format!("the manifest is malformed: {error}")))?;
    let content_type = content_type.map(|text| text.split(';').next().unwrap_or("").trim());
    let own = outline.media_type.as_deref();
    let media_type =
        content_type.or(own).ok_or_else(|| invalid("the manifest has no media type".to_owned()))?;
    if own.is_some_and(|own| own != media_type) {
        return Err(invalid(format!("Content-Type {media_type} is not the manifest's mediaType")));
    }
    let (needs, config_type) = match media_type {
        MEDIA_INDEX | MEDIA_DOCKER_LIST => {
            let index = oci::parse_index(bytes).map_err(|error| invalid(full(&error)))?;
            let needs = index.manifests.iter().map(|entry| Needs::Manifest(entry.digest));
            (needs.collect(), None)
        }
        MEDIA_MANIFEST | MEDIA_DOCKER_MANIFEST => {
            let manifest = oci::parse_manifest(bytes).map_err(|error| invalid(full(&error)))?;
            let here = |layer: &&Descriptor| {
                !FOREIGN.iter().any(|prefix| layer.media_type.starts_with(prefix))
            };
            let blobs =
                std::iter::once(&manifest.config).chain(manifest.layers.iter().filter(here));
            let needs = blobs.map(|blob| Needs::Blob(blob.digest)).collect();
            (needs, outline.config.map(|config| config.media_type))
        }
        other => return Err(invalid(format!("media type `{other}` is not a manifest's"))),
    };
    let artifact_type = outline.artifact_type.filter(|text| !text.is_empty()).or(config_type);
    let annotations = outline.annotations.unwrap_or_default();
    let descriptor = Descriptor { artifact_type, annotations, ..Descriptor::of(media_type, bytes) };
    let subject = outline.subject.map(|subject| subject.digest);
    Ok(Document { media_type: media_type.to_owned(), needs, subject, descriptor })
}

fn full(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// Reads any bytes as every kind of manifest, for fuzzing.
pub fn fuzz_manifest(bytes: &[u8]) {
    for media_type in [None, Some(MEDIA_MANIFEST), Some(MEDIA_INDEX), Some("text/plain")] {
        let _ = read(bytes, media_type);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(more: &str) -> String {
        let digest = Digest::of(b"{}");
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/x-config","digest":"{digest}","size":2}},"layers":[]{more}}}"#
        )
    }

    #[test]
    fn the_artifact_type_is_the_manifests_own_or_its_configs() {
        for (more, expected) in [
            ("", "application/x-config"),
            (r#","artifactType":"""#, "application/x-config"),
            (r#","artifactType":"application/x-own""#, "application/x-own"),
        ] {
            let read = read(manifest(more).as_bytes(), Some(MEDIA_MANIFEST)).expect(more);
            assert_eq!(read.descriptor.artifact_type.as_deref(), Some(expected));
        }
        let index = r#"{"schemaVersion":2,"manifests":[]}"#;
        let read = read(index.as_bytes(), Some(MEDIA_INDEX)).expect("index");
        assert_eq!(read.descriptor.artifact_type, None);
    }

    #[test]
    fn foreign_layers_are_not_needed() {
        let layer = |kind: &str, text: &str| {
            let digest = Digest::of(text.as_bytes());
            format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":1}}"#)
        };
        let layers = [
            layer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "a"),
            layer("application/vnd.oci.image.layer.nondistributable.v1.tar", "b"),
            layer(oci::MEDIA_LAYER_GZIP, "c"),
        ];
        let text =
            manifest("").replace("\"layers\":[]", &format!("\"layers\":[{}]", layers.join(",")));
        let read = read(text.as_bytes(), Some(MEDIA_MANIFEST)).expect("manifest");
        let expected = [b"{}".as_slice(), b"c"].map(|bytes| Needs::Blob(Digest::of(bytes)));
        assert_eq!(read.needs, expected);
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let nested = manifest(&format!(r#","x":{deep}"#));
        let subject = manifest(r#","subject":{"digest":"sha256:zz","size":1,"mediaType":"x"}"#);
        let other = manifest(&format!(r#","mediaType":"{MEDIA_INDEX}""#));
        for text in ["", "{", "[]", "null", "{}", &deep, &subject, &other] {
            let shown: String = text.chars().take(60).collect();
            let refusal = read(text.as_bytes(), Some(MEDIA_MANIFEST)).expect_err(&shown);
            assert_eq!(refusal.code, Code::ManifestInvalid, "{shown}");
        }
        // What is not looked at is passed over without recursion, however deep it is.
        assert!(read(nested.as_bytes(), Some(MEDIA_MANIFEST)).is_ok());
        assert!(read(manifest("").as_bytes(), None).is_err(), "no type at all");
        let parameters = format!("{MEDIA_MANIFEST}; charset=utf-8");
        assert!(read(manifest("").as_bytes(), Some(&parameters)).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>, cut in 0_usize..400, byte: u8) {
            fuzz_manifest(&bytes);
            let mut near = manifest(r#","subject":{"digest":"sha256:00","size":1}"#).into_bytes();
            let at = cut.min(near.len() - 1);
            near[at] = byte;
            fuzz_manifest(&near);
        }
    }
}
