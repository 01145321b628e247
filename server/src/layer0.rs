//! Layer0 builds, each under the digest of its manifest, and which of them a machine boots.
//!
//! ```text
//! DATA/layer0/HEX/           a build: manifest.json, vmlinuz, initramfs.img, layercake-agent; never changes
//!     manifest.json.sig      where it is signed
//!     name                   the name that an operator gave it
//!     imported               where it came from server.layer0_dir by itself, and may go by itself
//! DATA/layer0/partial-HEX/   one that is being uploaded
//! ```
//! What lies in `server.layer0_dir` is the default: it is copied here whenever its manifest changes, so that a build in the middle
//! of its replacement is never given to anybody, and those that ran the one before can still have it.

pub mod archives;
mod import;
pub mod upload;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;

use protocol::api::Layer0Record;
use protocol::ids::{Digest, Name};
use protocol::layer0::{AGENT, INITRAMFS, KERNEL, MANIFEST, Manifest, SIGNATURE};

/// How often a Layer0 is given to a machine that does not report from it, before it gets the one again that it last ran.
pub const MAX_ATTEMPTS: u32 = 3;
/// The files of a build that are kept: the ones that a node boots, and the agent alone.
const FILES: [&str; 3] = [KERNEL, INITRAMFS, AGENT];
const NAME: &str = "name";
const IMPORTED: &str = "imported";
const PARTIAL: &str = "partial-";
/// Fewest digits of a digest by which a build is asked for.
const MIN_DIGITS: usize = 6;

/// Why a build cannot be had or kept.
#[derive(Debug, thiserror::Error)]
pub enum Layer0Error {
    /// It is not here.
    #[error("there is no Layer0 `{0}` here; `layercake layer0 list` shows those that are")]
    Unknown(String),
    /// Several begin like this.
    #[error("`{0}` is the beginning of several digests; give more digits")]
    Ambiguous(String),
    /// It is not all there.
    #[error("the Layer0 in {dir} cannot be used: {reason}")]
    Incomplete {
        /// The directory.
        dir: String,
        /// What is wrong.
        reason: String,
    },
    /// What was uploaded is not what its manifest names.
    #[error("{file}: {reason}")]
    Wrong {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// Nodes run it or shall run it.
    #[error("{digest} cannot be removed: {who}")]
    Needed {
        /// The build.
        digest: Digest,
        /// Who needs it.
        who: String,
    },
    /// The disk.
    #[error("{path} could not be {action}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// `read` or `written`.
        action: &'static str,
        /// The system's words.
        #[source]
        source: io::Error,
    },
}

fn reading(path: &Path) -> impl Fn(io::Error) -> Layer0Error + '_ {
    move |source| Layer0Error::Io { path: path.to_owned(), action: "read", source }
}

fn writing(path: &Path) -> impl Fn(io::Error) -> Layer0Error + '_ {
    move |source| Layer0Error::Io { path: path.to_owned(), action: "written", source }
}

/// What says whether a file is still the same.
type Stamp = (u64, i64, i64, u64);

/// What is known of `server.layer0_dir`.
#[derive(Debug, Default)]
struct DefaultBuild {
    stamp: Option<Stamp>,
    digest: Option<Digest>,
}

/// The builds. Every call may read or write files.
#[derive(Debug)]
pub struct Layer0Store {
    dir: PathBuf,
    source: PathBuf,
    default: Mutex<DefaultBuild>,
}

impl Layer0Store {
    /// The builds below `dir`, with the default from `source`. Nobody else has `dir` open.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open(dir: PathBuf, source: PathBuf) -> Result<Self, Layer0Error> {
        fs::create_dir_all(&dir).map_err(writing(&dir))?;
        let store = Self { dir, source, default: Mutex::default() };
        store.sweep_rests();
        Ok(store)
    }

    fn lock(&self) -> MutexGuard<'_, DefaultBuild> {
        self.default.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    /// Whether the build is here.
    #[must_use]
    pub fn has(&self, digest: &Digest) -> bool {
        self.place(digest).is_dir()
    }

    /// What is booted where nobody asked for another: the build in `server.layer0_dir`, imported if it is new; the last one that
    /// could be read, if it cannot be read now. Builds that were the default before, and that `pinned` does not name, go. None
    /// where no manifest was ever seen there.
    pub fn default_build(&self, pinned: impl FnOnce() -> BTreeSet<Digest>) -> Option<Digest> {
        let mut default = self.lock();
        let stamp = stamp(&self.source.join(MANIFEST));
        if stamp.is_none() || stamp == default.stamp {
            return default.digest;
        }
        match self.import_default() {
            Ok(digest) => {
                *default = DefaultBuild { stamp, digest: Some(digest) };
                let mut pinned = pinned();
                pinned.insert(digest);
                self.sweep(&pinned);
            }
            Err(error) => {
                tracing::warn!("{}", crate::http::error_chain(&error));
                // Said once; looked at again when it changes.
                default.stamp = stamp;
            }
        }
        default.digest
    }

    fn import_default(&self) -> Result<Digest, Layer0Error> {
        let here = |digest: &Digest| self.has(digest);
        let (digest, new) = import::import(&self.source, &self.dir, here)?;
        if new {
            let marker = self.place(&digest).join(IMPORTED);
            fs::write(&marker, "").map_err(writing(&marker))?;
        }
        tracing::info!(%digest, "the Layer0 of server.layer0_dir");
        Ok(digest)
    }

    /// Removes what came by itself and nobody needs.
    fn sweep(&self, pinned: &BTreeSet<Digest>) {
        for digest in self.digests() {
            let place = self.place(&digest);
            if pinned.contains(&digest)
                || !place.join(IMPORTED).exists()
                || place.join(NAME).exists()
            {
                continue;
            }
            match fs::remove_dir_all(&place) {
                Ok(()) => tracing::info!(%digest, "a former default Layer0 is removed"),
                Err(error) => tracing::warn!(%digest, %error, "a Layer0 cannot be removed"),
            }
        }
    }

    fn digests(&self) -> Vec<Digest> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let digest = |entry: fs::DirEntry| {
            format!("sha256:{}", entry.file_name().to_str()?).parse::<Digest>().ok()
        };
        entries.filter_map(digest).collect()
    }

    /// Every build, the newest last.
    #[must_use]
    pub fn list(&self) -> Vec<Layer0Record> {
        let default = self.lock().digest;
        let mut builds: Vec<Layer0Record> = Vec::new();
        for digest in self.digests() {
            match self.record(&digest, default) {
                Ok(record) => builds.push(record),
                Err(error) => tracing::warn!("{}", crate::http::error_chain(&error)),
            }
        }
        builds.sort_by_key(|build| (build.added_ms, build.digest));
        builds
    }

    fn record(
        &self,
        digest: &Digest,
        default: Option<Digest>,
    ) -> Result<Layer0Record, Layer0Error> {
        let place = self.place(digest);
        let path = place.join(MANIFEST);
        let bytes = fs::read(&path).map_err(reading(&path))?;
        let manifest = import::read_manifest(&place, &bytes)?;
        let added = fs::metadata(&path).and_then(|about| about.modified()).ok();
        let added = added.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let name = fs::read_to_string(place.join(NAME)).ok();
        let Manifest { version, kernel, flavour, agent, agent_digest, artifacts, .. } = manifest;
        let kept = artifacts.iter().filter(|it| FILES.contains(&it.name.as_str()));
        Ok(Layer0Record {
            digest: *digest,
            name: name.and_then(|name| name.trim().parse().ok()),
            version,
            kernel,
            flavour,
            agent,
            agent_digest,
            agent_alone: place.join(AGENT).exists(),
            signed: place.join(SIGNATURE).exists(),
            default: default == Some(*digest),
            bytes: kept.map(|it| it.size).sum(),
            added_ms: added.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        })
    }

    /// The build that an operator means: `default`, a name, a digest, or the beginning of one.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub fn find(&self, text: &str) -> Result<Layer0Record, Layer0Error> {
        choose(self.list(), text)
    }

    /// A file of a build; none where build or file are not here.
    #[must_use]
    pub fn file(&self, digest: &Digest, name: &str) -> Option<PathBuf> {
        let known = FILES.contains(&name) || name == MANIFEST || name == SIGNATURE;
        Some(self.place(digest).join(name)).filter(|path| known && path.is_file())
    }

    /// Gives a build a name, and takes it from the one that had it.
    fn set_name(&self, digest: &Digest, name: &Name) -> Result<(), Layer0Error> {
        for other in self.digests().iter().filter(|other| *other != digest) {
            let path = self.place(other).join(NAME);
            if fs::read_to_string(&path).is_ok_and(|text| text.trim() == name.as_str()) {
                fs::remove_file(&path).map_err(writing(&path))?;
            }
        }
        let path = self.place(digest).join(NAME);
        fs::write(&path, name.as_str()).map_err(writing(&path))
    }

    /// Removes a build. `who` says who needs it.
    ///
    /// # Errors
    /// If it is not here, somebody needs it, or it is the default.
    pub fn remove(&self, digest: &Digest, who: Option<String>) -> Result<(), Layer0Error> {
        let is_default = self.lock().digest == Some(*digest);
        let who = who.or_else(|| is_default.then(|| "it lies in server.layer0_dir".to_owned()));
        if let Some(who) = who {
            return Err(Layer0Error::Needed { digest: *digest, who });
        }
        let place = self.place(digest);
        match fs::remove_dir_all(&place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Layer0Error::Unknown(digest.to_string()))
            }
            done => done.map_err(writing(&place)),
        }
    }
}

/// The build among these that `text` means: see [`Layer0Store::find`].
///
/// # Errors
/// If there is none, or more than one.
pub fn choose(builds: Vec<Layer0Record>, text: &str) -> Result<Layer0Record, Layer0Error> {
    let unknown = || Layer0Error::Unknown(text.chars().take(80).collect());
    let named = |build: &&Layer0Record| {
        build.name.as_ref().is_some_and(|name| name.as_str() == text)
            || (text == "default" && build.default)
    };
    if let Some(build) = builds.iter().find(named) {
        return Ok(build.clone());
    }
    let digits = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
    if digits.len() < MIN_DIGITS {
        return Err(unknown());
    }
    let mut found = builds.into_iter().filter(|build| build.digest.hex().starts_with(&digits));
    let first = found.next().ok_or_else(unknown)?;
    match found.next() {
        None => Ok(first),
        Some(_) => Err(Layer0Error::Ambiguous(digits)),
    }
}

/// Which build a machine boots: the one that is wanted of it, else the default; but after [`MAX_ATTEMPTS`] boots from which nobody
/// reported, the one that it last reported from. `has` says which are here.
#[must_use]
pub fn to_boot(
    wanted: Option<Digest>,
    default: Option<Digest>,
    last_good: Option<Digest>,
    attempts: u32,
    has: impl Fn(&Digest) -> bool,
) -> Option<Digest> {
    let first = wanted.filter(&has).or(default);
    let good = last_good.filter(|_| attempts > MAX_ATTEMPTS).filter(&has);
    good.or(first)
}

fn stamp(path: &Path) -> Option<Stamp> {
    let about = fs::metadata(path).ok()?;
    Some((about.ino(), about.mtime(), about.mtime_nsec(), about.len()))
}

#[cfg(test)]
pub(crate) mod tests;
