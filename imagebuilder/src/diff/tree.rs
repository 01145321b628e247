//! The files that a stack of layers gives (layer.md: order, whiteouts, opaque directories), as far as two such stacks
//! can be told apart by them. Nothing is unpacked: of a file's content there is only the digest.

use std::collections::BTreeMap;
use std::io::{self, Read};

use protocol::ids::Digest;
use tar::{Entry, EntryType};

use super::{Change, EntryDiff};
use crate::blob::hash;
use crate::stack::{self, Stack};

/// All paths of an image, without leading `/`.
#[derive(Debug, Clone, Default)]
pub(super) struct Tree {
    stack: Stack<Node>,
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

impl stack::Node for Node {
    fn is_directory(&self) -> bool {
        self.kind == EntryType::Directory.as_byte()
    }
}

impl Tree {
    /// Puts a layer, compressed or not, over what is there.
    pub(super) fn apply(&mut self, layer: impl Read) -> io::Result<()> {
        // The root itself is the same in every image.
        self.stack.apply(layer, |_, entry| {
            let is_root = entry.path_bytes().iter().all(|byte| matches!(byte, b'.' | b'/'));
            if is_root { Ok(None) } else { node(entry).map(Some) }
        })
    }

    /// What changed from this tree to the other one, by path.
    pub(super) fn diff(&self, other: &Self) -> Vec<EntryDiff> {
        let mut changes = Vec::new();
        let mut say = |path: &[u8], change, before, after| {
            let path = format!("/{}", String::from_utf8_lossy(path));
            changes.push(EntryDiff { path, change, before, after });
        };
        let (before, after) = (self.stack.nodes(), other.stack.nodes());
        for (path, node) in before {
            match after.get(path) {
                None => say(path, Change::Removed, Some(node.size), None),
                Some(now) if now != node => {
                    say(path, Change::Changed, Some(node.size), Some(now.size));
                }
                Some(_) => {}
            }
        }
        for (path, node) in after.iter().filter(|(path, _)| !before.contains_key(*path)) {
            say(path, Change::Added, None, Some(node.size));
        }
        changes.sort_by(|a, b| a.path.cmp(&b.path));
        changes
    }
}

fn node<R: Read>(entry: &mut Entry<'_, R>) -> io::Result<Node> {
    let header = entry.header();
    let kind = match header.entry_type() {
        EntryType::Continuous | EntryType::GNUSparse | EntryType::Regular => EntryType::Regular,
        kind => kind,
    };
    let (mode, owner) = (header.mode()? & 0o7777, (header.uid()?, header.gid()?));
    let device = (header.device_major().ok().flatten(), header.device_minor().ok().flatten());
    let xattrs = stack::xattrs(entry)?;
    let (size, content) = match entry.link_name_bytes() {
        _ if kind == EntryType::Regular => hash(entry)?,
        Some(target) => (0, Digest::of(&target)),
        None => (0, Digest::of(format!("{device:?}").as_bytes())),
    };
    Ok(Node { kind: kind.as_byte(), mode, owner, size, content, xattrs })
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
