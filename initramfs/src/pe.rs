//! Sections added to an EFI program, and read back (PE32+: Microsoft's "PE Format"). Pure: bytes in, bytes out, every offset checked.
//!
//! Only what a boot stub needs: sections go after the last one there is. Nothing is relocated, and a program that is signed is
//! refused, since its signature would no longer hold.

/// Bytes of a section header.
const SECTION_HEADER: usize = 40;
/// Bytes of the COFF file header.
const FILE_HEADER: usize = 20;
/// First two bytes of the optional header of a 64-bit program.
const PE32_PLUS: u16 = 0x20b;
/// Offset of the pointer to the PE signature.
const POINTER_AT: usize = 0x3c;
/// Most sections of a program that is read.
const MAX_SECTIONS: usize = 96;
/// `IMAGE_SCN_CNT_INITIALIZED_DATA | IMAGE_SCN_MEM_READ`.
const DATA_READ: u32 = 0x4000_0040;
/// Sections that are added begin on pages whatever the program asks for: firmware maps them by the page.
const PAGE: u32 = 4096;
/// Index of the certificate table among the data directories.
const CERTIFICATES: usize = 4;

/// Why a program cannot be read or added to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeError {
    /// It is no 64-bit EFI program.
    #[error("it is not a 64-bit EFI program: {0}")]
    Format(&'static str),
    /// A section's name does not fit.
    #[error("`{0}` is not a section name of at most 8 bytes")]
    Name(String),
    /// The program has a section of this name already.
    #[error("it has a section {0} already")]
    Exists(String),
    /// There is no room for more section headers in front of the first section.
    #[error("there is room for {room} more section headers, not for {wanted}")]
    NoRoom {
        /// How many fit.
        room: usize,
        /// How many are to be added.
        wanted: usize,
    },
    /// The program is signed.
    #[error("it is signed already: sections must be added before")]
    Signed,
    /// It would be 4 GiB or more, which its headers cannot say.
    #[error("it would be 4 GiB or larger")]
    TooLarge,
}

/// A section as the headers have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its name, without the zeros at its end.
    pub name: String,
    /// Where it is loaded, relative to the program's base.
    pub address: u32,
    /// Its size in memory, in bytes.
    pub size: u32,
    /// Where its bytes stand in the file.
    pub offset: u32,
    /// How many of them do.
    pub stored: u32,
}

impl Section {
    /// Its bytes in the file of the program it was read from.
    #[must_use]
    pub fn contents<'a>(&self, program: &'a [u8]) -> Option<&'a [u8]> {
        let at = usize::try_from(self.offset).ok()?;
        let length = usize::try_from(self.size.min(self.stored)).ok()?;
        program.get(at..at.checked_add(length)?)
    }
}

/// What the headers say.
#[derive(Debug)]
struct Headers {
    /// Offset of the COFF file header.
    file: usize,
    /// Offset of the optional header.
    optional: usize,
    /// Offset of the section table.
    table: usize,
    /// First offset that section headers may not reach.
    table_end: usize,
    section_alignment: u32,
    file_alignment: u32,
    sections: Vec<Section>,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at.saturating_add(value.len())) {
        place.copy_from_slice(value);
    }
}

/// The sections of a program, in the order of its table.
///
/// # Errors
/// It is no 64-bit EFI program.
pub fn sections(program: &[u8]) -> Result<Vec<Section>, PeError> {
    headers(program).map(|headers| headers.sections)
}

fn headers(program: &[u8]) -> Result<Headers, PeError> {
    let cut = || PeError::Format("its headers are cut short");
    if program.get(..2) != Some(b"MZ") {
        return Err(PeError::Format("it does not begin with MZ"));
    }
    let pointer = u32_at(program, POINTER_AT).ok_or_else(cut)?;
    let pe = usize::try_from(pointer).map_err(|_| cut())?;
    let file = pe.checked_add(4).ok_or_else(cut)?;
    if program.get(pe..file) != Some(b"PE\0\0") {
        return Err(PeError::Format("it has no PE signature"));
    }
    let optional = file + FILE_HEADER;
    let count = usize::from(u16_at(program, file + 2).ok_or_else(cut)?);
    let optional_size = usize::from(u16_at(program, file + 16).ok_or_else(cut)?);
    if u16_at(program, optional) != Some(PE32_PLUS) || optional_size < 112 {
        return Err(PeError::Format("it is not PE32+"));
    }
    if count > MAX_SECTIONS {
        return Err(PeError::Format("it has too many sections"));
    }
    let table = optional + optional_size;
    let at = |offset| u32_at(program, optional + offset).ok_or_else(cut);
    let (section_alignment, file_alignment, size_of_headers) = (at(32)?, at(36)?, at(60)?);
    if !section_alignment.is_power_of_two() || !file_alignment.is_power_of_two() {
        return Err(PeError::Format("its alignments are not powers of two"));
    }
    let sections = (0..count)
        .map(|index| section(program, table + index * SECTION_HEADER))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(cut)?;
    let first = sections.iter().filter(|it| it.stored > 0).map(|it| it.offset).min();
    let table_end = first.unwrap_or(size_of_headers).min(size_of_headers);
    let table_end = usize::try_from(table_end).map_err(|_| cut())?.min(program.len());
    Ok(Headers { file, optional, table, table_end, section_alignment, file_alignment, sections })
}

fn section(program: &[u8], at: usize) -> Option<Section> {
    let name = program.get(at..at.checked_add(8)?)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(Section {
        name: String::from_utf8_lossy(name).into_owned(),
        size: u32_at(program, at + 8)?,
        address: u32_at(program, at + 12)?,
        stored: u32_at(program, at + 16)?,
        offset: u32_at(program, at + 20)?,
    })
}

fn align(value: u64, to: u32) -> u64 {
    value.next_multiple_of(u64::from(to).max(1))
}

/// The program with these sections after its last one, read-only data, each on a section boundary. The same inputs give the
/// same bytes.
///
/// # Errors
/// The program cannot be read or is signed, a name does not fit or is taken, or there is no room.
pub fn append(program: &[u8], add: &[(&str, &[u8])]) -> Result<Vec<u8>, PeError> {
    let headers = headers(program)?;
    let cut = || PeError::Format("its headers are cut short");
    let directories = u32_at(program, headers.optional + 108).ok_or_else(cut)?;
    let certificates = headers.optional + 112 + 8 * CERTIFICATES;
    if directories as usize > CERTIFICATES && u32_at(program, certificates + 4) != Some(0) {
        return Err(PeError::Signed);
    }
    let used = headers.table + headers.sections.len() * SECTION_HEADER;
    let room = headers.table_end.saturating_sub(used) / SECTION_HEADER;
    if room < add.len() {
        return Err(PeError::NoRoom { room, wanted: add.len() });
    }
    let small = |value: u64| u32::try_from(value).map_err(|_| PeError::TooLarge);
    let ends = headers.sections.iter().map(|it| u64::from(it.address) + u64::from(it.size));
    let alignment = headers.section_alignment.max(PAGE);
    let mut address = align(ends.max().unwrap_or(0), alignment);
    let mut out = program.to_vec();
    let mut data = u64::from(u32_at(program, headers.optional + 8).ok_or_else(cut)?);
    for (index, (name, contents)) in add.iter().enumerate() {
        check_name(name, &headers.sections, add.get(..index).unwrap_or_default())?;
        out.resize(padded(out.len(), headers.file_alignment), 0);
        let offset = out.len() as u64;
        out.extend_from_slice(contents);
        out.resize(padded(out.len(), headers.file_alignment), 0);
        let stored = out.len() as u64 - offset;
        let header = used + index * SECTION_HEADER;
        let mut bytes = [0; SECTION_HEADER];
        put(&mut bytes, 0, name.as_bytes());
        let size = contents.len() as u64;
        for (at, value) in [(8, size), (12, address), (16, stored), (20, offset)] {
            put(&mut bytes, at, &small(value)?.to_le_bytes());
        }
        put(&mut bytes, 36, &DATA_READ.to_le_bytes());
        put(&mut out, header, &bytes);
        address = align(address + size, alignment);
        data += stored;
    }
    let count = u16::try_from(headers.sections.len() + add.len()).map_err(|_| PeError::TooLarge)?;
    put(&mut out, headers.file + 2, &count.to_le_bytes());
    put(&mut out, headers.optional + 8, &small(data)?.to_le_bytes());
    put(&mut out, headers.optional + 56, &small(address)?.to_le_bytes());
    // Firmware does not look at it (UEFI 2.10 section 2.1.1), and the one that was there no longer holds.
    put(&mut out, headers.optional + 64, &[0; 4]);
    Ok(out)
}

fn padded(length: usize, to: u32) -> usize {
    length.next_multiple_of(usize::try_from(to).unwrap_or(1).max(1))
}

fn check_name(name: &str, there: &[Section], added: &[(&str, &[u8])]) -> Result<(), PeError> {
    if name.is_empty() || name.len() > 8 || name.contains('\0') {
        return Err(PeError::Name(name.to_owned()));
    }
    let taken = there.iter().any(|it| it.name == name) || added.iter().any(|it| it.0 == name);
    if taken { Err(PeError::Exists(name.to_owned())) } else { Ok(()) }
}

/// Any bytes, as fuzzers and property tests give them: read, and added to where that is possible.
pub fn fuzz_pe(program: &[u8]) {
    if let Ok(out) = append(program, &[(".osrel", b"x")]) {
        let _ = sections(&out);
    }
}

/// The smallest program that can be added to, for tests: one section, room for more headers.
#[doc(hidden)]
#[must_use]
pub fn fake() -> Vec<u8> {
    let mut out = vec![0; 0x600];
    put(&mut out, 0, b"MZ");
    put(&mut out, POINTER_AT, &0x80_u32.to_le_bytes());
    put(&mut out, 0x80, b"PE\0\0");
    let (file, optional) = (0x84, 0x84 + FILE_HEADER);
    put(&mut out, file, &0x8664_u16.to_le_bytes());
    put(&mut out, file + 2, &1_u16.to_le_bytes());
    put(&mut out, file + 16, &240_u16.to_le_bytes());
    put(&mut out, optional, &PE32_PLUS.to_le_bytes());
    for (at, value) in
        [(8, 0x200_u32), (32, 0x1000), (36, 0x200), (56, 0x2000), (60, 0x400), (108, 16)]
    {
        put(&mut out, optional + at, &value.to_le_bytes());
    }
    let table = optional + 240;
    put(&mut out, table, b".text");
    for (at, value) in [(8, 0x123_u32), (12, 0x1000), (16, 0x200), (20, 0x400)] {
        put(&mut out, table + at, &value.to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sections_are_added_after_the_last_one_and_read_back() {
        let out = append(&fake(), &[(".osrel", b"ID=x\n"), (".linux", &[7; 5000])]).unwrap();
        let found = sections(&out).unwrap();
        let names: Vec<_> = found.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, [".text", ".osrel", ".linux"]);
        assert_eq!(found[1].contents(&out), Some(b"ID=x\n".as_slice()));
        assert_eq!(found[2].contents(&out), Some([7; 5000].as_slice()));
        assert_eq!((found[1].address, found[2].address), (0x2000, 0x3000));
        assert_eq!(u32_at(&out, 0x84 + FILE_HEADER + 56), Some(0x5000), "size of the image");
        assert_eq!(out.len() % 0x200, 0);
        assert_eq!(append(&fake(), &[(".osrel", b"ID=x\n"), (".linux", &[7; 5000])]), Ok(out));
    }

    #[test]
    fn what_cannot_be_added_is_said() {
        let add = |list: &[(&str, &[u8])]| append(&fake(), list).unwrap_err();
        assert_eq!(add(&[(".text", b"")]), PeError::Exists(".text".to_owned()));
        assert_eq!(add(&[(".a", b""), (".a", b"")]), PeError::Exists(".a".to_owned()));
        assert_eq!(add(&[(".toolongx", b"")]), PeError::Name(".toolongx".to_owned()));
        let many: Vec<(String, &[u8])> =
            (0..30).map(|n| (format!(".s{n}"), b"".as_slice())).collect();
        let many: Vec<(&str, &[u8])> =
            many.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        assert!(matches!(add(&many), PeError::NoRoom { wanted: 30, .. }));
        let mut signed = fake();
        put(&mut signed, 0x84 + FILE_HEADER + 112 + 8 * CERTIFICATES + 4, &8_u32.to_le_bytes());
        assert_eq!(append(&signed, &[]), Err(PeError::Signed));
        assert!(matches!(append(b"MZ", &[]), Err(PeError::Format(_))));
        assert!(matches!(sections(b"ELF"), Err(PeError::Format(_))));
    }

    proptest! {
        #[test]
        fn any_change_of_a_program_is_taken_without_a_panic(
            at in 0_usize..0x220, bytes in proptest::collection::vec(any::<u8>(), 1..9), cut in 0_usize..0x600,
        ) {
            let mut program = fake();
            let end = (at + bytes.len()).min(program.len());
            program[at..end].copy_from_slice(&bytes[..end - at]);
            fuzz_pe(&program);
            program.truncate(cut);
            fuzz_pe(&program);
        }
    }
}
