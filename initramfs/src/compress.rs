//! How an initramfs is compressed, what the kernel must have to unpack it, and what kind of archive some bytes are. Pure.
//!
//! The same bytes give the same output on every machine: how the work is cut does not depend on how many processors there are.

use std::fmt;
use std::io::{self, Read, Write};
use std::num::NonZeroU64;
use std::str::FromStr;

use lzma_rust2::{CheckType, FilterType, XzOptions, XzReader, XzWriterMt};
use zstd::zstd_safe::CParameter;

use crate::archive;
use crate::kernel::kconfig::{Symbol, Value};
use crate::modules::wanted::Need;

/// zstd's level where none is given: level 19 takes two to three times as long for a hundredth of the size.
const ZSTD_LEVEL: u8 = 18;
/// The level that is for what is compressed once and kept: the last one whose window (8 MiB) every kernel takes without asking.
/// Beyond it nothing of ours gets smaller.
const ZSTD_SMALL: u8 = 19;
/// Highest level of zstd. Its window stays below the 128 MiB that the kernel's decoder allows (lib/decompress_unzstd.c).
const ZSTD_MAX: u8 = 22;
/// xz's preset where none is given. 9 has a larger dictionary, which no block of ours would fill.
const XZ_PRESET: u8 = 6;
/// Highest preset of xz.
const XZ_MAX: u8 = 9;
/// What one of xz's blocks holds, and its dictionary, in bytes. Blocks are compressed at the same time; with smaller ones the
/// whole gets larger.
const XZ_BLOCK: u32 = 4 << 20;
/// What one of zstd's jobs holds in bytes, at most up to level 18 and at least above it, for the same reasons.
const JOB: usize = 3 << 20;
/// Most jobs of one archive.
const MAX_JOBS: usize = 16;
/// How much of its window a job of zstd's sees of the one before, as zstd counts it: a quarter above level 18 and one in 32 up
/// to it, where more costs a fifth of the time for a hundredth of the size.
const OVERLAPS: (u32, u32) = (7, 4);
/// Largest window up to level 18, as a power of two: 4 MiB. A job sees no further, and a larger one costs time.
const FAST_WINDOW: u32 = 22;
/// Most threads that compress. The output is the same with any number.
const MAX_WORKERS: usize = 8;
/// Memory that unpacking xz may take here, in KiB.
const XZ_MEMORY_KIB: u32 = 1 << 17;

/// A way of compressing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// One zstd frame of this level.
    Zstd(u8),
    /// One xz stream of this preset, x86 code filtered. A tenth smaller than zstd, and six times as long to unpack.
    Xz(u8),
    /// Not at all.
    None,
}

impl Default for Compression {
    fn default() -> Self {
        Self::Zstd(ZSTD_LEVEL)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zstd(level) => write!(f, "zstd:{level}"),
            Self::Xz(preset) => write!(f, "xz:{preset}"),
            Self::None => f.write_str("none"),
        }
    }
}

/// Why some text names no way of compressing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of zstd, zstd:1 to zstd:22, xz, xz:0 to xz:9 and none")]
pub struct CompressionError(String);

impl FromStr for Compression {
    type Err = CompressionError;

    fn from_str(text: &str) -> Result<Self, CompressionError> {
        let fail = || CompressionError(text.to_owned());
        let (name, level) = text.split_once(':').map_or((text, None), |(n, l)| (n, Some(l)));
        let level = level.map(str::parse::<u8>).transpose().map_err(|_| fail())?;
        match (name, level) {
            ("zstd", None) => Ok(Self::default()),
            ("zstd", Some(level @ 1..=ZSTD_MAX)) => Ok(Self::Zstd(level)),
            ("xz", None) => Ok(Self::XZ),
            ("xz", Some(preset @ 0..=XZ_MAX)) => Ok(Self::Xz(preset)),
            ("none", None) => Ok(Self::None),
            _ => Err(fail()),
        }
    }
}

impl Compression {
    /// xz at the preset that is used where none is given.
    pub const XZ: Self = Self::Xz(XZ_PRESET);
    /// zstd for what is compressed once and kept.
    pub const SMALL: Self = Self::Zstd(ZSTD_SMALL);

    /// Symbols that a kernel's configuration must have for it to unpack this.
    #[must_use]
    pub fn needs(self) -> Vec<Symbol> {
        let names: &[&str] = match self {
            Self::Zstd(_) => &["CONFIG_RD_ZSTD"],
            Self::Xz(_) => &["CONFIG_RD_XZ", "CONFIG_XZ_DEC_X86"],
            Self::None => &[],
        };
        names.iter().map(|name| symbol(name, "unpacks the initramfs")).collect()
    }

    /// Compresses an archive.
    ///
    /// # Errors
    /// The codec failed.
    pub fn compress(self, archive: Vec<u8>) -> io::Result<Vec<u8>> {
        match self {
            Self::Zstd(level) => zstd_frame(&archive, level, workers()),
            Self::Xz(preset) => xz_stream(&archive, preset),
            Self::None => Ok(archive),
        }
    }
}

fn symbol(name: &str, reason: &str) -> Symbol {
    let (name, reason) = (name.to_owned(), reason.to_owned());
    Symbol {
        name,
        value: Value::Y,
        reason,
        need: Need::Required,
        without: None,
        flavours: Vec::new(),
    }
}

fn workers() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(processors.clamp(1, MAX_WORKERS)).unwrap_or(1)
}

/// How many jobs do the work: from the length alone, so that every machine makes the same of it.
fn jobs(length: usize, level: u8) -> usize {
    let jobs = if level <= ZSTD_LEVEL { length.div_ceil(JOB) } else { length / JOB };
    jobs.clamp(1, MAX_JOBS)
}

fn zstd_frame(archive: &[u8], level: u8, workers: u32) -> io::Result<Vec<u8>> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), i32::from(level))?;
    encoder.include_checksum(true)?;
    encoder.set_pledged_src_size(u64::try_from(archive.len()).ok())?;
    if archive.len() > JOB {
        // One worker cuts the work as many do, none would not.
        encoder.multithread(workers)?;
        let job = archive.len().div_ceil(jobs(archive.len(), level));
        encoder.set_parameter(CParameter::JobSize(u32::try_from(job).unwrap_or(u32::MAX)))?;
        let fast = level <= ZSTD_LEVEL;
        let overlap = if fast { OVERLAPS.1 } else { OVERLAPS.0 };
        encoder.set_parameter(CParameter::OverlapSizeLog(overlap))?;
    }
    if (17..=ZSTD_LEVEL).contains(&level) {
        encoder.set_parameter(CParameter::WindowLog(FAST_WINDOW))?;
    }
    encoder.write_all(archive)?;
    encoder.finish()
}

fn xz_stream(archive: &[u8], preset: u8) -> io::Result<Vec<u8>> {
    let mut options = XzOptions::with_preset(u32::from(preset));
    // The kernel's decoder knows no other checksum.
    options.set_check_sum_type(CheckType::Crc32);
    options.prepend_pre_filter(FilterType::BcjX86, 0);
    // Blocks hold at least a dictionary, which a larger one would make them grow with; a short archive needs none so large.
    let small = u32::try_from(archive.len().next_power_of_two()).unwrap_or(u32::MAX);
    let lzma = &mut options.lzma_options;
    lzma.dict_size = lzma.dict_size.min(XZ_BLOCK).min(small.max(4096));
    options.set_block_size(NonZeroU64::new(u64::from(XZ_BLOCK)));
    let mut writer = XzWriterMt::new(Vec::new(), options, workers())?;
    writer.write_all(archive)?;
    writer.finish()
}

/// What an archive that is appended is, by its first bytes (Linux: lib/decompress.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A newc cpio, not compressed.
    Cpio,
    /// Compressed, and the name of the symbol that unpacks it.
    Compressed(&'static str),
}

impl Kind {
    /// What these bytes are; none for what no kernel takes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Option<Self> {
        const KINDS: [(&[u8], Kind); 9] = [
            (b"070701", Kind::Cpio),
            (b"070702", Kind::Cpio),
            (&[0x28, 0xb5, 0x2f, 0xfd], Kind::Compressed("CONFIG_RD_ZSTD")),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Kind::Compressed("CONFIG_RD_XZ")),
            (&[0x1f, 0x8b], Kind::Compressed("CONFIG_RD_GZIP")),
            (&[0x02, 0x21, 0x4c, 0x18], Kind::Compressed("CONFIG_RD_LZ4")),
            (b"BZh", Kind::Compressed("CONFIG_RD_BZIP2")),
            (&[0x89, 0x4c, 0x5a, 0x4f], Kind::Compressed("CONFIG_RD_LZO")),
            (&[0x5d, 0, 0], Kind::Compressed("CONFIG_RD_LZMA")),
        ];
        KINDS.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, kind)| *kind)
    }

    /// The symbol that a kernel's configuration must have for it to unpack this, if any.
    #[must_use]
    pub fn needs(self) -> Option<Symbol> {
        match self {
            Self::Cpio => None,
            Self::Compressed(name) => Some(symbol(name, "unpacks an archive that is appended")),
        }
    }
}

/// Whether [`unpack`] knows what is compressed like this.
#[must_use]
pub fn unpacks(kind: Kind) -> bool {
    matches!(kind, Kind::Cpio | Kind::Compressed("CONFIG_RD_ZSTD" | "CONFIG_RD_XZ"))
}

/// Unpacks what [`Compression::compress`] made, and other archives of those kinds, one after the other, as a kernel does: with
/// zeros between them, and those that are not compressed at multiples of 4 bytes (init/initramfs.c). At most `most` bytes come out.
///
/// # Errors
/// The bytes are of no kind that is known here, damaged, one lies where no kernel looks for it, or more comes out.
pub fn unpack(bytes: &[u8], most: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while let Some(zeros) = rest.iter().position(|byte| *byte != 0) {
        rest = rest.get(zeros..).unwrap_or_default();
        let left = most.saturating_sub(out.len()) as u64;
        let before = out.len();
        let at = bytes.len() - rest.len();
        rest = match Kind::of(rest) {
            Some(Kind::Cpio) if !at.is_multiple_of(4) => {
                let text = format!("the cpio at its byte {at} is at no multiple of 4");
                return Err(io::Error::other(text));
            }
            Some(Kind::Cpio) => {
                let (one, behind) = rest.split_at(archive::length(rest).unwrap_or(rest.len()));
                out.extend_from_slice(one);
                behind
            }
            Some(Kind::Compressed("CONFIG_RD_ZSTD")) => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(rest)?.single_frame();
                decoder.by_ref().take(left + 1).read_to_end(&mut out)?;
                decoder.finish()
            }
            Some(Kind::Compressed("CONFIG_RD_XZ")) => {
                let mut decoder = XzReader::new_mem_limit(rest, false, XZ_MEMORY_KIB);
                decoder.by_ref().take(left + 1).read_to_end(&mut out)?;
                decoder.into_inner()
            }
            _ => return Err(io::Error::other("it is of a kind that is not unpacked here")),
        };
        if out.len() > most {
            return Err(io::Error::other(format!("more than {most} bytes come out of it")));
        }
        // As in the file itself: what follows begins on a multiple of 4.
        let used = out.len() - before;
        out.resize(before + used.next_multiple_of(4), 0);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(length: usize) -> Vec<u8> {
        let mut state = 7_u32;
        let step = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if state >> 30 == 0 { 0 } else { (state >> 24) as u8 & 0x1f }
        };
        (0..length).map(step).collect()
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["zstd:19", "zstd:22", "xz:6", "xz:0", "none"] {
            assert_eq!(name.parse::<Compression>().unwrap().to_string(), name);
        }
        assert_eq!("zstd".parse(), Ok(Compression::default()));
        assert_eq!(Compression::default().to_string(), "zstd:18");
        assert_eq!("xz".parse(), Ok(Compression::XZ));
        for wrong in ["", "zstd:0", "zstd:23", "xz:10", "none:1", "lz4", "zstd:", "xz:x"] {
            let error = wrong.parse::<Compression>().unwrap_err().to_string();
            assert!(error.contains("is none of zstd"), "{error}");
        }
    }

    #[test]
    fn what_was_compressed_comes_out_again_and_the_same_each_time() {
        for length in [0, 1, 100_000, 2 * JOB + 5] {
            let plain = [b"070701".as_slice(), &sample(length)].concat();
            let mut padded = plain.clone();
            padded.resize(plain.len().next_multiple_of(4), 0);
            for how in [Compression::Zstd(3), Compression::Xz(1), Compression::None] {
                let packed = how.compress(plain.clone()).unwrap();
                assert_eq!(how.compress(plain.clone()).unwrap(), packed, "{how}");
                let most = plain.len() + 8;
                assert!(unpack(&packed, most).unwrap() == padded, "{how} {length}");
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bytes() {
        // Up to level 18 no job is larger than 3 MiB, above it none is smaller.
        for (length, level, expected) in
            [(JOB - 1, 18, 1), (JOB + 1, 18, 2), (2 * JOB, 18, 2), (2 * JOB - 1, 19, 1)]
        {
            assert_eq!(jobs(length, level), expected, "{length} {level}");
        }
        let plain = sample(1 << 18).repeat(26);
        for level in [3, 18] {
            let one = zstd_frame(&plain, level, 1).unwrap();
            for workers in [2, 3, 5] {
                assert!(zstd_frame(&plain, level, workers).unwrap() == one, "{level} {workers}");
            }
        }
    }

    #[test]
    fn a_cpio_between_compressed_archives_comes_out_where_a_kernel_finds_it() {
        let mut tree = crate::tree::Tree::new();
        tree.file("a", 0o644, vec![1; 5]).unwrap();
        let plain = archive::write(&tree, 0).unwrap();
        let packed = Compression::Zstd(1).compress(plain.clone()).unwrap();
        let row = archive::join(vec![plain.clone(), packed.clone(), plain.clone(), packed]);
        let entries = archive::read_all(&unpack(&row, 1 << 20).unwrap()).unwrap();
        assert_eq!(entries.iter().filter(|entry| entry.path == "a").count(), 4);
        let odd = [b"\0\0".as_slice(), &plain].concat();
        let error = unpack(&odd, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("byte 2 is at no multiple of 4"), "{error}");
    }

    #[test]
    fn archives_in_a_row_come_out_in_a_row() {
        let mut row = Compression::Xz(1).compress(b"070701a".to_vec()).unwrap();
        row.resize(row.len().next_multiple_of(4) + 8, 0);
        row.extend(Compression::Zstd(1).compress(b"070701b".to_vec()).unwrap());
        row.resize(row.len().next_multiple_of(4), 0);
        row.extend(b"070701c");
        assert_eq!(unpack(&row, 100).unwrap(), b"070701a\x00070701b\x00070701c\0");
        assert!(unpack(&row, 10).unwrap_err().to_string().contains("more than 10 bytes"));
        assert!(unpack(b"junk", 10).is_err());
    }

    #[test]
    fn the_kernel_must_have_the_decoder() {
        let names = |how: Compression| -> Vec<_> {
            how.needs().into_iter().map(|symbol| symbol.name).collect()
        };
        assert_eq!(names(Compression::XZ), ["CONFIG_RD_XZ", "CONFIG_XZ_DEC_X86"]);
        assert!(names(Compression::None).is_empty());
        assert_eq!(Kind::of(b"070701..."), Some(Kind::Cpio));
        assert_eq!(Kind::of(&[0x1f, 0x8b, 8]), Some(Kind::Compressed("CONFIG_RD_GZIP")));
        assert_eq!(Kind::of(b"PK"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_unpacked_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0_usize..4) {
            let magic: [&[u8]; 4] = [&[], b"070701", &[0x28, 0xb5, 0x2f, 0xfd], &[0xfd, b'7', b'z', b'X', b'Z', 0]];
            let _ = unpack(&[magic[kind], &bytes].concat(), 10_000);
        }
    }
}
