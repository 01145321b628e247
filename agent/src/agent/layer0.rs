//! Changing Layer0 under a node, or only its agent: when to fetch, when to wait, when to go. Pure: it takes (event, now) and
//! returns actions; [`stage`] fetches and loads, the agent's loop asks PID 1.
//!
//! ```text
//!        another one is wanted            in place            the node is free
//! Idle ─────────────────────▶ Staging ──────────────▶ Asking ─────────────────▶ Going ──▶ the end of this boot, or agent
//!                              │   ▲                   │  ▲                       │
//!                       failed │   │ 5 s ... 5 min     │  │ 10 s, or news         │ PID 1 refuses
//!                              ▼   │                   ▼  │                       ▼
//!                             Waiting                  Busy            reboot in the place of kexec, or Failed
//! ```
//! *Invariant:* a boot is ended only if the desired document names that very boot, so nothing that comes up wrong can make a node
//! boot for ever.

pub(super) mod act;
pub(super) mod stage;

use std::path::PathBuf;
use std::time::Duration;

use protocol::ids::Digest;
use protocol::node::{DesiredLayer0, Layer0How, Layer0State, ObservedLayer0};
use serde::{Deserialize, Serialize};

/// The first pause after a failure; it doubles with every further one.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How often a busy node is asked whether it is free.
const BUSY_PACE: Duration = Duration::from_secs(10);

/// What runs now.
#[derive(Debug, Clone, Default)]
pub(super) struct Running {
    /// The Layer0, as its kernel was told.
    pub digest: Option<Digest>,
    /// The version that the image says it is.
    pub version: Option<String>,
    /// The agent.
    pub agent: Option<Digest>,
    /// The kernel's boot id.
    pub boot_id: String,
    /// Whether another kernel started this one.
    pub kexec: bool,
}

/// An agent that PID 1 was asked to start in place of this one: noted before, so that whoever comes after knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tried {
    agent: Digest,
    request: u64,
}

/// How it will be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// The kernel has its successor loaded.
    Kexec,
    /// The firmware will fetch it; why not by kexec, where that was wanted.
    Reboot(Option<String>),
    /// The next agent lies here.
    Agent(PathBuf),
}

/// Why it could not be made ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One sentence.
    pub why: String,
    /// Trying again changes nothing.
    pub last: bool,
}

/// What happens.
#[derive(Debug)]
pub enum Layer0Event {
    /// How far the staging has come.
    Progress(u64, String),
    /// The staging of this request ended.
    Staged(u64, Result<Way, Failure>),
    /// Whether the node may be disturbed; else why not.
    Busy(Option<String>),
    /// PID 1, or the kernel, did not do it.
    Refused(String),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Fetch it and load it; answer with `Staged` and this number.
    Stage(u64, DesiredLayer0),
    /// Forget what is loaded.
    Drop,
    /// Find out whether the node may be disturbed; answer with `Busy`.
    AskBusy,
    /// Write this down, then ask PID 1; answer with `Refused`, or not at all.
    Go(Way, Option<Tried>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Idle,
    Staging { progress: Option<String> },
    Asking(Way),
    Busy { way: Way, why: String, ask_at: Duration },
    Going(Way),
    Waiting { until: Duration, why: String },
    Failed(String),
}

/// Decides what becomes of Layer0.
#[derive(Debug)]
pub(super) struct Machine {
    running: Running,
    tried: Option<Tried>,
    wanted: Option<DesiredLayer0>,
    state: State,
    failures: u32,
    /// What PID 1 was asked for; the document may have changed since.
    asked: Option<DesiredLayer0>,
    /// Counts the stagings, so that the outcome of one that was given up is known as such.
    staging: u64,
}

impl Machine {
    pub(super) fn new(running: Running, tried: Option<Tried>) -> Self {
        Self {
            running,
            tried,
            wanted: None,
            state: State::Idle,
            failures: 0,
            asked: None,
            staging: 0,
        }
    }

    /// The document wants this.
    pub(super) fn want(&mut self, wanted: Option<DesiredLayer0>) -> Vec<Action> {
        if self.wanted == wanted {
            return Vec::new();
        }
        self.wanted = wanted;
        if matches!(self.state, State::Going(_)) {
            // PID 1 has been asked; only if it refuses does anything come next here.
            return Vec::new();
        }
        let mut actions = match std::mem::replace(&mut self.state, State::Idle) {
            State::Asking(Way::Kexec) | State::Busy { way: Way::Kexec, .. } => vec![Action::Drop],
            _ => Vec::new(),
        };
        self.failures = 0;
        actions.extend(self.begin());
        actions
    }

    pub(super) fn handle(&mut self, event: Layer0Event, now: Duration) -> Vec<Action> {
        match event {
            Layer0Event::Progress(staging, text) => {
                if let State::Staging { progress } = &mut self.state
                    && staging == self.staging
                {
                    *progress = Some(text);
                }
                Vec::new()
            }
            Layer0Event::Staged(staging, result) => self.staged(staging, result, now),
            Layer0Event::Busy(busy) => self.busy(busy, now),
            Layer0Event::Refused(why) => self.refused(why),
        }
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, now: Duration) -> Vec<Action> {
        match &self.state {
            State::Waiting { until, .. } if *until <= now => self.begin(),
            State::Busy { ask_at, .. } if *ask_at <= now => self.ask_again(),
            _ => Vec::new(),
        }
    }

    /// What the operator says of the node has changed.
    pub(super) fn ask_again(&mut self) -> Vec<Action> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Busy { way, .. } => self.ask(way),
            other => {
                self.state = other;
                Vec::new()
            }
        }
    }

    /// When [`Machine::tick`] has something to do.
    pub(super) fn deadline(&self) -> Option<Duration> {
        match &self.state {
            State::Waiting { until, .. } => Some(*until),
            State::Busy { ask_at, .. } => Some(*ask_at),
            _ => None,
        }
    }

    fn begin(&mut self) -> Vec<Action> {
        self.state = State::Idle;
        let Some(wanted) = &self.wanted else { return Vec::new() };
        let agent_only = wanted.how == Layer0How::Agent;
        let due = match agent_only {
            true => self.running.agent != wanted.agent && !self.was_tried(wanted),
            false => wanted.boot_id.as_ref() == Some(&self.running.boot_id),
        };
        if !due {
            return Vec::new();
        }
        if wanted.how == Layer0How::Reboot {
            return self.ask(Way::Reboot(None));
        }
        self.staging = self.staging.saturating_add(1);
        self.state = State::Staging { progress: None };
        vec![Action::Stage(self.staging, wanted.clone())]
    }

    fn was_tried(&self, wanted: &DesiredLayer0) -> bool {
        let is_it =
            |tried: &Tried| Some(tried.agent) == wanted.agent && tried.request == wanted.request;
        self.tried.as_ref().is_some_and(is_it)
    }

    fn staged(&mut self, staging: u64, result: Result<Way, Failure>, now: Duration) -> Vec<Action> {
        if staging != self.staging || !matches!(self.state, State::Staging { .. }) {
            // Given up meanwhile: nothing that nobody wants stays loaded, unless another one is being staged in its place.
            let drop = result == Ok(Way::Kexec) && !matches!(self.state, State::Staging { .. });
            return if drop { vec![Action::Drop] } else { Vec::new() };
        }
        match result {
            Ok(way) => {
                self.failures = 0;
                self.ask(way)
            }
            Err(Failure { why, last: true }) => {
                self.state = State::Failed(why);
                Vec::new()
            }
            Err(Failure { why, last: false }) => {
                let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(10));
                self.failures = self.failures.saturating_add(1);
                self.state = State::Waiting { until: now + pause.min(LONGEST_PAUSE), why };
                Vec::new()
            }
        }
    }

    /// An agent is replaced under the containers; everything else disturbs them.
    fn ask(&mut self, way: Way) -> Vec<Action> {
        let force = self.wanted.as_ref().is_some_and(|wanted| wanted.force);
        if force || matches!(way, Way::Agent(_)) {
            return self.go(way);
        }
        self.state = State::Asking(way);
        vec![Action::AskBusy]
    }

    fn busy(&mut self, busy: Option<String>, now: Duration) -> Vec<Action> {
        match (std::mem::replace(&mut self.state, State::Idle), busy) {
            (State::Asking(way), None) => self.go(way),
            (State::Asking(way), Some(why)) => {
                self.state = State::Busy { way, why, ask_at: now + BUSY_PACE };
                Vec::new()
            }
            (other, _) => {
                self.state = other;
                Vec::new()
            }
        }
    }

    fn go(&mut self, way: Way) -> Vec<Action> {
        let wanted = self.wanted.as_ref();
        let tried = wanted
            .filter(|_| matches!(way, Way::Agent(_)))
            .and_then(|wanted| Some(Tried { agent: wanted.agent?, request: wanted.request }));
        if tried.is_some() {
            self.tried.clone_from(&tried);
        }
        self.asked.clone_from(&self.wanted);
        self.state = State::Going(way.clone());
        vec![Action::Go(way, tried)]
    }

    fn refused(&mut self, why: String) -> Vec<Action> {
        let auto = self.wanted.as_ref().is_some_and(|wanted| wanted.how == Layer0How::Auto);
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Going(_) if self.wanted != self.asked => self.begin(),
            State::Going(Way::Kexec) if auto => self.go(Way::Reboot(Some(why))),
            State::Going(_) => {
                self.state = State::Failed(why);
                Vec::new()
            }
            other => {
                self.state = other;
                Vec::new()
            }
        }
    }

    /// What the node waits for because of this, for the console; none when nothing is to be done.
    pub(super) fn waiting(&self) -> Option<String> {
        let (state, reason) = self.judge();
        let idle = matches!(self.state, State::Idle) && state != Layer0State::Failed;
        reason.filter(|_| !idle).map(|why| format!("layer0: {why}"))
    }

    /// For the observed document.
    pub(super) fn observed(&self) -> ObservedLayer0 {
        let Running { digest, version, agent, kexec, .. } = self.running.clone();
        let (state, reason) = self.judge();
        ObservedLayer0 { digest, version, agent, kexec, state, reason }
    }

    fn judge(&self) -> (Layer0State, Option<String>) {
        let Some(wanted) = &self.wanted else { return (Layer0State::Current, None) };
        let short = wanted.digest.short();
        let reason = match &self.state {
            State::Idle => return self.judge_idle(wanted),
            State::Failed(why) => return (Layer0State::Failed, Some(why.clone())),
            State::Staging { progress: Some(text) } => text.clone(),
            State::Staging { progress: None } => format!("fetching {short}"),
            State::Asking(_) => "asking whether the node is busy".to_owned(),
            State::Busy { way, why, .. } => format!("{}; the node is busy: {why}", ready(way)),
            State::Going(Way::Kexec) => format!("kexec into {short}"),
            State::Going(Way::Reboot(None)) => format!("reboot into {short}"),
            State::Going(Way::Reboot(Some(why))) => format!("reboot into {short}, because {why}"),
            State::Going(Way::Agent(_)) => "the agent is being replaced".to_owned(),
            State::Waiting { why, .. } => format!("{why}; it is tried again"),
        };
        (Layer0State::Stale, Some(reason))
    }

    fn judge_idle(&self, wanted: &DesiredLayer0) -> (Layer0State, Option<String>) {
        if wanted.how == Layer0How::Agent {
            return match self.running.agent == wanted.agent {
                true => (Layer0State::Current, None),
                false => {
                    let why = "the new agent did not stay up, the one before is back; another \
                               `layercake layer0 start` tries again";
                    (Layer0State::Failed, Some(why.to_owned()))
                }
            };
        }
        if self.running.digest == Some(wanted.digest) {
            return (Layer0State::Current, None);
        }
        let what = match self.running.digest {
            Some(digest) => format!("this boot began with {}", digest.short()),
            None => "this boot's kernel was not told which Layer0 it is".to_owned(),
        };
        let why = format!("{what}; `layercake layer0 start` changes it");
        (Layer0State::Stale, Some(why))
    }
}

fn ready(way: &Way) -> String {
    match way {
        Way::Kexec => "ready for kexec".to_owned(),
        Way::Reboot(None) => "ready to reboot".to_owned(),
        Way::Reboot(Some(why)) => format!("ready to reboot, because {why}"),
        Way::Agent(_) => "ready".to_owned(),
    }
}

#[cfg(test)]
mod tests;
