//! Copies a tar into a layer unchanged, and refuses what no layer may hold while it passes.

use std::io::{self, BufReader, Read, Write};
use std::path::{Component, Path, PathBuf};

use flate2::read::MultiGzDecoder;
use tar::{Archive, EntryType};

use super::LayerError;
use crate::blob::Tee;

/// The first bytes of a gzip member (RFC 1952).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// The first bytes of a zstd frame (RFC 8878).
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Copies the tar, plain, gzip or zstd, uncompressed to `out`. `path` names it in errors.
///
/// # Errors
/// If it cannot be read or is not a whole tar, or an entry has `..` in its path or is a device outside `dev/`.
pub(crate) fn copy_checked(
    path: &Path,
    from: impl Read,
    out: &mut dyn Write,
) -> Result<(), LayerError> {
    let tar = |reason| LayerError::Tar { path: path.to_owned(), reason };
    let plain =
        decompressed(from).map_err(|error| tar(format!("cannot be decompressed: {error}")))?;
    let mut tee = Tee { from: plain, to: out, count: 0 };
    check(&mut tee).map_err(&tar)?;
    // What stands after the end-of-archive blocks belongs to the diff id too.
    io::copy(&mut tee, &mut io::sink()).map_err(|error| tar(error.to_string()))?;
    if tee.count == 0 {
        return Err(tar("not a tar: it is empty".to_owned()));
    }
    Ok(())
}

/// The bytes that are or are not compressed, as they are inside.
pub(crate) fn decompressed<'a>(mut from: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut head = Vec::new();
    from.by_ref().take(ZSTD_MAGIC.len() as u64).read_to_end(&mut head)?;
    let (gzip, zstd) = (head.starts_with(&GZIP_MAGIC), head.starts_with(&ZSTD_MAGIC));
    let whole = BufReader::new(io::Cursor::new(head).chain(from));
    Ok(match (gzip, zstd) {
        (true, _) => Box::new(MultiGzDecoder::new(whole)),
        (_, true) => Box::new(zstd::Decoder::with_buffer(whole)?),
        _ => Box::new(whole),
    })
}

fn check(from: &mut dyn Read) -> Result<(), String> {
    let broken = |error: io::Error| format!("not a whole tar: {error}");
    let mut archive = Archive::new(from);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = entry.path().map_err(broken)?.into_owned();
        let shown = path.display();
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(format!("entry `{shown}` has `..` in its path"));
        }
        let device = matches!(entry.header().entry_type(), EntryType::Block | EntryType::Char);
        let plain: PathBuf =
            path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        if device && !plain.starts_with("dev") {
            return Err(format!("entry `{shown}` is a device outside /dev"));
        }
        let size = entry.size();
        let read = io::copy(&mut entry, &mut io::sink()).map_err(broken)?;
        if read < size && entry.header().entry_type() == EntryType::Regular {
            return Err(format!("not a whole tar: entry `{shown}` is cut off"));
        }
    }
    Ok(())
}

/// Reads any bytes as a tar layer, for fuzzing.
pub fn fuzz_tar(bytes: &[u8]) {
    let _ = copy_checked(Path::new("fuzz"), bytes, &mut io::sink());
}
