//! A tar writer with nothing left to chance: ustar headers, PAX records for what these cannot hold (pax(1), POSIX.1-2001).
//!
//! No files are opened here.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

/// Bytes of a tar block.
const BLOCK: u64 = 512;

/// What an entry without content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    Symlink,
    HardLink,
    Fifo,
}

/// What every entry has.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Entry<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) xattrs: &'a [(String, Vec<u8>)],
    /// Its own time; the writer's when absent.
    pub(crate) time: Option<Time>,
}

/// A time of modification, since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Time {
    pub(crate) seconds: u64,
    pub(crate) nanoseconds: u32,
}

/// Writes entries; every one is dated `epoch` unless it says otherwise.
pub(crate) struct TarWriter<'a> {
    out: &'a mut dyn Write,
    epoch: u64,
}

impl<'a> TarWriter<'a> {
    pub(crate) fn new(out: &'a mut dyn Write, epoch: u64) -> Self {
        Self { out, epoch }
    }

    /// A regular file; fails with `UnexpectedEof` when the content is shorter than `size`.
    pub(crate) fn file(
        &mut self,
        entry: &Entry<'_>,
        size: u64,
        content: &mut dyn Read,
    ) -> io::Result<()> {
        self.header(entry, EntryType::Regular, size, b"")?;
        let copied = io::copy(&mut content.take(size), &mut self.out)?;
        if copied < size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.pad(size)
    }

    /// An entry without content; `target` is what links point to.
    pub(crate) fn special(
        &mut self,
        entry: &Entry<'_>,
        kind: Kind,
        target: &[u8],
    ) -> io::Result<()> {
        let kind = match kind {
            Kind::Directory => EntryType::Directory,
            Kind::Symlink => EntryType::Symlink,
            Kind::HardLink => EntryType::Link,
            Kind::Fifo => EntryType::Fifo,
        };
        if kind != EntryType::Directory {
            return self.header(entry, kind, 0, target);
        }
        let path = [entry.path, b"/"].concat();
        self.header(&Entry { path: &path, ..*entry }, kind, 0, target)
    }

    /// The two zero blocks at the end.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.out.write_all(&[0; 1024])
    }

    fn header(
        &mut self,
        entry: &Entry<'_>,
        kind: EntryType,
        size: u64,
        target: &[u8],
    ) -> io::Result<()> {
        let mut records = Vec::new();
        for (name, value) in entry.xattrs {
            record(&mut records, format!("SCHILY.xattr.{name}").as_bytes(), value);
        }
        let mut header = Header::new_ustar();
        if let Some(ustar) = header.as_ustar_mut() {
            fill(&mut ustar.name, entry.path, b"path", &mut records);
            fill(&mut ustar.linkname, target, b"linkpath", &mut records);
        }
        let time = entry.time.unwrap_or(Time { seconds: self.epoch, nanoseconds: 0 });
        if time.nanoseconds > 0 {
            let text = format!("{}.{:09}", time.seconds, time.nanoseconds);
            record(&mut records, b"mtime", text.as_bytes());
        }
        if !records.is_empty() {
            self.pax(&records)?;
        }
        header.set_entry_type(kind);
        header.set_mode(entry.mode);
        header.set_uid(entry.uid.into());
        header.set_gid(entry.gid.into());
        header.set_size(size);
        header.set_mtime(time.seconds);
        header.set_cksum();
        self.out.write_all(header.as_bytes())
    }

    fn pax(&mut self, records: &[u8]) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_path("PaxHeader")?;
        header.set_entry_type(EntryType::XHeader);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(self.epoch);
        header.set_size(records.len() as u64);
        header.set_cksum();
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(records)?;
        self.pad(records.len() as u64)
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let rest = size.next_multiple_of(BLOCK) - size;
        io::copy(&mut io::repeat(0).take(rest), &mut self.out).map(|_| ())
    }
}

/// Puts text into a header field; what does not fit goes whole into a record.
fn fill(field: &mut [u8], text: &[u8], key: &[u8], records: &mut Vec<u8>) {
    if text.len() > field.len() {
        record(records, key, text);
    }
    for (slot, byte) in field.iter_mut().zip(text) {
        *slot = *byte;
    }
}

/// `LENGTH KEY=VALUE\n`, where LENGTH counts itself.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_records_length_counts_itself() {
        for size in [0, 1, 4, 5, 6, 85, 86, 87, 88, 89, 90, 988, 989, 990, 991] {
            let mut records = Vec::new();
            record(&mut records, b"path", &vec![b'x'; size]);
            let text = String::from_utf8(records).expect("text");
            let written: usize = text.split(' ').next().expect("length").parse().expect("number");
            assert_eq!(written, text.len());
        }
    }
}
