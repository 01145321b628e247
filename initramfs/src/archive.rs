//! A tree as a newc cpio archive, and an archive read back. Pure: bytes in, bytes out.
//!
//! The format is the kernel's "initramfs buffer format". Times, owners, order and inode numbers are fixed, so the same
//! tree gives the same bytes.

use std::io::{self, Read, Write};

use cpio::newc::{self, Builder, ModeFileType};

use crate::tree::{Kind, Tree};

/// Why an archive could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A file of 4 GiB or more: the format has 32 bits for its size.
    #[error("{path} is {size} bytes, more than a cpio archive can hold")]
    TooLarge {
        /// Where in the tree.
        path: String,
        /// Its size in bytes.
        size: usize,
    },
    /// The writer or the codec failed.
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
    /// The bytes are no newc archive.
    #[error("cannot read entry {index} of the archive")]
    Read {
        /// Which, from 0.
        index: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One entry of an archive that was read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name, as it stands.
    pub path: String,
    /// Inode number.
    pub ino: u32,
    /// File type and permissions.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Time of last change, in seconds since 1970.
    pub mtime: u32,
    /// Device numbers of a device node.
    pub device: (u32, u32),
    /// Contents, or the target of a symbolic link.
    pub contents: Vec<u8>,
}

/// Writes the tree as a newc archive. `mtime` is what every entry gets, in seconds since 1970.
///
/// # Errors
/// A file is too large for the format.
pub fn write(tree: &Tree, mtime: u32) -> Result<Vec<u8>, ArchiveError> {
    let mut out = Vec::new();
    let root = Builder::new(".").ino(1).nlink(2).mtime(mtime).mode(0o755);
    out = entry(root.set_mode_file_type(ModeFileType::Directory), &[], ".", out)?;
    for (ino, (path, node)) in (2_u32..).zip(tree.iter()) {
        let head = Builder::new(path).ino(ino).mtime(mtime).mode(node.mode);
        out = match &node.kind {
            Kind::Directory => {
                entry(head.nlink(2).set_mode_file_type(ModeFileType::Directory), &[], path, out)
            }
            Kind::File(contents) => {
                entry(head.set_mode_file_type(ModeFileType::Regular), contents, path, out)
            }
            Kind::Symlink(target) => {
                let head = head.set_mode_file_type(ModeFileType::Symlink);
                entry(head, target.as_bytes(), path, out)
            }
            Kind::CharDevice { major, minor } => {
                let head = head.set_mode_file_type(ModeFileType::Char);
                entry(head.rdev_major(*major).rdev_minor(*minor), &[], path, out)
            }
        }?;
    }
    newc::trailer(out).map_err(ArchiveError::Write)
}

fn entry(
    head: Builder,
    contents: &[u8],
    path: &str,
    out: Vec<u8>,
) -> Result<Vec<u8>, ArchiveError> {
    let size = u32::try_from(contents.len())
        .map_err(|_| ArchiveError::TooLarge { path: path.to_owned(), size: contents.len() })?;
    let mut writer = head.write(out, size);
    writer.write_all(contents).map_err(ArchiveError::Write)?;
    writer.finish().map_err(ArchiveError::Write)
}

/// Archives in a row, each where the kernel looks for it: at a multiple of 4 bytes.
#[must_use]
pub fn join(archives: Vec<Vec<u8>>) -> Vec<u8> {
    let mut row = Vec::new();
    for archive in archives {
        if row.is_empty() {
            row = archive;
        } else {
            row.resize(row.len().next_multiple_of(4), 0);
            row.extend(archive);
        }
    }
    row
}

/// How many bytes the archive at the start of these takes, with its trailer; none if there is no whole one.
#[must_use]
pub fn length(bytes: &[u8]) -> Option<usize> {
    /// Bytes of an entry's head: the magic number and 13 fields of 8 digits.
    const HEAD: usize = 110;
    let mut at = 0_usize;
    loop {
        let head = bytes.get(at..at + HEAD)?;
        let field = |index: usize| {
            let digits = std::str::from_utf8(head.get(6 + 8 * index..14 + 8 * index)?).ok()?;
            usize::from_str_radix(digits, 16).ok()
        };
        let (size, name) = (field(6)?, field(11)?);
        let contents = (at + HEAD + name).next_multiple_of(4);
        let is_trailer = bytes.get(at + HEAD..at + HEAD + name)? == b"TRAILER!!!\0";
        at = (contents + size).next_multiple_of(4);
        if is_trailer {
            return Some(at.min(bytes.len()));
        }
    }
}

/// Reads uncompressed newc archives that follow each other, with zeros between them, to the end.
///
/// # Errors
/// The bytes are not such archives, or end too early.
pub fn read_all(archives: &[u8]) -> Result<Vec<Entry>, ArchiveError> {
    let mut entries = Vec::new();
    let mut rest = archives;
    while let Some(zeros) = rest.iter().position(|byte| *byte != 0) {
        let (found, behind) = read_one(rest.get(zeros..).unwrap_or_default())?;
        entries.extend(found);
        rest = behind;
    }
    Ok(entries)
}

/// Reads an uncompressed newc archive up to its trailer. Holds no more than the bytes it was given.
///
/// # Errors
/// The bytes are not such an archive, or end too early.
pub fn read(archive: &[u8]) -> Result<Vec<Entry>, ArchiveError> {
    read_one(archive).map(|(entries, _)| entries)
}

/// The entries of an archive, and what follows it.
fn read_one(archive: &[u8]) -> Result<(Vec<Entry>, &[u8]), ArchiveError> {
    let mut rest = archive;
    let mut entries = Vec::new();
    for index in 0.. {
        let fail = |source| ArchiveError::Read { index, source };
        let mut reader = newc::Reader::new(rest).map_err(fail)?;
        if reader.entry().is_trailer() {
            rest = reader.finish().map_err(fail)?;
            break;
        }
        let mut contents = Vec::new();
        reader.read_to_end(&mut contents).map_err(fail)?;
        let head = reader.entry();
        if u32::try_from(contents.len()).ok() != Some(head.file_size()) {
            return Err(fail(io::ErrorKind::UnexpectedEof.into()));
        }
        entries.push(Entry {
            path: head.name().to_owned(),
            ino: head.ino(),
            mode: head.mode(),
            owner: (head.uid(), head.gid()),
            mtime: head.mtime(),
            device: (head.rdev_major(), head.rdev_minor()),
            contents,
        });
        rest = reader.finish().map_err(fail)?;
    }
    Ok((entries, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::new();
        tree.file("init", 0o755, b"agent".to_vec()).unwrap();
        tree.directory("root", 0o700).unwrap();
        tree.char_device("dev/console", 0o600, (5, 1)).unwrap();
        tree.symlink("lib64", "lib").unwrap();
        tree
    }

    #[test]
    fn what_was_written_is_read_back() {
        let entries = read(&write(&sample(), 7).unwrap()).unwrap();
        let lines: Vec<_> = entries
            .iter()
            .map(|entry| {
                format!("{} {:o} {:?} {}", entry.path, entry.mode, entry.device, entry.ino)
            })
            .collect();
        assert_eq!(
            lines,
            [
                ". 40755 (0, 0) 1",
                "dev 40755 (0, 0) 2",
                "dev/console 20600 (5, 1) 3",
                "init 100755 (0, 0) 4",
                "lib64 120777 (0, 0) 5",
                "root 40700 (0, 0) 6",
            ]
        );
        assert!(entries.iter().all(|entry| entry.mtime == 7 && entry.owner == (0, 0)));
        assert_eq!(entries[3].contents, b"agent");
        assert_eq!(entries[4].contents, b"lib");
    }

    #[test]
    fn archives_in_a_row_are_read_to_the_last() {
        let plain = write(&sample(), 7).unwrap();
        let row = join(vec![plain.clone(), b"\0\0".to_vec(), plain.clone()]);
        let entries = read_all(&row).unwrap();
        assert_eq!(entries.len(), 2 * read(&plain).unwrap().len());
        assert_eq!(entries.iter().filter(|entry| entry.path == "init").count(), 2);
        assert!(read_all(&[row.as_slice(), b"x"].concat()).is_err());
    }

    #[test]
    fn the_length_of_an_archive_ends_with_its_trailer() {
        let plain = write(&sample(), 7).unwrap();
        assert_eq!(length(&plain), Some(plain.len()));
        let behind = [plain.as_slice(), &[0, 0, 0, 0], &plain].concat();
        assert_eq!(length(&behind).unwrap().next_multiple_of(4), plain.len().next_multiple_of(4));
        for wrong in [&plain[..plain.len() - 20], b"070701", b""] {
            assert_eq!(length(wrong), None);
        }
    }

    #[test]
    fn a_cut_archive_is_an_error_wherever_it_is_cut() {
        let plain = write(&sample(), 0).unwrap();
        for cut in 0..plain.len() - 4 {
            assert!(read(&plain[..cut]).is_err(), "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = (read(&bytes), length(&bytes));
        }

        #[test]
        fn reading_a_spoilt_archive_never_panics(at in 0_usize..500, byte: u8) {
            let mut bytes = write(&sample(), 0).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = (read(&bytes), length(&bytes));
        }
    }
}
