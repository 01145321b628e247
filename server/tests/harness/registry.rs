//! What the tests of the registry share: our registry and Debian's docker-registry on ports of their own, and requests.

mod debian;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use debian::DebianRegistry as Debian;
use protocol::ids::Digest;
use server::registry::{Access, RegistryStore, router};
use tempfile::TempDir;

pub(crate) const INSTALL: &str =
    "apt-get install skopeo docker-registry umoci podman crun erofs-utils squashfs-tools";
/// Longest wait for anything in these tests.
const PATIENCE: Duration = Duration::from_secs(60);
/// The header line of an image manifest.
pub(crate) const MANIFEST_TYPE: &str =
    "content-type: application/vnd.oci.image.manifest.v1+json\r\n";

/// Our registry on a port of its own, until it is dropped.
pub(crate) struct Embedded {
    pub(crate) address: SocketAddr,
    pub(crate) store: RegistryStore,
    pub(crate) dir: Arc<TempDir>,
    /// Ends the server when it is dropped.
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

impl Embedded {
    pub(crate) fn start() -> Self {
        Self::start_for(Access::default())
    }

    pub(crate) fn start_for(access: Access) -> Self {
        Self::open(Arc::new(tempfile::tempdir().expect("dir")), access)
    }

    /// The same registry, stopped and started again.
    pub(crate) fn restart(self) -> Self {
        let dir = Arc::clone(&self.dir);
        drop(self);
        Self::open(dir, Access::default())
    }

    fn open(dir: Arc<TempDir>, access: Access) -> Self {
        let store = RegistryStore::open_for(dir.path(), access).expect("store");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        listener.set_nonblocking(true).expect("nonblocking");
        let address = listener.local_addr().expect("address");
        let app = router(store.clone());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let serve = async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            tokio::select! {
                result = axum::serve(listener, app) => result.expect("serve"),
                _ = stopped => {}
            }
        };
        let thread = Some(std::thread::spawn(move || runtime().block_on(serve)));
        Self { address, store, dir, stop: Some(stop), thread }
    }

    pub(crate) fn blobs(&self) -> Vec<String> {
        let list = fs::read_dir(self.dir.path().join("blobs/sha256")).expect("list");
        list.map(|entry| entry.expect("entry").file_name().into_string().expect("name")).collect()
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server ends well");
        }
    }
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    #[track_caller]
    pub(crate) fn code(&self) -> String {
        let body: serde_json::Value = serde_json::from_slice(&self.body).expect("JSON");
        body["errors"][0]["code"].as_str().expect("code").to_owned()
    }
}

/// One request over a connection of its own; the head is sent as it stands.
pub(crate) fn ask(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> Answer {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
    );
    ask_raw(address, &[head.as_bytes(), body].concat())
}

/// The answer to these bytes; they must ask for the connection to be closed.
pub(crate) fn ask_raw(address: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.write_all(request).expect("request");
    let bodiless = request.starts_with(b"HEAD ");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("answer");
    let split = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("head");
    let head = String::from_utf8(bytes[..split].to_vec()).expect("text");
    let mut lines = head.lines();
    let status = lines.next().expect("status").split(' ').nth(1).expect("status");
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let body = bytes[split + 4..].to_vec();
    if !bodiless
        // docker-registry tells the length of the whole with a 416 that has no body.
        && !["304", "416"].contains(&status)
        && let Some(length) = headers.get("content-length")
    {
        assert_eq!(length.parse::<usize>().expect("length"), body.len(), "{status}: {head}");
    }
    Answer { status: status.parse().expect("number"), headers, body }
}

pub(crate) fn upload(address: SocketAddr, repository: &str, content: &[u8]) -> Digest {
    let digest = Digest::of(content);
    let path = format!("/v2/{repository}/blobs/uploads/?digest={digest}");
    let answer = ask(address, "POST", &path, "", content);
    assert_eq!(answer.status, 201);
    assert_eq!(answer.headers["location"], format!("/v2/{repository}/blobs/{digest}"));
    digest
}

pub(crate) fn begin(registry: &Embedded, repository: &str) -> String {
    let path = format!("/v2/{repository}/blobs/uploads/");
    let answer = ask(registry.address, "POST", &path, "", b"");
    assert_eq!(answer.status, 202);
    answer.headers["location"].clone()
}

/// An image manifest without layers.
pub(crate) fn manifest(config: &Digest) -> String {
    format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":2}},"layers":[]}}"#
    )
}

/// What a program prints; it must succeed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; {INSTALL}", command.get_program().display()));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).expect("text")
}
