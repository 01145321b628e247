//! Layers: the compressed blob with its diff id, and the directory walk that makes the same tar from the same files.
//!
//! Not here: which sources an image has (`source`), and applying layers, which is the agent's.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use flate2::GzBuilder;
use flate2::write::GzEncoder;
use protocol::ids::Digest;
use protocol::oci::{Descriptor, MEDIA_LAYER_GZIP, MEDIA_LAYER_ZSTD};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::blob::{BlobDir, BlobWriter};

mod check;
mod count;
mod tar_writer;

pub use check::fuzz_tar;
pub(crate) use check::{copy_checked, decompressed};
use count::Count;
pub(crate) use tar_writer::{Entry, Kind, TarWriter, Time};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// gzip, which every tool reads. The default.
    #[default]
    Gzip,
    /// zstd: smaller and faster to unpack.
    Zstd,
}

impl Compression {
    /// The highest level that `compression_level` may have.
    #[must_use]
    pub fn highest_level(self) -> u32 {
        match self {
            Self::Gzip => 9,
            Self::Zstd => 19,
        }
    }

    fn default_level(self) -> u32 {
        match self {
            Self::Gzip => 6,
            Self::Zstd => 3,
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Self::Gzip => MEDIA_LAYER_GZIP,
            Self::Zstd => MEDIA_LAYER_ZSTD,
        }
    }
}

/// Whom the files of a `dir:` source belong to in the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owners {
    /// Root, whoever built the set. The default.
    #[default]
    Root,
    /// Whom they belong to in the directory.
    Keep,
}

/// Why a layer cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A file cannot be read, or the blob not written.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file of a kind that layers do not hold.
    #[error("{} is a {kind}, which a layer cannot hold", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A file changed while it was read.
    #[error("{} changed while it was read", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A tar source is not a tar, is cut off, or holds what no layer may hold.
    #[error("{}: {reason}", path.display())]
    Tar {
        /// The archive.
        path: PathBuf,
        /// What is wrong with which entry.
        reason: String,
    },
}

/// A finished layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Of the compressed blob.
    pub(crate) descriptor: Descriptor,
    /// Of the uncompressed tar.
    pub(crate) diff_id: Digest,
}

enum Encoder {
    Gzip(GzEncoder<BlobWriter>),
    Zstd(zstd::Encoder<'static, BlobWriter>),
}

/// Takes an uncompressed tar and leaves a compressed blob.
pub(crate) struct LayerWriter {
    encoder: Encoder,
    compression: Compression,
    diff: Sha256,
    count: Count,
}

impl LayerWriter {
    pub(crate) fn new(
        blobs: &BlobDir,
        compression: Compression,
        level: Option<u32>,
    ) -> io::Result<Self> {
        let level = level.unwrap_or_else(|| compression.default_level());
        let blob = blobs.writer()?;
        let encoder = match compression {
            Compression::Gzip => Encoder::Gzip(
                GzBuilder::new().mtime(0).write(blob, flate2::Compression::new(level)),
            ),
            Compression::Zstd => {
                let level = i32::try_from(level).map_err(io::Error::other)?;
                Encoder::Zstd(zstd::Encoder::new(blob, level)?)
            }
        };
        Ok(Self { encoder, compression, diff: Sha256::new(), count: Count::default() })
    }

    pub(crate) fn finish(self) -> io::Result<Layer> {
        let blob = match self.encoder {
            Encoder::Gzip(encoder) => encoder.finish()?,
            Encoder::Zstd(encoder) => encoder.finish()?,
        };
        let (digest, size) = blob.finish()?;
        let mut descriptor = Descriptor::of(self.compression.media_type(), b"");
        (descriptor.digest, descriptor.size) = (digest, size);
        if let Some(unpacked) = self.count.finish() {
            unpacked.annotate(&mut descriptor);
        }
        Ok(Layer { descriptor, diff_id: Digest(self.diff.finalize().into()) })
    }
}

impl Write for LayerWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.encoder {
            Encoder::Gzip(encoder) => encoder.write(bytes)?,
            Encoder::Zstd(encoder) => encoder.write(bytes)?,
        };
        let taken = bytes.get(..written).unwrap_or_default();
        self.diff.update(taken);
        self.count.feed(taken);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a directory's content as a tar: sorted, dated `epoch`, without the directory itself.
///
/// Kept: modes, symbolic and hard links, FIFOs, `security.capability` and `user.*` attributes. Devices and sockets are
/// errors.
///
/// # Errors
/// If a file cannot be read, changes meanwhile, or is a device or socket.
pub fn write_dir(
    root: &Path,
    epoch: u64,
    owners: Owners,
    out: &mut dyn Write,
) -> Result<(), LayerError> {
    if !fs::metadata(root).map_err(io_error("cannot read", root))?.is_dir() {
        return Err(LayerError::Tar {
            path: root.to_owned(),
            reason: "it is not a directory".to_owned(),
        });
    }
    let mut walk = Walk { tar: TarWriter::new(out, epoch), owners, links: BTreeMap::new() };
    walk.directory(root, Path::new(""))?;
    walk.tar.finish().map_err(io_error("cannot write the layer of", root))
}

/// Writes a tar with one executable, `/NAME`, mode 0755, owned by root.
///
/// # Errors
/// If the bytes cannot be written.
pub fn write_executable(
    name: &OsStr,
    bytes: &[u8],
    epoch: u64,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut tar = TarWriter::new(out, epoch);
    let entry = Entry { path: name.as_bytes(), mode: 0o755, ..Entry::default() };
    tar.file(&entry, bytes.len() as u64, &mut &*bytes)?;
    tar.finish()
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LayerError {
    let path = path.to_owned();
    move |source| LayerError::Io { what, path, source }
}

struct Walk<'a> {
    tar: TarWriter<'a>,
    owners: Owners,
    /// Device and inode of files with several names, to the first of these in the tar.
    links: BTreeMap<(u64, u64), PathBuf>,
}

impl Walk<'_> {
    fn directory(&mut self, dir: &Path, inside: &Path) -> Result<(), LayerError> {
        let entries = fs::read_dir(dir).map_err(io_error("cannot list", dir))?;
        let mut names = entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(io_error("cannot list", dir))?;
        names.sort();
        for name in names {
            self.entry(&dir.join(&name), &inside.join(&name))?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, inside: &Path) -> Result<(), LayerError> {
        let meta = fs::symlink_metadata(path).map_err(io_error("cannot read", path))?;
        let kind = meta.file_type();
        let unfit = [
            (kind.is_block_device(), "block device"),
            (kind.is_char_device(), "character device"),
            (kind.is_socket(), "socket"),
        ];
        if let Some((_, kind)) = unfit.into_iter().find(|(is, _)| *is) {
            return Err(LayerError::Kind { path: path.to_owned(), kind });
        }
        let xattrs = xattrs(path).map_err(io_error("cannot read the attributes of", path))?;
        let (uid, gid) = match self.owners {
            Owners::Root => (0, 0),
            Owners::Keep => (meta.uid(), meta.gid()),
        };
        let name = inside.as_os_str().as_bytes();
        let mode = meta.mode() & 0o7777;
        let entry = Entry { path: name, mode, uid, gid, xattrs: &xattrs, time: None };
        let write_error = || io_error("cannot write the layer at", path);
        if kind.is_dir() {
            self.tar.special(&entry, Kind::Directory, b"").map_err(write_error())?;
            return self.directory(path, inside);
        }
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(io_error("cannot read", path))?;
            let target = target.as_os_str().as_bytes();
            let entry = Entry { mode: 0o777, ..entry };
            return self.tar.special(&entry, Kind::Symlink, target).map_err(write_error());
        }
        if let Some(first) = self.first_name(&meta, inside) {
            let first = first.as_os_str().as_bytes();
            return self.tar.special(&entry, Kind::HardLink, first).map_err(write_error());
        }
        if kind.is_fifo() {
            return self.tar.special(&entry, Kind::Fifo, b"").map_err(write_error());
        }
        self.file(path, &entry, meta.len())
    }

    fn first_name(&mut self, meta: &Metadata, inside: &Path) -> Option<PathBuf> {
        if meta.nlink() < 2 {
            return None;
        }
        let key = (meta.dev(), meta.ino());
        let first = self.links.get(&key).cloned();
        if first.is_none() {
            self.links.insert(key, inside.to_owned());
        }
        first
    }

    fn file(&mut self, path: &Path, entry: &Entry<'_>, size: u64) -> Result<(), LayerError> {
        let mut file = File::open(path).map_err(io_error("cannot read", path))?;
        self.tar.file(entry, size, &mut file).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => LayerError::Changed { path: path.to_owned() },
            _ => io_error("cannot copy", path)(source),
        })?;
        let more = file.read(&mut [0]).map_err(io_error("cannot read", path))?;
        if more > 0 {
            return Err(LayerError::Changed { path: path.to_owned() });
        }
        Ok(())
    }
}

/// The attributes that belong to the content: `security.capability` and `user.*`. Others belong to the machine.
fn xattrs(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    const MAX_LIST: usize = 64 << 10; // XATTR_LIST_MAX and XATTR_SIZE_MAX, linux/limits.h
    let mut list = vec![0; MAX_LIST];
    let length = match rustix::fs::llistxattr(path, &mut list[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for name in list.get(..length).unwrap_or_default().split(|byte| *byte == 0) {
        let Ok(name) = std::str::from_utf8(name) else { continue };
        if name != "security.capability" && !name.starts_with("user.") {
            continue;
        }
        let mut value = vec![0; MAX_LIST];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        value.truncate(length);
        found.push((name.to_owned(), value));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests;
