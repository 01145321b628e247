//! A boot server and registry for one agent: serves ImageSets made here, tells what is desired, keeps what was observed.
//!
//! Not the real ones: those are tested with the real agent in QEMU. This one is in the test's own hands.

// Shared by tests of which not every one uses every part.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protocol::channel::{ChannelId, ChannelRequest, ChannelToken, ChannelWish};
use protocol::ids::Digest;
use protocol::node::{Desired, DesiredSet, FileContent, GivenFile, Observed};
use protocol::oci::mount::{MountEntry, MountForm};
use protocol::oci::{
    ANNOTATION_IMAGE_NAME, ARTIFACT_IMAGESET, Descriptor, Index, MEDIA_CONFIG,
    MEDIA_IMAGESET_CONFIG, MEDIA_INDEX, MEDIA_LAYER_TAR, MEDIA_MANIFEST, Manifest, Platform,
};
use protocol::registries::RegistryEntry;
use serde_json::{Value, json};
use tungstenite::WebSocket;
use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::Role;

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);
/// Longest that a poll for the desired document is held.
const HOLD: Duration = Duration::from_secs(2);

#[derive(Default)]
struct State {
    documents: BTreeMap<String, Arc<Vec<u8>>>,
    desired: Option<Desired>,
    registries: Vec<RegistryEntry>,
    /// `Authorization` that the registry asks for.
    guard: Option<String>,
    observed: Option<Observed>,
    fetched: Vec<String>,
    /// Offered with every desired document, for as long as they stand here.
    channels: Vec<ChannelRequest>,
    /// Whether one of them, or what was given by [`Site::give`], was never offered.
    fresh: bool,
    /// Who waits for the node's end of a channel.
    waiting: BTreeMap<ChannelId, mpsc::Sender<NodeEnd>>,
}

/// The node's end of a channel.
pub(crate) type NodeEnd = WebSocket<TcpStream>;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    /// A test that failed holding the lock still cleans up.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server; its thread ends with the test's process.
pub(crate) struct Site {
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// A published ImageSet.
#[derive(Clone)]
pub(crate) struct Published {
    pub(crate) set: DesiredSet,
    pub(crate) digest: Digest,
}

impl Site {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("port");
        let address = listener.local_addr().expect("address");
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&theirs);
                // An agent that is killed in the middle of a request is part of the tests.
                std::thread::spawn(move || drop(serve(stream.expect("accept"), &shared)));
            }
        });
        Self { address, shared }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn put(&self, path: &str, bytes: Vec<u8>) {
        let mut state = self.shared.lock();
        state.documents.insert(path.to_owned(), Arc::new(bytes));
    }

    fn add(&self, kind: &str, media_type: &str, bytes: Vec<u8>) -> Descriptor {
        let descriptor = Descriptor::of(media_type, &bytes);
        self.put(&format!("/v2/hello/{kind}/{}", descriptor.digest), bytes);
        descriptor
    }

    fn add_json(&self, kind: &str, media_type: &str, value: &impl serde::Serialize) -> Descriptor {
        self.add(kind, media_type, serde_json::to_vec(value).expect("json"))
    }

    fn manifest(
        &self,
        config: Descriptor,
        layers: Vec<Descriptor>,
        artifact: Option<&str>,
    ) -> Descriptor {
        let artifact_type = artifact.map(str::to_owned);
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(MEDIA_MANIFEST.to_owned()),
            artifact_type: artifact_type.clone(),
            config,
            layers,
            annotations: BTreeMap::new(),
        };
        let descriptor = self.add_json("manifests", MEDIA_MANIFEST, &manifest);
        Descriptor { artifact_type, ..descriptor }
    }

    /// Publishes `hello` in this version: one image of these tar layers, and the containers as given.
    pub(crate) fn publish(
        &self,
        version: &str,
        layers: &[Vec<u8>],
        containers: &Value,
    ) -> Published {
        self.publish_all(version, layers, &[], containers, None)
    }

    /// Publishes it with these mount forms of the image beside the layers.
    pub(crate) fn publish_forms(
        &self,
        version: &str,
        layers: &[Vec<u8>],
        forms: &[(MountForm, Vec<u8>)],
        containers: &Value,
    ) -> Published {
        self.publish_all(version, layers, forms, containers, None)
    }

    /// As [`Self::publish`], watched for this many seconds after a cut-over.
    pub(crate) fn publish_watched(
        &self,
        version: &str,
        layers: &[Vec<u8>],
        containers: &Value,
        watch_s: Option<u32>,
    ) -> Published {
        self.publish_all(version, layers, &[], containers, watch_s)
    }

    fn publish_all(
        &self,
        version: &str,
        layers: &[Vec<u8>],
        forms: &[(MountForm, Vec<u8>)],
        containers: &Value,
        watch_s: Option<u32>,
    ) -> Published {
        let mut set = json!({"name": "hello", "version": version, "image": [{"name": "web"}],
            "container": containers});
        if let Some(seconds) = watch_s {
            set["watch_s"] = seconds.into();
        }
        let config = self.add_json("blobs", MEDIA_IMAGESET_CONFIG, &set);
        let description = self.manifest(config, vec![Descriptor::empty()], Some(ARTIFACT_IMAGESET));
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let config = json!({"architecture": architecture, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = self.add_json("blobs", MEDIA_CONFIG, &config);
        let layers =
            layers.iter().map(|layer| self.add("blobs", MEDIA_LAYER_TAR, layer.clone())).collect();
        let mut image = self.manifest(config, layers, None);
        image.platform = Some(Platform {
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
            variant: None,
        });
        image.annotations.insert(ANNOTATION_IMAGE_NAME.to_owned(), "web".to_owned());
        let mut manifests = vec![description, image.clone()];
        let name = "web".parse().expect("name");
        for (form, bytes) in forms {
            let blob = self.add("blobs", form.media_type(), bytes.clone());
            let said = MountEntry::annotations(&name, *form, architecture, &image.digest);
            let manifest = MountEntry::new_manifest(blob, said.clone());
            let mut entry = self.add_json("manifests", MEDIA_MANIFEST, &manifest);
            entry.annotations = said;
            manifests.push(entry);
        }
        let index = Index {
            schema_version: 2,
            media_type: Some(MEDIA_INDEX.to_owned()),
            artifact_type: Some(ARTIFACT_IMAGESET.to_owned()),
            manifests,
            annotations: BTreeMap::new(),
        };
        let bytes = serde_json::to_vec(&index).expect("json");
        self.put(&format!("/v2/hello/manifests/{version}"), bytes.clone());
        let digest = self.add("manifests", MEDIA_INDEX, bytes).digest;
        let reference = format!("{}/hello:{version}@{digest}", self.url());
        let set = DesiredSet {
            roll: 0,
            force: false,
            name: "hello".parse().expect("name"),
            version: version.parse().expect("version"),
            reference: reference.parse().expect("reference"),
        };
        Published { set, digest }
    }

    /// Asks for this `Authorization` from whoever reads the registry.
    pub(crate) fn guard(&self, authorization: &str) {
        self.shared.lock().guard = Some(authorization.to_owned());
    }

    /// Tells the node what to know of registries, with what it is to run.
    pub(crate) fn tell_registries(&self, registries: &[RegistryEntry], imagesets: &[&Published]) {
        self.shared.lock().registries = registries.to_vec();
        self.want(imagesets);
    }

    /// Tells the node what to run.
    pub(crate) fn want(&self, imagesets: &[&Published]) {
        self.tell(|desired| {
            desired.imagesets = imagesets.iter().map(|published| published.set.clone()).collect();
        });
    }

    /// Changes what the node is told.
    pub(crate) fn tell(&self, change: impl FnOnce(&mut Desired)) {
        let mut state = self.shared.lock();
        let empty = || Desired::empty("n1".parse().expect("node"));
        let mut desired = state.desired.clone().unwrap_or_else(empty);
        desired.registries = state.registries.clone();
        desired.registries_tag = Some(format!("t{}", state.registries.len()));
        change(&mut desired);
        desired.version += 1;
        state.desired = Some(desired);
        self.shared.changed.notify_all();
    }

    /// Gives the node these files under another tag, in a document of the same version.
    pub(crate) fn give(&self, tag: &str, files: &[(&str, &str)]) {
        let mut state = self.shared.lock();
        let desired = state.desired.as_mut().expect("a document");
        let file = |(name, text): &(&str, &str)| GivenFile {
            name: name.parse().expect("name"),
            content: FileContent(text.as_bytes().to_vec()),
        };
        desired.files = files.iter().map(file).collect();
        desired.registries_tag = Some(tag.to_owned());
        state.fresh = true;
        self.shared.changed.notify_all();
    }

    /// Asks for a channel to the container `web`; the node's ends of it come out of the receiver, however many there are.
    pub(crate) fn channel(&self, wish: ChannelWish) -> mpsc::Receiver<NodeEnd> {
        let (sender, ends) = mpsc::channel();
        let mut state = self.shared.lock();
        let number = u64::from(std::process::id()) << 32 | state.waiting.len() as u64;
        let id = ChannelId::from_random(number.to_be_bytes());
        let container = Some("hello/web".parse().expect("container"));
        let token = ChannelToken::from_random([7; 32]);
        state.channels.push(ChannelRequest { id: id.clone(), token, container, wish });
        state.waiting.insert(id, sender);
        state.fresh = true;
        self.shared.changed.notify_all();
        ends
    }

    /// How often anything was asked of the registry.
    pub(crate) fn requests(&self) -> usize {
        self.shared.lock().fetched.len()
    }

    /// Waits for a report that is as wanted, and returns it.
    #[track_caller]
    pub(crate) fn wait(&self, what: &str, mut good: impl FnMut(&Observed) -> bool) -> Observed {
        let until = Instant::now() + LONG;
        let mut state = self.shared.lock();
        loop {
            if let Some(observed) = state.observed.as_ref().filter(|observed| good(observed)) {
                return observed.clone();
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "not in time: {what}; last report: {:#?}", state.observed);
            state = self.shared.changed.wait_timeout(state, left).expect("lock").0;
        }
    }

    /// How often a blob with this digest was asked for.
    pub(crate) fn fetches(&self, digest: &Digest) -> usize {
        let state = self.shared.lock();
        let digest = digest.to_string();
        state.fetched.iter().filter(|path| path.ends_with(&digest)).count()
    }
}

fn serve(mut stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (mut length, mut key, mut shown) = (0, None, None);
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        if name.eq_ignore_ascii_case("authorization") {
            shown = Some(value.trim().to_owned());
        }
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().expect("content-length");
        }
        if name.eq_ignore_ascii_case("sec-websocket-key") {
            key = Some(value.trim().to_owned());
        }
    }
    if let Some(key) = key {
        return upgrade(stream, &path, &key, shared);
    }
    let mut body = Vec::new();
    reader.take(length).read_to_end(&mut body)?;
    let answer = match (method.as_str(), path.split_once('?').unwrap_or((&path, ""))) {
        ("PUT", _) => {
            let observed = serde_json::from_slice(&body).expect("an observed document");
            shared.lock().observed = Some(observed);
            shared.changed.notify_all();
            None
        }
        (_, (path, query)) if path.ends_with("/desired") => desired(shared, query),
        (_, (path, _)) => {
            let mut state = shared.lock();
            if state.guard.is_some() && state.guard != shown {
                let head = "HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n";
                return stream.write_all(head.as_bytes());
            }
            state.fetched.push(path.to_owned());
            match state.documents.get(path) {
                Some(document) => Some(Arc::clone(document)),
                None => return stream.write_all(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"),
            }
        }
    };
    let status = if answer.is_some() { "200 OK" } else { "204 No Content" };
    let body = answer.unwrap_or_default();
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)
}

/// The node's end of a channel, to whoever waits for it.
fn upgrade(mut stream: TcpStream, path: &str, key: &str, shared: &Shared) -> std::io::Result<()> {
    let id = path.split('/').nth(5).and_then(|id| id.parse().ok()).expect("a channel's path");
    let accept = derive_accept_key(key.as_bytes());
    let head = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {accept}\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    let state = shared.lock();
    // A test that waits no longer lets it go.
    drop(state.waiting[&id].send(WebSocket::from_raw_socket(stream, Role::Server, None)));
    Ok(())
}

/// The desired document as soon as it is newer than what the node knows.
fn desired(shared: &Shared, query: &str) -> Option<Arc<Vec<u8>>> {
    let after = query.split('&').find_map(|pair| pair.strip_prefix("after="));
    let after: Option<u64> = after.map(|version| version.parse().expect("version"));
    let state = shared.lock();
    let old = |state: &mut State| {
        state.desired.as_ref().map(|desired| desired.version) <= after && !state.fresh
    };
    let (mut state, _) = shared.changed.wait_timeout_while(state, HOLD, old).expect("lock");
    let fresh = std::mem::take(&mut state.fresh);
    let mut desired = state.desired.clone()?;
    desired.channels.clone_from(&state.channels);
    (Some(desired.version) > after || fresh || !desired.channels.is_empty())
        .then(|| Arc::new(serde_json::to_vec(&desired).expect("json")))
}
