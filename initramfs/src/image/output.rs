//! What a build leaves on disk: the files, each by a rename, and compressed archives kept for the next time.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use protocol::ids::Digest;
use protocol::layer0::{Artifact, Manifest};

use super::BuildError;
use crate::Notice;
use crate::archive::{self, Compression};

/// Names of the files, the kernel first.
pub(super) const KERNEL: &str = "vmlinuz";
pub(super) const INITRAMFS: &str = "initramfs.img";
pub(super) const EFI: &str = "layer0.efi";
const MANIFEST: &str = "manifest.json";
/// Most compressed archives that are kept; the oldest go.
const KEEP: usize = 4;

/// Compresses the archive, or takes it from the cache if this very archive was compressed before.
pub(super) fn compress(
    plain: Vec<u8>,
    how: Compression,
    cache: &Path,
    notice: Notice<'_>,
) -> Result<Vec<u8>, BuildError> {
    if how == Compression::None {
        return Ok(archive::compress(plain, how)?);
    }
    let dir = cache.join("compressed");
    let path = dir.join(format!("{}-{}", Digest::of(&plain).hex(), how.tag()));
    if let Ok(bytes) = fs::read(&path)
        && let Some(bytes) = unseal(bytes)
    {
        return Ok(bytes);
    }
    notice(&format!("compressing {} kB", plain.len() / 1000));
    let bytes = archive::compress(plain, how)?;
    let fail = fail(&dir);
    fs::create_dir_all(&dir).map_err(&fail)?;
    replace(&path, &[bytes.as_slice(), Digest::of(&bytes).to_string().as_bytes()])?;
    prune(&dir).map_err(&fail)?;
    Ok(bytes)
}

/// Takes the digest off the end of a cached file, and gives nothing if it is not the digest of the rest.
fn unseal(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let seal = bytes.split_off(bytes.len().checked_sub(Digest::of(&[]).to_string().len())?);
    (seal == Digest::of(&bytes).to_string().as_bytes()).then_some(bytes)
}

fn prune(dir: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let changed = entry.metadata()?.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        files.push((changed, entry.path()));
    }
    files.sort();
    let old = files.len().saturating_sub(KEEP);
    files.iter().take(old).try_for_each(|(_, path)| fs::remove_file(path))
}

/// Writes what is not there already, removes forms of an earlier build that are not of this one, and fills in the manifest. Tells whether everything was there.
pub(super) fn write(
    out: &Path,
    files: &[(&str, Vec<u8>)],
    manifest: &mut Manifest,
) -> Result<bool, BuildError> {
    fs::create_dir_all(out).map_err(fail(out))?;
    let mut unchanged = true;
    for (name, bytes) in files {
        let (name, digest, size) = ((*name).to_owned(), Digest::of(bytes), super::size(bytes));
        unchanged &= keep_or_replace(&out.join(&name), bytes)?;
        manifest.artifacts.push(Artifact { name, digest, size });
    }
    for name in [EFI].iter().filter(|name| !files.iter().any(|file| file.0 == **name)) {
        match fs::remove_file(out.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(out)(error)),
            _ => {}
        }
    }
    let path = out.join(MANIFEST);
    let mut text = serde_json::to_string_pretty(manifest)
        .map_err(|error| BuildError::Io { path: path.clone(), source: error.into() })?;
    text.push('\n');
    Ok(keep_or_replace(&path, text.as_bytes())? && unchanged)
}

fn keep_or_replace(path: &Path, bytes: &[u8]) -> Result<bool, BuildError> {
    if fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(true);
    }
    replace(path, &[bytes])?;
    Ok(false)
}

/// Puts these bytes in the place of a file in one step, readable by everyone.
fn replace(path: &Path, bytes: &[&[u8]]) -> Result<(), BuildError> {
    let fail = fail(path);
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(&fail)?;
    for bytes in bytes {
        file.write_all(bytes).map_err(&fail)?;
    }
    file.as_file().set_permissions(Permissions::from_mode(0o644)).map_err(&fail)?;
    file.persist(path).map_err(|error| fail(error.error))?;
    Ok(())
}

fn fail(path: &Path) -> impl Fn(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io { path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_archive_that_was_spoilt_is_made_again() {
        let cache = tempfile::tempdir().unwrap();
        let run = || {
            let asked = std::cell::Cell::new(false);
            let notice = |_: &str| asked.set(true);
            let bytes =
                compress(b"archive".to_vec(), Compression::Zstd, cache.path(), &notice).unwrap();
            (bytes, asked.get())
        };
        let (first, made) = run();
        assert!(made);
        assert_eq!(run(), (first.clone(), false));
        let path = fs::read_dir(cache.path().join("compressed")).unwrap().next().unwrap();
        let path = path.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        bytes[3] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(run(), (first, true));
    }

    #[test]
    fn only_the_newest_archives_are_kept() {
        let cache = tempfile::tempdir().unwrap();
        for byte in 0..8 {
            compress(vec![byte], Compression::Zstd, cache.path(), &|_| ()).unwrap();
        }
        assert_eq!(fs::read_dir(cache.path().join("compressed")).unwrap().count(), KEEP);
    }
}
