//! One stream from a thread that decompresses to a thread that hashes and applies, in buffers that go round: what makes
//! one large layer use two cores. Memory is bounded by [`BUFFERS`] of them.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Buffers that go round: one being filled, one on its way, one being applied.
const BUFFERS: usize = 3;

/// The filling end.
#[derive(Debug)]
pub(super) struct Filler {
    full: SyncSender<io::Result<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
}

/// The reading end. The stream ends where the filler was dropped.
#[derive(Debug)]
pub(super) struct Reader {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: SyncSender<Vec<u8>>,
    buffer: Vec<u8>,
    at: usize,
}

/// Both ends of a stream, with buffers of this many bytes.
pub(super) fn pair(bytes: usize) -> (Filler, Reader) {
    let (fill, full) = sync_channel(BUFFERS);
    let (give_back, empty) = sync_channel(BUFFERS);
    for _ in 1..BUFFERS {
        // There is room for all of them.
        let _ = give_back.try_send(vec![0; bytes]);
    }
    let reader = Reader { full, empty: give_back, buffer: vec![0; bytes], at: bytes };
    (Filler { full: fill, empty }, reader)
}

impl Filler {
    /// Reads a stream to its end, or to its error, which the reader gets in its place. Stops early when nobody reads.
    pub(super) fn fill_from(self, mut stream: impl Read) {
        while let Ok(mut buffer) = self.empty.recv() {
            buffer.resize(buffer.capacity(), 0);
            let read = fill(&mut stream, &mut buffer);
            let (count, error) = read;
            buffer.truncate(count);
            let ended = count < buffer.capacity();
            if count > 0 && self.full.send(Ok(buffer)).is_err() {
                return;
            }
            if let Some(error) = error {
                // A reader that went away has an error of its own.
                let _ = self.full.send(Err(error));
                return;
            }
            if ended {
                return;
            }
        }
    }
}

/// Fills a buffer as far as the stream goes.
fn fill(stream: &mut impl Read, buffer: &mut [u8]) -> (usize, Option<io::Error>) {
    let mut filled = 0;
    while let Some(free) = buffer.get_mut(filled..).filter(|free| !free.is_empty()) {
        match stream.read(free) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (filled, Some(error)),
        }
    }
    (filled, None)
}

impl BufRead for Reader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at >= self.buffer.len()
            && let Ok(next) = self.full.recv()
        {
            let used = std::mem::replace(&mut self.buffer, next?);
            self.at = 0;
            // A filler that has ended needs no buffer.
            let _ = self.empty.try_send(used);
        }
        Ok(self.buffer.get(self.at..).unwrap_or_default())
    }

    fn consume(&mut self, count: usize) {
        self.at = self.at.saturating_add(count).min(self.buffer.len());
    }
}

impl Read for Reader {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives at most seven bytes at a time, then an error.
    struct Drips<'a>(&'a [u8], Option<io::ErrorKind>);

    impl Read for Drips<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.len().min(7).min(buffer.len());
            let (now, rest) = self.0.split_at(count);
            buffer[..count].copy_from_slice(now);
            self.0 = rest;
            match (count, self.1) {
                (0, Some(kind)) => Err(kind.into()),
                _ => Ok(count),
            }
        }
    }

    #[test]
    fn every_byte_arrives_in_order_whatever_its_length_is_to_the_buffers() {
        for length in [0, 1, 63, 64, 65, 128, 1000] {
            let bytes: Vec<u8> = (0..length).map(|at: usize| at.to_le_bytes()[0]).collect();
            let (filler, mut reader) = pair(64);
            let mut arrived = Vec::new();
            std::thread::scope(|scope| {
                scope.spawn(|| filler.fill_from(Drips(&bytes, None)));
                reader.read_to_end(&mut arrived).expect("read");
            });
            assert_eq!(arrived, bytes);
        }
    }

    #[test]
    fn an_error_comes_behind_the_bytes_before_it() {
        for length in [0, 64, 100] {
            let bytes = vec![1; length];
            let (filler, mut reader) = pair(64);
            filler_then(filler, &bytes, || {
                let mut arrived = Vec::new();
                let error = reader.read_to_end(&mut arrived).expect_err("error");
                assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
                assert_eq!(arrived, bytes);
            });
        }
    }

    fn filler_then(filler: Filler, bytes: &[u8], then: impl FnOnce()) {
        std::thread::scope(|scope| {
            scope.spawn(|| filler.fill_from(Drips(bytes, Some(io::ErrorKind::BrokenPipe))));
            then();
        });
    }

    #[test]
    fn a_reader_that_goes_away_ends_the_filler() {
        let (filler, reader) = pair(64);
        std::thread::scope(|scope| {
            scope.spawn(|| filler.fill_from(io::repeat(7)));
            drop(reader);
        });
    }
}
