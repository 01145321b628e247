//! The site's archives as a desired document names them: with digest and size, read again when a file changes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use protocol::ids::Digest;
use protocol::node::Layer0Archive;
use sha2::{Digest as _, Sha256};

use super::{Stamp, stamp};
use crate::overlays::Overlay;

/// Bytes read at a time.
const BUFFER: usize = 1 << 20;

/// What is known of the files.
#[derive(Debug, Default)]
pub struct Archives(Mutex<BTreeMap<PathBuf, (Stamp, Digest)>>);

impl Archives {
    /// These archives. One that cannot be read is named all the same, as an empty one: the node then fails to fetch it and says so,
    /// where it would else lose its site's keys without a word. Reads files.
    pub fn of<'o>(&self, overlays: impl Iterator<Item = &'o Overlay>) -> Vec<Layer0Archive> {
        let archive = |overlay: &Overlay| {
            let (digest, size) = self.look(&overlay.path).unwrap_or_else(|error| {
                tracing::warn!("{}: {error}", overlay.path.display());
                (Digest::of(&[]), 0)
            });
            Layer0Archive { digest, size, url: format!("/boot/overlays/{}", overlay.name) }
        };
        overlays.map(archive).collect()
    }

    fn look(&self, path: &Path) -> std::io::Result<(Digest, u64)> {
        let now = stamp(path).ok_or(std::io::ErrorKind::NotFound)?;
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, digest)) = known.get(path).filter(|(stamp, _)| *stamp == now) {
            return Ok((*digest, now.3));
        }
        let (mut file, mut hash, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; BUFFER]);
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => hash.update(buffer.get(..read).unwrap_or_default()),
            }
        }
        let digest = Digest(hash.finalize().into());
        known.insert(path.to_owned(), (now, digest));
        Ok((digest, now.3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_named_by_what_is_in_them_now() {
        let dir = tempfile::tempdir().expect("dir");
        let overlay = |name: &str| Overlay { name: name.to_owned(), path: dir.path().join(name) };
        let overlays = [overlay("site.cpio"), overlay("gone.cpio")];
        std::fs::write(&overlays[0].path, "one").expect("write");
        let archives = Archives::default();
        let [site, gone] = &archives.of(overlays.iter())[..] else { panic!("two") };
        assert_eq!((site.digest, site.size), (Digest::of(b"one"), 3));
        assert_eq!(site.url, "/boot/overlays/site.cpio");
        assert_eq!((gone.digest, gone.size), (Digest::of(b""), 0));
        std::fs::write(&overlays[0].path, "another").expect("write");
        assert_eq!(archives.of(overlays[..1].iter())[0].digest, Digest::of(b"another"));
    }
}
