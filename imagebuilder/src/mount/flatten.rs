//! A stack of layers as one tar: what the uppermost layer says of each path and nothing twice, ready for the tools that make
//! file systems. The same layers give the same bytes.
//!
//! ```text
//! pass 1: every layer, entry by entry   -> what stands at each path, and which entry its content is
//! pass 2: directories, links and pipes by path; then contents in the layers' order, each with its hard links
//! ```
//! What a node would refuse or leave out when it unpacks the layers is refused or left out here: devices below `dev/`, extended
//! attributes other than capabilities and the user's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use tar::{Archive, Entry, EntryType};

use crate::layer::{self, Kind, TarWriter, Time, decompressed};
use crate::stack::{self, Stack, split};

/// Mode of a directory that no layer mentions, as a node makes it.
const IMPLICIT_MODE: u32 = 0o755;

/// What stands at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    kind: NodeKind,
    mode: u32,
    uid: u32,
    gid: u32,
    time: Time,
    xattrs: Vec<(String, Vec<u8>)>,
    /// The entry that it is: number of the layer, and of the entry in it.
    source: (usize, usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum NodeKind {
    Directory,
    File,
    Fifo,
    Symlink(Vec<u8>),
    /// A hard link whose target is not there.
    Dangling,
}

impl stack::Node for Node {
    fn is_directory(&self) -> bool {
        self.kind == NodeKind::Directory
    }
}

/// An image whose layers have been looked through.
#[derive(Debug)]
pub(super) struct Flat {
    layers: Vec<PathBuf>,
    nodes: BTreeMap<Vec<u8>, Node>,
}

impl Flat {
    /// Looks through the layers, lowest first.
    pub(super) fn of(layers: Vec<PathBuf>) -> io::Result<Self> {
        let mut stack = Stack::default();
        for (number, path) in layers.iter().enumerate() {
            stack.apply(File::open(path)?, |index, entry| node((number, index), entry))?;
        }
        let mut nodes: BTreeMap<Vec<u8>, Node> = stack.nodes().clone();
        // A link to a device that was left out goes with it.
        nodes.retain(|path, node| node.kind != NodeKind::Dangling || !is_below_dev(path));
        let mut flat = Self { layers, nodes };
        flat.check()?;
        flat.add_implicit();
        Ok(flat)
    }

    fn check(&self) -> io::Result<()> {
        for (path, node) in &self.nodes {
            let wrong = |what: &str| {
                let path = String::from_utf8_lossy(path);
                Err(io::Error::other(format!("/{path} {what}, of which no mount form can be made")))
            };
            if node.kind == NodeKind::Dangling {
                return wrong("is a hard link to what is not there");
            }
            let parent = self.nodes.get(split(path).0);
            if !path.is_empty() && parent.is_some_and(|it| it.kind != NodeKind::Directory) {
                return wrong("lies below something that is no directory");
            }
        }
        Ok(())
    }

    /// Directories that no layer mentions although something lies in them, and the root.
    fn add_implicit(&mut self) {
        let mut missing = vec![Vec::new()];
        for path in self.nodes.keys() {
            let mut dir = split(path).0;
            while !dir.is_empty() && !self.nodes.contains_key(dir) {
                missing.push(dir.to_vec());
                dir = split(dir).0;
            }
        }
        for path in missing {
            self.nodes.entry(path).or_insert_with(|| Node {
                kind: NodeKind::Directory,
                mode: IMPLICIT_MODE,
                uid: 0,
                gid: 0,
                time: Time::default(),
                xattrs: Vec::new(),
                source: (usize::MAX, 0),
            });
        }
    }

    /// Writes the tar, the root's own entry first.
    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut tar = TarWriter::new(out, 0);
        let mut contents: BTreeMap<(usize, usize), Vec<&[u8]>> = BTreeMap::new();
        for (path, node) in &self.nodes {
            let entry = |path| entry(path, node);
            match &node.kind {
                NodeKind::Directory if path.is_empty() => {
                    tar.special(&entry(b"."), Kind::Directory, b"")?;
                }
                NodeKind::Directory => tar.special(&entry(path), Kind::Directory, b"")?,
                NodeKind::Fifo => tar.special(&entry(path), Kind::Fifo, b"")?,
                NodeKind::Symlink(to) => tar.special(&entry(path), Kind::Symlink, to)?,
                NodeKind::File => contents.entry(node.source).or_default().push(path),
                NodeKind::Dangling => {}
            }
        }
        for (number, layer) in self.layers.iter().enumerate() {
            let mut archive = Archive::new(decompressed(File::open(layer)?)?);
            for (index, content) in archive.entries()?.enumerate() {
                let mut content = content?;
                let paths = contents.get(&(number, index)).map_or(&[][..], Vec::as_slice);
                let Some((first, links)) = paths.split_first() else { continue };
                let Some(node) = self.nodes.get(*first) else { continue };
                let size = content.size();
                tar.file(&entry(first, node), size, &mut content)?;
                for link in links {
                    tar.special(&entry(link, node), Kind::HardLink, first)?;
                }
            }
        }
        tar.finish()
    }
}

fn entry<'a>(path: &'a [u8], node: &'a Node) -> layer::Entry<'a> {
    layer::Entry {
        path,
        mode: node.mode,
        uid: node.uid,
        gid: node.gid,
        xattrs: &node.xattrs,
        time: Some(node.time),
    }
}

fn is_below_dev(path: &[u8]) -> bool {
    path.starts_with(b"dev/")
}

fn node<R: Read>(source: (usize, usize), entry: &mut Entry<'_, R>) -> io::Result<Option<Node>> {
    let path = entry.path_bytes().into_owned();
    let wrong = |what: &str| {
        let path = String::from_utf8_lossy(&path);
        io::Error::other(format!("entry `{path}` {what}"))
    };
    let kind = match entry.header().entry_type() {
        EntryType::Regular | EntryType::Continuous => NodeKind::File,
        EntryType::Directory => NodeKind::Directory,
        EntryType::Fifo => NodeKind::Fifo,
        EntryType::Link => NodeKind::Dangling,
        EntryType::Symlink => {
            let target = entry.link_name_bytes().ok_or_else(|| wrong("is a symlink to nowhere"))?;
            NodeKind::Symlink(target.into_owned())
        }
        EntryType::Block | EntryType::Char => {
            let below = path.strip_prefix(b"./").or(path.strip_prefix(b"/")).unwrap_or(&path);
            return if is_below_dev(below) { Ok(None) } else { Err(wrong("is a device")) };
        }
        EntryType::GNUSparse => return Err(wrong("is a sparse file")),
        _ => return Ok(None),
    };
    let header = entry.header();
    let narrow = |number: u64| u32::try_from(number).map_err(|_| wrong("has an impossible owner"));
    let (mode, uid, gid) =
        (header.mode()? & 0o7777, narrow(header.uid()?)?, narrow(header.gid()?)?);
    let mut time = Time { seconds: header.mtime()?, nanoseconds: 0 };
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            if extension.key_bytes() == b"mtime" {
                time =
                    pax_time(extension.value_bytes()).ok_or_else(|| wrong("has no good time"))?;
            }
            if extension.key_bytes().starts_with(b"GNU.sparse.") {
                return Err(wrong("is a sparse file"));
            }
        }
    }
    let xattrs = stack::xattrs(entry)?.into_iter();
    let xattrs = xattrs.filter_map(|(name, value)| Some((String::from_utf8(name).ok()?, value)));
    let kept = |name: &str| name == "security.capability" || name.starts_with("user.");
    let xattrs: Vec<_> = xattrs.collect();
    let overlay = |name: &str| name.contains("overlay.");
    if xattrs.iter().any(|(name, _)| overlay(name)) {
        return Err(wrong("has an attribute that speaks to overlayfs"));
    }
    let xattrs = xattrs.into_iter().filter(|(name, _)| kept(name)).collect();
    Ok(Some(Node { kind, mode, uid, gid, time, xattrs, source }))
}

/// `SECONDS[.FRACTION]` (pax(1)); what lies before 1970 becomes 1970.
fn pax_time(value: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(value).ok()?;
    if text.starts_with('-') {
        return Some(Time::default());
    }
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Some(Time { seconds: seconds.parse().ok()?, nanoseconds: digits.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries as `KIND PATH [REST]`: `d` directory, `f` file with content REST, `l` symlink and `h` hard link to REST, `c`
    /// device, `w` an empty file (a whiteout by its name).
    fn layer(dir: &std::path::Path, name: &str, entries: &[&str]) -> PathBuf {
        let mut tar = tar::Builder::new(Vec::new());
        for (number, text) in entries.iter().enumerate() {
            let mut words = text.splitn(3, ' ');
            let (kind, path) = (words.next().expect("kind"), words.next().expect("path"));
            let rest = words.next().unwrap_or("");
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o640);
            header.set_uid(7);
            header.set_gid(8);
            header.set_mtime(number as u64 + 1);
            let (kind, content) = match kind {
                "d" => (EntryType::Directory, ""),
                "l" => (EntryType::Symlink, ""),
                "h" => (EntryType::Link, ""),
                "c" => (EntryType::Char, ""),
                _ => (EntryType::Regular, rest),
            };
            header.set_entry_type(kind);
            if matches!(kind, EntryType::Symlink | EntryType::Link) {
                header.set_link_name(rest).expect("link");
            }
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, content.as_bytes()).expect("entry");
        }
        let path = dir.join(name);
        std::fs::write(&path, tar.into_inner().expect("tar")).expect("layer");
        path
    }

    fn flat(layers: &[&[&str]]) -> io::Result<Vec<String>> {
        let dir = tempfile::tempdir().expect("dir");
        let layers = layers.iter().enumerate();
        let layers =
            layers.map(|(number, entries)| layer(dir.path(), &number.to_string(), entries));
        let flat = Flat::of(layers.collect())?;
        let (mut out, mut again) = (Vec::new(), Vec::new());
        flat.write(&mut out)?;
        flat.write(&mut again)?;
        assert_eq!(out, again);
        let mut archive = Archive::new(&out[..]);
        let mut seen = Vec::new();
        for entry in archive.entries()?.skip(1) {
            let mut entry = entry?;
            let kind = entry.header().as_bytes()[156] as char;
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let link =
                entry.link_name_bytes().map(|link| String::from_utf8_lossy(&link).into_owned());
            let mut content = String::new();
            entry.read_to_string(&mut content)?;
            seen.push(format!("{kind} {path} {}", link.unwrap_or(content)).trim_end().to_owned());
        }
        Ok(seen)
    }

    #[test]
    fn the_uppermost_layer_counts_and_whiteouts_are_applied() {
        let low: &[&str] = &["d a", "f a/x 1", "f a/y 2", "d b", "f b/z 3", "l s a", "f gone 9"];
        let high: &[&str] = &["f a/x 4", "w .wh.gone", "d b", "w b/.wh..wh..opq", "f b/new 5"];
        assert_eq!(
            flat(&[low, high]).expect("flat"),
            ["5 a/", "5 b/", "2 s a", "0 a/y 2", "0 a/x 4", "0 b/new 5"]
        );
    }

    #[test]
    fn hard_links_follow_their_file_whichever_name_a_later_layer_takes_away() {
        let low: &[&str] = &["f a 1", "h b a", "h c a"];
        assert_eq!(flat(&[low]).expect("flat"), ["0 a 1", "1 b a", "1 c a"]);
        assert_eq!(flat(&[low, &["f a 2"]]).expect("flat"), ["0 b 1", "1 c b", "0 a 2"]);
        assert_eq!(flat(&[low, &["w .wh.a"]]).expect("flat"), ["0 b 1", "1 c b"]);
    }

    #[test]
    fn directories_that_nobody_mentions_are_there_and_devices_below_dev_are_not() {
        let entries: &[&str] = &["f deep/er/x 1", "c dev/null", "h dev/zero dev/null", "f dev/f 2"];
        let expected = ["5 deep/", "5 deep/er/", "5 dev/", "0 deep/er/x 1", "0 dev/f 2"];
        assert_eq!(flat(&[entries]).expect("flat"), expected);
    }

    #[test]
    fn what_a_node_would_not_unpack_is_refused_by_name() {
        for (entries, expected) in [
            (&["c etc/null"][..], "`etc/null` is a device"),
            (&["h a b"], "/a is a hard link to what is not there"),
            (&["l lib usr/lib", "f lib/x 1"], "/lib/x lies below something"),
        ] {
            let error = flat(&[entries]).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn times_are_read_to_the_nanosecond() {
        let time = |seconds, nanoseconds| Some(Time { seconds, nanoseconds });
        assert_eq!(pax_time(b"12"), time(12, 0));
        assert_eq!(pax_time(b"12.5"), time(12, 500_000_000));
        assert_eq!(pax_time(b"12.0000000019"), time(12, 1));
        assert_eq!(pax_time(b"-3.5"), time(0, 0));
        assert_eq!(pax_time(b"x"), None);
        assert_eq!(pax_time(b"1.x"), None);
    }
}
