//! The operator's end of a channel: asks for it, connects, and joins it to this process's standard streams.
//!
//! What is read from standard input goes out as far as the node grants it, and what comes in is granted on once it is written:
//! neither a command that does not read nor a pager that stands still makes anything grow.

mod connect;
mod streams;
pub(super) mod terminal;

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use futures_util::{SinkExt, StreamExt};
use protocol::channel::frame::{Exit, Frame, Taken, Window};
use protocol::channel::{ChannelBody, ChannelCreated};
use protocol::ids::NodeId;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::{Bytes, Message};

use self::connect::Socket;
use self::streams::{Input, Stream, Writer, Written};
use self::terminal::RawMode;
use super::client::Client;
use super::output;
use crate::config::values::BaseUrl;

/// After this long it is said what is waited for.
const SAY_AFTER: Duration = Duration::from_secs(2);
/// How long what came before a failure may take to be written: a pager that stands still must not hide the failure.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Ctrl-C so often ends this process, whatever the command does about it.
const ENOUGH: u32 = 3;

/// How the streams are joined.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Options {
    /// Send standard input.
    pub(super) input: bool,
    /// This terminal is the command's.
    pub(super) terminal: bool,
    /// Pass signals on to the command, rather than be ended by them.
    pub(super) signals: bool,
    /// Write each line as a JSON object.
    pub(super) json: bool,
}

/// Asks for the channel and stays until it ends. How the command ended; a log ends with 0.
pub(super) fn run(
    client: &Client,
    server: &BaseUrl,
    node: &NodeId,
    body: &ChannelBody,
    options: Options,
) -> anyhow::Result<Exit> {
    let made: ChannelCreated = client.post(&format!("/v1/nodes/{node}/channels"), body)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("the runtime does not start")?;
    let url = format!("{server}/v1/nodes/{node}/channels/{}/operator", made.id);
    let ended = runtime.block_on(async {
        let socket = connect::connect(&url, made.token.as_str()).await?;
        Session::new(socket, node, options)?.run().await
    });
    // A thread of it may be in a read of standard input, which nothing ends.
    runtime.shutdown_background();
    ended
}

struct Session<'a> {
    socket: Socket,
    node: &'a NodeId,
    options: Options,
    started: bool,
    raw: Option<RawMode>,
    window: Window,
    taken: Taken,
    writer: Writer,
    interrupts: u32,
    /// How it ends where this side ends it.
    left: Exit,
}

/// What happens next.
enum Event {
    Frame(Bytes),
    Written(Written),
    Input(Vec<u8>),
    Signal(u8),
    Resized,
    Late,
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    resized: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let take = |kind| signal(kind).context("cannot take signals");
        Ok(Self {
            interrupt: take(SignalKind::interrupt())?,
            terminate: take(SignalKind::terminate())?,
            hangup: take(SignalKind::hangup())?,
            resized: take(SignalKind::window_change())?,
        })
    }
}

/// Numbers of signals on every architecture (signal(7)).
const HANGUP: u8 = 1;
const INTERRUPT: u8 = 2;
const TERMINATE: u8 = 15;
const PIPE: i32 = 13;

async fn next_signal(signals: &mut Option<Signals>) -> Event {
    let Some(signals) = signals else { return std::future::pending().await };
    tokio::select! {
        _ = signals.interrupt.recv() => Event::Signal(INTERRUPT),
        _ = signals.terminate.recv() => Event::Signal(TERMINATE),
        _ = signals.hangup.recv() => Event::Signal(HANGUP),
        _ = signals.resized.recv() => Event::Resized,
    }
}

impl<'a> Session<'a> {
    fn new(socket: Socket, node: &'a NodeId, options: Options) -> anyhow::Result<Self> {
        Ok(Self {
            socket,
            node,
            options,
            started: false,
            raw: None,
            window: Window::default(),
            taken: Taken::default(),
            writer: Writer::start(options.json)?,
            interrupts: 0,
            left: Exit::Code(0),
        })
    }

    async fn run(mut self) -> anyhow::Result<Exit> {
        let mut signals = self.options.signals.then(Signals::new).transpose()?;
        match self.converse(&mut signals).await {
            Ok(Some(exit)) => self.finish(exit, &mut signals).await,
            // Nobody reads any more, or this process was asked to end.
            Ok(None) => Ok(self.left),
            Err(error) => {
                self.raw = None;
                let _ = tokio::time::timeout(LAST_WORDS, self.writer.finish()).await;
                Err(error)
            }
        }
    }

    /// Until the node's last frame, which is the exit; none where this side ended it.
    async fn converse(&mut self, signals: &mut Option<Signals>) -> anyhow::Result<Option<Exit>> {
        let mut input: Option<Input> = None;
        let late = Instant::now() + SAY_AFTER;
        let mut said = false;
        loop {
            if self.started && input.is_none() && self.options.input {
                input = Some(Input::start()?);
            }
            let room = self.started && self.window.room() >= streams::CHUNK;
            let event = tokio::select! {
                biased;
                written = self.writer.written() => Event::Written(written),
                message = self.socket.next() => match message {
                    Some(Ok(Message::Binary(bytes))) => Event::Frame(bytes),
                    Some(Ok(Message::Close(_))) | None => bail!("the server closed the channel"),
                    Some(Ok(_)) => continue,
                    Some(Err(error)) => {
                        return Err(anyhow!(error).context("the connection to the server broke off"));
                    }
                },
                event = next_signal(signals) => event,
                bytes = Input::next(&mut input), if room => Event::Input(bytes),
                () = tokio::time::sleep_until(late), if !self.started && !said => Event::Late,
            };
            match event {
                Event::Late => {
                    said = true;
                    output::say(&format!("waiting for node {} to open the channel", self.node));
                }
                Event::Frame(bytes) => {
                    if let Some(exit) = self.frame(&bytes).await? {
                        return Ok(Some(exit));
                    }
                }
                Event::Written(Written::Bytes(count)) => {
                    if let Some(more) = self.taken.taken(count) {
                        self.send(&Frame::Grant(more)).await?;
                    }
                }
                Event::Written(Written::Closed) => {
                    self.left = Exit::Signal(PIPE);
                    return Ok(None);
                }
                Event::Written(Written::Failed(error)) => {
                    return Err(anyhow!(error).context("cannot write what comes"));
                }
                Event::Input(bytes) if bytes.is_empty() => {
                    self.options.input = false;
                    input = None;
                    self.send(&Frame::EndOfInput).await?;
                }
                Event::Input(bytes) => {
                    self.window.sent(bytes.len());
                    self.send(&Frame::Input(&bytes)).await?;
                }
                Event::Signal(number) => {
                    if self.signal(number).await? {
                        return Ok(None);
                    }
                }
                Event::Resized => {
                    if let Some(size) = terminal::size().filter(|_| self.options.terminal) {
                        self.send(&Frame::Size(size)).await?;
                    }
                }
            }
        }
    }

    async fn send(&mut self, frame: &Frame<'_>) -> anyhow::Result<()> {
        let sent = self.socket.send(Message::binary(frame.render())).await;
        sent.context("the connection to the server broke off")
    }

    /// Takes a frame; the end, where it is one.
    async fn frame(&mut self, bytes: &[u8]) -> anyhow::Result<Option<Exit>> {
        let frame = Frame::parse(bytes).context("the node sent something wrong")?;
        if !self.taken.came(frame.weight()) {
            bail!("the node sent more than it was granted");
        }
        match frame {
            Frame::Output(bytes) => self.writer.write(Stream::Output, bytes),
            Frame::Errors(bytes) => self.writer.write(Stream::Errors, bytes),
            Frame::Grant(more) => self.window.granted(more),
            Frame::Started => {
                self.started = true;
                if self.options.terminal {
                    self.raw = Some(RawMode::enter()?);
                }
                if !self.options.input {
                    self.send(&Frame::EndOfInput).await?;
                }
            }
            Frame::Exit(exit) => return Ok(Some(exit)),
            Frame::Failure(why) => bail!("{why}"),
            Frame::Input(_) | Frame::EndOfInput | Frame::Size(_) | Frame::Signal(_) => {
                bail!("the node sent what only an operator sends");
            }
        }
        Ok(None)
    }

    /// A signal of this process goes to the command. True for one that ends this process: before there is a command, too often, or
    /// not by a key of the command's own terminal.
    async fn signal(&mut self, number: u8) -> anyhow::Result<bool> {
        if number == INTERRUPT {
            self.interrupts += 1;
        }
        if !self.started || self.interrupts >= ENOUGH || self.options.terminal {
            self.left = Exit::Signal(i32::from(number));
            return Ok(true);
        }
        self.send(&Frame::Signal(number)).await?;
        Ok(false)
    }

    /// The end, once all that came before it is written.
    async fn finish(mut self, exit: Exit, signals: &mut Option<Signals>) -> anyhow::Result<Exit> {
        // The server waits a moment for our farewell; whether it gets it changes nothing.
        let _ = self.socket.close(None).await;
        let written = tokio::select! {
            written = self.writer.finish() => written,
            () = async { while matches!(next_signal(signals).await, Event::Resized) {} } => return Ok(exit),
        };
        match written {
            Written::Failed(error) => Err(anyhow!(error).context("cannot write what comes")),
            Written::Bytes(_) | Written::Closed => Ok(exit),
        }
    }
}
