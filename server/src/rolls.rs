//! How rolls stand. Pure: a roll is decided from what nodes report, and from later rolls.
//!
//! ```text
//! Pending ──reports the digest as current and committed──> Done (final, with what it cost)
//!    │ ├──reports that it could not──> Failed ──an agent that tries again succeeds──> Done
//!    │ └──reports that it went back──> RolledBack (final)
//!    └──a later roll of the same set──> Superseded (final)
//! ```

use protocol::api::{Roll, RollNode, RollState};
use protocol::ids::{Digest, Name, NodeId, Version};
use protocol::node::{DesiredSet, Observed, ObservedSet, RollOutcome, RollReport, SetState};
use protocol::reference::Reference;
use serde::{Deserialize, Serialize};

/// One node of a roll, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The node.
    pub node: NodeId,
    /// Version of the desired document that carries this roll.
    pub desired_version: u64,
    /// How it stands.
    pub state: RollState,
    /// Why, where there is a why.
    #[serde(default)]
    pub reason: Option<String>,
    /// What it cost, once done.
    #[serde(default)]
    pub report: Option<RollReport>,
}

/// A roll, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollRecord {
    /// Its number.
    pub id: u64,
    /// The ImageSet.
    pub name: Name,
    /// The version it goes to.
    pub version: Version,
    /// The reference it goes to, pinned.
    pub reference: Reference,
    /// The nodes.
    pub members: Vec<Member>,
}

impl RollRecord {
    /// The roll as the API shows it.
    #[must_use]
    pub fn to_api(&self) -> Roll {
        let nodes = self.members.iter().map(|member| RollNode {
            node: member.node.clone(),
            state: member.state,
            reason: member.reason.clone(),
            report: member.report.clone(),
        });
        Roll {
            id: self.id,
            name: self.name.clone(),
            version: self.version.clone(),
            reference: self.reference.clone(),
            nodes: nodes.collect(),
        }
    }

    /// Takes in a node's report. True when something changed.
    pub fn observe(&mut self, observed: &Observed) -> bool {
        let Some(digest) = self.reference.digest else { return false };
        let mut changed = false;
        for member in self.members.iter_mut().filter(|member| member.node == observed.node) {
            let open = matches!(member.state, RollState::Pending | RollState::Failed);
            if !open || observed.desired_version < member.desired_version {
                continue;
            }
            let set = observed.imagesets.iter().find(|set| set.name == self.name);
            let (state, reason, report) = judge(set, &digest);
            changed |= (member.state, &member.reason, &member.report) != (state, &reason, &report);
            (member.state, member.reason, member.report) = (state, reason, report);
        }
        changed
    }

    /// A later roll wants another version of this set on these nodes. True when something changed.
    pub fn supersede(&mut self, name: &Name, nodes: &[NodeId]) -> bool {
        if self.name != *name {
            return false;
        }
        let mut changed = false;
        for member in &mut self.members {
            if member.state == RollState::Pending && nodes.contains(&member.node) {
                member.state = RollState::Superseded;
                member.reason = Some("a later roll came after it".to_owned());
                changed = true;
            }
        }
        changed
    }
}

/// What a report of an agent that has acted on the roll says about it.
fn judge(
    set: Option<&ObservedSet>,
    digest: &Digest,
) -> (RollState, Option<String>, Option<RollReport>) {
    let Some(set) = set else { return (RollState::Pending, None, None) };
    let report = set.last_roll.clone().filter(|report| report.to == *digest);
    match report.as_ref().and_then(|report| report.outcome) {
        Some(RollOutcome::RolledBack) => {
            let reason = report.as_ref().and_then(|report| report.reason.clone());
            return (RollState::RolledBack, reason, report);
        }
        // A first start has nothing to go back to: what goes wrong with it is told below.
        Some(RollOutcome::Watching)
            if set.state != SetState::Degraded || set.previous.is_some() =>
        {
            return (RollState::Pending, set.reason.clone(), report);
        }
        _ => {}
    }
    if set.digest == *digest && set.state == SetState::Current {
        return (RollState::Done, None, report);
    }
    let gave_up = match set.state {
        SetState::Failed => true,
        // The old digest, or the new one in bad health; while a pull runs it is merely not there yet.
        SetState::Degraded => set.pull.is_none(),
        SetState::Absent | SetState::Staged | SetState::Current => false,
    };
    match (&set.reason, gave_up) {
        (Some(reason), true) => (RollState::Failed, Some(reason.clone()), None),
        (reason, _) => (RollState::Pending, reason.clone(), None),
    }
}

/// The version of a set that a node is brought back to by an undo; none when nothing is known of one.
///
/// What runs goes first, when it is not what is wanted: the node went back already, or has not rolled yet. Then what the node
/// keeps staged, then the last version that an earlier roll brought it to.
#[must_use]
pub fn undo_target(
    node: &NodeId,
    wanted: &DesiredSet,
    observed: Option<&Observed>,
    rolls: &[RollRecord],
) -> Option<DesiredSet> {
    let digest = wanted.reference.digest?;
    let brought = |to: &dyn Fn(&RollRecord) -> bool| {
        let here = |roll: &&RollRecord| {
            let done = |it: &Member| it.node == *node && it.state == RollState::Done;
            roll.name == wanted.name && roll.members.iter().any(done) && to(roll)
        };
        rolls.iter().rev().find(here).map(|roll| DesiredSet {
            version: roll.version.clone(),
            reference: roll.reference.clone(),
            ..wanted.clone()
        })
    };
    let set = observed.and_then(|it| it.imagesets.iter().find(|set| set.name == wanted.name));
    if let Some(runs) = set.filter(|set| set.digest != digest && !set.containers.is_empty()) {
        let of_roll = brought(&|roll| roll.reference.digest == Some(runs.digest));
        return of_roll.or_else(|| {
            let reference = wanted.reference.clone().with_digest(runs.digest);
            Some(DesiredSet { version: runs.version.clone(), reference, ..wanted.clone() })
        });
    }
    let kept = set.and_then(|set| set.previous.clone());
    kept.or_else(|| brought(&|roll| roll.reference.digest != Some(digest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OBSERVED: &str = include_str!("../../protocol/golden/v1/observed.json");

    fn report(version: u64, digest: Digest, state: SetState, reason: Option<&str>) -> Observed {
        let mut observed: Observed = serde_json::from_str(OBSERVED).expect("golden");
        observed.desired_version = version;
        let set = &mut observed.imagesets[0];
        set.digest = digest;
        set.state = state;
        set.reason = reason.map(str::to_owned);
        if let Some(cost) = &mut set.last_roll {
            (cost.to, cost.outcome) = (digest, Some(RollOutcome::Committed));
        }
        observed
    }

    fn roll() -> RollRecord {
        let digest = Digest::of(b"new");
        RollRecord {
            id: 1,
            name: "hello".parse().expect("name"),
            version: "2".parse().expect("version"),
            reference: format!("http://r:1/hello:2@{digest}").parse().expect("reference"),
            members: vec![Member {
                node: "n1".parse().expect("id"),
                desired_version: 5,
                state: RollState::Pending,
                reason: None,
                report: None,
            }],
        }
    }

    #[track_caller]
    fn check(observed: &Observed, state: RollState, reason: Option<&str>) -> RollRecord {
        let mut roll = roll();
        roll.observe(observed);
        assert_eq!(roll.members[0].state, state);
        assert_eq!(roll.members[0].reason.as_deref(), reason);
        roll
    }

    #[test]
    fn a_node_is_done_when_it_runs_the_digest_of_the_roll() {
        let new = Digest::of(b"new");
        let done = check(&report(5, new, SetState::Current, None), RollState::Done, None);
        assert_eq!(done.members[0].report.as_ref().map(|cost| cost.to), Some(new));
        check(&report(4, new, SetState::Current, None), RollState::Pending, None);
        let old = Digest::of(b"old");
        check(&report(5, old, SetState::Current, None), RollState::Pending, None);
    }

    #[test]
    fn a_node_that_watches_is_pending_and_one_that_went_back_is_rolled_back_for_good() {
        let new = Digest::of(b"new");
        let mut watching = report(5, new, SetState::Current, Some("watching version 2"));
        let cost = watching.imagesets[0].last_roll.as_mut().expect("report");
        cost.outcome = Some(RollOutcome::Watching);
        let roll = check(&watching, RollState::Pending, Some("watching version 2"));
        assert!(roll.members[0].report.is_some(), "what it cost is known already");
        let mut back = report(5, Digest::of(b"old"), SetState::Degraded, Some("x"));
        let cost = back.imagesets[0].last_roll.as_mut().expect("report");
        (cost.to, cost.outcome) = (new, Some(RollOutcome::RolledBack));
        cost.reason = Some("container web ended: exit code 1".to_owned());
        let why = Some("container web ended: exit code 1");
        let mut roll = check(&back, RollState::RolledBack, why);
        assert!(!roll.observe(&report(5, new, SetState::Current, None)));
        // A first start that fails while it is watched has nothing to go back to, and says why.
        watching.imagesets[0].state = SetState::Degraded;
        watching.imagesets[0].previous = None;
        check(&watching, RollState::Failed, Some("watching version 2"));
    }

    #[test]
    fn an_undo_goes_to_what_runs_or_is_kept_or_was_brought_before() {
        let node: NodeId = "n1".parse().expect("id");
        let wanted = DesiredSet {
            name: "hello".parse().expect("name"),
            version: "2".parse().expect("version"),
            reference: roll().reference,
            roll: 5,
            force: false,
        };
        let version = |observed: Option<&Observed>, rolls: &[RollRecord]| {
            undo_target(&node, &wanted, observed, rolls).map(|set| set.version.to_string())
        };
        let old = Digest::of(b"old");
        let mut earlier = roll();
        earlier.version = "0".parse().expect("version");
        earlier.reference = format!("http://r:1/hello:0@{old}").parse().expect("reference");
        earlier.members[0].state = RollState::Done;
        let current = report(5, Digest::of(b"new"), SetState::Current, None);
        assert_eq!(version(Some(&current), &[]).as_deref(), Some("1"), "what it keeps");
        let mut keeps_none = current.clone();
        keeps_none.imagesets[0].previous = None;
        assert_eq!(version(Some(&keeps_none), &[]), None);
        assert_eq!(version(Some(&keeps_none), &[earlier.clone(), roll()]).as_deref(), Some("0"));
        assert_eq!(version(None, &[earlier.clone()]).as_deref(), Some("0"));
        let back = report(5, old, SetState::Degraded, Some("x"));
        let target = undo_target(&node, &wanted, Some(&back), &[]).expect("what runs");
        assert_eq!((target.version.as_str(), target.reference.digest), ("2", Some(old)));
        assert_eq!(version(Some(&back), &[earlier]).as_deref(), Some("0"));
    }

    #[test]
    fn a_node_that_gives_up_has_failed_with_its_reason() {
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        let why = Some("no such blob");
        check(&report(5, new, SetState::Failed, why), RollState::Failed, why);
        check(&report(5, old, SetState::Degraded, why), RollState::Failed, why);
        check(&report(4, old, SetState::Failed, why), RollState::Pending, None);
        let mut pulling = report(5, old, SetState::Degraded, Some("pulling"));
        pulling.imagesets[0].pull = Some(protocol::node::PullProgress::default());
        check(&pulling, RollState::Pending, Some("pulling"));
    }

    #[test]
    fn a_failed_node_that_tries_again_and_succeeds_is_done_and_stays_so() {
        let new = Digest::of(b"new");
        let mut roll =
            check(&report(5, new, SetState::Failed, Some("x")), RollState::Failed, Some("x"));
        assert!(roll.observe(&report(5, new, SetState::Current, None)));
        assert_eq!((roll.members[0].state, &roll.members[0].reason), (RollState::Done, &None));
        assert!(!roll.observe(&report(5, new, SetState::Failed, Some("later"))));
        assert_eq!(roll.members[0].state, RollState::Done);
    }

    #[test]
    fn a_later_roll_supersedes_what_is_pending_and_nothing_else() {
        let (name, nodes) = ("hello".parse().expect("name"), ["n1".parse().expect("id")]);
        let mut pending = roll();
        assert!(!pending.supersede(&"other".parse().expect("name"), &nodes));
        assert!(!pending.supersede(&name, &["n2".parse().expect("id")]));
        assert!(pending.supersede(&name, &nodes));
        assert_eq!(pending.members[0].state, RollState::Superseded);
        let mut done =
            check(&report(5, Digest::of(b"new"), SetState::Current, None), RollState::Done, None);
        assert!(!done.supersede(&name, &nodes));
    }

    #[test]
    fn a_node_that_does_not_know_the_set_yet_is_pending() {
        let mut observed = report(5, Digest::of(b"new"), SetState::Current, None);
        observed.imagesets.clear();
        check(&observed, RollState::Pending, None);
    }
}
