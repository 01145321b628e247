//! Which manifests are about which: the entries behind the referrers API.
//!
//! An entry is kept in the repository of the manifest whose `subject` it comes from, and holds its descriptor as the
//! API lists it. The subject itself need not be there.

use std::fs;
use std::path::PathBuf;

use protocol::ids::Digest;
use protocol::oci::Descriptor;

use super::super::RegistryError;
use super::super::document::{self, Document};
use super::{RegistryStore, if_there, io_error, names_in};

/// The file that says that every manifest's subject is in the entries; older stores do not have it.
const MARKER: &str = "referrers-indexed";

impl RegistryStore {
    /// The digests of the manifests about this one, sorted.
    pub(in super::super) fn referrers(
        &self,
        repository: &str,
        subject: &Digest,
    ) -> Result<Vec<Digest>, RegistryError> {
        let names = names_in(&self.referrers_dir(repository, subject)?)?;
        let mut found = Vec::new();
        for digest in names.iter().filter_map(|name| format!("sha256:{name}").parse().ok()) {
            if self.has_manifest(repository, &digest)? {
                found.push(digest);
            }
        }
        found.sort();
        Ok(found)
    }

    /// What a list of referrers says of one of them; `None` when it has just gone.
    pub(in super::super) fn referrer(
        &self,
        repository: &str,
        subject: &Digest,
        digest: &Digest,
    ) -> Result<Option<Descriptor>, RegistryError> {
        let path = self.referrers_dir(repository, subject)?.join(digest.hex());
        let Some(bytes) = if_there(fs::read(&path)).map_err(io_error("cannot read", &path))? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| RegistryError::Damaged { path, reason: error.to_string() })
    }

    pub(super) fn add_referrer(
        &self,
        repository: &str,
        document: &Document,
    ) -> Result<(), RegistryError> {
        let Some(subject) = document.subject else { return Ok(()) };
        let dir = self.referrers_dir(repository, &subject)?;
        let digest = document.descriptor.digest;
        let bytes = serde_json::to_vec(&document.descriptor).map_err(|error| {
            RegistryError::Damaged { path: dir.join(digest.hex()), reason: error.to_string() }
        })?;
        self.write(&dir, &digest.hex(), &bytes)
    }

    pub(super) fn referrers_dir(
        &self,
        repository: &str,
        subject: &Digest,
    ) -> Result<PathBuf, RegistryError> {
        Ok(self.repository(repository)?.join("_referrers").join(subject.hex()))
    }

    /// Makes the entries of a store from before there were any: the spec wants manifests listed that were pushed
    /// before the API was there ("Enabling the Referrers API").
    pub(super) fn index_referrers_once(&self) -> Result<(), RegistryError> {
        if self.dir.join(MARKER).exists() {
            return Ok(());
        }
        for repository in self.repositories()? {
            for digest in self.manifests(&repository)? {
                // What is damaged is left as it is: whoever pulls it is told.
                let Ok(Some((media_type, bytes))) = self.typed_manifest(&repository, &digest)
                else {
                    continue;
                };
                if let Ok(document) = document::read(&bytes, Some(&media_type)) {
                    self.add_referrer(&repository, &document)?;
                }
            }
        }
        self.write(&self.dir.clone(), MARKER, b"")
    }

    /// The digests of all manifests of a repository.
    pub(super) fn manifests(&self, repository: &str) -> Result<Vec<Digest>, RegistryError> {
        let names = names_in(&self.repository(repository)?.join("_manifests"))?;
        Ok(names.iter().filter_map(|name| format!("sha256:{name}").parse().ok()).collect())
    }
}
