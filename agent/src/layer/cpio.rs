//! Turns a newc cpio archive (linux `Documentation/driver-api/early-userspace/buffer-format.rst`) into a tar stream, which
//! `layer::apply` then takes: one way into the file system for both.
//!
//! Every length is checked before anything is held; names are held only as long as hard links wait for their content. Of
//! several archives one after the other the first counts. Does not touch files.

use std::collections::BTreeMap;
use std::io::{self, Read};

use tar::{EntryType, Header};

use super::{MAX_ENTRIES, MAX_PATH_BYTES};

/// Size of a newc header, in bytes.
const HEADER: usize = 110;
/// The name of the last entry.
const TRAILER: &[u8] = b"TRAILER!!!";
/// Size of a tar block, in bytes.
const BLOCK: usize = 512;
/// Most bytes of names of hard links that wait for their content.
const MAX_WAITING: usize = 4 << 20;
/// File types in `mode` (inode(7)).
const S_IFMT: u32 = 0o170_000;

/// A tar stream made of a cpio stream.
#[derive(Debug)]
pub struct ToTar<R> {
    input: R,
    /// Tar bytes that are ready.
    ready: io::Cursor<Vec<u8>>,
    /// Content of the current file that is still to come through.
    content: u64,
    /// Zeros behind it in the tar stream, and bytes to skip behind it in the cpio stream.
    padding: (usize, usize),
    /// Tar bytes that come after that.
    behind: Vec<u8>,
    entries: u64,
    /// By device and inode: the name of the file whose content has come, or those that wait for it.
    links: BTreeMap<(u32, u32, u32), Links>,
    waiting_bytes: usize,
    done: bool,
}

#[derive(Debug)]
enum Links {
    Here(Vec<u8>),
    Waiting(Vec<(Fields, Vec<u8>)>),
}

/// The numbers of a header.
#[derive(Debug, Clone, Copy)]
struct Fields {
    ino: u32,
    mode: u32,
    uid: u32,
    gid: u32,
    nlink: u32,
    mtime: u32,
    size: u32,
    dev: (u32, u32),
    rdev: (u32, u32),
    name_size: u32,
}

fn malformed(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed cpio archive: {reason}"))
}

impl Fields {
    fn parse(header: &[u8; HEADER]) -> io::Result<Self> {
        let (magic, numbers) = header.split_at(6);
        if magic != b"070701" && magic != b"070702" {
            return Err(malformed("an entry has no magic"));
        }
        let mut values = [0_u32; 13];
        for (value, digits) in values.iter_mut().zip(numbers.chunks(8)) {
            let text = std::str::from_utf8(digits).ok();
            let text = text.filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()));
            let number = text.and_then(|text| u32::from_str_radix(text, 16).ok());
            *value = number.ok_or_else(|| malformed("a header has a number that is none"))?;
        }
        let [ino, mode, uid, gid, nlink, mtime, size, d1, d2, r1, r2, name_size, _] = values;
        let (dev, rdev) = ((d1, d2), (r1, r2));
        Ok(Self { ino, mode, uid, gid, nlink, mtime, size, dev, rdev, name_size })
    }

    fn key(&self) -> (u32, u32, u32) {
        (self.dev.0, self.dev.1, self.ino)
    }

    fn kind(&self) -> io::Result<EntryType> {
        Ok(match self.mode & S_IFMT {
            0o100_000 => EntryType::Regular,
            0o040_000 => EntryType::Directory,
            0o120_000 => EntryType::Symlink,
            0o020_000 => EntryType::Char,
            0o060_000 => EntryType::Block,
            0o010_000 => EntryType::Fifo,
            0o140_000 => return Err(malformed("it holds a socket")),
            _ => return Err(malformed("an entry is of no known type")),
        })
    }
}

impl<R: Read> ToTar<R> {
    /// Reads the cpio archive from here.
    pub fn new(input: R) -> Self {
        Self {
            input,
            ready: io::Cursor::default(),
            content: 0,
            padding: (0, 0),
            behind: Vec::new(),
            entries: 0,
            links: BTreeMap::new(),
            waiting_bytes: 0,
            done: false,
        }
    }

    /// Makes the next tar bytes ready.
    fn advance(&mut self) -> io::Result<()> {
        let mut header = [0; HEADER];
        self.input.read_exact(&mut header)?;
        let fields = Fields::parse(&header)?;
        let name_size = usize::try_from(fields.name_size).unwrap_or(usize::MAX);
        if !(2..=MAX_PATH_BYTES + 1).contains(&name_size) {
            return Err(malformed("a name is empty or longer than any path"));
        }
        let mut name = self.take(name_size, HEADER + name_size)?;
        if name.pop() != Some(0) || name.contains(&0) {
            return Err(malformed("a name does not end where its length says"));
        }
        if name == TRAILER {
            return self.finish();
        }
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(malformed("it has too many entries"));
        }
        let size = usize::try_from(fields.size).unwrap_or(usize::MAX);
        let mut tar = Vec::new();
        match fields.kind()? {
            EntryType::Symlink => {
                if size == 0 || size > MAX_PATH_BYTES {
                    return Err(malformed("a symbolic link is empty or longer than any path"));
                }
                let target = self.take(size, size)?;
                append(&mut tar, &fields, EntryType::Symlink, &name, &target, 0);
            }
            EntryType::Regular => return self.file(fields, name),
            _ if size > 0 => return Err(malformed("something that is no file has content")),
            kind => append(&mut tar, &fields, kind, &name, b"", 0),
        }
        self.ready = io::Cursor::new(tar);
        Ok(())
    }

    /// Of files with several names, one entry has the content; which, depends on who wrote the archive.
    fn file(&mut self, fields: Fields, name: Vec<u8>) -> io::Result<()> {
        let mut tar = Vec::new();
        let size = u64::from(fields.size);
        if fields.nlink > 1 {
            match self.links.get_mut(&fields.key()) {
                Some(Links::Here(first)) if size == 0 => {
                    append(&mut tar, &fields, EntryType::Link, &name, first, 0);
                    self.ready = io::Cursor::new(tar);
                    return Ok(());
                }
                Some(Links::Here(_)) => return Err(malformed("a file has its content twice")),
                Some(Links::Waiting(names)) if size == 0 => {
                    names.push((fields, name.clone()));
                }
                None if size == 0 => {
                    let waiting = Links::Waiting(vec![(fields, name.clone())]);
                    self.links.insert(fields.key(), waiting);
                }
                Some(Links::Waiting(_)) | None => {}
            }
            self.waiting_bytes =
                self.waiting_bytes.saturating_add(name.len() + size_of::<Fields>());
            if self.waiting_bytes > MAX_WAITING {
                return Err(malformed("too many hard links"));
            }
            if size == 0 {
                return Ok(());
            }
        }
        append(&mut tar, &fields, EntryType::Regular, &name, b"", size);
        self.ready = io::Cursor::new(tar);
        self.content = size;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        self.padding = (size.next_multiple_of(BLOCK) - size, size.next_multiple_of(4) - size);
        if fields.nlink > 1 {
            self.links_behind(&fields, name);
        }
        Ok(())
    }

    /// The names that waited become links once the content has come: they stand behind it.
    fn links_behind(&mut self, fields: &Fields, name: Vec<u8>) {
        let before = self.links.insert(fields.key(), Links::Here(name.clone()));
        if let Some(Links::Waiting(names)) = before {
            for (fields, other) in names {
                append(&mut self.behind, &fields, EntryType::Link, &other, &name, 0);
            }
        }
    }

    /// The end: files with several names and no content at all are empty ones.
    fn finish(&mut self) -> io::Result<()> {
        let mut tar = Vec::new();
        for links in std::mem::take(&mut self.links).into_values() {
            let Links::Waiting(names) = links else { continue };
            let mut names = names.into_iter();
            let Some((fields, first)) = names.next() else { continue };
            append(&mut tar, &fields, EntryType::Regular, &first, b"", 0);
            for (fields, other) in names {
                append(&mut tar, &fields, EntryType::Link, &other, &first, 0);
            }
        }
        tar.extend([0; 2 * BLOCK]);
        self.ready = io::Cursor::new(tar);
        self.done = true;
        Ok(())
    }

    /// So many bytes, and what fills up to a multiple of four after `end`.
    fn take(&mut self, count: usize, end: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.input.read_exact(&mut bytes)?;
        self.skip(end.next_multiple_of(4) - end)?;
        Ok(bytes)
    }

    fn skip(&mut self, count: usize) -> io::Result<()> {
        let mut padding = [0; 4];
        self.input.read_exact(padding.get_mut(..count).unwrap_or_default())
    }
}

impl<R: Read> Read for ToTar<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.ready.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            if self.content > 0 {
                let most = usize::try_from(self.content).unwrap_or(usize::MAX).min(buffer.len());
                let count = self.input.read(buffer.get_mut(..most).unwrap_or_default())?;
                if count == 0 {
                    return Err(malformed("it ends inside a file's content"));
                }
                self.content = self.content.saturating_sub(count as u64);
                if self.content == 0 {
                    let (zeros, skipped) = std::mem::take(&mut self.padding);
                    self.skip(skipped)?;
                    let mut behind = vec![0; zeros];
                    behind.append(&mut self.behind);
                    self.ready = io::Cursor::new(behind);
                }
                return Ok(count);
            }
            if self.done {
                return Ok(0);
            }
            self.advance()?;
        }
    }
}

/// Appends a tar header, with GNU long names where they are needed.
fn append(
    tar: &mut Vec<u8>,
    fields: &Fields,
    kind: EntryType,
    name: &[u8],
    link: &[u8],
    size: u64,
) {
    let mut header = Header::new_gnu();
    for (kind, text) in [(EntryType::GNULongName, name), (EntryType::GNULongLink, link)] {
        if text.len() > 99 {
            let mut long = Header::new_gnu();
            long.set_entry_type(kind);
            long.set_size(text.len() as u64 + 1);
            long.set_cksum();
            tar.extend(long.as_bytes());
            tar.extend(text);
            tar.resize(tar.len() + (text.len() + 1).next_multiple_of(BLOCK) - text.len(), 0);
        }
    }
    header.set_entry_type(kind);
    let old = header.as_old_mut();
    for (field, text) in [(&mut old.name, name), (&mut old.linkname, link)] {
        field.iter_mut().zip(text.iter().take(99)).for_each(|(to, from)| *to = *from);
    }
    header.set_size(size);
    header.set_mode(fields.mode & 0o7777);
    header.set_uid(fields.uid.into());
    header.set_gid(fields.gid.into());
    header.set_mtime(fields.mtime.into());
    if let Some(gnu) = header.as_gnu_mut() {
        gnu.set_device_major(fields.rdev.0);
        gnu.set_device_minor(fields.rdev.1);
    }
    header.set_cksum();
    tar.extend(header.as_bytes());
}

/// Reads an archive to its end and forgets it, for fuzzing. Touches no file.
pub fn fuzz_cpio(bytes: &[u8]) {
    // However it ends, it ends.
    let _ = io::copy(&mut ToTar::new(bytes), &mut io::sink());
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::Path;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;
    use crate::layer::{self, Limits};

    /// What GNU cpio writes of a directory.
    fn cpio_of(dir: &Path) -> Vec<u8> {
        let mut find = Command::new("find")
            .arg(".")
            .current_dir(dir)
            .stdout(Stdio::piped())
            .spawn()
            .expect("find");
        let list = find.stdout.take().expect("pipe");
        let output = Command::new("cpio")
            .args(["--quiet", "-o", "-H", "newc"])
            .current_dir(dir)
            .stdin(list)
            .output();
        let output = output.expect("cpio: apt-get install cpio");
        assert!(output.status.success() && find.wait().expect("find").success());
        output.stdout
    }

    fn apply(cpio: &[u8]) -> Result<tempfile::TempDir, layer::LayerError> {
        let dir = tempfile::tempdir().expect("directory");
        layer::apply(io::BufReader::new(ToTar::new(cpio)), dir.path(), &Limits::default())?;
        Ok(dir)
    }

    #[test]
    fn what_gnu_cpio_writes_comes_out_as_it_was() {
        let from = tempfile::tempdir().expect("directory");
        let long = "d".repeat(150);
        fs::create_dir_all(from.path().join("etc").join(&long)).expect("directories");
        fs::write(from.path().join("etc").join(&long).join("file"), "deep").expect("file");
        for (name, size) in [("empty", 0), ("one", 1), ("block", 512), ("large", 70_001)] {
            fs::write(from.path().join(name), vec![7; size]).expect("file");
        }
        fs::hard_link(from.path().join("one"), from.path().join("other")).expect("link");
        fs::hard_link(from.path().join("one"), from.path().join("third")).expect("link");
        fs::hard_link(from.path().join("empty"), from.path().join("empty2")).expect("link");
        symlink("x".repeat(120), from.path().join("symlink")).expect("symlink");
        let to = apply(&cpio_of(from.path())).expect("applied");
        let compared = Command::new("diff")
            .args(["-r", "--no-dereference"])
            .arg(from.path())
            .arg(to.path())
            .status();
        assert!(compared.expect("diff").success());
        let ino = |name: &str| fs::metadata(to.path().join(name)).expect(name).ino();
        assert_eq!([ino("other"), ino("third")], [ino("one"); 2]);
        assert_eq!(ino("empty"), ino("empty2"));
    }

    fn header(mode: u32, nlink: u32, size: u32, name: &str) -> Vec<u8> {
        let name_size = u32::try_from(name.len()).expect("a short name") + 1;
        let numbers = [7, mode, 0, 0, nlink, 1, size, 0, 0, 0, 0, name_size, 0];
        let mut bytes = b"070701".to_vec();
        bytes.extend(numbers.iter().flat_map(|number| format!("{number:08X}").into_bytes()));
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len() + 1, 0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn what_is_malformed_is_refused_with_the_reason() {
        let table = [
            (b"garbage".to_vec(), "failed to fill whole buffer"),
            (header(0o140_755, 1, 0, "socket"), "socket"),
            (header(0o040_755, 2, 3, "dir"), "something that is no file has content"),
            (header(0o120_777, 1, 0, "link"), "symbolic link is empty"),
            (header(0o100_644, 1, 9, "short"), "ends inside"),
            (header(0o100_644, 1, 0, ""), "a name is empty"),
            (header(0o100_644, 1, 0, "no trailer"), "failed to fill whole buffer"),
        ];
        for (cpio, expected) in table {
            let error = crate::agent::chain(&apply(&cpio).expect_err(expected));
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    #[test]
    fn names_do_not_lead_out() {
        let cpio = [header(0o100_644, 1, 0, "../evil"), header(0, 1, 0, "TRAILER!!!")].concat();
        assert!(apply(&cpio).is_err());
    }

    proptest! {
        #[test]
        fn hostile_archives_end(
            changes in prop::collection::vec((0..400_usize, any::<u8>()), 0..6),
            cut in 0..600_usize,
        ) {
            let mut bytes = [
                header(0o100_644, 2, 0, "a"), header(0o100_644, 2, 4, "b"), b"data".to_vec(),
                header(0o120_777, 1, 4, "l"), b"goal".to_vec(), header(0, 1, 0, "TRAILER!!!"),
            ].concat();
            for (at, byte) in changes {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            bytes.truncate(cut);
            fuzz_cpio(&bytes);
        }
    }
}
