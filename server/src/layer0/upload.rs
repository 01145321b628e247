//! Builds that an operator brings over HTTP: first the manifest, which says what is missing, then file after file, each checked
//! while it comes. The build is there once it is whole; until then nothing shows of it.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use protocol::api::Layer0Upload;
use protocol::ids::{Digest, Name};
use protocol::layer0::{Artifact, MANIFEST, MAX_SIGNATURE_BYTES, Manifest, SIGNATURE};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use super::import::{check, kept, read_manifest, settle};
use super::{Layer0Error, Layer0Store, NAME, PARTIAL, reading, writing};

/// How long an upload that was interrupted can be gone on with.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// A file on its way.
#[derive(Debug)]
pub struct Incoming {
    file: NamedTempFile,
    hash: Sha256,
    total: u64,
    artifact: Artifact,
    target: PathBuf,
}

impl Incoming {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// If there are more than the manifest names, or they cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Layer0Error> {
        self.total += bytes.len() as u64;
        if self.total > self.artifact.size {
            return check(&self.artifact, self.total, self.artifact.digest);
        }
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(writing(&self.target))
    }
}

/// Whether nothing came into a directory for as long as an upload may be interrupted.
fn is_old(dir: &std::path::Path) -> bool {
    let changed = fs::metadata(dir).and_then(|about| about.modified());
    let age = changed.ok().and_then(|time| time.elapsed().ok());
    age.is_some_and(|age| age > KEPT)
}

impl Layer0Store {
    /// Removes what an interrupted server left: files in the middle, and uploads that nobody has gone on with for a day.
    pub(super) fn sweep_rests(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            let name = name.to_string_lossy();
            let upload = name.strip_prefix(PARTIAL).map(|rest| format!("sha256:{rest}"));
            let removed = match upload.map(|digest| digest.parse::<Digest>().is_ok()) {
                Some(true) if !is_old(&path) => continue,
                // Or a copy of server.layer0_dir that is begun anew.
                Some(_) => fs::remove_dir_all(&path),
                None if name.starts_with('.') => fs::remove_file(&path),
                None => continue,
            };
            match removed {
                Ok(()) => tracing::info!(path = %path.display(), "removed: it was never completed"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "cannot be removed"),
            }
        }
    }

    fn partial(&self, digest: &Digest) -> PathBuf {
        self.dir.join(format!("{PARTIAL}{}", digest.hex()))
    }

    /// Takes the manifest of a build, and a name for it. Says which of its files are to follow.
    ///
    /// # Errors
    /// If it is no manifest, or cannot be written.
    pub fn begin(&self, manifest: &[u8], name: Option<&Name>) -> Result<Layer0Upload, Layer0Error> {
        let digest = Digest::of(manifest);
        let parsed = read_manifest(std::path::Path::new("the upload"), manifest)?;
        if self.has(&digest) {
            if let Some(name) = name {
                self.set_name(&digest, name)?;
            }
            return Ok(Layer0Upload { digest, missing: Vec::new() });
        }
        let dir = self.partial(&digest);
        fs::create_dir_all(&dir).map_err(writing(&dir))?;
        fs::write(dir.join(MANIFEST), manifest).map_err(writing(&dir))?;
        if let Some(name) = name {
            fs::write(dir.join(NAME), name.as_str()).map_err(writing(&dir))?;
        }
        let missing = self.missing(&digest, &parsed);
        if missing.is_empty() {
            self.finish(&digest)?;
        }
        Ok(Layer0Upload { digest, missing })
    }

    fn missing(&self, digest: &Digest, manifest: &Manifest) -> Vec<String> {
        let dir = self.partial(digest);
        let missing = kept(manifest).filter(|artifact| !dir.join(&artifact.name).exists());
        missing.map(|artifact| artifact.name.clone()).collect()
    }

    fn pending(&self, digest: &Digest) -> Result<Manifest, Layer0Error> {
        let path = self.partial(digest).join(MANIFEST);
        let bytes = fs::read(&path).map_err(|_| Layer0Error::Unknown(digest.to_string()))?;
        read_manifest(&self.partial(digest), &bytes)
    }

    /// Makes ready to take a file of a build whose manifest was taken before.
    ///
    /// # Errors
    /// If there is no such upload, or its manifest does not name the file.
    pub fn receive(&self, digest: &Digest, file: &str) -> Result<Incoming, Layer0Error> {
        let manifest = self.pending(digest)?;
        let artifact = kept(&manifest).find(|artifact| artifact.name == file).cloned();
        let artifact = artifact.ok_or_else(|| Layer0Error::Wrong {
            file: file.chars().take(80).collect(),
            reason: "the manifest names no such file that is kept".to_owned(),
        })?;
        let target = self.partial(digest).join(&artifact.name);
        let file = NamedTempFile::new_in(&self.dir).map_err(writing(&self.dir))?;
        Ok(Incoming { file, hash: Sha256::new(), total: 0, artifact, target })
    }

    /// Keeps a file that is whole; with the last one, the build is there.
    ///
    /// # Errors
    /// If it is not what the manifest names, or cannot be written.
    pub fn received(&self, digest: &Digest, incoming: Incoming) -> Result<(), Layer0Error> {
        let Incoming { file, hash, total, artifact, target } = incoming;
        check(&artifact, total, Digest(hash.finalize().into()))?;
        file.persist(&target).map_err(|error| writing(&target)(error.error))?;
        match self.missing(digest, &self.pending(digest)?).is_empty() {
            true => self.finish(digest),
            false => Ok(()),
        }
    }

    fn finish(&self, digest: &Digest) -> Result<(), Layer0Error> {
        let name = fs::read_to_string(self.partial(digest).join(NAME)).ok();
        settle(&self.partial(digest), &self.place(digest))?;
        match name.and_then(|name| name.parse().ok()) {
            Some(name) => self.set_name(digest, &name),
            None => Ok(()),
        }
    }

    /// Takes the signature of a build that is here, or on its way.
    ///
    /// # Errors
    /// If there is no such build, the signature is too long, or cannot be written.
    pub fn sign(&self, digest: &Digest, signature: &[u8]) -> Result<(), Layer0Error> {
        let most = usize::try_from(MAX_SIGNATURE_BYTES).unwrap_or(usize::MAX);
        if signature.len() > most {
            let reason = format!("longer than {most} bytes");
            return Err(Layer0Error::Wrong { file: SIGNATURE.to_owned(), reason });
        }
        let places = [self.place(digest), self.partial(digest)];
        let place = places.into_iter().find(|place| place.is_dir());
        let place = place.ok_or_else(|| Layer0Error::Unknown(digest.to_string()))?;
        let file = NamedTempFile::new_in(&self.dir).map_err(writing(&self.dir))?;
        file.as_file().write_all(signature).map_err(reading(file.path()))?;
        let target = place.join(SIGNATURE);
        file.persist(&target).map(drop).map_err(|error| writing(&target)(error.error))
    }
}
