//! Files that the kernel sends by itself: sendfile(2) from the page cache to the socket, past hyper, which only ever has
//! bytes of ours in its hands.
//!
//! ```text
//! handler: Response + FilePart ─▶ Outlet: the body becomes placeholder buffers of the same length ─▶ hyper
//! hyper ─▶ Conn: a buffer that is the placeholder is not written: that much of the file is sent in its place
//! ```
//! hyper hands large buffers through as they are (its vectored write strategy, which [`Conn`] asks for); a placeholder is
//! known by its address, and its bytes, all zero, never leave. A handler's own body stays for servers without an outlet.
//! Whoever reads a blob checks its digest, so even a mistake here could not go unnoticed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use rustix::fs::Advice;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// Bytes of one placeholder buffer: how much is sent between two looks of hyper's.
const STEP: usize = 1 << 20;
/// Stands for bytes of a file. Known by its address.
static PLACEHOLDER: [u8; STEP] = [0; STEP];

/// Marks a response whose body is this part of a file; to be put into its extensions beside a body that says the same.
#[derive(Debug, Clone)]
pub(crate) struct FilePart {
    /// The file.
    pub(crate) file: Arc<File>,
    /// Offset of the first byte.
    pub(crate) first: u64,
    /// Number of bytes.
    pub(crate) length: u64,
}

/// What one connection is to send out of files, in the order of its answers.
#[derive(Debug, Clone, Default)]
pub(super) struct Outlet(Arc<Mutex<VecDeque<FilePart>>>);

impl Outlet {
    fn with<T>(&self, act: impl FnOnce(&mut VecDeque<FilePart>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts placeholders in the place of a body that is a file's.
    pub(super) fn take_over(&self, mut response: Response) -> Response {
        let Some(part) = response.extensions_mut().remove::<FilePart>() else { return response };
        // Read ahead where the file is on a disk; a failure costs speed only.
        let _ = rustix::fs::fadvise(&*part.file, part.first, None, Advice::WillNeed);
        let (outlet, left) = (self.clone(), part.length);
        let start = (Some(part), left);
        let placeholders = stream::unfold(start, move |(part, left)| {
            // Only now, when hyper begins with this answer's body, its turn has come.
            if let Some(part) = part {
                outlet.with(|parts| parts.push_back(part));
            }
            let step = usize::try_from(left).unwrap_or(usize::MAX).min(STEP);
            let next = PLACEHOLDER.get(..step).filter(|step| !step.is_empty()).map(|step| {
                (Ok::<_, io::Error>(Bytes::from_static(step)), (None, left - step.len() as u64))
            });
            std::future::ready(next)
        });
        response.map(|_| Body::from_stream(placeholders))
    }
}

fn is_placeholder(buffer: &[u8]) -> bool {
    PLACEHOLDER.as_ptr_range().contains(&buffer.as_ptr())
}

/// A connection that sends files in the place of placeholders.
#[derive(Debug)]
pub(super) struct Conn {
    stream: TcpStream,
    outlet: Outlet,
}

impl Conn {
    pub(super) fn new(stream: TcpStream, outlet: Outlet) -> Self {
        Self { stream, outlet }
    }

    /// The connection itself, for another protocol; nothing of a file may be left to send.
    pub(super) fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// Sends up to so many bytes of the file whose turn it is.
    fn poll_send(&self, context: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(context))?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                self.outlet.with(|parts| {
                    let part =
                        parts.front_mut().ok_or_else(|| io::Error::other("no file to send"))?;
                    let most = usize::try_from(part.length).unwrap_or(usize::MAX).min(most);
                    let sent = rustix::fs::sendfile(
                        &self.stream,
                        &*part.file,
                        Some(&mut part.first),
                        most,
                    )?;
                    part.length -= sent as u64;
                    if part.length == 0 {
                        parts.pop_front();
                    }
                    Ok(sent)
                })
            });
            match sent {
                // The file became shorter: the client must not wait for what never comes.
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return Poll::Ready(done),
            }
        }
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(buffer)])
    }

    /// Writes what stands before the first placeholder, or else sends for the placeholders that stand first.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let empty = buffers.iter().take_while(|buffer| buffer.is_empty()).count();
        let buffers = buffers.get(empty..).unwrap_or_default();
        let plain = buffers.iter().take_while(|buffer| !is_placeholder(buffer)).count();
        if plain > 0 || buffers.is_empty() {
            let plain = buffers.get(..plain).unwrap_or_default();
            return Pin::new(&mut self.stream).poll_write_vectored(context, plain);
        }
        let places = buffers.iter().take_while(|buffer| is_placeholder(buffer));
        let most = places.map(|buffer| buffer.len()).sum();
        self.poll_send(context, most)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use axum::Router;
    use axum::extract::Path;
    use axum::http::{StatusCode, header};
    use axum::response::IntoResponse;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::watch;

    use super::*;
    use crate::http::listen::{Limits, serve};

    /// What stands at an offset of the file.
    fn byte(at: usize) -> u8 {
        u8::try_from(at % 251).expect("below 251") | 1
    }

    fn file(length: usize) -> Arc<File> {
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(&(0..length).map(byte).collect::<Vec<u8>>()).expect("write");
        file.seek(SeekFrom::Start(0)).expect("seek");
        Arc::new(file)
    }

    /// A server whose `/FIRST/LENGTH` is that part of the file, and `/` a few bytes of its own.
    async fn start(file: Arc<File>) -> (TcpStream, watch::Sender<bool>) {
        let part = |Path((first, length)): Path<(u64, u64)>| async move {
            let head = [(header::CONTENT_LENGTH, length.to_string())];
            let mut response = (StatusCode::OK, head, Body::from("not this")).into_response();
            response.extensions_mut().insert(FilePart { file, first, length });
            response
        };
        let router = Router::new()
            .route("/{first}/{length}", get(part))
            .route("/", get(|| async { "between" }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let (stop, stopping) = watch::channel(false);
        tokio::spawn(serve(listener, router, Limits::default(), stopping));
        (TcpStream::connect(address).await.expect("connect"), stop)
    }

    /// The bodies of so many answers on one connection.
    async fn bodies(stream: &mut TcpStream, count: usize) -> Vec<Vec<u8>> {
        let mut bodies = Vec::new();
        let mut input = tokio::io::BufReader::new(stream);
        for _ in 0..count {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(input.read_u8().await.expect("head"));
            }
            let head = String::from_utf8(head).expect("text").to_lowercase();
            let length = head.split("content-length: ").nth(1).expect("length");
            let length = length.split('\r').next().expect("line").parse().expect("number");
            let mut body = vec![0; length];
            input.read_exact(&mut body).await.expect("body");
            bodies.push(body);
        }
        bodies
    }

    #[tokio::test]
    async fn requests_in_a_row_get_their_parts_in_order_with_other_answers_between() {
        let length = 3 * STEP + 5;
        let (mut stream, _stop) = start(file(length)).await;
        let wanted = [(0, length), (7, 1), (STEP - 1, STEP + 2), (length - 1, 1)];
        // All at once, so that answers stand in the queue behind each other.
        let mut requests = String::new();
        for (first, length) in wanted {
            requests.push_str(&format!("GET /{first}/{length} HTTP/1.1\r\nHost: x\r\n\r\n"));
            requests.push_str("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        }
        stream.write_all(requests.as_bytes()).await.expect("write");
        let bodies = bodies(&mut stream, 2 * wanted.len()).await;
        for (pair, (first, length)) in bodies.chunks(2).zip(wanted) {
            let expected: Vec<u8> = (first..first + length).map(byte).collect();
            assert!(pair[0] == expected, "{length} bytes from {first} are others");
            assert_eq!(pair[1], b"between");
        }
    }

    #[tokio::test]
    async fn a_file_that_became_shorter_cuts_the_connection() {
        let (mut stream, _stop) = start(file(1000)).await;
        stream.write_all(b"GET /0/2000 HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("write");
        let mut said = Vec::new();
        let read = stream.read_to_end(&mut said);
        let limit = std::time::Duration::from_secs(20);
        // An end or a reset, whichever comes first.
        let _ = tokio::time::timeout(limit, read).await.expect("the server closes");
        assert!(said.ends_with(&[byte(998), byte(999)]), "{} bytes", said.len());
    }
}
