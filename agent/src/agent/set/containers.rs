//! The part of an ImageSet's state machine that is about its containers: they end, are heard of, and are started again.

use std::time::Duration;

use protocol::ids::Name;
use protocol::imageset::Restart;
use protocol::node::{ContainerState, ExitStatus};

use super::{ContainerRecord, Early, SetAction, SetMachine, Started, Work};
use crate::agent::readiness::Word;
use crate::containers::policy::{backoff, failures_after, should_restart};

impl SetMachine {
    /// Takes what was heard of instances before their start was.
    pub(super) fn catch_up(&mut self, now: Duration) {
        for (instance, early) in std::mem::take(&mut self.early) {
            match early {
                Early::Ended(exit) => self.ended(&instance, exit, now),
                Early::Word(word, at_ns) => self.word(&instance, word, at_ns, now),
            }
        }
    }

    /// Whether instances are being started whose names are not known yet.
    fn is_starting(&self) -> bool {
        let mut containers = self.running.iter().flat_map(|running| &running.containers);
        matches!(self.work, Work::CuttingOver(_) | Work::GoingBack(_))
            || containers.any(|it| it.state == ContainerState::Created)
    }

    fn container(&mut self, instance: &str) -> Option<&mut ContainerRecord> {
        let mut containers = self.running.iter_mut().flat_map(|running| &mut running.containers);
        containers.find(|it| it.instance == instance)
    }

    pub(super) fn ended(&mut self, instance: &str, exit: ExitStatus, now: Duration) {
        let (leaving, starting) = (self.is_leaving(), self.is_starting());
        let Some(container) = self.container(instance) else {
            if starting {
                self.early.push((instance.to_owned(), Early::Ended(exit)));
            }
            return;
        };
        if container.pid.is_none() {
            // Known from its directory already (adoption).
            return;
        }
        container.pid = None;
        if leaving {
            container.state = ContainerState::Exited;
            return;
        }
        let clean = exit.code == Some(0);
        container.state = if clean { ContainerState::Exited } else { ContainerState::Dead };
        container.exit = Some(exit);
        let ran = now.saturating_sub(container.started);
        container.failures = failures_after(container.failures, ran);
        if container.exit.as_ref().is_some_and(|exit| should_restart(container.restart, exit)) {
            container.restart_at = Some(now + backoff(container.failures.saturating_sub(1)));
        }
    }

    /// An unhealthy container is started again as if it had ended.
    pub(super) fn word(&mut self, instance: &str, word: Word, at_ns: u64, now: Duration) {
        let starting = self.is_starting();
        let Some(container) = self.container(instance) else {
            if starting {
                self.early.push((instance.to_owned(), Early::Word(word, at_ns)));
            }
            return;
        };
        container.readiness.take(&word, at_ns);
        let unhealthy = matches!(word, Word::Unhealthy(_)) && container.pid.is_some();
        if unhealthy && container.restart != Restart::Never && container.restart_at.is_none() {
            let ran = now.saturating_sub(container.started);
            container.failures = failures_after(container.failures, ran);
            container.restart_at = Some(now + backoff(container.failures.saturating_sub(1)));
        }
    }

    pub(super) fn restarted(
        &mut self,
        name: &Name,
        result: Result<Started, String>,
        now: Duration,
    ) {
        let Some(running) = &mut self.running else { return };
        let Some(container) = running.containers.iter_mut().find(|it| it.name == *name) else {
            return;
        };
        match result {
            Ok(started) => {
                container.instance = started.instance;
                container.pid = Some(started.pid);
                container.state = ContainerState::Running;
                container.started = now;
                container.readiness = container.readiness.clone().begun(started.exec_at_ns);
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
    pub(super) fn restart_due(&mut self, now: Duration, actions: &mut Vec<SetAction>) {
        if self.is_leaving() {
            return;
        }
        let containers = self.running.iter_mut().flat_map(|running| &mut running.containers);
        for container in containers.filter(|it| it.restart_at.is_some_and(|at| at <= now)) {
            container.restart_at = None;
            container.state = ContainerState::Created;
            container.pid = None;
            container.instance.clear();
            container.restarts = container.restarts.saturating_add(1);
            actions.push(SetAction::Restart {
                container: container.name.clone(),
                restarts: container.restarts,
            });
        }
    }
}

impl ContainerRecord {
    /// Whether it does what it is there for: it runs and is well, or it has done its work.
    pub(super) fn is_well(&self) -> bool {
        match self.state {
            ContainerState::Running => self.readiness.is_well(),
            ContainerState::Exited => self.restart != Restart::Always,
            _ => false,
        }
    }

    /// Why it counts as failed, when it does.
    pub(super) fn problem(&self) -> Option<String> {
        let name = &self.name;
        if let (ContainerState::Running, Some(why)) = (self.state, self.readiness.unhealthy()) {
            return Some(format!("container {name} is unhealthy: {why}"));
        }
        let over = matches!(self.state, ContainerState::Dead | ContainerState::Exited);
        if !over || self.is_well() {
            return None;
        }
        let how = self.exit.as_ref().map_or("unknown".to_owned(), super::exit_text);
        Some(format!("container {name} ended: {how}"))
    }
}
