//! An image out of a registry, fetched into a layout of its own, from where it is read like any other: what comes is
//! checked against the digest that the reference stands for now, and that digest is recorded in the set.

use std::path::Path;

use protocol::ids::Digest;
use protocol::oci::{self, Descriptor, Index};
use protocol::reference::Reference;

use super::SourceError;
use crate::build::Staged;
use crate::client::{Options, Registry, RegistryError};
use crate::place::{is_index, unique};
use crate::progress::Counter;

/// Fetches the image for one architecture, or for every one that there is, into the layout `out`.
pub(super) fn fetch(
    reference: &Reference,
    architecture: Option<&str>,
    options: &Options,
    out: &Path,
) -> Result<Digest, SourceError> {
    // A thread of its own: the caller may or may not be inside a runtime.
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime =
            runtime.map_err(|source| RegistryError::File { path: out.to_owned(), source })?;
        runtime.block_on(fetch_into(reference, architecture, options, out))
    };
    let cut_off = || SourceError::CutOff { reference: reference.to_string() };
    std::thread::scope(|scope| scope.spawn(work).join()).map_err(|_| cut_off())?
}

async fn fetch_into(
    reference: &Reference,
    architecture: Option<&str>,
    options: &Options,
    out: &Path,
) -> Result<Digest, SourceError> {
    let wrong = |source| SourceError::Document { path: reference.to_string().into(), source };
    let layout = |error| SourceError::Layout { source: Box::new(error) };
    let registry = Registry::new(reference, options)?;
    let (root, bytes) = registry.manifest(&reference.manifest_key()).await?;
    let staged = Staged::new(out).map_err(layout)?;
    staged.put(&root.media_type, &bytes).map_err(layout)?;
    let mut manifests = Vec::new();
    if is_index(&root) {
        let index = oci::parse_index(&bytes).map_err(wrong)?;
        for entry in platforms(&index).filter(|entry| fits(entry, architecture)) {
            let (found, bytes) = registry.manifest(&entry.digest.to_string()).await?;
            staged.put(&found.media_type, &bytes).map_err(layout)?;
            manifests.push(oci::parse_manifest(&bytes).map_err(wrong)?);
        }
    } else {
        manifests.push(oci::parse_manifest(&bytes).map_err(wrong)?);
    }
    let counter = Counter::new(0, std::sync::Arc::new(|_| {}));
    for blob in unique(manifests.iter()) {
        registry.fetch_blob(&blob, &staged.blobs, &counter.meter()).await?;
    }
    staged.install(vec![("image".to_owned(), root.clone())]).map_err(layout)?;
    Ok(root.digest)
}

fn fits(entry: &Descriptor, architecture: Option<&str>) -> bool {
    architecture.is_none_or(|wanted| {
        entry.platform.as_ref().is_some_and(|platform| platform.architecture == wanted)
    })
}

/// The images of an index that a node could run: those for Linux, one for each architecture. Attestations and images
/// for other systems are left out, and of several variants of one architecture the first one counts.
pub(super) fn platforms(index: &Index) -> impl Iterator<Item = &Descriptor> {
    let mut seen = std::collections::BTreeSet::new();
    index.manifests.iter().filter(move |entry| {
        let linux = entry.platform.as_ref().filter(|platform| platform.os == "linux");
        !is_index(entry) && linux.is_some_and(|it| seen.insert(it.architecture.clone()))
    })
}
