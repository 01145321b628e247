//! Garbage collection by itself, again and again.

use std::collections::BTreeSet;
use std::time::Duration;

use protocol::ids::Digest;
use tokio::sync::watch;

use super::RegistryStore;

/// Collects every so often until `stopping` turns true, and ends silent uploads. `pinned` tells what is needed beside
/// tags.
pub async fn collect_regularly(
    store: RegistryStore,
    every: Duration,
    grace: Duration,
    pinned: impl Fn() -> BTreeSet<Digest>,
    mut stopping: watch::Receiver<bool>,
) {
    loop {
        let stop = tokio::select! {
            () = tokio::time::sleep(every) => false,
            _ = stopping.wait_for(|stop| *stop) => true,
        };
        if stop {
            return;
        }
        let (store, pinned) = (store.clone(), pinned());
        let work = move || {
            store.uploads.expire_old();
            store.collect(&pinned, grace, false)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(report)) if report.manifests.is_empty() && report.blobs == 0 => {}
            Ok(Ok(report)) => {
                let (manifests, blobs) = (report.manifests.len(), report.blobs);
                let bytes = report.bytes;
                tracing::info!(manifests, blobs, bytes, "the registry's garbage is collected");
            }
            Ok(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "the registry's garbage is not collected");
            }
            Err(died) => tracing::error!(%died, "the registry's garbage is not collected"),
        }
    }
}
