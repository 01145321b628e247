//! A FAT32 volume with a few files in it, as UEFI wants an EFI system partition (UEFI 2.10 section 13.3).

use std::collections::{BTreeMap, BTreeSet};

use super::{SECTOR, put};

/// Sectors in front of the first allocation table.
const RESERVED: usize = 32;
/// Allocation tables.
const TABLES: usize = 2;
/// Fewer clusters than this make a volume FAT16 by definition.
const MIN_CLUSTERS: usize = 65_525 + 16;
/// Clusters that a volume has beyond what its files need: one a directory, and a little to write in.
const SPARE: usize = 64;
/// Bytes of a directory entry.
const ENTRY: usize = 32;
/// The last cluster of a file.
const END: u32 = 0x0fff_ffff;
/// 1980-01-01, the first day that FAT knows.
const DATE: u16 = 0x21;
/// Largest volume that is written, in bytes.
const MAX_BYTES: usize = 2 << 30;

/// Why a volume cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FatError {
    /// A name that the oldest form of FAT has not.
    #[error("`{0}` is not a path of upper-case names of 8 and 3 characters")]
    Name(String),
    /// It does not fit.
    #[error("{0} bytes are more than the 2 GiB that a volume of ours may have")]
    TooLarge(usize),
}

/// A directory or a file in the making.
enum Node<'a> {
    Directory(BTreeMap<String, Self>),
    File(&'a [u8]),
}

/// A volume with these files, `EFI/BOOT/BOOTX64.EFI` and its contents; the label is 11 characters at most.
///
/// # Errors
/// A name is not of the old form, or the files are too large.
pub fn volume(label: &str, files: &[(&str, &[u8])]) -> Result<Vec<u8>, FatError> {
    let mut root = BTreeMap::new();
    let mut directories = BTreeSet::new();
    for (path, contents) in files {
        insert(&mut root, path, contents).ok_or_else(|| FatError::Name((*path).to_owned()))?;
        directories.extend(path.match_indices('/').map(|(at, _)| path.get(..at)));
    }
    let needed: usize = files.iter().map(|(_, contents)| contents.len().div_ceil(SECTOR)).sum();
    let clusters = (needed + directories.len() + SPARE).max(MIN_CLUSTERS);
    let table_sectors = ((clusters + 2) * 4).div_ceil(SECTOR);
    let sectors = RESERVED + TABLES * table_sectors + clusters;
    if sectors > MAX_BYTES / SECTOR {
        return Err(FatError::TooLarge(sectors * SECTOR));
    }
    let mut writer = Writer {
        image: vec![0; sectors * SECTOR],
        table: vec![0x0fff_fff8, END],
        data: (RESERVED + TABLES * table_sectors) * SECTOR,
    };
    let label = padded::<11>(label.as_bytes());
    let first = writer.directory(&root, None, Some(&label));
    let Writer { mut image, table, .. } = writer;
    let free = clusters + 2 - table.len();
    boot_sector(&mut image, sectors, table_sectors, first, &label);
    information(&mut image, free, table.len());
    for (index, value) in table.iter().enumerate() {
        for copy in 0..TABLES {
            let at = (RESERVED + copy * table_sectors) * SECTOR + index * 4;
            put(&mut image, at, &value.to_le_bytes());
        }
    }
    Ok(image)
}

fn insert<'a>(
    directory: &mut BTreeMap<String, Node<'a>>,
    path: &str,
    contents: &'a [u8],
) -> Option<()> {
    let (name, rest) = path.split_once('/').map_or((path, None), |(name, rest)| (name, Some(rest)));
    short_name(name)?;
    match rest {
        None => directory.insert(name.to_owned(), Node::File(contents)).is_none().then_some(()),
        Some(rest) => {
            let child = directory.entry(name.to_owned());
            match child.or_insert_with(|| Node::Directory(BTreeMap::new())) {
                Node::Directory(child) => insert(child, rest, contents),
                Node::File(_) => None,
            }
        }
    }
}

/// A name as directory entries have it: 8 and 3 characters, padded with spaces.
fn short_name(name: &str) -> Option<[u8; 11]> {
    let (base, extension) = name.split_once('.').unwrap_or((name, ""));
    let plain = |text: &str, most: usize| {
        text.len() <= most
            && text
                .bytes()
                .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b"_-~".contains(&b))
    };
    if base.is_empty() || !plain(base, 8) || !plain(extension, 3) {
        return None;
    }
    let mut short = padded::<11>(base.as_bytes());
    put(&mut short, 8, &padded::<3>(extension.as_bytes()));
    Some(short)
}

fn padded<const N: usize>(text: &[u8]) -> [u8; N] {
    let mut bytes = [b' '; N];
    put(&mut bytes, 0, text.get(..N.min(text.len())).unwrap_or_default());
    bytes
}

/// Clusters are handed out in order, so every file is in one piece.
struct Writer {
    image: Vec<u8>,
    /// The allocation table as far as it is used.
    table: Vec<u32>,
    /// Offset of cluster 2.
    data: usize,
}

impl Writer {
    /// Takes the next clusters for so many bytes; the first of them.
    fn allocate(&mut self, bytes: usize) -> u32 {
        let first = number(self.table.len());
        let count = bytes.div_ceil(SECTOR).max(1);
        self.table.extend((1..number(count)).map(|offset| first + offset));
        self.table.push(END);
        first
    }

    fn write(&mut self, first: u32, bytes: &[u8]) {
        let at = self.data + (usize::try_from(first).unwrap_or(2) - 2) * SECTOR;
        put(&mut self.image, at, bytes);
    }

    /// Writes a directory and everything below it; its first cluster. `parent` is None for the root and Some(0) below it.
    fn directory(
        &mut self,
        nodes: &BTreeMap<String, Node<'_>>,
        parent: Option<u32>,
        label: Option<&[u8; 11]>,
    ) -> u32 {
        let count =
            nodes.len() + usize::from(label.is_some()) + if parent.is_some() { 2 } else { 0 };
        let own = self.allocate(count * ENTRY);
        let mut entries = Vec::new();
        if let Some(label) = label {
            entries.extend(entry(label, 0x08, 0, 0));
        }
        if let Some(parent) = parent {
            entries.extend(entry(&padded(b"."), 0x10, own, 0));
            entries.extend(entry(&padded(b".."), 0x10, parent, 0));
        }
        for (name, node) in nodes {
            let short = short_name(name).unwrap_or([b'_'; 11]);
            entries.extend(match node {
                Node::Directory(children) => {
                    let below = if parent.is_some() { own } else { 0 };
                    let first = self.directory(children, Some(below), None);
                    entry(&short, 0x10, first, 0)
                }
                Node::File([]) => entry(&short, 0x20, 0, 0),
                Node::File(contents) => {
                    let first = self.allocate(contents.len());
                    self.write(first, contents);
                    entry(&short, 0x20, first, number(contents.len()))
                }
            });
        }
        self.write(own, &entries);
        own
    }
}

/// Sizes here are below 2 GiB.
fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn entry(name: &[u8; 11], attributes: u8, first: u32, size: u32) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    put(&mut bytes, 0, name);
    put(&mut bytes, 11, &[attributes]);
    for at in [16, 18, 24] {
        put(&mut bytes, at, &DATE.to_le_bytes());
    }
    let first = first.to_le_bytes();
    put(&mut bytes, 20, first.get(2..).unwrap_or_default());
    put(&mut bytes, 26, first.get(..2).unwrap_or_default());
    put(&mut bytes, 28, &size.to_le_bytes());
    bytes
}

fn boot_sector(image: &mut [u8], sectors: usize, table: usize, root: u32, label: &[u8; 11]) {
    let mut sector = [0; SECTOR];
    put(&mut sector, 0, &[0xeb, 0x58, 0x90]);
    put(&mut sector, 3, b"LAYERCAK");
    for (at, value) in [(11, SECTOR), (14, RESERVED), (24, 63), (26, 255), (48, 1), (50, 6)] {
        put(&mut sector, at, &u16::try_from(value).unwrap_or(0).to_le_bytes());
    }
    put(&mut sector, 13, &[1]);
    put(&mut sector, 16, &[2]);
    put(&mut sector, 21, &[0xf8]);
    put(&mut sector, 32, &number(sectors).to_le_bytes());
    put(&mut sector, 36, &number(table).to_le_bytes());
    put(&mut sector, 44, &root.to_le_bytes());
    put(&mut sector, 64, &[0x80, 0, 0x29]);
    // A serial number that is the same each time.
    put(&mut sector, 67, b"CAKE");
    put(&mut sector, 71, label);
    put(&mut sector, 82, b"FAT32   ");
    put(&mut sector, 510, &[0x55, 0xaa]);
    put(image, 0, &sector);
    put(image, 6 * SECTOR, &sector);
}

/// The sector that says how much is free, and its copy.
fn information(image: &mut [u8], free: usize, next: usize) {
    let mut sector = [0; SECTOR];
    put(&mut sector, 0, b"RRaA");
    put(&mut sector, 484, b"rrAa");
    put(&mut sector, 488, &number(free).to_le_bytes());
    put(&mut sector, 492, &number(next).to_le_bytes());
    put(&mut sector, 510, &[0x55, 0xaa]);
    put(image, SECTOR, &sector);
    put(image, 7 * SECTOR, &sector);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_the_old_form() {
        assert_eq!(short_name("BOOTX64.EFI"), Some(*b"BOOTX64 EFI"));
        assert_eq!(short_name("EFI"), Some(*b"EFI        "));
        for name in ["", "bootx64.efi", "BOOTX64.EFIX", "TOOLONGNAME", "A.B.C", ".EFI", "A B"] {
            assert_eq!(short_name(name), None, "{name}");
        }
        let file = b"x".as_slice();
        assert_eq!(volume("L", &[("a", file)]), Err(FatError::Name("a".to_owned())));
        assert_eq!(
            volume("L", &[("A", file), ("A/B", file)]),
            Err(FatError::Name("A/B".to_owned()))
        );
        assert_eq!(volume("L", &[("A", file), ("A", file)]), Err(FatError::Name("A".to_owned())));
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let contents = vec![7; 5000];
        let files = [("EFI/BOOT/BOOTX64.EFI", contents.as_slice()), ("README", b"x")];
        let first = volume("LAYER0", &files).unwrap();
        assert_eq!(volume("LAYER0", &files).unwrap(), first);
        assert_eq!(first.len() % SECTOR, 0);
        assert_eq!(first.get(82..87), Some(b"FAT32".as_slice()));
    }
}
