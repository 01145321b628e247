//! Blobs that outlive a reboot: compressed layers, mount forms and documents by their digests, on a disk labelled
//! `LAYERCAKE` or in a directory. A cache and nothing else: layers are applied to the store in memory as if they came over
//! the network, and hashed on the way.
//!
//! ```text
//! layercake-v1/HEX      a blob, whole; HEX is its digest; its time of change is when it was last used
//! layercake-v1/tmp-N    being written; removed when the cache is opened
//! ```
//! Nothing on the disk is trusted, and nothing there is worth a pull: what is damaged is removed and fetched anew, and
//! whatever goes wrong with the disk is said ([`Cache::status`]) and costs only what would have been saved. Writing is on
//! a thread of its own (`writer`); a pull waits for it two seconds at most.

mod disk;
pub mod superblock;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use protocol::ids::Digest;
use protocol::node::ObservedCache;
use protocol::oci::MAX_MANIFEST_BYTES;
use rustix::mount::{UnmountFlags, unmount};

pub use self::writer::Writer;
use self::writer::{Queue, prepare};

/// The directory on the disk; the number is the layout's.
const DIRECTORY: &str = "layercake-v1";
/// How long a disk that was not there is not looked for again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// How long a pull waits for a disk that is being looked for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where the blobs are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Nowhere,
    Directory(PathBuf),
    /// A disk with this label, mounted here.
    Disk {
        label: String,
        at: PathBuf,
    },
}

/// The cache. Cloning gives another handle to the same one.
#[derive(Debug, Clone)]
pub struct Cache {
    place: Place,
    shared: Arc<(Mutex<Shared>, Condvar)>,
}

#[derive(Debug, Default)]
struct Shared {
    open: Option<Open>,
    looked: Option<Instant>,
    /// Whether a thread is looking.
    looking: bool,
    /// Whether somebody waited for that thread in vain: nobody else does.
    waited: bool,
    /// What went wrong last.
    problem: Option<String>,
    /// Blobs that are damaged there and may not have been removable.
    bad: BTreeSet<Digest>,
    /// Whether blobs are being written.
    busy: bool,
    /// Bytes kept, and most that may be.
    used: u64,
    limit: u64,
}

/// A cache that was found.
#[derive(Debug, Clone)]
struct Open {
    dir: PathBuf,
    /// The device or directory, for people.
    name: String,
    queue: Queue,
}

impl Cache {
    /// No cache.
    #[must_use]
    pub fn none() -> Self {
        Self { place: Place::Nowhere, shared: Arc::default() }
    }

    /// A cache in this directory.
    #[must_use]
    pub fn in_directory(dir: &Path) -> Self {
        Self { place: Place::Directory(dir.to_owned()), shared: Arc::default() }
    }

    /// A cache on the disk with this label, mounted at `at` when it is first found.
    #[must_use]
    pub fn on_disk(label: &str, at: &Path) -> Self {
        let place = Place::Disk { label: label.to_owned(), at: at.to_owned() };
        Self { place, shared: Arc::default() }
    }

    /// Looks for the disk from now on, so that it is there when it is needed.
    pub fn warm_up(&self) {
        drop(self.open());
    }

    /// Something was plugged in or out: a disk that went is let go of, and one that came is looked for now.
    pub fn hardware_changed(&self) {
        if let Place::Disk { at, .. } = &self.place {
            let mut shared = self.lock();
            if let Some(gone) = shared.open.take_if(|open| !Path::new(&open.name).exists()) {
                (shared.used, shared.limit) = (0, 0);
                let problem = format!("{} is gone", gone.name);
                log::warn!("cache: {problem}");
                shared.problem = Some(problem);
                // Who still uses a directory of it keeps that, and its errors.
                if let Err(error) = unmount(at, UnmountFlags::DETACH) {
                    log::debug!("cache: {}: {error}", at.display());
                }
            }
            shared.looked = None;
        }
        self.warm_up();
    }

    /// A blob of this size, to be read and hashed by the caller.
    #[must_use]
    pub fn blob(&self, digest: &Digest, size: u64) -> Option<File> {
        let open = self.open()?;
        if self.lock().bad.contains(digest) {
            return None;
        }
        let path = open.dir.join(digest.hex());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                self.trouble(format!("cannot read {}: {error}", path.display()));
                return None;
            }
        };
        match file.metadata() {
            Ok(about) if about.is_file() && about.len() == size => {
                // When it was last used decides what goes first. A disk that is read-only keeps its order.
                let _ = file.set_modified(SystemTime::now());
                Some(file)
            }
            Ok(about) => {
                self.forget(digest, &format!("it has {} bytes instead of {size}", about.len()));
                None
            }
            Err(error) => {
                self.forget(digest, &error.to_string());
                None
            }
        }
    }

    /// A document, if it is there and has its digest.
    #[must_use]
    pub fn document(&self, digest: &Digest) -> Option<Vec<u8>> {
        let open = self.open()?;
        let about = fs::metadata(open.dir.join(digest.hex())).ok()?;
        if about.len() > MAX_MANIFEST_BYTES as u64 {
            return None;
        }
        let file = self.blob(digest, about.len())?;
        let mut bytes = Vec::new();
        let read = file.take(MAX_MANIFEST_BYTES as u64).read_to_end(&mut bytes);
        if read.is_ok() && Digest::of(&bytes) == *digest {
            return Some(bytes);
        }
        self.forget(digest, "its content has another digest");
        None
    }

    /// Keeps a document.
    pub fn keep_document(&self, bytes: &[u8]) {
        let digest = Digest::of(bytes);
        let Some(mut writer) = self.writer(&digest, bytes.len() as u64) else { return };
        writer.write(bytes);
        writer.commit();
    }

    /// Takes a blob of this size in, as it comes; none where there is no cache, or it has the blob.
    #[must_use]
    pub fn writer(&self, digest: &Digest, size: u64) -> Option<Writer> {
        let open = self.open()?;
        if self.lock().bad.contains(digest) || open.dir.join(digest.hex()).exists() {
            return None;
        }
        open.queue.begin(*digest, size)
    }

    /// Removes a blob that is not what it should be.
    pub fn forget(&self, digest: &Digest, why: &str) {
        let Some(open) = self.open() else { return };
        log::warn!("cache: {digest} on {} is damaged and will be fetched anew: {why}", open.name);
        if let Err(error) = fs::remove_file(open.dir.join(digest.hex()))
            && error.kind() != io::ErrorKind::NotFound
        {
            // It must not be read again, and cannot be written over.
            self.lock().bad.insert(*digest);
            self.trouble(format!("cannot remove a damaged blob: {error}"));
        }
    }

    /// Waits until what was taken in is on the disk, but not for ever.
    pub fn flush(&self) {
        let open = self.lock().open.clone();
        if let Some(open) = open {
            open.queue.flush();
        }
    }

    /// Whether blobs are being written: what [`Cache::status`] says will change soon.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.lock().busy
    }

    /// How the cache stands, for the node's report; none where there is none and nothing is wrong.
    #[must_use]
    pub fn status(&self) -> Option<ObservedCache> {
        let shared = self.lock();
        let place = match (&shared.open, &shared.problem) {
            (Some(open), _) => open.name.clone(),
            (None, Some(_)) => self.name(),
            (None, None) => return None,
        };
        let (used, limit, problem) = (shared.used, shared.limit, shared.problem.clone());
        Some(ObservedCache { place, used, limit, problem })
    }

    fn name(&self) -> String {
        match &self.place {
            Place::Nowhere => String::new(),
            Place::Directory(dir) => dir.display().to_string(),
            Place::Disk { label, .. } => format!("LABEL={label}"),
        }
    }

    /// The cache, once it is there.
    fn open(&self) -> Option<Open> {
        if self.place == Place::Nowhere {
            return None;
        }
        let mut shared = self.lock();
        let due = shared.looked.is_none_or(|at| at.elapsed() >= LOOK_AGAIN);
        if shared.open.is_none() && !shared.looking && due {
            shared.looked = Some(Instant::now());
            (shared.looking, shared.waited) = (true, false);
            let looker = self.clone();
            let builder = thread::Builder::new().name("find-cache".to_owned());
            if let Err(error) = builder.stack_size(256 << 10).spawn(move || looker.look()) {
                log::warn!("cache: no thread for it: {error}");
                shared.looking = false;
            }
        }
        // A disk may take the request to read it and never answer.
        let until = Instant::now() + PATIENCE;
        while shared.looking && !shared.waited {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                log::warn!("cache: a disk does not answer; pulls go on without it");
                shared.waited = true;
                break;
            }
            let waited = self.shared.1.wait_timeout(shared, left);
            shared = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        shared.open.clone()
    }

    /// Looks for the cache and opens it; on a thread of its own.
    fn look(&self) {
        let found = self.find();
        let mut shared = self.lock();
        shared.looking = false;
        match found {
            Ok(Some((name, dir))) => {
                let queue = Queue::start(&dir, self.clone());
                log::info!("cache: blobs are kept on {name}");
                shared.open = queue.map(|queue| Open { dir, name, queue });
                shared.problem = None;
            }
            Ok(None) => {}
            Err(problem) => {
                log::warn!("cache: {problem}");
                shared.problem = Some(problem);
            }
        }
        drop(shared);
        self.shared.1.notify_all();
    }

    /// Name and directory of the cache; none where there is no such disk.
    fn find(&self) -> Result<Option<(String, PathBuf)>, String> {
        let (name, root) = match &self.place {
            Place::Nowhere => return Ok(None),
            Place::Directory(dir) => (dir.display().to_string(), dir.clone()),
            Place::Disk { label, at } => match disk::mounted_at(at) {
                Some(device) => (device.display().to_string(), at.clone()),
                None => {
                    let Some(found) = disk::find(label) else { return Ok(None) };
                    disk::mount_at(&found, at)?;
                    (found.device.display().to_string(), at.clone())
                }
            },
        };
        let dir = root.join(DIRECTORY);
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        // On a disk that is read-only, what is there can still be read.
        if let Err(error) = made
            && !dir.is_dir()
        {
            return Err(format!("{name} cannot be used: {error}"));
        }
        prepare(&dir);
        Ok(Some((name, dir)))
    }

    /// Notes what went wrong, and says it once.
    fn trouble(&self, problem: String) {
        let mut shared = self.lock();
        if shared.problem.as_ref() != Some(&problem) {
            log::warn!("cache: {problem}");
            shared.problem = Some(problem);
        }
    }

    /// Notes whether blobs are being written.
    fn working(&self, busy: bool) {
        self.lock().busy = busy;
    }

    /// Notes how full it is, and whether it has just been of use.
    fn filled(&self, used: u64, limit: u64, worked: bool) {
        let mut shared = self.lock();
        (shared.used, shared.limit) = (used, limit);
        if worked {
            shared.problem = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
