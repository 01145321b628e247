//! Tests: what is kept, what goes first, and that a disk in trouble costs nothing but what it would have saved.

use std::io::Write;

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_remount};

use super::*;

struct Bench {
    dir: tempfile::TempDir,
    cache: Cache,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let cache = Cache::in_directory(dir.path());
        Self { dir, cache }
    }

    /// On a tmpfs of this many bytes that only this test's thread and its children see.
    fn small(bytes: usize) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        mount_change("/", private).expect("private");
        let bench = Self::new();
        let data = std::ffi::CString::new(format!("size={bytes}")).expect("option");
        let place = bench.dir.path();
        mount("tmpfs", place, "tmpfs", MountFlags::empty(), Some(data.as_c_str())).expect("tmpfs");
        bench
    }

    fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        if let Some(mut writer) = self.cache.writer(&digest, bytes.len() as u64) {
            bytes.chunks(64 << 10).for_each(|piece| writer.write(piece));
            writer.commit();
        }
        self.cache.flush();
        digest
    }

    fn get(&self, digest: &Digest, size: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        self.cache.blob(digest, size as u64)?.read_to_end(&mut bytes).expect("read");
        Some(bytes)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.path().join(DIRECTORY).join(digest.hex())
    }

    fn names(&self) -> usize {
        fs::read_dir(self.dir.path().join(DIRECTORY)).expect("list").count()
    }

    #[track_caller]
    fn problem(&self) -> String {
        self.cache.status().expect("status").problem.expect("a problem")
    }
}

#[test]
fn what_is_kept_is_there_for_who_opens_it_again_and_nothing_half_done_is() {
    let bench = Bench::new();
    let digest = bench.put(&[7; 100_000]);
    let half = Digest::of(b"half");
    let mut writer = bench.cache.writer(&half, 10).expect("writer");
    writer.write(b"five.");
    bench.cache.flush();
    assert_eq!(bench.names(), 2);
    std::mem::forget(writer);
    let again = Bench { cache: Cache::in_directory(bench.dir.path()), dir: bench.dir };
    assert_eq!(again.get(&digest, 100_000), Some(vec![7; 100_000]));
    assert_eq!(again.get(&half, 10), None);
    assert_eq!(again.names(), 1, "what was not completed is removed");
    assert!(again.cache.writer(&digest, 100_000).is_none(), "it is there");
    again.cache.flush();
    let status = again.cache.status().expect("status");
    assert_eq!((status.used, status.problem), (100_000, None));
    assert!(Cache::none().status().is_none() && Cache::none().blob(&digest, 1).is_none());
}

#[test]
fn a_dropped_or_a_short_blob_leaves_nothing() {
    let bench = Bench::new();
    drop(bench.cache.writer(&Digest::of(b"dropped"), 10).expect("writer"));
    let mut short = bench.cache.writer(&Digest::of(b"short"), 10).expect("writer");
    short.write(b"five.");
    short.commit();
    bench.cache.flush();
    assert_eq!(bench.names(), 0);
    assert!(bench.problem().contains("it is not whole"));
}

#[test]
fn a_blob_of_another_size_and_a_document_of_another_digest_are_removed() {
    let bench = Bench::new();
    let digest = bench.put(b"content");
    let file = File::options().write(true).open(bench.path(&digest)).expect("open");
    file.set_len(3).expect("truncate");
    assert_eq!(bench.get(&digest, 7), None);
    assert!(!bench.path(&digest).exists());
    bench.cache.keep_document(b"document");
    bench.cache.flush();
    let digest = Digest::of(b"document");
    assert_eq!(bench.cache.document(&digest).as_deref(), Some(&b"document"[..]));
    fs::write(bench.path(&digest), b"dokument").expect("spoil");
    assert_eq!(bench.cache.document(&digest), None);
    assert!(!bench.path(&digest).exists());
}

#[test]
fn the_blob_that_was_not_used_for_longest_goes_first() {
    let bench = Bench::small(10 << 20);
    let blob = |n: u8| vec![n; 3 << 20];
    let (one, two) = (bench.put(&blob(1)), bench.put(&blob(2)));
    let at = |path: &Path, seconds| {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        File::open(path).and_then(|file| file.set_modified(time)).expect("time");
    };
    at(&bench.path(&one), 10);
    at(&bench.path(&two), 20);
    // The older one is used: now the other one is older.
    assert!(bench.get(&one, 3 << 20).is_some());
    let three = bench.put(&blob(3));
    let there = [&one, &two, &three].map(|digest| bench.path(digest).exists());
    assert_eq!(there, [true, false, true]);
    let large = bench.put(&vec![4; 11 << 20]);
    assert!(!bench.path(&large).exists());
    assert!(bench.problem().contains("are more than the"), "{}", bench.problem());
    assert_eq!(bench.names(), 2, "nothing was removed for it");
}

#[test]
fn a_disk_that_others_fill_keeps_nothing_and_says_so() {
    let bench = Bench::small(4 << 20);
    bench.cache.warm_up();
    let mut foreign = File::create(bench.dir.path().join("foreign")).expect("create");
    foreign.write_all(&vec![1; 7 << 19]).expect("fill");
    let digest = bench.put(&vec![2; 1 << 20]);
    assert_eq!(bench.get(&digest, 1 << 20), None);
    assert!(bench.problem().contains("do not fit"), "{}", bench.problem());
    assert_eq!(bench.names(), 0);
}

#[test]
fn a_disk_that_becomes_read_only_is_still_read_and_its_damaged_blobs_are_not() {
    let bench = Bench::small(4 << 20);
    let (good, bad) = (bench.put(b"good"), bench.put(b"bad!"));
    mount_remount(bench.dir.path(), MountFlags::RDONLY, c"").expect("remount");
    let again = Bench { cache: Cache::in_directory(bench.dir.path()), dir: bench.dir };
    assert_eq!(again.get(&good, 4).as_deref(), Some(&b"good"[..]));
    assert_eq!(again.put(b"new"), Digest::of(b"new"));
    assert_eq!(again.get(&Digest::of(b"new"), 3), None);
    assert!(again.problem().contains("Read-only"), "{}", again.problem());
    again.cache.forget(&bad, "a test says so");
    assert_eq!(again.get(&bad, 4), None, "it is not read again although it is there");
    assert!(again.problem().contains("cannot remove a damaged blob"), "{}", again.problem());
}

#[test]
fn a_place_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("file");
    fs::write(&file, "").expect("file");
    let cache = Cache::in_directory(&file);
    assert!(cache.writer(&Digest::of(b"x"), 1).is_none());
    let problem = cache.status().expect("status").problem.expect("problem");
    assert!(problem.contains("cannot be used"), "{problem}");
    let none = Cache::on_disk("no-such-label-16", &dir.path().join("at"));
    assert!(none.blob(&Digest::of(b"x"), 1).is_none());
    assert_eq!(none.status(), None, "no disk is no problem");
}
