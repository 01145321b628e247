//! The files of the kernel cache that more than one build may want: locks, directories of work, and what is old. It compiles nothing.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tempfile::TempDir;

use super::{SourceError, io_error};
use crate::Notice;

/// How directories of work begin. A name and a dot follow: the holder of that name's lock may remove what others have left.
const WORK: &str = "unpack-";
/// Entries of one kind that are kept, those that were used last.
const KEEP: usize = 6;

/// The objects of one flavour, this process's own until it is dropped.
#[derive(Debug)]
pub(super) struct Objects {
    /// Where they are.
    pub(super) dir: PathBuf,
    cache: PathBuf,
    name: String,
    lock: File,
}

impl Objects {
    /// Waits until no other build uses them.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn take(
        cache: &Path,
        flavour: &str,
        notice: Notice<'_>,
    ) -> Result<Self, SourceError> {
        let name = format!("objects-{flavour}");
        let lock = lock(cache, &name, notice)?;
        Ok(Self { dir: cache.join(&name), cache: cache.to_owned(), name, lock })
    }

    /// The lock, for a program that works on them: it must hold it as long as it lives, whatever becomes of this process
    /// (flock(2) ends with the last descriptor). It is an empty file.
    ///
    /// # Errors
    /// There are too many open files.
    pub(super) fn hold(&self) -> io::Result<File> {
        self.lock.try_clone()
    }

    /// A directory of work beside the cache's entries, so that a finished one is renamed into its place.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn work(&self) -> Result<TempDir, SourceError> {
        work(&self.cache, &self.name)
    }
}

/// Keeps other builds from what `name` stands for until the file is dropped; says so where it has to wait.
pub(super) fn lock(cache: &Path, name: &str, notice: Notice<'_>) -> Result<File, SourceError> {
    let path = cache.join(format!("{name}.lock"));
    let fail = io_error(&path);
    fs::create_dir_all(cache).map_err(io_error(cache))?;
    let file = File::create(&path).map_err(&fail)?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {
            notice(&format!("waiting for another build that uses {name} in {}", cache.display()));
        }
        Err(TryLockError::Error(error)) => return Err(fail(error)),
    }
    file.lock().map_err(fail)?;
    Ok(file)
}

/// A directory of work for the holder of the lock `name`. What killed holders have left is removed.
pub(super) fn work(cache: &Path, name: &str) -> Result<TempDir, SourceError> {
    let prefix = format!("{WORK}{name}.");
    let fail = io_error(cache);
    for path in entries(cache, &prefix).map_err(&fail)? {
        fs::remove_dir_all(&path).map_err(io_error(&path))?;
    }
    tempfile::Builder::new().prefix(&prefix).tempdir_in(cache).map_err(fail)
}

/// Whether a file of the cache is there; if so, it counts as used now.
pub(super) fn used(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    // Whoever may only read this cache uses it all the same.
    let _ = file.set_modified(SystemTime::now());
    true
}

/// Removes the entries whose names begin so, but for those that were used last.
pub(super) fn prune(cache: &Path, prefix: &str) -> io::Result<()> {
    // Of `built-virt-KEY`, not of `built-virt-debug-KEY`.
    let of_this_kind = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix(prefix).is_some_and(|key| !key.contains('-'))
    };
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for path in entries(cache, prefix)?.into_iter().filter(of_this_kind) {
        let record = path.join("record.json");
        let file = if record.exists() { &record } else { &path };
        found.push((fs::metadata(file)?.modified()?, path));
    }
    found.sort_by(|a, b| b.cmp(a));
    found.iter().skip(KEEP).try_for_each(|(_, path)| {
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
    })
}

fn entries(cache: &Path, prefix: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn two_builds_of_one_flavour_wait_for_each_other_and_say_so() {
        let cache = tempfile::tempdir().unwrap();
        let first = Objects::take(cache.path(), "virt", &|_| ()).unwrap();
        // Another flavour is not kept waiting.
        let heard = RefCell::new(Vec::new());
        Objects::take(cache.path(), "hw", &|text| heard.borrow_mut().push(text.to_owned()))
            .unwrap();
        assert!(heard.borrow().is_empty());
        let (send, said) = mpsc::channel();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                let notice = move |text: &str| send.send(text.to_owned()).unwrap();
                Objects::take(cache.path(), "virt", &notice).unwrap().dir
            });
            let said = said.recv_timeout(Duration::from_secs(20)).unwrap();
            assert!(said.starts_with("waiting for another build that uses objects-virt"), "{said}");
            drop(first);
            assert_eq!(second.join().unwrap(), cache.path().join("objects-virt"));
        });
    }

    #[test]
    fn a_program_that_outlives_the_build_keeps_the_objects() {
        let cache = tempfile::tempdir().unwrap();
        let objects = Objects::take(cache.path(), "virt", &|_| ()).unwrap();
        let (outlives, inherited) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut program = std::process::Command::new("cat")
            .stdin(std::os::fd::OwnedFd::from(inherited))
            .stderr(objects.hold().unwrap())
            .spawn()
            .unwrap();
        drop(objects);
        let file = File::open(cache.path().join("objects-virt.lock")).unwrap();
        assert!(matches!(file.try_lock(), Err(TryLockError::WouldBlock)));
        drop(outlives);
        assert!(program.wait().unwrap().success());
        file.try_lock().unwrap();
    }

    #[test]
    fn work_that_was_left_is_removed_by_the_holder_of_its_lock_only() {
        let cache = tempfile::tempdir().unwrap();
        for name in
            ["unpack-objects-virt.old", "unpack-objects-virt-debug.old", "unpack-source.old"]
        {
            fs::create_dir(cache.path().join(name)).unwrap();
        }
        let _work = work(cache.path(), "objects-virt").unwrap();
        let there = |name: &str| cache.path().join(name).exists();
        assert!(!there("unpack-objects-virt.old"));
        assert!(there("unpack-objects-virt-debug.old") && there("unpack-source.old"));
    }

    #[test]
    fn what_was_used_last_stays() {
        let cache = tempfile::tempdir().unwrap();
        let old = SystemTime::UNIX_EPOCH;
        for index in 0..KEEP + 2 {
            let dir = cache.path().join(format!("built-virt-{index}"));
            fs::create_dir(&dir).unwrap();
            let record = File::create(dir.join("record.json")).unwrap();
            record.set_modified(old + Duration::from_secs(u64::try_from(index).unwrap())).unwrap();
        }
        fs::write(cache.path().join("built-virt-debug-0"), "").unwrap();
        assert!(used(&cache.path().join("built-virt-0/record.json")));
        assert!(!used(&cache.path().join("built-virt-9/record.json")));
        prune(cache.path(), "built-virt-").unwrap();
        let there = |name: &str| cache.path().join(name).exists();
        assert!(there("built-virt-0") && there("built-virt-7") && there("built-virt-debug-0"));
        assert!(!there("built-virt-1") && !there("built-virt-2") && there("built-virt-3"));
    }
}
