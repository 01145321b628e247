//! Files and secrets of the config (`[[files]]`) that nodes are given for their containers.
//!
//! Like the registry table, they are added when a node asks for its desired document: they are in no database, no listing
//! and no log. Whoever can reach this server can ask as a node does. What containers do with them is the agent's affair.

use std::collections::BTreeSet;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use protocol::ids::{Name, NodeId};
use protocol::node::{Desired, FileContent, GivenFile};
use protocol::registries::Secret;
use serde::Deserialize;
use tokio::sync::watch;

use crate::registries::Known;

/// Most bytes of one file.
pub const MAX_FILE_BYTES: usize = 256 << 10;
/// Most bytes of one node's files together.
pub const MAX_NODE_BYTES: usize = 1 << 20;
/// How often it is looked whether files have changed.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// `[[files]]`: one file, and the nodes that get it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSource {
    /// The name by which containers ask for it (`from`).
    pub name: Name,
    /// Where it is read. A relative path begins at the config's directory. Exactly one of `path` and `content` is given.
    pub path: Option<PathBuf>,
    /// What is in it.
    pub content: Option<Secret>,
    /// The nodes that get it; all when absent.
    pub nodes: Option<Vec<NodeId>>,
}

impl FileSource {
    /// Whether a node gets it; none stands for a node that no file names.
    fn is_for(&self, node: Option<&NodeId>) -> bool {
        let named = |nodes: &Vec<NodeId>| node.is_some_and(|node| nodes.contains(node));
        self.nodes.as_ref().is_none_or(named)
    }

    /// Whether some node gets both.
    fn meets(&self, other: &Self) -> bool {
        match (&self.nodes, &other.nodes) {
            (Some(ours), Some(theirs)) => ours.iter().any(|node| theirs.contains(node)),
            _ => true,
        }
    }
}

/// Why a file cannot be given to nodes. None of these repeats what is in it.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// It is a directory, a device or the like.
    #[error("{}: not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// It is larger than [`MAX_FILE_BYTES`].
    #[error("larger than {MAX_FILE_BYTES} bytes, the most that one file may have")]
    TooLarge,
    /// The files of a node are larger than [`MAX_NODE_BYTES`].
    #[error("the files of {0} are larger than {MAX_NODE_BYTES} bytes together")]
    TooMany(String),
}

/// What is wrong with one of the files, and which key says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// Which one, from 0.
    pub nth: usize,
    /// The key.
    pub key: &'static str,
    /// What is wrong.
    pub text: String,
}

/// What is wrong with a table by itself, without the files that it names.
#[must_use]
pub fn problems(sources: &[FileSource]) -> Vec<Wrong> {
    let mut problems = Vec::new();
    for (nth, source) in sources.iter().enumerate() {
        let mut say = |key, text: String| problems.push(Wrong { nth, key, text });
        let name = &source.name;
        match (&source.path, &source.content) {
            (Some(_), None) => {}
            (None, Some(content)) if content.reveal().len() > MAX_FILE_BYTES => {
                say("content", FileError::TooLarge.to_string());
            }
            (None, Some(_)) => {}
            _ => say("name", format!("file `{name}` wants exactly one of path and content")),
        }
        if source.nodes.as_ref().is_some_and(Vec::is_empty) {
            let text = "no node gets this file; without this key, all do";
            say("nodes", text.to_owned());
        }
        let before = sources.iter().take(nth);
        if before.filter(|other| other.name == *name).any(|other| other.meets(source)) {
            say("name", format!("file `{name}` is there twice for the same node"));
        }
    }
    problems
}

/// Tells one state of a file from another: device, inode, size, times of change.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

/// A file as it was read last.
#[derive(Debug, Clone)]
struct Loaded {
    source: FileSource,
    content: FileContent,
    /// The state that was read, or tried; none where it could not be looked at.
    stamp: Option<Stamp>,
}

/// The files that nodes are given.
#[derive(Debug)]
pub struct Files {
    loaded: watch::Sender<Vec<Loaded>>,
    /// Keyed anew at each start: tags say nothing of what is in the files.
    hasher: RandomState,
}

impl Default for Files {
    fn default() -> Self {
        Self { loaded: watch::Sender::new(Vec::new()), hasher: RandomState::new() }
    }
}

impl Files {
    /// Reads every file that the table names.
    ///
    /// # Errors
    /// Everything that is wrong with the table or with a file.
    pub fn load(sources: &[FileSource]) -> Result<Self, Vec<Wrong>> {
        let mut wrong = problems(sources);
        let mut loaded = Vec::new();
        for (nth, source) in sources.iter().enumerate() {
            let read = match (&source.path, &source.content) {
                (Some(path), _) => read(path).map(|(content, stamp)| (content, Some(stamp))),
                (None, content) => {
                    let text = content.as_ref().map_or("", Secret::reveal);
                    Ok((FileContent(text.into()), None))
                }
            };
            match read {
                Ok((content, stamp)) => {
                    loaded.push(Loaded { source: source.clone(), content, stamp });
                }
                Err(error) => wrong.push(Wrong { nth, key: "path", text: error.to_string() }),
            }
        }
        if wrong.is_empty()
            && let Some((nth, error)) = overfull(&loaded)
        {
            wrong.push(Wrong { nth, key: "name", text: error.to_string() });
        }
        if !wrong.is_empty() {
            return Err(wrong);
        }
        Ok(Self { loaded: watch::Sender::new(loaded), ..Self::default() })
    }

    /// Says when a file has changed.
    pub(crate) fn subscribe(&self) -> Changes {
        Changes(self.loaded.subscribe())
    }

    /// Whether a node that has the tables of this tag is to be told of others. A node that does not say which ones it has
    /// knows nothing of tables.
    #[must_use]
    pub fn is_news(&self, known: &Known, node: &NodeId, tag: Option<&str>) -> bool {
        let ours = || self.tag(known, node, &self.loaded.borrow());
        tag.is_some_and(|tag| tag != ours().unwrap_or_default())
    }

    /// A node's document as the node gets it: with the registry table, its files, and the tag of both.
    #[must_use]
    pub fn tell(&self, known: &Known, desired: Desired) -> Desired {
        let loaded = self.loaded.borrow();
        let registries_tag = self.tag(known, &desired.node, &loaded);
        let files = loaded.iter().filter(|it| it.source.is_for(Some(&desired.node)));
        let files = files
            .map(|it| GivenFile { name: it.source.name.clone(), content: it.content.clone() })
            .collect();
        Desired { registries_tag, files, ..known.tell(desired) }
    }

    /// One tag for both tables: letters and digits. None where the node is told of neither.
    fn tag(&self, known: &Known, node: &NodeId, loaded: &[Loaded]) -> Option<String> {
        let files = loaded.iter().filter(|it| it.source.is_for(Some(node)));
        let files: Vec<_> = files.map(|it| (it.source.name.as_str(), &it.content.0)).collect();
        match (known.tag(), files.is_empty()) {
            (None, true) => None,
            (tag, true) => tag.map(str::to_owned),
            (tag, false) => {
                let tag = tag.unwrap_or_default();
                Some(format!("{tag}{:016x}", self.hasher.hash_one(files)))
            }
        }
    }

    /// Reads again what has changed. A file that cannot be given any more stays as it was, and the log says so, once.
    pub fn look(&self) {
        let before = self.loaded.borrow().clone();
        let mut now = before.clone();
        for nth in 0..now.len() {
            let Some(file) = now.get(nth).cloned() else { continue };
            let Some(path) = file.source.path.as_deref() else { continue };
            let seen = std::fs::metadata(path).as_ref().map(stamp).ok();
            if seen == file.stamp {
                continue;
            }
            let place = |now: &mut Vec<Loaded>, file| now.splice(nth..=nth, [file]).for_each(drop);
            // Tried now; it is not tried again before it changes again.
            let kept = Loaded { stamp: seen, ..file.clone() };
            let failed = match read(path) {
                Ok((content, stamp)) => {
                    place(&mut now, Loaded { content, stamp: Some(stamp), ..file });
                    overfull(&now).map(|(_, error)| error)
                }
                Err(error) => Some(error),
            };
            let name = &kept.source.name;
            match failed {
                None => tracing::info!(file = %name, "read again"),
                Some(error) => {
                    tracing::warn!(file = %name, "{error}; nodes keep what they were given");
                    place(&mut now, kept);
                }
            }
        }
        let contents = |all: &[Loaded]| all.iter().map(|it| it.content.clone()).collect::<Vec<_>>();
        let changed = contents(&before) != contents(&now);
        self.loaded.send_if_modified(|loaded| {
            *loaded = now;
            changed
        });
    }

    /// Looks every two seconds, until `stop` turns true.
    pub(crate) async fn watch(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        if self.loaded.borrow().iter().all(|file| file.source.path.is_none()) {
            return;
        }
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            let files = Arc::clone(&self);
            // A task that is not async: the files may lie on a slow file system.
            drop(tokio::task::spawn_blocking(move || files.look()).await);
        }
    }
}

/// Waits for changes of the files.
pub(crate) struct Changes(watch::Receiver<Vec<Loaded>>);

impl Changes {
    /// Returns after the next change; never, when there will be none.
    pub(crate) async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

fn stamp(meta: &std::fs::Metadata) -> Stamp {
    let (changed, noted) = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
    (meta.dev(), meta.ino(), meta.len(), changed, noted)
}

fn read(path: &Path) -> Result<(FileContent, Stamp), FileError> {
    let failed = |source| FileError::Read { path: path.to_owned(), source };
    // Looked at before it is opened: to open a FIFO waits for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(FileError::NotAFile(path.to_owned()));
    }
    let file = File::open(path).map_err(failed)?;
    let stamp = stamp(&file.metadata().map_err(failed)?);
    let most = u64::try_from(MAX_FILE_BYTES).unwrap_or(u64::MAX);
    let mut content = Vec::new();
    file.take(most.saturating_add(1)).read_to_end(&mut content).map_err(failed)?;
    if content.len() > MAX_FILE_BYTES {
        return Err(FileError::TooLarge);
    }
    Ok((FileContent(content), stamp))
}

/// The first file that is too much for a node that gets it.
fn overfull(loaded: &[Loaded]) -> Option<(usize, FileError)> {
    let named = loaded.iter().flat_map(|file| file.source.nodes.iter().flatten());
    let named: BTreeSet<Option<&NodeId>> = named.map(Some).chain([None]).collect();
    named.into_iter().find_map(|node| {
        let mut size = 0;
        let mut sizes = loaded.iter().enumerate().filter(|(_, file)| file.source.is_for(node));
        let (nth, _) = sizes.find(|(_, file)| {
            size += file.content.0.len();
            size > MAX_NODE_BYTES
        })?;
        let who = node.map_or("every node".to_owned(), |node| format!("node {node}"));
        Some((nth, FileError::TooMany(who)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn sources(toml: &str) -> Vec<FileSource> {
        #[derive(Deserialize)]
        struct Sources {
            files: Vec<FileSource>,
        }
        toml::from_str::<Sources>(toml).expect("toml").files
    }

    fn told(files: &Files, node: &str) -> (Vec<(String, String)>, Option<String>) {
        let plain = crate::desired::first(node.parse().expect("id"));
        let desired = files.tell(&Known::default(), plain);
        let text =
            |it: GivenFile| (it.name.to_string(), String::from_utf8(it.content.0).expect("text"));
        (desired.files.into_iter().map(text).collect(), desired.registries_tag)
    }

    fn pair(name: &str, content: &str) -> (String, String) {
        (name.to_owned(), content.to_owned())
    }

    #[test]
    fn each_node_gets_its_own_and_no_secret_is_shown() {
        let files = Files::load(&sources(
            "[[files]]\nname = \"motd\"\ncontent = \"hello\"\n\
             [[files]]\nname = \"key\"\ncontent = \"s3cret-1\"\nnodes = [\"n1\"]\n\
             [[files]]\nname = \"key\"\ncontent = \"s3cret-2\"\nnodes = [\"n2\", \"n3\"]\n",
        ));
        let files = files.expect("files");
        let all = pair("motd", "hello");
        let (first, tag) = told(&files, "n1");
        assert_eq!(first, [all.clone(), pair("key", "s3cret-1")]);
        assert_eq!(told(&files, "n2").0, [all.clone(), pair("key", "s3cret-2")]);
        assert_eq!(told(&files, "n4").0, [all]);
        assert!(!format!("{files:?}").contains("s3cret"), "{files:?}");
        let (known, node) = (Known::default(), "n1".parse().expect("id"));
        let is_news = |tag: Option<&str>| files.is_news(&known, &node, tag);
        assert!(is_news(Some("")) && is_news(told(&files, "n2").1.as_deref()));
        assert!(!is_news(tag.as_deref()) && !is_news(None));
        let nothing = Files::default();
        assert_eq!(told(&nothing, "n1"), (Vec::new(), None));
        assert!(nothing.is_news(&known, &node, tag.as_deref()));
        assert!(!nothing.is_news(&known, &node, Some("")));
        // With a registry table, the tag stands for both.
        let entry = "host = \"r:1\"\nmirrors = [\"http://m:2\"]\n";
        let known = Known::load(&[toml::from_str(entry).expect("entry")]).expect("known");
        let both = files.tell(&known, crate::desired::first(node.clone()));
        assert_eq!((both.registries.len(), both.files.len()), (1, 2));
        assert!(!files.is_news(&known, &node, both.registries_tag.as_deref()));
        assert!(nothing.is_news(&known, &node, both.registries_tag.as_deref()));
        assert!(files.is_news(&Known::default(), &node, both.registries_tag.as_deref()));
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_bad_one_stays_as_it_was() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("key");
        fs::write(&path, "one").expect("write");
        let toml = format!(
            "[[files]]\nname = \"key\"\npath = \"{}\"\nnodes = [\"n1\"]\n\
             [[files]]\nname = \"other\"\ncontent = \"x\"\nnodes = [\"n2\"]\n",
            path.display()
        );
        let files = Files::load(&sources(&toml)).expect("files");
        let news = files.loaded.subscribe();
        let (first, second) = (told(&files, "n1"), told(&files, "n2"));
        files.look();
        assert_eq!(told(&files, "n1"), first);
        assert!(!news.has_changed().expect("open"), "nothing has changed");
        fs::write(&path, "another").expect("write");
        files.look();
        assert!(news.has_changed().expect("open"));
        let changed = told(&files, "n1");
        assert_eq!(changed.0, [pair("key", "another")]);
        assert_ne!(changed.1, first.1);
        assert_eq!(told(&files, "n2"), second, "what the other node has is not concerned");
        fs::remove_file(&path).expect("remove");
        files.look();
        assert_eq!(told(&files, "n1"), changed);
        fs::write(&path, vec![b'x'; MAX_FILE_BYTES + 1]).expect("write");
        files.look();
        assert_eq!(told(&files, "n1"), changed);
        fs::write(&path, "one").expect("write");
        files.look();
        assert_eq!(told(&files, "n1"), first, "the same content has the same tag");
    }

    #[test]
    fn every_problem_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs::write(at("large"), vec![b'x'; MAX_FILE_BYTES + 1]).expect("write");
        fs::write(at("most"), vec![b'x'; MAX_FILE_BYTES]).expect("write");
        let named = |name: &str, rest: &str| format!("[[files]]\nname = \"{name}\"\n{rest}\n");
        let from =
            |name: &str, nodes: &str| named(name, &format!("path = \"{}\"\n{nodes}", at("most")));
        let x = "content = \"x\"";
        let one = "nodes = [\"n1\"]";
        let table = [
            (named("a", ""), 0, "name", "wants exactly one of path and content"),
            (named("a", &format!("{x}\npath = \"b\"")), 0, "name", "wants exactly one of"),
            (named("a", x) + &named("a", &format!("{x}\n{one}")), 1, "name", "`a` is there twice"),
            (named("a", &format!("{x}\nnodes = []")), 0, "nodes", "no node gets this file"),
            (named("a", &format!("path = \"{}\"", at("none"))), 0, "path", "none: No such file"),
            (named("a", &format!("path = \"{}\"", at("."))), 0, "path", "not a regular file"),
            (named("a", &format!("path = \"{}\"", at("large"))), 0, "path", "larger than 262144"),
            (
                ["a", "b", "c", "d"].map(|name| from(name, "")).concat()
                    + &named("e", &format!("{x}\n{one}")),
                4,
                "name",
                "the files of node n1 are larger than 1048576",
            ),
        ];
        for (toml, nth, key, part) in table {
            let wrong = Files::load(&sources(&toml)).expect_err(part);
            let first = wrong.first().expect("one");
            assert_eq!((first.nth, first.key), (nth, key), "{wrong:?}");
            assert!(first.text.contains(part), "{wrong:?}");
        }
    }
}
