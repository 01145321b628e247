//! The node's clock: set from the network's time servers (DHCP option 42), or where there is none from the boot server's `Date`
//! header, which is good to a second. A step at boot, slewing later, never to before this program was built.
//!
//! [`sntp`] reads and writes packets and [`discipline`] decides what is done about an offset, both pure; [`io`] has the socket and
//! the clock. Not a full NTP client: no filter over many samples, no drift file, no serving. One thread, which sleeps for a
//! quarter of an hour once the clock is right.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::node::ObservedClock;

use crate::transport::Transport;
use discipline::Correction;

pub mod discipline;
pub mod io;
pub mod sntp;

/// Port of time servers (RFC 5905 section 7.2).
const PORT: u16 = 123;
/// Most servers that are asked: four can tell one liar from the rest.
const MAX_SERVERS: usize = 4;
/// Between two looks while the clock is right: a little more than 17 minutes, which no server minds.
const POLL: Duration = Duration::from_secs(1024);
/// After the first failure; it doubles up to [`POLL`].
const RETRY: Duration = Duration::from_secs(1);
/// Least offset at which the second-wide clock of an HTTP server is believed more than ours.
const HTTP_PRECISION: Duration = Duration::from_secs(2);

/// What is asked, and what came of it.
#[derive(Debug, Default)]
struct Shared {
    servers: Vec<IpAddr>,
    /// Whether `servers` has changed since the thread looked.
    changed: bool,
}

/// The way to the clock's thread.
#[derive(Debug, Clone)]
pub struct Clock {
    shared: Arc<(Mutex<Shared>, Condvar)>,
}

impl Clock {
    /// Starts looking after the clock, with these servers and, where none of them answers, the `Date` of the boot servers. Each
    /// time the state changes it is told to `sink`.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn start(
        servers: Vec<IpAddr>,
        web: Vec<String>,
        transport: Transport,
        sink: impl Fn(ObservedClock) + Send + 'static,
    ) -> std::io::Result<Self> {
        let clock = Self { shared: Arc::default() };
        clock.set_servers(servers);
        let shared = Arc::clone(&clock.shared);
        let builder = std::thread::Builder::new().name("clock".to_owned()).stack_size(128 << 10);
        builder.spawn(move || Keeper { shared, web, transport, told: None }.run(sink))?;
        Ok(clock)
    }

    /// Takes over the servers that the network names now; they are asked at once when they are others than before.
    pub fn set_servers(&self, servers: Vec<IpAddr>) {
        let (shared, news) = &*self.shared;
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.servers != servers {
            *shared = Shared { servers, changed: true };
            news.notify_one();
        }
    }
}

/// What the thread has.
struct Keeper {
    shared: Arc<(Mutex<Shared>, Condvar)>,
    web: Vec<String>,
    transport: Transport,
    told: Option<ObservedClock>,
}

/// One look: where the time came from and how far ours was off, in nanoseconds.
struct Found {
    source: String,
    offset_ns: i128,
}

impl Keeper {
    fn run(mut self, sink: impl Fn(ObservedClock)) {
        if let Some(behind) = io::not_before_build() {
            log::warn!("{behind}");
        }
        let mut set = false;
        let mut retry = RETRY;
        // Servers that have told us to go away (RFC 5905 section 7.4).
        let mut refused: Vec<IpAddr> = Vec::new();
        loop {
            let servers = self.servers(&refused);
            let looked = self.look(&servers, &mut refused);
            let (pause, state) = match looked.and_then(|found| apply(&found, !set)) {
                Ok(state) => {
                    (set, retry) = (true, RETRY);
                    (POLL, state)
                }
                Err(problem) => {
                    let pause = retry;
                    retry = retry.saturating_mul(2).min(POLL);
                    let last = self.told.clone().unwrap_or_default();
                    (pause, ObservedClock { problem: Some(problem), ..last })
                }
            };
            if self.told.as_ref() != Some(&state) {
                sink(state.clone());
                self.told = Some(state);
            }
            self.sleep(pause);
        }
    }

    fn servers(&self, refused: &[IpAddr]) -> Vec<SocketAddr> {
        let mut shared = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared.changed = false;
        let good = shared.servers.iter().filter(|server| !refused.contains(server));
        good.take(MAX_SERVERS).map(|server| SocketAddr::new(*server, PORT)).collect()
    }

    /// Until the pause is over or the network names other servers.
    fn sleep(&self, pause: Duration) {
        let (shared, news) = &*self.shared;
        let until = Instant::now() + pause;
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        while !shared.changed {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            shared = news.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn look(&self, servers: &[SocketAddr], refused: &mut Vec<IpAddr>) -> Result<Found, String> {
        let asked = if servers.is_empty() {
            Err("the network names no time server (DHCP option 42)".to_owned())
        } else {
            io::query(servers, refused)
        };
        let problem = match asked {
            Ok((source, sample)) => {
                return Ok(Found { source: source.ip().to_string(), offset_ns: sample.offset_ns });
            }
            Err(problem) => problem,
        };
        for url in &self.web {
            match io::ask_web(&self.transport, url) {
                Ok(offset_ns) => {
                    let small = offset_ns.unsigned_abs() < HTTP_PRECISION.as_nanos();
                    let offset_ns = if small { 0 } else { offset_ns };
                    return Ok(Found { source: url.clone(), offset_ns });
                }
                Err(why) => log::debug!("time of {url}: {why}"),
            }
        }
        Err(problem)
    }
}

/// Corrects the clock.
fn apply(found: &Found, first: bool) -> Result<ObservedClock, String> {
    let now = io::now_ns();
    let correction = discipline::correct(found.offset_ns, first, now)
        .map_err(|error| format!("{}: {error}", found.source))?;
    match correction {
        Correction::None => {}
        Correction::Slew(ns) => io::slew(ns).map_err(|error| format!("adjtime(3): {error}"))?,
        Correction::Step(ns) => {
            io::step(ns).map_err(|error| format!("clock_settime(2): {error}"))?;
            log::info!("the clock was {} ms off, set by {}", -ns / 1_000_000, found.source);
        }
    }
    let offset_us = i64::try_from(found.offset_ns / 1000).unwrap_or(i64::MAX);
    let at = u64::try_from(io::now_ns() / 1_000_000_000).unwrap_or(0);
    Ok(ObservedClock { source: Some(found.source.clone()), offset_us, at, problem: None })
}
