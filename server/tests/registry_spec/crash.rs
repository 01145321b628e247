//! `kill -9` at random points of pushes: what was acknowledged is there, what is visible is whole, uploads go on.
//!
//! What a killed process has written the kernel still has, so this tests the order of the steps, not fsync.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

use protocol::ids::Digest;
use server::registry::RegistryStore;

use crate::harness::{ask, manifest};
use crate::program::Program;

const ROUNDS: u64 = 12;
const PUSHERS: u64 = 3;
/// Bytes that a pusher hands over at a time.
const STEP: usize = 16 << 10;

/// xorshift64.
fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

fn noise(seed: &mut u64, size: usize) -> Vec<u8> {
    std::iter::repeat_with(|| next(seed).to_le_bytes()).flatten().take(size).collect()
}

/// What the server has acknowledged.
#[derive(Default)]
struct Promised {
    blobs: Vec<Digest>,
    /// Tag and manifest.
    tags: Vec<(String, Digest)>,
    /// Place, what was sent of it so far, and the bytes for it.
    uploads: Vec<(String, usize, Vec<u8>)>,
}

/// One request, piece by piece; every piece uses up some of the server's life, which is ended from here.
struct Pusher<'a> {
    address: SocketAddr,
    life: &'a AtomicI64,
    server: &'a Mutex<Program>,
}

impl Pusher<'_> {
    /// Status and `Location`; `None` when the server died.
    fn ask(&self, head: &str, body: &[u8]) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(self.address).ok()?;
        let length = body.len();
        let head =
            format!("{head}host: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).ok()?;
        self.use_up(head.len());
        for piece in body.chunks(STEP) {
            stream.write_all(piece).ok()?;
            self.use_up(piece.len());
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        self.use_up(answer.len());
        let status = answer.split(' ').nth(1)?.parse().ok()?;
        let location = answer.lines().find_map(|line| line.strip_prefix("location: "));
        // An answer without its end was cut off.
        answer.contains("\r\n\r\n").then(|| (status, location.unwrap_or("").to_owned()))
    }

    fn use_up(&self, bytes: usize) {
        let spent = i64::try_from(bytes).expect("small");
        let before = self.life.fetch_sub(spent, Ordering::Relaxed);
        if before > 0 && before <= spent {
            self.server.lock().expect("server").kill();
        }
    }

    /// Pushes images, some of whose blobs go in chunks, until the server dies.
    fn push(&self, name: &str, seed: &mut u64, promised: &Mutex<Promised>) -> Option<()> {
        let promise = || promised.lock().expect("promised");
        for number in 0.. {
            let size = usize::try_from(next(seed) % 300_000).expect("small") + 1;
            let content = noise(seed, size);
            let digest = Digest::of(&content);
            let post = format!("POST /v2/{name}/blobs/uploads/");
            if next(seed).is_multiple_of(2) {
                let head = format!("{post}?digest={digest} HTTP/1.1\r\n");
                assert_eq!(self.ask(&head, &content)?.0, 201);
            } else {
                let (status, at) = self.ask(&format!("{post} HTTP/1.1\r\n"), b"")?;
                assert_eq!(status, 202);
                promise().uploads.push((at.clone(), 0, content.clone()));
                let half = content.len() / 2;
                let head = format!("PATCH {at} HTTP/1.1\r\n");
                assert_eq!(self.ask(&head, &content[..half])?.0, 202);
                if let Some(upload) = promise().uploads.iter_mut().find(|upload| upload.0 == at) {
                    upload.1 = half;
                }
                let head = format!("PUT {at}?digest={digest} HTTP/1.1\r\n");
                assert_eq!(self.ask(&head, &content[half..])?.0, 201);
                promise().uploads.retain(|upload| upload.0 != at);
            }
            promise().blobs.push(digest);
            let text = manifest(&digest);
            let tag = format!("{name}-{number}");
            let kind = crate::harness::MANIFEST_TYPE;
            let head = format!("PUT /v2/{name}/manifests/{tag} HTTP/1.1\r\n{kind}");
            assert_eq!(self.ask(&head, text.as_bytes())?.0, 201);
            promise().tags.push((tag, Digest::of(text.as_bytes())));
        }
        None
    }
}

/// Everything that is visible in the store is whole, and everything promised is visible.
fn check_store(dir: &std::path::Path, promised: &Promised) {
    let blobs = dir.join("data/registry/blobs/sha256");
    for entry in std::fs::read_dir(&blobs).expect("list") {
        let path = entry.expect("entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("name").to_owned();
        assert_eq!(Digest::of(&std::fs::read(&path).expect("blob")).hex(), name);
    }
    for digest in &promised.blobs {
        assert!(blobs.join(digest.hex()).is_file(), "{digest} was acknowledged and is not there");
    }
    let store = RegistryStore::open(&dir.join("data/registry")).expect("open");
    for repository in store.repositories().expect("repositories") {
        for tag in store.tags(&repository).expect("tags") {
            let digest = store.resolve_tag(&repository, &tag).expect("tag").expect("there");
            let bytes = store.manifest(&repository, &digest).expect("whole").expect("there");
            let manifest = protocol::oci::parse_manifest(&bytes).expect("manifest");
            assert!(blobs.join(manifest.config.digest.hex()).is_file(), "{tag} lacks its blob");
        }
    }
    for (tag, digest) in &promised.tags {
        let repository = tag.split('-').next().expect("name");
        let found = store.resolve_tag(repository, tag).expect("tag");
        assert_eq!(found, Some(*digest), "{tag} was acknowledged");
    }
}

/// The uploads that were open go on from where they say, or were finished just before the end.
fn resume_uploads(program: &Program, promised: &Promised) {
    for (at, acknowledged, content) in &promised.uploads {
        let digest = Digest::of(content);
        let status = ask(program.address, "GET", at, "", b"");
        if status.status == 404 {
            let repository = at.split('/').nth(2).expect("name");
            let path = format!("/v2/{repository}/blobs/{digest}");
            assert_eq!(ask(program.address, "HEAD", &path, "", b"").status, 200, "{at} is lost");
            continue;
        }
        let range = status.headers["range"].strip_prefix("0-").expect("range");
        let last: usize = range.parse().expect("number");
        // `0-0` is nothing or one byte: the spec has no word for nothing.
        let there = if last == 0 { 0 } else { last + 1 };
        assert!(there >= *acknowledged || there == 0, "{there} of {acknowledged} bytes are there");
        if there == 0 {
            continue;
        }
        let path = format!("{at}?digest={digest}");
        let done = ask(program.address, "PUT", &path, "", &content[there..]);
        assert_eq!(done.status, 201, "{at} from {there}");
    }
}

#[test]
fn killed_at_random_points_of_pushes_the_registry_keeps_what_it_acknowledged() {
    let dir = tempfile::tempdir().expect("dir");
    let promised = Mutex::new(Promised::default());
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    for round in 0..ROUNDS {
        let program = Program::start(dir.path(), "");
        resume_uploads(&program, &std::mem::take(&mut promised.lock().expect("promised")));
        let (address, server) = (program.address, Mutex::new(program));
        let life = AtomicI64::new(i64::try_from(next(&mut seed) % 4_000_000).expect("small") + 1);
        std::thread::scope(|scope| {
            for pusher in 0..PUSHERS {
                let (promised, life, server) = (&promised, &life, &server);
                let mut seed = next(&mut seed) | 1;
                scope.spawn(move || {
                    let name = format!("r{round}p{pusher}");
                    Pusher { address, life, server }.push(&name, &mut seed, promised)
                });
            }
        });
        check_store(dir.path(), &promised.lock().expect("promised"));
    }
    let left = std::fs::read_dir(dir.path().join("data/registry/tmp")).expect("list").count();
    assert_eq!(left, 0, "files of writes that were cut off are left after the next start");
}
