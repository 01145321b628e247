//! Garbage collection: mark what is reached from tags, pinned digests and fresh manifests, sweep the rest.
//!
//! | kept | because |
//! |---|---|
//! | a manifest | a tag or a node's desired document names it, or a kept index, or it is about a kept one (`subject`) |
//! | a blob of a repository | a kept manifest of that repository names it |
//! | bytes | a repository has them |
//! | anything | it was sent, or asked for with HEAD, less than the grace period ago: its push may still be going on |
//!
//! Who pushes waits while a collection runs, who pulls does not (a HEAD may). One that is cut off has removed less, never too much:
//! links go before what they stand for, each directory synced before the next.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, Metadata};
use std::path::Path;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use protocol::ids::Digest;
use serde::{Deserialize, Serialize};

use super::super::RegistryError;
use super::super::document::{self, Needs};
use super::{RegistryStore, if_there, io_error, names_in, sync_dir};

/// What a repository consists of, without its name.
const PARTS: [&str; 4] = ["_tags", "_referrers", "_manifests", "_blobs"];

/// `POST /v1/imagesets/gc`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Only say what would be removed.
    #[serde(default)]
    pub dry_run: bool,
    /// Seconds for which what nothing refers to is kept all the same; the server's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_s: Option<u64>,
}

/// What a collection removed, or would.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    /// Whether nothing was really removed.
    pub dry_run: bool,
    /// Manifests, `REPOSITORY@DIGEST`, sorted.
    pub manifests: Vec<String>,
    /// Blobs and manifests that no repository has any more.
    pub blobs: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Repositories that were left alone because something in them is damaged; the server's log says what.
    pub skipped: Vec<String>,
}

/// What one repository keeps.
#[derive(Default)]
struct Marked {
    manifests: HashSet<Digest>,
    blobs: HashSet<Digest>,
}

impl RegistryStore {
    /// Removes what nothing needs, and has not been fresh for `grace`. `pinned` manifests are needed.
    ///
    /// # Errors
    /// If the store cannot be read or written. A damaged repository is none: it is left alone and reported.
    pub fn collect(
        &self,
        pinned: &BTreeSet<Digest>,
        grace: Duration,
        dry_run: bool,
    ) -> Result<GcReport, RegistryError> {
        let (_shared, _alone) = if dry_run {
            (Some(self.order.read().unwrap_or_else(PoisonError::into_inner)), None)
        } else {
            (None, Some(self.removing()))
        };
        let now = SystemTime::now();
        let fresh = |meta: &Metadata| {
            // What is from the future is fresh: the clock was set back.
            meta.modified()
                .map_or(true, |at| now.duration_since(at).map_or(true, |age| age < grace))
        };
        let mut report = GcReport { dry_run, ..GcReport::default() };
        let mut linked = HashSet::new();
        for repository in self.repositories_with(&["_manifests", "_blobs"])? {
            match self.mark(&repository, pinned, &fresh) {
                Ok(marked) => {
                    self.sweep(&repository, &marked, &fresh, &mut linked, &mut report)?;
                }
                Err(error @ RegistryError::Damaged { .. }) => {
                    tracing::warn!(%repository, error = &error as &dyn std::error::Error, "not collected");
                    linked.extend(self.links(&repository)?);
                    report.skipped.push(repository);
                }
                Err(error) => return Err(error),
            }
        }
        self.sweep_blobs(&linked, &fresh, &mut report)?;
        report.manifests.sort();
        Ok(report)
    }

    fn mark(
        &self,
        repository: &str,
        pinned: &BTreeSet<Digest>,
        fresh: &impl Fn(&Metadata) -> bool,
    ) -> Result<Marked, RegistryError> {
        let mut marked = Marked::default();
        let mut todo: Vec<Digest> = pinned.iter().copied().collect();
        for tag in self.tags(repository)? {
            todo.extend(self.resolve_tag(repository, &tag)?);
        }
        let links = self.repository(repository)?.join("_manifests");
        for digest in self.manifests(repository)? {
            if is(&links.join(digest.hex()), fresh)? {
                todo.push(digest);
            }
        }
        while let Some(digest) = todo.pop() {
            if marked.manifests.contains(&digest) {
                continue;
            }
            let Some((media_type, bytes)) = self.typed_manifest(repository, &digest)? else {
                continue;
            };
            marked.manifests.insert(digest);
            let document = document::read(&bytes, Some(&media_type)).map_err(|refusal| {
                let path = self.blob_path(&digest);
                RegistryError::Damaged { path, reason: refusal.message }
            })?;
            for need in document.needs {
                match need {
                    Needs::Blob(digest) => {
                        marked.blobs.insert(digest);
                    }
                    Needs::Manifest(digest) => todo.push(digest),
                }
            }
            todo.extend(self.referrers(repository, &digest)?);
        }
        Ok(marked)
    }

    fn sweep(
        &self,
        repository: &str,
        marked: &Marked,
        fresh: &impl Fn(&Metadata) -> bool,
        linked: &mut HashSet<Digest>,
        report: &mut GcReport,
    ) -> Result<(), RegistryError> {
        let dir = self.repository(repository)?;
        for digest in self.manifests(repository)? {
            // Fresh ones are among the marked.
            if marked.manifests.contains(&digest) {
                linked.insert(digest);
                continue;
            }
            report.manifests.push(format!("{repository}@{digest}"));
            if !report.dry_run {
                self.unlink_manifest(repository, &digest)?;
            }
        }
        let blobs = dir.join("_blobs");
        let mut changed = false;
        for (name, digest) in digests_in(&blobs)? {
            let path = blobs.join(&name);
            if marked.blobs.contains(&digest) || is(&path, fresh)? {
                linked.insert(digest);
            } else if !report.dry_run {
                if_there(fs::remove_file(&path)).map_err(io_error("cannot remove", &path))?;
                changed = true;
            }
        }
        if changed {
            sync_dir(&blobs)?;
        }
        if !report.dry_run {
            self.prune(repository)?;
        }
        Ok(())
    }

    /// Everything that a repository has.
    fn links(&self, repository: &str) -> Result<Vec<Digest>, RegistryError> {
        let dir = self.repository(repository)?;
        let mut found = self.manifests(repository)?;
        found.extend(digests_in(&dir.join("_blobs"))?.into_iter().map(|(_, digest)| digest));
        Ok(found)
    }

    fn sweep_blobs(
        &self,
        linked: &HashSet<Digest>,
        fresh: &impl Fn(&Metadata) -> bool,
        report: &mut GcReport,
    ) -> Result<(), RegistryError> {
        let dir = self.dir.join("blobs/sha256");
        for (name, digest) in digests_in(&dir)? {
            let path = dir.join(&name);
            let meta = if_there(fs::metadata(&path)).map_err(io_error("cannot read", &path))?;
            let Some(meta) = meta.filter(|meta| !linked.contains(&digest) && !fresh(meta)) else {
                continue;
            };
            if !report.dry_run {
                fs::remove_file(&path).map_err(io_error("cannot remove", &path))?;
            }
            report.blobs += 1;
            report.bytes += meta.len();
        }
        sync_dir(&dir)
    }

    /// Removes the directories of a repository that have become empty, and itself when all of them have.
    fn prune(&self, repository: &str) -> Result<(), RegistryError> {
        let dir = self.repository(repository)?;
        let referrers = dir.join("_referrers");
        for subject in names_in(&referrers)? {
            let _ = fs::remove_dir(referrers.join(subject));
        }
        if !names_in(&dir.join("_manifests"))?.is_empty()
            || !names_in(&dir.join("_blobs"))?.is_empty()
        {
            return Ok(());
        }
        // A directory that is not empty stays: remove_dir removes no other.
        for part in PARTS {
            let _ = fs::remove_dir(dir.join(part));
        }
        let root = self.dir.join("repositories");
        let mut at = dir.as_path();
        while at != root && fs::remove_dir(at).is_ok() {
            let Some(parent) = at.parent() else { break };
            at = parent;
        }
        sync_dir(at)
    }
}

fn is(path: &Path, fresh: impl Fn(&Metadata) -> bool) -> Result<bool, RegistryError> {
    let meta = if_there(fs::metadata(path)).map_err(io_error("cannot read", path))?;
    Ok(meta.is_some_and(|meta| fresh(&meta)))
}

/// The files of a directory that are named by a digest.
fn digests_in(dir: &Path) -> Result<Vec<(String, Digest)>, RegistryError> {
    let names = names_in(dir)?.into_iter();
    Ok(names
        .filter_map(|name| Some((name.clone(), format!("sha256:{name}").parse().ok()?)))
        .collect())
}
