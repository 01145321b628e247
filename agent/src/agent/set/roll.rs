//! The part of an ImageSet's state machine that brings it from one version to the next, and back.

use std::time::Duration;

use protocol::imageset::Mode;
use protocol::node::{RollOutcome, RollReport};

use super::{
    BUSY_PACE, Content, CutOverFailure, Deployment, Kept, Refused, SetAction, SetMachine, Target,
    Watch, Way, Work, is_target,
};

/// What a set gets to become ready and well beyond what its containers say they need: a busy machine.
const READY_GRACE: Duration = Duration::from_secs(5);

impl Deployment {
    /// How long all of it may take to be ready.
    pub(super) fn ready_within(&self) -> Duration {
        let each = self.containers.iter().map(|container| container.readiness.within());
        each.max().unwrap_or_default() + READY_GRACE
    }

    fn set_outcome(&mut self, outcome: RollOutcome) {
        if let Some(report) = &mut self.last_roll {
            report.outcome = Some(outcome);
        }
    }
}

impl SetMachine {
    pub(super) fn pulled(
        &mut self,
        result: Result<Content, String>,
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
            Ok(it) if self.running.as_ref().is_some_and(|running| running.digest == it.digest) => {
                self.rename(&target, actions);
            }
            Ok(Content { digest, mode, bytes }) => {
                let kept = self.kept.as_ref().is_some_and(|kept| kept.digest == digest);
                if kept {
                    actions.push(SetAction::StageKept(target.clone()));
                } else {
                    self.drop_kept(actions);
                    actions.push(SetAction::Stage(target.clone()));
                }
                let set = target;
                self.work = Work::Staging(Target { set, digest, mode, bytes, staging_ms: 0, kept });
            }
            Err(reason) => {
                // It may have been for want of room: the next attempt has what the kept set takes.
                self.drop_kept(actions);
                self.fail(reason, now, jitter);
            }
        }
    }

    fn drop_kept(&mut self, actions: &mut Vec<SetAction>) {
        if self.kept.take().is_some() {
            actions.push(SetAction::DropKept);
        }
    }

    /// What is kept for an undo goes when memory is short; what a trial may have to go back to does not.
    pub(super) fn pressure(&mut self, actions: &mut Vec<SetAction>) {
        if matches!(self.work, Work::Idle | Work::Pulling { .. } | Work::Waiting { .. }) {
            self.drop_kept(actions);
        }
    }

    pub(super) fn staged(
        &mut self,
        result: Result<(), String>,
        now: Duration,
        jitter: f64,
        actions: &mut Vec<SetAction>,
    ) {
        let Work::Staging(mut target) = std::mem::replace(&mut self.work, Work::Idle) else {
            return;
        };
        let took = now.saturating_sub(self.begun).as_millis();
        target.staging_ms = u64::try_from(took).unwrap_or(u64::MAX);
        let wanted = self.wanted.as_ref() == Some(&target.set);
        match result {
            // Nothing that runs is disturbed by a first start.
            Ok(()) if wanted && (self.running.is_none() || target.set.force) => {
                self.release(target, actions);
            }
            Ok(()) if wanted => {
                actions.push(SetAction::AskBusy);
                self.work = Work::Held { target, busy: None, ask_at: None };
            }
            Ok(()) => actions.push(SetAction::Discard),
            Err(reason) => {
                if target.kept {
                    // Whatever is wrong with it: the next attempt pulls and mounts it anew.
                    self.drop_kept(actions);
                }
                if wanted {
                    self.fail(reason, now, jitter);
                }
            }
        }
    }

    fn release(&mut self, target: Target, actions: &mut Vec<SetAction>) {
        actions.push(SetAction::CutOver(target.set.clone()));
        self.progress = None;
        self.work = Work::CuttingOver(target);
    }

    pub(super) fn busy(
        &mut self,
        why: Option<String>,
        now: Duration,
        actions: &mut Vec<SetAction>,
    ) {
        match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Held { target, .. } if why.is_none() => self.release(target, actions),
            Work::Held { target, .. } => {
                self.work = Work::Held { target, busy: why, ask_at: Some(now + BUSY_PACE) };
            }
            other => self.work = other,
        }
    }

    pub(super) fn ask_when_due(&mut self, now: Duration, actions: &mut Vec<SetAction>) {
        if let Work::Held { ask_at: Some(at), .. } = &self.work
            && *at <= now
        {
            self.ask_again(actions);
        }
    }

    pub(super) fn ask_again(&mut self, actions: &mut Vec<SetAction>) {
        if let Work::Held { ask_at, .. } = &mut self.work
            && ask_at.take().is_some()
        {
            actions.push(SetAction::AskBusy);
        }
    }

    pub(super) fn cut_over(
        &mut self,
        result: Result<Box<Deployment>, Box<CutOverFailure>>,
        now: Duration,
        jitter: f64,
    ) {
        let work = std::mem::replace(&mut self.work, Work::Idle);
        self.progress = None;
        match result {
            Ok(deployment) => {
                let undone = matches!(&work, Work::CuttingOver(target) if target.kept);
                self.took_hold(*deployment, undone, now);
            }
            Err(failure) => self.gone_back(work, *failure, now, jitter),
        }
        self.catch_up(now);
    }

    /// The new set runs. One that an operator came back to ran well here before: it is not on trial, and the set that it
    /// replaced does not come back by itself.
    fn took_hold(&mut self, mut deployment: Deployment, undone: bool, now: Duration) {
        deployment.containers.iter_mut().for_each(|container| container.started = now);
        self.failure = None;
        self.refused = None;
        let old = self.running.take();
        self.kept = old.filter(|old| old.mode == Mode::Contain).as_ref().map(Kept::from);
        if undone {
            deployment.set_outcome(RollOutcome::Undone);
        } else if deployment.mode == Mode::Pivot || deployment.watch.is_zero() {
            deployment.set_outcome(RollOutcome::Committed);
        } else {
            deployment.set_outcome(RollOutcome::Watching);
            let ready_by = now + deployment.ready_within();
            self.work = Work::Watching(Watch { ready_by, until: None });
        }
        self.running = Some(deployment);
    }

    /// The old set runs again, or nothing does.
    fn gone_back(&mut self, work: Work, failure: CutOverFailure, now: Duration, jitter: f64) {
        let CutOverFailure { reason, running, report } = failure;
        let (target, report) = match work {
            Work::CuttingOver(target) => {
                // The kept set was not good enough to come back to; it has been taken down.
                self.kept = None;
                (Some(target.set), report)
            }
            Work::GoingBack(way) => {
                self.kept = None;
                (Some(way.refused.set), way.report)
            }
            _ => (None, report),
        };
        self.running = running;
        let Some(running) = &mut self.running else {
            return self.fail(reason, now, jitter);
        };
        running.containers.iter_mut().for_each(|container| container.started = now);
        running.last_roll = report.map(|report| RollReport {
            outcome: Some(RollOutcome::RolledBack),
            reason: Some(reason.clone()),
            ..report
        });
        if target == self.wanted {
            self.failure = Some((reason.clone(), 0));
        }
        self.refused = target.map(|set| Refused { set, reason });
    }

    /// Looks at a set on trial: it fails, is ready, or has passed.
    pub(super) fn watch(&mut self, now: Duration, actions: &mut Vec<SetAction>) {
        let Work::Watching(watch) = &mut self.work else { return };
        let Some(running) = &mut self.running else { return };
        if let Some(kept) = &self.kept
            && let Some(reason) = failed(running, watch, now)
        {
            let report = running.last_roll.clone().map(|report| RollReport {
                outcome: Some(RollOutcome::RolledBack),
                reason: Some(reason.clone()),
                ..report
            });
            let refused = Refused { set: running.set.clone(), reason: reason.clone() };
            self.work = Work::GoingBack(Box::new(Way { kept: kept.clone(), refused, report }));
            actions.push(SetAction::GoBack(reason));
            return;
        }
        if !running.containers.iter().all(super::ContainerRecord::is_well) {
            watch.until = None;
            return;
        }
        let until = *watch.until.get_or_insert(now + running.watch);
        if let Some(report) = &mut running.last_roll
            && report.ready_us.is_none()
        {
            report.ready_us = ready_us(&running.containers);
        }
        if until <= now {
            running.set_outcome(RollOutcome::Committed);
            self.work = Work::Idle;
        }
    }

    /// A trial ends without a verdict when something else is wanted.
    pub(super) fn end_watch_of_unwanted(&mut self) {
        let (Work::Watching(_), Some(running)) = (&self.work, &mut self.running) else { return };
        let wanted = self.wanted.as_ref().is_some_and(|wanted| is_target(running, wanted));
        if !wanted {
            if let Some(report) = &mut running.last_roll {
                report.outcome = None;
                report.reason = Some("another version was wanted while it was watched".to_owned());
            }
            self.work = Work::Idle;
        }
    }
}

/// Why a set on trial has failed, when it has.
fn failed(running: &Deployment, watch: &Watch, now: Duration) -> Option<String> {
    if let Some(problem) = running.containers.iter().find_map(super::ContainerRecord::problem) {
        return Some(problem);
    }
    let late = running.containers.iter().find(|it| !it.is_well())?;
    (watch.until.is_none() && watch.ready_by <= now).then(|| {
        let seconds = running.ready_within().as_secs();
        format!("container {} is not ready after {seconds} s", late.name)
    })
}

/// The longest time from a container's end until its successor was ready, in microseconds.
fn ready_us(containers: &[super::ContainerRecord]) -> Option<u64> {
    let gap = |it: &super::ContainerRecord| {
        Some(it.readiness.ready_at_ns()?.saturating_sub(it.replaced_at_ns?) / 1000)
    };
    containers.iter().filter_map(gap).max()
}
