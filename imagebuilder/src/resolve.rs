//! A reference to its digest, and a manifest by reference. The digest is that of the bytes that came, never of a header.

use protocol::ids::Digest;
use protocol::reference::Reference;

use crate::client::{Options, Registry, RegistryError};

/// The digest that a reference stands for now, asked without credentials.
///
/// # Errors
/// If the registry cannot be reached, refuses or does not know it.
pub async fn digest(reference: &Reference) -> Result<Digest, RegistryError> {
    Ok(manifest(reference, &Options::default()).await?.0)
}

/// The manifest or index that a reference stands for now, with its digest.
///
/// # Errors
/// If the registry cannot be reached, refuses, does not know it, or sends other bytes than the reference's digest says.
pub async fn manifest(
    reference: &Reference,
    options: &Options,
) -> Result<(Digest, Vec<u8>), RegistryError> {
    let registry = Registry::new(reference, options)?;
    let (found, bytes) = registry.manifest(&reference.manifest_key()).await?;
    Ok((found.digest, bytes))
}

/// All tags of the reference's repository, in the registry's order.
///
/// # Errors
/// If the registry cannot be reached, refuses or does not know the repository.
pub async fn tags(reference: &Reference, options: &Options) -> Result<Vec<String>, RegistryError> {
    Registry::new(reference, options)?.tags().await
}

/// All repositories of the reference's registry, in its order.
///
/// # Errors
/// If the registry cannot be reached, refuses, or has no catalog.
pub async fn repositories(
    reference: &Reference,
    options: &Options,
) -> Result<Vec<String>, RegistryError> {
    Registry::new(reference, options)?.repositories().await
}
