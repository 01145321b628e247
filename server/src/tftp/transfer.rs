//! One transfer: a socket of its own, a file or bytes, until done, aborted or given up.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

use super::packet::{
    ErrorCode, Feedback, Terms, Wishes, data_packet, error_packet, negotiate, parse_feedback,
    safe_name,
};
use super::window::{Acked, Window};
use super::{Content, MAX_RETRIES};

/// Longest packet that a client sends during a transfer, in bytes.
const MAX_FEEDBACK: usize = 1024;

/// How a transfer ended without being complete.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransferError {
    /// The name leads out of the root or is not there.
    #[error("no such file")]
    NotFound,
    /// The client ended it; asking for the size only does that too.
    #[error("the client ended it: {0}")]
    Aborted(String),
    /// Nothing heard.
    #[error("no answer after {MAX_RETRIES} retransmissions, {0} blocks acknowledged")]
    NoAnswer(u64),
    /// The socket or the file.
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
}

enum Source {
    Memory(Bytes),
    File(File),
}

impl Source {
    /// The next block; shorter than asked only at the end.
    async fn next(&mut self, len: usize) -> io::Result<Vec<u8>> {
        match self {
            Self::Memory(bytes) => Ok(bytes.split_to(len.min(bytes.len())).to_vec()),
            Self::File(file) => {
                let mut block = Vec::with_capacity(len);
                file.take(len as u64).read_to_end(&mut block).await?;
                Ok(block)
            }
        }
    }
}

async fn open(content: &Content, name: &str) -> Result<(Source, u64), TransferError> {
    let name = safe_name(name).ok_or(TransferError::NotFound)?;
    if let Some(bytes) = content.builtin.get(name) {
        return Ok((Source::Memory(bytes.clone()), bytes.len() as u64));
    }
    let root = content.root.as_deref().ok_or(TransferError::NotFound)?;
    let path = match content.linked.contains(name) {
        true => root.join(name),
        false => inside(root, name).await.ok_or(TransferError::NotFound)?,
    };
    let file = File::open(path).await.map_err(|_| TransferError::NotFound)?;
    let data = file.metadata().await.map_err(|e| TransferError::Io("cannot read the size", e))?;
    if !data.is_file() {
        return Err(TransferError::NotFound);
    }
    Ok((Source::File(file), data.len()))
}

/// The file's real path, if following its symbolic links stays below the root.
async fn inside(root: &Path, name: &str) -> Option<PathBuf> {
    let root = tokio::fs::canonicalize(root).await.ok()?;
    let path = tokio::fs::canonicalize(root.join(name)).await.ok()?;
    let is_file = tokio::fs::metadata(&path).await.is_ok_and(|data| data.is_file());
    (is_file && path.starts_with(&root)).then_some(path)
}

/// Sends a file. Returns the number of bytes.
pub(super) async fn send(
    content: &Content,
    local: SocketAddr,
    peer: SocketAddr,
    name: &str,
    wishes: Wishes,
) -> Result<u64, TransferError> {
    let fail = |action| move |error| TransferError::Io(action, error);
    let socket = UdpSocket::bind(SocketAddr::new(local.ip(), 0))
        .await
        .map_err(fail("cannot open a socket"))?;
    // Connected, so that packets of others never reach the transfer.
    socket.connect(peer).await.map_err(fail("cannot reach the client"))?;
    let (source, size) = match open(content, name).await {
        Ok(opened) => opened,
        Err(error) => {
            let text = format!("{name}: {error}");
            let packet = error_packet(ErrorCode::NotFound, &text);
            socket.send(&packet).await.map_err(fail("cannot send"))?;
            return Err(error);
        }
    };
    let (terms, oack) = negotiate(wishes, size);
    let mut transfer = Transfer { socket, terms, source };
    if let Some(oack) = oack {
        transfer.open_with(&oack).await?;
    }
    transfer.blocks().await?;
    Ok(size)
}

struct Transfer {
    socket: UdpSocket,
    terms: Terms,
    source: Source,
}

impl Transfer {
    async fn put(&self, packet: &[u8]) -> Result<(), TransferError> {
        self.socket.send(packet).await.map_err(|e| TransferError::Io("cannot send", e))?;
        Ok(())
    }

    /// The next acknowledgement before the deadline, `None` if there is none.
    async fn hear(&self, deadline: Instant) -> Result<Option<u16>, TransferError> {
        let mut buffer = [0; MAX_FEEDBACK];
        loop {
            let Ok(received) = timeout_at(deadline, self.socket.recv(&mut buffer)).await else {
                return Ok(None);
            };
            let len = received.map_err(|error| match error.kind() {
                io::ErrorKind::ConnectionRefused => {
                    TransferError::Aborted("its port is closed".to_owned())
                }
                _ => TransferError::Io("cannot receive", error),
            })?;
            match parse_feedback(buffer.get(..len).unwrap_or_default()) {
                Feedback::Ack(number) => return Ok(Some(number)),
                Feedback::Abort(reason) => return Err(TransferError::Aborted(reason)),
                Feedback::Other => {}
            }
        }
    }

    /// Sends the OACK until block 0 is acknowledged.
    async fn open_with(&self, oack: &[u8]) -> Result<(), TransferError> {
        for _ in 0..=MAX_RETRIES {
            self.put(oack).await?;
            let deadline = Instant::now() + self.terms.timeout;
            while let Some(number) = self.hear(deadline).await? {
                if number == 0 {
                    return Ok(());
                }
            }
        }
        Err(TransferError::NoAnswer(0))
    }

    async fn resend(&self, window: &Window) -> Result<(), TransferError> {
        for (number, block) in window.in_flight() {
            self.put(&data_packet(number, block)).await?;
        }
        Ok(())
    }

    async fn fill(&mut self, window: &mut Window) -> Result<(), TransferError> {
        let len = usize::from(self.terms.block);
        while window.wants_more() {
            let block = self
                .source
                .next(len)
                .await
                .map_err(|error| TransferError::Io("cannot read the file", error))?;
            let last = block.len() < len;
            let packet = data_packet(window.next_number(), &block);
            window.push(block, last);
            self.put(&packet).await?;
        }
        Ok(())
    }

    async fn blocks(&mut self) -> Result<(), TransferError> {
        let mut window = Window::new(self.terms.window);
        let mut retries = 0;
        self.fill(&mut window).await?;
        let mut deadline = Instant::now() + self.terms.timeout;
        while !window.is_done() {
            match self.hear(deadline).await? {
                Some(number) => {
                    let acked = window.ack(number);
                    if acked == Acked::Nothing {
                        continue;
                    }
                    retries = 0;
                    if acked == Acked::Some {
                        self.resend(&window).await?;
                    }
                    self.fill(&mut window).await?;
                }
                None if retries == MAX_RETRIES => {
                    return Err(TransferError::NoAnswer(window.acknowledged()));
                }
                None => {
                    retries += 1;
                    self.resend(&window).await?;
                }
            }
            deadline = Instant::now() + self.terms.timeout;
        }
        Ok(())
    }
}
