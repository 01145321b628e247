//! A tiny registry for tests: serves bytes by path, with ranges, and breaks in every way a real one can.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use protocol::ids::Digest;

/// How one answer goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection closes after this many bytes of the body.
    Cut(usize),
    /// Nothing more comes after this many bytes, but the connection stays open until the client gives up.
    Stall(usize),
    /// The byte at this place of the body is another.
    Corrupt(usize),
    /// The answer is this status instead.
    Status(u16),
    /// More bytes come than there are, without a declared length.
    Longer(usize),
}

/// What a path answers.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Whether `Range` is obeyed.
    pub(crate) ranges: bool,
    /// Only with this header value in `Authorization`, else 401 with the headers.
    pub(crate) token: Option<String>,
    /// One is used up by each request.
    pub(crate) faults: VecDeque<Fault>,
}

impl Answer {
    pub(crate) fn ok(body: Vec<u8>) -> Self {
        let (headers, faults) = (Vec::new(), VecDeque::new());
        Self { status: 200, headers, body, ranges: true, token: None, faults }
    }
}

/// A request that came: path and range.
pub(crate) type Request = (String, Option<String>);

#[derive(Debug, Default)]
struct Shared {
    answers: Mutex<BTreeMap<String, Answer>>,
    requests: Mutex<Vec<Request>>,
    closed: AtomicBool,
}

/// The server. It ends when dropped.
#[derive(Debug)]
pub(crate) struct Fake {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Fake {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("port");
        let address = listener.local_addr().expect("address");
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if theirs.closed.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&theirs);
                // A client that hangs up is part of the tests.
                std::thread::spawn(move || drop(serve(stream.expect("accept"), &shared)));
            }
        });
        Self { address, shared }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn add(&self, path: &str, answer: Answer) {
        self.shared.answers.lock().expect("lock").insert(path.to_owned(), answer);
    }

    /// Another server that answers as this one does now, without its faults.
    pub(crate) fn mirror(&self) -> Self {
        let mirror = Self::start();
        for (path, answer) in &*self.shared.answers.lock().expect("lock") {
            mirror.add(path, Answer { faults: VecDeque::new(), ..answer.clone() });
        }
        mirror
    }

    /// Answers on another path as on this one.
    pub(crate) fn alias(&self, path: &str, other: &str) {
        let mut answers = self.shared.answers.lock().expect("lock");
        let answer = answers.get(path).expect("path").clone();
        answers.insert(other.to_owned(), answer);
    }

    /// `HOST:PORT`.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    /// Changes what every path with this in it answers.
    pub(crate) fn change_all(&self, part: &str, change: impl Fn(&mut Answer)) {
        let mut answers = self.shared.answers.lock().expect("lock");
        answers.iter_mut().filter(|(path, _)| path.contains(part)).for_each(|(_, it)| change(it));
    }

    /// Changes what a path answers.
    pub(crate) fn change(&self, path: &str, change: impl FnOnce(&mut Answer)) {
        change(self.shared.answers.lock().expect("lock").get_mut(path).expect("path"));
    }

    /// The requests that came for paths with this in them.
    pub(crate) fn requests(&self, part: &str) -> Vec<Request> {
        let requests = self.shared.requests.lock().expect("lock");
        requests.iter().filter(|(path, _)| path.contains(part)).cloned().collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(self.address));
    }
}

fn serve(stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let head = line.starts_with("HEAD ");
    let mut headers = BTreeMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok());
    std::io::copy(&mut reader.by_ref().take(length.unwrap_or(0)), &mut std::io::sink())?;
    let range = headers.get("range").cloned();
    let asked = if head { format!("HEAD {path}") } else { path.clone() };
    shared.requests.lock().expect("lock").push((asked, range.clone()));
    let (mut answer, fault) = {
        let mut answers = shared.answers.lock().expect("lock");
        match answers.get_mut(path.split('?').next().unwrap_or_default()) {
            Some(answer) => {
                let fault = answer.faults.pop_front();
                (answer.clone(), fault)
            }
            None => (Answer { status: 404, ..Answer::ok(b"no such path".to_vec()) }, None),
        }
    };
    if head {
        let digest = Digest::of(&answer.body).to_string();
        answer.headers.push(("Docker-Content-Digest".to_owned(), digest));
        answer.body.clear();
    }
    respond(stream, answer, fault, range, headers.get("authorization"))
}

fn respond(
    mut stream: TcpStream,
    mut answer: Answer,
    fault: Option<Fault>,
    range: Option<String>,
    authorization: Option<&String>,
) -> std::io::Result<()> {
    let whole = answer.body.len();
    if answer.token.is_some() && answer.token.as_ref() != authorization {
        answer.status = 401;
    } else if let Some(start) = range.filter(|_| answer.ranges) {
        let start = start.trim_start_matches("bytes=").trim_end_matches('-');
        let start: usize = start.parse().expect("range");
        answer.body.drain(..start);
        answer.status = 206;
        let value = format!("bytes {start}-{}/{whole}", whole - 1);
        answer.headers.push(("Content-Range".to_owned(), value));
    }
    let mut declared = Some(answer.body.len());
    match fault {
        Some(Fault::Corrupt(at)) => answer.body[at] ^= 1,
        Some(Fault::Status(status)) => answer.status = status,
        Some(Fault::Longer(more)) => {
            declared = None;
            answer.body.resize(answer.body.len() + more, 0);
        }
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {} Status\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if let Some(declared) = declared.filter(|_| answer.status != 204) {
        head.push_str(&format!("Content-Length: {declared}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    let sent = match fault {
        Some(Fault::Cut(at) | Fault::Stall(at)) => at.min(answer.body.len()),
        _ => answer.body.len(),
    };
    stream.write_all(&answer.body[..sent])?;
    if matches!(fault, Some(Fault::Stall(_))) {
        // Until the client hangs up.
        let _ = stream.read(&mut [0]);
    }
    Ok(())
}
