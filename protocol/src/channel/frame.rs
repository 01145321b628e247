//! What passes through a channel: one [`Frame`] in each binary message of the WebSocket, a byte for its kind and then its
//! content.
//!
//! | kind | from | content |
//! |---|---|---|
//! | 0 input | operator | bytes for the command's standard input |
//! | 1 output, 2 errors | node | bytes of its standard output, or of a log; bytes of its standard error |
//! | 3 end of input | operator | nothing |
//! | 4 size | operator | columns and rows of the terminal, two bytes each, big-endian |
//! | 5 signal | operator | a signal's number for the command, one byte |
//! | 6 grant | both | how many more bytes of input or output the other side may send, four bytes, big-endian |
//! | 7 started | node | nothing: the command runs, or the log is open |
//! | 8 exit | node | 0 and the exit code, or 1 and the signal's number, four bytes, big-endian; the last frame |
//! | 9 failure | both | why it cannot be done or cannot go on, UTF-8; the last frame |
//!
//! Neither side sends more input or output than the other has room for: each begins with [`WINDOW`] bytes and gets more by grants
//! ([`Window`], [`Taken`]). So a reader that stops never fills a socket, and signals, sizes and pings pass it.

use std::borrow::Cow;

use super::TerminalSize;

/// Bytes of input or of output that may be on their way before they are taken.
pub const WINDOW: u32 = 256 << 10;
/// Most bytes of input or output in one frame.
pub const MAX_DATA: usize = 32 << 10;
/// Longest frame, in bytes.
pub const MAX_FRAME: usize = 1 + MAX_DATA;
/// Longest text of a failure, in bytes.
pub const MAX_TEXT: usize = 4 << 10;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// The exit status that a shell would show: 128 and more for signals.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Self::Code(code) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
            Self::Signal(signal) => u8::try_from(signal.clamp(0, 127) + 128).unwrap_or(u8::MAX),
        }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<'a> {
    /// For the command's standard input.
    Input(&'a [u8]),
    /// Of its standard output.
    Output(&'a [u8]),
    /// Of its standard error.
    Errors(&'a [u8]),
    /// Its standard input has ended.
    EndOfInput,
    /// Its terminal has another size now.
    Size(TerminalSize),
    /// A signal for it.
    Signal(u8),
    /// The other side may send this many more bytes.
    Grant(u32),
    /// It runs.
    Started,
    /// It has ended.
    Exit(Exit),
    /// It cannot be done, or cannot go on.
    Failure(Cow<'a, str>),
}

/// Why bytes are no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Nothing at all.
    #[error("an empty frame")]
    Empty,
    /// A kind that is not known.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// Content of the wrong length.
    #[error("a frame of kind {kind} with {length} bytes")]
    Length {
        /// Its kind.
        kind: u8,
        /// Bytes of its content.
        length: usize,
    },
}

impl<'a> Frame<'a> {
    /// Reads a frame.
    ///
    /// # Errors
    /// [`FrameError`] says what is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FrameError> {
        let (kind, content) = bytes.split_first().ok_or(FrameError::Empty)?;
        let wrong = || FrameError::Length { kind: *kind, length: content.len() };
        let data = || if content.len() <= MAX_DATA { Ok(content) } else { Err(wrong()) };
        let empty = |frame| if content.is_empty() { Ok(frame) } else { Err(wrong()) };
        let four = |bytes: &[u8]| bytes.try_into().map(u32::from_be_bytes).map_err(|_| wrong());
        match kind {
            0 => data().map(Frame::Input),
            1 => data().map(Frame::Output),
            2 => data().map(Frame::Errors),
            3 => empty(Frame::EndOfInput),
            4 => {
                let size = four(content)?.to_be_bytes();
                let [c1, c2, r1, r2] = size;
                let (columns, rows) = (u16::from_be_bytes([c1, c2]), u16::from_be_bytes([r1, r2]));
                Ok(Frame::Size(TerminalSize { columns, rows }))
            }
            5 => match content {
                [signal] => Ok(Frame::Signal(*signal)),
                _ => Err(wrong()),
            },
            6 => four(content).map(Frame::Grant),
            7 => empty(Frame::Started),
            8 => {
                let (how, number) = content.split_first().ok_or_else(wrong)?;
                let number = four(number)?.cast_signed();
                match how {
                    0 => Ok(Frame::Exit(Exit::Code(number))),
                    1 => Ok(Frame::Exit(Exit::Signal(number))),
                    _ => Err(wrong()),
                }
            }
            9 if content.len() <= MAX_TEXT => Ok(Frame::Failure(String::from_utf8_lossy(content))),
            9 => Err(wrong()),
            kind => Err(FrameError::Kind(*kind)),
        }
    }

    /// Writes it. A failure's text is cut at [`MAX_TEXT`]; data must not be longer than [`MAX_DATA`].
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        let with = |kind: u8, content: &[u8]| {
            let mut bytes = Vec::with_capacity(1 + content.len());
            bytes.push(kind);
            bytes.extend_from_slice(content);
            bytes
        };
        match self {
            Self::Input(bytes) => with(0, bytes),
            Self::Output(bytes) => with(1, bytes),
            Self::Errors(bytes) => with(2, bytes),
            Self::EndOfInput => with(3, &[]),
            Self::Size(size) => {
                with(4, &[size.columns.to_be_bytes(), size.rows.to_be_bytes()].concat())
            }
            Self::Signal(signal) => with(5, &[*signal]),
            Self::Grant(more) => with(6, &more.to_be_bytes()),
            Self::Started => with(7, &[]),
            Self::Exit(Exit::Code(code)) => with(8, &[&[0], &code.to_be_bytes()[..]].concat()),
            Self::Exit(Exit::Signal(signal)) => {
                with(8, &[&[1], &signal.to_be_bytes()[..]].concat())
            }
            Self::Failure(text) => {
                let mut end = text.len().min(MAX_TEXT);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                with(9, text.as_bytes().get(..end).unwrap_or_default())
            }
        }
    }

    /// Bytes of it that count against the window.
    #[must_use]
    pub fn weight(&self) -> usize {
        match self {
            Self::Input(bytes) | Self::Output(bytes) | Self::Errors(bytes) => bytes.len(),
            _ => 0,
        }
    }

    /// Whether nothing comes after it.
    #[must_use]
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Exit(_) | Self::Failure(_))
    }
}

/// How much more may be sent: the sender's side of the flow control.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    room: u32,
}

impl Default for Window {
    fn default() -> Self {
        Self { room: WINDOW }
    }
}

impl Window {
    /// Bytes that may be sent now in one frame.
    #[must_use]
    pub fn room(&self) -> usize {
        usize::try_from(self.room).unwrap_or(MAX_DATA).min(MAX_DATA)
    }

    /// So many were sent.
    pub fn sent(&mut self, bytes: usize) {
        self.room = self.room.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// The other side has room for so many more. It never has room for more than [`WINDOW`].
    pub fn granted(&mut self, more: u32) {
        self.room = self.room.saturating_add(more).min(WINDOW);
    }
}

/// How much has come and how much of it is taken: the receiver's side.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    waiting: u32,
    ungranted: u32,
}

impl Taken {
    /// So many bytes came. False if the other side sent more than it may.
    #[must_use]
    pub fn came(&mut self, bytes: usize) -> bool {
        self.waiting = self.waiting.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.waiting.saturating_add(self.ungranted) <= WINDOW
    }

    /// So many of them were taken; what is to be granted now, if that is worth a frame.
    pub fn taken(&mut self, bytes: usize) -> Option<u32> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.waiting);
        self.waiting -= bytes;
        self.ungranted += bytes;
        (self.ungranted >= WINDOW / 4).then(|| std::mem::take(&mut self.ungranted))
    }
}

/// For fuzzing: a frame that is read is written again as it was, but for bytes that are no UTF-8.
pub fn fuzz_frame(bytes: &[u8]) {
    if let Ok(frame) = Frame::parse(bytes) {
        let again = frame.render();
        let lossy = matches!(frame, Frame::Failure(Cow::Owned(_)));
        assert!(lossy || again == bytes, "{frame:?} is written as {again:?}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_frame_is_read_as_it_was_written() {
        let frames = [
            Frame::Input(b"a"),
            Frame::Output(b""),
            Frame::Errors(&[0, 255]),
            Frame::EndOfInput,
            Frame::Size(TerminalSize { columns: 300, rows: 24 }),
            Frame::Signal(2),
            Frame::Grant(70_000),
            Frame::Started,
            Frame::Exit(Exit::Code(-1)),
            Frame::Exit(Exit::Signal(9)),
            Frame::Failure("why".into()),
        ];
        for (kind, frame) in (0_u8..).zip(frames) {
            let bytes = frame.render();
            assert_eq!(Frame::parse(&bytes), Ok(frame), "{kind}");
        }
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let large = [&[1_u8][..], &vec![0; MAX_DATA + 1]].concat();
        let table: [(&[u8], &str); 7] = [
            (&[], "empty"),
            (&[10], "unknown kind 10"),
            (&[3, 0], "kind 3 with 1 bytes"),
            (&[4, 0, 80, 0], "kind 4 with 3 bytes"),
            (&[8, 2, 0, 0, 0, 0], "kind 8"),
            (&[5], "kind 5 with 0 bytes"),
            (&large, "kind 1 with 32769 bytes"),
        ];
        for (bytes, expected) in table {
            let error = Frame::parse(bytes).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_long_failure_is_cut_between_characters() {
        let text = "ä".repeat(MAX_TEXT);
        let bytes = Frame::Failure(text.as_str().into()).render();
        assert_eq!(bytes.len(), 1 + MAX_TEXT);
        assert!(matches!(Frame::parse(&bytes), Ok(Frame::Failure(Cow::Borrowed(_)))));
    }

    #[test]
    fn exits_are_shown_as_a_shell_shows_them() {
        let table = [
            (Exit::Code(3), 3),
            (Exit::Code(256), 0),
            (Exit::Signal(9), 137),
            (Exit::Signal(-4), 128),
        ];
        for (exit, status) in table {
            assert_eq!(exit.status(), status, "{exit:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            fuzz_frame(&bytes);
        }

        #[test]
        fn a_sender_that_keeps_to_its_window_is_never_accused_and_never_stuck(
            takes in proptest::collection::vec(1_usize..100_000, 1..200)
        ) {
            let (mut window, mut taken) = (Window::default(), Taken::default());
            let mut held = 0;
            for take in takes {
                while window.room() > 0 {
                    let bytes = window.room();
                    window.sent(bytes);
                    held += bytes;
                    prop_assert!(taken.came(bytes));
                }
                let take = take.min(held);
                held -= take;
                if let Some(more) = taken.taken(take) {
                    window.granted(more);
                }
            }
            // All of it taken, there is room again.
            if let Some(more) = taken.taken(held) {
                window.granted(more);
            }
            prop_assert!(window.room() > 0);
        }

        #[test]
        fn a_sender_that_does_not_keep_to_it_is(extra in 1_usize..1000) {
            let mut taken = Taken::default();
            prop_assert!(taken.came(usize::try_from(WINDOW).expect("small")));
            prop_assert!(!taken.came(extra));
        }
    }
}
