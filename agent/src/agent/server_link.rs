//! The link to the boot server: one thread polls the desired document, one writes the observed document.
//!
//! The agent only dials out. Both requests are idempotent; the newest report wins, older ones are never queued. The long poll is
//! the sign of life: a node to which nothing happens wakes up for nothing else.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use protocol::facts::Hardware;
use protocol::ids::NodeId;
use protocol::node::{Desired, Observed};

use super::Sender;
use super::backoff::{jitter, retry_ceiling};
use super::event::Event;
use super::vital::Vital;
use crate::channel::Channels;
use crate::transport::Transport;

/// Seconds that the server may hold the long poll. It calls a node silent that has not asked for two minutes.
const LONG_POLL_S: u64 = 30;
/// What a request may take beyond the time it is held.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A report is written at least this often, in case a server has lost it without the link breaking.
const REPEAT: Duration = Duration::from_secs(600);

/// Where the server is, and who asks.
#[derive(Debug, Clone)]
pub(super) struct ServerLink {
    /// Base URLs, in order of preference.
    pub servers: Vec<String>,
    /// The node.
    pub node: NodeId,
    /// The HTTP client.
    pub transport: Transport,
}

impl ServerLink {
    fn base(&self, attempt: u32) -> &str {
        let index =
            usize::try_from(attempt).unwrap_or(0).checked_rem(self.servers.len()).unwrap_or(0);
        self.servers.get(index).map_or("", String::as_str)
    }

    fn url(&self, attempt: u32, tail: &str) -> String {
        format!("{}/v1/nodes/{}/{tail}", self.base(attempt), self.node)
    }

    /// Polls the desired document for ever and sends each new one, and each change between reachable and not. Whoever answers
    /// after a failure is told the last report again: it may have missed it.
    pub(super) fn poll_desired(
        self,
        events: &Sender,
        channels: &Channels,
        outbox: &Outbox,
        vital: &Vital,
    ) {
        let mut known: Option<(u64, Option<String>)> = None;
        let mut failures: u32 = 0;
        let mut reachable = false;
        loop {
            vital.vouch();
            let wait = if failures == 0 { LONG_POLL_S } else { 0 };
            let tail = tail(known.as_ref(), wait);
            let timeout = REQUEST_TIMEOUT + Duration::from_secs(wait);
            match self.transport.get_json::<Desired>(&self.url(failures, &tail), timeout) {
                Ok(desired) => {
                    if !reachable {
                        outbox.repeat();
                    }
                    // What containers use is looked at whenever the agent is awake; without any nothing wakes it.
                    if !reachable || outbox.has_containers() {
                        events.send(Event::ServerReachable);
                    }
                    reachable = true;
                    if let Some(mut desired) = desired {
                        let requests = std::mem::take(&mut desired.channels);
                        channels.open(self.base(failures), requests);
                        // With nothing but channels in it, it is no news.
                        let news = (desired.version, desired.registries_tag.clone());
                        if known.replace(news.clone()) != Some(news) {
                            events.send(Event::Desired(Box::new(desired)));
                        }
                    }
                    failures = 0;
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    reachable = false;
                    vital.vouch();
                    events.send(Event::ServerUnreachable(format!(
                        "boot server: {}",
                        super::chain(&error)
                    )));
                    thread::sleep(retry_ceiling(failures).mul_f64(jitter().max(0.1)));
                }
            }
        }
    }

    /// Writes reports for ever: each new one at once, the last one again now and then.
    pub(super) fn write_observed(self, outbox: &Outbox) {
        let mut failures: u32 = 0;
        loop {
            let Some(observed) = outbox.take(REPEAT) else { continue };
            match self.transport.put_json(
                &self.url(failures, "observed"),
                &observed,
                REQUEST_TIMEOUT,
            ) {
                Ok(()) => {
                    failures = 0;
                    outbox.delivered(&observed);
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    log::debug!("report not delivered: {}", super::chain(&error));
                    outbox.put_back();
                    thread::sleep(retry_ceiling(failures).mul_f64(jitter().max(0.1)));
                }
            }
        }
    }
}

/// What is asked for: the document that comes after the known one, or one with another registry table.
fn tail(known: Option<&(u64, Option<String>)>, wait: u64) -> String {
    let Some((version, tag)) = known else { return "desired".to_owned() };
    let good = |b: u8| b.is_ascii_alphanumeric();
    let tag = tag.as_deref().filter(|tag| tag.bytes().all(good)).unwrap_or_default();
    format!("desired?after={version}&wait={wait}&registries={tag}")
}

#[derive(Debug, Default)]
struct Slot {
    report: Option<Observed>,
    fresh: bool,
    /// What was last found.
    hardware: Option<Hardware>,
    /// Whether the server has it: a report carries it only until then.
    told: bool,
}

/// The one report that waits to be written. A newer one replaces it.
#[derive(Debug, Clone, Default)]
pub(super) struct Outbox {
    shared: Arc<(Mutex<Slot>, Condvar)>,
}

impl Outbox {
    /// Puts a report in, unless it says what the last one said.
    pub(super) fn put(&self, observed: Observed) {
        let (slot, filled) = &*self.shared;
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.report.as_ref() != Some(&observed) {
            slot.report = Some(observed);
            slot.fresh = true;
            filled.notify_one();
        }
    }

    /// Makes the last report, if there is one, to be written again.
    fn repeat(&self) {
        let (slot, filled) = &*self.shared;
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        slot.fresh = slot.report.is_some();
        slot.told = false;
        filled.notify_one();
    }

    /// Whether the last report tells of a container.
    fn has_containers(&self) -> bool {
        let slot = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sets = slot.report.as_ref().map(|report| report.imagesets.as_slice());
        sets.unwrap_or_default().iter().any(|set| !set.containers.is_empty())
    }

    /// Notes the hardware, for the next report, which is due at once if it is news.
    pub(super) fn put_hardware(&self, hardware: Hardware) {
        let (slot, filled) = &*self.shared;
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.hardware.as_ref() != Some(&hardware) {
            slot.hardware = Some(hardware);
            slot.told = false;
            slot.fresh = slot.report.is_some();
            filled.notify_one();
        }
    }

    /// Firmware files that the node has not, for a sentence; none where nothing is missing.
    pub(super) fn missing_firmware(&self) -> Option<String> {
        let slot = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = &slot.hardware.as_ref()?.firmware_missing;
        let files: Vec<&str> = missing.iter().take(4).map(|it| it.file.as_str()).collect();
        (!files.is_empty()).then(|| files.join(", "))
    }

    /// A report that failed is due again. A server that was away may be another one: it is told everything.
    fn put_back(&self) {
        let mut slot = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.fresh = true;
        slot.told = false;
    }

    fn delivered(&self, observed: &Observed) {
        let mut slot = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.told |= observed.hardware.is_some() && observed.hardware == slot.hardware;
    }

    /// The report, as soon as it is fresh, or after this long all the same; None when there is none yet.
    fn take(&self, patience: Duration) -> Option<Observed> {
        let (slot, filled) = &*self.shared;
        let until = Instant::now() + patience;
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        while !slot.fresh {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            slot = filled.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        slot.fresh = false;
        let hardware = slot.hardware.clone().filter(|_| !slot.told);
        slot.report.clone().map(|report| Observed { hardware, ..report })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(desired_version: u64) -> Observed {
        let golden = include_str!("../../../protocol/golden/v1/observed.json");
        Observed { desired_version, ..serde_json::from_str(golden).expect("golden") }
    }

    #[test]
    fn the_newest_report_wins_and_the_last_one_comes_again() {
        let outbox = Outbox::default();
        assert!(outbox.take(Duration::ZERO).is_none());
        outbox.put(observed(1));
        outbox.put(observed(2));
        assert_eq!(outbox.take(Duration::from_secs(9)).expect("fresh").desired_version, 2);
        assert_eq!(outbox.take(Duration::ZERO).expect("again").desired_version, 2);
    }

    #[test]
    fn whoever_answers_after_a_failure_is_told_the_last_report_again() {
        let outbox = Outbox::default();
        outbox.repeat();
        assert!(!outbox.shared.0.lock().expect("lock").fresh, "there is none yet");
        outbox.put(observed(3));
        outbox.take(Duration::ZERO);
        outbox.repeat();
        // Which would wait for ever if it were not fresh.
        assert_eq!(outbox.take(Duration::from_secs(3600)).expect("again").desired_version, 3);
        assert!(outbox.has_containers());
        outbox.put(Observed { imagesets: Vec::new(), ..observed(4) });
        assert!(!outbox.has_containers());
    }

    #[test]
    fn the_same_report_again_is_not_fresh() {
        let outbox = Outbox::default();
        outbox.put(observed(1));
        outbox.take(Duration::ZERO);
        outbox.put(observed(1));
        let slot = outbox.shared.0.lock().expect("lock");
        assert!(!slot.fresh);
    }

    #[test]
    fn hardware_goes_with_one_report_and_again_to_a_server_that_was_away() {
        let outbox = Outbox::default();
        let hardware = Hardware { memory: 7, ..Hardware::default() };
        outbox.put_hardware(hardware.clone());
        assert!(outbox.take(Duration::ZERO).is_none(), "nobody knows yet whose it is");
        outbox.put(observed(1));
        let first = outbox.take(Duration::ZERO).expect("report");
        assert_eq!(first.hardware.as_ref(), Some(&hardware));
        outbox.delivered(&first);
        assert_eq!(outbox.take(Duration::ZERO).expect("heartbeat").hardware, None);
        outbox.put_hardware(hardware.clone());
        assert!(!outbox.shared.0.lock().expect("lock").fresh, "no news");
        outbox.put_back();
        assert_eq!(outbox.take(Duration::ZERO).expect("again").hardware, Some(hardware));
    }
}
