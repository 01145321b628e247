//! A reference to its digest, and a manifest by reference. The digest is that of the bytes that came, never of a header.

use protocol::ids::Digest;
use protocol::oci::{MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST, MEDIA_INDEX, MEDIA_MANIFEST};
use protocol::reference::Reference;

use crate::client::{Options, Registry, RegistryError};

/// Media types of manifests that are asked for.
const ACCEPTED: [&str; 4] = [MEDIA_INDEX, MEDIA_MANIFEST, MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST];

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
    let key = reference.manifest_key();
    let (at, what) = (registry.at(&key), format!("/manifests/{key}"));
    let (bytes, _) = registry
        .persistently(&what, || registry.client.pull_manifest_raw(&at, &registry.auth, &ACCEPTED))
        .await?;
    let found = Digest::of(&bytes);
    if reference.digest.is_some_and(|expected| expected != found) {
        let url = format!("{}{what}", reference.api_base());
        return Err(RegistryError::Corrupt { url, found });
    }
    Ok((found, bytes.to_vec()))
}
