//! How an ImageSet's state machine looks from outside: the report to the server and the words for a person. Decides nothing.

use protocol::ids::{Digest, Name};
use protocol::node::{
    ContainerState, DesiredSet, ExitStatus, ObservedContainer, ObservedSet, PullProgress, SetState,
};

use super::{ContainerRecord, Deployment, SetMachine, Work};

impl SetMachine {
    /// The set as it is reported. `pull` is the progress of the pull under way.
    #[must_use]
    pub(in crate::agent) fn observed(&self, pull: Option<PullProgress>) -> Option<ObservedSet> {
        let pull = pull.filter(|_| matches!(self.work, Work::Pulling { .. }));
        let failure = self.failure.as_ref().map(|(reason, _)| reason.clone());
        let attempts = self.failure.as_ref().map(|(_, attempts)| *attempts).filter(|it| *it > 0);
        let retry_at_ms = match self.work {
            Work::Waiting { until } => u64::try_from(until.as_millis()).ok(),
            _ => None,
        };
        if let Some(running) = &self.running {
            let leaving = matches!(self.work, Work::CuttingOver(_) | Work::Stopping);
            let problem = running.containers.iter().find_map(ContainerRecord::problem);
            let problem = problem.filter(|_| !leaving);
            let state = if failure.is_some() || problem.is_some() {
                SetState::Degraded
            } else if leaving || running.containers.iter().all(ContainerRecord::is_well) {
                SetState::Current
            } else if running.containers.iter().all(|it| it.state == ContainerState::Running) {
                SetState::Staged
            } else {
                SetState::Degraded
            };
            return Some(ObservedSet {
                name: self.name.clone(),
                version: running.set.version.clone(),
                digest: running.digest,
                state,
                reason: failure.or(problem).or_else(|| self.activity()),
                attempts,
                retry_at_ms,
                pull,
                containers: running.containers.iter().map(observed_container).collect(),
                last_roll: running.last_roll.clone(),
                previous: self.kept.as_ref().map(|kept| kept.set.clone()),
            });
        }
        let wanted = self.wanted.as_ref()?;
        let (state, digest) = match &self.work {
            Work::CuttingOver(target) => (SetState::Staged, Some(target.digest)),
            Work::Staging(target) => (SetState::Absent, Some(target.digest)),
            _ if self.failure.is_some() => (SetState::Failed, None),
            _ => (SetState::Absent, None),
        };
        Some(ObservedSet {
            name: self.name.clone(),
            version: wanted.version.clone(),
            digest: digest.or(wanted.reference.digest).unwrap_or(Digest([0; 32])),
            state,
            reason: failure.or_else(|| self.activity()),
            attempts,
            retry_at_ms,
            pull,
            containers: Vec::new(),
            last_roll: None,
            previous: None,
        })
    }

    /// The instances of what runs, by container.
    pub(in crate::agent) fn instances(&self) -> impl Iterator<Item = (&Name, &str)> {
        let running = self.running.iter().flat_map(|running| &running.containers);
        running.map(|container| (&container.name, container.instance.as_str()))
    }

    fn activity(&self) -> Option<String> {
        match &self.work {
            Work::Idle | Work::Waiting { .. } => None,
            Work::Pulling { target, .. } => Some(format!("pulling version {}", target.version)),
            Work::Staging(target) => Some(format!("staging version {}", target.set.version)),
            Work::Held { target, busy, .. } => {
                let version = &target.set.version;
                let why = busy.as_ref().map_or("whether the node is busy".to_owned(), busy_text);
                Some(format!("version {version} is staged and waits: {why}"))
            }
            Work::CuttingOver(target) => {
                let to = format!("cutting over to version {}", target.set.version);
                Some(self.progress.as_ref().map_or(to.clone(), |what| format!("{to}: {what}")))
            }
            Work::Watching(_) => {
                let running = self.running.as_ref()?;
                let version = &running.set.version;
                Some(match unready(running) {
                    Some(what) => format!("watching version {version}: {what}"),
                    None => format!("watching version {version}"),
                })
            }
            Work::GoingBack(way) => {
                let version = &way.kept.set.version;
                Some(format!("going back to version {version}: {}", way.refused.reason))
            }
            Work::Stopping => Some("stopping".to_owned()),
        }
    }

    /// What this set waits for, with the reason; None when it is as wanted.
    #[must_use]
    pub(in crate::agent) fn waiting(&self) -> Option<String> {
        let wanted: &DesiredSet = self.wanted.as_ref()?;
        let set = format!("ImageSet {}:{}", self.name, wanted.version);
        if let Some((reason, attempts)) = &self.failure {
            let stays = self.refused.as_ref().zip(self.running.as_ref());
            return Some(match (attempts, stays) {
                (0, Some((_, running))) => {
                    format!("{set}: {reason} (stays on version {})", running.set.version)
                }
                (0, None) => format!("{set}: {reason}"),
                _ => format!("{set}: {reason} (attempt {attempts}, will try again)"),
            });
        }
        match &self.work {
            Work::Held { busy: Some(why), .. } => Some(busy_text(why)),
            Work::CuttingOver(_) => self.progress.as_ref().map(|what| format!("{set}: {what}")),
            Work::Watching(_) => {
                let what = self.running.as_ref().and_then(unready)?;
                Some(format!("{set}: {what}"))
            }
            _ => None,
        }
    }
}

fn busy_text(why: &String) -> String {
    format!("node is busy: {why}")
}

/// The first container that is expected to get ready and is not.
fn unready(running: &Deployment) -> Option<String> {
    let waits = |it: &&ContainerRecord| it.state == ContainerState::Running && !it.is_well();
    let container = running.containers.iter().find(waits)?;
    Some(format!("container {} is not ready yet", container.name))
}

/// How a program ended, in words.
#[must_use]
pub(in crate::agent) fn exit_text(exit: &ExitStatus) -> String {
    match exit {
        ExitStatus { error: Some(error), .. } => error.clone(),
        ExitStatus { signal: Some(signal), .. } => format!("killed by signal {signal}"),
        ExitStatus { code: Some(code), .. } => format!("exit code {code}"),
        _ => "unknown".to_owned(),
    }
}

fn observed_container(container: &ContainerRecord) -> ObservedContainer {
    ObservedContainer {
        name: container.name.clone(),
        state: container.state,
        pid: container.pid,
        restarts: container.restarts,
        exit: container.exit.clone(),
        ready: container
            .readiness
            .is_asked()
            .then_some(container.readiness.ready_at_ns().is_some()),
        health: container.readiness.state(),
        reason: container.readiness.words().map(str::to_owned),
        notes: container.notes.clone(),
        usage: None,
    }
}
