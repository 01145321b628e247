//! The bytes of a blob are never in memory whole.

use std::io::{Read, Write};
use std::net::TcpStream;

use protocol::ids::Digest;
use sha2::Digest as _;

use crate::harness::ask;
use crate::program::Program;

/// Size of the blob, in bytes.
const SIZE: usize = 300 << 20;
/// How much more the server may have had at its peak than before: some buffers for each of four connections.
const ALLOWED: u64 = 32 << 20;
const CHUNK: usize = 1 << 20;

fn chunk(index: usize) -> Vec<u8> {
    vec![u8::try_from(index % 251).expect("small"); CHUNK]
}

/// Pulls the blob and checks it, a buffer at a time.
fn pull(program: &Program, digest: &Digest) {
    let mut stream = TcpStream::connect(program.address).expect("connect");
    let head = format!("GET /v2/a/blobs/{digest} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("request");
    let (mut buffer, mut hash, mut left) = (vec![0; CHUNK], sha2::Sha256::new(), None);
    let mut start = Vec::new();
    loop {
        let read = stream.read(&mut buffer).expect("read");
        if read == 0 {
            break;
        }
        if left.is_some() {
            hash.update(&buffer[..read]);
            continue;
        }
        start.extend_from_slice(&buffer[..read]);
        if let Some(end) = start.windows(4).position(|four| four == b"\r\n\r\n") {
            assert!(start.starts_with(b"HTTP/1.1 200"));
            hash.update(&start[end + 4..]);
            left = Some(());
        }
    }
    assert_eq!(Digest(hash.finalize().into()), *digest);
}

#[test]
fn a_blob_of_300_mb_is_pushed_and_pulled_four_times_at_once_in_little_memory() {
    let dir = tempfile::tempdir().expect("dir");
    let program = Program::start(dir.path(), "");
    let mut hash = sha2::Sha256::new();
    for index in 0..SIZE / CHUNK {
        hash.update(chunk(index));
    }
    let digest = Digest(hash.finalize().into());
    let before = program.peak_memory();

    // One body of all of it, then the same in chunks of 50 MB.
    let path = format!("/v2/a/blobs/uploads/?digest={digest}");
    let mut stream = TcpStream::connect(program.address).expect("connect");
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {SIZE}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).expect("head");
    for index in 0..SIZE / CHUNK {
        stream.write_all(&chunk(index)).expect("body");
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");

    let begun = ask(program.address, "POST", "/v2/b/blobs/uploads/", "", b"");
    let at = begun.headers["location"].clone();
    for part in 0..6 {
        let body: Vec<u8> = (part * 50..(part + 1) * 50).flat_map(chunk).collect();
        assert_eq!(ask(program.address, "PATCH", &at, "", &body).status, 202);
    }
    let path = format!("{at}?digest={digest}");
    assert_eq!(ask(program.address, "PUT", &path, "", b"").status, 201);
    let pushed = program.peak_memory() - before;

    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| pull(&program, &digest));
        }
    });
    let pulled = program.peak_memory() - before;
    assert!(pushed < ALLOWED && pulled < ALLOWED, "{pushed} bytes pushing, {pulled} pulling");
}
