//! Takes a build out of a directory: what its manifest names is copied, and checked while it is.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use protocol::ids::Digest;
use protocol::layer0::{
    Artifact, INITRAMFS, KERNEL, MANIFEST, MAX_ARTIFACT_BYTES, MAX_MANIFEST_BYTES, Manifest,
    SIGNATURE,
};
use sha2::{Digest as _, Sha256};

use super::{FILES, Layer0Error, reading, writing};

/// Bytes copied at a time.
const BUFFER: usize = 1 << 20;

/// The manifest of a build in this directory, checked for what is relied on.
pub(super) fn read_manifest(dir: &Path, bytes: &[u8]) -> Result<Manifest, Layer0Error> {
    let wrong = |reason: String| Layer0Error::Incomplete { dir: dir.display().to_string(), reason };
    let manifest: Manifest =
        serde_json::from_slice(bytes).map_err(|error| wrong(format!("{MANIFEST}: {error}")))?;
    for name in [KERNEL, INITRAMFS] {
        if !manifest.artifacts.iter().any(|artifact| artifact.name == name) {
            return Err(wrong(format!("{MANIFEST} names no {name}")));
        }
    }
    let large = kept(&manifest).find(|artifact| artifact.size > MAX_ARTIFACT_BYTES);
    match large {
        Some(artifact) => {
            Err(wrong(format!("{} is larger than {MAX_ARTIFACT_BYTES}", artifact.name)))
        }
        None => Ok(manifest),
    }
}

/// The files of a manifest that are kept.
pub(super) fn kept(manifest: &Manifest) -> impl Iterator<Item = &Artifact> {
    manifest.artifacts.iter().filter(|artifact| FILES.contains(&artifact.name.as_str()))
}

/// Copies the build in `from` to a directory below `to` that is named after its digest, unless it is there. Returns the digest, and
/// whether it is new.
pub(super) fn import(
    from: &Path,
    to: &Path,
    here: impl FnOnce(&Digest) -> bool,
) -> Result<(Digest, bool), Layer0Error> {
    let path = from.join(MANIFEST);
    let mut bytes = Vec::new();
    let file = File::open(&path).map_err(reading(&path))?;
    file.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut bytes).map_err(reading(&path))?;
    let manifest = read_manifest(from, &bytes)?;
    let digest = Digest::of(&bytes);
    if here(&digest) {
        return Ok((digest, false));
    }
    let partial = tempfile::Builder::new().prefix(super::PARTIAL).tempdir_in(to);
    let partial = partial.map_err(writing(to))?;
    for artifact in kept(&manifest) {
        copy(&from.join(&artifact.name), &partial.path().join(&artifact.name), artifact)?;
    }
    let signature = from.join(SIGNATURE);
    if signature.is_file() {
        fs::copy(&signature, partial.path().join(SIGNATURE)).map_err(reading(&signature))?;
    }
    fs::write(partial.path().join(MANIFEST), &bytes).map_err(writing(partial.path()))?;
    settle(partial.path(), &to.join(digest.hex()))?;
    // It has been renamed: there is nothing left to remove.
    let _ = partial.keep();
    Ok((digest, true))
}

/// Gives a complete build its place.
pub(super) fn settle(partial: &Path, place: &Path) -> Result<(), Layer0Error> {
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(partial, mode).map_err(writing(partial))?;
    for entry in fs::read_dir(partial).map_err(reading(partial))?.flatten() {
        let file = File::open(entry.path()).and_then(|file| file.sync_all());
        file.map_err(writing(&entry.path()))?;
    }
    match fs::rename(partial, place) {
        // Somebody else brought the very same one.
        Err(_) if place.is_dir() => fs::remove_dir_all(partial).map_err(writing(partial)),
        done => done.map_err(writing(place)),
    }
}

fn copy(from: &Path, to: &Path, artifact: &Artifact) -> Result<(), Layer0Error> {
    let source = File::open(from).map_err(reading(from))?;
    let mut source = source.take(artifact.size + 1);
    let mut target = File::create(to).map_err(writing(to))?;
    let (mut hash, mut total, mut buffer) = (Sha256::new(), 0_u64, vec![0; BUFFER]);
    loop {
        let read = source.read(&mut buffer).map_err(reading(from))?;
        let bytes = buffer.get(..read).unwrap_or_default();
        if bytes.is_empty() {
            break;
        }
        hash.update(bytes);
        total += bytes.len() as u64;
        target.write_all(bytes).map_err(writing(to))?;
    }
    check(artifact, total, Digest(hash.finalize().into()))
}

/// Whether these bytes are the artifact.
pub(super) fn check(artifact: &Artifact, total: u64, found: Digest) -> Result<(), Layer0Error> {
    let Artifact { name, digest, size } = artifact;
    if total == *size && found == *digest {
        return Ok(());
    }
    let reason = match total > *size {
        true => format!("larger than the {size} bytes that {MANIFEST} names"),
        false => format!("{total} bytes with {found}, but {MANIFEST} names {size} with {digest}"),
    };
    Err(Layer0Error::Wrong { file: name.clone(), reason })
}
