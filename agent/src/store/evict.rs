//! Making room under pressure: what nobody needs goes, the oldest first, until there is enough.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use protocol::ids::Digest;

use super::{Inner, Store, StoreError, failed, names, remove};

impl Store {
    /// The directory of the unpacked layers: its file system is what limits the store.
    #[must_use]
    pub fn layers_dir(&self) -> &Path {
        &self.inner.layers
    }

    /// Removes layers and file systems that are neither pinned nor being written, the oldest first, until `enough` says so
    /// after one of them. What runs, what was pulled and what is being pulled is pinned. Returns how many were removed.
    ///
    /// # Errors
    /// If the store cannot be listed, or something cannot be removed.
    pub fn evict(&self, enough: &mut dyn FnMut() -> bool) -> Result<usize, StoreError> {
        let Inner { layers, file_systems, .. } = &*self.inner;
        let mut found = Vec::new();
        for dir in [layers, file_systems] {
            for name in names(dir)? {
                let Ok(digest) = format!("sha256:{name}").parse::<Digest>() else { continue };
                let path = dir.join(name);
                // Times of change are the image's own; that of the inode is when it got its name here.
                let about = fs::symlink_metadata(&path).map_err(failed("examine", &path))?;
                found.push(((about.ctime(), about.ctime_nsec()), digest, dir, path));
            }
        }
        found.sort();
        let mut removed = 0;
        for (_, digest, dir, path) in found {
            let Some(doomed) = self.doom(&digest, dir, &path)? else { continue };
            remove(&doomed)?;
            removed += 1;
            if enough() {
                break;
            }
        }
        Ok(removed)
    }

    /// Takes the name away from what nobody needs; a new pull sees it whole or not at all.
    fn doom(
        &self,
        digest: &Digest,
        dir: &Path,
        path: &Path,
    ) -> Result<Option<PathBuf>, StoreError> {
        let doomed = self.temporary(dir);
        let state = self.lock();
        if state.pinned.contains_key(digest) || state.in_flight.contains(digest) {
            return Ok(None);
        }
        fs::rename(path, &doomed).map_err(failed("remove", path))?;
        Ok(Some(doomed))
    }
}
