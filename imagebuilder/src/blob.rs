//! A directory of blobs, each under the hexadecimal digits of its digest, written beside and renamed.
//!
//! It decides nothing: what is in a blob is for others.

use std::fs::Permissions;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use protocol::ids::Digest;
use protocol::oci::Descriptor;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

/// Buffer between encoders and a blob's file, in bytes.
const BUFFER: usize = 1 << 20;

/// `blobs/sha256` of an OCI layout.
#[derive(Debug, Clone)]
pub(crate) struct BlobDir {
    dir: PathBuf,
}

impl BlobDir {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    pub(crate) fn writer(&self) -> io::Result<BlobWriter> {
        let file = tempfile::Builder::new().prefix(".partial-").tempfile_in(&self.dir)?;
        Ok(BlobWriter {
            dir: self.clone(),
            file: BufWriter::with_capacity(BUFFER, file),
            hash: Sha256::new(),
            size: 0,
        })
    }

    pub(crate) fn put(&self, media_type: &str, bytes: &[u8]) -> io::Result<Descriptor> {
        let mut writer = self.writer()?;
        writer.write_all(bytes)?;
        writer.finish()?;
        Ok(Descriptor::of(media_type, bytes))
    }
}

/// A blob being written.
#[derive(Debug)]
pub(crate) struct BlobWriter {
    dir: BlobDir,
    file: BufWriter<NamedTempFile>,
    hash: Sha256,
    size: u64,
}

impl BlobWriter {
    /// Gives the blob its name. Digest and size are those of what was written.
    pub(crate) fn finish(self) -> io::Result<(Digest, u64)> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.as_file().set_permissions(Permissions::from_mode(0o644))?;
        let digest = Digest(self.hash.finalize().into());
        file.persist(self.dir.path(&digest)).map_err(|error| error.error)?;
        Ok((digest, self.size))
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(bytes.get(..written).unwrap_or_default());
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Size and digest of everything that is read.
pub(crate) fn hash(from: &mut impl Read) -> io::Result<(u64, Digest)> {
    let (mut hash, mut size, mut buffer) = (Sha256::new(), 0, vec![0; 64 << 10]);
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok((size, Digest(hash.finalize().into()))),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(buffer.get(..read).unwrap_or_default());
        size += read as u64;
    }
}

/// A reader that copies everything it reads into a writer.
#[derive(Debug)]
pub(crate) struct Tee<R, W> {
    pub(crate) from: R,
    pub(crate) to: W,
    /// Bytes copied so far.
    pub(crate) count: u64,
}

impl<R: Read, W: Write> Read for Tee<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.count += read as u64;
        self.to.write_all(buffer.get(..read).unwrap_or_default())?;
        Ok(read)
    }
}
