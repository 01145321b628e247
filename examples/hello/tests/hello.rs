//! The running server: its answers, its log at full rate, its exit code and its end at SIGTERM. Loopback only.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

struct Hello {
    child: Child,
    out: BufReader<ChildStdout>,
    address: SocketAddr,
}

impl Hello {
    fn start() -> Self {
        Self::start_with(Command::new(env!("CARGO_BIN_EXE_hello")).args(["--port", "0"]))
    }

    fn start_with(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("start");
        let mut out = BufReader::new(child.stdout.take().expect("stdout"));
        let mut line = String::new();
        out.read_line(&mut line).expect("first line");
        let (name, port) = line.trim().rsplit_once(':').expect("first line");
        assert!(name.starts_with("hello ") && name.contains(" listening on "), "{line}");
        let address = SocketAddr::from(([127, 0, 0, 1], port.parse().expect("port")));
        Self { child, out, address }
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.address).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout");
        stream
            .write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
            .expect("ask");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        answer
    }
}

impl Drop for Hello {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn it_answers_with_its_version_and_refuses_what_it_does_not_know() {
    let hello = Hello::start();
    let answer = hello.get("/");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("\"version\":\""), "{answer}");
    for (path, status) in
        [("/x", 404), ("/log", 400), ("/log?lines=x", 400), ("/exit?code=256", 400)]
    {
        let answer = hello.get(path);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {answer}");
    }
}

#[test]
fn every_line_of_its_log_comes_in_order() {
    const LINES: usize = 20_000;
    let mut hello = Hello::start();
    let address = hello.address;
    let asker = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).expect("connect");
        let request = format!("GET /log?lines={LINES} HTTP/1.1\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("ask");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        answer
    });
    for number in 1..=LINES {
        let mut line = String::new();
        hello.out.read_line(&mut line).expect("line");
        assert_eq!(line, format!("line {number}\n"));
    }
    let answer = asker.join().expect("answer");
    assert!(answer.contains(&format!("{{\"lines\":{LINES}}}")), "{answer}");
}

#[test]
fn it_ends_with_the_code_it_is_asked_for() {
    let mut hello = Hello::start();
    assert!(hello.get("/exit?code=7").contains("{\"code\":7}"));
    assert_eq!(hello.child.wait().expect("wait").code(), Some(7));
}

#[test]
fn it_ends_on_sigterm_whatever_a_client_is_doing() {
    let mut hello = Hello::start();
    // A client that has asked nothing yet, and never will: nobody waits for it.
    let idle = TcpStream::connect(hello.address).expect("connect");
    kill_process(Pid::from_child(&hello.child), Signal::TERM).expect("kill");
    assert_eq!(hello.child.wait().expect("wait").code(), Some(0));
    drop(idle);
}

#[test]
fn with_a_held_socket_it_answers_whom_it_has_accepted_and_leaves_the_others() {
    let held = TcpListener::bind("127.0.0.1:0").expect("bind");
    let theirs = OwnedFd::from(held.try_clone().expect("clone"));
    let mut hello = Hello::start_with(
        Command::new(env!("CARGO_BIN_EXE_hello"))
            .env("LISTEN_FDS", "1")
            // As the node does it, but for the number: std can hand on no other descriptor.
            .env("LISTEN_FDS_FIRST_FD", "0")
            .stdin(theirs),
    );
    assert_eq!(hello.address, held.local_addr().expect("address"));
    assert!(hello.get("/").starts_with("HTTP/1.1 200 OK"));
    let mut accepted = TcpStream::connect(hello.address).expect("connect");
    accepted.write_all(b"GET / HTTP/1.1\r\n").expect("half a request");
    // One after the other is accepted: when this is answered, the one before was taken.
    hello.get("/");
    kill_process(Pid::from_child(&hello.child), Signal::TERM).expect("kill");
    let mut answer = String::new();
    accepted.write_all(b"\r\n").expect("the other half");
    accepted.read_to_string(&mut answer).expect("answer");
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert_eq!(hello.child.wait().expect("wait").code(), Some(0));
    held.set_nonblocking(false).expect("blocking");
    let waiting = TcpStream::connect(hello.address).expect("the socket is open still");
    held.accept().expect("and whoever comes now waits for the next version");
    drop(waiting);
}

#[test]
fn it_says_that_it_is_ready_when_it_listens() {
    let name = format!("hello-{}.sock", std::process::id());
    let path = std::env::temp_dir().join(name);
    let inbox = UnixDatagram::bind(&path).expect("bind");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hello"));
    let hello = Hello::start_with(command.args(["--port", "0"]).env("NOTIFY_SOCKET", &path));
    let mut word = [0; 64];
    let count = inbox.recv(&mut word).expect("a word");
    std::fs::remove_file(path).expect("remove");
    assert_eq!(&word[..count], b"READY=1");
    hello.get("/");
}
