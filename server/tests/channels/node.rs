//! A server in a thread of its own, and a node that asks it for work and hands its ends of channels to the test.

use std::collections::VecDeque;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use protocol::channel::ChannelRequest;
use protocol::channel::frame::{Frame, Taken, Window};
use protocol::node::Desired;
use server::config::Config;
use server::serve::Server;
use tokio::sync::watch;
use tokio_tungstenite::tungstenite::client::{IntoClientRequest, client};
use tokio_tungstenite::tungstenite::{Error, Message, WebSocket};

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);
/// How long a sender that is granted nothing is watched.
const STILL: Duration = Duration::from_millis(300);
const REPORT: &str = include_str!("../../../protocol/golden/v1/observed.json");

pub(crate) struct Site {
    pub(crate) base: String,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
    polling: Arc<AtomicBool>,
    ends: mpsc::Receiver<End>,
    _dir: tempfile::TempDir,
}

impl Site {
    /// The server, which knows node `n1` and what it runs, and the node.
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().display();
        let text = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\nurl = \"http://127.0.0.1:1\"\n\
             data_dir = \"{path}/data\"\nlayer0_dir = \"{path}\"\n\
             [[node]]\nid = \"n1\"\nmac = \"52:54:00:00:00:02\"\n"
        );
        let config = Config::parse(&text, Path::new("test.toml")).expect("config");
        let (stop, stopping) = watch::channel(false);
        let (tell, told) = mpsc::channel();
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("runtime").block_on(async {
                let server = Server::open(config).await.expect("open");
                tell.send(server.address().expect("address")).expect("tell");
                server.run(stopping).await.expect("run");
            });
        });
        let base = format!("http://{}", told.recv().expect("address"));
        let put = ureq::put(format!("{base}/v1/nodes/n1/observed")).send(REPORT);
        put.expect("the golden report");
        let polling = Arc::new(AtomicBool::new(true));
        let (sender, ends) = mpsc::channel();
        let (goes_on, theirs) = (Arc::clone(&polling), base.clone());
        let node = std::thread::spawn(move || poll(&theirs, &goes_on, &sender));
        // Operators are heard once the node has asked for work.
        let site = Self { base, stop, threads: vec![server, node], polling, ends, _dir: dir };
        let until = Instant::now() + LONG;
        while ureq::post(format!("{}/v1/nodes/n1/channels", site.base))
            .send("{\"kind\":\"logs\"}")
            .is_err()
        {
            assert!(Instant::now() < until, "the node is never heard");
            std::thread::sleep(Duration::from_millis(5));
        }
        site
    }

    /// The node's end of the channel that is asked for next.
    #[track_caller]
    pub(crate) fn node_end(&self) -> End {
        self.ends.recv_timeout(LONG).expect("nobody asks for a channel")
    }

    /// The node asks for no more work, and long enough for that to count.
    pub(crate) fn stop_polling(&self) {
        self.polling.store(false, Ordering::Relaxed);
        let until = Instant::now() + LONG;
        let body = "{\"kind\":\"logs\"}";
        while ureq::post(format!("{}/v1/nodes/n1/channels", self.base)).send(body).is_ok() {
            assert!(Instant::now() < until, "the node goes on asking");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.polling.store(false, Ordering::Relaxed);
        self.stop.send_replace(true);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn poll(base: &str, goes_on: &AtomicBool, ends: &mpsc::Sender<End>) {
    let mut known = 0;
    while goes_on.load(Ordering::Relaxed) {
        let url = format!("{base}/v1/nodes/n1/desired?after={known}&wait=1");
        let Ok(mut answer) = ureq::get(&url).call() else { return };
        if answer.status() == 204 {
            continue;
        }
        let bytes = answer.body_mut().read_to_vec().expect("body");
        let desired: Desired = serde_json::from_slice(&bytes).expect("desired");
        known = desired.version;
        for request in desired.channels {
            if ends.send(End::connect(base, request)).is_err() {
                return;
            }
        }
    }
}

/// The node's end of a channel.
pub(crate) struct End {
    pub(crate) request: ChannelRequest,
    socket: WebSocket<TcpStream>,
    window: Window,
    taken: Taken,
}

impl End {
    fn connect(base: &str, request: ChannelRequest) -> Self {
        let address = base.strip_prefix("http://").expect("http");
        let url = format!("ws://{address}/v1/nodes/n1/channels/{}/node", request.id);
        let mut upgrade = url.into_client_request().expect("request");
        let bearer = format!("Bearer {}", request.token.as_str()).parse().expect("header");
        upgrade.headers_mut().insert("authorization", bearer);
        let stream = TcpStream::connect(address).expect("connect");
        // As the agent does: what it has said is on its way when it goes.
        stream.set_nodelay(true).expect("no delay");
        let (socket, _) = client(upgrade, stream).expect("upgrade");
        socket.get_ref().set_read_timeout(Some(Duration::from_millis(50))).expect("time-out");
        Self { request, socket, window: Window::default(), taken: Taken::default() }
    }

    pub(crate) fn send(&mut self, frame: &Frame<'_>) {
        self.window.sent(frame.weight());
        self.send_raw(&frame.render());
    }

    pub(crate) fn send_raw(&mut self, bytes: &[u8]) {
        // An operator that has gone is found out by reading.
        drop(self.socket.send(Message::binary(bytes.to_vec())));
    }

    /// What comes next, none within a short time. An error is the end.
    fn read(&mut self) -> Result<Option<Vec<u8>>, String> {
        match self.socket.read() {
            Ok(Message::Binary(bytes)) => {
                let frame = Frame::parse(&bytes).expect("a frame");
                if let Frame::Grant(more) = frame {
                    self.window.granted(more);
                    return Ok(None);
                }
                assert!(self.taken.came(frame.weight()), "more than was granted");
                Ok(Some(bytes.to_vec()))
            }
            Ok(Message::Close(_)) => Err("closed".to_owned()),
            Ok(_) => Ok(None),
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The next frame that is no grant.
    #[track_caller]
    pub(crate) fn next(&mut self) -> Vec<u8> {
        let until = Instant::now() + LONG;
        loop {
            assert!(Instant::now() < until, "nothing comes");
            if let Some(bytes) = self.read().expect("open") {
                return bytes;
            }
        }
    }

    /// Reads until the other side closes.
    #[track_caller]
    pub(crate) fn until_closed(&mut self) {
        let until = Instant::now() + LONG;
        while self.read().is_ok() {
            assert!(Instant::now() < until, "never closed");
        }
    }

    /// Sends input back as output until it ends.
    pub(crate) fn echo(&mut self) {
        let until = Instant::now() + LONG;
        let (mut held, mut ended) = (VecDeque::new(), false);
        while !(ended && held.is_empty()) {
            assert!(Instant::now() < until, "{} bytes are held", held.len());
            let room = self.window.room().min(held.len());
            if room > 0 {
                let bytes: Vec<u8> = held.drain(..room).collect();
                self.send(&Frame::Output(&bytes));
                if let Some(more) = self.taken.taken(room) {
                    self.send(&Frame::Grant(more));
                }
                continue;
            }
            let Some(bytes) = self.read().expect("open") else { continue };
            match Frame::parse(&bytes).expect("a frame") {
                Frame::Input(bytes) => held.extend(bytes),
                Frame::EndOfInput => ended = true,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Sends all of it, as it is granted. What comes meanwhile must be grants.
    #[track_caller]
    pub(crate) fn send_all(&mut self, bytes: &[u8]) {
        let until = Instant::now() + LONG;
        let mut rest = bytes;
        while !rest.is_empty() {
            assert!(Instant::now() < until, "{} bytes are not granted", rest.len());
            let room = self.window.room().min(rest.len());
            if room == 0 {
                assert!(self.read().expect("open").is_none_or(|it| it.len() == 1), "only grants");
                continue;
            }
            let (now, later) = rest.split_at(room);
            self.send(&Frame::Output(now));
            rest = later;
        }
    }

    /// Sends of it what is granted, until nothing more is for a while. How much that was.
    pub(crate) fn send_what_is_granted(&mut self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        let mut still = Instant::now();
        while still.elapsed() < STILL && sent < bytes.len() {
            let room = self.window.room().min(bytes.len() - sent);
            if room > 0 {
                self.send(&Frame::Output(&bytes[sent..sent + room]));
                sent += room;
                still = Instant::now();
            }
            drop(self.read().expect("open"));
        }
        sent
    }
}
