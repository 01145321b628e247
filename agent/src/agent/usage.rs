//! What containers use of the node, in the report: looked at when something else is reported anyway, and then at most every
//! half minute. Figures alone are news once a minute, and only when the agent is awake for another reason, such as the end of
//! a long poll: nothing wakes a quiet node for them.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::ids::Name;
use protocol::node::{Observed, Usage};

use super::set::SetMachine;
use super::worker::uptime;
use crate::containers::cgroup::Cgroup;

/// Shortest time between two looks.
const PACE: Duration = Duration::from_secs(30);

/// Age from which figures are looked at although nothing else is new.
const STALE: Duration = Duration::from_secs(60);

/// The figures of the last look, and the report they went with.
#[derive(Debug, Default)]
pub(super) struct Usages {
    last: Option<Observed>,
    looked: Option<Duration>,
    figures: Figures,
}

/// What each container of each set uses.
type Figures = BTreeMap<(Name, Name), Usage>;

impl Usages {
    /// A report with figures; None when it says nothing that the last one did not say.
    pub(super) fn complete<'a>(
        &mut self,
        observed: Observed,
        machines: impl Iterator<Item = (&'a Name, &'a SetMachine)>,
    ) -> Option<Observed> {
        self.complete_at(observed, uptime(), || {
            machines.flat_map(|(set, machine)| look(set, machine)).collect()
        })
    }

    fn complete_at(
        &mut self,
        observed: Observed,
        now: Duration,
        look: impl FnOnce() -> Figures,
    ) -> Option<Observed> {
        let is_news = self.last.as_ref() != Some(&observed);
        let pace = if is_news { PACE } else { STALE };
        let is_due = self.looked.is_none_or(|at| now.saturating_sub(at) >= pace);
        let before = is_due.then(|| std::mem::replace(&mut self.figures, look()));
        if is_due {
            self.looked = Some(now);
        }
        if !is_news && before.is_none_or(|before| before == self.figures) {
            return None;
        }
        self.last = Some(observed.clone());
        Some(self.fill(observed))
    }

    fn fill(&self, mut observed: Observed) -> Observed {
        for set in &mut observed.imagesets {
            for container in &mut set.containers {
                let key = (set.name.clone(), container.name.clone());
                container.usage = self.figures.get(&key).copied();
            }
        }
        observed
    }
}

fn look(set: &Name, machine: &SetMachine) -> Vec<((Name, Name), Usage)> {
    let instances = machine.instances().filter_map(|(container, instance)| {
        let usage = Cgroup::find(instance)?.usage();
        (usage != Usage::default()).then(|| ((set.clone(), container.clone()), usage))
    });
    instances.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> (Observed, (Name, Name)) {
        let golden = include_str!("../../../protocol/golden/v1/observed.json");
        let mut observed: Observed = serde_json::from_str(golden).expect("golden");
        let set = &mut observed.imagesets[0];
        set.containers[0].usage = None;
        let key = (set.name.clone(), set.containers[0].name.clone());
        (observed, key)
    }

    #[test]
    fn a_report_that_says_nothing_new_is_not_written_unless_the_figures_are_old() {
        let (observed, key) = golden();
        let mut usages = Usages::default();
        let figures = |pids| -> Figures {
            [(key.clone(), Usage { pids: Some(pids), ..Usage::default() })].into()
        };
        let mut at = |seconds: u64, observed: &Observed, pids: u64| {
            let said = usages
                .complete_at(observed.clone(), Duration::from_secs(seconds), || figures(pids));
            said.map(|said| said.imagesets[0].containers[0].usage.and_then(|usage| usage.pids))
        };
        assert_eq!(at(0, &observed, 1), Some(Some(1)), "the first");
        assert_eq!(at(59, &observed, 2), None, "figures alone");
        assert_eq!(at(60, &observed, 2), Some(Some(2)), "old figures");
        assert_eq!(at(130, &observed, 2), None, "the same ones");
        let other = Observed { desired_version: 999, ..observed.clone() };
        assert_eq!(at(140, &other, 3), Some(Some(2)), "news, with the figures of a moment ago");
        assert_eq!(at(170, &observed, 4), Some(Some(4)), "news, half a minute later");
    }

    #[test]
    fn figures_go_to_the_container_they_are_of() {
        let (observed, key) = golden();
        let usage = Usage { pids: Some(3), ..Usage::default() };
        let usages = Usages { figures: [(key, usage)].into(), ..Usages::default() };
        assert_eq!(usages.fill(observed).imagesets[0].containers[0].usage, Some(usage));
    }
}
