//! The agent's signs of life to PID 1, which feeds the watchdog by them. They cost no wake-up: they are given by whoever
//! wakes anyway. Once there is a server, that is the thread of the long polls; it vouches for the loop, too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::Init;

/// How often the loop gives a sign while nobody else does.
pub(super) const PACE: Duration = Duration::from_secs(10);

/// What the loop and the reports' thread share.
#[derive(Debug, Clone)]
pub(super) struct Vital {
    init: Init,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The loop waits for events: nothing is wrong with it however long it does.
    waits: AtomicBool,
    turns: AtomicU64,
    /// The turns at the last sign that the polls' thread has given.
    seen: AtomicU64,
}

impl Vital {
    /// Signs go to this PID 1; nowhere outside Layer0.
    pub(super) fn new(init: Init) -> Self {
        Self { init, state: Arc::default() }
    }

    /// The loop goes to wait: a sign by itself.
    pub(super) fn loop_waits(&self) {
        self.state.waits.store(true, Ordering::Release);
        self.beat();
    }

    /// The loop has an event.
    pub(super) fn loop_turns(&self) {
        self.state.turns.fetch_add(1, Ordering::AcqRel);
        self.state.waits.store(false, Ordering::Release);
    }

    /// Another thread's sign, which it gives only if the loop is alive as well.
    pub(super) fn vouch(&self) {
        if self.state.alive() {
            self.beat();
        }
    }

    fn beat(&self) {
        if let Some(init) = &self.init {
            init.beat();
        }
    }
}

impl State {
    fn alive(&self) -> bool {
        let turns = self.turns.load(Ordering::Acquire);
        let moved = self.seen.swap(turns, Ordering::AcqRel) != turns;
        moved || self.waits.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_neither_waits_nor_turns_gets_no_sign_from_others() {
        let vital = Vital::new(None);
        vital.loop_waits();
        assert!(vital.state.alive() && vital.state.alive());
        vital.loop_turns();
        assert!(vital.state.alive(), "it has turned");
        assert!(!vital.state.alive(), "it hangs in that turn");
        vital.loop_waits();
        assert!(vital.state.alive());
    }
}
