//! A cpio archive in the `newc` form read as a stream, as RPM packages carry it (cpio(5)). Bounded: names are short, entries counted
//! by whoever takes them.

use std::io::{self, Read};

/// Length of a header in bytes.
const HEADER: usize = 110;
/// Longest name, with its NUL.
const MAX_NAME: usize = 4096;
/// Name of the entry that ends the archive.
const TRAILER: &[u8] = b"TRAILER!!!";
/// The file type in a mode, and that of a regular file.
const TYPE_MASK: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;

/// One entry, without its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its path as the archive has it.
    pub name: String,
    /// Whether it is a regular file.
    pub regular: bool,
    /// Size of what follows, in bytes.
    pub size: u32,
    /// The file's number, where it has several names; all but the last of these have no contents.
    pub link: Option<u64>,
}

/// Hands out every entry with a reader of its contents; what is not read of them is skipped. Ends at the trailer.
///
/// # Errors
/// The archive is cut or is none, a name is longer than 4095 bytes or not UTF-8, or `take` fails.
pub fn each(
    mut input: impl Read,
    mut take: impl FnMut(&Entry, &mut dyn Read) -> io::Result<()>,
) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER];
        input.read_exact(&mut header)?;
        let (mut entry, name_size) = parse(&header)?;
        let mut name = vec![0; padded(HEADER + name_size) - HEADER];
        input.read_exact(&mut name)?;
        name.truncate(name_size.saturating_sub(1));
        if name == TRAILER {
            return Ok(());
        }
        entry.name = String::from_utf8(name).map_err(|_| odd("a name in it is not UTF-8"))?;
        let mut body = input.by_ref().take(u64::from(entry.size));
        take(&entry, &mut body)?;
        io::copy(&mut body, &mut io::sink())?;
        if body.limit() > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let size = usize::try_from(entry.size).unwrap_or(usize::MAX);
        let mut padding = [0; 3];
        input.read_exact(&mut padding[..(4 - size % 4) % 4])?;
    }
}

fn padded(size: usize) -> usize {
    size.next_multiple_of(4)
}

/// The entry, still without its name, and the size of that.
fn parse(header: &[u8; HEADER]) -> io::Result<(Entry, usize)> {
    match header.get(..6) {
        // The second has sums, which are over the bytes themselves and of no use here.
        Some(b"070701" | b"070702") => {}
        Some(b"07070X") => {
            return Err(odd("it has files of over 4 GiB, whose names are not in its archive"));
        }
        _ => return Err(odd("its payload is no cpio archive (newc)")),
    }
    let field = |index: usize| {
        let digits = header.get(6 + index * 8..14 + index * 8);
        let text = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let number = text.and_then(|text| u32::from_str_radix(text, 16).ok());
        number.ok_or_else(|| odd("a header of its archive is damaged"))
    };
    let (number, mode, names, size) = (field(0)?, field(1)?, field(4)?, field(6)?);
    let device = u64::from(field(7)?) << 52 ^ u64::from(field(8)?) << 32;
    let name_size = usize::try_from(field(11)?).unwrap_or(usize::MAX);
    if name_size == 0 || name_size > MAX_NAME {
        return Err(odd("a name in its archive is empty or too long"));
    }
    let regular = mode & TYPE_MASK == REGULAR;
    let link = (regular && names > 1).then_some(device ^ u64::from(number));
    Ok((Entry { name: String::new(), regular, size, link }, name_size))
}

fn odd(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Drives the reader, for fuzzing.
pub fn fuzz_newc(bytes: &[u8]) {
    let _entries = each(bytes, |_, _| Ok(()));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::archive;
    use crate::tree::Tree;

    fn archive() -> Vec<u8> {
        let mut tree = Tree::new();
        tree.file("a", 0o644, b"12345".to_vec()).unwrap();
        tree.directory("dir", 0o755).unwrap();
        tree.file("dir/empty", 0o644, Vec::new()).unwrap();
        tree.symlink("dir/link", "a").unwrap();
        archive::write(&tree, 0).unwrap()
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<(String, bool, String)>> {
        let mut entries = Vec::new();
        each(bytes, |entry, body| {
            let mut text = String::new();
            if entry.name != "a" || entries.len() > 99 {
                body.read_to_string(&mut text)?;
            }
            entries.push((entry.name.clone(), entry.regular, text));
            Ok(())
        })?;
        Ok(entries)
    }

    #[test]
    fn entries_come_in_order_and_what_is_not_read_is_skipped() {
        let entry = |name: &str, regular, text: &str| (name.to_owned(), regular, text.to_owned());
        let mut entries = read(&archive()).unwrap();
        entries.retain(|(name, ..)| name != ".");
        let expected = [
            entry("a", true, ""),
            entry("dir", false, ""),
            entry("dir/empty", true, ""),
            entry("dir/link", false, "a"),
        ];
        assert_eq!(entries, expected);
    }

    #[test]
    fn a_cut_archive_and_other_forms_are_errors() {
        let whole = archive();
        for cut in [0, 50, 111, whole.len() / 2] {
            assert!(read(&whole[..cut]).is_err(), "{cut}");
        }
        let mut stripped = whole;
        stripped[5] = b'X';
        assert!(read(&stripped).unwrap_err().to_string().contains("over 4 GiB"));
    }

    proptest! {
        #[test]
        fn spoilt_archives_never_panic(at in 0_usize..600, byte: u8, cut in 0_usize..1200) {
            let mut bytes = archive();
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut);
            fuzz_newc(&bytes);
        }
    }
}
