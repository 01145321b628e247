//! One repository of an OCI registry, read only (OCI distribution spec 1.1): manifests by digest or tag, blobs as
//! streams from any byte on, from the node's cache and mirrors first where the registry table has some.
//!
//! Checks what an answer claims (status, range, manifest digest); the blobs' digests are checked by who reads them. A
//! mirror that errs, stalls or lies is given up for as long as this lives, one that lacks something is only passed over: digests
//! are what is trusted.
//!
//! | module | what it holds |
//! |---|---|
//! | `challenge` | what a registry asks for with 401, pure |
//! | `endpoint` | one place: requests, passwords, tokens |
//! | [`table`] | the registry table and the clients made of it |

pub mod challenge;
mod endpoint;
pub mod table;

#[cfg(test)]
mod tests;

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use protocol::ids::Digest;
use protocol::reference::Reference;
use protocol::registries::Endpoint;

use crate::cache::{Cache, Writer};
use crate::transport::{Transport, TransportError};
use endpoint::Place;

/// Why a registry's answer is of no use.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The request failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The content is not what its digest says.
    #[error("{url}: the content's digest is {found}, expected {expected}")]
    Digest {
        /// What was asked for.
        url: String,
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// The registry wants credentials that there are none of, does not take them, or its challenge cannot be followed.
    #[error("{url} needs a login: {reason}")]
    Login {
        /// What was asked for.
        url: String,
        /// Why it cannot be done.
        reason: String,
    },
}

impl RegistryError {
    /// Whether trying again may help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Transport(error) => error.is_transient(),
            Self::Digest { .. } => true,
            Self::Login { .. } => false,
        }
    }

    /// Whether the registry says that it does not have it.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Transport(TransportError::Status { status: 404, .. }))
    }
}

/// Who gave something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whence {
    /// The node's own disk.
    Cache,
    /// The mirror of this number.
    Mirror(usize),
    /// The registry itself.
    Origin,
}

/// A blob's body.
pub struct Blob {
    /// Who gives it.
    pub whence: Whence,
    /// Byte of the blob that the body begins with: what was asked for, or 0 if the registry has no ranges.
    pub start: u64,
    /// Size of the whole blob in bytes, where the registry says it.
    pub size: Option<u64>,
    /// The bytes.
    pub body: Box<dyn Read + Send>,
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob({:?}, from {} of {:?})", self.whence, self.start, self.size)
    }
}

/// A mirror, and whether it is given up.
#[derive(Debug)]
struct Mirror {
    place: Place,
    left: AtomicBool,
}

/// A repository that is read from. Shared by threads.
#[derive(Debug)]
pub struct Registry {
    mirrors: Vec<Mirror>,
    origin: Place,
    /// Asked before all of them.
    cache: Cache,
    /// Mirrors and cached blobs that were given up.
    left: AtomicUsize,
}

impl Registry {
    /// The repository that a reference points into, and nothing else known of it.
    #[must_use]
    pub fn new(transport: Transport, reference: &Reference) -> Self {
        Self::of(Vec::new(), Place::new(transport, &Endpoint::of(reference)))
    }

    fn of(mirrors: Vec<Place>, origin: Place) -> Self {
        let mirror = |place| Mirror { place, left: AtomicBool::new(false) };
        let mirrors = mirrors.into_iter().map(mirror).collect();
        Self { mirrors, origin, cache: Cache::none(), left: AtomicUsize::new(0) }
    }

    /// The same repository, with what this cache has of it asked first, and what comes kept there.
    #[must_use]
    pub fn with_cache(self, cache: Cache) -> Self {
        Self { cache, ..self }
    }

    /// URL of a manifest at the registry itself, by digest or tag.
    #[must_use]
    pub fn manifest_url(&self, key: &str) -> String {
        self.origin.manifest_url(key)
    }

    /// URL of a blob at the registry itself.
    #[must_use]
    pub fn blob_url(&self, digest: &Digest) -> String {
        self.origin.blob_url(digest)
    }

    /// URL of a blob at who gave it.
    #[must_use]
    pub fn blob_url_at(&self, whence: Whence, digest: &Digest) -> String {
        let mirror = match whence {
            Whence::Mirror(number) => self.mirrors.get(number),
            Whence::Cache | Whence::Origin => None,
        };
        mirror.map_or(&self.origin, |mirror| &mirror.place).blob_url(digest)
    }

    /// A manifest or index by its digest, checked against it. At most [`protocol::oci::MAX_MANIFEST_BYTES`] are read.
    ///
    /// # Errors
    /// If the request fails or the content has another digest.
    pub fn manifest(&self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        let key = digest.to_string();
        self.cached(digest, || {
            self.ask(|_, place| check(&place.manifest_url(&key), place.manifest(&key)?, digest))
        })
    }

    /// The digest and bytes of what a tag points to now.
    ///
    /// # Errors
    /// If the request fails.
    pub fn resolve(&self, tag: &str) -> Result<(Digest, Vec<u8>), RegistryError> {
        let bytes = self.ask(|_, place| place.manifest(tag))?;
        Ok((Digest::of(&bytes), bytes))
    }

    /// The digest that the registry itself says a tag points to, by one HEAD request. None where it does not say, or where
    /// mirrors are to be asked first.
    #[must_use]
    pub fn digest_of(&self, tag: &str) -> Option<Digest> {
        if self.has_mirrors() {
            return None;
        }
        self.origin.digest_of(tag).ok().flatten()
    }

    /// The same, asked of the registry itself: a mirror may have an older answer.
    ///
    /// # Errors
    /// If the request fails.
    pub fn resolve_at_origin(&self, tag: &str) -> Result<(Digest, Vec<u8>), RegistryError> {
        let bytes = self.origin.manifest(tag)?;
        Ok((Digest::of(&bytes), bytes))
    }

    /// Whether there are mirrors beside the registry itself.
    #[must_use]
    pub fn has_mirrors(&self) -> bool {
        !self.mirrors.is_empty()
    }

    /// A small blob (a config), checked against its digest.
    ///
    /// # Errors
    /// If the request fails, the blob is larger than [`protocol::oci::MAX_MANIFEST_BYTES`] or has another digest.
    pub fn small_blob(&self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        self.cached(digest, || self.ask(|_, place| place.small_blob(digest)))
    }

    /// A document of the cache, else what `fetch` gives, which is kept there.
    fn cached(
        &self,
        digest: &Digest,
        fetch: impl FnOnce() -> Result<Vec<u8>, RegistryError>,
    ) -> Result<Vec<u8>, RegistryError> {
        if let Some(bytes) = self.cache.document(digest) {
            return Ok(bytes);
        }
        let bytes = fetch()?;
        self.cache.keep_document(&bytes);
        Ok(bytes)
    }

    /// Takes a blob of this size into the cache as it comes; none where there is no cache.
    #[must_use]
    pub fn keep(&self, digest: &Digest, size: u64) -> Option<Writer> {
        self.cache.writer(digest, size)
    }

    /// A blob of this size as a stream, from byte `start` on if the registry supports ranges.
    ///
    /// # Errors
    /// If the request fails or the answer is another range.
    pub fn blob(&self, digest: &Digest, size: u64, start: u64) -> Result<Blob, RegistryError> {
        if start == 0
            && let Some(file) = self.cache.blob(digest, size)
        {
            let (whence, body) = (Whence::Cache, Box::new(file));
            return Ok(Blob { whence, start, size: Some(size), body });
        }
        self.ask(|whence, place| place.blob(whence, digest, start))
    }

    /// Gives up who was to give a blob, and says so: a mirror as a whole, the cache's copy of this blob. False for the
    /// registry itself, which is all there is.
    pub fn leave(&self, whence: Whence, digest: &Digest, why: &dyn std::error::Error) -> bool {
        let number = match whence {
            Whence::Origin => return false,
            Whence::Mirror(number) => number,
            Whence::Cache => {
                self.left.fetch_add(1, Ordering::Relaxed);
                self.cache.forget(digest, &crate::agent::chain(why));
                return true;
            }
        };
        self.leave_mirror(number, why);
        true
    }

    fn leave_mirror(&self, number: usize, why: &dyn std::error::Error) {
        let Some(mirror) = self.mirrors.get(number) else { return };
        if !mirror.left.swap(true, Ordering::Relaxed) {
            self.left.fetch_add(1, Ordering::Relaxed);
            log::warn!("mirror {} is left: {}", mirror.place.host, crate::agent::chain(why));
        }
    }

    /// How often a mirror or a cached blob was given up so far.
    #[must_use]
    pub fn given_up(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }

    /// Asks every mirror that is not given up, then the registry itself.
    fn ask<T>(
        &self,
        ask: impl Fn(Whence, &Place) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        for (number, mirror) in self.mirrors.iter().enumerate() {
            if mirror.left.load(Ordering::Relaxed) {
                continue;
            }
            match ask(Whence::Mirror(number), &mirror.place) {
                Ok(answer) => return Ok(answer),
                Err(error) if error.is_missing() => log::debug!("mirror: {error}"),
                Err(error) => self.leave_mirror(number, &error),
            }
        }
        ask(Whence::Origin, &self.origin)
    }
}

fn check(url: &str, bytes: Vec<u8>, expected: &Digest) -> Result<Vec<u8>, RegistryError> {
    let found = Digest::of(&bytes);
    if found == *expected {
        return Ok(bytes);
    }
    Err(RegistryError::Digest { url: url.to_owned(), expected: *expected, found })
}
