//! The store on disk: blobs, the repositories that have them, manifests, tags. Blocking; callers on an async thread
//! use `spawn_blocking`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::ids::Digest;
use protocol::oci::MAX_MANIFEST_BYTES;

use super::RegistryError;
use super::route::{is_repository, is_tag};
use super::uploads::Uploads;

/// Deepest nesting of repository names that is listed; a name has at most 255 bytes.
const MAX_DEPTH: usize = 128;

/// The registry's content. Clones share it.
#[derive(Debug, Clone)]
pub struct RegistryStore {
    dir: Arc<PathBuf>,
    pub(super) uploads: Arc<Uploads>,
}

pub(super) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RegistryError {
    let path = path.to_owned();
    move |source| RegistryError::Io { what, path, source }
}

/// `None` where there is no such file.
fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes a rename in this directory survive a power cut.
fn sync_dir(dir: &Path) -> Result<(), RegistryError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("cannot sync", dir))
}

impl RegistryStore {
    /// Opens the store in a directory, which is made when it is not there. Uploads that were open are forgotten.
    ///
    /// # Errors
    /// If the directory cannot be made, read or written.
    pub fn open(dir: &Path) -> Result<Self, RegistryError> {
        let uploads = dir.join("uploads");
        if let Err(error) = fs::remove_dir_all(&uploads)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(io_error("cannot empty", &uploads)(error));
        }
        for path in [dir.join("blobs/sha256"), dir.join("repositories"), uploads.clone()] {
            fs::create_dir_all(&path).map_err(io_error("cannot make", &path))?;
        }
        Ok(Self { dir: Arc::new(dir.to_owned()), uploads: Arc::new(Uploads::new(&uploads)) })
    }

    /// The digest that a tag stands for; `None` when there is no such repository or tag.
    ///
    /// # Errors
    /// If the name or tag is malformed, or the store cannot be read.
    pub fn resolve_tag(
        &self,
        repository: &str,
        tag: &str,
    ) -> Result<Option<Digest>, RegistryError> {
        if !is_tag(tag) {
            return Err(RegistryError::Name { name: tag.to_owned() });
        }
        let path = self.repository(repository)?.join("_tags").join(tag);
        let Some(text) =
            if_there(fs::read_to_string(&path)).map_err(io_error("cannot read", &path))?
        else {
            return Ok(None);
        };
        let digest = text.trim().parse();
        digest
            .map(Some)
            .map_err(|error| RegistryError::Damaged { path, reason: format!("{error}") })
    }

    /// All repositories, sorted.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn repositories(&self) -> Result<Vec<String>, RegistryError> {
        let root = self.dir.join("repositories");
        let mut found = Vec::new();
        let mut todo = vec![(root, String::new(), 0)];
        while let Some((dir, name, depth)) = todo.pop() {
            for entry in names_in(&dir)? {
                if entry == "_manifests" {
                    found.push(name.clone());
                }
                let path = dir.join(&entry);
                if depth < MAX_DEPTH && !entry.starts_with('_') && path.is_dir() {
                    let inner = if name.is_empty() { entry } else { format!("{name}/{entry}") };
                    todo.push((path, inner, depth + 1));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// The tags of a repository, sorted; none when there is no such repository.
    ///
    /// # Errors
    /// If the name is malformed, or the store cannot be read.
    pub fn tags(&self, repository: &str) -> Result<Vec<String>, RegistryError> {
        let mut tags = names_in(&self.repository(repository)?.join("_tags"))?;
        tags.retain(|tag| is_tag(tag));
        tags.sort();
        Ok(tags)
    }

    /// A manifest or index of a repository, byte for byte; `None` when the repository does not have it.
    ///
    /// # Errors
    /// If the name is malformed, the store cannot be read, or the content is damaged.
    pub fn manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<Option<Vec<u8>>, RegistryError> {
        Ok(self.typed_manifest(repository, digest)?.map(|(_, bytes)| bytes))
    }

    /// A manifest with its media type.
    pub(super) fn typed_manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<Option<(String, Vec<u8>)>, RegistryError> {
        let link = self.repository(repository)?.join("_manifests").join(digest.hex());
        let Some(media_type) =
            if_there(fs::read_to_string(&link)).map_err(io_error("cannot read", &link))?
        else {
            return Ok(None);
        };
        let path = self.blob_path(digest);
        let size = fs::metadata(&path).map_err(io_error("cannot read", &path))?.len();
        let bytes = if size > MAX_MANIFEST_BYTES as u64 {
            Vec::new()
        } else {
            fs::read(&path).map_err(io_error("cannot read", &path))?
        };
        if Digest::of(&bytes) != *digest {
            let reason = "its content does not have its digest".to_owned();
            return Err(RegistryError::Damaged { path, reason });
        }
        Ok(Some((media_type, bytes)))
    }

    /// Whether the repository is there at all.
    pub(super) fn has_repository(&self, repository: &str) -> Result<bool, RegistryError> {
        Ok(self.repository(repository)?.join("_manifests").is_dir())
    }

    pub(super) fn has_manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        Ok(self.repository(repository)?.join("_manifests").join(digest.hex()).is_file())
    }

    /// Size of a blob that the repository has.
    pub(super) fn blob_size(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<Option<u64>, RegistryError> {
        if !self.repository(repository)?.join("_blobs").join(digest.hex()).is_file() {
            return Ok(None);
        }
        let path = self.blob_path(digest);
        let meta = if_there(fs::metadata(&path)).map_err(io_error("cannot read", &path))?;
        Ok(meta.map(|meta| meta.len()))
    }

    pub(super) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// Takes a finished, hashed upload in as a blob of the repository.
    pub(super) fn take_in(
        &self,
        repository: &str,
        digest: &Digest,
        file: &File,
        from: &Path,
    ) -> Result<(), RegistryError> {
        file.sync_all().map_err(io_error("cannot sync", from))?;
        let to = self.blob_path(digest);
        fs::rename(from, &to).map_err(io_error("cannot store", &to))?;
        sync_dir(&self.dir.join("blobs/sha256"))?;
        self.link_blob(repository, digest)
    }

    /// Makes a blob that is there one of the repository's.
    pub(super) fn link_blob(&self, repository: &str, digest: &Digest) -> Result<(), RegistryError> {
        self.write(&self.repository(repository)?.join("_blobs"), &digest.hex(), b"")
    }

    /// Stores a manifest, and the tag for it when there is one.
    pub(super) fn put_manifest(
        &self,
        repository: &str,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<Digest, RegistryError> {
        let dir = self.repository(repository)?;
        let digest = Digest::of(bytes);
        self.write(&self.dir.join("blobs/sha256"), &digest.hex(), bytes)?;
        self.write(&dir.join("_manifests"), &digest.hex(), media_type.as_bytes())?;
        if let Some(tag) = tag {
            self.write(&dir.join("_tags"), tag, digest.to_string().as_bytes())?;
        }
        Ok(digest)
    }

    /// Writes a small file: beside, synced, renamed, the directory synced.
    fn write(&self, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), RegistryError> {
        self.make_dirs(dir)?;
        let path = dir.join(name);
        let uploads = self.dir.join("uploads");
        let mut file =
            tempfile::NamedTempFile::new_in(&uploads).map_err(io_error("cannot write", &path))?;
        file.write_all(bytes).map_err(io_error("cannot write", &path))?;
        file.as_file().sync_all().map_err(io_error("cannot sync", &path))?;
        file.persist(&path).map_err(|error| io_error("cannot store", &path)(error.error))?;
        sync_dir(dir)
    }

    /// Makes a directory of the store and syncs each parent that changed.
    fn make_dirs(&self, dir: &Path) -> Result<(), RegistryError> {
        let mut missing = Vec::new();
        let mut at = dir;
        while !at.is_dir() && at != self.dir.as_path() {
            missing.push(at);
            let Some(parent) = at.parent() else { break };
            at = parent;
        }
        for dir in missing.into_iter().rev() {
            match fs::create_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io_error("cannot make", dir)(error));
                }
                _ => sync_dir(dir.parent().unwrap_or(dir))?,
            }
        }
        Ok(())
    }

    fn repository(&self, name: &str) -> Result<PathBuf, RegistryError> {
        if !is_repository(name) {
            return Err(RegistryError::Name { name: name.chars().take(80).collect() });
        }
        Ok(self.dir.join("repositories").join(name))
    }
}

/// The names in a directory; none when it is not there.
fn names_in(dir: &Path) -> Result<Vec<String>, RegistryError> {
    let Some(entries) = if_there(fs::read_dir(dir)).map_err(io_error("cannot list", dir))? else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(io_error("cannot list", dir))?.file_name();
        if let Ok(name) = name.into_string() {
            names.push(name);
        }
    }
    Ok(names)
}
