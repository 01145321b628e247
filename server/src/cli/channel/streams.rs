//! This process's standard streams, read and written by threads of their own: neither can be waited for otherwise where it is a
//! file or a terminal.

use std::io::{self, Read, Write};
use std::thread;

use anyhow::Context;
use tokio::sync::mpsc;

/// Most bytes of standard input that are read at once.
pub(super) const CHUNK: usize = 16 << 10;
/// Longest line that becomes one JSON object; a longer one becomes several.
const MAX_LINE: usize = 64 << 10;

/// Standard input.
pub(super) struct Input {
    chunks: mpsc::Receiver<Vec<u8>>,
}

impl Input {
    /// Begins to read: one chunk is in hand, one waits.
    pub(super) fn start() -> anyhow::Result<Self> {
        let (sender, chunks) = mpsc::channel(1);
        let read = move || {
            let mut buffer = vec![0; CHUNK];
            loop {
                let count = match io::stdin().lock().read(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    // What cannot be read has ended.
                    result => result.unwrap_or(0),
                };
                let chunk = buffer.get(..count).unwrap_or_default().to_vec();
                if sender.blocking_send(chunk).is_err() || count == 0 {
                    return;
                }
            }
        };
        thread::Builder::new().name("stdin".to_owned()).spawn(read).context("no thread")?;
        Ok(Self { chunks })
    }

    /// The next chunk; an empty one is the end. Without input, never.
    pub(super) async fn next(input: &mut Option<Self>) -> Vec<u8> {
        match input {
            Some(input) => input.chunks.recv().await.unwrap_or_default(),
            None => std::future::pending().await,
        }
    }
}

/// Where bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Output,
    Errors,
}

/// What became of them.
#[derive(Debug)]
pub(super) enum Written {
    /// So many are written.
    Bytes(usize),
    /// Whoever read them has left.
    Closed,
    /// They cannot be written.
    Failed(io::Error),
}

/// Standard output and error. What waits here is bounded by what the node was granted.
pub(super) struct Writer {
    chunks: Option<std::sync::mpsc::Sender<(Stream, Vec<u8>)>>,
    written: mpsc::UnboundedReceiver<Written>,
}

impl Writer {
    pub(super) fn start(json: bool) -> anyhow::Result<Self> {
        let (chunks, queue) = std::sync::mpsc::channel::<(Stream, Vec<u8>)>();
        let (tell, written) = mpsc::unbounded_channel();
        let write = move || {
            let mut lines = json.then(Vec::new);
            for (stream, bytes) in queue {
                let done = write_one(stream, &bytes, lines.as_mut());
                let ends = !matches!(done, Written::Bytes(_));
                if tell.send(done).is_err() || ends {
                    return;
                }
            }
            if let Some(rest) = lines.filter(|rest| !rest.is_empty()) {
                // The last line has no end; that it cannot be written is told like any other.
                let _ = tell.send(write_one(Stream::Output, b"\n", Some(&mut rest.clone())));
            }
        };
        thread::Builder::new().name("stdout".to_owned()).spawn(write).context("no thread")?;
        Ok(Self { chunks: Some(chunks), written })
    }

    /// Queues bytes. After a failure they go nowhere: that is told by [`Self::written`].
    pub(super) fn write(&self, stream: Stream, bytes: &[u8]) {
        if let Some(chunks) = &self.chunks {
            let _ = chunks.send((stream, bytes.to_vec()));
        }
    }

    /// What became of the next bytes.
    pub(super) async fn written(&mut self) -> Written {
        match self.written.recv().await {
            Some(written) => written,
            None => std::future::pending().await,
        }
    }

    /// Waits until all is written.
    pub(super) async fn finish(&mut self) -> Written {
        self.chunks = None;
        loop {
            match self.written.recv().await {
                None => return Written::Bytes(0),
                Some(Written::Bytes(_)) => {}
                Some(other) => return other,
            }
        }
    }
}

/// Writes to the stream; as JSON lines where `lines` keeps what is not a whole line yet.
fn write_one(stream: Stream, bytes: &[u8], lines: Option<&mut Vec<u8>>) -> Written {
    let result = match (stream, lines) {
        (Stream::Output, None) => write_all(&mut io::stdout().lock(), bytes),
        (Stream::Errors, None) => write_all(&mut io::stderr().lock(), bytes),
        (_, Some(kept)) => {
            kept.extend_from_slice(bytes);
            write_all(&mut io::stdout().lock(), &take_json_lines(kept))
        }
    };
    match result {
        Ok(()) => Written::Bytes(bytes.len()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Written::Closed,
        Err(error) => Written::Failed(error),
    }
}

fn write_all(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

/// Takes the whole lines out, as one JSON object each.
fn take_json_lines(kept: &mut Vec<u8>) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let window = kept.get(..MAX_LINE.min(kept.len())).unwrap_or_default();
        let (end, skip) = match window.iter().position(|byte| *byte == b'\n') {
            Some(end) => (end, 1),
            None if window.len() == MAX_LINE => (MAX_LINE, 0),
            None => return out,
        };
        let line = String::from_utf8_lossy(kept.get(..end).unwrap_or_default());
        let object = serde_json::json!({ "line": line.trim_end_matches('\r') });
        out.extend_from_slice(object.to_string().as_bytes());
        out.push(b'\n');
        kept.drain(..end + skip);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_objects_and_the_rest_waits() {
        let mut kept = b"one\ntwo \"2\"\r\nthr".to_vec();
        let text = String::from_utf8(take_json_lines(&mut kept)).expect("UTF-8");
        assert_eq!(text, "{\"line\":\"one\"}\n{\"line\":\"two \\\"2\\\"\"}\n");
        assert_eq!(kept, b"thr");
        let mut long = vec![b'x'; MAX_LINE + 1];
        take_json_lines(&mut long);
        assert_eq!(long, b"x");
    }
}
