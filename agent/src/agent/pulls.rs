//! Pulls under way: one thread a set, its progress readable at any time, cancelled by a flag.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use protocol::ids::{Digest, Name};
use protocol::node::PullProgress;
use protocol::reference::Reference;

use super::Sender;
use super::event::Event;
use crate::pull::{Progress, Puller};

#[derive(Debug)]
struct Pull {
    progress: Arc<Progress>,
    cancel: Arc<AtomicBool>,
    started: Instant,
}

/// The pulls.
#[derive(Debug)]
pub(super) struct Pulls {
    puller: Arc<Puller>,
    under_way: BTreeMap<Name, Pull>,
}

impl Pulls {
    /// No pulls yet.
    #[must_use]
    pub(super) fn new(puller: Puller) -> Self {
        Self { puller: Arc::new(puller), under_way: BTreeMap::new() }
    }

    /// The puller itself, for what needs no network.
    #[must_use]
    pub(super) fn puller(&self) -> &Puller {
        &self.puller
    }

    /// Whether any pull is under way.
    #[must_use]
    pub(super) fn any(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Starts a pull; it ends with [`Event::Pulled`].
    pub(super) fn start(&mut self, name: &Name, reference: Reference, events: &Sender) {
        let progress = Arc::new(Progress::default());
        let cancel = Arc::new(AtomicBool::new(false));
        let pull =
            Pull { progress: progress.clone(), cancel: cancel.clone(), started: Instant::now() };
        self.under_way.insert(name.clone(), pull);
        let (puller, events, name) = (self.puller.clone(), events.clone(), name.clone());
        super::start::thread("pull", move || {
            let result = puller.pull_set(&reference, &progress, &cancel);
            let result = result.map(Box::new).map_err(|error| super::chain(&error));
            events.send(Event::Pulled(name, result));
        });
    }

    /// Asks a pull to end.
    pub(super) fn cancel(&self, name: &Name) {
        if let Some(pull) = self.under_way.get(name) {
            pull.cancel.store(true, Ordering::Relaxed);
        }
    }

    /// Forgets a pull that ended.
    pub(super) fn ended(&mut self, name: &Name) {
        self.under_way.remove(name);
    }

    /// How far the pull of this set has come.
    #[must_use]
    pub(super) fn progress(&self, name: &Name) -> Option<PullProgress> {
        let pull = self.under_way.get(name)?;
        let bytes = pull.progress.bytes.load(Ordering::Relaxed);
        let elapsed_ms =
            u64::try_from(pull.started.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        Some(PullProgress {
            bytes,
            total: pull.progress.total.load(Ordering::Relaxed),
            bytes_per_s: bytes.saturating_mul(1000) / elapsed_ms,
        })
    }

    /// Removes what no set needs any more. What is being pulled, was pulled or is mounted is pinned by itself.
    pub(super) fn collect_garbage(&self, keep: Vec<Digest>) {
        let puller = self.puller.clone();
        super::start::thread("gc", move || {
            if let Err(error) = puller.collect(&keep) {
                log::warn!("store: {}", super::chain(&error));
            }
        });
    }
}
