//! Counts what a layer takes unpacked while its tar goes by: entries, and bytes of file contents in whole blocks. A reader of
//! headers, not of archives: what it does not understand makes it say nothing, and nodes then estimate.

use protocol::oci::unpacked::Unpacked;

/// Bytes of a tar's blocks.
const BLOCK: usize = 512;
/// Largest PAX header that is read for a size, in bytes; a larger one makes the count unknown.
const MAX_PAX: u64 = 64 << 10;

/// Where in the stream we are.
#[derive(Debug)]
enum At {
    /// In a header, of which this much has come.
    Header(Vec<u8>),
    /// In a PAX header's records: what has come, its size, and its padding.
    Pax { records: Vec<u8>, size: usize, padding: u64 },
    /// In content that does not matter.
    Content(u64),
    /// Behind the end, or behind what was not understood.
    Done,
}

/// The count.
#[derive(Debug)]
pub(super) struct Count {
    at: At,
    seen: Unpacked,
    /// Size of the next entry, by a PAX header before it.
    pax_size: Option<u64>,
    understood: bool,
}

impl Default for Count {
    fn default() -> Self {
        let at = At::Header(Vec::with_capacity(BLOCK));
        Self { at, seen: Unpacked::default(), pax_size: None, understood: true }
    }
}

impl Count {
    /// Takes the next bytes of the uncompressed tar.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            bytes = match &mut self.at {
                At::Done => return,
                At::Content(left) => {
                    let skipped = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    *left -= skipped as u64;
                    if *left == 0 {
                        self.at = At::Header(Vec::with_capacity(BLOCK));
                    }
                    bytes.get(skipped..).unwrap_or_default()
                }
                At::Header(header) => {
                    let rest = fill(header, BLOCK, bytes);
                    if header.len() == BLOCK {
                        let header = std::mem::take(header);
                        self.header(&header);
                    }
                    rest
                }
                At::Pax { records, size, padding } => {
                    let rest = fill(records, *size, bytes);
                    if records.len() == *size {
                        let (records, padding) = (std::mem::take(records), *padding);
                        self.pax_size = pax_size(&records).or(self.pax_size);
                        self.at = content(padding);
                    }
                    rest
                }
            };
        }
    }

    /// What came, if all of it was understood.
    pub(super) fn finish(&self) -> Option<Unpacked> {
        self.understood.then_some(self.seen)
    }

    fn header(&mut self, header: &[u8]) {
        if header.iter().all(|byte| *byte == 0) {
            self.at = At::Done;
            return;
        }
        match self.next(header) {
            Some(at) => self.at = at,
            None => (self.understood, self.at) = (false, At::Done),
        }
    }

    /// What comes behind a header; `None` if it is not understood.
    fn next(&mut self, header: &[u8]) -> Option<At> {
        let size = number(header.get(124..136)?)?;
        let padded = |size: u64| size.div_ceil(BLOCK as u64).checked_mul(BLOCK as u64);
        match header.get(156)? {
            b'x' => {
                let size = Some(size).filter(|size| *size <= MAX_PAX)?;
                let padding = padded(size)? - size;
                let size = usize::try_from(size).ok()?;
                let records = Vec::with_capacity(size);
                Some(if size == 0 { content(0) } else { At::Pax { records, size, padding } })
            }
            b'g' | b'L' | b'K' => Some(content(padded(size)?)),
            // Old GNU sparse files have headers of their own behind the first.
            b'S' => None,
            kind => {
                let size = self.pax_size.take().unwrap_or(size);
                // Links may carry a size and have no content; everything else that has one has it.
                let whole = padded(if matches!(kind, b'1'..=b'6') { 0 } else { size })?;
                self.seen.add(if matches!(kind, b'0' | b'\0' | b'7') { size } else { 0 });
                Some(content(whole))
            }
        }
    }
}

/// Behind this much content comes the next header.
fn content(size: u64) -> At {
    if size == 0 { At::Header(Vec::with_capacity(BLOCK)) } else { At::Content(size) }
}

/// Fills up to a length; returns what is left.
fn fill<'a>(into: &mut Vec<u8>, length: usize, bytes: &'a [u8]) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(bytes.len().min(length.saturating_sub(into.len())));
    into.extend_from_slice(taken);
    rest
}

/// A size: octal digits, or base 256 (GNU).
fn number(field: &[u8]) -> Option<u64> {
    if let Some((first, rest)) = field.split_first()
        && first & 0x80 != 0
    {
        let start = u64::from(first & 0x7f);
        return rest
            .iter()
            .try_fold(start, |sum, byte| sum.checked_mul(256)?.checked_add(u64::from(*byte)));
    }
    let text = std::str::from_utf8(field).ok()?;
    let text = text.trim_matches(['\0', ' ']);
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// `size` among PAX records (`LENGTH KEY=VALUE\n`).
fn pax_size(records: &[u8]) -> Option<u64> {
    let mut rest = records;
    let mut found = None;
    while !rest.is_empty() {
        let space = rest.iter().position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(rest.get(..space)?).ok()?.parse().ok()?;
        let record = rest.get(space + 1..length)?;
        if let Some(value) = record.strip_prefix(b"size=") {
            found = std::str::from_utf8(value).ok()?.trim_end().parse().ok();
        }
        rest = rest.get(length..)?;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(tar: &[u8], step: usize) -> Option<Unpacked> {
        let mut count = Count::default();
        tar.chunks(step).for_each(|chunk| count.feed(chunk));
        count.finish()
    }

    fn add(tar: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, name: &str, size: usize) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size as u64);
        if kind == tar::EntryType::Symlink {
            header.set_link_name("x").expect("link");
        }
        tar.append_data(&mut header, name, &vec![7; size][..]).expect("entry");
    }

    #[test]
    fn files_count_in_blocks_and_everything_as_an_entry_however_the_bytes_come() {
        let mut tar = tar::Builder::new(Vec::new());
        let long = format!("{}end", "long/".repeat(40));
        for (kind, name, size) in [
            (tar::EntryType::Directory, "d/", 0),
            (tar::EntryType::Regular, "d/empty", 0),
            (tar::EntryType::Regular, "d/one", 1),
            (tar::EntryType::Regular, long.as_str(), 4097),
            (tar::EntryType::Symlink, "d/link", 0),
        ] {
            add(&mut tar, kind, name, size);
        }
        let tar = tar.into_inner().expect("tar");
        let expected = Some(Unpacked { bytes: 3 * 4096, entries: 5 });
        for step in [1, 7, 512, 1000, usize::MAX >> 1] {
            assert_eq!(count(&tar, step), expected, "{step}");
        }
    }

    #[test]
    fn a_size_in_a_pax_header_goes_before_the_header_s_own() {
        let mut bytes = Vec::new();
        let records = b"13 size=5000\n11 uid=100\n";
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_size(records.len() as u64);
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(records);
        bytes.resize(1024, 0);
        let mut header = tar::Header::new_ustar();
        header.set_path("f").expect("path");
        header.set_size(0);
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + 5120, 1);
        bytes.resize(bytes.len() + 1024, 0);
        assert_eq!(count(&bytes, 100), Some(Unpacked { bytes: 8192, entries: 1 }));
    }

    #[test]
    fn what_is_not_understood_says_nothing() {
        assert_eq!(count(&[b'x'; 512], 512), None);
        assert_eq!(count(&[], 1), Some(Unpacked::default()));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2048)) {
            count(&bytes, 300);
        }
    }
}
