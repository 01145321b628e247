//! The entries of a Debian package (deb(5)): ar, a compressed tar. Nothing is written.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::kernel::deb::DebError;

/// Memory the xz decoder may use, in KiB.
const XZ_MEMORY_KIB: u32 = 256 << 10;

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
