//! What a stack of layers gives at each path (layer.md: order, whiteouts, opaque directories, hard links). Generic in what
//! is kept of an entry; nothing is unpacked and no file is opened here.

use std::collections::BTreeMap;
use std::io::{self, Read};

use tar::{Archive, Entry, EntryType};

use crate::layer::decompressed;

/// Most paths of one image.
const MAX_PATHS: usize = 5_000_000;
/// Begins the name of a file that stands for the absence of another one.
const WHITEOUT: &[u8] = b".wh.";
/// The file that hides everything that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Begins the key of an extended attribute in a PAX header.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// The bytes of a layer.
pub(crate) type Layer<'a> = Box<dyn Read + 'a>;

/// What is kept of an entry.
pub(crate) trait Node: Clone {
    /// Whether other paths may stand below it.
    fn is_directory(&self) -> bool;
}

/// All paths of an image, without leading `/`; the root is the empty path, where a layer mentions it.
#[derive(Debug, Clone)]
pub(crate) struct Stack<N> {
    nodes: BTreeMap<Vec<u8>, N>,
}

impl<N> Default for Stack<N> {
    fn default() -> Self {
        Self { nodes: BTreeMap::new() }
    }
}

impl<N: Node> Stack<N> {
    /// What stands at each path.
    pub(crate) fn nodes(&self) -> &BTreeMap<Vec<u8>, N> {
        &self.nodes
    }

    /// Puts a layer, compressed or not, over what is there. `node` is given each entry with its number in the layer, and
    /// keeps what it wants of it; a hard link whose target is known becomes the target's node.
    pub(crate) fn apply<'a>(
        &mut self,
        layer: impl Read + 'a,
        mut node: impl FnMut(usize, &mut Entry<'_, Layer<'a>>) -> io::Result<Option<N>>,
    ) -> io::Result<()> {
        let mut archive = Archive::new(decompressed(layer)?);
        // Whiteouts speak of the layers below, wherever they stand in this one.
        let (mut gone, mut added) = (Vec::new(), Vec::new());
        for (number, entry) in archive.entries()?.enumerate() {
            let mut entry = entry?;
            let path = plain(&entry.path_bytes());
            let (dir, name) = split(&path);
            if name == OPAQUE {
                gone.push((dir.to_vec(), false));
            } else if let Some(name) = name.strip_prefix(WHITEOUT) {
                gone.push((join(dir, name), true));
            } else {
                let link = match entry.header().entry_type() {
                    EntryType::Link => entry.link_name_bytes().map(|target| plain(&target)),
                    _ => None,
                };
                added.push((path, link, node(number, &mut entry)?));
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
            let node = link.and_then(|target| self.nodes.get(&target).cloned()).or(node);
            let Some(node) = node else { continue };
            if !node.is_directory() {
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
}

/// The extended attributes of an entry, name and value.
pub(crate) fn xattrs<R: Read>(entry: &mut Entry<'_, R>) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut xattrs = BTreeMap::new();
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            if let Some(name) = extension.key_bytes().strip_prefix(XATTR) {
                xattrs.insert(name.to_vec(), extension.value_bytes().to_vec());
            }
        }
    }
    Ok(xattrs)
}

/// The path without `.`, `..` and empty parts.
fn plain(path: &[u8]) -> Vec<u8> {
    let parts = path.split(|byte| *byte == b'/');
    let parts = parts.filter(|part| !matches!(*part, b"" | b"." | b".."));
    parts.collect::<Vec<_>>().join(&b'/')
}

/// The path of the directory and the name in it.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        None => (b"", path),
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}
