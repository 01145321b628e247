//! A Debian package unpacked (deb(5)): ar, a compressed tar, and of that what is to be had of a kernel ([`Contents`]).

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::contents::Contents;

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
    /// The package is not what a Debian package looks like.
    #[error("{path} is not a Debian package: {reason}")]
    Odd {
        /// The package.
        path: PathBuf,
        /// What is missing or too much.
        reason: &'static str,
    },
}

/// Unpacks a package's part of a kernel.
///
/// # Errors
/// It is not a Debian package, is cut or too large.
pub fn unpack(package: &Path, contents: &mut Contents) -> Result<(), DebError> {
    each(package, |path, size, body| match body {
        Body::File(bytes) => contents.file(path, size, None, bytes),
        Body::Link(_) | Body::Other => contents.count(size),
    })
}

/// What an entry of a package is.
pub enum Body<'a> {
    /// A regular file with these bytes.
    File(&'a mut dyn Read),
    /// A symbolic link to there.
    Link(PathBuf),
    /// Anything else.
    Other,
}

impl std::fmt::Debug for Body<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(_) => f.write_str("File"),
            Self::Link(target) => f.debug_tuple("Link").field(target).finish(),
            Self::Other => f.write_str("Other"),
        }
    }
}

/// Hands out every entry of a package: its path, its size, and what it is.
///
/// # Errors
/// It is not a Debian package, is cut, or `take` fails.
pub fn each(
    package: &Path,
    mut take: impl FnMut(&Path, u64, Body<'_>) -> io::Result<()>,
) -> Result<(), DebError> {
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
        let mut archive = tar::Archive::new(data);
        for entry in archive.entries().map_err(fail)? {
            let mut entry = entry.map_err(fail)?;
            let (size, path) = (entry.size(), entry.path().map_err(fail)?.into_owned());
            let target = entry.link_name().map_err(fail)?.map(|target| target.into_owned());
            let body = match (entry.header().entry_type(), target) {
                (tar::EntryType::Regular, _) => Body::File(&mut entry),
                (tar::EntryType::Symlink, Some(target)) => Body::Link(target),
                _ => Body::Other,
            };
            take(&path, size, body).map_err(fail)?;
        }
        return Ok(());
    }
    Err(odd("it has no data.tar"))
}

#[cfg(test)]
mod tests {
    use std::fs;

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

    fn run(paths: &[&str], member: &str) -> (tempfile::TempDir, Result<String, String>) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        fs::write(dir.path().join("x.deb"), package(paths, member)).unwrap();
        let mut contents = Contents::new(&dir.path().join("out"));
        let result = unpack(&dir.path().join("x.deb"), &mut contents);
        let result = result.map_err(|error| error.to_string());
        (dir, result.and_then(|()| contents.finish().map_err(str::to_owned)))
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
        let error = |paths: &[&str], member| run(paths, member).1.unwrap_err();
        assert!(error(&[KERNEL], "other").ends_with("it has no data.tar"));
        assert!(error(&[KERNEL], "data.tar.br").contains("unknown way"));
    }

    #[test]
    fn a_cut_package_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let whole = package(&[KERNEL, MODULE], "data.tar.zst");
        fs::write(dir.path().join("x.deb"), &whole[..whole.len() - 40]).unwrap();
        let mut contents = Contents::new(dir.path());
        assert!(unpack(&dir.path().join("x.deb"), &mut contents).is_err());
    }
}
