//! The TFTP server against clients that we did not write (curl, atftp, tftp-hpa) and against rude ones made here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use server::tftp::{self, TftpConfig, TftpError};
use tokio::sync::watch;

/// A server in a thread, stopped on drop.
struct Running {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<Result<(), TftpError>>>,
    root: tempfile::TempDir,
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| u8::try_from(n % 251).expect("small")).collect()
}

impl Running {
    fn start() -> Self {
        let root = tempfile::tempdir().expect("dir");
        std::fs::create_dir(root.path().join("sub")).expect("dir");
        std::fs::write(root.path().join("sub/disk"), pattern(100_000)).expect("file");
        std::fs::write(root.path().join("builtin"), b"disk loses").expect("file");
        for name in ["leak", "linked"] {
            std::os::unix::fs::symlink("/etc/passwd", root.path().join(name)).expect("link");
        }
        let config = TftpConfig {
            bind: (Ipv4Addr::LOCALHOST, 0).into(),
            root: Some(root.path().to_owned()),
            linked: BTreeSet::from(["linked".to_owned()]),
            builtin: BTreeMap::from([
                ("builtin".to_owned(), Bytes::from_static(b"#!ipxe\n")),
                ("even".to_owned(), Bytes::from(pattern(1024))),
                ("big".to_owned(), Bytes::from(pattern(70_000 * 8 + 3))),
                ("empty".to_owned(), Bytes::new()),
            ]),
        };
        let server = tftp::bind(config).expect("bind");
        let address = server.local_addr().expect("address");
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("runtime").block_on(server.run(stopped))
        });
        Self { address, stop, thread: Some(thread), root }
    }

    fn curl(&self, path: &str, block: u32) -> Result<Vec<u8>, Option<i32>> {
        let out = self.root.path().join("curl-out");
        let status = Command::new("curl")
            .args(["-s", "--path-as-is", "--max-time", "20", "--tftp-blksize", &block.to_string()])
            .arg("-o")
            .arg(&out)
            .arg(format!("tftp://{}/{path}", self.address))
            .status()
            .expect("curl is missing: apt-get install curl");
        if status.success() { Ok(take(&out)) } else { Err(status.code()) }
    }

    fn ask(&self, packet: &[u8]) -> Raw {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        socket.send_to(packet, self.address).expect("send");
        Raw { socket }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.send(true).expect("server is there");
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(matches!(ended, Some(Ok(Ok(())))), "{ended:?}");
    }
}

/// What was fetched, removed so that the next fetch starts afresh.
fn take(path: &Path) -> Vec<u8> {
    let bytes = std::fs::read(path).unwrap_or_default();
    let _ = std::fs::remove_file(path);
    bytes
}

/// A client in full control of its packets.
struct Raw {
    socket: UdpSocket,
}

impl Raw {
    fn hear(&self) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 2048];
        let (len, from) = self.socket.recv_from(&mut buffer).expect("an answer");
        (buffer[..len].to_vec(), from)
    }

    fn hears_nothing(&self) -> bool {
        self.socket.set_read_timeout(Some(Duration::from_millis(300))).expect("timeout");
        let silent = self.socket.recv(&mut [0; 2048]).is_err();
        self.socket.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        silent
    }
}

#[test]
fn curl_gets_every_kind_of_file_whole() {
    let server = Running::start();
    for block in [512, 1024, 1468, 8] {
        assert_eq!(server.curl("sub/disk", block), Ok(pattern(100_000)), "blksize {block}");
    }
    assert_eq!(server.curl("builtin", 512), Ok(b"#!ipxe\n".to_vec()));
    assert_eq!(server.curl("/builtin", 512), Ok(b"#!ipxe\n".to_vec()));
    assert_eq!(server.curl("even", 512), Ok(pattern(1024)));
    assert_eq!(server.curl("big", 8), Ok(pattern(560_003)), "block numbers roll over");
}

#[test]
fn names_out_of_the_root_are_not_found() {
    let server = Running::start();
    // 68: TFTP file not found.
    for path in ["nothing", "sub", "leak", "/../../../../etc/passwd", "sub/../builtin"] {
        assert_eq!(server.curl(path, 512), Err(Some(68)), "{path}");
    }
    let passwd = std::fs::read("/etc/passwd").expect("passwd");
    assert_eq!(server.curl("linked", 512), Ok(passwd), "a boot program may be a link");
}

#[test]
fn atftp_with_window_and_options_gets_it_whole() {
    let server = Running::start();
    let out = server.root.path().join("out");
    for options in [&["--option", "windowsize 8", "--option", "blksize 1024"][..], &[]] {
        let said = Command::new("atftp")
            .args(["--option", "tsize 0", "--option", "timeout 2"])
            .args(options)
            .args(["-g", "-r", "sub/disk", "-l"])
            .arg(&out)
            .args([server.address.ip().to_string(), server.address.port().to_string()])
            .output()
            .expect("atftp is missing: apt-get install atftp");
        assert!(said.status.success(), "{said:?}");
        assert_eq!(take(&out), pattern(100_000), "{options:?}");
    }
}

#[test]
fn tftp_hpa_gets_binary_and_is_told_about_netascii_and_writing() {
    let server = Running::start();
    let dir = server.root.path().join("hpa");
    std::fs::create_dir(&dir).expect("dir");
    let tftp = |mode: &str, verb: &[&str]| {
        let output = Command::new("tftp")
            .current_dir(&dir)
            .args(["-m", mode, "127.0.0.1", &server.address.port().to_string(), "-c"])
            .args(verb)
            .output()
            .expect("tftp is missing: apt-get install tftp-hpa");
        format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    };
    tftp("binary", &["get", "sub/disk", "disk"]);
    assert_eq!(take(&dir.join("disk")), pattern(100_000));
    // curl takes an empty file's size for an error.
    tftp("binary", &["get", "empty", "empty"]);
    assert_eq!(std::fs::read(dir.join("empty")).expect("made"), b"");
    let said = tftp("netascii", &["get", "builtin", "x"]);
    assert!(said.contains("only octet mode"), "{said}");
    std::fs::write(dir.join("up"), b"x").expect("file");
    let said = tftp("binary", &["put", "up", "up"]);
    assert!(said.contains("writing is not allowed"), "{said}");
}

#[test]
fn a_repeated_acknowledgement_or_request_is_not_answered_twice() {
    let server = Running::start();
    let request = b"\x00\x01even\x00octet\x00timeout\x0020\x00";
    let raw = server.ask(request);
    let (oack, transfer) = raw.hear();
    assert_eq!(oack[..2], [0, 6]);
    raw.socket.send_to(request, server.address).expect("send");
    raw.socket.send_to(&[0, 4, 0, 0], transfer).expect("send");
    assert_eq!(raw.hear().0[..4], [0, 3, 0, 1]);
    for _ in 0..5 {
        raw.socket.send_to(&[0, 4, 0, 0], transfer).expect("send");
    }
    raw.socket.send_to(&[0, 4, 0, 1], transfer).expect("send");
    assert_eq!(raw.hear().0[..4], [0, 3, 0, 2]);
    assert!(raw.hears_nothing());
}

#[test]
fn silence_brings_the_block_again_and_the_end_after_five_times() {
    let server = Running::start();
    let raw = server.ask(b"\x00\x01even\x00octet\x00");
    for time in 0..6 {
        assert_eq!(raw.hear().0.len(), 516, "time {time}");
    }
    raw.socket.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
    assert!(raw.socket.recv(&mut [0; 2048]).is_err(), "given up");
}

#[test]
fn a_strangers_packet_does_not_disturb_a_transfer() {
    let server = Running::start();
    let raw = server.ask(b"\x00\x01even\x00octet\x00timeout\x0020\x00");
    let (_, transfer) = raw.hear();
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    stranger.send_to(b"\x00\x05\x00\x00bye\x00", transfer).expect("send");
    raw.socket.send_to(&[0, 4, 0, 0], transfer).expect("send");
    assert_eq!(raw.hear().0[..4], [0, 3, 0, 1]);
}

#[test]
fn a_taken_port_a_foreign_address_and_a_missing_root_are_named() {
    let server = Running::start();
    let config = |bind: SocketAddr, root: Option<&str>| TftpConfig {
        bind,
        root: root.map(Into::into),
        linked: BTreeSet::new(),
        builtin: BTreeMap::new(),
    };
    for (config, expected) in [
        (config(server.address, None), format!("{} (TFTP, udp) is in use", server.address)),
        (config(([192, 0, 2, 1], 0).into(), None), "192.0.2.1".to_owned()),
        (config(([127, 0, 0, 1], 0).into(), Some("/nonexistent/x")), "/nonexistent/x".to_owned()),
    ] {
        let error = tftp::bind(config).expect_err("refused").to_string();
        assert!(error.contains(&expected), "{error}");
    }
}
