//! Placeholder of the embedded registry: the seam that the server is written against.

use std::path::Path;

use protocol::ids::Digest;

/// Why the registry's store failed.
#[derive(Debug, thiserror::Error)]
#[error("the registry is not part of this build")]
pub struct RegistryError;

/// The registry's store.
#[derive(Debug, Clone)]
pub struct RegistryStore;

impl RegistryStore {
    /// Opens it.
    ///
    /// # Errors
    /// Never.
    pub fn open(_dir: &Path) -> Result<Self, RegistryError> {
        Ok(Self)
    }

    /// The digest under a tag.
    ///
    /// # Errors
    /// Never.
    pub fn resolve_tag(
        &self,
        _repository: &str,
        _tag: &str,
    ) -> Result<Option<Digest>, RegistryError> {
        Ok(None)
    }

    /// All repositories.
    ///
    /// # Errors
    /// Never.
    pub fn repositories(&self) -> Result<Vec<String>, RegistryError> {
        Ok(Vec::new())
    }

    /// All tags of one.
    ///
    /// # Errors
    /// Never.
    pub fn tags(&self, _repository: &str) -> Result<Vec<String>, RegistryError> {
        Ok(Vec::new())
    }

    /// A manifest's bytes.
    ///
    /// # Errors
    /// Never.
    pub fn manifest(
        &self,
        _repository: &str,
        _digest: &Digest,
    ) -> Result<Option<Vec<u8>>, RegistryError> {
        Ok(None)
    }
}

/// Its routes.
pub fn router(_store: RegistryStore) -> axum::Router {
    axum::Router::new()
}
