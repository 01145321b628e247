//! A client on the host that asks a service once a millisecond, and what it saw.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use tests::namespace::Entrance;

/// From one request's beginning to the next one's, where the answer comes sooner.
const PACE: Duration = Duration::from_millis(1);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// One request: when its outcome was known, and whether that was an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Outcome {
    at: Instant,
    answered: bool,
}

/// What happened in a stretch of time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Requests.
    pub(super) requests: usize,
    /// Those that had no answer.
    pub(super) failed: usize,
    /// The longest time from one answer to the next.
    pub(super) gap: Duration,
}

/// A client that asks until it is dropped.
#[derive(Debug)]
pub(super) struct Client {
    stop: Arc<AtomicBool>,
    outcomes: Arc<Mutex<Vec<Outcome>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Client {
    /// Asks at this address from inside the namespace.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(entrance: Entrance, address: SocketAddr) -> Result<Self> {
        let (stop, outcomes) =
            (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<Outcome>>>::default());
        let (flag, list) = (Arc::clone(&stop), Arc::clone(&outcomes));
        let work = move || {
            entrance.inside(|| {
                while !flag.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let answered = ask(address).is_ok();
                    let at = Instant::now();
                    list.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(Outcome { at, answered });
                    std::thread::sleep(PACE.saturating_sub(begun.elapsed()));
                }
            })
        };
        let thread = std::thread::Builder::new().name("bench-client".to_owned()).spawn(work);
        Ok(Self { stop, outcomes, thread: Some(thread.context("cannot start a client thread")?) })
    }

    /// What it has seen from the last answer before this moment on.
    pub(super) fn since(&self, start: Instant) -> Seen {
        seen(&self.outcomes.lock().unwrap_or_else(PoisonError::into_inner), start)
    }

    /// Ends it.
    ///
    /// # Errors
    /// When the namespace could not be entered.
    pub(super) fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it has ended already")?;
        thread.join().map_err(|_| anyhow!("a client panicked"))?
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn seen(outcomes: &[Outcome], start: Instant) -> Seen {
    let mut seen = Seen::default();
    let before = outcomes.iter().rev().find(|it| it.at < start && it.answered);
    let mut last = before.map(|it| it.at);
    for outcome in outcomes.iter().filter(|it| it.at >= start) {
        seen.requests += 1;
        if !outcome.answered {
            seen.failed += 1;
            continue;
        }
        if let Some(last) = last.replace(outcome.at) {
            seen.gap = seen.gap.max(outcome.at.saturating_duration_since(last));
        }
    }
    seen
}

/// One request on a connection of its own.
pub(super) fn ask(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    // Whole: the head, and a body that ends with its line.
    match answer.strip_prefix("HTTP/1.1 200 ") {
        Some(_) if answer.ends_with("}\n") => Ok(answer),
        _ => Err(anyhow!("no answer: {answer:?}")),
    }
}

#[cfg(test)]
mod tests_of_seeing {
    use super::*;

    #[test]
    fn a_gap_begins_with_the_last_answer_before() {
        let start = Instant::now();
        let outcomes: Vec<Outcome> =
            [(0, true), (1, true), (2, false), (9, false), (12, true), (14, true)]
                .map(|(ms, answered)| Outcome { at: start + Duration::from_millis(ms), answered })
                .to_vec();
        let seen = seen(&outcomes, start + Duration::from_millis(2));
        assert_eq!(seen, Seen { requests: 4, failed: 2, gap: Duration::from_millis(11) });
    }
}
