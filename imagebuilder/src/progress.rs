//! How far a transfer is: bytes of all its blobs, counted by the tasks that move them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How far a push, a pull or a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of blobs moved this time.
    pub sent: u64,
    /// Bytes of blobs that were there already.
    pub skipped: u64,
    /// Bytes of all blobs.
    pub total: u64,
}

/// Called whenever the progress changes, from any thread; it must be quick.
pub type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// Counts bytes and tells of them.
#[derive(Clone)]
pub(crate) struct Counter {
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
    pub(crate) fn new(total: u64, tell: OnProgress) -> Self {
        Self { sent: Arc::default(), skipped: Arc::default(), total, tell }
    }

    pub(crate) fn now(&self) -> Progress {
        Progress {
            sent: self.sent.load(Ordering::Relaxed),
            skipped: self.skipped.load(Ordering::Relaxed),
            total: self.total,
        }
    }

    /// Bytes that need not be moved.
    pub(crate) fn skip(&self, bytes: u64) {
        self.skipped.fetch_add(bytes, Ordering::Relaxed);
        (self.tell)(self.now());
    }

    /// Counts one blob.
    pub(crate) fn meter(&self) -> Meter {
        Meter { counter: self.clone(), counted: Arc::default() }
    }
}

/// Counts the bytes of one blob, which may go back when a transfer was cut. Only one task at a time uses it.
#[derive(Debug, Clone)]
pub(crate) struct Meter {
    counter: Counter,
    counted: Arc<AtomicU64>,
}

impl Meter {
    pub(crate) fn add(&self, bytes: u64) {
        self.counted.fetch_add(bytes, Ordering::Relaxed);
        self.counter.sent.fetch_add(bytes, Ordering::Relaxed);
        (self.counter.tell)(self.counter.now());
    }

    /// So many bytes of the blob are really there.
    pub(crate) fn set(&self, bytes: u64) {
        let before = self.counted.swap(bytes, Ordering::Relaxed);
        self.counter.sent.fetch_add(bytes, Ordering::Relaxed);
        self.counter.sent.fetch_sub(before, Ordering::Relaxed);
        (self.counter.tell)(self.counter.now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_off_is_taken_back() {
        let counter = Counter::new(100, Arc::new(|_| {}));
        let (one, other) = (counter.meter(), counter.meter());
        one.add(30);
        other.add(20);
        one.set(10);
        counter.skip(40);
        assert_eq!(counter.now(), Progress { sent: 30, skipped: 40, total: 100 });
        one.set(40);
        assert_eq!(counter.now().sent, 60);
    }
}
