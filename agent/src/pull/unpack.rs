//! The pipeline behind the socket: decompress, guard against bombs, hash, apply. Memory is bounded: a few buffers, the
//! decompressor's window and what `layer` holds.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use protocol::ids::Digest;
use sha2::{Digest as _, Sha256};

use super::budget::Draw;
use super::gzip::Gunzip;
use super::handover;
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
pub(super) const ZSTD_WINDOW_LOG: u32 = 23;

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

/// How a layer is unpacked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way<'a> {
    /// How it is compressed.
    pub(super) compression: Compression,
    /// Hashes and applies on a thread of its own, which takes less time and a little more work.
    pub(super) two_threads: bool,
    /// What it takes where it did not say what it needs.
    pub(super) draw: &'a Draw<'a>,
}

/// Unpacks a blob into a directory; returns what it held and the digest of the uncompressed stream, read to its end.
pub(super) fn unpack(
    source: &mut Source<'_>,
    way: Way<'_>,
    dir: &Path,
    limits: &Limits,
) -> Result<(Summary, Digest), LayerError> {
    let received = source.received();
    let Way { compression, two_threads, draw } = way;
    let input = BufReader::with_capacity(BUFFER_BYTES, source);
    let mut decoder: Box<dyn Read + '_> = match compression {
        Compression::Plain => Box::new(input),
        Compression::Gzip => Box::new(Gunzip::new(input)),
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(input);
            let decoder = decoder.and_then(|mut decoder| {
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Ok(decoder)
            });
            Box::new(decoder.map_err(LayerError::Read)?)
        }
    };
    let guarded = Guarded { inner: &mut decoder, produced: 0, received, draw: Some(draw) };
    if !two_threads {
        return apply(BufReader::with_capacity(BUFFER_BYTES, guarded), dir, limits);
    }
    let (filler, reader) = handover::pair(BUFFER_BYTES);
    std::thread::scope(|scope| {
        let applied = scope.spawn(move || apply(reader, dir, limits));
        filler.fill_from(guarded);
        let died = || LayerError::Read(io::Error::other("the unpacking thread died"));
        applied.join().unwrap_or_else(|_| Err(died()))
    })
}

fn apply(
    plain: impl BufRead,
    dir: &Path,
    limits: &Limits,
) -> Result<(Summary, Digest), LayerError> {
    let mut stream = Hashed { inner: plain, hash: Sha256::new(), known: 0 };
    let summary = layer::apply(&mut stream, dir, limits)?;
    // Padding behind the end marker belongs to the diff id.
    loop {
        match stream.fill_buf().map(<[u8]>::len) {
            Ok(0) => break,
            Ok(count) => stream.consume(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(LayerError::Read(error)),
        }
    }
    Ok((summary, Digest(stream.hash.finalize().into())))
}

/// Hashes a stream buffer by buffer: what is consumed was hashed when it was first seen.
struct Hashed<R> {
    inner: R,
    hash: Sha256,
    /// Bytes of the present buffer that are hashed and not yet consumed.
    known: usize,
}

impl<R: BufRead> BufRead for Hashed<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let buffer = self.inner.fill_buf()?;
        if self.known == 0 {
            self.hash.update(buffer);
            self.known = buffer.len();
        }
        Ok(buffer)
    }

    fn consume(&mut self, count: usize) {
        self.known = self.known.saturating_sub(count);
        self.inner.consume(count);
    }
}

impl<R: BufRead> Read for Hashed<R> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(target.len());
        if let (Some(to), Some(from)) = (target.get_mut(..count), available.get(..count)) {
            to.copy_from_slice(from);
        }
        self.consume(count);
        Ok(count)
    }
}

/// Stops a stream that unpacks to too much.
pub(super) struct Guarded<'a, R> {
    inner: R,
    produced: u64,
    received: Rc<Cell<u64>>,
    draw: Option<&'a Draw<'a>>,
}

impl<R> Guarded<'_, R> {
    /// Guards a stream whose compressed bytes are counted there, and which draws on no budget.
    pub(super) fn new(inner: R, received: Rc<Cell<u64>>) -> Self {
        Self { inner, produced: 0, received, draw: None }
    }
}

impl<R: Read> Read for Guarded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if let Some(draw) = self.draw {
            draw.take(count as u64)?;
        }
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
    fn one_thread_and_two_unpack_the_same_and_find_the_same_digest() {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, length) in [("empty", 0), ("small", 5), ("large", 3 * BUFFER_BYTES + 7)] {
            let content: Vec<u8> = (0..length).map(|at| at.to_le_bytes()[0]).collect();
            let mut header = tar::Header::new_ustar();
            header.set_size(length as u64);
            header.set_mode(0o640);
            header.set_mtime(1);
            tar.append_data(&mut header, name, &content[..]).expect("entry");
        }
        let mut bytes = tar.into_inner().expect("tar");
        // Padding behind the end marker, as GNU tar writes it.
        bytes.resize(bytes.len().next_multiple_of(10240), 0);
        let (one, two) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two"));
        let limits = Limits::default();
        let simple = apply(BufReader::with_capacity(700, &bytes[..]), one.path(), &limits);
        let (filler, reader) = handover::pair(1000);
        let apart = std::thread::scope(|scope| {
            scope.spawn(|| filler.fill_from(&bytes[..]));
            apply(reader, two.path(), &limits)
        });
        let (simple, apart) = (simple.expect("one thread"), apart.expect("two threads"));
        assert_eq!(simple, apart);
        assert_eq!(simple.1, Digest::of(&bytes));
        for name in ["empty", "small", "large"] {
            let read = |dir: &Path| std::fs::read(dir.join(name)).expect("file");
            assert_eq!(read(one.path()), read(two.path()), "{name}");
        }
    }

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
