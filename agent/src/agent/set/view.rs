//! How an ImageSet's state machine looks from outside: the report to the server and the words for a person. Decides nothing.

use protocol::ids::{Digest, Name};
use protocol::imageset::Restart;
use protocol::node::{
    ContainerState, ExitStatus, ObservedContainer, ObservedSet, PullProgress, SetState,
};

use super::{ContainerRecord, SetMachine, Work};

impl SetMachine {
    /// The set as it is reported. `pull` is the progress of the pull under way.
    #[must_use]
    pub(in crate::agent) fn observed(&self, pull: Option<PullProgress>) -> Option<ObservedSet> {
        let pull = pull.filter(|_| matches!(self.work, Work::Pulling { .. }));
        let failure = self.failure.as_ref().map(|(reason, _)| reason.clone());
        if let Some(running) = &self.running {
            let leaving = matches!(self.work, Work::CuttingOver { .. } | Work::Stopping);
            let healthy = leaving
                || running.containers.iter().all(|it| {
                    it.state == ContainerState::Running
                        || (it.restart != Restart::Always && it.state == ContainerState::Exited)
                });
            let ended = running.containers.iter().find(|it| it.state == ContainerState::Dead);
            let reason = failure.or_else(|| {
                ended.map(|it| {
                    let how = it.exit.as_ref().map_or("unknown".to_owned(), exit_text);
                    format!("container {} ended: {how}", it.name)
                })
            });
            let degraded = self.failure.is_some() || !healthy;
            return Some(ObservedSet {
                name: self.name.clone(),
                version: running.set.version.clone(),
                digest: running.digest,
                state: if degraded { SetState::Degraded } else { SetState::Current },
                reason: reason.or_else(|| self.activity()),
                pull,
                containers: running.containers.iter().map(observed_container).collect(),
                last_roll: running.last_roll.clone(),
            });
        }
        let wanted = self.wanted.as_ref()?;
        let (state, digest) = match &self.work {
            Work::CuttingOver { digest, .. } => (SetState::Staged, Some(*digest)),
            Work::Staging { digest, .. } => (SetState::Absent, Some(*digest)),
            _ if self.failure.is_some() => (SetState::Failed, None),
            _ => (SetState::Absent, None),
        };
        Some(ObservedSet {
            name: self.name.clone(),
            version: wanted.version.clone(),
            digest: digest.or(wanted.reference.digest).unwrap_or(Digest([0; 32])),
            state,
            reason: failure.or_else(|| self.activity()),
            pull,
            containers: Vec::new(),
            last_roll: None,
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
            Work::Staging { target, .. } => Some(format!("staging version {}", target.version)),
            Work::CuttingOver { target, .. } => {
                Some(format!("cutting over to version {}", target.version))
            }
            Work::Stopping => Some("stopping".to_owned()),
        }
    }

    /// What this set waits for, with the reason; None when it is as wanted.
    #[must_use]
    pub(in crate::agent) fn waiting(&self) -> Option<String> {
        let version = &self.wanted.as_ref()?.version;
        let (reason, attempts) = self.failure.as_ref()?;
        let again = if *attempts == 0 {
            String::new()
        } else {
            format!(" (attempt {attempts}, will try again)")
        };
        Some(format!("ImageSet {}:{version}: {reason}{again}", self.name))
    }
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
        notes: container.notes.clone(),
        usage: None,
    }
}
