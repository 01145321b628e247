//! How far a node has come, in words. Pure.

use std::fmt;

use protocol::api::NodeRecord;
use protocol::ids::{Name, Version};
use protocol::node::{ObservedSet, Phase, PullProgress, SetState};

/// How far a node has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stage {
    /// The latest phase that was seen; none while the firmware starts.
    pub(crate) phase: Option<Phase>,
    /// A pull under way.
    pub(crate) pull: Option<PullProgress>,
    /// What the node waits for, in its own words.
    pub(crate) waiting: Option<String>,
    /// Why the set failed, once it has.
    pub(crate) failure: Option<String>,
    /// Whether this version of the set is what runs.
    pub(crate) arrived: bool,
}

impl Stage {
    /// How far this node has come with this version of this set.
    pub(crate) fn of(record: Option<&NodeRecord>, name: &Name, version: &Version) -> Self {
        let observed = record.and_then(|record| record.observed.as_ref());
        let set = observed
            .and_then(|observed| observed.imagesets.iter().find(|set| set.name == *name))
            .filter(|set| set.version == *version);
        let failed = |set: &&ObservedSet| set.state == SetState::Failed;
        Self {
            phase: record.and_then(|record| record.boot.iter().map(|time| time.phase).max()),
            pull: set.and_then(|set| set.pull.clone()),
            waiting: observed.and_then(|observed| observed.waiting.clone()),
            failure: set
                .filter(failed)
                .map(|set| set.reason.clone().unwrap_or_else(|| "no reason given".to_owned())),
            arrived: set.is_some_and(|set| set.state == SetState::Current),
        }
    }

    /// The word for it, for output that has no room for more.
    pub(crate) fn word(&self) -> &'static str {
        match self.phase {
            _ if self.arrived => "running",
            _ if self.pull.is_some() => "pulling",
            None => "firmware",
            Some(phase) => phase.as_str(),
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8}", self.word())?;
        if let Some(pull) = &self.pull {
            let mb = |bytes: u64| bytes_in_mb(bytes);
            write!(f, " {} of {} MB", mb(pull.bytes), mb(pull.total))?;
            write!(f, ", {} MB/s", mb(pull.bytes_per_s))?;
        }
        match (&self.failure, &self.waiting) {
            (Some(failure), _) => write!(f, " failed: {failure}"),
            (None, Some(waiting)) if !self.arrived => write!(f, " {waiting}"),
            _ => Ok(()),
        }
    }
}

/// Megabytes with one digit after the point.
pub(crate) fn bytes_in_mb(bytes: u64) -> String {
    let tenths = bytes.saturating_add(50_000) / 100_000;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use protocol::api::PhaseTime;
    use protocol::node::{Desired, Observed};

    use super::*;

    fn record(phase: Phase) -> NodeRecord {
        let desired: Desired =
            serde_json::from_str(include_str!("../../../protocol/golden/v1/desired.json"))
                .expect("golden");
        NodeRecord {
            id: desired.node.clone(),
            macs: Vec::new(),
            uuid: None,
            address: None,
            first_seen_ms: 0,
            last_seen_ms: 0,
            boot: vec![PhaseTime { phase, at_ms: 1 }],
            desired,
            observed: None,
        }
    }

    #[test]
    fn a_node_that_nobody_heard_of_is_in_its_firmware() {
        let (name, version) = ("hello".parse().expect("name"), "1".parse().expect("version"));
        assert_eq!(Stage::of(None, &name, &version).to_string(), "firmware");
        let stage = Stage::of(Some(&record(Phase::Kernel)), &name, &version);
        assert_eq!(stage.to_string(), "kernel  ");
    }

    #[test]
    fn what_runs_counts_only_at_the_version_asked_for() {
        let observed: Observed =
            serde_json::from_str(include_str!("../../../protocol/golden/v1/observed.json"))
                .expect("golden");
        let set = observed.imagesets[0].clone();
        let mut node = record(Phase::Running);
        node.observed = Some(observed);
        assert!(Stage::of(Some(&node), &set.name, &set.version).arrived);
        let other = "99".parse().expect("version");
        assert!(!Stage::of(Some(&node), &set.name, &other).arrived);
    }

    #[test]
    fn a_pull_shows_bytes_and_speed() {
        let stage = Stage {
            phase: Some(Phase::Pulling),
            pull: Some(PullProgress { bytes: 1_250_000, total: 3_000_000, bytes_per_s: 90_000 }),
            waiting: None,
            failure: None,
            arrived: false,
        };
        assert_eq!(stage.to_string(), "pulling  1.3 of 3.0 MB, 0.1 MB/s");
    }
}
