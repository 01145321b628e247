//! How long a service was away, as a client sees it: asked again and again, the longest time without an answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::client::agent;
use crate::namespace::Entrance;
use crate::wait;

/// Pause between two questions: the measure's resolution, and what an emulated node can answer beside its work.
const EVERY: Duration = Duration::from_millis(5);
/// How long one question may take: a node that is rolled answers "connection refused" at once.
const QUESTION: Duration = Duration::from_secs(2);

/// What a probe saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gap {
    /// Answers that came.
    pub answers: u64,
    /// Questions that failed.
    pub failures: u64,
    /// The longest time from one answer to the next.
    pub longest: Duration,
}

/// Answers and failures in the order they came, folded into a [`Gap`].
#[derive(Debug, Default)]
struct Folding {
    gap: Gap,
    last: Option<Instant>,
}

impl Folding {
    fn question(&mut self, answered: bool, now: Instant) {
        if !answered {
            self.gap.failures += 1;
            return;
        }
        if let Some(last) = self.last.replace(now) {
            self.gap.longest = self.gap.longest.max(now.saturating_duration_since(last));
        }
        self.gap.answers += 1;
    }
}

/// A client that asks until it is told to stop.
#[derive(Debug)]
pub struct Probe {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Gap>>>,
}

impl Probe {
    /// Asks this URL from inside the lab until stopped.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(entrance: Entrance, url: String) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("lab-probe".to_owned())
            .spawn(move || entrance.inside(|| ask(&url, &flag)))
            .context("cannot start a probe thread")?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Stops, and says what was seen.
    ///
    /// # Errors
    /// When the lab could not be entered.
    pub fn stop(mut self) -> Result<Gap> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the probe was stopped already")?;
        thread.join().map_err(|_| anyhow!("the probe panicked"))?
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn ask(url: &str, stop: &AtomicBool) -> Gap {
    let agent = agent(QUESTION);
    let mut folding = Folding::default();
    while !stop.load(Ordering::Relaxed) {
        let answered = agent.get(url).call().is_ok_and(|mut answer| {
            answer.status() == 200 && answer.body_mut().read_to_vec().is_ok()
        });
        folding.question(answered, Instant::now());
        if wait::pause(EVERY).is_err() {
            break;
        }
    }
    folding.gap
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_is_the_longest_time_between_two_answers() {
        let start = Instant::now();
        let mut folding = Folding::default();
        for (ms, answered) in
            [(0, true), (10, true), (20, false), (70, false), (90, true), (95, true)]
        {
            folding.question(answered, start + Duration::from_millis(ms));
        }
        let seen = Gap { answers: 4, failures: 2, longest: Duration::from_millis(80) };
        assert_eq!(folding.gap, seen);
    }
}
