//! The operator's end of a channel, joined to the node's without a server between, in the test's own hands.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use protocol::channel::frame::{Exit, Frame, MAX_DATA, Taken, Window};
use tungstenite::{Error, Message, WebSocket};

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);
/// How long silence is listened to.
const SILENCE: Duration = Duration::from_millis(300);

pub(crate) struct Operator {
    socket: WebSocket<TcpStream>,
    window: Window,
    taken: Taken,
    output: Vec<u8>,
    errors: Vec<u8>,
    /// Grants what it has read.
    pub(crate) grants: bool,
    end: Option<Result<Exit, String>>,
}

impl Operator {
    pub(crate) fn new(socket: WebSocket<TcpStream>) -> Self {
        socket.get_ref().set_read_timeout(Some(Duration::from_millis(50))).expect("time-out");
        Self {
            socket,
            window: Window::default(),
            taken: Taken::default(),
            output: Vec::new(),
            errors: Vec::new(),
            grants: true,
            end: None,
        }
    }

    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    pub(crate) fn raw_output(&self) -> &[u8] {
        &self.output
    }

    pub(crate) fn errors(&self) -> String {
        String::from_utf8_lossy(&self.errors).into_owned()
    }

    pub(crate) fn send(&mut self, frame: &Frame<'_>) {
        self.window.sent(frame.weight());
        // A node that has gone is found out by reading.
        drop(self.socket.send(Message::binary(frame.render())));
    }

    pub(crate) fn grant(&mut self, bytes: u32) {
        self.send(&Frame::Grant(bytes));
    }

    /// Sends input as far as it is granted, and reads meanwhile.
    pub(crate) fn send_all(&mut self, mut bytes: &[u8]) {
        let until = Instant::now() + LONG;
        while !bytes.is_empty() {
            assert!(Instant::now() < until, "the input is not taken");
            let room = self.window.room().min(MAX_DATA).min(bytes.len());
            if room == 0 {
                self.read_one();
                continue;
            }
            let (now, later) = bytes.split_at(room);
            self.send(&Frame::Input(now));
            bytes = later;
        }
    }

    /// Takes what comes next, or nothing within a short time. False when nothing came.
    fn read_one(&mut self) -> bool {
        let message = match self.socket.read() {
            Ok(Message::Binary(bytes)) => bytes,
            Ok(_) => return true,
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return false;
            }
            Err(error) => {
                self.end.get_or_insert(Err(format!("the connection ended: {error}")));
                return true;
            }
        };
        let frame = Frame::parse(&message).expect("a frame");
        assert!(self.taken.came(frame.weight()) || !self.grants, "more than was granted");
        match frame {
            Frame::Output(bytes) => self.output.extend_from_slice(bytes),
            Frame::Errors(bytes) => self.errors.extend_from_slice(bytes),
            Frame::Grant(more) => self.window.granted(more),
            Frame::Exit(exit) => self.end = Some(Ok(exit)),
            Frame::Failure(ref why) => self.end = Some(Err(why.clone().into_owned())),
            _ => {}
        }
        if self.grants
            && let Some(more) = self.taken.taken(frame.weight())
        {
            self.grant(more);
        }
        true
    }

    /// Reads until this holds of output and errors.
    #[track_caller]
    pub(crate) fn until(&mut self, what: &str, mut good: impl FnMut(&str, &str) -> bool) {
        let until = Instant::now() + LONG;
        while !good(&self.output(), &self.errors()) {
            let tail: String = self.output().chars().rev().take(200).collect();
            assert!(Instant::now() < until, "not in time: {what}: {:?} {tail}", self.end);
            assert!(
                self.end.is_none(),
                "{what}: {:?} {} {}",
                self.end,
                self.output(),
                self.errors()
            );
            self.read_one();
        }
    }

    #[track_caller]
    fn ended(&mut self) -> Result<Exit, String> {
        let until = Instant::now() + LONG;
        while self.end.is_none() {
            assert!(Instant::now() < until, "no end in time: {} {}", self.output(), self.errors());
            self.read_one();
        }
        self.end.clone().expect("an end")
    }

    /// Reads until it has ended in order.
    #[track_caller]
    pub(crate) fn until_end(&mut self) -> Exit {
        self.ended().expect("an exit")
    }

    /// Reads until it has failed.
    #[track_caller]
    pub(crate) fn until_failure(&mut self) -> String {
        self.ended().expect_err("a failure")
    }

    /// Nothing comes for a while.
    #[track_caller]
    pub(crate) fn sends_nothing_more(&mut self) {
        let until = Instant::now() + SILENCE;
        while Instant::now() < until {
            assert!(!self.read_one(), "something came");
        }
    }
}
