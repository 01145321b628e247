//! Compressed bytes that are kept for the next build, by what they were made of.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use protocol::ids::Digest;

use super::output::{prune, replace};
use super::{BuildError, fail};
use crate::compress::Compression;

/// A directory of compressed files. Each ends with the digest of the rest: one that was damaged is none.
#[derive(Debug)]
pub(super) struct Cache {
    dir: PathBuf,
    /// Most files; those that were not used for longest go.
    keep: usize,
}

impl Cache {
    /// The cache in this directory, which need not be there.
    pub(super) fn new(dir: PathBuf, keep: usize) -> Self {
        Self { dir, keep }
    }

    /// The name under which it is kept what became of these bytes in this way. Another version of zstd may make something else.
    pub(super) fn name(of: &[u8], how: Compression) -> String {
        let how = how.to_string().replace(':', "");
        format!("{}-{how}-{}", Digest::of(of).hex(), zstd::zstd_safe::version_number())
    }

    /// What is kept under this name, if it is whole.
    pub(super) fn get(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.dir.join(name);
        let bytes = unseal(fs::read(&path).ok()?)?;
        // So that what is in use is the last to go; one that cannot be touched merely goes earlier.
        let file = fs::File::options().append(true).open(&path);
        let _ = file.and_then(|file| file.set_modified(SystemTime::now()));
        Some(bytes)
    }

    /// Keeps these bytes under this name.
    pub(super) fn put(&self, name: &str, bytes: &[u8]) -> Result<(), BuildError> {
        fs::create_dir_all(&self.dir).map_err(fail(&self.dir))?;
        replace(&self.dir.join(name), &[bytes, Digest::of(bytes).to_string().as_bytes()])
    }

    /// Removes what is too much. For the end of what one build puts in.
    pub(super) fn prune(&self) -> Result<(), BuildError> {
        prune(&self.dir, self.keep).map_err(fail(&self.dir))
    }
}

/// Takes the digest off the end of a cached file, and gives nothing if it is not the digest of the rest.
fn unseal(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let seal = bytes.split_off(bytes.len().checked_sub(Digest::of(&[]).to_string().len())?);
    (seal == Digest::of(&bytes).to_string().as_bytes()).then_some(bytes)
}
