//! Channels on the node's side: opens those that the desired document asks for, each on a thread of its own.
//!
//! A channel changes nothing of what the agent knows or wants, so none of this passes through the agent's loop. A channel's thread
//! connects to the server ([`crate::transport::websocket`]) and serves a log (`tail`, [`kmsg`]) or a command in a container
//! (`exec`) over one `link`. It ends with its connection, and a command ends with it.

mod exec;
mod find;
pub mod kmsg;
mod link;
mod logs;
mod tail;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use protocol::channel::frame::Frame;
use protocol::channel::{ChannelId, ChannelRequest, ChannelWish, ContainerPath};
use protocol::ids::NodeId;

use self::link::{Link, LinkError};
use crate::containers::{read_json, write_json};
use crate::paths::RunDirs;
use crate::transport::Transport;

/// Most channels at a time.
const MAX_CHANNELS: usize = 32;
/// How many channels are remembered as opened: far more than can be asked for while a request lasts.
const REMEMBERED: usize = 256;
/// Stack of a channel's thread.
const STACK: usize = 512 << 10;

/// Opens channels. Cloning shares everything.
#[derive(Debug, Clone)]
pub struct Channels {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    transport: Transport,
    node: NodeId,
    dirs: RunDirs,
    /// Whether the node is this agent's: then the kernel log is its log.
    layer0: bool,
    /// Opened before, by this agent or the one before it.
    known: Mutex<VecDeque<ChannelId>>,
    open: AtomicUsize,
}

impl Channels {
    /// For this node; `layer0` when the machine is the agent's own.
    #[must_use]
    pub fn new(transport: Transport, node: NodeId, dirs: RunDirs, layer0: bool) -> Self {
        let known = read_json(&memory(&dirs)).unwrap_or_default();
        let (known, open) = (Mutex::new(known), AtomicUsize::new(0));
        Self { inner: Arc::new(Inner { transport, node, dirs, layer0, known, open }) }
    }

    /// Opens what is asked for and was not opened before, at the server with this base URL.
    pub fn open(&self, base: &str, requests: Vec<ChannelRequest>) {
        for request in requests {
            if !self.inner.remember(&request.id) {
                continue;
            }
            let id = request.id.clone();
            let url = format!("{base}/v1/nodes/{}/channels/{}/node", self.inner.node, request.id);
            let inner = Arc::clone(&self.inner);
            let started = std::thread::Builder::new()
                .name(format!("ch {}", request.id))
                .stack_size(STACK)
                .spawn(move || inner.run(&url, &request));
            if let Err(error) = started {
                log::error!("channel {id}: no thread for it: {error}");
            }
        }
    }
}

fn memory(dirs: &RunDirs) -> PathBuf {
    dirs.state().join("channels.json")
}

impl Inner {
    /// Notes a channel before anything is done for it, so that no command runs twice. False if it is known.
    fn remember(&self, id: &ChannelId) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.contains(id) {
            return false;
        }
        known.push_back(id.clone());
        if known.len() > REMEMBERED {
            known.pop_front();
        }
        if let Err(error) = write_json(&memory(&self.dirs), &*known) {
            log::warn!("channel {id} cannot be noted: {error}");
        }
        true
    }

    fn run(&self, url: &str, request: &ChannelRequest) {
        let _count = Counted::new(&self.open);
        let id = &request.id;
        log::debug!("channel {id}: {:?}", request.wish);
        let socket = self.transport.websocket(url, request.token.as_str(), link::config());
        let mut link = match socket {
            Ok(socket) => Link::new(socket),
            Err(error) => return log::warn!("channel {id}: {}", crate::agent::chain(&error)),
        };
        match self.serve(&mut link, request) {
            Ok(()) => log::debug!("channel {id} has ended"),
            Err(LinkError::Closed(why)) => log::debug!("channel {id} was closed: {why}"),
            Err(error) => log::warn!("channel {id}: {error}"),
        }
    }

    fn serve(&self, link: &mut Link, request: &ChannelRequest) -> Result<(), LinkError> {
        if self.open.load(Ordering::Relaxed) > MAX_CHANNELS {
            let why = format!("{MAX_CHANNELS} channels are open at this node already");
            return link.finish(&Frame::Failure(why.into()));
        }
        let container = || request.container.clone().ok_or("no container is named".to_owned());
        let served = match &request.wish {
            ChannelWish::Logs { follow, tail } => container()
                .and_then(|path| self.open_log(&path, *tail))
                .map(|mut tail| logs::serve(link, &mut tail, *follow)),
            ChannelWish::NodeLog { follow, tail } => {
                self.open_kmsg(*tail).map(|mut kmsg| logs::serve(link, &mut kmsg, *follow))
            }
            ChannelWish::Exec(wish) => container()
                .and_then(|path| find::running(&self.dirs, &path))
                .and_then(|found| exec::start(&found, wish))
                .map(|command| exec::serve(link, command)),
            ChannelWish::Unknown => {
                let version = env!("CARGO_PKG_VERSION");
                Err(format!("the agent of this node ({version}) does not know how to do that"))
            }
        };
        served.unwrap_or_else(|why| link.finish(&Frame::Failure(why.into())))
    }

    fn open_log(&self, path: &ContainerPath, lines: Option<u64>) -> Result<tail::Tail, String> {
        let set = path.set.as_ref().ok_or("no ImageSet is named")?;
        let dir = self.dirs.log().join(set.as_str());
        let file = dir.join(format!("{}.log", path.name));
        // One that runs and has not written yet has no file and will have one here.
        if !file.exists() && find::instances(&self.dirs, path).is_empty() {
            return Err(format!("there is no log of a container {path} on this node"));
        }
        std::fs::create_dir_all(&dir)
            .and_then(|()| tail::Tail::open(file.clone(), lines))
            .map_err(|error| format!("{}: {error}", file.display()))
    }

    fn open_kmsg(&self, lines: Option<u64>) -> Result<kmsg::Kmsg, String> {
        if !self.layer0 {
            return Err("this agent runs on a host of its own (--standalone) and logs to its \
                        standard error: look there, with journalctl for example"
                .to_owned());
        }
        kmsg::Kmsg::open(lines).map_err(|error| format!("/dev/kmsg: {error}"))
    }
}

/// One of the channels that are open.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_is_opened_once_also_by_an_agent_that_starts_anew() {
        let dir = tempfile::tempdir().expect("tempdir");
        let dirs = RunDirs::new(dir.path());
        std::fs::create_dir_all(dirs.state()).expect("state");
        let channels = || {
            let transport =
                Transport::new(std::path::Path::new("/nonexistent")).expect("transport");
            Channels::new(transport, "n1".parse().expect("node"), dirs.clone(), false)
        };
        let id = |number: u64| ChannelId::from_random(number.to_be_bytes());
        let first = channels();
        assert!(first.inner.remember(&id(1)) && !first.inner.remember(&id(1)));
        let second = channels();
        assert!(!second.inner.remember(&id(1)));
        for number in 2..=REMEMBERED as u64 + 1 {
            assert!(second.inner.remember(&id(number)), "{number}");
        }
        assert_eq!(second.inner.known.lock().expect("lock").len(), REMEMBERED);
    }
}
