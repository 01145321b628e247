//! The node's end of one channel: frames in and out of a non-blocking WebSocket, flow control, signs of life.
//!
//! It never blocks. The caller polls [`Link::interest`] and sends no output but what there is [`Link::room`] for: so at
//! most one frame waits here, and at most a window of input.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use protocol::channel::TerminalSize;
use protocol::channel::frame::{Frame, MAX_FRAME, Taken, Window};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Bytes, Error, Message, WebSocket};

use crate::transport::websocket::Stream;

/// How long the server may be silent: it pings every ten seconds.
const SILENCE: Duration = Duration::from_secs(45);
/// Longest pause in a poll loop, so that silence is noticed.
pub(super) const TICK: Duration = Duration::from_secs(5);

/// Bounds of the node's WebSocket.
pub(super) fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(16 << 10)
        .write_buffer_size(0)
        .max_write_buffer_size(4 * MAX_FRAME)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME))
}

/// Why a channel cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The other side has closed it, or the connection broke.
    #[error("the channel was closed: {0}")]
    Closed(String),
    /// Nothing was heard of the server.
    #[error("the server has been silent for {} s", SILENCE.as_secs())]
    Silent,
    /// The other side broke the rules.
    #[error("the other side sent something wrong: {0}")]
    Wrong(String),
    /// The kernel refused to wait.
    #[error("poll: {0}")]
    Poll(#[from] std::io::Error),
}

/// What an operator sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Received {
    /// Bytes for the command.
    Input(Vec<u8>),
    /// There will be no more of them.
    EndOfInput,
    /// The terminal's new size.
    Size(TerminalSize),
    /// A signal for the command.
    Signal(u8),
}

/// The node's end.
#[derive(Debug)]
pub(super) struct Link {
    socket: WebSocket<Stream>,
    pending: bool,
    output: Window,
    input: Taken,
    heard: Instant,
}

impl Link {
    pub(super) fn new(socket: WebSocket<Stream>) -> Self {
        Self {
            socket,
            pending: false,
            output: Window::default(),
            input: Taken::default(),
            heard: Instant::now(),
        }
    }

    /// What to wait for on the socket.
    pub(super) fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        let out = if self.pending { PollFlags::OUT } else { PollFlags::empty() };
        (self.socket.get_ref().as_fd(), PollFlags::IN | out)
    }

    /// Bytes of output that may be sent in the next frame; none while something still waits to go out.
    pub(super) fn room(&self) -> usize {
        if self.pending { 0 } else { self.output.room() }
    }

    /// The next frame, none when there is none now. Grants and signs of life are dealt with here.
    pub(super) fn receive(&mut self) -> Result<Option<Received>, LinkError> {
        loop {
            let message = match self.socket.read() {
                Ok(message) => message,
                Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    self.flush()?;
                    return match self.heard.elapsed() > SILENCE {
                        true => Err(LinkError::Silent),
                        false => Ok(None),
                    };
                }
                Err(error) => return Err(LinkError::Closed(error.to_string())),
            };
            self.heard = Instant::now();
            match message {
                Message::Binary(bytes) => {
                    if let Some(received) = self.take(&bytes)? {
                        return Ok(Some(received));
                    }
                }
                Message::Close(_) => return Err(LinkError::Closed("by the operator".to_owned())),
                Message::Ping(_) | Message::Pong(_) | Message::Text(_) | Message::Frame(_) => {}
            }
        }
    }

    fn take(&mut self, bytes: &Bytes) -> Result<Option<Received>, LinkError> {
        let frame = Frame::parse(bytes).map_err(|error| LinkError::Wrong(error.to_string()))?;
        Ok(Some(match frame {
            Frame::Grant(more) => {
                self.output.granted(more);
                return Ok(None);
            }
            Frame::Input(bytes) => {
                if !self.input.came(bytes.len()) {
                    return Err(LinkError::Wrong("more input than was granted".to_owned()));
                }
                Received::Input(bytes.to_vec())
            }
            Frame::EndOfInput => Received::EndOfInput,
            Frame::Size(size) => Received::Size(size),
            Frame::Signal(signal) => Received::Signal(signal),
            Frame::Failure(why) => return Err(LinkError::Closed(why.into_owned())),
            other => return Err(LinkError::Wrong(format!("{other:?} is for a node to send"))),
        }))
    }

    /// So many bytes of input have reached the command; more is granted when that is worth a frame.
    pub(super) fn input_taken(&mut self, bytes: usize) -> Result<(), LinkError> {
        match self.input.taken(bytes) {
            Some(more) => self.send(&Frame::Grant(more)),
            None => Ok(()),
        }
    }

    /// Sends a frame, as far as the socket takes it now.
    pub(super) fn send(&mut self, frame: &Frame<'_>) -> Result<(), LinkError> {
        self.output.sent(frame.weight());
        match self.socket.write(Message::binary(frame.render())) {
            Ok(()) => {}
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(LinkError::Closed(error.to_string())),
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        match self.socket.flush() {
            Ok(()) => self.pending = false,
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                self.pending = true;
            }
            Err(error) => return Err(LinkError::Closed(error.to_string())),
        }
        Ok(())
    }

    /// Sends the last frame and waits until the server has taken it and closes: closing first could cost what is still on its
    /// way.
    pub(super) fn finish(&mut self, last: &Frame<'_>) -> Result<(), LinkError> {
        self.send(last)?;
        loop {
            match self.receive() {
                Ok(Some(_)) => {}
                Ok(None) => {
                    let (socket, flags) = self.interest();
                    wait(&mut [PollFd::from_borrowed_fd(socket, flags)], TICK)?;
                }
                Err(LinkError::Closed(_)) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Waits for one of these, or for so long.
pub(super) fn wait(fds: &mut [PollFd<'_>], patience: Duration) -> Result<(), LinkError> {
    let timeout = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    match poll(fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(LinkError::Poll(error.into())),
    }
}
