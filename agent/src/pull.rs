//! Brings an ImageSet from a registry into the store: index, description, manifests, configs, then every missing layer,
//! several at once, each in one pipeline.
//!
//! ```text
//! socket -> sha256 -> gzip | zstd | plain -> sha256 (diff id) -> tar -> layers/tmp-… -> rename -> layers/HEX
//!           (digest, declared size)          (ratio guard)
//! socket -> sha256 -> filesystems/tmp-… -> mounted for a moment -> rename -> filesystems/HEX
//! ```
//! The second is an image's mount form, taken in the place of its layers where the node can mount it (`forms`).
//! Nothing is written twice and nothing is in the store before its digest was right. A broken connection is resumed
//! where it broke, in the middle of the pipeline. Does not mount and does not decide which set a node wants.

pub mod budget;
mod error;
mod forms;
pub mod gzip;
mod handover;
pub mod image;
mod plan;
pub mod signed;
mod source;
mod unpack;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::ids::{Digest, Name};
use protocol::imageset::ImageSet;
use protocol::oci::mount::MountForm;
use protocol::oci::{MAX_MANIFEST_BYTES, RunConfig};
use protocol::reference::Reference;
use protocol::signature::Policy;

use crate::cache::Cache;
use crate::layer::Limits;
use crate::mounts::{ImageRoot, lower};
use crate::registry::Registry;
use crate::registry::table::Registries;
use crate::store::{Claim, Collected, Pin, Store};
use budget::{Budget, Promise};
pub use error::PullError;
use forms::Forms;
use plan::{Content, DocumentKind, Job, Plan, Root, plan};
use source::Source;
use unpack::Way;

/// Layers that are fetched at the same time.
pub const PARALLEL_LAYERS: usize = 4;
/// Tries for one blob, and for one position in it, before the pull fails.
pub const TRIES: u32 = 3;
/// Longest pause before the second try; it doubles from try to try, and the pause is random below it (full jitter).
pub const BACKOFF: Duration = Duration::from_millis(500);
/// How often a pause looks whether the pull was cancelled.
const PAUSE_STEP: Duration = Duration::from_millis(50);

/// How far a pull is. Shared with whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Compressed bytes of layers received so far.
    pub bytes: AtomicU64,
    /// Compressed bytes of the layers that were not in the store when the pull began; 0 until that is known.
    pub total: AtomicU64,
}

/// An ImageSet whose layers all lie in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledSet {
    /// Its description.
    pub set: ImageSet,
    /// The digest of its index.
    pub digest: Digest,
    /// Its images, by name.
    pub images: BTreeMap<Name, PulledImage>,
    /// Compressed bytes of layers that this pull fetched; 0 for a set that was there, in the store or on the cache disk.
    pub bytes: u64,
    /// Keeps all of it from being collected, from the pull to the unmounting of the last root made of it.
    pin: Arc<Pin>,
}

/// An image of a pulled set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledImage {
    /// How it is run.
    pub config: RunConfig,
    /// What its root is made of.
    pub root: ImageRoot,
}

/// How often and how fast a failed fetch is repeated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retry {
    pub(crate) tries: u32,
    pub(crate) backoff: Duration,
}

impl Retry {
    /// Waits before try number `failures + 1`; false if told to stop meanwhile.
    fn pause(&self, failures: u32, stop: &dyn Fn() -> bool) -> bool {
        use std::hash::{BuildHasher, Hasher};
        let longest = self.backoff.saturating_mul(1 << failures.saturating_sub(1).min(6));
        // std's hash keys are random; the node needs no generator for a pause.
        let random = std::hash::RandomState::new().build_hasher().finish();
        let random = u32::try_from(random >> 32).unwrap_or(0);
        let mut left = longest.mul_f64(f64::from(random) / f64::from(u32::MAX));
        while !left.is_zero() {
            if stop() {
                return false;
            }
            let step = left.min(PAUSE_STEP);
            std::thread::sleep(step);
            left -= step;
        }
        !stop()
    }
}

/// Pulls sets into one store.
#[derive(Debug, Clone)]
pub struct Puller {
    store: Store,
    registries: Registries,
    retry: Retry,
    limits: Limits,
    policy: Policy,
    forms: Vec<MountForm>,
    budget: Budget,
    cache: Cache,
}

/// What one pull is about.
struct Pull<'a> {
    puller: &'a Puller,
    registry: &'a Registry,
    progress: &'a Progress,
    cancel: &'a AtomicBool,
    /// Set by the first layer that fails.
    failed: AtomicBool,
}

impl Puller {
    /// Pulls into this store from what is known of registries. Sets need not be signed: see [`Puller::with_policy`].
    #[must_use]
    pub fn new(store: Store, registries: Registries) -> Self {
        let retry = Retry { tries: TRIES, backoff: BACKOFF };
        let (limits, policy, forms, budget) = Default::default();
        let cache = Cache::none();
        let puller = Self { store, registries, retry, limits, policy, forms, budget, cache };
        puller.with_mount_forms(&MountForm::ALL)
    }

    /// The same puller, which asks this cache first and keeps there what it fetches.
    #[must_use]
    pub fn with_cache(self, cache: Cache) -> Self {
        Self { cache, ..self }
    }

    /// The cache of blobs that outlive a reboot.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// What it knows of registries.
    #[must_use]
    pub fn registries(&self) -> &Registries {
        &self.registries
    }

    /// Takes these mount forms only, the best first. All that the kernel can mount are taken otherwise; with none, every
    /// image is unpacked.
    #[must_use]
    pub fn with_mount_forms(mut self, forms: &[MountForm]) -> Self {
        self.forms = forms.to_vec();
        self
    }

    /// The store it pulls into.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Pulls a set: what is missing is fetched, the rest is taken from the store. Blocks; layers are fetched by up to
    /// [`PARALLEL_LAYERS`] threads, and `cancel` is looked at between reads (a stalled read ends after the transport's
    /// stall timeout). A reference without digest is resolved by its tag first.
    ///
    /// # Errors
    /// On the first document or layer that cannot be had; what was complete until then stays in the store.
    pub fn pull_set(
        &self,
        reference: &Reference,
        progress: &Progress,
        cancel: &AtomicBool,
    ) -> Result<PulledSet, PullError> {
        let registry = self.registries.open(reference)?.with_cache(self.cache.clone());
        let failed = AtomicBool::new(false);
        let pull = Pull { puller: self, registry: &registry, progress, cancel, failed };
        let digest = pull.target(reference)?;
        let mut pin = self.store.pin([digest]);
        pull.verify(reference, &digest)?;
        let mut preferred = self.forms.clone();
        loop {
            let forms = Forms { preferred: &preferred, usable: &lower::usable, stored: None };
            let plan = plan(&digest, forms, &mut |digest, size, kind| {
                pin.add([*digest]);
                pull.document(digest, size, kind)
            })?;
            pin.add(plan.closure.iter().copied());
            match pull.layers(&plan) {
                Err(PullError::Unmountable { digest, form, source }) => {
                    log::warn!("pull: {digest}: {}; going on without {form}", chain(&source));
                    preferred.retain(|known| *known != form);
                    pull.failed.store(false, Ordering::Relaxed);
                }
                fetched => return self.pulled(plan, fetched?).ok_or(PullError::Cancelled),
            }
        }
    }

    /// A set that lies in the store completely, without any network. `None` if a part is missing or damaged, or if no
    /// installed key vouches for it.
    #[must_use]
    pub fn reopen(&self, digest: &Digest) -> Option<PulledSet> {
        if !self.is_verified(digest, None) {
            return None;
        }
        let plan = self.stored_plan(digest)?;
        self.pulled(plan, 0)
    }

    /// Removes from the store what none of these sets needs, nor any pull that is running.
    ///
    /// # Errors
    /// If something could not be removed, or a kept set's documents cannot be read: then nothing is removed.
    pub fn collect(&self, keep: &[Digest]) -> Result<Collected, PullError> {
        let mut needed = BTreeSet::new();
        for digest in keep {
            let plan = self.stored_plan(digest).ok_or_else(|| PullError::Set {
                digest: *digest,
                reason: "the set is to be kept but is not in the store".to_owned(),
            })?;
            needed.extend(plan.closure);
        }
        Ok(self.store.gc(&needed)?)
    }

    fn stored_plan(&self, digest: &Digest) -> Option<Plan> {
        let missing = |digest: &Digest| PullError::Set {
            digest: *digest,
            reason: "not in the store".to_owned(),
        };
        let (preferred, stored) = (&self.forms[..], Some(&self.store));
        let forms = Forms { preferred, usable: &lower::usable, stored };
        let planned = plan(digest, forms, &mut |digest, _, _| {
            self.store.blob(digest)?.ok_or_else(|| missing(digest))
        });
        planned
            .map_err(|error| log::debug!("pull: {digest} cannot be re-opened: {}", chain(&error)))
            .ok()
    }

    fn pulled(&self, plan: Plan, bytes: u64) -> Option<PulledSet> {
        // Before the look whether the layers are there: a collection may be under way.
        let pin = Arc::new(self.store.pin(plan.closure.iter().copied()));
        let mut images = BTreeMap::new();
        for (name, (config, root)) in plan.images {
            let root = match root {
                Root::Layers(digests) => {
                    let layers = digests.iter().map(|digest| self.store.layer(digest));
                    ImageRoot::Layers(layers.collect::<Option<_>>()?)
                }
                Root::FileSystem(form, digest) => {
                    ImageRoot::FileSystem(self.store.file_system(form, &digest)?)
                }
            };
            images.insert(name, PulledImage { config, root });
        }
        Some(PulledSet { set: plan.set, digest: plan.digest, images, bytes, pin })
    }
}

impl Pull<'_> {
    /// The digest of what a reference stands for now; where a tag had to be looked up, its document is in the store.
    fn target(&self, reference: &Reference) -> Result<Digest, PullError> {
        if let Some(digest) = reference.digest {
            return Ok(digest);
        }
        let tag = reference.manifest_key();
        if let Some(digest) = self.known_under(&tag) {
            return Ok(digest);
        }
        let (digest, bytes) = self.retried(|| Ok(self.registry.resolve(&tag)?))?;
        self.puller.store.put_blob(&bytes)?;
        Ok(digest)
    }

    /// What a tag points to now, where that is in the store already. An empty store is not worth the question.
    fn known_under(&self, tag: &str) -> Option<Digest> {
        let store = &self.puller.store;
        if store.is_empty() {
            return None;
        }
        let digest = self.registry.digest_of(tag)?;
        store.blob(&digest).ok().flatten().map(|_| digest)
    }

    fn stopped(&self) -> bool {
        self.cancel.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed)
    }

    /// Tries a fetch up to [`TRIES`] times.
    fn retried<T>(&self, mut fetch: impl FnMut() -> Result<T, PullError>) -> Result<T, PullError> {
        let retry = &self.puller.retry;
        let mut failures = 0;
        loop {
            if self.stopped() {
                return Err(PullError::Cancelled);
            }
            let given_up = self.registry.given_up();
            match fetch() {
                // It was the fault of a mirror or of the cache, which is left: there are fewer of them each time.
                Err(error) if self.registry.given_up() > given_up => {
                    log::warn!("pull: {}", chain(&error));
                }
                Err(error) if error.is_worth_a_retry() && failures + 1 < retry.tries => {
                    failures += 1;
                    log::warn!("pull: try {failures} of {}: {}", retry.tries, chain(&error));
                    if !retry.pause(failures, &|| self.stopped()) {
                        return Err(PullError::Cancelled);
                    }
                }
                done => return done,
            }
        }
    }

    /// A document from the store, else from the registry.
    fn document(
        &self,
        digest: &Digest,
        size: Option<u64>,
        kind: DocumentKind,
    ) -> Result<Vec<u8>, PullError> {
        let wrong_size = |found: u64| PullError::Size {
            url: match kind {
                DocumentKind::Manifest => self.registry.manifest_url(&digest.to_string()),
                DocumentKind::Blob => self.registry.blob_url(digest),
            },
            expected: size.unwrap_or(found),
            found,
        };
        if size.is_some_and(|size| size > MAX_MANIFEST_BYTES as u64) {
            let reason = "a descriptor declares more than 4 MiB for a document".to_owned();
            return Err(PullError::Set { digest: *digest, reason });
        }
        let bytes = match self.puller.store.blob(digest)? {
            Some(bytes) => bytes,
            None => {
                let bytes = self.retried(|| match kind {
                    DocumentKind::Manifest => Ok(self.registry.manifest(digest)?),
                    DocumentKind::Blob => Ok(self.registry.small_blob(digest)?),
                })?;
                self.puller.store.put_blob(&bytes)?;
                bytes
            }
        };
        match size.is_some_and(|size| size != bytes.len() as u64) {
            true => Err(wrong_size(bytes.len() as u64)),
            false => Ok(bytes),
        }
    }

    /// Fetches the layers that are missing, and returns how many compressed bytes that were.
    fn layers(&self, plan: &Plan) -> Result<u64, PullError> {
        let store = &self.puller.store;
        let missing = plan.layers.values().filter(|job| match job.content {
            Content::Layer { .. } => store.layer(&job.digest).is_none(),
            Content::FileSystem(form) => store.file_system(form, &job.digest).is_none(),
        });
        let mut missing: Vec<&Job> = missing.collect();
        // The largest first: the last thread to finish then has the least left to do.
        missing.sort_by_key(|job| std::cmp::Reverse(job.size));
        let needed = missing.iter().fold(0_u64, |sum, job| sum.saturating_add(job.size));
        self.progress.total.store(needed, Ordering::Relaxed);
        let promise = self.promise(&missing)?;
        // Fewer layers than processors: each may have two.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let two_threads = missing.len() < processors;
        let (next, fetched) = (AtomicUsize::new(0), AtomicU64::new(0));
        let first_error = Mutex::new(None);
        let work = || {
            while let Some(job) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                match self.retried(|| self.fetch(job, two_threads, &promise)) {
                    Ok(bytes) => {
                        promise.kept(job);
                        fetched.fetch_add(bytes, Ordering::Relaxed);
                    }
                    Err(error) => {
                        let mut first = first_error.lock().unwrap_or_else(PoisonError::into_inner);
                        // What the others then say is only that they were stopped.
                        first.get_or_insert(error);
                        self.failed.store(true, Ordering::Relaxed);
                        return;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..PARALLEL_LAYERS.min(missing.len()) {
                scope.spawn(work);
            }
            work();
        });
        match first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(fetched.into_inner()),
        }
    }

    /// Fetches what a job is about, and returns the bytes that came; 0 if somebody else did meanwhile.
    fn fetch(&self, job: &Job, two_threads: bool, promise: &Promise) -> Result<u64, PullError> {
        match job.content {
            Content::FileSystem(form) => self.file_system(job, form),
            Content::Layer { diff_id, compression } => {
                let draw = promise.draw(job);
                let way = Way { compression, two_threads, draw: &draw };
                let bytes = self.layer(job, diff_id, way)?;
                draw.keep();
                Ok(bytes)
            }
        }
    }

    /// Counts what somebody else has fetched meanwhile as received.
    fn was_there(&self, job: &Job) -> u64 {
        self.progress.bytes.fetch_add(job.size, Ordering::Relaxed);
        0
    }

    /// Fetches and unpacks one layer.
    fn layer(&self, job: &Job, diff_id: Digest, way: Way<'_>) -> Result<u64, PullError> {
        let stop = || self.stopped();
        let staged = match self.puller.store.claim(&job.digest, &stop)? {
            Claim::Mine(staged) => staged,
            Claim::Stopped => return Err(PullError::Cancelled),
            Claim::Ready(_) => return Ok(self.was_there(job)),
        };
        let mut source = Source::new(self.registry, job, &self.puller.retry, &stop, self.progress);
        let limits = budget::limits(job, &self.puller.limits);
        let unpacked = unpack::unpack(&mut source, way, staged.dir(), &limits);
        // A damaged blob shows as a broken archive first: the digest of the whole says which it is.
        let checked = source.finish();
        if checked.is_err() {
            source.withdraw();
        }
        checked?;
        let layer = |source| PullError::Layer { digest: job.digest, source };
        let (summary, found) = unpacked.map_err(layer)?;
        if found != diff_id {
            let (digest, expected) = (job.digest, diff_id);
            return Err(PullError::DiffId { digest, expected, found });
        }
        staged.commit()?;
        log::debug!("pull: layer {}: {summary:?}", job.digest.short());
        Ok(source.fetched())
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
