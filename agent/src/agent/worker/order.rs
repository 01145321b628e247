//! In which order the containers of two versions of a set are stopped, released and waited for. Pure.
//!
//! ```text
//! 1  what can be handed over or overlapped and does not wait for a replaced container is released, and waited for
//! 2  what is replaced, or gone from the new version, is stopped: the last of the start order first
//! 3  the rest is released in start order; what others come after is waited for
//! 4  what was handed over or overlapped is asked to end, now that its successor is ready
//! ```
//! Where nothing is handed over and nothing comes after anything this is one stop of all, then one release of all.

use std::collections::BTreeSet;

use protocol::ids::Name;
use protocol::imageset::{Container, Strategy, start_order};

/// One step; everything in it happens at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Stop these of the old version, and go on when they are dead.
    Stop(Vec<Name>),
    /// Let these of the new version pass their exec barriers.
    Release(Vec<Name>),
    /// Wait until these of the new version are ready.
    Await(Vec<Name>),
    /// Ask these of the old version to end, and go on at once.
    Drain(Vec<Name>),
}

/// The steps from one version to the next; `old` is empty on a first start.
pub(super) fn cut_over(new: &[Container], old: &[Container]) -> Vec<Step> {
    let lasting: BTreeSet<&Name> = new
        .iter()
        .filter(|it| it.strategy != Strategy::Replace)
        .filter(|it| old.iter().any(|o| o.name == it.name && o.strategy != Strategy::Replace))
        .map(|it| &it.name)
        .collect();
    let levels = levels(new);
    let early = early(&levels, &lasting);
    let awaited =
        |name: &Name| lasting.contains(name) || new.iter().any(|it| it.after.contains(name));
    let mut steps = Vec::new();
    let release = |steps: &mut Vec<Step>, wanted: &dyn Fn(&Name) -> bool| {
        for level in &levels {
            let names = || level.iter().map(|it| &it.name).filter(|name| wanted(name));
            push(steps, Step::Release, names().cloned().collect());
            push(steps, Step::Await, names().filter(|name| awaited(name)).cloned().collect());
        }
    };
    release(&mut steps, &|name| early.contains(name));
    for names in stop(old) {
        let going = names.into_iter().filter(|name| !lasting.contains(name)).collect();
        push(&mut steps, Step::Stop, going);
    }
    release(&mut steps, &|name| !early.contains(name));
    for names in stop(old) {
        let going = names.into_iter().filter(|name| lasting.contains(name)).collect();
        push(&mut steps, Step::Drain, going);
    }
    steps
}

/// The containers in the order in which they are stopped: each before those that it came after, as many at once as can be.
pub(super) fn stop(containers: &[Container]) -> Vec<Vec<Name>> {
    let names = |level: Vec<&Container>| level.iter().map(|it| it.name.clone()).collect();
    levels(containers).into_iter().rev().map(names).collect()
}

fn push(steps: &mut Vec<Step>, step: fn(Vec<Name>) -> Step, names: Vec<Name>) {
    if !names.is_empty() {
        steps.push(step(names));
    }
}

/// The containers in start order, those together that need not wait for each other. A description with a circle, which is
/// refused before it comes here, counts as one level.
fn levels(containers: &[Container]) -> Vec<Vec<&Container>> {
    let Ok(order) = start_order(containers) else { return vec![containers.iter().collect()] };
    let mut levels: Vec<Vec<&Container>> = Vec::new();
    for container in order.into_iter().filter_map(|at| containers.get(at)) {
        let waits =
            |level: &Vec<&Container>| level.iter().any(|it| container.after.contains(&it.name));
        let at = levels.iter().rposition(waits).map_or(0, |at| at + 1);
        match levels.get_mut(at) {
            Some(level) => level.push(container),
            None => levels.push(vec![container]),
        }
    }
    levels
}

/// What lasts and comes, at any remove, after nothing but what lasts.
fn early<'a>(levels: &[Vec<&'a Container>], lasting: &BTreeSet<&'a Name>) -> BTreeSet<&'a Name> {
    let mut early = BTreeSet::new();
    for container in levels.iter().flatten() {
        if lasting.contains(&container.name) && container.after.iter().all(|it| early.contains(it))
        {
            early.insert(&container.name);
        }
    }
    early
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `web!:db,cache` is a container `web` that is handed over and comes after `db` and `cache`.
    fn set(text: &str) -> Vec<Container> {
        let one = |text: &str| {
            let (name, after) = text.split_once(':').unwrap_or((text, ""));
            let strategy = if name.ends_with('!') { "handover" } else { "replace" };
            let after: Vec<&str> = after.split(',').filter(|name| !name.is_empty()).collect();
            let json = serde_json::json!({"name": name.trim_end_matches('!'), "image": "i",
                "strategy": strategy, "after": after});
            serde_json::from_value(json).expect("container")
        };
        text.split_whitespace().map(one).collect()
    }

    fn text(steps: &[Step]) -> String {
        let words = steps.iter().map(|step| {
            let (word, names) = match step {
                Step::Stop(names) => ("stop", names),
                Step::Release(names) => ("release", names),
                Step::Await(names) => ("await", names),
                Step::Drain(names) => ("drain", names),
            };
            let names: Vec<&str> = names.iter().map(Name::as_str).collect();
            format!("{word} {}", names.join(" "))
        });
        words.collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn each_kind_of_set_is_cut_over_in_its_order() {
        let table = [
            ("a b", "", "release a b"),
            ("a b", "a b", "stop a b; release a b"),
            ("a", "a b", "stop a b; release a"),
            ("a:b b", "", "release b; await b; release a"),
            ("a:b b", "a:b b", "stop a; stop b; release b; await b; release a"),
            ("a!", "", "release a"),
            ("a!", "a!", "release a; await a; drain a"),
            // What held its own port before cannot run beside its successor.
            ("a!", "a", "stop a; release a"),
            ("a", "a!", "stop a; release a"),
            ("web! db", "web! db", "release web; await web; stop db; release db; drain web"),
            (
                "web!:db db",
                "web!:db db",
                "stop db; release db; await db; release web; await web; drain web",
            ),
            (
                "web!:api api!",
                "web!:api api!",
                "release api; await api; release web; await web; drain web; drain api",
            ),
        ];
        for (new, old, expected) in table {
            assert_eq!(text(&cut_over(&set(new), &set(old))), expected, "{old} -> {new}");
        }
    }

    #[test]
    fn what_came_last_is_stopped_first() {
        let names = |text: &str| -> Vec<Vec<String>> {
            let strings = |level: &Vec<Name>| level.iter().map(ToString::to_string).collect();
            stop(&set(text)).iter().map(strings).collect()
        };
        assert_eq!(names("a:b b c"), [vec!["a"], vec!["b", "c"]]);
        assert!(names("").is_empty());
    }

    proptest::proptest! {
        /// Whatever the set: every container is released once and every old one stopped or drained once; nothing is released
        /// before what it comes after was waited for; an old one drains only after its successor was waited for.
        #[test]
        fn every_order_is_complete_and_keeps_to_after(
            after in proptest::collection::vec(proptest::collection::vec(0_usize..6, 0..3), 1..6),
            hand in proptest::collection::vec(proptest::bool::ANY, 12),
            old_size in 0_usize..7,
        ) {
            let make = |size: usize, shift: usize| -> Vec<Container> {
                let one = |at: usize| {
                    let mark = if hand[(at + shift) % 12] { "!" } else { "" };
                    // Only earlier ones: no circles.
                    let before = after.get(at).into_iter().flatten().filter(|it| **it < at);
                    let before: Vec<String> = before.map(|it| format!("c{it}")).collect();
                    format!("c{at}{mark}:{}", before.join(","))
                };
                set(&(0..size).map(one).collect::<Vec<_>>().join(" "))
            };
            let (new, old) = (make(after.len(), 0), make(old_size, 6));
            let steps = cut_over(&new, &old);
            let (mut released, mut awaited, mut gone) = (Vec::new(), Vec::new(), Vec::new());
            for step in &steps {
                match step {
                    Step::Release(names) => {
                        for name in names {
                            let container = new.iter().find(|it| it.name == *name).expect("new");
                            proptest::prop_assert!(container.after.iter().all(|it| awaited.contains(it)));
                        }
                        released.extend(names.clone());
                    }
                    Step::Await(names) => {
                        proptest::prop_assert!(names.iter().all(|it| released.contains(it)));
                        awaited.extend(names.clone());
                    }
                    Step::Stop(names) => gone.extend(names.clone()),
                    Step::Drain(names) => {
                        proptest::prop_assert!(names.iter().all(|it| awaited.contains(it)));
                        gone.extend(names.clone());
                    }
                }
            }
            let sorted = |mut names: Vec<Name>| { names.sort(); names };
            let all = |set: &[Container]| sorted(set.iter().map(|it| it.name.clone()).collect());
            proptest::prop_assert_eq!(sorted(released), all(&new));
            proptest::prop_assert_eq!(sorted(gone), all(&old));
        }
    }
}
