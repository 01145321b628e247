//! What of an ImageSet's state machine outlives the agent: the note that is on disk before anything irrevocable is done.
//!
//! | work | the note says | a new agent |
//! |---|---|---|
//! | until cut-over | the old set | keeps the old, throws away what was staged |
//! | CuttingOver | the new set on trial, the old kept | finishes the new, watches it, can still go back |
//! | Watching | the same, with the time that is left | goes on watching |
//! | GoingBack | the old set, the new one refused | ends the new, starts the old |
//! | committed | the new set, the old kept | keeps both as they are |
//!
//! At every moment the note names exactly one set to run.

use std::time::Duration;

use protocol::ids::Digest;
use protocol::imageset::Mode;
use protocol::node::{DesiredSet, RollOutcome, RollReport};
use serde::{Deserialize, Serialize};

use super::{Deployment, Kept, SetMachine, Target, Watch, Work};

/// What a set runs, or is about to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::agent) struct Commitment {
    /// What it was asked for as.
    pub set: DesiredSet,
    /// Digest of its index.
    pub digest: Digest,
    /// How it takes hold of the node.
    pub mode: Mode,
    /// What the last cut-over cost.
    #[serde(default)]
    pub last_roll: Option<RollReport>,
    /// What is kept staged.
    #[serde(default)]
    pub kept: Option<Kept>,
    /// Set while it is on trial.
    #[serde(default)]
    pub trial: Option<Trial>,
    /// What was gone back from.
    #[serde(default)]
    pub refused: Option<Refused>,
    /// Whether the cut-over to it was still under way.
    #[serde(default)]
    pub cutting_over: bool,
}

impl Commitment {
    /// The step that writing this down is.
    #[must_use]
    pub(in crate::agent) fn step(&self) -> &'static str {
        match (&self.trial, &self.refused) {
            _ if self.cutting_over => "noted",
            (_, Some(_)) => "going-back-noted",
            (Some(_), None) => "watching",
            (None, None) if self.kept.is_none() => "kept-dropped",
            (None, None) => "committed",
        }
    }
}

/// A set on trial.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::agent) struct Trial {
    /// When it is committed, milliseconds of CLOCK_BOOTTIME; none while not all of it is ready.
    #[serde(default)]
    pub until_ms: Option<u64>,
}

/// A set that was gone back from. It is not tried again while the very same is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::agent) struct Refused {
    /// What was wanted.
    pub set: DesiredSet,
    /// Why it was gone back from.
    pub reason: String,
}

impl SetMachine {
    /// A machine that goes on where an earlier agent was, with what was found of it.
    #[must_use]
    pub(in crate::agent) fn adopted(
        running: Deployment,
        kept: Option<Kept>,
        commitment: &Commitment,
        now: Duration,
    ) -> Self {
        let work = match commitment.trial {
            Some(trial) => Work::Watching(Watch {
                ready_by: now + running.ready_within(),
                until: trial.until_ms.map(Duration::from_millis),
            }),
            None => Work::Idle,
        };
        let refused = commitment.refused.clone();
        let failure = refused.as_ref().map(|refused| (refused.reason.clone(), 0));
        let machine = Self::new(running.set.name.clone());
        Self { running: Some(running), kept, work, refused, failure, ..machine }
    }

    /// What a new agent can say of a cut-over in which this one died.
    fn report_so_far(&self, target: &Target) -> RollReport {
        RollReport {
            from: self.running.as_ref().map(|running| running.digest),
            to: target.digest,
            bytes: target.bytes,
            staging_ms: target.staging_ms,
            blackout_us: None,
            ready_us: None,
            outcome: Some(match target.kept {
                true => RollOutcome::Undone,
                false => RollOutcome::Watching,
            }),
            reason: None,
        }
    }

    /// What is to be on disk now; none when nothing runs nor is about to.
    #[must_use]
    pub(in crate::agent) fn note(&self) -> Option<Commitment> {
        match &self.work {
            Work::CuttingOver(target) => Some(Commitment {
                set: target.set.clone(),
                digest: target.digest,
                mode: target.mode,
                last_roll: Some(self.report_so_far(target)),
                kept: self.running.as_ref().filter(|it| it.mode == Mode::Contain).map(Kept::from),
                trial: (!target.kept).then(Trial::default),
                refused: None,
                cutting_over: true,
            }),
            Work::GoingBack(way) => Some(Commitment {
                set: way.kept.set.clone(),
                digest: way.kept.digest,
                mode: Mode::Contain,
                last_roll: way.report.clone(),
                kept: None,
                trial: None,
                refused: Some(way.refused.clone()),
                cutting_over: false,
            }),
            work => self.running.as_ref().map(|running| Commitment {
                set: running.set.clone(),
                digest: running.digest,
                mode: running.mode,
                last_roll: running.last_roll.clone(),
                kept: self.kept.clone(),
                trial: match work {
                    Work::Watching(watch) => Some(Trial {
                        until_ms: watch
                            .until
                            .map(|at| u64::try_from(at.as_millis()).unwrap_or(u64::MAX)),
                    }),
                    _ => None,
                },
                refused: self.refused.clone(),
                cutting_over: false,
            }),
        }
    }
}

impl From<&Deployment> for Kept {
    fn from(deployment: &Deployment) -> Self {
        Self { set: deployment.set.clone(), digest: deployment.digest }
    }
}
