//! The example payload: a small HTTP/1.1 server that answers with its version, made to be rolled.
//!
//! Not a web server: one short answer for each connection, no keep-alive, no TLS.
//!
//! | request | answer |
//! |---|---|
//! | `GET /` | `{"name":"hello","version":"1","pid":1}` |
//! | `GET /log?lines=N` | writes N numbered lines to stdout at full rate, answers when they are written |
//! | `GET /exit?code=N` | answers, then the process ends with N |
//!
//! It serves at the first held socket that it is given (sd_listen_fds(3)), else at a port of its own, and says READY=1 where
//! somebody listens for that (sd_notify(3)).
//!
//! SIGTERM and SIGINT end it with 0: as PID 1 of a namespace it must catch them, for the kernel drops what PID 1 does not
//! catch (pid_namespaces(7)). With a port of its own it ends at once. With a held socket it accepts nothing more and answers
//! whom it has accepted: those that still wait are its successor's.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGINT, SIGTERM};

/// Where the version stands in the image.
const VERSION_FILE: &str = "/etc/hello-version";
/// Port when neither `--port` nor PORT says one.
const DEFAULT_PORT: u16 = 8080;
/// Most connections at a time; further ones are answered 503.
const MAX_CONNECTIONS: usize = 64;
/// Most bytes of a request's head.
const MAX_HEAD: u64 = 8 << 10;
/// How long a client may say nothing.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long those who are served may take after SIGTERM, with a held socket.
const DRAIN: Duration = Duration::from_secs(4);

fn main() -> ExitCode {
    match port(std::env::args().skip(1), std::env::var("PORT").ok()) {
        Ok(port) => run(port).unwrap_or_else(|error| complain(&format!("port {port}: {error}"), 1)),
        Err(problem) => complain(&problem, 2),
    }
}

fn complain(problem: &str, code: u8) -> ExitCode {
    // Nobody is left to tell when stderr is gone.
    let _ = writeln!(io::stderr(), "hello: {problem}");
    ExitCode::from(code)
}

fn port(mut args: impl Iterator<Item = String>, env: Option<String>) -> Result<u16, String> {
    let mut text = env;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--port" => text = Some(args.next().ok_or("--port needs a number")?),
            _ => return Err(format!("unknown argument `{arg}`; usage: hello [--port N]")),
        }
    }
    match text {
        None => Ok(DEFAULT_PORT),
        Some(text) => text.parse().map_err(|_| format!("`{text}` is not a port")),
    }
}

/// What the connections share.
struct Service {
    version: String,
    /// Rung when the program should end.
    bell: UnixStream,
    /// The exit code that a client asked for.
    code: OnceLock<u8>,
    open: Mutex<usize>,
    closed: Condvar,
}

fn run(port: u16) -> io::Result<ExitCode> {
    let (rung, bell) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, bell.try_clone()?)?;
    }
    let held = listenfd::ListenFd::from_env().take_tcp_listener(0)?;
    let is_held = held.is_some();
    let listener = match held {
        Some(listener) => listener,
        // std sets SO_REUSEADDR: the next version binds while connections of this one linger.
        None => TcpListener::bind(("0.0.0.0", port))?,
    };
    // Several versions may wait at one held socket: who comes too late must not wait for the next client.
    listener.set_nonblocking(true)?;
    let service = Service {
        version: version(),
        bell,
        code: OnceLock::new(),
        open: Mutex::new(0),
        closed: Condvar::new(),
    };
    let service = Arc::new(service);
    writeln!(io::stdout(), "hello {} listening on {}", service.version, listener.local_addr()?)?;
    say_ready()?;
    serve(&listener, &rung, &service)?;
    drop(listener);
    if is_held {
        service.drain();
    }
    Ok(ExitCode::from(service.code.get().copied().unwrap_or(0)))
}

fn say_ready() -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    UnixDatagram::unbound()?.send_to(b"READY=1", path).map(drop)
}

fn version() -> String {
    let text = std::fs::read_to_string(VERSION_FILE).unwrap_or_default();
    let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let version: String = text.trim().chars().filter(plain).collect();
    if version.is_empty() { "unknown".to_owned() } else { version }
}

/// Serves until the bell is rung.
fn serve(listener: &TcpListener, rung: &UnixStream, service: &Arc<Service>) -> io::Result<()> {
    loop {
        let mut fds =
            [listener.as_fd(), rung.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [_, bell] = &fds;
        if !bell.revents().is_empty() {
            return Ok(());
        }
        // Another version was faster, or the client left before it was accepted: neither is a reason to end.
        let Ok((stream, _)) = listener.accept() else { continue };
        service.begin(stream);
    }
}

impl Service {
    /// Answers a client, on a thread of its own.
    fn begin(self: &Arc<Self>, mut stream: TcpStream) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if *open >= MAX_CONNECTIONS {
            let _ = respond(&mut stream, "503 Service Unavailable", "{\"error\":\"busy\"}");
            return;
        }
        *open += 1;
        drop(open);
        let service = Arc::clone(self);
        thread::spawn(move || {
            // A client that goes away while it is answered is its own business.
            let _ = answer(stream, &service);
            *service.open.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
            service.closed.notify_all();
        });
    }

    /// Waits until everybody who was accepted is answered.
    fn drain(&self) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // What is open after that time has said nothing for as long.
        drop(self.closed.wait_timeout_while(open, DRAIN, |open| *open > 0));
    }

    fn end_with(&self, code: u8) {
        let _ = self.code.set(code);
        // The other end is gone only when the process ends anyway.
        let _ = (&self.bell).write(b"x");
    }
}

fn answer(stream: TcpStream, service: &Service) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut head = BufReader::new(stream.try_clone()?.take(MAX_HEAD));
    let mut line = String::new();
    head.read_line(&mut line)?;
    let mut header = String::new();
    while head.read_line(&mut header)? > 2 {
        header.clear();
    }
    let mut stream = stream;
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    if method != "GET" {
        return respond(&mut stream, "405 Method Not Allowed", "{\"error\":\"only GET\"}");
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    match path {
        "/" => {
            let pid = std::process::id();
            let version = &service.version;
            let body = format!("{{\"name\":\"hello\",\"version\":\"{version}\",\"pid\":{pid}}}");
            respond(&mut stream, "200 OK", &body)
        }
        "/log" => match number::<u64>(query, "lines") {
            Some(lines) => match log(lines) {
                Ok(()) => respond(&mut stream, "200 OK", &format!("{{\"lines\":{lines}}}")),
                Err(_) => respond(&mut stream, "500 Internal Server Error", "{\"error\":\"log\"}"),
            },
            None => respond(&mut stream, "400 Bad Request", "{\"error\":\"lines=N\"}"),
        },
        "/exit" => match number::<u8>(query, "code") {
            Some(code) => {
                respond(&mut stream, "200 OK", &format!("{{\"code\":{code}}}"))?;
                service.end_with(code);
                Ok(())
            }
            None => respond(&mut stream, "400 Bad Request", "{\"error\":\"code=0..255\"}"),
        },
        _ => respond(&mut stream, "404 Not Found", "{\"error\":\"no such path\"}"),
    }
}

fn number<T: std::str::FromStr>(query: &str, key: &str) -> Option<T> {
    let (_, value) =
        query.split('&').filter_map(|pair| pair.split_once('=')).find(|(k, _)| *k == key)?;
    value.parse().ok()
}

/// Writes `line 1` to `line N`; other requests' lines wait until these are out.
fn log(lines: u64) -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(64 << 10, io::stdout().lock());
    for line in 1..=lines {
        writeln!(out, "line {line}")?;
    }
    out.flush()
}

fn respond(stream: &mut TcpStream, status: &str, body: &str) -> io::Result<()> {
    let length = body.len() + 1;
    let text = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}\n"
    );
    stream.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_comes_from_the_argument_then_the_environment_then_the_default() {
        let port = |args: &[&str], env: Option<&str>| {
            port(args.iter().map(|arg| (*arg).to_owned()), env.map(str::to_owned))
        };
        assert_eq!(port(&["--port", "1"], Some("2")), Ok(1));
        assert_eq!(port(&[], Some("2")), Ok(2));
        assert_eq!(port(&[], None), Ok(DEFAULT_PORT));
        for (args, env) in [(&["--port"][..], None), (&["-x"], None), (&[], Some("x"))] {
            assert!(port(args, env).is_err());
        }
    }

    #[test]
    fn numbers_of_a_query_are_read() {
        assert_eq!(number::<u8>("a=1&code=7", "code"), Some(7));
        assert_eq!(number::<u8>("code=256", "code"), None);
        assert_eq!(number::<u8>("", "code"), None);
    }
}
