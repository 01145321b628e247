//! Open uploads: each a file that grows, hashed as it does. Forgotten at restart, after an hour of silence, and when
//! they end.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::ids::Digest;
use sha2::{Digest as _, Sha256};

/// Most uploads that are open at a time.
const MAX_UPLOADS: usize = 1024;
/// An upload that nobody has written to for so long is forgotten.
const MAX_SILENCE: Duration = Duration::from_secs(3600);

/// One open upload. Its file is removed with it, unless it was renamed away.
#[derive(Debug)]
pub(super) struct Upload {
    pub(super) repository: String,
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) size: u64,
    hash: Sha256,
    touched: Instant,
}

impl Upload {
    /// Adds bytes at the end.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.touched = Instant::now();
        if let Err(error) = self.file.write_all(bytes) {
            // What reached the file of these bytes is not in the hash.
            self.file.set_len(self.size)?;
            return Err(error);
        }
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// The digest of what is there.
    pub(super) fn digest(&self) -> Digest {
        Digest(self.hash.clone().finalize().into())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // It is gone when it was taken in, and emptied at start otherwise.
        let _ = fs::remove_file(&self.path);
    }
}

/// An upload that one request at a time may write to.
pub(super) type Shared = Arc<tokio::sync::Mutex<Upload>>;

/// All open uploads.
#[derive(Debug)]
pub(super) struct Uploads {
    dir: PathBuf,
    open: Mutex<HashMap<String, Shared>>,
}

impl Uploads {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), open: Mutex::default() }
    }

    /// Opens an upload; `None` when there are too many.
    pub(super) fn begin(&self, repository: &str) -> io::Result<Option<String>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, upload| {
            // One that is being written to is not silent.
            upload.try_lock().map_or(true, |upload| upload.touched.elapsed() < MAX_SILENCE)
        });
        if open.len() >= MAX_UPLOADS {
            return Ok(None);
        }
        let random = || RandomState::new().build_hasher().finish();
        let id = format!("{:016x}{:016x}", random(), random());
        let path = self.dir.join(&id);
        let file = File::options().append(true).create_new(true).open(&path)?;
        let upload = Upload {
            repository: repository.to_owned(),
            path,
            file,
            size: 0,
            hash: Sha256::new(),
            touched: Instant::now(),
        };
        open.insert(id.clone(), Arc::new(tokio::sync::Mutex::new(upload)));
        Ok(Some(id))
    }

    pub(super) fn get(&self, id: &str) -> Option<Shared> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(super) fn forget(&self, id: &str) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}
