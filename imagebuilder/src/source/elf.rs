//! Whether bytes are a static ELF executable of an architecture (elf(5)). Pure; nothing is run.

/// Why an executable cannot stand alone in an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Not an ELF file of 64 bits, little-endian.
    #[error("not a 64-bit little-endian ELF executable")]
    NotElf,
    /// Its headers point outside it.
    #[error("a damaged ELF file")]
    Damaged,
    /// It wants an interpreter.
    #[error(
        "dynamically linked, it wants {interpreter}; link it statically, with RUSTFLAGS=-Ctarget-feature=+crt-static or -static"
    )]
    Dynamic {
        /// The interpreter's path.
        interpreter: String,
    },
    /// It is for another architecture.
    #[error("made for {found}, the image is {expected}")]
    Architecture {
        /// Its own.
        found: String,
        /// The image's.
        expected: String,
    },
}

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_INTERP: u32 = 3;

fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    word(bytes, at).map(u16::from_le_bytes)
}

fn usize_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(word(bytes, at)?)).ok()
}

/// Checks that the bytes are an executable that needs no interpreter, of this architecture (Go's name; an unknown one
/// is not compared).
///
/// # Errors
/// If they are not, with the reason.
pub fn check_static(bytes: &[u8], architecture: &str) -> Result<(), ElfError> {
    let kind = u16_at(bytes, 16);
    if !bytes.starts_with(b"\x7fELF\x02\x01")
        || bytes.len() < HEADER
        || !matches!(kind, Some(2 | 3))
    {
        return Err(ElfError::NotElf);
    }
    let machine = u16_at(bytes, 18).ok_or(ElfError::Damaged)?;
    let known = [("amd64", 62), ("arm64", 183), ("riscv64", 243)];
    let expected = known.iter().find(|(name, _)| *name == architecture);
    if expected.is_some_and(|(_, number)| *number != machine) {
        let found = known.iter().find(|(_, number)| *number == machine);
        return Err(ElfError::Architecture {
            found: found
                .map_or_else(|| format!("machine {machine}"), |(name, _)| (*name).to_owned()),
            expected: architecture.to_owned(),
        });
    }
    match interpreter(bytes).ok_or(ElfError::Damaged)? {
        None => Ok(()),
        Some(interpreter) => Err(ElfError::Dynamic { interpreter }),
    }
}

/// The path in PT_INTERP; the outer None means that the headers are damaged.
fn interpreter(bytes: &[u8]) -> Option<Option<String>> {
    let table = usize_at(bytes, 32)?;
    let count = usize::from(u16_at(bytes, 56)?);
    for index in 0..count {
        let at = table.checked_add(index.checked_mul(PROGRAM_HEADER)?)?;
        if u32::from_le_bytes(word(bytes, at)?) != PT_INTERP {
            continue;
        }
        let (start, size) = (usize_at(bytes, at + 8)?, usize_at(bytes, at + 32)?);
        let path = bytes.get(start..start.checked_add(size)?)?;
        return Some(Some(String::from_utf8_lossy(path).trim_end_matches('\0').to_owned()));
    }
    Some(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header and one program header of this type, which points to `/lib/ld.so\0`.
    fn elf(machine: u16, header: u32) -> Vec<u8> {
        let path = b"/lib/ld.so\0";
        let mut bytes = vec![0; HEADER + PROGRAM_HEADER];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 3;
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        bytes[56] = 1;
        bytes[HEADER..HEADER + 4].copy_from_slice(&header.to_le_bytes());
        let end = bytes.len() as u64;
        bytes[HEADER + 8..HEADER + 16].copy_from_slice(&end.to_le_bytes());
        bytes[HEADER + 32..HEADER + 40].copy_from_slice(&(path.len() as u64).to_le_bytes());
        bytes.extend_from_slice(path);
        bytes
    }

    #[test]
    fn only_a_static_executable_of_the_architecture_is_taken() {
        assert_eq!(check_static(&elf(62, 1), "amd64"), Ok(()));
        let error = check_static(&elf(62, PT_INTERP), "amd64").expect_err("dynamic").to_string();
        assert!(error.contains("dynamically linked, it wants /lib/ld.so;"), "{error}");
        let error = check_static(&elf(183, 1), "amd64").expect_err("arm").to_string();
        assert_eq!(error, "made for arm64, the image is amd64");
        assert_eq!(check_static(b"#!/bin/sh\n", "amd64"), Err(ElfError::NotElf));
        let mut damaged = elf(62, 1);
        damaged[40 - 1] = 0xff;
        assert_eq!(check_static(&damaged, "amd64"), Err(ElfError::Damaged));
    }

    proptest::proptest! {
        #[test]
        fn damaged_executables_never_panic(at in 0..131_usize, byte: u8, cut in 0..131_usize) {
            let mut bytes = elf(62, PT_INTERP);
            bytes[at.min(130)] = byte;
            let _ = check_static(&bytes, "amd64");
            let _ = check_static(&bytes[..cut], "amd64");
        }
    }
}
