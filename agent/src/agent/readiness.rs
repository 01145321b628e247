//! Whether a container is ready and well: what is known of one instance ([`Readiness`], pure), and the board on which those
//! who start containers wait for it ([`Board`]). Asks nobody itself: words come from health checks and from the program.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protocol::imageset::Container;
use protocol::node::{ExitStatus, HealthState};

use crate::health::Sign;

/// What a program that tells when it is ready gets for that, where its health check says nothing longer: as systemd's
/// DefaultTimeoutStartSec (systemd-system.conf(5)).
const NOTIFY_PATIENCE: Duration = Duration::from_secs(90);

/// Something that is said of a running instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// The program says that it is ready.
    Ready,
    /// Its health check passed.
    Healthy,
    /// Its health check failed as often as it may; why.
    Unhealthy(String),
    /// What its program says of itself.
    Says(String),
}

impl From<Sign> for Word {
    fn from(sign: Sign) -> Self {
        match sign {
            Sign::Ready => Self::Ready,
            Sign::Healthy => Self::Healthy,
            Sign::Unhealthy(why) => Self::Unhealthy(why),
            Sign::Says(text) => Self::Says(text),
        }
    }
}

/// How ready and well one instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    notify: bool,
    health: bool,
    /// How long it may take from its exec until it is ready.
    within: Duration,
    /// When it was ready, nanoseconds of CLOCK_BOOTTIME.
    ready_at_ns: Option<u64>,
    /// What its health check last said.
    checked: Option<Result<(), String>>,
    /// What its program last said of itself.
    says: Option<String>,
}

impl Readiness {
    /// Of a container that does not run.
    #[must_use]
    pub fn of(container: &Container) -> Self {
        let mut within = Duration::ZERO;
        if let Some(health) = &container.health {
            let each = u64::from(health.interval_ms) + u64::from(health.timeout_ms);
            let all = u64::from(health.start_period_ms) + each * u64::from(health.retries);
            within = Duration::from_millis(all);
        }
        if container.notify {
            within = within.max(NOTIFY_PATIENCE);
        }
        let health = container.health.is_some();
        Self {
            notify: container.notify,
            health,
            within,
            ready_at_ns: None,
            checked: None,
            says: None,
        }
    }

    /// Its program was executed. One that nobody asks is ready at that moment.
    #[must_use]
    pub fn begun(mut self, exec_at_ns: u64) -> Self {
        self.ready_at_ns = (!self.is_asked()).then_some(exec_at_ns);
        self.checked = None;
        self.says = None;
        self
    }

    /// Takes what is said of it, at a time in nanoseconds of CLOCK_BOOTTIME.
    pub fn take(&mut self, word: &Word, at_ns: u64) {
        let ready = match word {
            Word::Ready => true,
            Word::Healthy => {
                self.checked = Some(Ok(()));
                !self.notify
            }
            Word::Unhealthy(why) => {
                self.checked = Some(Err(why.clone()));
                false
            }
            Word::Says(text) => {
                self.says = Some(text.clone());
                false
            }
        };
        if ready && self.ready_at_ns.is_none() {
            self.ready_at_ns = Some(at_ns);
        }
    }

    /// Whether anybody is asked: without health check and `notify` its exec is all there is.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        self.notify || self.health
    }

    /// When it was ready.
    #[must_use]
    pub fn ready_at_ns(&self) -> Option<u64> {
        self.ready_at_ns
    }

    /// Whether it is ready and its health check, where it has one, passes.
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.ready_at_ns.is_some() && (!self.health || self.checked == Some(Ok(())))
    }

    /// Why it is unhealthy, when it is.
    #[must_use]
    pub fn unhealthy(&self) -> Option<&str> {
        self.checked.as_ref()?.as_ref().err().map(String::as_str)
    }

    /// What its health check says against it, or its program of itself.
    #[must_use]
    pub fn words(&self) -> Option<&str> {
        self.unhealthy().or(self.says.as_deref())
    }

    /// How long it may take to be ready.
    #[must_use]
    pub fn within(&self) -> Duration {
        self.within
    }

    /// As it is reported; none when nobody is asked.
    #[must_use]
    pub fn state(&self) -> Option<HealthState> {
        self.is_asked().then_some(match (self.unhealthy(), self.is_well()) {
            (Some(_), _) => HealthState::Unhealthy,
            (None, true) => HealthState::Healthy,
            (None, false) => HealthState::Starting,
        })
    }
}

/// An instance on the board.
#[derive(Debug)]
struct Entry {
    readiness: Readiness,
    ended: Option<ExitStatus>,
}

/// Where those who start containers wait for them. Knows the instances that were begun and not forgotten.
#[derive(Debug, Default)]
pub(super) struct Board {
    instances: Mutex<BTreeMap<String, Entry>>,
    changed: Condvar,
}

/// Why waiting for an instance was in vain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NotReady {
    /// It ended, and not well.
    Ended(ExitStatus),
    /// Its health check says so.
    Unhealthy(String),
    /// It took longer than it may.
    Late(Duration),
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An instance was begun.
    pub(super) fn begin(&self, instance: &str, readiness: Readiness) {
        self.lock().insert(instance.to_owned(), Entry { readiness, ended: None });
        self.changed.notify_all();
    }

    /// Something is said of an instance. True when the board knows it.
    pub(super) fn say(&self, instance: &str, word: &Word, at_ns: u64) -> bool {
        let mut instances = self.lock();
        let Some(entry) = instances.get_mut(instance) else { return false };
        entry.readiness.take(word, at_ns);
        self.changed.notify_all();
        true
    }

    /// An instance ended.
    pub(super) fn ended(&self, instance: &str, exit: &ExitStatus) {
        if let Some(entry) = self.lock().get_mut(instance) {
            entry.ended = Some(exit.clone());
        }
        self.changed.notify_all();
    }

    /// What is known of an instance.
    #[must_use]
    pub(super) fn readiness(&self, instance: &str) -> Option<Readiness> {
        self.lock().get(instance).map(|entry| entry.readiness.clone())
    }

    /// Nobody will ask for this instance any more.
    pub(super) fn forget(&self, instance: &str) {
        self.lock().remove(instance);
    }

    /// Waits until the instance is ready and well, or has ended with 0: a program that has done its work. Gives up when it has
    /// had its time.
    ///
    /// # Errors
    /// Why it will not be ready.
    pub(super) fn wait(&self, instance: &str) -> Result<(), NotReady> {
        let mut instances = self.lock();
        let Some(within) = instances.get(instance).map(|it| it.readiness.within()) else {
            return Ok(());
        };
        let until = Instant::now() + within;
        loop {
            let Some(entry) = instances.get(instance) else { return Ok(()) };
            if let Some(exit) = &entry.ended {
                return if exit.code == Some(0) {
                    Ok(())
                } else {
                    Err(NotReady::Ended(exit.clone()))
                };
            }
            if entry.readiness.is_well() {
                return Ok(());
            }
            if let Some(why) = entry.readiness.unhealthy() {
                return Err(NotReady::Unhealthy(why.to_owned()));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NotReady::Late(within));
            }
            let waited = self.changed.wait_timeout(instances, left);
            instances = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readiness(json: &str) -> Readiness {
        let mut value: serde_json::Value = serde_json::from_str(json).expect("json");
        value["name"] = "web".into();
        value["image"] = "web".into();
        Readiness::of(&serde_json::from_value(value).expect("container"))
    }

    const HEALTH: &str = r#"{"health":{"tcp":"127.0.0.1:1","start_period_ms":100,"interval_ms":10,"timeout_ms":20,"retries":2}}"#;

    #[test]
    fn a_container_is_ready_when_whoever_is_asked_has_said_so() {
        let both = HEALTH.replacen('{', r#"{"notify":true,"#, 1);
        let no = || Word::Unhealthy("no".to_owned());
        let (ready, healthy) = (Word::Ready, Word::Healthy);
        let table: [(&str, &[Word], Option<u64>, bool); 8] = [
            ("{}", &[], Some(1), true),
            (r#"{"notify":true}"#, &[], None, false),
            (r#"{"notify":true}"#, std::slice::from_ref(&ready), Some(10), true),
            (HEALTH, &[], None, false),
            (HEALTH, std::slice::from_ref(&healthy), Some(10), true),
            (HEALTH, &[healthy.clone(), no()], Some(10), false),
            (&both, std::slice::from_ref(&healthy), None, false),
            (&both, &[healthy.clone(), ready.clone()], Some(11), true),
        ];
        for (container, words, ready_at, well) in table {
            let mut readiness = readiness(container).begun(1);
            for (at, word) in (10..).zip(words) {
                readiness.take(word, at);
            }
            let found = (readiness.ready_at_ns(), readiness.is_well());
            assert_eq!(found, (ready_at, well), "{container} {words:?}");
        }
    }

    #[test]
    fn the_time_to_get_ready_comes_from_the_health_check() {
        assert_eq!(readiness("{}").within(), Duration::ZERO);
        assert_eq!(readiness(HEALTH).within(), Duration::from_millis(160));
        assert_eq!(readiness(r#"{"notify":true}"#).within(), NOTIFY_PATIENCE);
    }

    #[test]
    fn waiting_ends_with_the_word_with_the_end_or_with_the_time() {
        let board = Board::default();
        board.begin("a", readiness(HEALTH).begun(1));
        assert_eq!(board.wait("a"), Err(NotReady::Late(Duration::from_millis(160))));
        assert!(board.say("a", &Word::Healthy, 5) && !board.say("b", &Word::Healthy, 5));
        assert_eq!(board.wait("a"), Ok(()));
        board.say("a", &Word::Unhealthy("500".to_owned()), 6);
        assert_eq!(board.wait("a"), Err(NotReady::Unhealthy("500".to_owned())));
        for (code, ready) in [(0, true), (3, false)] {
            board.begin("c", readiness(r#"{"notify":true}"#).begun(1));
            let exit = ExitStatus { code: Some(code), signal: None, error: None };
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| board.wait("c"));
                board.ended("c", &exit);
                assert_eq!(waiter.join().expect("waiter").is_ok(), ready, "{code}");
            });
        }
        assert_eq!(board.wait("never begun"), Ok(()));
    }
}
