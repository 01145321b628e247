//! The tree as the initramfs: cut in two where that saves work, compressed, and what was compressed before taken from the cache.
//!
//! The modules are an archive of their own in front: it stays the same, compressed and all, when only the agent changed. A kernel
//! unpacks archives one after the other, so what comes later lies over what came before.

use std::fs;
use std::path::Path;

use protocol::ids::Digest;

use super::content::MODULES;
use super::output::{prune, replace};
use super::{BuildError, fail};
use crate::Notice;
use crate::archive;
use crate::compress::Compression;
use crate::tree::Tree;

/// Bytes of modules from which on they are an archive of their own.
const APART: usize = 1 << 20;
/// Most compressed archives that are kept; those that were not used for longest go.
const KEEP: usize = 16;

/// An initramfs.
#[derive(Debug)]
pub(super) struct Packed {
    /// As it is booted.
    pub(super) bytes: Vec<u8>,
    /// The same before compression.
    pub(super) plain: Vec<u8>,
    /// Its size before compression, in bytes, without archives that are appended.
    pub(super) size: u64,
}

/// Packs a tree, and puts these archives behind it as they are.
pub(super) fn pack(
    tree: Tree,
    appended: Vec<Vec<u8>>,
    how: Compression,
    mtime: u32,
    cache: &Path,
    notice: Notice<'_>,
) -> Result<Packed, BuildError> {
    let (modules, rest) = tree.clone().split(MODULES);
    let trees = if modules.bytes() >= APART { vec![modules, rest] } else { vec![tree] };
    let mut size = 0;
    let (mut plain, mut archives) = (Vec::new(), Vec::new());
    for tree in trees {
        let archive = archive::write(&tree, mtime)?;
        size += super::size(&archive);
        plain.push(archive.clone());
        archives.push(compress(archive, how, cache, notice)?);
    }
    plain.extend(appended.iter().cloned());
    archives.extend(appended);
    Ok(Packed { bytes: archive::join(archives), plain: archive::join(plain), size })
}

/// Compresses an archive, or takes it from the cache if this very archive was compressed before.
fn compress(
    plain: Vec<u8>,
    how: Compression,
    cache: &Path,
    notice: Notice<'_>,
) -> Result<Vec<u8>, BuildError> {
    let io = |source| BuildError::Compress { how, source };
    if how == Compression::None {
        return how.compress(plain).map_err(io);
    }
    let dir = cache.join("compressed");
    let path =
        dir.join(format!("{}-{}", Digest::of(&plain).hex(), how.to_string().replace(':', "")));
    if let Ok(bytes) = fs::read(&path)
        && let Some(bytes) = unseal(bytes)
    {
        // So that what is in use is the last to go; one that cannot be touched merely goes earlier.
        let _ = fs::File::options()
            .append(true)
            .open(&path)
            .and_then(|file| file.set_modified(std::time::SystemTime::now()));
        return Ok(bytes);
    }
    notice(&format!("compressing {} kB ({how})", plain.len() / 1000));
    let bytes = how.compress(plain).map_err(io)?;
    let fail = fail(&dir);
    fs::create_dir_all(&dir).map_err(&fail)?;
    replace(&path, &[bytes.as_slice(), Digest::of(&bytes).to_string().as_bytes()])?;
    prune(&dir, KEEP).map_err(&fail)?;
    Ok(bytes)
}

/// Takes the digest off the end of a cached file, and gives nothing if it is not the digest of the rest.
fn unseal(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let seal = bytes.split_off(bytes.len().checked_sub(Digest::of(&[]).to_string().len())?);
    (seal == Digest::of(&bytes).to_string().as_bytes()).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_archive_that_was_spoilt_is_made_again() {
        let cache = tempfile::tempdir().unwrap();
        let run = || {
            let asked = std::cell::Cell::new(false);
            let notice = |_: &str| asked.set(true);
            let plain = b"archive".to_vec();
            let bytes = compress(plain, Compression::default(), cache.path(), &notice).unwrap();
            (bytes, asked.get())
        };
        let (first, made) = run();
        assert!(made);
        assert_eq!(run(), (first.clone(), false));
        let path = fs::read_dir(cache.path().join("compressed")).unwrap().next().unwrap();
        let path = path.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        bytes[3] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(run(), (first, true));
    }

    #[test]
    fn only_the_newest_archives_are_kept() {
        let cache = tempfile::tempdir().unwrap();
        for byte in 0..20 {
            compress(vec![byte], Compression::Zstd(1), cache.path(), &|_| ()).unwrap();
        }
        assert_eq!(fs::read_dir(cache.path().join("compressed")).unwrap().count(), KEEP);
    }

    #[test]
    fn a_change_of_the_agent_leaves_the_modules_packed() {
        let cache = tempfile::tempdir().unwrap();
        let pack = |agent: &[u8]| {
            let mut tree = Tree::new();
            tree.file("init", 0o755, agent.to_vec()).unwrap();
            tree.file("lib/modules/6/a.ko", 0o644, vec![7; APART]).unwrap();
            let said = std::cell::RefCell::new(Vec::new());
            let notice = |text: &str| said.borrow_mut().push(text.to_owned());
            let how = Compression::Zstd(1);
            let packed = super::pack(tree, vec![], how, 0, cache.path(), &notice).unwrap();
            (packed, said.into_inner().len())
        };
        let (first, made) = pack(b"one");
        assert_eq!(made, 2, "modules and the rest");
        let (second, made) = pack(b"two");
        assert_eq!(made, 1, "the rest");
        assert_ne!(first.bytes, second.bytes);
        let plain = crate::compress::unpack(&second.bytes, 4 << 20).unwrap();
        let entries = archive::read_all(&plain).unwrap();
        let last = entries.iter().rfind(|entry| entry.path == "init").unwrap();
        assert_eq!(last.contents, b"two");
        assert!(entries.iter().any(|entry| entry.path == "lib/modules/6/a.ko"));
    }
}
