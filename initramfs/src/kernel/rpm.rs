//! An RPM package unpacked (rpm's `docs/manual/format_v4.md`): lead, signature header, header, and a compressed cpio archive, of which
//! what is to be had of a kernel is taken ([`Contents`]). The sums that the package carries are checked; its signature is not: whoever
//! gives a file answers for it.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use protocol::ids::Digest;

use super::contents::Contents;
use super::newc;

/// Largest package that is read, in bytes.
const MAX_PACKAGE: u64 = 4 << 30;
/// Length of the lead in bytes, and how it begins.
const LEAD: usize = 96;
const LEAD_MAGIC: &[u8] = b"\xed\xab\xee\xdb";
/// How a header begins: magic and version.
const HEADER_MAGIC: &[u8] = b"\x8e\xad\xe8\x01";
/// Length of a header's own head, and of one entry of its index, in bytes.
const HEAD: usize = 16;
const ENTRY: usize = 16;
/// Most entries of a header's index, and most bytes of its values: rpm's own limits.
const MAX_ENTRIES: usize = 0xffff;
const MAX_VALUES: usize = 256 << 20;
/// Types of values that are read.
const INT32: u32 = 4;
const STRING: u32 = 6;
const STRING_ARRAY: u32 = 8;
/// Tags that are read.
const TAG_FORMAT: u32 = 1124;
const TAG_COMPRESSOR: u32 = 1125;
const TAG_PAYLOAD_DIGEST: u32 = 5092;
const TAG_PAYLOAD_ALGORITHM: u32 = 5093;
/// SHA-256 of the header, in the signature header.
const TAG_HEADER_SHA256: u32 = 273;
/// SHA-256 among the algorithms (RFC 9580, 9.5).
const SHA256: u32 = 8;
/// How gzip begins (RFC 1952, 2.3.1).
const GZIP_MAGIC: &[u8] = b"\x1f\x8b";
/// Memory the xz decoder may use, in KiB.
const XZ_MEMORY_KIB: u32 = 256 << 10;

/// Why a package could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum RpmError {
    /// The package, or what is in it, could not be read.
    #[error("cannot unpack {path}")]
    Unpack {
        /// The package.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The package is not what an RPM package looks like.
    #[error("{path} cannot be used as an RPM package: {reason}")]
    Odd {
        /// The package.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
}

/// What is needed of a package's headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head<'a> {
    /// How the payload is compressed: `gzip`, `xz`, `zstd`, ….
    pub compressor: &'a str,
    /// The payload, compressed.
    pub payload: &'a [u8],
}

/// Unpacks a package's part of a kernel.
///
/// # Errors
/// It is not an RPM package, its sums are wrong, its payload is compressed in another way than gzip, xz or zstd, or is cut or too
/// large.
pub fn unpack(package: &Path, contents: &mut Contents) -> Result<(), RpmError> {
    let odd = |reason| RpmError::Odd { path: package.to_owned(), reason };
    let fail = |source| RpmError::Unpack { path: package.to_owned(), source };
    if fs::metadata(package).map_err(fail)?.len() > MAX_PACKAGE {
        return Err(odd("it is larger than 4 GiB"));
    }
    let bytes = fs::read(package).map_err(fail)?;
    let head = parse(&bytes).map_err(odd)?;
    let payload = head.payload;
    let archive: Box<dyn Read> = match head.compressor {
        "none" => Box::new(payload),
        "gzip" => Box::new(flate2::read::MultiGzDecoder::new(payload)),
        "xz" => Box::new(lzma_rust2::XzReader::new_mem_limit(payload, true, XZ_MEMORY_KIB)),
        "zstd" => Box::new(zstd::stream::read::Decoder::new(payload).map_err(fail)?),
        _ => return Err(odd("its payload is compressed by neither gzip, xz nor zstd")),
    };
    let take = |entry: &newc::Entry, body: &mut dyn Read| match entry.regular {
        true => contents.file(Path::new(&entry.name), entry.size.into(), entry.link, body),
        false => contents.count(entry.size.into()),
    };
    newc::each(archive, take).map_err(fail)
}

/// Reads a package's headers and checks the sums in them. Pure.
///
/// # Errors
/// What is wrong with it.
pub fn parse(package: &[u8]) -> Result<Head<'_>, &'static str> {
    let after = package.strip_prefix(LEAD_MAGIC).ok_or("it does not begin as one")?;
    let after = after.get(LEAD - LEAD_MAGIC.len()..).ok_or("it is cut")?;
    let (signature, size) = Header::read(after)?;
    // The signature header is padded to 8 bytes.
    let after = after.get(size.next_multiple_of(8)..).ok_or("it is cut")?;
    let (header, size) = Header::read(after)?;
    let (own, payload) = after.split_at_checked(size).ok_or("it is cut")?;
    check(signature.text(TAG_HEADER_SHA256, STRING), own, "its header is damaged")?;
    if header.number(TAG_PAYLOAD_ALGORITHM) == Some(SHA256) {
        let sum = header.text(TAG_PAYLOAD_DIGEST, STRING_ARRAY);
        check(sum, payload, "its payload is damaged")?;
    }
    if header.text(TAG_FORMAT, STRING).is_some_and(|format| format != "cpio") {
        return Err("its payload is no cpio archive");
    }
    // Without one it is gzip, rpm's oldest, or not compressed, which rpm's gzip passes on as it is.
    let unnamed = if payload.starts_with(GZIP_MAGIC) { "gzip" } else { "none" };
    let compressor = header.text(TAG_COMPRESSOR, STRING).unwrap_or(unnamed);
    Ok(Head { compressor, payload })
}

fn check(sum: Option<&str>, bytes: &[u8], wrong: &'static str) -> Result<(), &'static str> {
    let Some(sum) = sum else { return Ok(()) };
    let expected = Digest::from_str(&format!("sha256:{sum}")).map_err(|_| wrong)?;
    if Digest::of(bytes) == expected { Ok(()) } else { Err(wrong) }
}

/// Drives the parsers of the package and of its archive, for fuzzing.
pub fn fuzz_rpm(bytes: &[u8]) {
    if let Ok(head) = parse(bytes) {
        newc::fuzz_newc(head.payload);
    }
}

/// A header: an index of tags, and their values behind it.
struct Header<'a> {
    index: &'a [u8],
    values: &'a [u8],
}

impl<'a> Header<'a> {
    /// The header at the beginning of these bytes, and its length.
    fn read(bytes: &'a [u8]) -> Result<(Self, usize), &'static str> {
        if !bytes.starts_with(HEADER_MAGIC) {
            return Err("a header of it is damaged");
        }
        let count = number(bytes, 8).ok_or("it is cut")?;
        let size = number(bytes, 12).ok_or("it is cut")?;
        let large = |value: u32| usize::try_from(value).unwrap_or(usize::MAX);
        let (count, size) = (large(count), large(size));
        if count > MAX_ENTRIES || size > MAX_VALUES {
            return Err("a header of it is too large");
        }
        let values_at = HEAD + count * ENTRY;
        let index = bytes.get(HEAD..values_at).ok_or("it is cut")?;
        let values = bytes.get(values_at..values_at + size).ok_or("it is cut")?;
        Ok((Self { index, values }, values_at + size))
    }

    /// The value of a tag, from its beginning to the end of all values.
    fn value(&self, tag: u32, kind: u32) -> Option<&'a [u8]> {
        let is_it = |entry: &&[u8]| number(entry, 0) == Some(tag) && number(entry, 4) == Some(kind);
        let entry = self.index.chunks_exact(ENTRY).find(is_it)?;
        self.values.get(usize::try_from(number(entry, 8)?).ok()?..)
    }

    /// A string, or the first of several.
    fn text(&self, tag: u32, kind: u32) -> Option<&'a str> {
        let value = self.value(tag, kind)?;
        let end = value.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(value.get(..end)?).ok()
    }

    fn number(&self, tag: u32) -> Option<u32> {
        number(self.value(tag, INT32)?, 0)
    }
}

/// The number at this place: everything in an RPM package has its first byte first.
fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(strings: &[(u32, u32, &[u8])]) -> Vec<u8> {
        let (mut index, mut values) = (Vec::new(), Vec::new());
        for (tag, kind, value) in strings {
            let at = u32::try_from(values.len()).unwrap();
            for number in [*tag, *kind, at, 1] {
                index.extend(number.to_be_bytes());
            }
            values.extend_from_slice(value);
            values.resize(values.len().next_multiple_of(4), 0);
        }
        let sizes = [strings.len(), values.len()].map(|size| u32::try_from(size).unwrap());
        let sizes = sizes.map(u32::to_be_bytes).concat();
        [HEADER_MAGIC, [0; 4].as_slice(), &sizes, &index, &values].concat()
    }

    fn package(compressor: &str, payload: &[u8]) -> Vec<u8> {
        let text = |text: &str| [text.as_bytes(), b"\0"].concat();
        let sum = Digest::of(payload).hex().to_string();
        let own = header(&[
            (TAG_FORMAT, STRING, &text("cpio")),
            (TAG_COMPRESSOR, STRING, &text(compressor)),
            (TAG_PAYLOAD_DIGEST, STRING_ARRAY, &text(&sum)),
            (TAG_PAYLOAD_ALGORITHM, INT32, &SHA256.to_be_bytes()),
        ]);
        let sum = Digest::of(&own).hex().to_string();
        let mut signature = header(&[(TAG_HEADER_SHA256, STRING, &text(&sum))]);
        signature.resize(signature.len().next_multiple_of(8), 0);
        [LEAD_MAGIC, &[0; LEAD - 4], &signature, &own, payload].concat()
    }

    #[test]
    fn headers_lead_to_the_payload() {
        let package = package("zstd", b"payload");
        let head = parse(&package).unwrap();
        assert_eq!(head, Head { compressor: "zstd", payload: b"payload" });
    }

    #[test]
    fn what_is_damaged_is_named() {
        let good = package("zstd", b"payload");
        let spoil = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            parse(&bytes).map(|_| ())
        };
        assert_eq!(spoil(0), Err("it does not begin as one"));
        assert_eq!(spoil(good.len() - 1), Err("its payload is damaged"));
        assert_eq!(spoil(good.len() - 12), Err("its header is damaged"));
        assert_eq!(parse(&good[..good.len() - 9]), Err("it is cut"));
        assert_eq!(spoil(LEAD), Err("a header of it is damaged"));
    }

    #[test]
    fn an_unknown_compression_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.rpm");
        fs::write(&file, package("bzip2", b"BZ")).unwrap();
        let error = unpack(&file, &mut Contents::new(dir.path())).unwrap_err().to_string();
        assert!(error.ends_with("compressed by neither gzip, xz nor zstd"), "{error}");
    }

    proptest! {
        #[test]
        fn spoilt_packages_never_panic(at in 0_usize..500, byte: u8, cut in 0_usize..700) {
            let mut bytes = package("none", b"070701 not really");
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut);
            fuzz_rpm(&bytes);
        }

        #[test]
        fn random_headers_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            fuzz_rpm(&[LEAD_MAGIC, &[0; LEAD - 4], HEADER_MAGIC, &bytes].concat());
        }
    }
}
