//! The files that a stack of layers gives (layer.md: order, whiteouts, opaque directories), as far as two such stacks
//! can be told apart by them. Nothing is unpacked: of a file's content there is only the digest.

use std::collections::BTreeMap;
use std::io::{self, Read};

use protocol::ids::Digest;
use tar::{Archive, Entry, EntryType};

use super::{Change, EntryDiff};
use crate::blob::hash;
use crate::layer::decompressed;

/// Most paths of one image.
const MAX_PATHS: usize = 5_000_000;
/// Begins the name of a file that stands for the absence of another one.
const WHITEOUT: &[u8] = b".wh.";
/// The file that hides everything that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Begins the key of an extended attribute in a PAX header.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// All paths of an image, without leading `/`.
#[derive(Debug, Clone, Default)]
pub(super) struct Tree {
    nodes: BTreeMap<Vec<u8>, Node>,
}

/// What stands at a path. Times do not count.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    kind: u8,
    mode: u32,
    owner: (u64, u64),
    size: u64,
    /// Digest of a file's content, of a link's target, or of a device's numbers.
    content: Digest,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Tree {
    /// Puts a layer, compressed or not, over what is there.
    pub(super) fn apply(&mut self, layer: impl Read) -> io::Result<()> {
        let mut archive = Archive::new(decompressed(layer)?);
        // Whiteouts speak of the layers below, wherever they stand in this one.
        let (mut gone, mut added) = (Vec::new(), Vec::new());
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = plain(&entry.path_bytes());
            let (dir, name) = split(&path);
            if name == OPAQUE {
                gone.push((dir.to_vec(), false));
            } else if let Some(name) = name.strip_prefix(WHITEOUT) {
                gone.push((join(dir, name), true));
            } else if !path.is_empty() {
                let link = match entry.header().entry_type() {
                    EntryType::Link => entry.link_name_bytes().map(|target| plain(&target)),
                    _ => None,
                };
                added.push((path, link, node(&mut entry)?));
            }
            if added.len() + gone.len() + self.nodes.len() > MAX_PATHS {
                return Err(io::Error::other(format!("more than {MAX_PATHS} paths")));
            }
        }
        for (path, itself) in gone {
            self.remove_below(&path);
            if itself {
                self.nodes.remove(&path);
            }
        }
        for (path, link, node) in added {
            let node = link.and_then(|target| self.nodes.get(&target).cloned()).unwrap_or(node);
            if node.kind != EntryType::Directory.as_byte() {
                self.remove_below(&path);
            }
            self.nodes.insert(path, node);
        }
        Ok(())
    }

    fn remove_below(&mut self, path: &[u8]) {
        if path.is_empty() {
            self.nodes.clear();
            return;
        }
        // `0` follows `/`: exactly the paths that begin with PATH/ stand between.
        let (first, end) = ([path, b"/"].concat(), [path, b"0"].concat());
        let below: Vec<Vec<u8>> =
            self.nodes.range(first..end).map(|(key, _)| key.clone()).collect();
        for key in below {
            self.nodes.remove(&key);
        }
    }

    /// What changed from this tree to the other one, by path.
    pub(super) fn diff(&self, other: &Self) -> Vec<EntryDiff> {
        let mut changes = Vec::new();
        let mut say = |path: &[u8], change, before, after| {
            let path = format!("/{}", String::from_utf8_lossy(path));
            changes.push(EntryDiff { path, change, before, after });
        };
        for (path, node) in &self.nodes {
            match other.nodes.get(path) {
                None => say(path, Change::Removed, Some(node.size), None),
                Some(now) if now != node => {
                    say(path, Change::Changed, Some(node.size), Some(now.size));
                }
                Some(_) => {}
            }
        }
        for (path, node) in other.nodes.iter().filter(|(path, _)| !self.nodes.contains_key(*path)) {
            say(path, Change::Added, None, Some(node.size));
        }
        changes.sort_by(|a, b| a.path.cmp(&b.path));
        changes
    }
}

fn node(entry: &mut Entry<'_, impl Read>) -> io::Result<Node> {
    let header = entry.header();
    let kind = match header.entry_type() {
        EntryType::Continuous | EntryType::GNUSparse | EntryType::Regular => EntryType::Regular,
        kind => kind,
    };
    let (mode, owner) = (header.mode()? & 0o7777, (header.uid()?, header.gid()?));
    let device = (header.device_major().ok().flatten(), header.device_minor().ok().flatten());
    let mut xattrs = BTreeMap::new();
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            if let Some(name) = extension.key_bytes().strip_prefix(XATTR) {
                xattrs.insert(name.to_vec(), extension.value_bytes().to_vec());
            }
        }
    }
    let (size, content) = match entry.link_name_bytes() {
        _ if kind == EntryType::Regular => hash(entry)?,
        Some(target) => (0, Digest::of(&target)),
        None => (0, Digest::of(format!("{device:?}").as_bytes())),
    };
    Ok(Node { kind: kind.as_byte(), mode, owner, size, content, xattrs })
}

/// The path without `.`, `..` and empty parts.
fn plain(path: &[u8]) -> Vec<u8> {
    let parts = path.split(|byte| *byte == b'/');
    let parts = parts.filter(|part| !matches!(*part, b"" | b"." | b".."));
    parts.collect::<Vec<_>>().join(&b'/')
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        None => (b"", path),
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer of these entries: `PATH/` is a directory, `PATH -> TARGET` a symlink, `PATH = TARGET` a hard link, else
    /// `PATH CONTENT` a file.
    fn layer(entries: &[&str]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for text in entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            let (path, mut content) = text.split_once(' ').unwrap_or((text, ""));
            if path.ends_with('/') {
                header.set_entry_type(EntryType::Directory);
            }
            for (mark, kind) in [("-> ", EntryType::Symlink), ("= ", EntryType::Link)] {
                if let Some(target) = content.strip_prefix(mark) {
                    header.set_entry_type(kind);
                    header.set_link_name(target).expect("target");
                    content = "";
                }
            }
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, content.as_bytes()).expect("append");
        }
        tar.into_inner().expect("tar")
    }

    fn tree(layers: &[&[&str]]) -> Tree {
        let mut tree = Tree::default();
        for entries in layers {
            tree.apply(&layer(entries)[..]).expect("layer");
        }
        tree
    }

    #[track_caller]
    fn check(before: &[&[&str]], after: &[&[&str]], expected: &[(&str, Change)]) {
        let changes = tree(before).diff(&tree(after));
        let seen: Vec<(&str, Change)> =
            changes.iter().map(|change| (change.path.as_str(), change.change)).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn added_removed_and_changed_files_are_told_with_their_sizes() {
        let before = tree(&[&["etc/", "etc/a one", "etc/b two", "etc/c three"]]);
        let after = tree(&[&["etc/", "etc/a one", "etc/b four", "etc/d x"]]);
        let entry = |path: &str, change, before, after| EntryDiff {
            path: path.to_owned(),
            change,
            before,
            after,
        };
        assert_eq!(
            before.diff(&after),
            [
                entry("/etc/b", Change::Changed, Some(3), Some(4)),
                entry("/etc/c", Change::Removed, Some(5), None),
                entry("/etc/d", Change::Added, None, Some(1)),
            ]
        );
        assert_eq!(before.diff(&before), []);
    }

    #[test]
    fn layers_are_seen_as_a_node_sees_them() {
        let base: &[&str] = &["d/", "d/x 1", "d/sub/", "d/sub/y 2", "e 3", "d0 4"];
        // The same in other layers is no change.
        check(&[base], &[&["d/", "d/x 9", "d/sub/"], base], &[]);
        check(&[base], &[base, &["d/.wh.x"]], &[("/d/x", Change::Removed)]);
        check(
            &[base],
            &[base, &["d/z 5", "d/.wh..wh..opq"]],
            &[
                ("/d/sub", Change::Removed),
                ("/d/sub/y", Change::Removed),
                ("/d/x", Change::Removed),
                ("/d/z", Change::Added),
            ],
        );
        check(
            &[base],
            &[base, &["d -> e"]],
            &[
                ("/d", Change::Changed),
                ("/d/sub", Change::Removed),
                ("/d/sub/y", Change::Removed),
                ("/d/x", Change::Removed),
            ],
        );
    }

    #[test]
    fn links_differ_by_what_they_lead_to() {
        check(&[&["a 1", "l -> a"]], &[&["a 1", "l -> b"]], &[("/l", Change::Changed)]);
        check(&[&["a 1", "h = a"]], &[&["a 1", "h 1"]], &[]);
        check(
            &[&["a 1", "h = a"]],
            &[&["a 2", "h = a"]],
            &[("/a", Change::Changed), ("/h", Change::Changed)],
        );
    }

    #[test]
    fn what_is_no_tar_is_an_error() {
        assert!(Tree::default().apply(&[1; 700][..]).is_err());
    }
}
