//! The chosen modules as they lie in the image: each compressed on its own, so that a node holds no more than that of a driver it does
//! not load, but for those that are needed before there is an address.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::cache::Cache;
use super::{BuildError, size};
use crate::Notice;
use crate::compress::Compression;
use crate::modules::files::{self, FilesError};
use crate::modules::{Module, Selection};

/// How a module is compressed: once for every version of it, and unpacked at most once on a node.
const HOW: Compression = Compression::SMALL;
/// Most compressed modules that are kept: some kernels' worth.
const KEEP: usize = 4096;

/// Which modules stay as they are, besides those that are needed before there is an address.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stay {
    /// All of them.
    All,
    /// Those that have fewer bytes.
    Below(u64),
}

/// The modules of an image.
#[derive(Debug)]
pub(super) struct Ready {
    /// Path below `lib/modules/VERSION` and contents of each, in order of their names.
    pub(super) files: Vec<(String, Vec<u8>)>,
    /// Size of all of them before compression, in bytes.
    pub(super) size: u64,
}

/// What is known of a module at first sight.
#[derive(Debug)]
enum Found {
    /// It stays as it is.
    Plain(Vec<u8>),
    /// It was compressed before; and its size without that.
    Packed(Vec<u8>, u64),
    /// It is to be compressed, and kept under this name.
    Missing { plain: Vec<u8>, name: String },
}

/// Reads the chosen modules below `dir`, a `lib/modules/VERSION` directory, compresses those that do not stay, and tells the selection
/// which those are. `packed` is where they are kept from one build to the next, by the contents of the file they came out of.
pub(super) fn ready(
    dir: &Path,
    selection: &mut Selection,
    stay: Stay,
    packed: &Path,
    notice: Notice<'_>,
) -> Result<Ready, BuildError> {
    let cache = Cache::new(packed.join("modules"), KEEP);
    let chosen: Vec<&Module> = selection.modules.values().collect();
    let found = each(&chosen, |module| {
        let stay = if selection.plain.contains(&module.name) { Stay::All } else { stay };
        look(&dir.join(&module.file), stay, &cache)
    })?;
    let missing = found.iter().filter(|it| matches!(it, Found::Missing { .. })).count();
    if missing > 0 {
        notice(&format!("compressing {missing} modules ({HOW})"));
    }
    let made = each(&found, |found| match found {
        Found::Missing { plain, name } => {
            let bytes = HOW.compress(plain.clone());
            let bytes = bytes.map_err(|source| BuildError::Compress { how: HOW, source })?;
            cache.put(name, &bytes)?;
            Ok(bytes)
        }
        Found::Plain(_) | Found::Packed(..) => Ok(Vec::new()),
    })?;
    if missing > 0 {
        cache.prune()?;
    }
    let mut all = Vec::with_capacity(found.len());
    let (mut total, mut compressed) = (0, Vec::new());
    for ((module, found), made) in chosen.iter().zip(found).zip(made) {
        let (bytes, plain_size, is_plain) = match found {
            Found::Plain(bytes) => {
                let size = size(&bytes);
                (bytes, size, true)
            }
            Found::Packed(bytes, plain_size) => (bytes, plain_size, false),
            Found::Missing { plain, .. } => (made, size(&plain), false),
        };
        total += plain_size;
        compressed.extend((!is_plain).then(|| module.name.clone()));
        all.push(bytes);
    }
    selection.compressed = compressed.into_iter().collect();
    let places = selection.modules.values().map(|module| selection.place(module));
    Ok(Ready { files: places.zip(all).collect(), size: total })
}

/// A module's file, and what is kept of it.
fn look(path: &Path, stay: Stay, cache: &Cache) -> Result<Found, BuildError> {
    let fail = |source| FilesError::Read { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(fail)?;
    let extension = path.extension().and_then(|name| name.to_str()).unwrap_or_default();
    let name = format!("{}-of-{extension}", Cache::name(&bytes, HOW));
    if let Stay::Below(least) = stay
        && let Some(packed) = cache.get(&name)
        && let Ok(Some(size)) = zstd::zstd_safe::get_frame_content_size(&packed)
        && size >= least
    {
        return Ok(Found::Packed(packed, size));
    }
    let plain = files::unpack(extension, bytes).map_err(fail)?;
    Ok(match stay {
        Stay::Below(least) if size(&plain) >= least => Found::Missing { plain, name },
        _ => Found::Plain(plain),
    })
}

/// Does this work for each, on as many threads as there are processors, and gives what came of it in the same order.
fn each<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, BuildError> + Sync,
) -> Result<Vec<R>, BuildError> {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return Ok::<_, BuildError>(done) };
            done.push((index, work(item)?));
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from).min(items.len());
    thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(run)).collect();
        let mut all = Vec::with_capacity(items.len());
        for thread in threads {
            let died = |_| BuildError::Io {
                path: "lib/modules".into(),
                source: io::Error::other("a thread that worked on it died"),
            };
            all.extend(thread.join().map_err(died)??);
        }
        all.sort_by_key(|(index, _)| *index);
        Ok(all.into_iter().map(|(_, result)| result).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Modules of some sizes, one of them compressed by whoever made the kernel.
    fn fixture() -> (tempfile::TempDir, Selection) {
        let dir = tempfile::tempdir().unwrap();
        let mut selection = Selection::default();
        for (name, file, length) in
            [("big", "big.ko.zst", 9000), ("near", "near.ko", 5000), ("small", "small.ko", 50)]
        {
            let plain = name.as_bytes().repeat(length / name.len());
            let bytes =
                if file.ends_with("zst") { zstd::encode_all(&*plain, 1).unwrap() } else { plain };
            fs::write(dir.path().join(file), bytes).unwrap();
            let module = Module {
                name: name.to_owned(),
                path: format!("{name}.ko"),
                file: file.to_owned(),
                ..Module::default()
            };
            selection.modules.insert(name.to_owned(), module);
        }
        (dir, selection)
    }

    /// Paths in the image, and how many were compressed now. Every file holds what it should.
    fn run(dir: &Path, selection: &mut Selection, stay: Stay) -> (String, usize) {
        let made = std::cell::Cell::new(0);
        let notice = |text: &str| {
            made.set(text.split(' ').nth(1).and_then(|count| count.parse().ok()).unwrap());
        };
        let ready = ready(dir, selection, stay, &dir.join("cache"), &notice).unwrap();
        let mut sizes = 0;
        for (path, bytes) in &ready.files {
            let plain = files::unpack(path.rsplit('.').next().unwrap(), bytes.clone()).unwrap();
            let name = path.split('.').next().unwrap();
            assert!(plain.starts_with(name.as_bytes()), "{path}");
            sizes += plain.len();
        }
        assert_eq!(ready.size, size(&vec![0; sizes]));
        let paths: Vec<_> = ready.files.into_iter().map(|(path, _)| path).collect();
        (paths.join(" "), made.get())
    }

    #[test]
    fn modules_are_compressed_but_for_those_that_stay() {
        let (dir, mut selection) = fixture();
        let cases = [
            (Stay::All, "big.ko near.ko small.ko", 0),
            (Stay::Below(6000), "big.ko.zst near.ko small.ko", 1),
            (Stay::Below(0), "big.ko.zst near.ko.zst small.ko.zst", 2),
            (Stay::Below(0), "big.ko.zst near.ko.zst small.ko.zst", 0),
            (Stay::Below(6000), "big.ko.zst near.ko small.ko", 0),
        ];
        for (stay, paths, made) in cases {
            assert_eq!(run(dir.path(), &mut selection, stay), (paths.to_owned(), made), "{stay:?}");
        }
        selection.plain.insert("big".to_owned());
        let (paths, _) = run(dir.path(), &mut selection, Stay::Below(0));
        assert_eq!(paths, "big.ko near.ko.zst small.ko.zst");
    }

    #[test]
    fn what_was_kept_and_spoilt_is_made_again() {
        let (dir, mut selection) = fixture();
        assert_eq!(run(dir.path(), &mut selection, Stay::Below(0)).1, 3);
        let kept = dir.path().join("cache/modules");
        let mut cut = 0;
        for entry in fs::read_dir(&kept).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = fs::read(&path).unwrap();
            match cut {
                0 => bytes[6] ^= 1,
                1 => bytes.truncate(30),
                _ => continue,
            }
            fs::write(&path, bytes).unwrap();
            cut += 1;
        }
        assert_eq!(run(dir.path(), &mut selection, Stay::Below(0)).1, 2);
        assert_eq!(run(dir.path(), &mut selection, Stay::Below(0)).1, 0);
    }

    #[test]
    fn a_module_that_is_gone_is_named() {
        let (dir, mut selection) = fixture();
        fs::remove_file(dir.path().join("near.ko")).unwrap();
        let error = ready(dir.path(), &mut selection, Stay::Below(0), dir.path(), &|_| ());
        assert!(error.unwrap_err().to_string().ends_with("near.ko"));
    }
}
