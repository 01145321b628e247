//! The running server: its answers, its log at full rate, its exit code and its end at SIGTERM. Loopback only.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
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
        let mut child = Command::new(env!("CARGO_BIN_EXE_hello"))
            .args(["--port", "0"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("start");
        let mut out = BufReader::new(child.stdout.take().expect("stdout"));
        let mut line = String::new();
        out.read_line(&mut line).expect("first line");
        let (name, port) = line.trim().split_once(" listening on 0.0.0.0:").expect("first line");
        assert!(name.starts_with("hello "), "{line}");
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
