//! A Debian kernel package unpacked: ar, a compressed tar, and of that only the kernel, its configuration and its modules
//! (deb(5)). Bounded; nothing is written outside the directory it is given.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Component, Path, PathBuf};

/// Most bytes one package may unpack to. Debian's largest kernel package has 120 MB of compressed modules.
const MAX_BYTES: u64 = 8 << 30;
/// Most entries one package may hold.
const MAX_ENTRIES: usize = 200_000;
/// Memory the xz decoder may use, in KiB.
const XZ_MEMORY_KIB: u32 = 256 << 10;

/// Why a package could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum DebError {
    /// The package, or what is in it, could not be read.
    #[error("cannot unpack {path}")]
    Unpack {
        /// The package.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The package is not what a kernel package looks like.
    #[error("{path} is not a kernel package: {reason}")]
    Odd {
        /// The package.
        path: PathBuf,
        /// What is missing or too much.
        reason: &'static str,
    },
}

/// Where something of a package goes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// The kernel image of this release.
    Image(String),
    /// Its configuration.
    Config,
    /// A file below `lib/modules/VERSION`.
    Module(PathBuf),
}

/// Unpacks a kernel package: `vmlinuz`, `config` and `modules/` (what is in `lib/modules/VERSION`) in `into`. Returns the
/// kernel's release as the package names it.
///
/// # Errors
/// It is not a Debian package, is cut or too large, or has no kernel or no modules in it.
pub fn unpack(package: &Path, into: &Path) -> Result<String, DebError> {
    let odd = |reason| DebError::Odd { path: package.to_owned(), reason };
    let fail = |source| DebError::Unpack { path: package.to_owned(), source };
    let file = File::open(package).map_err(fail)?;
    let mut outer = ar::Archive::new(BufReader::new(file));
    while let Some(member) = outer.next_entry() {
        let member = member.map_err(fail)?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        let Some(form) = name.trim_end_matches('/').strip_prefix("data.tar") else { continue };
        let data: Box<dyn Read> = match form {
            "" => Box::new(member),
            ".xz" => Box::new(lzma_rust2::XzReader::new_mem_limit(member, true, XZ_MEMORY_KIB)),
            ".zst" => Box::new(zstd::stream::read::Decoder::new(member).map_err(fail)?),
            ".gz" => Box::new(flate2::read::MultiGzDecoder::new(member)),
            _ => return Err(odd("its data is compressed in an unknown way")),
        };
        let found = unpack_tar(data, into).map_err(fail)?;
        let release = found.release.ok_or_else(|| odd("it has no boot/vmlinuz-VERSION"))?;
        if found.modules == 0 {
            return Err(odd("it has no modules"));
        }
        return Ok(release);
    }
    Err(odd("it has no data.tar"))
}

#[derive(Debug, Default)]
struct Found {
    release: Option<String>,
    modules: usize,
}

fn unpack_tar(data: impl Read, into: &Path) -> io::Result<Found> {
    let mut found = Found::default();
    let mut budget = MAX_BYTES;
    let too_large = || io::Error::new(io::ErrorKind::InvalidData, "it unpacks to too much");
    let mut archive = tar::Archive::new(data);
    for (count, entry) in archive.entries()?.enumerate() {
        let mut entry = entry?;
        budget = budget.checked_sub(entry.size()).ok_or_else(too_large)?;
        if count >= MAX_ENTRIES {
            return Err(too_large());
        }
        if entry.header().entry_type() != tar::EntryType::Regular {
            continue;
        }
        let path = match place(&entry.path()?) {
            None => continue,
            Some(Place::Image(release)) => {
                found.release = Some(release);
                into.join("vmlinuz")
            }
            Some(Place::Config) => into.join("config"),
            Some(Place::Module(path)) => {
                found.modules += 1;
                into.join("modules").join(path)
            }
        };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        io::copy(&mut entry, &mut File::create(&path)?)?;
    }
    Ok(found)
}

fn place(path: &Path) -> Option<Place> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::Normal(part) => parts.push(part.to_str()?),
            _ => return None,
        }
    }
    let parts = match parts.as_slice() {
        ["usr", rest @ ..] => rest,
        all => all,
    };
    match parts {
        ["boot", file] => match file.split_once('-')? {
            ("vmlinuz", release) => Some(Place::Image(release.to_owned())),
            ("config", _) => Some(Place::Config),
            _ => None,
        },
        ["lib", "modules", _, rest @ ..] if !rest.is_empty() => {
            Some(Place::Module(rest.iter().collect()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(paths: &[&str], member: &str) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for path in paths {
            let mut header = tar::Header::new_gnu();
            // Written raw: the crate itself refuses `..`.
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            header.set_size(4);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append(&header, b"data".as_slice()).unwrap();
        }
        let tar = tar.into_inner().unwrap();
        let data = if member.ends_with(".zst") { zstd::encode_all(&*tar, 1).unwrap() } else { tar };
        let mut deb = ar::Builder::new(Vec::new());
        for (name, bytes) in [("debian-binary", b"2.0\n".to_vec()), (member, data)] {
            let size = u64::try_from(bytes.len()).unwrap();
            deb.append(&ar::Header::new(name.into(), size), bytes.as_slice()).unwrap();
        }
        deb.into_inner().unwrap()
    }

    fn run(paths: &[&str], member: &str) -> (tempfile::TempDir, Result<String, DebError>) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        fs::write(dir.path().join("x.deb"), package(paths, member)).unwrap();
        let result = unpack(&dir.path().join("x.deb"), &dir.path().join("out"));
        (dir, result)
    }

    const KERNEL: &str = "./boot/vmlinuz-6.12-x";
    const MODULE: &str = "./lib/modules/6.12-x/kernel/a.ko";

    #[test]
    fn kernel_config_and_modules_are_taken_and_nothing_else() {
        for member in ["data.tar", "data.tar.zst"] {
            let other = ["./boot/config-6.12-x", "./boot/System.map-6.12-x", "./usr/share/doc/x"];
            let (dir, result) = run(&[&[KERNEL, MODULE], other.as_slice()].concat(), member);
            assert_eq!(result.unwrap(), "6.12-x");
            let out = dir.path().join("out");
            let mut names: Vec<_> =
                fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            assert_eq!(names, ["config", "modules", "vmlinuz"]);
            assert_eq!(fs::read(out.join("modules/kernel/a.ko")).unwrap(), b"data");
        }
    }

    #[test]
    fn a_usr_merged_package_is_the_same() {
        let (dir, result) = run(&[KERNEL, "./usr/lib/modules/6.12-x/kernel/a.ko"], "data.tar");
        result.unwrap();
        assert!(dir.path().join("out/modules/kernel/a.ko").exists());
    }

    #[test]
    fn nothing_leaves_the_directory() {
        let (dir, result) =
            run(&[KERNEL, MODULE, "./lib/modules/6.12-x/../../../../evil"], "data.tar");
        result.unwrap();
        assert!(!dir.path().join("evil").exists() && !dir.path().join("out/evil").exists());
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = |paths: &[&str], member| run(paths, member).1.unwrap_err().to_string();
        assert!(error(&[MODULE], "data.tar").ends_with("it has no boot/vmlinuz-VERSION"));
        assert!(error(&[KERNEL], "data.tar").ends_with("it has no modules"));
        assert!(error(&[KERNEL], "other").ends_with("it has no data.tar"));
        assert!(error(&[KERNEL], "data.tar.br").contains("unknown way"));
    }

    #[test]
    fn a_cut_package_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let whole = package(&[KERNEL, MODULE], "data.tar.zst");
        fs::write(dir.path().join("x.deb"), &whole[..whole.len() - 40]).unwrap();
        assert!(unpack(&dir.path().join("x.deb"), dir.path()).is_err());
    }
}
