//! How what is wanted of a node changes. Pure: takes the document that stands, returns the one that shall.

use protocol::ids::NodeId;
use protocol::node::{Desired, DesiredLayer0, DesiredSet, PowerAction, PowerRequest};

/// The version of a node's first document: an agent that has acted on none says 0.
pub const FIRST_VERSION: u64 = 1;

/// The document of a node of which nothing is wanted yet.
#[must_use]
pub fn first(node: NodeId) -> Desired {
    Desired { version: FIRST_VERSION, ..Desired::empty(node) }
}

/// The document with this ImageSet in place of the one of the same name.
#[must_use]
pub fn with_set(current: &Desired, set: DesiredSet) -> Desired {
    let mut next = Desired { version: current.version + 1, ..current.clone() };
    match next.imagesets.iter_mut().find(|existing| existing.name == set.name) {
        Some(existing) => *existing = set,
        None => next.imagesets.push(set),
    }
    next
}

/// The document with a request to end this boot.
#[must_use]
pub fn with_power(current: &Desired, action: PowerAction, boot_id: &str) -> Desired {
    let power = Some(PowerRequest { action, boot_id: boot_id.to_owned() });
    Desired { version: current.version + 1, power, ..current.clone() }
}

/// The document with this ImageSet by a roll: one that was asked for before is asked for again.
#[must_use]
pub fn with_roll(current: &Desired, set: DesiredSet) -> Desired {
    with_set(current, DesiredSet { roll: current.version + 1, ..set })
}

/// The document of a node that is busy for this reason, or free.
#[must_use]
pub fn with_busy(current: &Desired, busy: Option<String>) -> Desired {
    Desired { version: current.version + 1, busy, ..current.clone() }
}

/// The document of a node that shall run this Layer0.
#[must_use]
pub fn with_layer0(current: &Desired, layer0: DesiredLayer0) -> Desired {
    Desired { version: current.version + 1, layer0: Some(layer0), ..current.clone() }
}

/// Whether the long poll's caller, who has `after`, should get this document now. Any other version counts, not only
/// a later one: a server restored from an older database still has to be heard.
#[must_use]
pub fn is_news(current: &Desired, after: Option<u64>) -> bool {
    after != Some(current.version)
}

#[cfg(test)]
mod tests {
    use protocol::ids::Digest;

    use super::*;

    fn set(name: &str, version: &str) -> DesiredSet {
        let digest = Digest::of(version.as_bytes());
        DesiredSet {
            name: name.parse().expect("name"),
            version: version.parse().expect("version"),
            reference: format!("http://r:1/{name}:{version}@{digest}").parse().expect("reference"),
            roll: 0,
            force: false,
        }
    }

    #[test]
    fn a_set_replaces_the_one_of_its_name_and_leaves_the_others() {
        let start = first("n1".parse().expect("id"));
        let two = with_set(&with_set(&start, set("a", "1")), set("b", "1"));
        let rolled = with_set(&two, set("a", "2"));
        assert_eq!(rolled.version, FIRST_VERSION + 3);
        assert_eq!(rolled.imagesets, [set("a", "2"), set("b", "1")]);
    }

    #[test]
    fn every_roll_is_another_one_even_to_the_same_version() {
        let once = with_roll(&first("n1".parse().expect("id")), set("a", "1"));
        let twice = with_roll(&once, set("a", "1"));
        assert_ne!(once.imagesets, twice.imagesets);
        let busy = with_busy(&twice, Some("job 1".to_owned()));
        assert_eq!((busy.version, busy.imagesets), (twice.version + 1, twice.imagesets));
    }

    #[test]
    fn a_power_request_names_the_boot_it_ends() {
        let next = with_power(&first("n1".parse().expect("id")), PowerAction::Reboot, "b");
        assert_eq!(next.version, 2);
        let expected = PowerRequest { action: PowerAction::Reboot, boot_id: "b".to_owned() };
        assert_eq!(next.power, Some(expected));
    }

    #[test]
    fn only_the_version_that_the_caller_has_is_no_news() {
        let current = Desired { version: 5, ..first("n1".parse().expect("id")) };
        for (after, news) in [(None, true), (Some(4), true), (Some(5), false), (Some(9), true)] {
            assert_eq!(is_news(&current, after), news, "{after:?}");
        }
    }
}
