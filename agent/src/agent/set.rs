//! One ImageSet on this node, as a state machine: (event, now) in, actions out. Pure: no I/O, no clock, no threads.
//!
//! ```text
//!         wanted, not running        pulled          staged, free           runs
//!   Idle ────────────────────▶ Pulling ──▶ Staging ──▶ (Held) ──▶ CuttingOver ──▶ Watching ──▶ Idle (committed)
//!     ▲  └─ the kept set is wanted again ──▶ ▲ │ failed                │ failed       │ failed
//!     │                          │ failed      ▼                       │              ▼
//!     │  time is up              └──────▶ Waiting (jitter, 0.5 s … 30 s)│          GoingBack
//!     └─────────────────────────────────────┘                          └────▶ the old set runs, and stays
//! ```
//!
//! Whatever runs goes on running until CuttingOver, and is then kept staged: mounts held, processes ended. It comes back by
//! itself when the new set cannot be cut over to or fails while it is watched; that version is then *refused*: not tried again
//! until something else is wanted, or the same by a new roll. Without a set to go back to, a start is tried again and again.
//! Nothing is remembered of a plan: after every step the machine looks again at what is wanted and what runs.

use std::time::Duration;

use protocol::ids::{Digest, Name};
use protocol::imageset::{Mode, Restart};
use protocol::node::{ContainerState, DesiredSet, ExitStatus, RollReport};
use serde::{Deserialize, Serialize};

use super::backoff::retry_ceiling;
use super::readiness::{Readiness, Word};

mod containers;
mod note;
mod roll;
mod view;

pub(super) use note::{Commitment, Refused};
pub(super) use view::exit_text;

/// How often a node whose hook says that it is busy is asked again.
const BUSY_PACE: Duration = Duration::from_secs(15);

/// A container of the running set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerRecord {
    /// Its name in the set.
    pub name: Name,
    /// The instance that runs or ran last.
    pub instance: String,
    /// What happens when it ends.
    pub restart: Restart,
    /// How it stands.
    pub state: ContainerState,
    /// Process id of its init on the node.
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
    /// How it last ended.
    pub exit: Option<ExitStatus>,
    /// When it was last started.
    pub started: Duration,
    /// When it is to be started again.
    pub restart_at: Option<Duration>,
    /// Failures in a row that the next pause is computed from.
    pub failures: u32,
    /// How ready and well it is.
    pub readiness: Readiness,
    /// When the container that it replaced ended, nanoseconds of CLOCK_BOOTTIME; none where there was none, or where it ran
    /// until this one was ready.
    pub replaced_at_ns: Option<u64>,
    /// What could not be had on this node.
    pub notes: Vec<String>,
}

/// What runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deployment {
    /// What it was asked for as.
    pub set: DesiredSet,
    /// Digest of its index.
    pub digest: Digest,
    /// How it took hold of the node.
    pub mode: Mode,
    /// How long it is watched.
    pub watch: Duration,
    /// Its containers.
    pub containers: Vec<ContainerRecord>,
    /// What the cut-over to it cost, or the last one that did not last.
    pub last_roll: Option<RollReport>,
}

/// A set that is kept staged: its mounts are held, its processes have ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// What it was asked for as.
    pub set: DesiredSet,
    /// Digest of its index.
    pub digest: Digest,
}

/// What was pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Content {
    /// Digest of its index.
    pub digest: Digest,
    /// How it takes hold of the node.
    pub mode: Mode,
    /// Compressed bytes that were fetched for it.
    pub bytes: u64,
}

/// What the machine is on its way to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    set: DesiredSet,
    digest: Digest,
    mode: Mode,
    bytes: u64,
    staging_ms: u64,
    /// Whether it is the set that is kept staged: it ran here before, and the operator wants it back.
    kept: bool,
}

/// A set on trial.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Watch {
    /// When all of it must be ready and well at the latest.
    ready_by: Duration,
    /// When it is committed, since all of it is ready and well.
    until: Option<Duration>,
}

/// The way back to the kept set.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Way {
    kept: Kept,
    refused: Refused,
    report: Option<RollReport>,
}

/// What the machine is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Work {
    Idle,
    Pulling { target: DesiredSet, cancelled: bool },
    Staging(Target),
    Held { target: Target, busy: Option<String>, ask_at: Option<Duration> },
    CuttingOver(Target),
    Watching(Watch),
    GoingBack(Box<Way>),
    Stopping,
    Waiting { until: Duration },
}

/// What happens to the machine.
#[derive(Debug)]
pub(super) enum SetEvent {
    /// The operator wants this; None: nothing of this name.
    Want(Option<DesiredSet>),
    /// The pull ended.
    Pulled(Result<Content, String>),
    /// Every container stands at its exec barrier, or not.
    Staged(Result<(), String>),
    /// Whether the node may be disturbed now; else why not.
    Busy(Option<String>),
    /// The node may have become busy or free.
    BusyChanged,
    /// What the cut-over under way waits for.
    Progress(String),
    /// The new set runs, or the old one again.
    CutOver(Result<Box<Deployment>, Box<CutOverFailure>>),
    /// A container ended by itself.
    Ended {
        /// The instance.
        instance: String,
        /// How it ended.
        exit: ExitStatus,
    },
    /// Something is said of a container's readiness or health.
    Word {
        /// The instance.
        instance: String,
        /// What.
        word: Word,
        /// When, nanoseconds of CLOCK_BOOTTIME.
        at_ns: u64,
    },
    /// A container was started again, or not.
    Restarted {
        /// Its name.
        container: Name,
        /// The new instance, or why not.
        result: Result<Started, String>,
    },
    /// Everything of the set has been stopped.
    Stopped,
    /// Memory is short.
    Pressure,
    /// Time has passed.
    Tick,
}

/// A container instance that was just started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// The instance.
    pub instance: String,
    /// Its process id.
    pub pid: u32,
    /// When its program was executed, nanoseconds of CLOCK_BOOTTIME.
    pub exec_at_ns: u64,
}

/// A cut-over that did not come to be, or did not last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutOverFailure {
    /// Why.
    pub reason: String,
    /// What runs now: the old set again, where there was one.
    pub running: Option<Deployment>,
    /// What it cost.
    pub report: Option<RollReport>,
}

/// What the machine wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SetAction {
    /// Fetch and verify it.
    Pull(DesiredSet),
    /// Give up the pull under way; it still ends with `Pulled`.
    CancelPull,
    /// Bring every container of what was pulled to its exec barrier.
    Stage(DesiredSet),
    /// Bring every container of the kept set to its exec barrier.
    StageKept(DesiredSet),
    /// Throw away what was staged; a kept set is kept again.
    Discard,
    /// Find out whether the node may be disturbed, and answer with `Busy`.
    AskBusy,
    /// Stop the old, release the new, keep the old.
    CutOver(DesiredSet),
    /// Stop the new, start the kept set again; ends with `CutOver`.
    GoBack(String),
    /// Take down the kept set.
    DropKept,
    /// Start this container again.
    Restart {
        /// Its name.
        container: Name,
        /// How often it has been started again, this time included.
        restarts: u32,
    },
    /// What runs is what is wanted, under another name: note that, and touch nothing.
    Rename(DesiredSet),
    /// Stop everything.
    Stop,
}

/// What was heard of an instance whose start was not heard of yet.
#[derive(Debug)]
enum Early {
    Ended(ExitStatus),
    Word(Word, u64),
}

/// The machine.
#[derive(Debug)]
pub(super) struct SetMachine {
    name: Name,
    wanted: Option<DesiredSet>,
    running: Option<Deployment>,
    kept: Option<Kept>,
    work: Work,
    /// When the work on what is wanted began.
    begun: Duration,
    /// Why the last attempt failed, and how many did in a row; 0: it is not tried again.
    failure: Option<(String, u32)>,
    /// What was gone back from.
    refused: Option<Refused>,
    /// What the cut-over under way waits for.
    progress: Option<String>,
    early: Vec<(String, Early)>,
}

fn is_target(deployment: &Deployment, wanted: &DesiredSet) -> bool {
    match wanted.reference.digest {
        Some(digest) => deployment.digest == digest,
        None => deployment.set.reference == wanted.reference,
    }
}

impl SetMachine {
    /// A machine for the set of this name of which nothing runs.
    #[must_use]
    pub(super) fn new(name: Name) -> Self {
        Self {
            name,
            wanted: None,
            running: None,
            kept: None,
            work: Work::Idle,
            begun: Duration::ZERO,
            failure: None,
            refused: None,
            progress: None,
            early: Vec::new(),
        }
    }

    /// Whether nothing is wanted, nothing runs and nothing is under way: the machine can be forgotten.
    #[must_use]
    pub(super) fn is_spent(&self) -> bool {
        self.wanted.is_none() && self.running.is_none() && self.work == Work::Idle
    }

    /// Whether a set is kept staged, which memory could be had from.
    #[must_use]
    pub(super) fn keeps(&self) -> bool {
        self.kept.is_some()
    }

    /// When the machine next needs a [`SetEvent::Tick`].
    #[must_use]
    pub(super) fn deadline(&self) -> Option<Duration> {
        let due = match &self.work {
            Work::Waiting { until } => Some(*until),
            Work::Held { ask_at, .. } => *ask_at,
            // Without a set to go back to nothing happens when it is late.
            Work::Watching(watch) => watch.until.or(self.kept.is_some().then_some(watch.ready_by)),
            _ => None,
        };
        // While all of them are being replaced nothing is restarted: a time that has passed would wake the loop for ever.
        let containers = self.running.iter().filter(|_| !self.is_leaving());
        let restarts = containers.flat_map(|running| &running.containers);
        restarts.filter_map(|container| container.restart_at).chain(due).min()
    }

    /// Whether what runs is being replaced or stopped this very moment.
    fn is_leaving(&self) -> bool {
        matches!(self.work, Work::CuttingOver(_) | Work::GoingBack(_) | Work::Stopping)
    }

    /// Takes an event. `jitter` is a fresh random number in 0.0..1.0, for retries.
    pub(super) fn handle(&mut self, event: SetEvent, now: Duration, jitter: f64) -> Vec<SetAction> {
        let mut actions = Vec::new();
        match event {
            SetEvent::Want(wanted) => self.want(wanted, &mut actions),
            SetEvent::Pulled(result) => self.pulled(result, now, jitter, &mut actions),
            SetEvent::Staged(result) => self.staged(result, now, jitter, &mut actions),
            SetEvent::Busy(busy) => self.busy(busy, now, &mut actions),
            SetEvent::BusyChanged => self.ask_again(&mut actions),
            SetEvent::Progress(text) => {
                self.progress = Some(text).filter(|_| matches!(self.work, Work::CuttingOver(_)));
            }
            SetEvent::CutOver(result) => self.cut_over(result, now, jitter),
            SetEvent::Ended { instance, exit } => self.ended(&instance, exit, now),
            SetEvent::Word { instance, word, at_ns } => self.word(&instance, word, at_ns, now),
            SetEvent::Restarted { container, result } => self.restarted(&container, result, now),
            SetEvent::Stopped => {
                self.running = None;
                self.kept = None;
                self.work = Work::Idle;
            }
            SetEvent::Pressure => self.pressure(&mut actions),
            SetEvent::Tick => self.ask_when_due(now, &mut actions),
        }
        self.watch(now, &mut actions);
        self.restart_due(now, &mut actions);
        self.evaluate(now, &mut actions);
        actions
    }

    fn want(&mut self, wanted: Option<DesiredSet>, actions: &mut Vec<SetAction>) {
        if self.wanted == wanted {
            return;
        }
        self.wanted = wanted;
        // An adopted machine hears for the first time what is wanted: a refusal outlives the agent.
        if self.refused.as_ref().map(|it| &it.set) != self.wanted.as_ref() {
            self.refused = None;
            self.failure = None;
        }
        match &mut self.work {
            Work::Waiting { .. } => self.work = Work::Idle,
            Work::Held { .. } => {
                actions.push(SetAction::Discard);
                self.work = Work::Idle;
            }
            Work::Pulling { target, cancelled }
                if self.wanted.as_ref() != Some(target) && !*cancelled =>
            {
                *cancelled = true;
                actions.push(SetAction::CancelPull);
            }
            _ => {}
        }
    }

    fn fail(&mut self, reason: String, now: Duration, jitter: f64) {
        let attempts = self.failure.as_ref().map_or(0, |(_, attempts)| *attempts).saturating_add(1);
        self.work =
            Work::Waiting { until: now + retry_ceiling(attempts).mul_f64(jitter.clamp(0.05, 1.0)) };
        self.failure = Some((reason, attempts));
    }

    fn rename(&mut self, target: &DesiredSet, actions: &mut Vec<SetAction>) {
        if self.refused.is_none() {
            self.failure = None;
        }
        if let Some(running) = self.running.as_mut().filter(|it| it.set != *target) {
            running.set = target.clone();
            actions.push(SetAction::Rename(target.clone()));
        }
    }

    fn evaluate(&mut self, now: Duration, actions: &mut Vec<SetAction>) {
        if let Work::Waiting { until } = self.work {
            if now < until {
                return;
            }
            self.work = Work::Idle;
        }
        self.end_watch_of_unwanted();
        if !matches!(self.work, Work::Idle | Work::Watching(_)) {
            return;
        }
        match (self.wanted.clone(), &self.running) {
            (None, None) => {}
            (None, Some(running)) if running.mode == Mode::Pivot => {}
            (None, Some(_)) => {
                self.work = Work::Stopping;
                actions.push(SetAction::Stop);
            }
            (Some(wanted), Some(running)) if is_target(running, &wanted) => {
                self.rename(&wanted, actions);
            }
            (Some(wanted), Some(running)) if running.mode == Mode::Pivot => {
                let reason = format!(
                    "version {} of a pivoted set takes hold at the next reboot",
                    wanted.version
                );
                self.failure = Some((reason, 0));
            }
            // Gone back from: it stays on what runs.
            (Some(wanted), Some(_)) if self.refused.as_ref().is_some_and(|it| it.set == wanted) => {
            }
            (Some(wanted), _) => self.begin(wanted, now, actions),
        }
    }

    /// Sets out for what is wanted: the kept set is there already, anything else is pulled.
    fn begin(&mut self, wanted: DesiredSet, now: Duration, actions: &mut Vec<SetAction>) {
        self.begun = now;
        match (&self.kept, wanted.reference.digest) {
            (Some(kept), Some(digest)) if kept.digest == digest && self.running.is_some() => {
                actions.push(SetAction::StageKept(wanted.clone()));
                self.work = Work::Staging(Target {
                    set: wanted,
                    digest,
                    mode: Mode::Contain,
                    bytes: 0,
                    staging_ms: 0,
                    kept: true,
                });
            }
            _ => {
                self.work = Work::Pulling { target: wanted.clone(), cancelled: false };
                actions.push(SetAction::Pull(wanted));
            }
        }
    }
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "set_world.rs"]
mod world;
