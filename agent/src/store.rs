//! The node's image store: unpacked layers, file systems and small blobs, all by the digest of what was fetched, shared
//! by all images.
//!
//! ```text
//! blobs/HEX           indexes, manifests, configs: what re-opens a set without the network
//! signatures/HEX      signatures of the set whose index is HEX, kept by who verified them
//! layers/HEX/         an unpacked layer, never changed; HEX is the digest of the compressed blob
//! filesystems/HEX     the blob of a mount form, whole, never changed
//! layers/tmp-…, filesystems/tmp-…, blobs/tmp-…, signatures/tmp-…   being written; removed when the store is opened
//! ```
//! A name without `tmp-` is complete: it came there by one rename. Does not fetch, unpack or mount.

mod evict;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::ids::Digest;
use protocol::oci::mount::MountForm;

use crate::mounts::FileSystem;
use crate::paths::RunDirs;

/// How often a thread that waits for another one's layer looks whether it should stop.
const WAIT_STEP: Duration = Duration::from_millis(100);
/// Prefix of what is not complete.
const TEMPORARY: &str = "tmp-";

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct StoreError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl StoreError {
    /// A file system does not say how full it is.
    #[must_use]
    pub fn examining(path: &Path, source: io::Error) -> Self {
        failed("examine", path)(source)
    }
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError { action, path: path.to_owned(), source }
}

#[derive(Debug, Default)]
struct State {
    /// Layers and file systems that a thread of this process is writing.
    in_flight: BTreeSet<Digest>,
    /// What a running pull needs, with the number of pulls.
    pinned: BTreeMap<Digest, usize>,
}

#[derive(Debug)]
struct Inner {
    blobs: PathBuf,
    layers: PathBuf,
    file_systems: PathBuf,
    lowers: PathBuf,
    signatures: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
    counter: AtomicU64,
}

/// The store. Cloning gives another handle to the same one; one process opens a run directory at a time.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// What a thread that wants a layer or a file system gets.
#[derive(Debug)]
pub enum Claim {
    /// It is there.
    Ready(PathBuf),
    /// It is to be written by the caller; others wait.
    Mine(Staged),
    /// The caller was told to stop while it waited.
    Stopped,
}

/// A layer or file system being written. Dropped without [`Staged::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct Staged {
    store: Store,
    digest: Digest,
    dir: PathBuf,
    /// Where it belongs.
    target: PathBuf,
}

/// Digests that are not collected while this lives. Pins of the same digests are equal, whatever store they are of.
#[derive(Debug)]
pub struct Pin {
    store: Store,
    digests: BTreeSet<Digest>,
}

/// What a collection removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collected {
    /// Layers and file systems removed.
    pub layers: usize,
    /// Blobs and signatures removed.
    pub blobs: usize,
}

impl Store {
    /// Opens the store below a run directory, makes it where it is missing and removes what was not completed.
    ///
    /// # Errors
    /// If a directory cannot be made, listed or cleaned.
    pub fn open(dirs: &RunDirs) -> Result<Self, StoreError> {
        let inner = Inner {
            blobs: dirs.blobs(),
            layers: dirs.layers(),
            file_systems: dirs.file_systems(),
            lowers: dirs.lowers(),
            signatures: dirs.signatures(),
            state: Mutex::default(),
            changed: Condvar::new(),
            counter: AtomicU64::new(0),
        };
        for dir in [&inner.blobs, &inner.layers, &inner.file_systems, &inner.signatures] {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(failed("make", dir))?;
            for name in names(dir)? {
                if name.starts_with(TEMPORARY) {
                    remove(&dir.join(name))?;
                }
            }
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Where a layer lies unpacked, if it is there.
    #[must_use]
    pub fn layer(&self, digest: &Digest) -> Option<PathBuf> {
        let path = self.inner.layers.join(digest.hex());
        path.is_dir().then_some(path)
    }

    /// The file system of a mount form, if its blob is there.
    #[must_use]
    pub fn file_system(&self, form: MountForm, digest: &Digest) -> Option<FileSystem> {
        let blob = self.inner.file_systems.join(digest.hex());
        let place = self.inner.lowers.join(digest.hex());
        blob.is_file().then_some(FileSystem { form, blob, place })
    }

    /// Claims a layer for writing. While another thread writes it, this waits; `stop` is asked meanwhile.
    ///
    /// # Errors
    /// If the temporary directory cannot be made.
    pub fn claim(&self, digest: &Digest, stop: &dyn Fn() -> bool) -> Result<Claim, StoreError> {
        let claim = self.claim_in(&self.inner.layers, digest, stop)?;
        if let Claim::Mine(staged) = &claim {
            // 0755 whatever the umask: it is the mode of a root that the layer does not mention.
            fs::create_dir(&staged.dir).map_err(failed("make", &staged.dir))?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(&staged.dir, mode)
                .map_err(failed("set the mode of", &staged.dir))?;
        }
        Ok(claim)
    }

    /// Claims the file of a mount form for writing, as [`Store::claim`] does a layer; the caller makes it.
    ///
    /// # Errors
    /// None at present: there is nothing to make yet.
    pub fn claim_file_system(
        &self,
        digest: &Digest,
        stop: &dyn Fn() -> bool,
    ) -> Result<Claim, StoreError> {
        self.claim_in(&self.inner.file_systems, digest, stop)
    }

    fn claim_in(
        &self,
        dir: &Path,
        digest: &Digest,
        stop: &dyn Fn() -> bool,
    ) -> Result<Claim, StoreError> {
        let target = dir.join(digest.hex());
        let mut state = self.lock();
        loop {
            if target.exists() {
                return Ok(Claim::Ready(target));
            }
            if state.in_flight.insert(*digest) {
                break;
            }
            if stop() {
                return Ok(Claim::Stopped);
            }
            let waited = self.inner.changed.wait_timeout(state, WAIT_STEP);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        let dir = self.temporary(dir);
        Ok(Claim::Mine(Staged { store: self.clone(), digest: *digest, dir, target }))
    }

    /// Whether there is no document in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        fs::read_dir(&self.inner.blobs).map_or(true, |mut entries| entries.next().is_none())
    }

    /// A small blob, if it is there and still has its digest. A damaged one is removed.
    ///
    /// # Errors
    /// If it is there but cannot be read or removed.
    pub fn blob(&self, digest: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.inner.blobs.join(digest.hex());
        match fs::read(&path) {
            Ok(bytes) if Digest::of(&bytes) == *digest => Ok(Some(bytes)),
            Ok(_) => {
                log::warn!("store: blob {digest} is damaged and was removed");
                fs::remove_file(&path).map_err(failed("remove", &path))?;
                Ok(None)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Keeps a small blob and returns its digest.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        self.put(&self.inner.blobs, &digest, bytes)?;
        Ok(digest)
    }

    /// What was kept of a set's signatures. Nothing vouches for it: it is to be verified again.
    ///
    /// # Errors
    /// If it is there but cannot be read.
    pub fn signature(&self, index: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.inner.signatures.join(index.hex());
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Keeps a set's signatures, in whatever form, until the set's index is collected.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn put_signature(&self, index: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        self.put(&self.inner.signatures, index, bytes)
    }

    fn put(&self, dir: &Path, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let (temporary, path) = (self.temporary(dir), dir.join(digest.hex()));
        fs::write(&temporary, bytes)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(failed("write", &path))
    }

    /// Keeps these digests from being collected until the pin is dropped.
    #[must_use]
    pub fn pin(&self, digests: impl IntoIterator<Item = Digest>) -> Pin {
        let mut pin = Pin { store: self.clone(), digests: BTreeSet::new() };
        pin.add(digests);
        pin
    }

    /// Removes every layer and blob that is neither in `keep` nor pinned nor being written.
    ///
    /// # Errors
    /// If the store cannot be listed, or something could not be removed; the rest is removed all the same.
    pub fn gc(&self, keep: &BTreeSet<Digest>) -> Result<Collected, StoreError> {
        let mut collected = Collected::default();
        let mut first_error = None;
        let Inner { layers, file_systems, blobs, signatures, .. } = &*self.inner;
        let dirs = [(layers, true), (file_systems, true), (blobs, false), (signatures, false)];
        for (dir, is_layers) in dirs {
            for name in names(dir)? {
                let Ok(digest) = format!("sha256:{name}").parse::<Digest>() else { continue };
                // Renamed under the lock, removed after it: a new pull sees it whole or not at all.
                let doomed = self.temporary(dir);
                {
                    let state = self.lock();
                    let used = keep.contains(&digest)
                        || state.pinned.contains_key(&digest)
                        || state.in_flight.contains(&digest);
                    if used {
                        continue;
                    }
                    let path = dir.join(&name);
                    fs::rename(&path, &doomed).map_err(failed("remove", &path))?;
                }
                *(if is_layers { &mut collected.layers } else { &mut collected.blobs }) += 1;
                if let Err(error) = remove(&doomed) {
                    first_error.get_or_insert(error);
                }
            }
        }
        first_error.map_or(Ok(collected), Err)
    }

    fn temporary(&self, dir: &Path) -> PathBuf {
        let number = self.inner.counter.fetch_add(1, Ordering::Relaxed);
        dir.join(format!("{TEMPORARY}{}-{number}", std::process::id()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Staged {
    /// The empty directory to write the layer to, or the file that is to be made.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes it part of the store and returns its place.
    ///
    /// # Errors
    /// If it cannot be renamed; it is then removed.
    pub fn commit(self) -> Result<PathBuf, StoreError> {
        let path = &self.target;
        fs::rename(&self.dir, path).map_err(failed("commit", path))?;
        Ok(path.clone())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.dir) {
            log::warn!("store: {error}: {}", error.source);
        }
        self.store.lock().in_flight.remove(&self.digest);
        self.store.inner.changed.notify_all();
    }
}

impl Pin {
    /// Keeps these too.
    pub fn add(&mut self, digests: impl IntoIterator<Item = Digest>) {
        let mut state = self.store.lock();
        for digest in digests {
            if self.digests.insert(digest) {
                *state.pinned.entry(digest).or_default() += 1;
            }
        }
    }
}

impl PartialEq for Pin {
    fn eq(&self, other: &Self) -> bool {
        self.digests == other.digests
    }
}

impl Eq for Pin {}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.store.lock();
        for digest in &self.digests {
            match state.pinned.get_mut(digest) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(state.pinned.remove(digest)),
            }
        }
    }
}

/// The names in a directory.
fn names(dir: &Path) -> Result<Vec<String>, StoreError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
        let entry = entry.map_err(failed("list", dir))?;
        found.extend(entry.file_name().into_string());
    }
    Ok(found)
}

/// Removes a file or a whole directory; nothing there is fine.
fn remove(path: &Path) -> Result<(), StoreError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(failed("remove", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("directory");
        let store = Store::open(&RunDirs::new(dir.path())).expect("store");
        (dir, store)
    }

    fn staged(store: &Store, digest: &Digest) -> Staged {
        match store.claim(digest, &|| false).expect("claim") {
            Claim::Mine(staged) => staged,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_layer_appears_only_when_committed() {
        let (dir, store) = store();
        let digest = Digest::of(b"layer");
        let first = staged(&store, &digest);
        fs::write(first.dir().join("half"), "half").expect("write");
        assert_eq!(store.layer(&digest), None);
        drop(first);
        assert_eq!(fs::read_dir(dir.path().join("layers")).expect("list").count(), 0);
        let path = staged(&store, &digest).commit().expect("commit");
        assert_eq!(store.layer(&digest), Some(path.clone()));
        let claim = store.claim(&digest, &|| false).expect("claim");
        assert!(matches!(claim, Claim::Ready(ready) if ready == path));
    }

    #[test]
    fn what_was_not_completed_is_gone_after_opening() {
        let (dir, store) = store();
        let path = staged(&store, &Digest::of(b"kept")).commit().expect("commit");
        for stray in ["layers/tmp-1-1/etc", "blobs/tmp-2"] {
            fs::create_dir_all(dir.path().join(stray)).expect("stray");
        }
        let store = Store::open(&RunDirs::new(dir.path())).expect("again");
        assert_eq!(store.layer(&Digest::of(b"kept")), Some(path));
        assert_eq!(names(&dir.path().join("layers")).expect("names").len(), 1);
        assert_eq!(names(&dir.path().join("blobs")).expect("names").len(), 0);
    }

    #[test]
    fn many_threads_that_want_one_layer_write_it_once() {
        let (_dir, store) = store();
        let digest = Digest::of(b"wanted by all");
        let written = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    if let Claim::Mine(mine) = store.claim(&digest, &|| false).expect("claim") {
                        written.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                        mine.commit().expect("commit");
                    }
                });
            }
        });
        assert_eq!(written.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn waiting_for_another_one_s_layer_can_be_stopped() {
        let (_dir, store) = store();
        let digest = Digest::of(b"slow");
        let _mine = staged(&store, &digest);
        assert!(matches!(store.claim(&digest, &|| true).expect("claim"), Claim::Stopped));
    }

    #[test]
    fn a_damaged_blob_is_as_good_as_none() {
        let (dir, store) = store();
        let digest = store.put_blob(b"config").expect("put");
        assert_eq!(store.blob(&digest).expect("get").as_deref(), Some(&b"config"[..]));
        fs::write(dir.path().join("blobs").join(digest.hex()), "confiG").expect("damage");
        assert_eq!(store.blob(&digest).expect("get"), None);
        assert_eq!(names(&dir.path().join("blobs")).expect("names").len(), 0);
    }

    #[test]
    fn collecting_spares_what_is_kept_pinned_or_being_written() {
        let (_dir, store) = store();
        let layer = |text: &str| {
            let digest = Digest::of(text.as_bytes());
            staged(&store, &digest).commit().expect("commit");
            digest
        };
        let (kept, pinned, loose) = (layer("kept"), layer("pinned"), layer("loose"));
        let blob = store.put_blob(b"loose blob").expect("blob");
        let pin = store.pin([pinned]);
        let writing = staged(&store, &Digest::of(b"writing"));
        let collected = store.gc(&BTreeSet::from([kept])).expect("gc");
        assert_eq!(collected, Collected { layers: 1, blobs: 1 });
        assert!(store.layer(&kept).is_some() && store.layer(&pinned).is_some());
        assert!(store.layer(&loose).is_none() && store.blob(&blob).expect("blob").is_none());
        writing.commit().expect("still writable");
        drop(pin);
        assert_eq!(store.gc(&BTreeSet::from([kept])).expect("gc").layers, 2);
    }
}
