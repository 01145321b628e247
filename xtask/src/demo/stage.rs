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
    /// The version that runs meanwhile, when it is another one.
    pub(crate) other: Option<Version>,
}

impl Stage {
    /// How far this node has come with this version of this set.
    pub(crate) fn of(record: Option<&NodeRecord>, name: &Name, version: &Version) -> Self {
        let observed = record.and_then(|record| record.observed.as_ref());
        let any =
            observed.and_then(|observed| observed.imagesets.iter().find(|set| set.name == *name));
        // While the next version is fetched the report is still of the one that runs.
        let other = any.filter(|set| set.version != *version && runs(set));
        let set = any.filter(|set| set.version == *version);
        Self {
            phase: record.and_then(|record| record.boot.iter().map(|time| time.phase).max()),
            pull: any.and_then(|set| set.pull.clone()),
            waiting: observed.and_then(|observed| observed.waiting.clone()),
            failure: any
                .filter(|set| failed(set))
                .map(|set| set.reason.clone().unwrap_or_else(|| "no reason given".to_owned())),
            arrived: set.is_some_and(|set| set.state == SetState::Current),
            other: other.map(|set| set.version.clone()),
        }
    }

    /// The word for it, for output that has no room for more.
    pub(crate) fn word(&self) -> &'static str {
        match self.phase {
            _ if self.arrived => "running",
            _ if self.pull.is_some() => "pulling",
            None => "firmware",
            _ if self.other.is_some() => "rolling",
            Some(phase) => phase.as_str(),
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())?;
        match &self.pull {
            // Before the manifests are read nobody knows how much it will be.
            Some(pull) if pull.total > 0 => {
                write!(f, "  {} of {}", size(pull.bytes), size(pull.total))?;
                if pull.bytes_per_s > 0 {
                    write!(f, ", {}/s", size(pull.bytes_per_s))?;
                }
            }
            _ => {}
        }
        if let Some(failure) = &self.failure {
            return write!(f, "  failed, and is tried again: {failure}");
        }
        match (&self.waiting, &self.other) {
            (Some(waiting), _) if !self.arrived => write!(f, "  {waiting}"),
            (None, Some(version)) => write!(f, "  version {version} still runs"),
            _ => Ok(()),
        }
    }
}

/// Whether a set stands otherwise than is wanted, and no pull is about to change that.
fn failed(set: &ObservedSet) -> bool {
    set.state == SetState::Failed || (set.state == SetState::Degraded && set.pull.is_none())
}

/// Whether anything of a set runs.
fn runs(set: &ObservedSet) -> bool {
    matches!(set.state, SetState::Current | SetState::Degraded)
}

/// Bytes in the unit that fits, decimal: `120 B`, `655 kB`, `2.9 MB`.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..999_500 => format!("{} kB", (bytes + 500) / 1_000),
        _ => {
            let tenths = bytes.saturating_add(50_000) / 100_000;
            format!("{}.{} MB", tenths / 10, tenths % 10)
        }
    }
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
        assert_eq!(stage.to_string(), "kernel");
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

    fn pulling(bytes: u64, total: u64, bytes_per_s: u64) -> Stage {
        Stage {
            phase: Some(Phase::Pulling),
            pull: Some(PullProgress { bytes, total, bytes_per_s }),
            waiting: None,
            failure: None,
            arrived: false,
            other: None,
        }
    }

    #[test]
    fn a_pull_shows_bytes_and_speed_as_far_as_they_are_known() {
        let shown = |bytes, total, speed| pulling(bytes, total, speed).to_string();
        assert_eq!(shown(1_250_000, 3_000_000, 90_000), "pulling  1.3 MB of 3.0 MB, 90 kB/s");
        assert_eq!(shown(0, 3_000_000, 0), "pulling  0 B of 3.0 MB");
        assert_eq!(shown(0, 0, 0), "pulling");
    }

    #[test]
    fn a_failure_shows_its_reason_and_that_the_node_goes_on() {
        let stage = Stage { pull: None, failure: Some("no route".to_owned()), ..pulling(0, 0, 0) };
        assert_eq!(stage.to_string(), "pulling  failed, and is tried again: no route");
    }

    #[test]
    fn a_roll_under_way_says_what_runs_meanwhile() {
        let observed: Observed =
            serde_json::from_str(include_str!("../../../protocol/golden/v1/observed.json"))
                .expect("golden");
        let mut set = observed.imagesets[0].clone();
        (set.state, set.pull) = (SetState::Current, None);
        let running = set.version.clone();
        let mut node = record(Phase::Running);
        let (name, next) = (set.name.clone(), "99".parse().expect("version"));
        node.observed = Some(Observed { imagesets: vec![set], waiting: None, ..observed });
        let stage = Stage::of(Some(&node), &name, &next);
        assert_eq!(stage.to_string(), format!("rolling  version {running} still runs"));
    }

    #[test]
    fn sizes_have_the_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1 kB"),
            (654_632, "655 kB"),
            (999_499, "999 kB"),
            (999_500, "1.0 MB"),
            (2_860_067, "2.9 MB"),
            (u64::MAX, "18446744073709.5 MB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
