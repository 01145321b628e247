//! The file tree of an initramfs: paths, modes and contents, always in the same order. Pure: it reads no disk.
//!
//! Everything in it belongs to root. Parents exist before their children, because a path sorts after its own prefix.

use std::collections::BTreeMap;

/// Longest path in a tree, in bytes. `PATH_MAX` of Linux, with its NUL, is 4096.
pub const MAX_PATH: usize = 4095;
/// Mode of a directory that was made because something lies in it.
const DIRECTORY_MODE: u32 = 0o755;
/// The bits of a mode that are permissions, set-id and sticky.
const MODE_BITS: u32 = 0o7777;

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file with these contents.
    File(Vec<u8>),
    /// A symbolic link to this target, taken as it stands.
    Symlink(String),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// One path of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Permissions, set-id and sticky bits; no file type.
    pub mode: u32,
}

/// Why something cannot stand in a tree.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TreeError {
    /// The path is absolute, empty, too long or holds an odd component.
    #[error("{path:?} cannot stand in an initramfs: {reason}")]
    Path {
        /// As it was given.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A directory would replace a file, or the other way round.
    #[error("{path} is a {there} and cannot become a {wanted}")]
    Conflict {
        /// Where.
        path: String,
        /// What stands there.
        there: &'static str,
        /// What was to be put there.
        wanted: &'static str,
    },
}

/// A file tree, sorted by path. Its root is there from the start, with mode 0755.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// An empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, or sets the mode of one that is there.
    ///
    /// # Errors
    /// The path is not a plain relative one, or is a file already.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<(), TreeError> {
        self.put(path, mode, Kind::Directory)
    }

    /// Adds a regular file; one that is there is replaced.
    ///
    /// # Errors
    /// The path is not a plain relative one, or is a directory already.
    pub fn file(&mut self, path: &str, mode: u32, contents: Vec<u8>) -> Result<(), TreeError> {
        self.put(path, mode, Kind::File(contents))
    }

    /// Adds a symbolic link; a file that is there is replaced.
    ///
    /// # Errors
    /// The path is not a plain relative one, or is a directory already; the target is empty, too long or holds a NUL.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<(), TreeError> {
        if target.is_empty() || target.len() > MAX_PATH || target.contains('\0') {
            let reason = "its link target is empty, too long or holds a NUL";
            return Err(TreeError::Path { path: path.to_owned(), reason });
        }
        self.put(path, 0o777, Kind::Symlink(target.to_owned()))
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// The path is not a plain relative one, or is a directory already.
    pub fn char_device(
        &mut self,
        path: &str,
        mode: u32,
        (major, minor): (u32, u32),
    ) -> Result<(), TreeError> {
        self.put(path, mode, Kind::CharDevice { major, minor })
    }

    /// Takes out what stands at this path, unless it is a directory.
    pub fn remove_file(&mut self, path: &str) {
        if self.nodes.get(path).is_some_and(|node| node.kind != Kind::Directory) {
            self.nodes.remove(path);
        }
    }

    /// What stands at this path.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// Every path but the root, parents before children.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// Takes out the paths that are asked for, with the directories they lie in, which also stay: two trees that, unpacked one
    /// after the other, are this one.
    #[must_use]
    pub fn split(self, takes: impl Fn(&str) -> bool) -> (Self, Self) {
        let (inside, stays): (BTreeMap<_, _>, _) =
            self.nodes.into_iter().partition(|(path, _)| takes(path));
        let (mut taken, rest) = (Self { nodes: inside }, Self { nodes: stays });
        let parents: Vec<_> = taken
            .nodes
            .keys()
            .flat_map(|path| path.match_indices('/').filter_map(|(end, _)| path.get(..end)))
            .filter_map(|parent| Some((parent.to_owned(), rest.nodes.get(parent)?.clone())))
            .collect();
        taken.nodes.extend(parents);
        (taken, rest)
    }

    /// Bytes of all its files together.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let size = |node: &Node| if let Kind::File(it) = &node.kind { it.len() } else { 0 };
        self.nodes.values().map(size).sum()
    }

    /// How many paths there are, without the root.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is nothing but the root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    fn put(&mut self, path: &str, mode: u32, kind: Kind) -> Result<(), TreeError> {
        check_path(path)?;
        for (end, _) in path.match_indices('/') {
            let parent = path.get(..end).unwrap_or_default();
            self.insert(parent, DIRECTORY_MODE, Kind::Directory, false)?;
        }
        self.insert(path, mode & MODE_BITS, kind, true)
    }

    fn insert(
        &mut self,
        path: &str,
        mode: u32,
        kind: Kind,
        replace: bool,
    ) -> Result<(), TreeError> {
        if let Some(there) = self.nodes.get_mut(path) {
            let same = (there.kind == Kind::Directory) == (kind == Kind::Directory);
            if !same {
                let (there, wanted) = (word(&there.kind), word(&kind));
                return Err(TreeError::Conflict { path: path.to_owned(), there, wanted });
            }
            if replace {
                *there = Node { kind, mode };
            }
            return Ok(());
        }
        self.nodes.insert(path.to_owned(), Node { kind, mode });
        Ok(())
    }
}

fn word(kind: &Kind) -> &'static str {
    match kind {
        Kind::Directory => "directory",
        Kind::File(_) => "file",
        Kind::Symlink(_) => "symbolic link",
        Kind::CharDevice { .. } => "device",
    }
}

fn check_path(path: &str) -> Result<(), TreeError> {
    let wrong = |reason| Err(TreeError::Path { path: path.to_owned(), reason });
    if path.is_empty() || path.len() > MAX_PATH {
        return wrong("it is empty or longer than 4095 bytes");
    }
    if path.contains('\0') {
        return wrong("it holds a NUL");
    }
    if path == "TRAILER!!!" {
        return wrong("this name ends a cpio archive");
    }
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return wrong("it is not a plain relative path");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_made_and_come_first() {
        let mut tree = Tree::new();
        tree.file("a/b/c", 0o644, vec![1]).unwrap();
        tree.file("a-b", 0o644, vec![]).unwrap();
        let paths: Vec<_> = tree.iter().map(|(path, _)| path).collect();
        assert_eq!(paths, ["a", "a-b", "a/b", "a/b/c"]);
        assert_eq!(tree.get("a/b").unwrap().mode, 0o755);
    }

    #[test]
    fn a_later_file_replaces_an_earlier_one_and_a_directory_keeps_what_is_in_it() {
        let mut tree = Tree::new();
        tree.file("etc/x", 0o644, vec![1]).unwrap();
        tree.file("etc/x", 0o755, vec![2]).unwrap();
        tree.directory("etc", 0o700).unwrap();
        tree.file("etc/y", 0o644, vec![]).unwrap();
        let node = tree.get("etc/x").unwrap();
        assert_eq!((&node.kind, node.mode), (&Kind::File(vec![2]), 0o755));
        assert_eq!(tree.get("etc").unwrap().mode, 0o700);
    }

    #[test]
    fn what_is_split_off_keeps_the_directories_it_lies_in() {
        let mut tree = Tree::new();
        tree.directory("a", 0o700).unwrap();
        for path in ["a/b/x.z", "a/b/y", "c/z.z", "d"] {
            tree.file(path, 0o644, vec![1]).unwrap();
        }
        let paths = |tree: &Tree| tree.iter().map(|(path, _)| path.to_owned()).collect::<Vec<_>>();
        let (taken, rest) = tree.clone().split(|path| path.ends_with(".z"));
        assert_eq!(paths(&taken), ["a", "a/b", "a/b/x.z", "c", "c/z.z"]);
        assert_eq!(paths(&rest), ["a", "a/b", "a/b/y", "c", "d"]);
        assert_eq!(taken.get("a").unwrap().mode, 0o700);
        let (taken, rest) = tree.split(|path| path.starts_with("a/b/"));
        assert_eq!(paths(&taken), ["a", "a/b", "a/b/x.z", "a/b/y"]);
        assert_eq!(paths(&rest), ["a", "a/b", "c", "c/z.z", "d"]);
    }

    #[test]
    fn odd_paths_are_refused() {
        for path in ["", "/a", "a/", "a//b", ".", "a/./b", "../a", "a/..", "a\0b", "TRAILER!!!"] {
            assert!(Tree::new().directory(path, 0o755).is_err(), "{path:?}");
        }
        assert!(Tree::new().directory(&"a".repeat(MAX_PATH + 1), 0o755).is_err());
        assert!(Tree::new().symlink("a", "").is_err());
    }

    #[test]
    fn a_file_never_becomes_a_directory() {
        let mut tree = Tree::new();
        tree.file("a", 0o644, vec![]).unwrap();
        let error = tree.file("a/b", 0o644, vec![]).unwrap_err();
        assert_eq!(error.to_string(), "a is a file and cannot become a directory");
        tree.directory("d", 0o755).unwrap();
        assert!(tree.symlink("d", "a").is_err());
    }
}
