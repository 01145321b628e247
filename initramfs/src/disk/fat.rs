//! A FAT volume with a few files in it: FAT32, as UEFI wants an EFI system partition, or FAT16, which is as small as its files for the
//! boot image of a CD (UEFI 2.10 section 13.3).

use std::collections::{BTreeMap, BTreeSet};

use super::{SECTOR, put};

/// Allocation tables.
const TABLES: usize = 2;
/// Clusters that a volume has beyond what its files need: a little to write in.
const SPARE: usize = 64;
/// Bytes of a directory entry.
const ENTRY: usize = 32;
/// Entries of FAT16's root directory, which lies apart.
const ROOT_ENTRIES: usize = 512;
/// 1980-01-01, the first day that FAT knows.
const DATE: u16 = 0x21;
/// Largest volume that is written, in bytes.
const MAX_BYTES: usize = 2 << 30;

/// The form of a volume. It follows from the number of clusters, and from nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// At least 65 525 clusters: 33 MiB or more.
    Fat32,
    /// Fewer, and at least 4085.
    Fat16,
}

impl Form {
    /// Sectors of a cluster.
    const fn cluster(self) -> usize {
        match self {
            Self::Fat32 => 1,
            Self::Fat16 => 4,
        }
    }

    /// Sectors in front of the first allocation table.
    const fn reserved(self) -> usize {
        match self {
            Self::Fat32 => 32,
            Self::Fat16 => 1,
        }
    }

    /// Fewest and most clusters, with a margin: tools disagree about the last ones.
    const fn clusters(self) -> (usize, usize) {
        match self {
            Self::Fat32 => (65_525 + 16, 0x0fff_fff0),
            Self::Fat16 => (4085 + 16, 65_524 - 16),
        }
    }

    /// Bytes of an entry of the allocation table.
    const fn entry(self) -> usize {
        match self {
            Self::Fat32 => 4,
            Self::Fat16 => 2,
        }
    }

    /// Sectors of the root directory that lies apart.
    const fn root(self) -> usize {
        match self {
            Self::Fat32 => 0,
            Self::Fat16 => ROOT_ENTRIES * ENTRY / SECTOR,
        }
    }

    /// The last cluster of a file.
    const fn end(self) -> u32 {
        match self {
            Self::Fat32 => 0x0fff_ffff,
            Self::Fat16 => 0xffff,
        }
    }
}

/// What a volume is to be.
#[derive(Debug, Clone, Copy)]
pub struct Volume<'a> {
    /// Its form.
    pub form: Form,
    /// Its label, 11 characters at most.
    pub label: &'a str,
    /// Its files, `EFI/BOOT/BOOTX64.EFI` and the contents.
    pub files: &'a [(&'a str, &'a [u8])],
    /// Room for files that others will add, in bytes.
    pub spare: usize,
    /// Sectors in front of it on its disk; boot code looks for it there.
    pub hidden: u32,
}

/// Why a volume cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FatError {
    /// A name that the oldest form of FAT has not.
    #[error("`{0}` is not a path of upper-case names of 8 and 3 characters")]
    Name(String),
    /// It does not fit.
    #[error("{0} bytes are more than such a volume can have (FAT32: 2 GiB, FAT16: 128 MiB)")]
    TooLarge(usize),
}

/// A directory or a file in the making.
enum Node<'a> {
    Directory(BTreeMap<String, Self>),
    File(&'a [u8]),
}

/// Writes a volume. The same files give the same bytes.
///
/// # Errors
/// A name is not of the old form, or the files are too large.
pub fn volume(volume: &Volume<'_>) -> Result<Vec<u8>, FatError> {
    let Volume { form, label, files, spare, hidden } = *volume;
    let mut root = BTreeMap::new();
    let mut directories = BTreeSet::new();
    for (path, contents) in files {
        insert(&mut root, path, contents).ok_or_else(|| FatError::Name((*path).to_owned()))?;
        directories.extend(path.match_indices('/').map(|(at, _)| path.get(..at)));
    }
    let cluster = form.cluster() * SECTOR;
    let needed: usize = files.iter().map(|(_, contents)| contents.len().div_ceil(cluster)).sum();
    let needed = needed + directories.len() + spare.div_ceil(cluster) + SPARE;
    let (least, most) = form.clusters();
    let clusters = needed.max(least);
    let table_sectors = ((clusters + 2) * form.entry()).div_ceil(SECTOR);
    let data = form.reserved() + TABLES * table_sectors + form.root();
    let sectors = data + clusters * form.cluster();
    if clusters > most || sectors > MAX_BYTES / SECTOR {
        return Err(FatError::TooLarge(sectors * SECTOR));
    }
    let mut writer = Writer {
        form,
        image: vec![0; sectors * SECTOR],
        table: vec![form.end() & !7, form.end()],
        data: data * SECTOR,
        root: (form == Form::Fat16).then_some((data - form.root()) * SECTOR),
    };
    let label = padded::<11>(label.as_bytes());
    let first = writer.directory(&root, None, Some(&label));
    let Writer { mut image, table, .. } = writer;
    let free = clusters + 2 - table.len();
    let shape = Shape { sectors, table_sectors, hidden, label };
    boot_sector(&mut image, form, &shape, first);
    if form == Form::Fat32 {
        information(&mut image, free, table.len());
    }
    for (index, value) in table.iter().enumerate() {
        for copy in 0..TABLES {
            let at = (form.reserved() + copy * table_sectors) * SECTOR + index * form.entry();
            let bytes = value.to_le_bytes();
            put(&mut image, at, bytes.get(..form.entry()).unwrap_or_default());
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
    form: Form,
    image: Vec<u8>,
    /// The allocation table as far as it is used.
    table: Vec<u32>,
    /// Offset of cluster 2.
    data: usize,
    /// Offset of the root directory, where it lies apart.
    root: Option<usize>,
}

impl Writer {
    /// Takes the next clusters for so many bytes; the first of them.
    fn allocate(&mut self, bytes: usize) -> u32 {
        let first = number(self.table.len());
        let count = bytes.div_ceil(self.form.cluster() * SECTOR).max(1);
        self.table.extend((1..number(count)).map(|offset| first + offset));
        self.table.push(self.form.end());
        first
    }

    fn write(&mut self, first: u32, bytes: &[u8]) {
        let cluster = usize::try_from(first).unwrap_or(2).saturating_sub(2);
        let at = self.data + cluster * self.form.cluster() * SECTOR;
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
        let apart = if parent.is_none() { self.root } else { None };
        let own = if apart.is_some() { 0 } else { self.allocate(count * ENTRY) };
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
        match apart {
            Some(at) => put(&mut self.image, at, &entries),
            None => self.write(own, &entries),
        }
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

/// What the boot sector says of a volume.
struct Shape {
    sectors: usize,
    table_sectors: usize,
    hidden: u32,
    label: [u8; 11],
}

fn boot_sector(image: &mut [u8], form: Form, shape: &Shape, root: u32) {
    let Shape { sectors, table_sectors, hidden, label } = shape;
    let mut sector = [0; SECTOR];
    put(&mut sector, 3, b"LAYERCAK");
    for (at, value) in [(11, SECTOR), (14, form.reserved()), (24, 63), (26, 255)] {
        put(&mut sector, at, &u16::try_from(value).unwrap_or(0).to_le_bytes());
    }
    put(&mut sector, 13, &u8::try_from(form.cluster()).unwrap_or(1).to_le_bytes());
    put(&mut sector, 16, &[2]);
    put(&mut sector, 21, &[0xf8]);
    put(&mut sector, 28, &hidden.to_le_bytes());
    put(&mut sector, 32, &number(*sectors).to_le_bytes());
    // A serial number that is the same each time, and the label.
    let names = |sector: &mut [u8], at: usize, kind: &[u8; 8]| {
        put(sector, at, &[0x80, 0, 0x29]);
        put(sector, at + 3, b"CAKE");
        put(sector, at + 7, label);
        put(sector, at + 18, kind);
    };
    match form {
        Form::Fat32 => {
            put(&mut sector, 0, &[0xeb, 0x58, 0x90]);
            put(&mut sector, 36, &number(*table_sectors).to_le_bytes());
            put(&mut sector, 44, &root.to_le_bytes());
            put(&mut sector, 48, &[1, 0, 6, 0]);
            names(&mut sector, 64, b"FAT32   ");
        }
        Form::Fat16 => {
            put(&mut sector, 0, &[0xeb, 0x3c, 0x90]);
            put(&mut sector, 17, &(512_u16).to_le_bytes());
            put(&mut sector, 22, &u16::try_from(*table_sectors).unwrap_or(0).to_le_bytes());
            names(&mut sector, 36, b"FAT16   ");
        }
    }
    put(&mut sector, 510, &[0x55, 0xaa]);
    put(image, 0, &sector);
    if form == Form::Fat32 {
        put(image, 6 * SECTOR, &sector);
    }
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
        let error = |files: &[(&str, &[u8])]| volume(&spec(Form::Fat32, files)).unwrap_err();
        assert_eq!(error(&[("a", file)]), FatError::Name("a".to_owned()));
        assert_eq!(error(&[("A", file), ("A/B", file)]), FatError::Name("A/B".to_owned()));
        assert_eq!(error(&[("A", file), ("A", file)]), FatError::Name("A".to_owned()));
    }

    fn spec<'a>(form: Form, files: &'a [(&'a str, &'a [u8])]) -> Volume<'a> {
        Volume { form, label: "LAYER0", files, spare: 0, hidden: 0 }
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let contents = vec![7; 5000];
        let files = [("EFI/BOOT/BOOTX64.EFI", contents.as_slice()), ("README", b"x")];
        for (form, at, name) in [(Form::Fat32, 82, "FAT32"), (Form::Fat16, 54, "FAT16")] {
            let first = volume(&spec(form, &files)).unwrap();
            assert_eq!(volume(&spec(form, &files)).unwrap(), first);
            assert_eq!(first.len() % SECTOR, 0);
            assert_eq!(first.get(at..at + 5), Some(name.as_bytes()));
        }
    }

    #[test]
    fn a_volume_of_the_small_form_has_an_end() {
        let large = vec![0; 65_600 * 2048];
        let files = [("A", large.as_slice())];
        assert!(matches!(volume(&spec(Form::Fat16, &files)), Err(FatError::TooLarge(_))));
    }
}
