//! The tar stream as a sequence of entries: ustar, GNU and PAX headers, every length checked before anything is held.
//!
//! Reads headers itself, with the `tar` crate's header types, because `tar::Entries` buffers long names and PAX records
//! without a limit and splits PAX records at newlines. Does not touch files.

use std::io::BufRead;
use std::os::fd::AsFd;

use tar::{EntryType, Header};

use super::pax::{self, Records, Sparse, Time};
use super::sparse::{self, Map};
use super::{LayerError, MAX_EXTENSION_BYTES, text};

/// Size of a tar block, in bytes.
const BLOCK: u64 = 512;
/// Sizes that do not fit the header's eleven octal digits begin here.
const OCTAL_SIZE_END: u64 = 1 << 33;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    Fifo,
    Device,
}

/// One entry, its extensions applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    /// As it stands in the archive.
    pub(super) path: Vec<u8>,
    /// Target of a symlink or hard link, else empty.
    pub(super) link: Vec<u8>,
    /// Bytes of content, holes included; 0 unless a file.
    pub(super) size: u64,
    /// Where the pieces of the content belong, if not all of it is in the archive.
    pub(super) sparse: Option<Map>,
    /// Permission bits with setuid, setgid and sticky.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Long names and PAX records that wait for the entry they belong to.
#[derive(Debug, Default)]
struct Pending {
    /// Where the first of them begins.
    offset: u64,
    bytes: u64,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Option<Records>,
}

/// A tar stream being read.
#[derive(Debug)]
pub(super) struct Archive<R> {
    input: R,
    /// Bytes read so far.
    offset: u64,
    /// Content of the current entry that was not read yet.
    content: u64,
    /// Padding behind it.
    padding: u64,
}

impl<R: BufRead> Archive<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, offset: 0, content: 0, padding: 0 }
    }

    /// The next entry, or `None` at the end marker or at the end of the stream on an entry's border (Go's tar accepts
    /// that too; whether the stream is whole is for its digest to say). Skips what is left of the entry before.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut pending = Pending::default();
        loop {
            self.skip_rest()?;
            let offset = self.offset;
            let Some(header) = self.read_header(pending.bytes > 0)? else { return Ok(None) };
            let size = pax::number(&header.as_old().size);
            let size = size.and_then(|size| u64::try_from(size).ok());
            let size =
                size.ok_or(LayerError::Header { offset, reason: "the size is no number" })?;
            match header.entry_type() {
                EntryType::XHeader | EntryType::XGlobalHeader => {
                    self.read_pax(&header, size, offset, &mut pending)?;
                }
                EntryType::GNULongName | EntryType::GNULongLink => {
                    self.read_long(&header, size, offset, &mut pending)?;
                }
                _ => return self.entry(&header, size, offset, pending).map(Some),
            }
        }
    }

    /// Writes the current entry's content to a file and returns its length, holes included. The bytes go from the stream's
    /// own buffer to the kernel.
    pub(super) fn copy_data(&mut self, file: impl AsFd, entry: &Entry) -> Result<u64, LayerError> {
        let Some(map) = &entry.sparse else {
            self.copy(&file, &entry.path, self.content)?;
            return Ok(entry.size);
        };
        let failed = |action| {
            let path = text(&entry.path);
            move |errno: rustix::io::Errno| LayerError::Io { action, path, source: errno.into() }
        };
        for (offset, length) in &map.pieces {
            rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(*offset))
                .map_err(failed("seek in"))?;
            self.copy(&file, &entry.path, *length)?;
        }
        rustix::fs::ftruncate(&file, map.real).map_err(failed("set the size of"))?;
        Ok(map.real)
    }

    fn copy(&mut self, file: impl AsFd, path: &[u8], length: u64) -> Result<(), LayerError> {
        let mut left = length.min(self.content);
        while left > 0 {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX);
            let available = self.fill("inside a file's content")?;
            let chunk = available.get(..wanted.min(available.len())).unwrap_or_default();
            let written = rustix::io::retry_on_intr(|| rustix::io::write(&file, chunk));
            let written = written.map_err(|errno| LayerError::Io {
                action: "write",
                path: text(path),
                source: errno.into(),
            })?;
            self.consume(written);
            self.content -= written as u64;
            left -= written as u64;
        }
        Ok(())
    }

    fn fill(&mut self, place: &'static str) -> Result<&[u8], LayerError> {
        let available = loop {
            match self.input.fill_buf() {
                Ok(available) => break available.len(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        };
        if available == 0 {
            return Err(LayerError::Truncated { place });
        }
        self.input.fill_buf().map_err(LayerError::Read)
    }

    fn consume(&mut self, count: usize) {
        self.input.consume(count);
        self.offset += count as u64;
    }

    /// Skips what is left of an entry. The last one's padding may be missing altogether: `umoci insert` writes such
    /// layers, and Go's tar reads them.
    fn skip_rest(&mut self) -> Result<(), LayerError> {
        let (content, padding) = (self.content, self.padding);
        (self.content, self.padding) = (0, 0);
        self.skip(content)?;
        match self.skip(padding.min(1)) {
            Err(LayerError::Truncated { .. }) => Ok(()),
            done => done.and_then(|()| self.skip(padding.saturating_sub(1))),
        }
    }

    fn skip(&mut self, mut rest: u64) -> Result<(), LayerError> {
        while rest > 0 {
            let available = self.fill("inside an entry")?.len();
            let step = usize::try_from(rest).unwrap_or(usize::MAX).min(available);
            self.consume(step);
            rest -= step as u64;
        }
        Ok(())
    }

    /// Reads one block; `None` when the stream ends before it and may.
    fn read_block(&mut self, may_end: bool) -> Result<Option<[u8; 512]>, LayerError> {
        let mut block = [0; 512];
        let mut filled = 0;
        while let Some(free) = block.get_mut(filled..).filter(|free| !free.is_empty()) {
            match self.input.read(free) {
                Ok(0) if filled == 0 && may_end => return Ok(None),
                Ok(0) => return Err(LayerError::Truncated { place: "inside a header" }),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        }
        self.offset += BLOCK;
        Ok(Some(block))
    }

    /// Reads a header and checks its sum; `None` at the archive's end.
    fn read_header(&mut self, owed: bool) -> Result<Option<Header>, LayerError> {
        let offset = self.offset;
        let Some(block) = self.read_block(!owed)? else { return Ok(None) };
        if block == [0; 512] {
            if owed {
                return Err(LayerError::Truncated { place: "between an extension and its entry" });
            }
            return match self.read_block(true)? {
                None => Ok(None),
                Some(second) if second == [0; 512] => Ok(None),
                Some(_) => {
                    Err(LayerError::Header { offset, reason: "a lone zero block stands before it" })
                }
            };
        }
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(&block);
        let before = block.iter().take(148).chain(block.iter().skip(156));
        let sum: i64 = before.map(|byte| i64::from(*byte)).sum::<i64>() + 8 * i64::from(b' ');
        if pax::number(&header.as_old().cksum) != Some(sum) {
            return Err(LayerError::Header { offset, reason: "its checksum is wrong" });
        }
        Ok(Some(header))
    }

    /// Reads the content of an extension, which counts against the entry's limit before it is held.
    fn read_extension(
        &mut self,
        size: u64,
        offset: u64,
        pending: &mut Pending,
    ) -> Result<Vec<u8>, LayerError> {
        if pending.bytes == 0 {
            pending.offset = offset;
        }
        // A header of its own costs a block, so that empty extensions do not come without end.
        pending.bytes = pending.bytes.saturating_add(size).saturating_add(BLOCK);
        if pending.bytes > MAX_EXTENSION_BYTES + 4 * BLOCK || size > MAX_EXTENSION_BYTES {
            let reason = "long names and PAX records of one entry exceed 64 KiB";
            return Err(LayerError::Extension { offset, reason });
        }
        let mut data = vec![0; usize::try_from(size).unwrap_or(0)];
        let mut filled = 0;
        while let Some(free) = data.get_mut(filled..).filter(|free| !free.is_empty()) {
            match self.input.read(free) {
                Ok(0) => return Err(LayerError::Truncated { place: "inside an extension" }),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        }
        self.offset += size;
        self.padding = padding(size);
        Ok(data)
    }

    fn read_pax(
        &mut self,
        header: &Header,
        size: u64,
        offset: u64,
        pending: &mut Pending,
    ) -> Result<(), LayerError> {
        let data = self.read_extension(size, offset, pending)?;
        let failed = |reason| LayerError::Extension { offset, reason };
        if header.entry_type() == EntryType::XGlobalHeader {
            return pax::check_global(&data).map_err(failed);
        }
        let records = pax::records(&data).map_err(failed)?;
        match pending.pax.replace(records) {
            None => Ok(()),
            Some(_) => Err(failed("two PAX headers belong to one entry")),
        }
    }

    fn read_long(
        &mut self,
        header: &Header,
        size: u64,
        offset: u64,
        pending: &mut Pending,
    ) -> Result<(), LayerError> {
        let mut data = self.read_extension(size, offset, pending)?;
        let failed = |reason| LayerError::Extension { offset, reason };
        if data.last() == Some(&0) {
            data.pop();
        }
        if data.is_empty() || data.contains(&0) {
            return Err(failed("a long name is empty or holds a NUL byte"));
        }
        let place = match header.entry_type() {
            EntryType::GNULongName => &mut pending.long_path,
            _ => &mut pending.long_link,
        };
        match place.replace(data) {
            None => Ok(()),
            Some(_) => Err(failed("two long names belong to one entry")),
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        size: u64,
        offset: u64,
        pending: Pending,
    ) -> Result<Entry, LayerError> {
        let failed = |reason| LayerError::Header { offset, reason };
        let pax = pending.pax.unwrap_or_default();
        let differ = |reason| LayerError::Extension { offset: pending.offset, reason };
        if pax.path.is_some() && pending.long_path.is_some()
            || pax.link.is_some() && pending.long_link.is_some()
        {
            return Err(differ("GNU and PAX both bring a long name"));
        }
        let size = agreed_size(size, pax.size).map_err(differ)?;
        let path =
            pax.path.or(pending.long_path).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax.link.or(pending.long_link);
        let link = link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        let kind = kind(header.entry_type(), &path).map_err(failed)?;
        if pax.sparse.is_some() && kind != Kind::File {
            return Err(failed("an entry that is no file is sparse"));
        }
        if kind != Kind::File && size != 0 {
            return Err(failed("an entry that is no file has a size"));
        }
        let old = header.as_old();
        let field = |field: &[u8]| pax::number(field).and_then(|value| u64::try_from(value).ok());
        let id = |pax: Option<u64>, raw: &[u8]| {
            let id = pax.or_else(|| field(raw)).and_then(|id| u32::try_from(id).ok());
            id.filter(|id| *id != u32::MAX).ok_or(failed("an owner is no valid id"))
        };
        let mtime = pax
            .mtime
            .or_else(|| pax::number(&old.mtime).map(|seconds| Time { seconds, nanoseconds: 0 }));
        let mode = field(&old.mode).ok_or(failed("the mode is no number"))? & 0o7777;
        let (uid, gid) = (id(pax.uid, &old.uid)?, id(pax.gid, &old.gid)?);
        let mut sparse = match header.entry_type() {
            EntryType::GNUSparse if pax.sparse.is_some() => {
                return Err(failed("it is sparse in two ways"));
            }
            EntryType::GNUSparse => Some(self.old_map(header, offset)?),
            _ => None,
        };
        self.content = size;
        self.padding = padding(size);
        if let Some(told) = pax.sparse {
            sparse = Some(self.pax_map(told, offset)?);
        }
        if let Some(map) = &sparse {
            map.check(self.content).map_err(failed)?;
        }
        let size = sparse.as_ref().map_or(size, |map| map.real);
        Ok(Entry {
            kind,
            path,
            link: link.unwrap_or_default(),
            size,
            sparse,
            mode: u32::try_from(mode).unwrap_or(0),
            uid,
            gid,
            mtime: mtime.ok_or(failed("the time is no number"))?,
            xattrs: pax.xattrs,
        })
    }
}

impl<R: BufRead> Archive<R> {
    /// The map of GNU's old form: four pieces in the header, more in blocks behind it.
    fn old_map(&mut self, header: &Header, offset: u64) -> Result<Map, LayerError> {
        let failed = |reason| LayerError::Header { offset, reason };
        let bytes = header.as_bytes();
        let real = bytes.get(483..495).and_then(pax::number).and_then(|it| u64::try_from(it).ok());
        let real = real.ok_or(failed("the size of a sparse file is no number"))?;
        let mut map = Map { pieces: Vec::new(), real };
        map.add_old(bytes.get(386..482).unwrap_or_default()).map_err(failed)?;
        let mut more = bytes.get(482) == Some(&1);
        while more {
            let truncated = LayerError::Truncated { place: "inside the map of a sparse file" };
            let block = self.read_block(false)?.ok_or(truncated)?;
            let before = map.pieces.len();
            map.add_old(block.get(..504).unwrap_or_default()).map_err(failed)?;
            more = block.get(504) == Some(&1);
            if more && map.pieces.len() == before {
                return Err(failed("the map of a sparse file goes on without end"));
            }
        }
        Ok(map)
    }

    /// The map that a PAX header tells, or that stands in front of the content.
    fn pax_map(&mut self, told: Sparse, offset: u64) -> Result<Map, LayerError> {
        let failed = |reason| LayerError::Extension { offset, reason };
        let real = told.real.ok_or(failed("the size of a sparse file is missing"))?;
        let mut map = Map { pieces: Vec::new(), real };
        let numbers = match (told.version, told.map) {
            ((0, 0 | 1), Some(text)) => sparse::commas(&text).map_err(failed)?,
            ((1, 0), None) => self.map_in_front(offset)?,
            _ => return Err(failed("a sparse file is of an unknown version")),
        };
        map.add_list(&numbers).map_err(failed)?;
        Ok(map)
    }

    /// Reads a map of version 1.0, block by block, off the content.
    fn map_in_front(&mut self, offset: u64) -> Result<Vec<u64>, LayerError> {
        let failed = |reason| LayerError::Extension { offset, reason };
        let mut text = Vec::new();
        loop {
            if self.content < BLOCK || text.len() >= sparse::MAX_MAP_BYTES {
                return Err(failed("the map of a sparse file has no end"));
            }
            let truncated = LayerError::Truncated { place: "inside the map of a sparse file" };
            text.extend_from_slice(&self.read_block(false)?.ok_or(truncated)?);
            self.content -= BLOCK;
            if let Some(numbers) = sparse::lines(&text).map_err(failed)? {
                return Ok(numbers);
            }
        }
    }
}

/// The size that header and PAX header agree on.
fn agreed_size(header: u64, pax: Option<u64>) -> Result<u64, &'static str> {
    match pax {
        None => Ok(header),
        Some(pax) if pax == header => Ok(pax),
        // Sizes beyond the field are written as zero (Go) or as the largest octal number.
        Some(pax) if pax >= OCTAL_SIZE_END && (header == 0 || header == OCTAL_SIZE_END - 1) => {
            Ok(pax)
        }
        Some(_) => Err("the PAX size and the header's size disagree"),
    }
}

fn kind(entry_type: EntryType, path: &[u8]) -> Result<Kind, &'static str> {
    Ok(match entry_type {
        // Before ustar, a slash at the end was all that told a directory.
        EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Link => Kind::HardLink,
        EntryType::Fifo => Kind::Fifo,
        EntryType::Char | EntryType::Block => Kind::Device,
        _ => return Err("the type of entry is unknown"),
    })
}

/// Bytes that fill the last block of a content of this size.
fn padding(size: u64) -> u64 {
    (BLOCK - size % BLOCK) % BLOCK
}
