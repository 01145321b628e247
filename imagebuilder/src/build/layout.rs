//! Writing an OCI layout (image-layout.md): everything is made in a directory beside it, and moved in at the end,
//! `index.json` last. It knows nothing of sets.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use protocol::oci::{self, Descriptor, Index, MEDIA_INDEX};

use super::{BuildError, io_error};
use crate::blob::{BlobDir, hash};
use crate::source::{ANNOTATION_REF_NAME, wrong};

/// Content of the file `oci-layout`.
const OCI_LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// A layout in the making.
pub(crate) struct Staged {
    staging: tempfile::TempDir,
    out: PathBuf,
    /// Its blobs so far.
    pub(crate) blobs: BlobDir,
}

impl Staged {
    /// Begins a layout, or an addition to one.
    pub(crate) fn new(out: &Path) -> Result<Self, BuildError> {
        if !may_become_layout(out)? {
            return Err(BuildError::NotALayout { path: out.to_owned() });
        }
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(io_error("cannot make", parent))?;
        let staging = tempfile::Builder::new()
            .prefix(".imageset.partial-")
            .tempdir_in(parent)
            .map_err(io_error("cannot make a directory in", parent))?;
        let blob_dir = staging.path().join("blobs/sha256");
        fs::create_dir_all(&blob_dir).map_err(io_error("cannot make", &blob_dir))?;
        Ok(Self { staging, out: out.to_owned(), blobs: BlobDir::new(&blob_dir) })
    }

    /// Whether the layout has the blob already, whole: it is hashed.
    pub(crate) fn has(&self, blob: &Descriptor) -> Result<bool, BuildError> {
        let path = BlobDir::new(&self.out.join("blobs/sha256")).path(&blob.digest);
        let Ok(mut file) = File::open(&path) else { return Ok(false) };
        let (_, found) = hash(&mut file).map_err(io_error("cannot read", &path))?;
        Ok(found == blob.digest)
    }

    /// Takes in a blob that stands in a file of another layout.
    pub(crate) fn take(&self, blob: &Descriptor, from: &Path) -> Result<(), BuildError> {
        let mut file = File::open(from).map_err(io_error("cannot read", from))?;
        let mut writer = self.blobs.writer().map_err(io_error("cannot copy", from))?;
        io::copy(&mut file, &mut writer).map_err(io_error("cannot copy", from))?;
        let (found, _) = writer.finish().map_err(io_error("cannot copy", from))?;
        let corrupt = || wrong(from, format!("corrupt: its digest is {found}"));
        if found == blob.digest { Ok(()) } else { Err(BuildError::Blob(corrupt())) }
    }

    /// Adds a document.
    pub(crate) fn put(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor, BuildError> {
        let failed = io_error("cannot write a blob of", &self.out);
        self.blobs.put(media_type, bytes).map_err(failed)
    }

    /// Moves everything to its place. The entries come under their tags before those that were there; an older entry
    /// of the same tag goes.
    pub(crate) fn install(self, entries: Vec<(String, Descriptor)>) -> Result<(), BuildError> {
        let entries = entries.into_iter().map(|(tag, mut entry)| {
            entry.annotations.insert(ANNOTATION_REF_NAME.to_owned(), tag);
            entry
        });
        write_layout_files(self.staging.path(), &self.out, entries.collect())?;
        install(self.staging, &self.out)
    }
}

/// The entry of a layout under a tag.
pub(crate) fn layout_tag(layout: &Path, tag: &str) -> Result<Option<Descriptor>, BuildError> {
    let mut entries = read_layout_index(layout)?.manifests.into_iter();
    Ok(entries
        .find(|entry| entry.annotations.get(ANNOTATION_REF_NAME).map(String::as_str) == Some(tag)))
}

fn may_become_layout(out: &Path) -> Result<bool, BuildError> {
    match fs::read_dir(out) {
        Ok(mut entries) => Ok(entries.next().is_none() || out.join("oci-layout").is_file()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(io_error("cannot read", out)(error)),
    }
}

fn write_layout_files(
    staging: &Path,
    out: &Path,
    mut entries: Vec<Descriptor>,
) -> Result<(), BuildError> {
    let tag = |entry: &Descriptor| entry.annotations.get(ANNOTATION_REF_NAME).cloned();
    let ours: Vec<Option<String>> = entries.iter().map(tag).collect();
    if out.join("index.json").is_file() {
        let others = read_layout_index(out)?.manifests.into_iter();
        entries.extend(others.filter(|entry| !ours.contains(&tag(entry))));
    }
    let index = Index {
        schema_version: 2,
        media_type: Some(MEDIA_INDEX.to_owned()),
        artifact_type: None,
        manifests: entries,
        annotations: BTreeMap::new(),
    };
    let write = |name: &str, bytes: &[u8]| {
        let path = staging.join(name);
        fs::write(&path, bytes).map_err(io_error("cannot write", &path))
    };
    write("oci-layout", OCI_LAYOUT)?;
    write("index.json", &serde_json::to_vec(&index)?)
}

/// Moves what stands in the staging directory to its place.
fn install(staging: tempfile::TempDir, out: &Path) -> Result<(), BuildError> {
    let from = staging.path();
    fs::set_permissions(from, Permissions::from_mode(0o755))
        .map_err(io_error("cannot open up", from))?;
    if !out.join("oci-layout").is_file() {
        fs::rename(from, out).map_err(io_error("cannot make", out))?;
        // It has moved: there is nothing left to remove.
        let _ = staging.keep();
        return Ok(());
    }
    let to = out.join("blobs/sha256");
    fs::create_dir_all(&to).map_err(io_error("cannot make", &to))?;
    let blobs = from.join("blobs/sha256");
    for blob in fs::read_dir(&blobs).map_err(io_error("cannot list", &blobs))? {
        let blob = blob.map_err(io_error("cannot list", &blobs))?;
        let target = to.join(blob.file_name());
        fs::rename(blob.path(), &target).map_err(io_error("cannot write", &target))?;
    }
    let target = out.join("index.json");
    fs::rename(from.join("index.json"), &target).map_err(io_error("cannot write", &target))
}

pub(super) fn read_layout_index(layout: &Path) -> Result<Index, BuildError> {
    let path = layout.join("index.json");
    let bytes = fs::read(&path).map_err(io_error("cannot read", &path))?;
    oci::parse_index(&bytes).map_err(|source| BuildError::Document { path, source })
}
