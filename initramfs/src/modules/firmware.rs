//! Firmware: the files that chosen modules ask the kernel for, found in directories that are laid out as `/lib/firmware`. What
//! asks for what is pure; [`find`] reads.
//!
//! A file may be compressed there. It stays so where the kernel reads that, and is unpacked for one that does not.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protocol::layer0::FirmwareFile;

use super::{Selection, files, glob};
use crate::kernel::kconfig;

/// Where the kernel looks.
pub const DIR: &str = "lib/firmware";
/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 256 << 20;
/// Most files of one directory, and its deepest subdirectory.
const MAX_FILES: usize = 100_000;
const MAX_DEPTH: usize = 16;

/// Why firmware could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// A file or directory could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no firmware.
    #[error("{path} cannot be used as firmware: {reason}")]
    Odd {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
}

/// Which compressed files a kernel's firmware loader reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reads {
    /// `.xz`.
    pub xz: bool,
    /// `.zst`.
    pub zstd: bool,
}

impl Reads {
    /// Out of a kernel's configuration; nothing where that is not known.
    #[must_use]
    pub fn of(config: Option<&str>) -> Self {
        let is_set = |symbol| config.is_some_and(|config| kconfig::is_set(config, symbol));
        let any = is_set("CONFIG_FW_LOADER_COMPRESS");
        // Before Linux 5.19 there was no choice of it: xz.
        let xz = is_set("CONFIG_FW_LOADER_COMPRESS_XZ");
        let zstd = is_set("CONFIG_FW_LOADER_COMPRESS_ZSTD");
        Self { xz: any && (xz || !zstd), zstd: any && zstd }
    }
}

/// What was found: for the image, and for the report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Files by path below [`DIR`]: what they hold.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Everything that modules ask for, with size or without.
    pub report: Vec<FirmwareFile>,
}

/// What the chosen modules ask for: file or pattern, and who asks.
#[must_use]
pub fn asked(selection: &Selection) -> BTreeMap<&str, Vec<&str>> {
    let mut asked: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for module in selection.modules.values() {
        for file in &module.firmware {
            let by = asked.entry(file).or_default();
            if !by.contains(&module.name.as_str()) {
                by.push(&module.name);
            }
        }
    }
    asked
}

/// Takes what the chosen modules ask for out of these directories, the first that has it.
///
/// # Errors
/// A directory or a file in it cannot be read, or a file is a link that leads out of its directory.
pub fn find(selection: &Selection, dirs: &[PathBuf], reads: Reads) -> Result<Found, FirmwareError> {
    let dirs = dirs.iter().map(|dir| Place::open(dir)).collect::<Result<Vec<_>, _>>()?;
    let mut found = Found::default();
    for (file, modules) in asked(selection) {
        let names = match file.contains('*') {
            true => matching(&dirs, file),
            false => vec![file.to_owned()],
        };
        let mut size = None;
        for name in names {
            if let Some((path, bytes)) = take(&dirs, &name, reads)? {
                let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                size = Some(size.unwrap_or(0) + length);
                found.files.insert(path, bytes);
            }
        }
        let modules = modules.into_iter().map(str::to_owned).collect();
        found.report.push(FirmwareFile { file: file.to_owned(), modules, size });
    }
    Ok(found)
}

/// A directory with all that is in it, by path: names below it with what they are read from.
struct Place {
    root: PathBuf,
    names: BTreeMap<String, PathBuf>,
}

impl Place {
    fn open(dir: &Path) -> Result<Self, FirmwareError> {
        let fail = |source| FirmwareError::Read { path: dir.to_owned(), source };
        // A whole system's tree does as well.
        let inside = [DIR, "usr/lib/firmware"].map(|inside| dir.join(inside));
        let dir = inside.iter().find(|dir| dir.is_dir()).map_or(dir, PathBuf::as_path);
        let mut place = Self { root: fs::canonicalize(dir).map_err(fail)?, names: BTreeMap::new() };
        let root = place.root.clone();
        place.walk(&root, "", 0)?;
        Ok(place)
    }

    fn walk(&mut self, dir: &Path, below: &str, depth: usize) -> Result<(), FirmwareError> {
        let fail = |source| FirmwareError::Read { path: dir.to_owned(), source };
        for entry in fs::read_dir(dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let path = entry.path();
            let odd = |reason| Err(FirmwareError::Odd { path: entry.path(), reason });
            let name = entry.file_name();
            let Some(name) = name.to_str() else { return odd("its name is not UTF-8") };
            let name = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
            // Firmware packages are full of links, to files and to directories. One that leads nowhere is of no use here.
            let Ok(real) = fs::canonicalize(&path) else { continue };
            if real.is_dir() {
                // A link back up, or out of here.
                if path.starts_with(&real) && path != real || !real.starts_with(&self.root) {
                    continue;
                }
                if depth >= MAX_DEPTH {
                    return odd("it is too deep");
                }
                self.walk(&path, &name, depth + 1)?;
            } else if self.names.len() >= MAX_FILES {
                return odd("there are over 100000 files");
            } else {
                self.names.insert(name, real);
            }
        }
        Ok(())
    }
}

fn matching(dirs: &[Place], pattern: &str) -> Vec<String> {
    let names = dirs.iter().flat_map(|dir| dir.names.keys()).map(|name| files::plain_path(name));
    let mut names: Vec<_> =
        names.filter(|name| glob::matches(pattern, name)).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    names
}

/// The file and its name in the image.
fn take(
    dirs: &[Place],
    name: &str,
    reads: Reads,
) -> Result<Option<(String, Vec<u8>)>, FirmwareError> {
    for dir in dirs {
        for (suffix, kept) in [("", true), (".zst", reads.zstd), (".xz", reads.xz)] {
            let packed = format!("{name}{suffix}");
            let Some(path) = dir.names.get(&packed) else { continue };
            if !path.starts_with(&dir.root) {
                let reason = "it is a link that leads out of its directory";
                return Err(FirmwareError::Odd { path: dir.root.join(packed), reason });
            }
            let fail = |source| FirmwareError::Read { path: path.clone(), source };
            if fs::metadata(path).map_err(fail)?.len() > MAX_FILE {
                let reason = "it is larger than 256 MiB";
                return Err(FirmwareError::Odd { path: path.clone(), reason });
            }
            let bytes = fs::read(path).map_err(fail)?;
            if kept {
                return Ok(Some((packed, bytes)));
            }
            let extension = suffix.trim_start_matches('.');
            return Ok(Some((name.to_owned(), files::unpack(extension, bytes).map_err(fail)?)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::Module;

    fn selection(modules: &[(&str, &[&str])]) -> Selection {
        let module = |(name, files): &(&str, &[&str])| {
            let firmware = files.iter().map(|file| (*file).to_owned()).collect();
            ((*name).to_owned(), Module { name: (*name).to_owned(), firmware, ..Module::default() })
        };
        Selection { modules: modules.iter().map(module).collect(), ..Selection::default() }
    }

    fn place(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        dir
    }

    fn packed() -> Vec<u8> {
        zstd::encode_all(b"plain".as_slice(), 1).unwrap()
    }

    #[test]
    fn the_report_has_who_asks_for_what_and_whether_it_is_there() {
        let dir = place(&[("bnx2x/e2.fw", b"12345")]);
        let selection =
            selection(&[("bnx2x", &["bnx2x/e2.fw", "bnx2x/e1.fw"]), ("other", &["bnx2x/e2.fw"])]);
        let found = find(&selection, &[dir.path().to_owned()], Reads::default()).unwrap();
        let entry = |file: &str, modules: &[&str], size| FirmwareFile {
            file: file.to_owned(),
            modules: modules.iter().map(|name| (*name).to_owned()).collect(),
            size,
        };
        let expected = [
            entry("bnx2x/e1.fw", &["bnx2x"], None),
            entry("bnx2x/e2.fw", &["bnx2x", "other"], Some(5)),
        ];
        assert_eq!(found.report, expected);
        assert_eq!(found.files.into_keys().collect::<Vec<_>>(), ["bnx2x/e2.fw"]);
    }

    #[test]
    fn compressed_files_stay_so_only_for_a_kernel_that_reads_them() {
        let dir = place(&[("usr/lib/firmware/a.bin.zst", &packed())]);
        let run = |config: &str| {
            let dirs = [dir.path().to_owned()];
            find(&selection(&[("a", &["a.bin"])]), &dirs, Reads::of(Some(config))).unwrap().files
        };
        assert_eq!(run(""), [("a.bin".to_owned(), b"plain".to_vec())].into());
        let xz = "CONFIG_FW_LOADER_COMPRESS=y\nCONFIG_FW_LOADER_COMPRESS_XZ=y\n";
        assert_eq!(run(xz), [("a.bin".to_owned(), b"plain".to_vec())].into());
        let both = format!("{xz}CONFIG_FW_LOADER_COMPRESS_ZSTD=y\n");
        assert_eq!(run(&both), [("a.bin.zst".to_owned(), packed())].into());
    }

    #[test]
    fn patterns_take_all_they_match_and_the_first_directory_wins() {
        let first = place(&[("brcm/a-one.bin", b"first")]);
        let second = place(&[("brcm/a-one.bin", b"second"), ("brcm/a-two.bin", b"two")]);
        let dirs = [first.path().to_owned(), second.path().to_owned()];
        let found = find(&selection(&[("b", &["brcm/a-*.bin"])]), &dirs, Reads::default()).unwrap();
        assert_eq!(found.files["brcm/a-one.bin"], b"first");
        assert_eq!(found.report[0].size, Some(8));
    }

    #[test]
    fn links_are_followed_inside_the_directory_and_refused_outside() {
        let outside = place(&[("secret", b"key")]);
        let dir = place(&[("real/x.fw", b"x")]);
        std::os::unix::fs::symlink("real", dir.path().join("alias")).unwrap();
        std::os::unix::fs::symlink(".", dir.path().join("self")).unwrap();
        std::os::unix::fs::symlink("/usr", dir.path().join("usr-of-host")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("dangling.fw")).unwrap();
        let secret = outside.path().join("secret");
        std::os::unix::fs::symlink(secret, dir.path().join("y.fw")).unwrap();
        let run = |file: &str| {
            find(&selection(&[("m", &[file])]), &[dir.path().to_owned()], Reads::default())
        };
        assert_eq!(run("alias/x.fw").unwrap().files["alias/x.fw"], b"x");
        assert!(run("dangling.fw").unwrap().files.is_empty());
        let error = run("y.fw").unwrap_err().to_string();
        assert!(error.ends_with("leads out of its directory"), "{error}");
    }
}
