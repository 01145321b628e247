//! What containers use of the node, in the report: looked at when something else is reported anyway, and then at most every
//! half minute. Figures alone are no news: a report that differs in nothing else is not written, so that a quiet node stays
//! quiet.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::ids::Name;
use protocol::node::{Observed, Usage};

use super::set::SetMachine;
use super::worker::uptime;
use crate::containers::cgroup::Cgroup;

/// Shortest time between two looks.
const PACE: Duration = Duration::from_secs(30);

/// The figures of the last look, and the report they went with.
#[derive(Debug, Default)]
pub(super) struct Usages {
    last: Option<Observed>,
    looked: Option<Duration>,
    figures: BTreeMap<(Name, Name), Usage>,
}

impl Usages {
    /// A report with figures; None when it says nothing that the last one did not say.
    pub(super) fn complete<'a>(
        &mut self,
        observed: Observed,
        machines: impl Iterator<Item = (&'a Name, &'a SetMachine)>,
    ) -> Option<Observed> {
        if self.last.as_ref() == Some(&observed) {
            return None;
        }
        self.last = Some(observed.clone());
        let now = uptime();
        if self.looked.is_none_or(|at| now.saturating_sub(at) >= PACE) {
            self.looked = Some(now);
            self.figures = machines.flat_map(|(set, machine)| look(set, machine)).collect();
        }
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

    #[test]
    fn a_report_that_says_nothing_new_is_not_written() {
        let golden = include_str!("../../../protocol/golden/v1/observed.json");
        let observed: Observed = serde_json::from_str(golden).expect("golden");
        let mut usages = Usages::default();
        assert!(usages.complete(observed.clone(), std::iter::empty()).is_some());
        assert!(usages.complete(observed.clone(), std::iter::empty()).is_none());
        let other = Observed { desired_version: 999, ..observed };
        assert!(usages.complete(other, std::iter::empty()).is_some());
    }

    #[test]
    fn figures_go_to_the_container_they_are_of() {
        let golden = include_str!("../../../protocol/golden/v1/observed.json");
        let mut observed: Observed = serde_json::from_str(golden).expect("golden");
        let set = &mut observed.imagesets[0];
        let key = (set.name.clone(), set.containers[0].name.clone());
        set.containers[0].usage = None;
        let usage = Usage { pids: Some(3), ..Usage::default() };
        let usages = Usages { figures: [(key, usage)].into(), ..Usages::default() };
        assert_eq!(usages.fill(observed).imagesets[0].containers[0].usage, Some(usage));
    }
}
