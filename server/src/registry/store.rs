//! The store on disk: blobs, the repositories that have them, manifests, tags. Blocking; callers on an async thread
//! use `spawn_blocking`. Not here: what is done to a repository as a whole, under the store's modules.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, SystemTime};

use protocol::ids::Digest;
use protocol::oci::MAX_MANIFEST_BYTES;

use super::RegistryError;
use super::access::Access;
use super::document::{Document, Needs};
use super::route::{is_repository, is_tag};
use super::uploads::{Upload, Uploads};

mod delete;
mod gc;
mod referrers;

pub use gc::{GcReport, GcRequest};

/// Deepest nesting of repository names that is listed; a name has at most 255 bytes.
const MAX_DEPTH: usize = 128;
/// What somebody asks for is fresh again; this is how old its time must be for that to be written down.
const STALE: Duration = Duration::from_secs(60);

/// The registry's content. Clones share it.
#[derive(Debug, Clone)]
pub struct RegistryStore {
    dir: Arc<PathBuf>,
    pub(super) uploads: Arc<Uploads>,
    access: Arc<Access>,
    /// Shared by whoever adds something that refers to something else, alone for whoever takes away.
    order: Arc<RwLock<()>>,
}

pub(super) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RegistryError {
    let path = path.to_owned();
    move |source| RegistryError::Io { what, path, source }
}

/// `None` where there is no such file.
pub(super) fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
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
    /// Opens the store in a directory, which is made when it is not there. Everybody may push and pull.
    ///
    /// # Errors
    /// If the directory cannot be made, read or written.
    pub fn open(dir: &Path) -> Result<Self, RegistryError> {
        Self::open_for(dir, Access::default())
    }

    /// Opens the store, for those whom `access` lets in. Uploads that were open go on.
    ///
    /// # Errors
    /// If the directory cannot be made, read or written.
    pub fn open_for(dir: &Path, access: Access) -> Result<Self, RegistryError> {
        let (uploads, scratch) = (dir.join("uploads"), dir.join("tmp"));
        if let Err(error) = fs::remove_dir_all(&scratch)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(io_error("cannot empty", &scratch)(error));
        }
        for path in [dir.join("blobs/sha256"), dir.join("repositories"), uploads.clone(), scratch] {
            fs::create_dir_all(&path).map_err(io_error("cannot make", &path))?;
        }
        let open = Uploads::open(&uploads).map_err(io_error("cannot read", &uploads))?;
        let store = Self {
            dir: Arc::new(dir.to_owned()),
            uploads: Arc::new(open),
            access: Arc::new(access),
            order: Arc::default(),
        };
        store.index_referrers_once()?;
        Ok(store)
    }

    /// Who may do what.
    pub(crate) fn access(&self) -> &Access {
        &self.access
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
        self.repositories_with(&["_manifests"])
    }

    /// The repositories that have one of these parts, sorted.
    fn repositories_with(&self, parts: &[&str]) -> Result<Vec<String>, RegistryError> {
        let root = self.dir.join("repositories");
        let mut found = Vec::new();
        let mut todo = vec![(root, String::new(), 0)];
        while let Some((dir, name, depth)) = todo.pop() {
            for entry in names_in(&dir)? {
                if parts.contains(&entry.as_str()) {
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
        found.dedup();
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
        let Some(meta) = if_there(fs::metadata(&path)).map_err(io_error("cannot read", &path))?
        else {
            return Ok(None);
        };
        let bytes = if meta.len() > MAX_MANIFEST_BYTES as u64 {
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
        upload: &Upload,
    ) -> Result<(), RegistryError> {
        let from = &upload.path;
        let synced = upload.open().and_then(|file| file.sync_all());
        synced.map_err(io_error("cannot sync", from))?;
        let to = self.blob_path(digest);
        let _order = self.adding();
        fs::rename(from, &to).map_err(io_error("cannot store", &to))?;
        sync_dir(&self.dir.join("blobs/sha256"))?;
        self.link_blob(repository, digest)
    }

    /// Makes a blob of another repository one of this repository's, too; false when the other does not have it.
    pub(super) fn mount(
        &self,
        repository: &str,
        from: &str,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        let _order = self.adding();
        let there = self.blob_size(from, digest)?.is_some();
        if there {
            self.link_blob(repository, digest)?;
        }
        Ok(there)
    }

    fn link_blob(&self, repository: &str, digest: &Digest) -> Result<(), RegistryError> {
        self.write(&self.repository(repository)?.join("_blobs"), &digest.hex(), b"")
    }

    /// Stores a manifest, and the tag for it when there is one; says what is missing instead, where something is.
    pub(super) fn put_manifest(
        &self,
        repository: &str,
        document: &Document,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<Option<Needs>, RegistryError> {
        let dir = self.repository(repository)?;
        let digest = document.descriptor.digest;
        let _order = self.adding();
        for need in &document.needs {
            let there = match need {
                Needs::Blob(digest) => self.blob_size(repository, digest)?.is_some(),
                Needs::Manifest(digest) => self.has_manifest(repository, digest)?,
            };
            if !there {
                return Ok(Some(*need));
            }
        }
        self.write(&self.dir.join("blobs/sha256"), &digest.hex(), bytes)?;
        // The entry first: a list leaves out what is not there yet, but nothing would add a missing entry.
        self.add_referrer(repository, document)?;
        self.write(&dir.join("_manifests"), &digest.hex(), document.media_type.as_bytes())?;
        if let Some(tag) = tag {
            self.write(&dir.join("_tags"), tag, digest.to_string().as_bytes())?;
        }
        Ok(None)
    }

    /// Somebody asks whether a blob or manifest is there, perhaps in order not to send it again: from now on it is as
    /// fresh as if it had been sent. To be called before looking, so that no collection comes between the two.
    pub(super) fn refresh(&self, repository: &str, digest: &Digest) -> Result<(), RegistryError> {
        let dir = self.repository(repository)?;
        for kind in ["_blobs", "_manifests"] {
            let path = dir.join(kind).join(digest.hex());
            let Ok(meta) = fs::metadata(&path) else { continue };
            let age = meta.modified().ok().and_then(|at| at.elapsed().ok());
            if age.is_some_and(|age| age > STALE) {
                let _order = self.adding();
                let file = File::options().append(true).open(&path);
                let set = file.and_then(|file| file.set_modified(SystemTime::now()));
                if_there(set).map_err(io_error("cannot touch", &path))?;
            }
        }
        Ok(())
    }

    fn adding(&self) -> RwLockReadGuard<'_, ()> {
        self.order.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a small file: beside, synced, renamed, the directory synced.
    fn write(&self, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), RegistryError> {
        self.make_dirs(dir)?;
        let path = dir.join(name);
        let scratch = self.dir.join("tmp");
        let mut file =
            tempfile::NamedTempFile::new_in(&scratch).map_err(io_error("cannot write", &path))?;
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
