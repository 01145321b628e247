//! A small reader of 64-bit little-endian ELF files (elf(5)): how a program is linked, and what a kernel module says of
//! itself in `.modinfo`. Pure and bounded: it allocates no more than a few times what it was given. Not a linker's view:
//! symbols, relocations and versions are not read.

#[doc(hidden)]
pub mod fake;

const MAGIC: &[u8] = b"\x7fELF\x02\x01";
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const SECTION_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const DYNAMIC_ENTRY: usize = 16;
/// `e_shstrndx` when the real index stands in section 0 (elf(5), `SHN_XINDEX`).
const XINDEX: u16 = 0xffff;
/// Most libraries that are listed of one program.
const MAX_NEEDED: usize = 256;
/// Longest interpreter or library name that is read, in bytes.
const MAX_NAME: usize = 4096;

/// Why a file could not be read as ELF.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ElfError {
    /// The magic number is missing, or it is not 64-bit little-endian.
    #[error("not a 64-bit little-endian ELF file")]
    NotElf,
    /// A header points outside the file.
    #[error("the {0} of the ELF file lies outside of it")]
    Outside(&'static str),
    /// The file has no `.modinfo` section, so it is no kernel module.
    #[error("no .modinfo section: not a kernel module")]
    NoModinfo,
    /// A name or a `.modinfo` entry is not UTF-8.
    #[error("the {0} of the ELF file is not UTF-8")]
    Text(&'static str),
}

/// How a program is linked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Linkage {
    /// Whether it is for x86-64.
    pub x86_64: bool,
    /// The dynamic loader it asks for (`PT_INTERP`).
    pub interpreter: Option<String>,
    /// The libraries it asks for (`DT_NEEDED`), in file order.
    pub needed: Vec<String>,
}

impl Linkage {
    /// Whether the program runs where there is no loader and no library.
    #[must_use]
    pub fn is_static(&self) -> bool {
        self.interpreter.is_none() && self.needed.is_empty()
    }
}

/// Reads how a program is linked.
///
/// # Errors
/// The file is not ELF, or a header points outside of it.
pub fn linkage(bytes: &[u8]) -> Result<Linkage, ElfError> {
    let file = File::new(bytes)?;
    let segments = file.segments()?;
    let mut linkage = Linkage { x86_64: file.machine()? == EM_X86_64, ..Linkage::default() };
    for segment in &segments {
        match segment.kind {
            PT_INTERP => {
                let text = file.slice(segment.offset, segment.size, "interpreter")?;
                linkage.interpreter = Some(c_string(text, "interpreter")?);
            }
            PT_DYNAMIC => linkage.needed = file.needed(segment, &segments)?,
            _ => {}
        }
    }
    Ok(linkage)
}

/// Reads the `key=value` entries of a kernel module's `.modinfo` section, in file order.
///
/// # Errors
/// The file is not ELF, a header points outside of it, or it is no kernel module.
pub fn modinfo(bytes: &[u8]) -> Result<Vec<(&str, &str)>, ElfError> {
    let file = File::new(bytes)?;
    let section = file.section(b".modinfo")?.ok_or(ElfError::NoModinfo)?;
    let mut entries = Vec::new();
    for entry in section.split(|byte| *byte == 0).filter(|entry| !entry.is_empty()) {
        let text = std::str::from_utf8(entry).map_err(|_| ElfError::Text("module information"))?;
        entries.extend(text.split_once('='));
    }
    Ok(entries)
}

/// Drives both readers, for fuzzing.
pub fn fuzz_elf(bytes: &[u8]) {
    let _linkage = linkage(bytes);
    let _modinfo = modinfo(bytes);
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

struct File<'a> {
    bytes: &'a [u8],
}

impl<'a> File<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, ElfError> {
        if bytes.starts_with(MAGIC) { Ok(Self { bytes }) } else { Err(ElfError::NotElf) }
    }

    fn machine(&self) -> Result<u16, ElfError> {
        u16_at(self.bytes, 0x12).ok_or(ElfError::Outside("header"))
    }

    fn segments(&self) -> Result<Vec<Segment>, ElfError> {
        let outside = ElfError::Outside("program header table");
        let header = || Some((u64_at(self.bytes, 0x20)?, u16_at(self.bytes, 0x38)?));
        let (offset, count) = header().ok_or(ElfError::Outside("header"))?;
        let size = u64::from(count) * to_u64(PROGRAM_HEADER);
        let table = self.slice(offset, size, "program header table")?;
        let segment = |raw: &[u8]| {
            Some(Segment {
                kind: u32_at(raw, 0)?,
                offset: u64_at(raw, 8)?,
                address: u64_at(raw, 16)?,
                size: u64_at(raw, 32)?,
            })
        };
        table.chunks_exact(PROGRAM_HEADER).map(segment).collect::<Option<_>>().ok_or(outside)
    }

    fn needed(&self, dynamic: &Segment, segments: &[Segment]) -> Result<Vec<String>, ElfError> {
        let table = self.slice(dynamic.offset, dynamic.size, "dynamic section")?;
        let entries: Vec<(u64, u64)> = table
            .chunks_exact(DYNAMIC_ENTRY)
            .map_while(|raw| Some((u64_at(raw, 0)?, u64_at(raw, 8)?)))
            .take_while(|(tag, _)| *tag != 0)
            .collect();
        let names: Vec<u64> = entries
            .iter()
            .filter(|(tag, _)| *tag == DT_NEEDED)
            .map(|(_, value)| *value)
            .take(MAX_NEEDED)
            .collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let outside = || ElfError::Outside("dynamic string table");
        let table = entries.iter().find(|(tag, _)| *tag == DT_STRTAB).ok_or_else(outside)?.1;
        let base = segments
            .iter()
            .filter(|segment| segment.kind == PT_LOAD)
            .find_map(|segment| {
                let into =
                    table.checked_sub(segment.address).filter(|into| *into < segment.size)?;
                segment.offset.checked_add(into)
            })
            .ok_or_else(outside)?;
        let name = |name: &u64| {
            let start = base.checked_add(*name).and_then(|at| usize::try_from(at).ok());
            let text = start.and_then(|at| self.bytes.get(at..)).ok_or_else(outside)?;
            c_string(text, "dynamic string table")
        };
        names.iter().map(name).collect()
    }

    fn section(&self, wanted: &[u8]) -> Result<Option<&'a [u8]>, ElfError> {
        let outside = || ElfError::Outside("section header table");
        let header = || {
            let (offset, count) = (u64_at(self.bytes, 0x28)?, u16_at(self.bytes, 0x3c)?);
            Some((offset, count, u16_at(self.bytes, 0x3e)?))
        };
        let (offset, count, names) = header().ok_or(ElfError::Outside("header"))?;
        if offset == 0 {
            return Ok(None);
        }
        let first = self.slice(offset, to_u64(SECTION_HEADER), "section header table")?;
        let count = match count {
            0 => u64_at(first, 32).ok_or_else(outside)?,
            count => u64::from(count),
        };
        let names = match names {
            XINDEX => u32_at(first, 40).ok_or_else(outside)?,
            names => u32::from(names),
        };
        let size = count.checked_mul(to_u64(SECTION_HEADER)).ok_or_else(outside)?;
        let table = self.slice(offset, size, "section header table")?;
        let names = usize::try_from(names).map_err(|_| outside())?;
        let names = table.chunks_exact(SECTION_HEADER).nth(names).ok_or_else(outside)?;
        let names = self.section_bytes(names, "section name table")?;
        for raw in table.chunks_exact(SECTION_HEADER) {
            let at = u32_at(raw, 0).and_then(|at| usize::try_from(at).ok());
            let name = at.and_then(|at| names.get(at..)).ok_or_else(outside)?;
            if name.strip_prefix(wanted).is_some_and(|rest| rest.first() == Some(&0)) {
                return self.section_bytes(raw, "section").map(Some);
            }
        }
        Ok(None)
    }

    fn section_bytes(&self, header: &[u8], what: &'static str) -> Result<&'a [u8], ElfError> {
        let place = || Some((u64_at(header, 24)?, u64_at(header, 32)?));
        let (offset, size) = place().ok_or(ElfError::Outside(what))?;
        self.slice(offset, size, what)
    }

    fn slice(&self, offset: u64, size: u64, what: &'static str) -> Result<&'a [u8], ElfError> {
        let end = offset.checked_add(size).and_then(|end| usize::try_from(end).ok());
        let start = usize::try_from(offset).ok();
        let range = start.zip(end).and_then(|(start, end)| self.bytes.get(start..end));
        range.ok_or(ElfError::Outside(what))
    }
}

fn to_u64(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// The text up to the first NUL, which may lie no further than [`MAX_NAME`].
fn c_string(bytes: &[u8], what: &'static str) -> Result<String, ElfError> {
    let text = bytes.get(..MAX_NAME.min(bytes.len())).unwrap_or_default();
    let end = text.iter().position(|byte| *byte == 0).ok_or(ElfError::Outside(what))?;
    let text = text.get(..end).unwrap_or_default();
    std::str::from_utf8(text).map(str::to_owned).map_err(|_| ElfError::Text(what))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_static_program_has_neither_loader_nor_libraries() {
        let linkage = linkage(&fake::program(None, &[])).unwrap();
        assert_eq!(linkage, Linkage { x86_64: true, interpreter: None, needed: vec![] });
        assert!(linkage.is_static());
    }

    #[test]
    fn a_dynamic_program_names_its_loader_and_libraries() {
        let file = fake::program(Some("/lib/ld.so"), &["libc.so.6", "libm.so.6"]);
        let linkage = linkage(&file).unwrap();
        assert_eq!(linkage.interpreter.as_deref(), Some("/lib/ld.so"));
        assert_eq!(linkage.needed, ["libc.so.6", "libm.so.6"]);
        assert!(!linkage.is_static());
    }

    #[test]
    fn this_test_program_is_dynamic_and_asks_for_libc() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let linkage = linkage(&bytes).unwrap();
        assert!(linkage.needed.iter().any(|name| name.starts_with("libc.so")), "{linkage:?}");
    }

    #[test]
    fn modinfo_is_read_in_order() {
        let file = fake::module(&[("depends", "a,b"), ("alias", "pci:*"), ("alias", "x=y")]);
        let expected = [("depends", "a,b"), ("alias", "pci:*"), ("alias", "x=y")];
        assert_eq!(modinfo(&file).unwrap(), expected);
    }

    #[test]
    fn what_is_no_module_says_so() {
        assert_eq!(modinfo(b"#!/bin/sh"), Err(ElfError::NotElf));
        assert_eq!(modinfo(&fake::program(None, &[])), Err(ElfError::NoModinfo));
        let mut cut = fake::module(&[("name", "x")]);
        cut.truncate(cut.len() - 1);
        assert_eq!(modinfo(&cut), Err(ElfError::Outside("section header table")));
    }

    proptest! {
        #[test]
        fn spoilt_files_never_panic(at in 0_usize..400, byte: u8, cut in 0_usize..500) {
            for mut file in [
                fake::module(&[("depends", "a,b")]),
                fake::program(Some("/lib/ld.so"), &["libc.so.6"]),
            ] {
                let at = at % file.len();
                file[at] = byte;
                file.truncate(cut.max(6));
                fuzz_elf(&file);
            }
        }

        #[test]
        fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 6..300)) {
            bytes[..6].copy_from_slice(MAGIC);
            fuzz_elf(&bytes);
        }
    }
}
