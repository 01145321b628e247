//! Module files on disk: found, decompressed, described. The only part of [`crate::modules`] that reads files.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;

use super::{Catalogue, Module};
use crate::elf::ElfError;

/// Largest module that is read, uncompressed, in bytes. The largest in use (amdgpu) has some 30 MB.
const MAX_MODULE: u64 = 256 << 20;
/// Memory the xz decoder may use, in KiB. Debian's modules need 8 MiB at most.
const XZ_MEMORY_KIB: u32 = 128 << 10;
/// Most module files of one kernel.
const MAX_FILES: usize = 100_000;
/// Deepest directory below `lib/modules/VERSION`.
const MAX_DEPTH: usize = 32;

/// Why a kernel's modules could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file or directory could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file's name is no UTF-8, or there are too many files, or too deep.
    #[error("{path} cannot be used: {reason}")]
    Odd {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// A file is no kernel module.
    #[error("{path} is no kernel module")]
    Module {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: ElfError,
    },
}

/// Path of a module without the suffix of its compression.
#[must_use]
pub fn plain_path(file: &str) -> &str {
    let known = [".xz", ".zst", ".gz"];
    known.iter().find_map(|suffix| file.strip_suffix(suffix)).unwrap_or(file)
}

/// Reads a module, decompressed.
///
/// # Errors
/// It cannot be read or decompressed, or is larger than any module is.
pub fn read(path: &Path) -> Result<Vec<u8>, FilesError> {
    let fail = |source| FilesError::Read { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(fail)?;
    let name = path.extension().and_then(|name| name.to_str()).unwrap_or_default();
    unpack(name, bytes).map_err(fail)
}

/// Decompresses what a file with this extension holds. Anything that is not `xz`, `zst` or `gz` stays as it is.
///
/// # Errors
/// The bytes are not of that format, or unpack to more than 256 MiB.
pub fn unpack(extension: &str, bytes: Vec<u8>) -> io::Result<Vec<u8>> {
    let input = bytes.as_slice();
    match extension {
        "xz" => bounded(lzma_rust2::XzReader::new_mem_limit(input, true, XZ_MEMORY_KIB)),
        "zst" => bounded(zstd::stream::read::Decoder::new(input)?),
        "gz" => bounded(flate2::read::MultiGzDecoder::new(input)),
        _ => Ok(bytes),
    }
}

fn bounded(input: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = input.take(MAX_MODULE + 1).read_to_end(&mut bytes)?;
    if u64::try_from(read).unwrap_or(u64::MAX) > MAX_MODULE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it unpacks to over 256 MiB"));
    }
    Ok(bytes)
}

/// Describes every module below `dir`, a `lib/modules/VERSION` directory, on as many threads as there are processors.
///
/// # Errors
/// A directory or a file cannot be read, or is no module.
pub fn describe(dir: &Path) -> Result<Vec<Module>, FilesError> {
    let mut files = Vec::new();
    walk(dir, "", 0, &mut files)?;
    files.sort();
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let chunk = files.len().div_ceil(workers).max(1);
    thread::scope(|scope| {
        let work: Vec<_> = files
            .chunks(chunk)
            .map(|files| {
                scope.spawn(move || {
                    files.iter().map(|file| describe_one(dir, file)).collect::<Result<Vec<_>, _>>()
                })
            })
            .collect();
        let mut modules = Vec::with_capacity(files.len());
        for worker in work {
            let odd = || FilesError::Odd { path: dir.to_owned(), reason: "a reader of it died" };
            modules.extend(worker.join().map_err(|_| odd())??);
        }
        Ok(modules)
    })
}

fn describe_one(dir: &Path, file: &str) -> Result<Module, FilesError> {
    let path = dir.join(file);
    let bytes = read(&path)?;
    Module::read(file, &bytes).map_err(|source| FilesError::Module { path, source })
}

/// The catalogue of a `lib/modules/VERSION` directory, given what its modules say of themselves.
///
/// # Errors
/// `modules.builtin` is there but cannot be read.
pub fn catalogue(dir: &Path, modules: Vec<Module>) -> Result<Catalogue, FilesError> {
    let builtin = optional(&dir.join("modules.builtin"))?;
    let modinfo = optional(&dir.join("modules.builtin.modinfo"))?;
    Ok(Catalogue::new(modules, &String::from_utf8_lossy(&builtin), &modinfo))
}

/// The contents of a file that need not be there.
///
/// # Errors
/// It is there but cannot be read.
pub fn optional(path: &Path) -> Result<Vec<u8>, FilesError> {
    match fs::read(path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(FilesError::Read { path: path.to_owned(), source }),
    }
}

fn walk(root: &Path, below: &str, depth: usize, files: &mut Vec<String>) -> Result<(), FilesError> {
    let dir = root.join(below);
    let fail = |source| FilesError::Read { path: dir.clone(), source };
    for entry in fs::read_dir(&dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let odd = |reason| Err(FilesError::Odd { path: entry.path(), reason });
        let name = entry.file_name();
        let Some(name) = name.to_str() else { return odd("its name is not UTF-8") };
        let path = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
        // The kind of the entry itself: `build` and `source` are links to the outside.
        let kind = entry.file_type().map_err(fail)?;
        if kind.is_dir() {
            if depth >= MAX_DEPTH {
                return odd("it is too deep");
            }
            walk(root, &path, depth + 1, files)?;
        } else if kind.is_file() && plain_path(name).ends_with(".ko") {
            if files.len() >= MAX_FILES {
                return odd("there are over 100000 modules");
            }
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::elf::fake;

    #[test]
    fn modules_are_found_whatever_they_are_compressed_with() {
        let dir = tempfile::tempdir().unwrap();
        let module = fake::module(&[("depends", "x")]);
        fs::create_dir_all(dir.path().join("kernel/a")).unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
        write("kernel/a/plain.ko", &module);
        write("kernel/a/z.ko.zst", &zstd::encode_all(module.as_slice(), 1).unwrap());
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&module).unwrap();
        write("kernel/a/g.ko.gz", &gz.finish().unwrap());
        write("modules.builtin", b"kernel/b.ko\n");
        std::os::unix::fs::symlink("/", dir.path().join("build")).unwrap();
        let found = describe(dir.path()).unwrap();
        let names: Vec<_> = found.iter().map(|module| module.path.as_str()).collect();
        assert_eq!(names, ["kernel/a/g.ko", "kernel/a/plain.ko", "kernel/a/z.ko"]);
        assert!(found.iter().all(|module| module.depends == ["x"]));
    }

    #[test]
    fn a_file_that_is_no_module_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x.ko"), b"text").unwrap();
        let error = describe(dir.path()).unwrap_err();
        assert!(error.to_string().ends_with("x.ko is no kernel module"), "{error}");
    }

    proptest! {
        #[test]
        fn unpacking_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for (extension, magic) in [("xz", b"\xfd7zXZ\0".as_slice()), ("zst", b"\x28\xb5\x2f\xfd"), ("gz", b"\x1f\x8b")] {
                let _ = unpack(extension, bytes.clone());
                let _ = unpack(extension, [magic, bytes.as_slice()].concat());
            }
        }
    }
}
