//! Taking a tag, manifest or blob out of one repository. Bytes that nothing has any more go with the next collection.
//!
//! Each step is synced before the next: after a power cut a tag may stand for a manifest or for nothing, but never for
//! one that has gone.

use std::fs;
use std::path::Path;

use protocol::ids::Digest;

use super::super::RegistryError;
use super::super::document;
use super::super::route::is_tag;
use super::{RegistryStore, if_there, io_error, sync_dir};

impl RegistryStore {
    /// Removes a tag; false when there is no such.
    pub(in super::super) fn delete_tag(
        &self,
        repository: &str,
        tag: &str,
    ) -> Result<bool, RegistryError> {
        if !is_tag(tag) {
            return Err(RegistryError::Name { name: tag.to_owned() });
        }
        let _order = self.removing();
        remove(&self.repository(repository)?.join("_tags"), tag)
    }

    /// Removes a manifest with all tags that stand for it; false when there is no such.
    pub(in super::super) fn delete_manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        let _order = self.removing();
        if !self.has_manifest(repository, digest)? {
            return Ok(false);
        }
        let tags = self.repository(repository)?.join("_tags");
        for tag in self.tags(repository)? {
            // A damaged tag stands for nothing.
            if self.resolve_tag(repository, &tag).is_ok_and(|found| found == Some(*digest)) {
                remove(&tags, &tag)?;
            }
        }
        self.unlink_manifest(repository, digest)
    }

    /// Removes a blob from the repository; false when it does not have it.
    pub(in super::super) fn delete_blob(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        let _order = self.removing();
        remove(&self.repository(repository)?.join("_blobs"), &digest.hex())
    }

    /// Removes a manifest that no tag stands for.
    pub(super) fn unlink_manifest(
        &self,
        repository: &str,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        // A damaged one has no subject that can be known; a list leaves its entry out because the link is gone.
        let subject = match self.typed_manifest(repository, digest) {
            Ok(Some((media_type, bytes))) => {
                document::read(&bytes, Some(&media_type)).ok().and_then(|found| found.subject)
            }
            _ => None,
        };
        if let Some(subject) = subject {
            remove(&self.referrers_dir(repository, &subject)?, &digest.hex())?;
        }
        remove(&self.repository(repository)?.join("_manifests"), &digest.hex())
    }

    pub(super) fn removing(&self) -> std::sync::RwLockWriteGuard<'_, ()> {
        self.order.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Removes a file and syncs its directory; false when there is no such.
pub(super) fn remove(dir: &Path, name: &str) -> Result<bool, RegistryError> {
    let path = dir.join(name);
    let removed = if_there(fs::remove_file(&path)).map_err(io_error("cannot remove", &path))?;
    if removed.is_some() {
        sync_dir(dir)?;
    }
    Ok(removed.is_some())
}
