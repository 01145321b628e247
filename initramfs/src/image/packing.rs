//! The tree as the initramfs: cut into archives where that saves work or memory, those compressed, and what was compressed before taken
//! from the cache. In a row:
//!
//! 1. the modules that are compressed one by one, as they are;
//! 2. the other modules, with their index, compressed;
//! 3. everything else, the agent in it, compressed;
//! 4. what is appended, as it is.
//!
//! The first two stay the same, compressed and all, when only the agent changed. A kernel unpacks archives one after the other, so what
//! comes later lies over what came before (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).

use std::path::Path;

use super::BuildError;
use super::cache::Cache;
use super::content::MODULES;
use crate::Notice;
use crate::archive;
use crate::compress::Compression;
use crate::modules::COMPRESSED;
use crate::tree::{Kind, Tree};

/// Bytes of modules that are not compressed one by one from which on they are an archive of their own.
const APART: usize = 256 << 10;
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
    let cache = Cache::new(cache.join("compressed"), KEEP);
    let mut size = 0;
    let (mut plain, mut archives) = (Vec::new(), Vec::new());
    for (tree, how) in cut(tree, how) {
        let archive = archive::write(&tree, mtime)?;
        size += super::size(&archive);
        plain.push(archive.clone());
        archives.push(compress(archive, how, &cache, notice)?);
    }
    plain.extend(appended.iter().cloned());
    archives.extend(appended);
    Ok(Packed { bytes: archive::join(archives), plain: archive::join(plain), size })
}

/// The archives of a tree, in order, and how each is compressed.
fn cut(tree: Tree, how: Compression) -> Vec<(Tree, Compression)> {
    if how == Compression::None {
        return vec![(tree, how)];
    }
    let inside = format!("{MODULES}/");
    let mut archives = Vec::new();
    let is_packed =
        |path: &str| path.strip_suffix(COMPRESSED).is_some_and(|it| it.ends_with(".ko"));
    let (packed, mut rest) = tree.split(|path| path.starts_with(&inside) && is_packed(path));
    if !packed.is_empty() {
        archives.push((packed, Compression::None));
    }
    let modules = rest.iter().filter(|(path, _)| path.starts_with(&inside));
    let bytes = modules.map(|(_, it)| if let Kind::File(it) = &it.kind { it.len() } else { 0 });
    if bytes.sum::<usize>() >= APART {
        let (modules, others) = rest.split(|path| path.starts_with(&inside));
        archives.push((modules, how));
        rest = others;
    }
    archives.push((rest, how));
    archives
}

/// Compresses an archive, or takes it from the cache if this very archive was compressed before.
fn compress(
    plain: Vec<u8>,
    how: Compression,
    cache: &Cache,
    notice: Notice<'_>,
) -> Result<Vec<u8>, BuildError> {
    let io = |source| BuildError::Compress { how, source };
    if how == Compression::None {
        return how.compress(plain).map_err(io);
    }
    let name = Cache::name(&plain, how);
    if let Some(bytes) = cache.get(&name) {
        return Ok(bytes);
    }
    notice(&format!("compressing {} kB ({how})", plain.len() / 1000));
    let bytes = how.compress(plain).map_err(io)?;
    cache.put(&name, &bytes)?;
    cache.prune()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_cached_archive_that_was_spoilt_is_made_again() {
        let cache = tempfile::tempdir().unwrap();
        let run = || {
            let asked = std::cell::Cell::new(false);
            let notice = |_: &str| asked.set(true);
            let plain = b"archive".to_vec();
            let kept = Cache::new(cache.path().to_owned(), KEEP);
            let bytes = compress(plain, Compression::default(), &kept, &notice).unwrap();
            (bytes, asked.get())
        };
        let (first, made) = run();
        assert!(made);
        assert_eq!(run(), (first.clone(), false));
        let path = fs::read_dir(cache.path()).unwrap().next().unwrap();
        let path = path.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        bytes[3] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(run(), (first, true));
    }

    #[test]
    fn only_the_newest_archives_are_kept() {
        let cache = tempfile::tempdir().unwrap();
        let kept = Cache::new(cache.path().to_owned(), KEEP);
        for byte in 0..20 {
            compress(vec![byte], Compression::Zstd(1), &kept, &|_| ()).unwrap();
        }
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), KEEP);
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

    #[test]
    fn modules_that_are_compressed_are_not_compressed_again_and_the_kernel_finds_every_archive() {
        let mut tree = Tree::new();
        tree.directory("lib/modules", 0o700).unwrap();
        for (path, length) in [
            ("init", 1000),
            ("lib/firmware/a.ko.zst", 9),
            ("lib/modules/6/a.ko", 10),
            ("lib/modules/6/b.ko.zst", 7),
            ("lib/modules/6/c.zst", 5),
        ] {
            tree.file(path, 0o644, path.as_bytes().repeat(length)).unwrap();
        }
        let mut many = tree.clone();
        many.file("lib/modules/6/big.ko", 0o644, vec![7; APART]).unwrap();
        let mut none = tree.clone().split(|path| path.starts_with("lib/")).1;
        none.file("lib/modules/6/modules.dep", 0o644, Vec::new()).unwrap();
        let (zstd, xz) = (Compression::Zstd(1), Compression::Xz(1));
        let cases = [
            (&tree, zstd, "none zstd:1"),
            (&many, zstd, "none zstd:1 zstd:1"),
            (&many, xz, "none xz:1 xz:1"),
            (&many, Compression::None, "none"),
            (&none, zstd, "zstd:1"),
        ];
        let cache = tempfile::tempdir().unwrap();
        for (tree, how, expected) in cases {
            let cuts: Vec<_> = cut(tree.clone(), how).iter().map(|it| it.1.to_string()).collect();
            assert_eq!(cuts.join(" "), expected);
            let mut site = Tree::new();
            site.file("etc/site", 0o600, vec![1]).unwrap();
            let appended = archive::write(&site, 0).unwrap();
            let packed =
                super::pack(tree.clone(), vec![appended], how, 0, cache.path(), &|_| ()).unwrap();
            let found = crate::compress::unpack(&packed.bytes, 4 << 20).unwrap();
            let mut last = std::collections::BTreeMap::new();
            for entry in archive::read_all(&found).unwrap() {
                last.insert(entry.path.clone(), entry);
            }
            for (path, node) in tree.iter().chain(site.iter()) {
                assert_eq!(last[path].mode & 0o7777, node.mode, "{path}");
                if let Kind::File(bytes) = &node.kind {
                    assert!(last[path].contents == *bytes, "{path}");
                }
            }
            let plain = archive::read_all(&packed.plain).unwrap();
            assert_eq!(plain.len(), archive::read_all(&found).unwrap().len());
        }
    }
}
