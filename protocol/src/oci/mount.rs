//! Mount forms: an image as one read-only file system blob beside its layers, which a node mounts instead of unpacking
//! them. How they stand in an ImageSet's index, and what their manifest must be. Pure; nothing here knows how such a blob is
//! made or mounted.
//!
//! ```text
//! index entry (no platform; image's name, form, architecture, digest of the tar-form manifest as annotations)
//!   -> manifest (artifactType, empty config, ONE layer: the file system) -> blob
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{
    ANNOTATION_IMAGE_NAME, Descriptor, Index, MEDIA_EMPTY, MEDIA_MANIFEST, Manifest, OciError,
};
use crate::ids::{Digest, Name};

/// `artifactType` of a mount form's manifest.
pub const ARTIFACT_MOUNT: &str = "application/vnd.layercake.imageset.mount.v1+json";
/// Media type of an EROFS blob.
pub const MEDIA_MOUNT_EROFS: &str = "application/vnd.layercake.imageset.mount.erofs";
/// Media type of a squashfs blob.
pub const MEDIA_MOUNT_SQUASHFS: &str = "application/vnd.layercake.imageset.mount.squashfs";
/// Annotation of an index entry and its manifest: the file system, `erofs` or `squashfs`.
pub const ANNOTATION_MOUNT_FORM: &str = "org.layercake.mount.form";
/// Annotation of an index entry and its manifest: Go's name of the image's architecture.
pub const ANNOTATION_MOUNT_ARCHITECTURE: &str = "org.layercake.mount.architecture";
/// Annotation of an index entry and its manifest: the digest of the image manifest whose layers give the same files.
pub const ANNOTATION_MOUNT_OF: &str = "org.layercake.mount.of";

/// A file system that an image can be mounted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountForm {
    /// EROFS: reads fast, larger.
    Erofs,
    /// squashfs: small, reads slower.
    Squashfs,
}

impl MountForm {
    /// All there are, in the order in which a node that can mount them all prefers them: what costs the least to fetch
    /// comes first.
    pub const ALL: [Self; 2] = [Self::Squashfs, Self::Erofs];

    /// The file system's name, as the kernel has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Squashfs => "squashfs",
        }
    }

    /// Media type of the blob.
    #[must_use]
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Erofs => MEDIA_MOUNT_EROFS,
            Self::Squashfs => MEDIA_MOUNT_SQUASHFS,
        }
    }
}

impl fmt::Display for MountForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no mount form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a mount form; expected erofs or squashfs")]
pub struct InvalidMountForm {
    text: String,
}

impl FromStr for MountForm {
    type Err = InvalidMountForm;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|form| form.as_str() == text);
        found.ok_or_else(|| InvalidMountForm { text: text.to_owned() })
    }
}

/// A mount form of an image, as the index has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The image's name in the set.
    pub image: Name,
    /// Which file system.
    pub form: MountForm,
    /// Go's name of the architecture.
    pub architecture: String,
    /// The image manifest that it equals.
    pub of: Digest,
    /// The manifest of the mount form.
    pub manifest: Descriptor,
}

impl MountEntry {
    /// What an index entry says of a mount form. `None` for an entry that is none, or one of a later version's kind:
    /// there is always the tar form.
    #[must_use]
    pub fn of_entry(entry: &Descriptor) -> Option<Self> {
        let annotation = |key| entry.annotations.get(key);
        let form = annotation(ANNOTATION_MOUNT_FORM)?;
        if entry.platform.is_some() || entry.media_type != MEDIA_MANIFEST {
            return None;
        }
        Some(Self {
            image: annotation(ANNOTATION_IMAGE_NAME)?.parse().ok()?,
            form: form.parse().ok()?,
            architecture: annotation(ANNOTATION_MOUNT_ARCHITECTURE)?.clone(),
            of: annotation(ANNOTATION_MOUNT_OF)?.parse().ok()?,
            manifest: entry.clone(),
        })
    }

    /// The annotations that say this, for the index entry and the manifest.
    #[must_use]
    pub fn annotations(
        image: &Name,
        form: MountForm,
        architecture: &str,
        of: &Digest,
    ) -> BTreeMap<String, String> {
        let pair = |key: &str, value: String| (key.to_owned(), value);
        BTreeMap::from([
            pair(ANNOTATION_IMAGE_NAME, image.to_string()),
            pair(ANNOTATION_MOUNT_FORM, form.to_string()),
            pair(ANNOTATION_MOUNT_ARCHITECTURE, architecture.to_owned()),
            pair(ANNOTATION_MOUNT_OF, of.to_string()),
        ])
    }

    /// The manifest of a mount form whose blob is this.
    #[must_use]
    pub fn new_manifest(blob: Descriptor, annotations: BTreeMap<String, String>) -> Manifest {
        Manifest {
            schema_version: 2,
            media_type: Some(MEDIA_MANIFEST.to_owned()),
            artifact_type: Some(ARTIFACT_MOUNT.to_owned()),
            config: Descriptor::empty(),
            layers: vec![blob],
            annotations,
        }
    }

    /// The file system blob of this entry's manifest.
    ///
    /// # Errors
    /// If the manifest is not one of a mount form, is of another form or image than its entry says, or has not exactly one
    /// layer.
    pub fn blob<'a>(&self, manifest: &'a Manifest) -> Result<&'a Descriptor, OciError> {
        let wrong = |reason| OciError::Wrong { what: "mount form", reason };
        if manifest.artifact_type.as_deref() != Some(ARTIFACT_MOUNT)
            || manifest.config.media_type != MEDIA_EMPTY
        {
            return Err(wrong(format!("its artifactType is not {ARTIFACT_MOUNT}")));
        }
        let [blob] = manifest.layers.as_slice() else {
            return Err(wrong(format!("{} layers, expected one", manifest.layers.len())));
        };
        if blob.media_type != self.form.media_type() {
            let (found, expected) = (&blob.media_type, self.form.media_type());
            return Err(wrong(format!("its blob is `{found}`, expected `{expected}`")));
        }
        let said = Self::annotations(&self.image, self.form, &self.architecture, &self.of);
        if said.iter().any(|(key, value)| manifest.annotations.get(key) != Some(value)) {
            return Err(wrong("the manifest and its index entry say different things".to_owned()));
        }
        if blob.size == 0 {
            return Err(wrong("its blob is empty".to_owned()));
        }
        Ok(blob)
    }
}

/// The mount forms of an index for one architecture whose tar form is among `images`, by image and form.
///
/// # Errors
/// If an image has the same form twice.
pub(super) fn mounts(
    index: &Index,
    architecture: &str,
    images: &BTreeMap<Name, Descriptor>,
) -> Result<BTreeMap<Name, Vec<MountEntry>>, OciError> {
    let mut seen = BTreeSet::new();
    let mut mounts: BTreeMap<Name, Vec<MountEntry>> = BTreeMap::new();
    for entry in index.manifests.iter().skip(1).filter_map(MountEntry::of_entry) {
        let equals = images.get(&entry.image).is_some_and(|image| image.digest == entry.of);
        if entry.architecture != architecture || !equals {
            continue;
        }
        if !seen.insert((entry.image.clone(), entry.form)) {
            let reason = format!("image `{}` has two mount forms {}", entry.image, entry.form);
            return Err(OciError::Wrong { what: "ImageSet index", reason });
        }
        mounts.entry(entry.image.clone()).or_default().push(entry);
    }
    Ok(mounts)
}

/// Reads any bytes as an index with mount forms and as the manifest of one, for fuzzing.
pub fn fuzz_mount(bytes: &[u8]) {
    let manifest = super::parse_manifest(bytes);
    let Ok(index) = super::parse_index(bytes) else { return };
    let _ = super::resolve_set(&index, "amd64");
    for entry in index.manifests.iter().filter_map(MountEntry::of_entry) {
        if let Ok(manifest) = &manifest {
            let _ = entry.blob(manifest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{parse_index, parse_manifest, resolve_set};

    const INDEX: &str = include_str!("../../golden/v1/index.json");

    /// The golden index with a mount form of its image behind the others, and the form's manifest.
    fn with_mount(form: MountForm) -> (Index, Manifest) {
        let mut index = parse_index(INDEX.as_bytes()).expect("golden");
        let image = index.manifests.last().expect("image").clone();
        let name: Name = image.annotations[ANNOTATION_IMAGE_NAME].parse().expect("name");
        let annotations = MountEntry::annotations(&name, form, "amd64", &image.digest);
        let blob = Descriptor::of(form.media_type(), b"file system");
        let manifest = MountEntry::new_manifest(blob, annotations.clone());
        let bytes = serde_json::to_vec(&manifest).expect("json");
        let mut entry = Descriptor::of(MEDIA_MANIFEST, &bytes);
        entry.annotations = annotations;
        index.manifests.push(entry);
        (index, manifest)
    }

    #[test]
    fn a_mount_form_stands_beside_its_image_and_gives_its_blob() {
        for form in MountForm::ALL {
            let (index, manifest) = with_mount(form);
            let entries = resolve_set(&index, "amd64").expect("resolve");
            let name = entries.images.keys().next().expect("image");
            let [entry] = entries.mounts[name].as_slice() else { panic!("not one mount form") };
            assert_eq!((entry.form, entry.of), (form, entries.images[name].digest));
            let blob = entry.blob(&manifest).expect("blob");
            assert_eq!(blob.digest, Digest::of(b"file system"));
            assert!(resolve_set(&index, "arm64").expect("arm64").mounts.is_empty());
        }
    }

    #[track_caller]
    fn ignored(key: &str, value: &str) {
        let (mut index, _) = with_mount(MountForm::Erofs);
        let entry = index.manifests.last_mut().expect("entry");
        entry.annotations.insert(key.to_owned(), value.to_owned());
        let entries = resolve_set(&index, "amd64").expect("the tar form is there");
        assert!(entries.mounts.is_empty() && entries.images.len() == 1, "{key}={value}");
    }

    #[test]
    fn an_entry_that_does_not_fit_is_passed_over_for_the_tar_form() {
        ignored(ANNOTATION_MOUNT_FORM, "ext9");
        ignored(ANNOTATION_MOUNT_OF, &Digest::of(b"another manifest").to_string());
        ignored(ANNOTATION_MOUNT_OF, "sha256:short");
        ignored(ANNOTATION_MOUNT_ARCHITECTURE, "arm64");
        ignored(ANNOTATION_IMAGE_NAME, "other");
        ignored(ANNOTATION_IMAGE_NAME, "../x");
    }

    #[test]
    fn a_form_that_stands_twice_is_refused() {
        let (mut index, _) = with_mount(MountForm::Erofs);
        index.manifests.push(index.manifests.last().expect("entry").clone());
        let error = resolve_set(&index, "amd64").expect_err("twice").to_string();
        assert!(error.contains("two mount forms erofs"), "{error}");
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Manifest), expected: &str) {
        let (index, mut manifest) = with_mount(MountForm::Squashfs);
        let entry = MountEntry::of_entry(index.manifests.last().expect("entry")).expect("form");
        change(&mut manifest);
        let error = entry.blob(&manifest).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn a_manifest_that_is_not_its_entry_s_is_refused() {
        refused(|it| it.artifact_type = None, "artifactType");
        refused(|it| it.config.media_type = "x/y".to_owned(), "artifactType");
        refused(|it| it.layers.clear(), "0 layers");
        refused(|it| it.layers.push(Descriptor::empty()), "2 layers");
        refused(|it| it.layers[0].media_type = MEDIA_MOUNT_EROFS.to_owned(), "erofs`, expected");
        refused(|it| it.layers[0].size = 0, "empty");
        refused(|it| it.annotations.clear(), "different things");
        let other = Digest::of(b"other").to_string();
        refused(
            |it| drop(it.annotations.insert(ANNOTATION_MOUNT_OF.to_owned(), other)),
            "different things",
        );
    }

    #[test]
    fn forms_are_read_by_name() {
        assert_eq!("erofs".parse(), Ok(MountForm::Erofs));
        let error = "ext4".parse::<MountForm>().expect_err("ext4").to_string();
        assert!(error.contains("`ext4`") && error.contains("squashfs"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn damaged_mount_entries_never_panic(at: proptest::sample::Index, byte: u8) {
            let (index, manifest) = with_mount(MountForm::Erofs);
            let mut bytes = serde_json::to_vec(&index).expect("json");
            let place = at.index(bytes.len());
            bytes[place] = byte;
            fuzz_mount(&bytes);
            if let Ok(index) = parse_index(&bytes)
                && let Ok(entries) = resolve_set(&index, "amd64")
            {
                for entry in entries.mounts.values().flatten() {
                    assert_eq!(entries.images[&entry.image].digest, entry.of);
                    let _ = entry.blob(&manifest);
                }
            }
            let mut bytes = serde_json::to_vec(&manifest).expect("json");
            let place = at.index(bytes.len());
            bytes[place] = byte;
            let entry = MountEntry::of_entry(index.manifests.last().expect("entry")).expect("form");
            if let Ok(manifest) = parse_manifest(&bytes)
                && let Ok(blob) = entry.blob(&manifest)
            {
                assert_eq!(&blob.media_type, entry.form.media_type());
            }
        }
    }
}
