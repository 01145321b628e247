//! Whether containers are ready and well: what their programs say (sd_notify(3)) and what health probes find.
//!
//! ```text
//!  program ──READY=1──▶ monitor ──▶ Handle::on_status ─┐
//!                                                      ├─▶ Sink: Ready, Healthy, Unhealthy, Says
//!  Watcher: one thread, every probe of every container ┘
//! ```
//! This file is the part that decides, pure: outcomes and the time in, changes out. [`Watcher`] is the thread; what it asks
//! of a container is in `probe`. What follows from a sign (a roll goes back, a dependent starts) is decided elsewhere.

mod attempt;
mod command;
mod watcher;

use std::time::Duration;

use protocol::imageset::Health;
use protocol::node::HealthState;
use serde::{Deserialize, Serialize};

pub use attempt::fuzz_http_answer;
pub use watcher::{Sink, Watcher};

/// Pause between probes of a container that has not been healthy yet: a roll waits for that.
const EAGER: Duration = Duration::from_millis(100);

/// Something new about a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sign {
    /// Its program says that it is ready, READY=1 of sd_notify(3).
    Ready,
    /// Its probe is good, for the first time or again.
    Healthy,
    /// Its probe failed as often in a row as it may; why the last did.
    Unhealthy(String),
    /// What its program says of itself, STATUS= of sd_notify(3).
    Says(String),
}

/// What is kept of an instance in its directory, so that a new agent begins where the old one ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Remembered {
    /// The last word about its health; none before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthState>,
    /// Why it was unhealthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Remembered {
    /// What is worth remembering of a sign.
    fn of(sign: &Sign) -> Option<Self> {
        match sign {
            Sign::Healthy => Some(Self { health: Some(HealthState::Healthy), reason: None }),
            Sign::Unhealthy(why) => {
                Some(Self { health: Some(HealthState::Unhealthy), reason: Some(why.clone()) })
            }
            Sign::Ready | Sign::Says(_) => None,
        }
    }

    /// The sign again, for those who have not heard it.
    fn sign(&self) -> Option<Sign> {
        match self.health? {
            HealthState::Starting => None,
            HealthState::Healthy => Some(Sign::Healthy),
            HealthState::Unhealthy => {
                Some(Sign::Unhealthy(self.reason.clone().unwrap_or_default()))
            }
        }
    }
}

/// The health of one instance.
#[derive(Debug, Clone)]
pub struct Machine {
    start_period: Duration,
    interval: Duration,
    retries: u32,
    started: Duration,
    state: HealthState,
    failures: u32,
    next: Duration,
}

impl Machine {
    /// An instance whose program was executed at `started`, with what is remembered of it. `now` is when it is probed first.
    #[must_use]
    pub fn new(health: &Health, started: Duration, remembered: &Remembered, now: Duration) -> Self {
        Self {
            start_period: Duration::from_millis(health.start_period_ms.into()),
            interval: Duration::from_millis(health.interval_ms.into()),
            retries: health.retries,
            started,
            state: remembered.health.unwrap_or(HealthState::Starting),
            failures: 0,
            next: now,
        }
    }

    /// How it stands.
    #[must_use]
    pub fn state(&self) -> HealthState {
        self.state
    }

    /// When the next probe is due.
    #[must_use]
    pub fn due(&self) -> Duration {
        self.next
    }

    /// Takes what a probe found. The result is the change, if it made one.
    ///
    /// In the start period failures do not count. After it, `retries` failures in a row make it unhealthy, one success
    /// healthy. An instance that was healthy before the agent was replaced is so until as many probes have failed.
    pub fn take(&mut self, outcome: Result<(), String>, now: Duration) -> Option<Sign> {
        let sign = match outcome {
            Ok(()) => {
                self.failures = 0;
                let before = std::mem::replace(&mut self.state, HealthState::Healthy);
                (before != HealthState::Healthy).then_some(Sign::Healthy)
            }
            Err(_) if self.is_in_start_period(now) => None,
            Err(why) => {
                self.failures = self.failures.saturating_add(1);
                let newly = self.failures >= self.retries && self.state != HealthState::Unhealthy;
                newly.then(|| {
                    self.state = HealthState::Unhealthy;
                    Sign::Unhealthy(why)
                })
            }
        };
        let pause = match self.state {
            HealthState::Starting => self.interval.min(EAGER),
            HealthState::Healthy | HealthState::Unhealthy => self.interval,
        };
        self.next = now + pause;
        sign
    }

    fn is_in_start_period(&self, now: Duration) -> bool {
        self.state == HealthState::Starting && now < self.started + self.start_period
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A spec that nothing is started from.
    pub(super) fn spec() -> crate::containers::Spec {
        let container = serde_json::json!({"name": "web", "image": "web", "command": ["web"]});
        let place = crate::containers::Place {
            id: "web".to_owned(),
            set: "web".parse().expect("name"),
            set_digest: protocol::ids::Digest::of(b"set"),
            root: "/root".into(),
            hostname: "n1".to_owned(),
            log_dir: "/log".into(),
            restarts: 0,
            version: None,
            keeping: crate::containers::Keeping { memory: "/keep".into(), disk: None },
            facts: crate::containers::NodeFacts::default(),
        };
        let container = serde_json::from_value(container).expect("container");
        crate::containers::Spec::plan(place, &container, &protocol::oci::RunConfig::default())
            .expect("plan")
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn machine(remembered: Option<HealthState>) -> Machine {
        let health = serde_json::json!({"tcp": "127.0.0.1:80", "start_period_ms": 1000,
            "interval_ms": 200, "retries": 2});
        let health: Health = serde_json::from_value(health).expect("health");
        Machine::new(&health, ms(5000), &Remembered { health: remembered, reason: None }, ms(5000))
    }

    /// `+` is a good probe, `-` a failed one, each at the time it is due; the signs that came of them.
    fn play(machine: &mut Machine, probes: &str) -> Vec<Sign> {
        let one = |machine: &mut Machine, probe| {
            let now = machine.due();
            let outcome = if probe == '+' { Ok(()) } else { Err("refused".to_owned()) };
            machine.take(outcome, now)
        };
        probes.chars().filter_map(|probe| one(machine, probe)).collect()
    }

    #[test]
    fn failures_of_the_start_period_do_not_count() {
        let mut one = machine(None);
        assert_eq!(play(&mut one, "----------"), []);
        assert_eq!((one.due(), one.state()), (ms(6000), HealthState::Starting), "asked often");
        assert_eq!(play(&mut one, "-"), []);
        assert_eq!(play(&mut one, "-"), [Sign::Unhealthy("refused".to_owned())]);
        assert_eq!(play(&mut one, "---"), [], "said once");
        let mut one = machine(None);
        assert_eq!(play(&mut one, "---+"), [Sign::Healthy], "well before the period is over");
        assert_eq!(one.due(), ms(5300) + ms(200));
        assert_eq!(play(&mut one, "--").len(), 1, "the period is over with the first good one");
    }

    #[test]
    fn failures_count_only_in_a_row() {
        let mut one = machine(None);
        assert_eq!(play(&mut one, "+-+-+-+"), [Sign::Healthy]);
        let unhealthy = Sign::Unhealthy("refused".to_owned());
        assert_eq!(play(&mut one, "--+--"), [unhealthy.clone(), Sign::Healthy, unhealthy]);
    }

    #[test]
    fn a_new_agent_goes_on_where_the_old_one_was() {
        let mut well = machine(Some(HealthState::Healthy));
        assert_eq!(play(&mut well, "-+"), [], "one failure is no news");
        assert_eq!(play(&mut well, "--").len(), 1);
        for sign in [Sign::Healthy, Sign::Unhealthy("refused".to_owned())] {
            assert_eq!(Remembered::of(&sign).and_then(|it| it.sign()), Some(sign));
        }
        let mut ill = machine(Some(HealthState::Unhealthy));
        assert_eq!(play(&mut ill, "---+"), [Sign::Healthy]);
    }
}
