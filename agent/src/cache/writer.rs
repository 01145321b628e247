//! The cache's writing thread: takes blobs in pieces from the pulls, makes room by age, and gives a blob its name once it is
//! on the disk (write, fsync, rename, fsync of the directory).
//!
//! Pieces wait in a bounded queue. A pull whose piece finds no place there for [`PATIENCE`] goes on without the cache.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use protocol::ids::Digest;

use super::Cache;

/// Pieces that may wait: with the pull's buffers of 256 KiB, 4 MiB.
const WAITING: usize = 16;
/// How long a pull waits for a place in the queue.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two looks for a place.
const STEP: Duration = Duration::from_millis(2);
/// How long [`Queue::flush`] waits.
const FLUSH_PATIENCE: Duration = Duration::from_secs(30);
/// Share of the file system that blobs may fill, in percent.
const SHARE: u64 = 90;
/// Prefix of what is not complete.
const TEMPORARY: &str = "tmp-";

enum Message {
    Begin { id: u64, digest: Digest, size: u64 },
    Piece { id: u64, bytes: Vec<u8> },
    Commit { id: u64 },
    Drop { id: u64 },
    Flush(SyncSender<()>),
}

/// The way to the thread.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    sender: SyncSender<Message>,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Message")
    }
}

/// A blob that is being taken in. Dropped without [`Writer::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    queue: Queue,
    id: u64,
    /// Whether the thread still wants it.
    open: bool,
}

impl Writer {
    /// Takes the next piece. One that cannot be taken in time ends it: the rest is ignored.
    pub fn write(&mut self, bytes: &[u8]) {
        if self.open {
            self.open = self.queue.send(Message::Piece { id: self.id, bytes: bytes.to_vec() });
            if !self.open {
                log::warn!("cache: the disk is too slow; a blob is not kept");
            }
        }
    }

    /// The blob is whole, and its digest was right: it gets its name.
    pub fn commit(mut self) {
        if self.open {
            self.open = false;
            self.queue.send(Message::Commit { id: self.id });
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.open {
            self.queue.send(Message::Drop { id: self.id });
        }
    }
}

impl Queue {
    /// Starts the thread; none where the system has none to give.
    pub(super) fn start(dir: &Path, cache: Cache) -> Option<Self> {
        let (sender, receiver) = mpsc::sync_channel(WAITING);
        let mut keeper = Keeper { dir: dir.to_owned(), cache, files: BTreeMap::new() };
        let builder = thread::Builder::new().name("cache".to_owned()).stack_size(256 << 10);
        match builder.spawn(move || keeper.run(&receiver)) {
            Ok(_) => Some(Self { sender }),
            Err(error) => {
                log::warn!("cache: no thread for it: {error}");
                None
            }
        }
    }

    pub(super) fn begin(&self, digest: Digest, size: u64) -> Option<Writer> {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let open = self.send(Message::Begin { id, digest, size });
        open.then(|| Writer { queue: self.clone(), id, open })
    }

    pub(super) fn flush(&self) {
        let (done, flushed) = mpsc::sync_channel(1);
        if self.send(Message::Flush(done)) {
            let _ = flushed.recv_timeout(FLUSH_PATIENCE);
        }
    }

    /// Whether there was a place for it in time.
    fn send(&self, mut message: Message) -> bool {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.sender.try_send(message) {
                Ok(()) => return true,
                Err(TrySendError::Disconnected(_)) => return false,
                Err(TrySendError::Full(back)) => message = back,
            }
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(STEP);
        }
    }
}

/// A file being written.
struct Unfinished {
    file: File,
    path: PathBuf,
    digest: Digest,
    size: u64,
    written: u64,
}

/// The thread's state.
struct Keeper {
    dir: PathBuf,
    cache: Cache,
    files: BTreeMap<u64, Unfinished>,
}

impl Keeper {
    fn run(&mut self, receiver: &Receiver<Message>) {
        self.tell(false);
        while let Ok(message) = receiver.recv() {
            let (id, done) = match message {
                Message::Begin { id, digest, size } => (id, self.begin(id, digest, size)),
                Message::Piece { id, bytes } => (id, self.piece(id, &bytes)),
                Message::Commit { id } => (id, self.commit(id)),
                Message::Drop { id } => {
                    self.forget(id);
                    (id, Ok(()))
                }
                Message::Flush(done) => {
                    let _ = done.send(());
                    continue;
                }
            };
            if let Err(error) = done {
                self.forget(id);
                self.cache.trouble(format!("a blob is not kept: {error}"));
            }
            self.cache.working(!self.files.is_empty());
        }
    }

    fn begin(&mut self, id: u64, digest: Digest, size: u64) -> io::Result<()> {
        self.make_room(size)?;
        let path = self.dir.join(format!("{TEMPORARY}{id}"));
        let file = File::create(&path)?;
        self.files.insert(id, Unfinished { file, path, digest, size, written: 0 });
        Ok(())
    }

    fn piece(&mut self, id: u64, bytes: &[u8]) -> io::Result<()> {
        let Some(unfinished) = self.files.get_mut(&id) else { return Ok(()) };
        unfinished.written = unfinished.written.saturating_add(bytes.len() as u64);
        unfinished.file.write_all(bytes)
    }

    fn commit(&mut self, id: u64) -> io::Result<()> {
        let Some(unfinished) = self.files.remove(&id) else { return Ok(()) };
        let Unfinished { file, path, digest, size, written } = unfinished;
        let finish = || {
            if written != size {
                return Err(io::Error::other("it is not whole"));
            }
            file.sync_all()?;
            fs::rename(&path, self.dir.join(digest.hex()))?;
            File::open(&self.dir)?.sync_all()
        };
        let finished = finish();
        if finished.is_err() {
            let _ = fs::remove_file(&path);
        }
        self.tell(finished.is_ok());
        finished
    }

    fn forget(&mut self, id: u64) {
        if let Some(unfinished) = self.files.remove(&id) {
            let _ = fs::remove_file(&unfinished.path);
        }
    }

    /// Removes what was not used for longest until there is room for this many bytes.
    fn make_room(&mut self, size: u64) -> io::Result<()> {
        let (free, limit) = self.space()?;
        // What is being written takes its place already, but only in part.
        let open = self.files.values().map(|it| it.size.saturating_sub(it.written));
        let wanted = open.fold(size, u64::saturating_add);
        let mut kept = self.kept()?;
        kept.sort();
        let mut used: u64 = kept.iter().map(|(_, size, _)| *size).sum();
        let mut free = free;
        let mut oldest = kept.into_iter();
        while used.saturating_add(wanted) > limit || free < wanted {
            let Some((_, freed, path)) = oldest.next() else {
                let text = format!(
                    "{size} bytes do not fit: at most {limit} may be kept, {free} are free"
                );
                return Err(io::Error::other(text));
            };
            // A blob that alone is too large must not cost all others.
            if size > limit {
                return Err(io::Error::other(format!(
                    "{size} bytes are more than the {limit} that are kept"
                )));
            }
            fs::remove_file(&path)?;
            used = used.saturating_sub(freed);
            free = free.saturating_add(freed);
        }
        Ok(())
    }

    /// Bytes free, and most that blobs may fill.
    fn space(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::statvfs(&self.dir)?;
        let total = stat.f_blocks.saturating_mul(stat.f_frsize);
        Ok((stat.f_bavail.saturating_mul(stat.f_frsize), total / 100 * SHARE))
    }

    /// Every blob: when it was used, its size, its path.
    fn kept(&self) -> io::Result<Vec<(SystemTime, u64, PathBuf)>> {
        let mut kept = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_str().is_none_or(|name| name.starts_with(TEMPORARY)) {
                continue;
            }
            let about = entry.metadata()?;
            kept.push((about.modified()?, about.len(), entry.path()));
        }
        Ok(kept)
    }

    /// Says how full it is.
    fn tell(&self, worked: bool) {
        if let (Ok((_, limit)), Ok(kept)) = (self.space(), self.kept()) {
            self.cache.filled(kept.iter().map(|(_, size, _)| *size).sum(), limit, worked);
        }
    }
}

/// Removes what was not completed. What cannot be removed stays: it has no blob's name.
pub(super) fn prepare(dir: &Path) {
    let entries = fs::read_dir(dir).map(|entries| entries.flatten().collect()).unwrap_or_default();
    let entries: Vec<fs::DirEntry> = entries;
    for entry in entries {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(TEMPORARY)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
