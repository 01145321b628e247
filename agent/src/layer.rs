//! Applies one layer, a tar stream, to an empty directory: owners, modes, times, links, FIFOs, extended attributes and
//! whiteouts as overlayfs wants them (OCI image spec 1.1, layer.md).
//!
//! Layers are hostile until proven otherwise and are applied faithfully all the same: policy (nosuid, `/dev`) belongs to
//! mount and exec, never to shared content. What cannot be applied faithfully is an error that names the path; nothing is
//! skipped in silence except device nodes below `dev/` and attributes of foreign namespaces, which are counted. The
//! caller checks digests and throws the directory away on any error. `tar::Archive` is not used to unpack: it skips
//! `..`, turns device nodes into files and buffers names without a limit.
//!
//! | module | what it holds |
//! |---|---|
//! | `archive` | the tar stream: headers, PAX records, long names, each bounded |
//! | `sparse` | the maps of sparse files, pure |
//! | `cpio` | a cpio archive as a tar stream, pure |
//! | `pax` | PAX records and numbers, pure |
//! | `name` | paths and whiteout names, pure |
//! | `tree` | the only part that touches the file system, always below one directory descriptor |

mod archive;
pub mod cpio;
mod name;
mod pax;
mod sparse;
mod tree;

#[cfg(test)]
mod corpus;
#[cfg(test)]
mod faithful;
#[cfg(test)]
pub(crate) mod testing;

use std::io::{self, BufRead};
use std::path::Path;

use archive::{Archive, Entry, Kind};
use name::{Base, Clean};
use tree::Tree;

/// Most bytes that one layer may unpack to, file contents only (64 GiB).
pub const MAX_UNPACKED_BYTES: u64 = 64 << 30;
/// Most entries of one layer.
pub const MAX_ENTRIES: u64 = 4_000_000;
/// Longest path, in bytes, without the NUL (`PATH_MAX` is 4096 with it).
pub const MAX_PATH_BYTES: usize = 4095;
/// Longest component of a path, in bytes (`NAME_MAX`).
pub const MAX_NAME_BYTES: usize = 255;
/// Most components of a path.
pub const MAX_DEPTH: usize = 512;
/// Most bytes of PAX records and long names together that one entry may bring. They are held in memory.
pub const MAX_EXTENSION_BYTES: u64 = 64 << 10;
/// Most memory, in bytes, for the directories whose metadata is set at the end (their paths and [`DIRECTORY_COST`] each).
pub const MAX_DIRECTORY_BYTES: usize = 32 << 20;
/// What one directory counts for against [`MAX_DIRECTORY_BYTES`] beside its path, in bytes.
pub const DIRECTORY_COST: usize = 64;

/// How much one layer may bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of file contents.
    pub bytes: u64,
    /// Most entries.
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: MAX_UNPACKED_BYTES, entries: MAX_ENTRIES }
    }
}

/// What an applied layer held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Entries read, whiteouts and skipped ones included.
    pub entries: u64,
    /// Bytes of file contents written.
    pub bytes: u64,
    /// Device nodes below `dev/` that were left out.
    pub devices_skipped: u64,
    /// Extended attributes left out: foreign namespaces, or `user.*` on a file system without them.
    pub xattrs_skipped: u64,
}

/// Why a layer was not applied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The stream could not be read: the network, the decompressor, or a guard in front of it.
    #[error("reading the layer's stream")]
    Read(#[source] io::Error),
    /// The archive ends inside an entry.
    #[error("the archive is truncated {place}")]
    Truncated {
        /// Where it ends.
        place: &'static str,
    },
    /// A header is not one.
    #[error("malformed tar header at byte {offset}: {reason}")]
    Header {
        /// Where it begins, in bytes of the uncompressed stream.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A PAX record or a long name is malformed, contradicts the header, or is too large.
    #[error("malformed tar extension at byte {offset}: {reason}")]
    Extension {
        /// Where its header begins, in bytes of the uncompressed stream.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A path that must not or cannot be written.
    #[error("`{path}` {reason}")]
    Path {
        /// The path, shortened.
        path: String,
        /// Why it is refused.
        reason: &'static str,
    },
    /// A hard link whose target must not or cannot be linked.
    #[error("hard link `{path}` to `{target}`: {reason}")]
    Link {
        /// The link, shortened.
        path: String,
        /// Its target, shortened.
        target: String,
        /// Why it is refused.
        reason: &'static str,
    },
    /// An extended attribute that a layer must not bring.
    #[error("`{path}` has the extended attribute `{name}`, which a layer must not set")]
    Xattr {
        /// The path, shortened.
        path: String,
        /// The attribute, shortened.
        name: String,
    },
    /// The layer brings more than it may.
    #[error("the layer brings more than {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// The kernel refused.
    #[error("cannot {action} `{path}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path below the layer's root, shortened.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A path as text for messages: lossy and at most 120 characters.
fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().take(120).collect()
}

fn refused(path: &[u8], reason: &'static str) -> LayerError {
    LayerError::Path { path: text(path), reason }
}

/// Applies a tar stream to an existing, empty directory, up to the archive's end marker or the stream's end; what
/// follows the marker is left in the stream. Holds at most [`MAX_EXTENSION_BYTES`] and [`MAX_DIRECTORY_BYTES`].
///
/// # Errors
/// On the first entry that is malformed, hostile, or that the kernel refuses. The directory is then half filled: the
/// caller removes it.
pub fn apply(tar: impl BufRead, root: &Path, limits: &Limits) -> Result<Summary, LayerError> {
    let mut archive = Archive::new(tar);
    let mut tree = Tree::open(root)?;
    let mut summary = Summary::default();
    while let Some(entry) = archive.next_entry()? {
        summary.entries += 1;
        if summary.entries > limits.entries {
            return Err(LayerError::Limit { what: "entries", limit: limits.entries });
        }
        if entry.size > limits.bytes.saturating_sub(summary.bytes) {
            return Err(LayerError::Limit { what: "bytes of file contents", limit: limits.bytes });
        }
        apply_entry(&mut archive, &mut tree, &entry, &mut summary)?;
    }
    tree.finish()?;
    summary.xattrs_skipped = tree.xattrs_skipped();
    Ok(summary)
}

fn apply_entry<R: BufRead>(
    archive: &mut Archive<R>,
    tree: &mut Tree,
    entry: &Entry,
    summary: &mut Summary,
) -> Result<(), LayerError> {
    let path = Clean::new(&entry.path).map_err(|reason| refused(&entry.path, reason))?;
    if path.is_root() {
        return match entry.kind {
            Kind::Directory => tree.directory(&path, entry),
            _ => Err(refused(&entry.path, "is the layer's root but not a directory")),
        };
    }
    match path.base().map_err(|reason| refused(&entry.path, reason))? {
        Base::Opaque => return tree.opaque(&path),
        Base::Whiteout(hidden) => return tree.whiteout(&path, hidden),
        Base::Plain => {}
    }
    match entry.kind {
        Kind::Directory => tree.directory(&path, entry),
        Kind::Symlink => tree.symlink(&path, entry),
        Kind::Fifo => tree.fifo(&path, entry),
        Kind::File => {
            let file = tree.create_file(&path, entry)?;
            summary.bytes += archive.copy_data(&file, entry)?;
            tree.finish_file(&file, &path, entry)
        }
        Kind::HardLink => {
            if !tree.hard_link(&path, entry)? {
                summary.devices_skipped += 1;
            }
            Ok(())
        }
        Kind::Device if path.is_below_dev() => {
            summary.devices_skipped += 1;
            Ok(())
        }
        Kind::Device => Err(refused(&entry.path, "is a device node outside dev/")),
    }
}

/// Reads every entry of an archive and forgets it: the parser alone, for fuzzing. Touches no file.
pub fn fuzz_archive(bytes: &[u8]) {
    let mut archive = Archive::new(bytes);
    while let Ok(Some(entry)) = archive.next_entry() {
        if let Ok(path) = Clean::new(&entry.path) {
            let _ = path.base();
        }
    }
}
