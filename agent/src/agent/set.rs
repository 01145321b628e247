//! One ImageSet on this node, as a state machine: (event, now) in, actions out. Pure: no I/O, no clock, no threads.
//!
//! ```text
//!            wanted, not running            pulled            staged             cut over
//!   Idle ─────────────────────────▶ Pulling ──────▶ Staging ────────▶ CuttingOver ────────▶ Idle
//!     ▲                                │ failed        │ failed           │ failed (old set is back)
//!     │  wanted changed / time is up   ▼               ▼                  ▼
//!     └──────────────────────────── Waiting (full jitter, 0.5 s doubling to 30 s)
//! ```
//!
//! Whatever runs goes on running until CuttingOver. Nothing is remembered of a plan: after every step the machine looks
//! again at what is wanted and what runs.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::ids::{Digest, Name};
use protocol::imageset::{Mode, Restart};
use protocol::node::{ContainerState, DesiredSet, ExitStatus, RollReport};

use super::backoff::retry_ceiling;
use crate::containers::policy::{backoff, failures_after, should_restart};

mod view;

pub(super) use view::exit_text;

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
    /// Its containers.
    pub containers: Vec<ContainerRecord>,
    /// What the cut-over to it cost.
    pub last_roll: Option<RollReport>,
}

/// What the machine is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Work {
    Idle,
    Pulling { target: DesiredSet, cancelled: bool },
    Staging { target: DesiredSet, digest: Digest },
    CuttingOver { target: DesiredSet, digest: Digest },
    Stopping,
    Waiting { until: Duration },
}

/// What happens to the machine.
#[derive(Debug)]
pub(super) enum SetEvent {
    /// The operator wants this; None: nothing of this name.
    Want(Option<DesiredSet>),
    /// The pull ended.
    Pulled(Result<Digest, String>),
    /// Every container stands at its exec barrier, or not.
    Staged(Result<(), String>),
    /// The new set runs, or the old one again.
    CutOver(Result<Box<Deployment>, Box<CutOverFailure>>),
    /// A container ended by itself.
    Ended {
        /// The instance.
        instance: String,
        /// How it ended.
        exit: ExitStatus,
    },
    /// A container was started again, or not: the new instance and its process id.
    Restarted {
        /// Its name.
        container: Name,
        /// New instance and process id, or why not.
        result: Result<(String, u32), String>,
    },
    /// Everything of the set has been stopped.
    Stopped,
    /// Time has passed.
    Tick,
}

/// A cut-over that did not come to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutOverFailure {
    /// Why.
    pub reason: String,
    /// What runs now: the old set again, where there was one.
    pub running: Option<Deployment>,
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
    /// Throw away what was staged.
    Discard,
    /// Stop the old, release the new.
    CutOver(DesiredSet),
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

/// The machine.
#[derive(Debug)]
pub(super) struct SetMachine {
    name: Name,
    wanted: Option<DesiredSet>,
    running: Option<Deployment>,
    work: Work,
    /// Why the last attempt failed, and how many did in a row.
    failure: Option<(String, u32)>,
    /// Ends of instances that are being started: they may be heard of before the start itself is.
    early: BTreeMap<String, ExitStatus>,
}

fn is_target(deployment: &Deployment, wanted: &DesiredSet) -> bool {
    match wanted.reference.digest {
        Some(digest) => deployment.digest == digest,
        None => deployment.set.reference == wanted.reference,
    }
}

impl SetMachine {
    /// A machine for the set of this name; `running` is what an earlier agent left behind.
    #[must_use]
    pub(super) fn new(name: Name, running: Option<Deployment>) -> Self {
        Self {
            name,
            wanted: None,
            running,
            work: Work::Idle,
            failure: None,
            early: BTreeMap::new(),
        }
    }

    /// Whether nothing is wanted, nothing runs and nothing is under way: the machine can be forgotten.
    #[must_use]
    pub(super) fn is_spent(&self) -> bool {
        self.wanted.is_none() && self.running.is_none() && self.work == Work::Idle
    }

    /// When the machine next needs a [`SetEvent::Tick`].
    #[must_use]
    pub(super) fn deadline(&self) -> Option<Duration> {
        let retry = match self.work {
            Work::Waiting { until } => Some(until),
            _ => None,
        };
        // While all of them are being replaced nothing is restarted: a time that has passed would wake the loop for ever.
        let containers = self.running.iter().filter(|_| !self.is_leaving());
        let restarts = containers.flat_map(|running| &running.containers);
        restarts.filter_map(|container| container.restart_at).chain(retry).min()
    }

    /// Whether what runs is being replaced or stopped this very moment.
    fn is_leaving(&self) -> bool {
        matches!(self.work, Work::CuttingOver { .. } | Work::Stopping)
    }

    /// Takes an event. `jitter` is a fresh random number in 0.0..1.0, for retries.
    pub(super) fn handle(&mut self, event: SetEvent, now: Duration, jitter: f64) -> Vec<SetAction> {
        let mut actions = Vec::new();
        match event {
            SetEvent::Want(wanted) => self.want(wanted, &mut actions),
            SetEvent::Pulled(result) => self.pulled(result, now, jitter, &mut actions),
            SetEvent::Staged(result) => self.staged(result, now, jitter, &mut actions),
            SetEvent::CutOver(result) => self.cut_over(result, now, jitter),
            SetEvent::Ended { instance, exit } => self.ended(&instance, exit, now),
            SetEvent::Restarted { container, result } => self.restarted(&container, result, now),
            SetEvent::Stopped => {
                self.running = None;
                self.work = Work::Idle;
            }
            SetEvent::Tick => {}
        }
        self.restart_due(now, &mut actions);
        self.evaluate(now, &mut actions);
        actions
    }

    fn want(&mut self, wanted: Option<DesiredSet>, actions: &mut Vec<SetAction>) {
        if self.wanted == wanted {
            return;
        }
        self.wanted = wanted;
        self.failure = None;
        match &mut self.work {
            Work::Waiting { .. } => self.work = Work::Idle,
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

    fn pulled(
        &mut self,
        result: Result<Digest, String>,
        now: Duration,
        jitter: f64,
        actions: &mut Vec<SetAction>,
    ) {
        let Work::Pulling { target, cancelled } = std::mem::replace(&mut self.work, Work::Idle)
        else {
            return;
        };
        if cancelled || self.wanted.as_ref() != Some(&target) {
            return;
        }
        match result {
            // Another tag or registry, the same content: staging it would take the running containers' roots away.
            Ok(digest) if self.running.as_ref().is_some_and(|it| it.digest == digest) => {
                self.rename(&target, actions);
            }
            Ok(digest) => {
                actions.push(SetAction::Stage(target.clone()));
                self.work = Work::Staging { target, digest };
            }
            Err(reason) => self.fail(reason, now, jitter),
        }
    }

    fn rename(&mut self, target: &DesiredSet, actions: &mut Vec<SetAction>) {
        self.failure = None;
        if let Some(running) = self.running.as_mut().filter(|it| it.set != *target) {
            running.set = target.clone();
            actions.push(SetAction::Rename(target.clone()));
        }
    }

    fn staged(
        &mut self,
        result: Result<(), String>,
        now: Duration,
        jitter: f64,
        actions: &mut Vec<SetAction>,
    ) {
        let Work::Staging { target, digest } = std::mem::replace(&mut self.work, Work::Idle) else {
            return;
        };
        match result {
            Ok(()) if self.wanted.as_ref() == Some(&target) => {
                actions.push(SetAction::CutOver(target.clone()));
                self.work = Work::CuttingOver { target, digest };
            }
            Ok(()) => actions.push(SetAction::Discard),
            Err(reason) if self.wanted.as_ref() == Some(&target) => self.fail(reason, now, jitter),
            Err(_) => {}
        }
    }

    fn cut_over(
        &mut self,
        result: Result<Box<Deployment>, Box<CutOverFailure>>,
        now: Duration,
        jitter: f64,
    ) {
        self.work = Work::Idle;
        match result {
            Ok(mut deployment) => {
                deployment.containers.iter_mut().for_each(|container| container.started = now);
                self.running = Some(*deployment);
                self.failure = None;
            }
            Err(failure) => {
                self.running = failure.running;
                if let Some(running) = &mut self.running {
                    running.containers.iter_mut().for_each(|container| container.started = now);
                }
                self.fail(failure.reason, now, jitter);
            }
        }
        self.catch_up(now);
    }

    /// Takes the ends that were heard of before the starts.
    fn catch_up(&mut self, now: Duration) {
        for (instance, exit) in std::mem::take(&mut self.early) {
            self.ended(&instance, exit, now);
        }
    }

    /// Whether instances are being started whose names are not known yet.
    fn is_starting(&self) -> bool {
        let mut containers = self.running.iter().flat_map(|running| &running.containers);
        matches!(self.work, Work::CuttingOver { .. })
            || containers.any(|it| it.state == ContainerState::Created)
    }

    fn ended(&mut self, instance: &str, exit: ExitStatus, now: Duration) {
        let (leaving, starting) = (self.is_leaving(), self.is_starting());
        let mut containers = self.running.iter_mut().flat_map(|running| &mut running.containers);
        let Some(container) = containers.find(|it| it.instance == instance) else {
            if starting {
                self.early.insert(instance.to_owned(), exit);
            }
            return;
        };
        if container.pid.is_none() {
            // Known from its directory already (adoption).
            return;
        }
        if leaving {
            container.state = ContainerState::Exited;
            container.pid = None;
            return;
        }
        let clean = exit.code == Some(0);
        container.state = if clean { ContainerState::Exited } else { ContainerState::Dead };
        container.pid = None;
        container.exit = Some(exit);
        let ran = now.saturating_sub(container.started);
        container.failures = failures_after(container.failures, ran);
        if container.exit.as_ref().is_some_and(|exit| should_restart(container.restart, exit)) {
            container.restart_at = Some(now + backoff(container.failures.saturating_sub(1)));
        }
    }

    fn restarted(&mut self, name: &Name, result: Result<(String, u32), String>, now: Duration) {
        let Some(running) = &mut self.running else { return };
        let Some(container) = running.containers.iter_mut().find(|it| it.name == *name) else {
            return;
        };
        match result {
            Ok((instance, pid)) => {
                container.instance = instance;
                container.pid = Some(pid);
                container.state = ContainerState::Running;
                container.started = now;
            }
            Err(error) => {
                container.state = ContainerState::Dead;
                container.exit = Some(ExitStatus { code: None, signal: None, error: Some(error) });
                container.restart_at = Some(now + backoff(container.failures));
                container.failures = container.failures.saturating_add(1);
            }
        }
        self.catch_up(now);
    }

    /// Restarts what is due, unless the set is being replaced or stopped this very moment.
    fn restart_due(&mut self, now: Duration, actions: &mut Vec<SetAction>) {
        if self.is_leaving() {
            return;
        }
        let containers = self.running.iter_mut().flat_map(|running| &mut running.containers);
        for container in containers.filter(|it| it.restart_at.is_some_and(|at| at <= now)) {
            container.restart_at = None;
            container.state = ContainerState::Created;
            container.instance.clear();
            container.restarts = container.restarts.saturating_add(1);
            actions.push(SetAction::Restart {
                container: container.name.clone(),
                restarts: container.restarts,
            });
        }
    }

    fn evaluate(&mut self, now: Duration, actions: &mut Vec<SetAction>) {
        if let Work::Waiting { until } = self.work {
            if now < until {
                return;
            }
            self.work = Work::Idle;
        }
        if self.work != Work::Idle {
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
            (Some(wanted), _) => {
                self.work = Work::Pulling { target: wanted.clone(), cancelled: false };
                actions.push(SetAction::Pull(wanted));
            }
        }
    }
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
