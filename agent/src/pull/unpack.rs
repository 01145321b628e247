//! The pipeline behind the socket: decompress, hash, guard against bombs, apply. Memory is bounded: two buffers, the
//! decompressor's window and what `layer` holds.

use std::cell::Cell;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;
use protocol::ids::Digest;
use sha2::{Digest as _, Sha256};

use super::source::Source;
use crate::layer::{self, LayerError, Limits, Summary};

/// Buffer in front of the decompressor and behind it, in bytes.
const BUFFER_BYTES: usize = 256 << 10;
/// Unpacked bytes that are not yet held against the ratio.
pub(crate) const RATIO_FREE_BYTES: u64 = 64 << 20;
/// Most unpacked bytes for each received one, beyond [`RATIO_FREE_BYTES`].
pub(crate) const MAX_RATIO: u64 = 20;
/// Largest zstd window, as a power of two: 8 MiB, what `zstd -19` and every registry's tool writes. `--ultra` and
/// `--long` need more and are refused: four layers at once would hold half a gigabyte.
const ZSTD_WINDOW_LOG: u32 = 23;

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Plain,
    Gzip,
    Zstd,
}

impl Compression {
    /// What a media type says. Docker's and OCI's types, and their "nondistributable" kin, end alike.
    pub(super) fn of(media_type: &str) -> Option<Self> {
        let types = ["application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."];
        if !types.iter().any(|prefix| media_type.starts_with(prefix)) {
            return None;
        }
        match media_type.rsplit_once("tar")?.1 {
            "" => Some(Self::Plain),
            "+gzip" | ".gzip" => Some(Self::Gzip),
            "+zstd" | ".zstd" => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// Unpacks a blob into a directory; returns what it held and the digest of the uncompressed stream, read to its end.
pub(super) fn unpack(
    source: &mut Source<'_>,
    compression: Compression,
    dir: &Path,
    limits: &Limits,
) -> Result<(Summary, Digest), LayerError> {
    let received = source.received();
    let input = BufReader::with_capacity(BUFFER_BYTES, source);
    match compression {
        Compression::Plain => apply(input, received, dir, limits),
        Compression::Gzip => apply(MultiGzDecoder::new(input), received, dir, limits),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)
                .and_then(|mut decoder| {
                    decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                    Ok(decoder)
                })
                .map_err(LayerError::Read)?;
            apply(&mut decoder, received, dir, limits)
        }
    }
}

fn apply(
    plain: impl Read,
    received: Rc<Cell<u64>>,
    dir: &Path,
    limits: &Limits,
) -> Result<(Summary, Digest), LayerError> {
    let guarded = Guarded { inner: plain, hash: Sha256::new(), produced: 0, received };
    let mut stream = BufReader::with_capacity(BUFFER_BYTES, guarded);
    let summary = layer::apply(&mut stream, dir, limits)?;
    // Padding behind the end marker belongs to the diff id.
    io::copy(&mut stream, &mut io::sink()).map_err(LayerError::Read)?;
    let digest = stream.into_inner().hash.finalize();
    Ok((summary, Digest(digest.into())))
}

/// Hashes what it passes on and stops a stream that unpacks to too much.
struct Guarded<R> {
    inner: R,
    hash: Sha256,
    produced: u64,
    received: Rc<Cell<u64>>,
}

impl<R: Read> Read for Guarded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(buffer.get(..count).unwrap_or_default());
        self.produced += count as u64;
        let allowed = self.received.get().saturating_mul(MAX_RATIO).max(RATIO_FREE_BYTES);
        if self.produced > allowed {
            return Err(io::Error::other(format!(
                "the layer unpacks to more than {MAX_RATIO} times its size"
            )));
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types_say_how_a_layer_is_compressed() {
        use protocol::oci::*;
        for (media_type, expected) in [
            (MEDIA_LAYER_TAR, Some(Compression::Plain)),
            (MEDIA_LAYER_GZIP, Some(Compression::Gzip)),
            (MEDIA_LAYER_ZSTD, Some(Compression::Zstd)),
            (MEDIA_DOCKER_LAYER_GZIP, Some(Compression::Gzip)),
            ("application/vnd.docker.image.rootfs.diff.tar", Some(Compression::Plain)),
            (
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
                Some(Compression::Gzip),
            ),
            ("application/vnd.oci.image.layer.v1.tar+xz", None),
            ("application/x-tar", None),
            (MEDIA_EMPTY, None),
        ] {
            assert_eq!(Compression::of(media_type), expected, "{media_type}");
        }
    }
}
