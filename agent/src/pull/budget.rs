//! Whether a pull fits: judged from the manifests before the first byte of a blob, and kept to while it unpacks.
//!
//! A layer that says what it takes unpacked ([`protocol::oci::unpacked`]) is believed and held to it; one that does not is
//! estimated by [`GZIP_FACTOR`] or [`ZSTD_FACTOR`], and all that are estimated share what was free. Two limits count: the file
//! system of the store, and where that is a tmpfs the memory that the kernel calls available. What one pull was promised
//! is not promised to another one. Judging is pure; looking stands at the end.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::plan::{Content, Job};
use super::unpack::Compression;
use super::{Pull, PullError, Puller};
use crate::layer::Limits;
use crate::store::StoreError;

/// Bytes that one byte of gzip is taken to unpack to: Debian's root file systems have 2.5 to 3.
pub const GZIP_FACTOR: u64 = 3;
/// Bytes that one byte of zstd is taken to unpack to.
pub const ZSTD_FACTOR: u64 = 4;
/// What an entry costs beside its content, in bytes of kernel memory: inode, name, a small directory's share.
pub const ENTRY_COST: u64 = 1024;
/// Memory that a pull leaves to everything else, in bytes.
pub const MEMORY_RESERVE: u64 = 32 << 20;
/// `f_type` of a tmpfs (statfs(2)).
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `f_type` of a ramfs (statfs(2)).
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// What a pull needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Need {
    /// Blobs to fetch.
    pub blobs: usize,
    /// Their bytes on the wire.
    pub fetch: u64,
    /// Bytes in the store, of file contents.
    pub content: u64,
    /// Bytes of kernel memory beside.
    pub entries: u64,
    /// Whether a part of it is an estimate.
    pub estimated: bool,
}

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    /// Directory whose file system it is.
    pub place: PathBuf,
    /// Bytes free there, and not promised to another pull.
    pub free: u64,
    /// Bytes of the whole file system.
    pub total: u64,
    /// Bytes of memory that may be taken, where the file system takes memory.
    pub memory: Option<u64>,
}

/// Why a pull does not fit, with the figures.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Refusal {
    /// What it needs.
    pub need: Need,
    /// What there is, after all that nobody needs was removed.
    pub space: Space,
}

/// Bytes for people, in binary units.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 >> shift > 0 {
                let tenths = (u128::from(self.0) * 10) >> shift;
                return write!(f, "{}.{} {name}", tenths / 10, tenths % 10);
            }
        }
        write!(f, "{} B", self.0)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (need, space) = (&self.need, &self.space);
        let about = if need.estimated { "about " } else { "" };
        let unpacked = Bytes(need.content.saturating_add(need.entries));
        let s = if need.blobs == 1 { "" } else { "s" };
        let (fetch, blobs, place) = (Bytes(need.fetch), need.blobs, space.place.display());
        write!(
            f,
            "the pull needs {about}{unpacked} unpacked ({fetch} to fetch in {blobs} blob{s}), "
        )?;
        write!(f, "{} free of {} on {place}", Bytes(space.free), Bytes(space.total))?;
        if let Some(memory) = space.memory {
            write!(f, ", {} of memory available", Bytes(memory))?;
        }
        f.write_str("; nothing is left there that could be removed")
    }
}

impl Need {
    /// What these blobs need.
    #[must_use]
    pub(super) fn of(jobs: &[&Job]) -> Self {
        let mut need = Self { blobs: jobs.len(), ..Self::default() };
        for job in jobs {
            let (content, entries) = share(job);
            need.fetch = need.fetch.saturating_add(job.size);
            need.content = need.content.saturating_add(content);
            need.entries = need.entries.saturating_add(entries);
            need.estimated |= is_estimated(job);
        }
        need
    }

    /// What a file of this size needs that is fetched by itself. What an archive unpacks to is not known before.
    #[must_use]
    pub(super) fn of_file(bytes: u64) -> Self {
        Self { blobs: 1, fetch: bytes, content: bytes, entries: ENTRY_COST, estimated: true }
    }

    /// Whether it fits.
    #[must_use]
    pub fn fits(&self, space: &Space) -> bool {
        let whole = self.content.saturating_add(self.entries);
        self.content <= space.free && space.memory.is_none_or(|memory| whole <= memory)
    }
}

/// Bytes of content and of kernel memory that a blob takes in the store.
fn share(job: &Job) -> (u64, u64) {
    let factor = match job.content {
        Content::FileSystem(_) => return (job.size, ENTRY_COST),
        Content::Layer { compression: Compression::Plain, .. } => 1,
        Content::Layer { compression: Compression::Gzip, .. } => GZIP_FACTOR,
        Content::Layer { compression: Compression::Zstd, .. } => ZSTD_FACTOR,
    };
    match job.unpacked {
        Some(said) => (said.bytes, said.entries.saturating_mul(ENTRY_COST)),
        None => (job.size.saturating_mul(factor), 0),
    }
}

fn is_estimated(job: &Job) -> bool {
    let plain = matches!(job.content, Content::Layer { compression: Compression::Plain, .. });
    job.unpacked.is_none() && !plain && !matches!(job.content, Content::FileSystem(_))
}

/// How much a layer may bring: what it says of itself, else what any may.
pub(super) fn limits(job: &Job, most: &Limits) -> Limits {
    match job.unpacked {
        Some(said) => {
            Limits { bytes: said.bytes.min(most.bytes), entries: said.entries.min(most.entries) }
        }
        None => *most,
    }
}

/// What was promised to the pulls that are under way. Shared by all pulls into a store.
#[derive(Debug, Clone, Default)]
pub(super) struct Budget {
    promised: Arc<Mutex<u64>>,
}

/// What one pull was promised, and may still take. Given back when dropped.
#[derive(Debug)]
pub(super) struct Promise {
    budget: Budget,
    /// Bytes that are promised and not yet in the store.
    open: AtomicU64,
    /// Bytes that estimated layers may take in all.
    left: AtomicU64,
}

impl Budget {
    fn lock(&self) -> MutexGuard<'_, u64> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Promise {
    /// This blob is in the store now, and shows there as taken.
    pub(super) fn kept(&self, job: &Job) {
        let (content, entries) = share(job);
        self.give_back(content.saturating_add(entries));
    }

    /// What one attempt at a layer takes.
    pub(super) fn draw(&self, job: &Job) -> Draw<'_> {
        Draw { promise: self, estimated: is_estimated(job), taken: AtomicU64::new(0) }
    }

    fn give_back(&self, bytes: u64) {
        let mut promised = self.budget.lock();
        let open = self.open.load(Ordering::Relaxed);
        let back = bytes.min(open);
        self.open.store(open - back, Ordering::Relaxed);
        *promised = promised.saturating_sub(back);
    }
}

/// What one attempt at an estimated layer takes of the promise; it goes back when dropped, unless the layer was kept.
#[derive(Debug)]
pub(super) struct Draw<'a> {
    promise: &'a Promise,
    estimated: bool,
    taken: AtomicU64,
}

impl Draw<'_> {
    /// Takes bytes.
    ///
    /// # Errors
    /// There are no more.
    pub(super) fn take(&self, bytes: u64) -> io::Result<()> {
        if !self.estimated {
            return Ok(());
        }
        let left = &self.promise.left;
        let take = |left: u64| left.checked_sub(bytes);
        let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        let full = |_| io::Error::other("it unpacks to more than was free when the pull began");
        taken.map_err(full)?;
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// The layer stays.
    pub(super) fn keep(&self) {
        self.taken.store(0, Ordering::Relaxed);
    }
}

impl Drop for Draw<'_> {
    fn drop(&mut self) {
        self.promise.left.fetch_add(self.taken.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.give_back(u64::MAX);
    }
}

impl Pull<'_> {
    /// Promises room for these blobs, after removing what nobody needs, the oldest first, if that helps.
    ///
    /// # Errors
    /// [`PullError::NoSpace`] with the figures, or the kernel does not say how things stand.
    pub(super) fn promise(&self, jobs: &[&Job]) -> Result<Promise, PullError> {
        let need = Need::of(jobs);
        let (open, space) = self.puller.make_room(need)?;
        // What is estimated may grow until everything is taken that nobody else was promised.
        let exact = jobs.iter().filter(|job| !is_estimated(job)).map(|job| share(job).0);
        let exact = exact.fold(0_u64, u64::saturating_add);
        let free = space.memory.map_or(space.free, |memory| memory.min(space.free));
        let left = AtomicU64::new(free.saturating_sub(exact));
        let budget = self.puller.budget.clone();
        Ok(Promise { budget, open: AtomicU64::new(open), left })
    }
}

impl Puller {
    /// Promises room for a file that is fetched by itself. As [`Pull::promise`].
    ///
    /// # Errors
    /// As [`Pull::promise`].
    pub(super) fn promise(&self, need: Need) -> Result<Promise, PullError> {
        let (open, _) = self.make_room(need)?;
        let budget = self.budget.clone();
        Ok(Promise { budget, open: AtomicU64::new(open), left: AtomicU64::new(0) })
    }

    /// Sees to it that this much fits, and notes it as promised: the bytes, and how things stood.
    fn make_room(&self, need: Need) -> Result<(u64, Space), PullError> {
        let (store, budget) = (&self.store, &self.budget);
        let mut promised = budget.lock();
        let mut space = look(store.layers_dir(), *promised)?;
        if !need.fits(&space) {
            let removed = store.evict(&mut || match look(store.layers_dir(), *promised) {
                Ok(now) => {
                    space = now;
                    need.fits(&space)
                }
                Err(_) => true,
            })?;
            if removed > 0 {
                log::info!("store: {removed} that nobody needs were removed to make room");
            }
        }
        if !need.fits(&space) {
            return Err(PullError::NoSpace(Box::new(Refusal { need, space })));
        }
        let open = need.content.saturating_add(need.entries);
        *promised = promised.saturating_add(open);
        Ok((open, space))
    }
}

/// How things stand in a directory's file system.
fn look(place: &Path, promised: u64) -> Result<Space, StoreError> {
    let failed = |errno: rustix::io::Errno| StoreError::examining(place, errno.into());
    let stat = rustix::fs::statfs(place).map_err(failed)?;
    let block = u64::try_from(stat.f_bsize).unwrap_or(0);
    let blocks = |count: u64| count.saturating_mul(block);
    let kind = u64::try_from(stat.f_type).unwrap_or(0) & 0xffff_ffff;
    let memory = match kind {
        TMPFS_MAGIC | RAMFS_MAGIC => std::fs::read("/proc/meminfo").ok(),
        _ => None,
    };
    let memory = memory.as_deref().and_then(available);
    let reserve = MEMORY_RESERVE.saturating_add(promised);
    // A ramfs has no size of its own.
    let (free, total) = match memory {
        Some(bytes) if kind == RAMFS_MAGIC => (bytes, bytes),
        _ => (blocks(stat.f_bavail).saturating_sub(promised), blocks(stat.f_blocks)),
    };
    let memory = memory.map(|bytes| bytes.saturating_sub(reserve));
    Ok(Space { place: place.to_owned(), free, total, memory })
}

/// `MemAvailable` of `/proc/meminfo` (proc(5)), in bytes.
fn available(meminfo: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(meminfo).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use protocol::ids::Digest;
    use protocol::oci::unpacked::Unpacked;

    use super::*;

    fn job(size: u64, compression: Compression, unpacked: Option<Unpacked>) -> Job {
        let digest = Digest::of(&size.to_le_bytes());
        Job { digest, size, content: Content::Layer { diff_id: digest, compression }, unpacked }
    }

    fn space(free: u64, memory: Option<u64>) -> Space {
        Space { place: PathBuf::from("/run/layercake/layers"), free, total: 1 << 30, memory }
    }

    #[test]
    fn what_is_said_counts_and_what_is_not_said_is_estimated() {
        let said = Some(Unpacked { bytes: 40_960, entries: 3 });
        let jobs = [
            job(100, Compression::Gzip, None),
            job(10, Compression::Zstd, None),
            job(7, Compression::Plain, None),
        ];
        let jobs: Vec<&Job> = jobs.iter().collect();
        let need = Need::of(&jobs);
        assert_eq!((need.fetch, need.content, need.entries, need.estimated), (117, 347, 0, true));
        let exact = job(1000, Compression::Gzip, said);
        let need = Need::of(&[&exact]);
        assert_eq!((need.content, need.entries, need.estimated), (40_960, 3 * ENTRY_COST, false));
        let limits = limits(&exact, &Limits::default());
        assert_eq!((limits.bytes, limits.entries), (40_960, 3));
    }

    #[test]
    fn both_the_file_system_and_the_memory_must_have_room() {
        let need = Need { content: 100, entries: 10, ..Need::default() };
        for (free, memory, fits) in [
            (100, None, true),
            (99, None, false),
            (100, Some(110), true),
            (100, Some(109), false),
            (99, Some(1000), false),
        ] {
            assert_eq!(need.fits(&space(free, memory)), fits, "{free} {memory:?}");
        }
    }

    #[test]
    fn a_refusal_has_the_figures() {
        let need = Need {
            blobs: 3,
            fetch: 430_000_000,
            content: (12 << 30) / 10,
            entries: 0,
            estimated: true,
        };
        let refusal = Refusal { need, space: space(640 << 20, Some(900)) };
        assert_eq!(
            refusal.to_string(),
            "the pull needs about 1.1 GiB unpacked (410.0 MiB to fetch in 3 blobs), 640.0 MiB free of 1.0 GiB on \
             /run/layercake/layers, 900 B of memory available; nothing is left there that could be removed"
        );
    }

    #[test]
    fn a_promise_is_given_back_bit_by_bit_and_no_more_than_once() {
        let budget = Budget::default();
        *budget.lock() = 1000;
        let one = job(100, Compression::Plain, None);
        let promise =
            Promise { budget: budget.clone(), open: AtomicU64::new(150), left: AtomicU64::new(10) };
        promise.kept(&one);
        assert_eq!(*budget.lock(), 900);
        promise.kept(&one);
        assert_eq!(*budget.lock(), 850);
        let estimated = job(100, Compression::Gzip, None);
        let draw = promise.draw(&estimated);
        draw.take(10).expect("ten");
        assert!(draw.take(1).is_err());
        drop(draw);
        let draw = promise.draw(&estimated);
        draw.take(10).expect("ten again");
        draw.keep();
        drop(draw);
        assert!(promise.draw(&estimated).take(1).is_err());
        promise.draw(&one).take(100).expect("what is not estimated has its own");
        drop(promise);
        assert_eq!(*budget.lock(), 850);
    }

    #[test]
    fn available_memory_is_read() {
        assert_eq!(available(b"MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        for odd in [&b""[..], b"MemAvailable: x kB", b"MemAvailable: 7", b"\xff"] {
            assert_eq!(available(odd), None);
        }
        assert!(available(&std::fs::read("/proc/meminfo").expect("meminfo")).is_some());
    }
}
