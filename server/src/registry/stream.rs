//! Bytes of a file as the body of an answer: read on the pool of blocking threads, one buffer ahead of the connection.

use std::fs::File;
use std::io::{self, Read};
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use tokio::task::{JoinHandle, spawn_blocking};

/// Bytes that are read at a time. Two or three such buffers are in memory for each answer, used over and over: one on
/// its way, one waiting, one being read.
const BUFFER: u64 = 1 << 20;

type Reading = JoinHandle<io::Result<(File, Buffer)>>;
/// The buffers that an answer does not need at the moment.
type Spare = Arc<Mutex<Vec<Vec<u8>>>>;

/// Bytes on their way; their buffer comes back when they are sent.
struct Buffer {
    bytes: Vec<u8>,
    spare: Spare,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = mem::take(&mut self.bytes);
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
    }
}

/// Where a body stands.
enum Next {
    Read(File),
    Await(Reading),
}

/// The next `length` bytes of a file.
pub(super) fn body(file: File, length: u64) -> Body {
    if length == 0 {
        return Body::empty();
    }
    let spare = Spare::default();
    // Nothing is read before somebody wants it: the connection may send the file by itself.
    let first = Next::Read(file);
    Body::from_stream(stream::unfold(Some((first, length, spare)), |state| async {
        let (next, left, spare) = state?;
        let reading = match next {
            Next::Read(file) => read(file, left, Arc::clone(&spare)),
            Next::Await(reading) => reading,
        };
        Some(match reading.await {
            Ok(Ok((file, buffer))) => {
                let left = left.saturating_sub(buffer.bytes.len() as u64);
                let next = (left > 0)
                    .then(|| (Next::Await(read(file, left, Arc::clone(&spare))), left, spare));
                (Ok(Bytes::from_owner(buffer)), next)
            }
            Ok(Err(error)) => (Err(error), None),
            Err(died) => (Err(io::Error::other(died)), None),
        })
    }))
}

fn read(file: File, left: u64, spare: Spare) -> Reading {
    spawn_blocking(move || {
        let want = left.min(BUFFER);
        let used = spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut bytes = used.unwrap_or_default();
        bytes.clear();
        bytes.reserve_exact(usize::try_from(want).unwrap_or(0));
        let got = (&file).take(want).read_to_end(&mut bytes)?;
        // Less would leave the client waiting for bytes that never come: the connection is cut instead.
        if (got as u64) < want {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((file, Buffer { bytes, spare }))
    })
}
