//! An ImageSet out of an OCI layout into a registry: blobs that it lacks, several at a time, then manifests, then tags.
//!
//! A push that breaks off leaves no tag behind; the next one sends only what is missing.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use oci_distribution::RegistryOperation;
use oci_distribution::errors::OciDistributionError;
use protocol::ids::Digest;
use protocol::oci::Descriptor;
use protocol::reference::Reference;
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use crate::build::{BuildError, BuiltSet, image_tag};
use crate::client::{Options, Registry, RegistryError};

/// Bytes that are read from a blob at a time.
const CHUNK: usize = 1 << 20;

/// How far a push is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of blobs sent in this push.
    pub sent: u64,
    /// Bytes of blobs that the registry had already.
    pub skipped: u64,
    /// Bytes of all blobs of the set.
    pub total: u64,
}

/// Called whenever the progress changes, from any thread; it must be quick.
pub type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The set, pinned: VERSION and digest.
    pub reference: Reference,
    /// Digest of the set's index.
    pub digest: Digest,
    /// Bytes sent and skipped.
    pub progress: Progress,
}

/// Why a push failed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The layout cannot be read.
    #[error("cannot read what is to be pushed")]
    Layout(#[from] BuildError),
    /// The registry did not take it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Counts bytes and tells of them.
#[derive(Clone)]
struct Counter {
    sent: Arc<AtomicU64>,
    skipped: Arc<AtomicU64>,
    total: u64,
    tell: OnProgress,
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Counter({:?})", self.now())
    }
}

impl Counter {
    fn now(&self) -> Progress {
        Progress {
            sent: self.sent.load(Ordering::Relaxed),
            skipped: self.skipped.load(Ordering::Relaxed),
            total: self.total,
        }
    }

    fn send(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        (self.tell)(self.now());
    }

    fn take_back(&self, bytes: u64) {
        self.sent.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn skip(&self, bytes: u64) {
        self.skipped.fetch_add(bytes, Ordering::Relaxed);
        (self.tell)(self.now());
    }
}

/// Pushes the set to the registry and repository of `reference`. The index is tagged VERSION, every image manifest
/// VERSION-IMAGENAME; a tag in `reference` other than VERSION is set on the index too. A digest in it is ignored.
///
/// # Errors
/// If the layout cannot be read, or the registry cannot be reached or refuses.
pub async fn push(
    built: &BuiltSet,
    reference: &Reference,
    options: &Options,
    on_progress: OnProgress,
) -> Result<Pushed, PushError> {
    let registry = Registry::new(reference, options)?;
    let blobs = built.blobs()?;
    let counter = Counter {
        sent: Arc::default(),
        skipped: Arc::default(),
        total: blobs.iter().map(|blob| blob.size).sum(),
        tell: on_progress,
    };
    let version = built.set.version.to_string();
    let here = registry.at(&version);
    registry
        .persistently("", || registry.client.auth(&here, &registry.auth, RegistryOperation::Push))
        .await?;
    stream::iter(&blobs)
        .map(|blob| push_blob(&registry, built, blob, &counter))
        .buffer_unordered(options.parallel.max(1))
        .try_collect::<()>()
        .await?;

    for manifest in &built.manifests {
        push_manifest(&registry, built, manifest, &manifest.digest.to_string()).await?;
    }
    for (name, manifest) in &built.images {
        push_manifest(&registry, built, manifest, &image_tag(&built.set, name)).await?;
    }
    push_manifest(&registry, built, &built.index, &version).await?;
    if let Some(tag) = reference.tag.as_deref().filter(|tag| *tag != version) {
        push_manifest(&registry, built, &built.index, tag).await?;
    }
    let digest = built.index.digest;
    let reference = reference.with_tag(&version).with_digest(digest);
    Ok(Pushed { reference, digest, progress: counter.now() })
}

async fn push_blob(
    registry: &Registry,
    built: &BuiltSet,
    blob: &Descriptor,
    counter: &Counter,
) -> Result<(), PushError> {
    let digest = blob.digest.to_string();
    let what = format!("/blobs/{digest}");
    let here = registry.at(&digest);
    let (here, digest) = (&here, digest.as_str());
    if registry.persistently(&what, || registry.client.blob_exists(here, digest)).await? {
        counter.skip(blob.size);
        return Ok(());
    }
    let path = built.blob_path(&blob.digest);
    let path = path.as_path();
    let send = || async move {
        let of_this_attempt = Arc::new(AtomicU64::new(0));
        let file = File::open(path).await?;
        let content = chunks(file, counter.clone(), Arc::clone(&of_this_attempt));
        let result = registry.client.push_blob_stream(here, content, digest, Some(blob.size)).await;
        match result {
            // Some registries leave the address of the blob out.
            Ok(_) | Err(OciDistributionError::RegistryNoLocationError) => Ok(()),
            Err(error) => {
                counter.take_back(of_this_attempt.load(Ordering::Relaxed));
                Err(error)
            }
        }
    };
    Ok(registry.persistently(&what, send).await?)
}

fn chunks(
    file: File,
    counter: Counter,
    of_this_attempt: Arc<AtomicU64>,
) -> impl Stream<Item = Result<Bytes, OciDistributionError>> + Send + 'static {
    stream::try_unfold(file, move |mut file| {
        let (counter, of_this_attempt) = (counter.clone(), Arc::clone(&of_this_attempt));
        async move {
            let mut chunk = Vec::with_capacity(CHUNK);
            let read = (&mut file).take(CHUNK as u64).read_to_end(&mut chunk).await?;
            if read == 0 {
                return Ok::<_, io::Error>(None);
            }
            of_this_attempt.fetch_add(read as u64, Ordering::Relaxed);
            counter.send(read as u64);
            Ok(Some((Bytes::from(chunk), file)))
        }
    })
    .map_err(OciDistributionError::from)
}

async fn push_manifest(
    registry: &Registry,
    built: &BuiltSet,
    manifest: &Descriptor,
    key: &str,
) -> Result<(), PushError> {
    let bytes = Bytes::from(built.document(manifest)?);
    let content_type = manifest.media_type.parse().map_err(|_| RegistryError::Client {
        cause: format!("`{}` is not a media type", manifest.media_type),
    });
    let content_type = content_type?;
    let here = registry.at(key);
    let what = format!("/manifests/{key}");
    let send =
        || registry.client.push_manifest_raw(&here, bytes.clone(), Clone::clone(&content_type));
    registry.persistently(&what, send).await?;
    Ok(())
}
