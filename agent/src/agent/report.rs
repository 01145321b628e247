//! What the agent says of the node: the observed document, and the one line on the console.

use std::net::IpAddr;

use protocol::PROTOCOL_VERSION;
use protocol::ids::{Mac, NodeId};
use protocol::node::{Observed, ObservedClock, ObservedLink, ObservedSet, SetState};

use super::notes::Notes;
use crate::identity::Identity;

/// What is known of the machine.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// The node's id, once known.
    pub node: Option<NodeId>,
    /// Boot id, kernel, UUID.
    pub identity: Identity,
    /// The interfaces.
    pub links: Vec<ObservedLink>,
    /// How the kernel crashed before this boot.
    pub last_crash: Option<String>,
}

impl Facts {
    /// Notes the addresses of an interface.
    pub(super) fn link(&mut self, name: &str, mac: Mac, addresses: Vec<IpAddr>) {
        match self.links.iter_mut().find(|link| link.name == name) {
            Some(link) => (link.mac, link.addresses) = (mac, addresses),
            None => {
                let name = name.to_owned();
                self.links.push(ObservedLink { name, mac, addresses, waiting: None });
            }
        }
    }

    /// Notes what an interface waits for.
    pub(super) fn link_waits(&mut self, name: &str, mac: Mac, why: Option<String>) {
        match self.links.iter_mut().find(|link| link.name == name) {
            Some(link) => link.waiting = why,
            None => {
                let (name, addresses) = (name.to_owned(), Vec::new());
                self.links.push(ObservedLink { name, mac, addresses, waiting: why });
            }
        }
    }

    /// Notes that an interface lost its addresses.
    pub(super) fn lost(&mut self, name: &str) {
        if let Some(link) = self.links.iter_mut().find(|link| link.name == name) {
            link.addresses.clear();
        }
    }

    /// Notes that an interface is there no more.
    pub(super) fn gone(&mut self, name: &str) {
        self.links.retain(|link| link.name != name);
    }

    /// The observed document; None until the node knows who it is.
    #[must_use]
    pub(super) fn observed(
        &self,
        notes: &Notes,
        imagesets: Vec<ObservedSet>,
        waiting: Option<String>,
    ) -> Option<Observed> {
        let pivot = protocol::imageset::Mode::Pivot;
        Some(Observed {
            protocol: PROTOCOL_VERSION,
            node: self.node.clone()?,
            boot_id: self.identity.boot_id.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: self.identity.kernel.clone(),
            uuid: self.identity.uuid.clone(),
            agent_starts: notes.starts,
            pivoted: notes.commitments.values().any(|commitment| commitment.mode == pivot),
            links: self.links.clone(),
            desired_version: notes.desired.as_ref().map_or(0, |desired| desired.version),
            timeline: notes.timeline.clone(),
            waiting,
            last_crash: self.last_crash.clone(),
            cache: None,
            layer0: None,
            hardware: None,
            clock: None,
            imagesets,
        })
    }
}

/// Why the server cannot be reached; with what is known of a wrong clock, where a certificate is the matter.
pub(super) fn with_clock(why: String, clock: Option<&ObservedClock>) -> String {
    let about_time = ["certificate expired", "not valid yet", "Expired", "NotValidYet"];
    let problem = clock.and_then(|clock| clock.problem.as_deref());
    match problem.filter(|_| about_time.iter().any(|words| why.contains(words))) {
        Some(problem) => format!("{why}; the node's clock may be wrong: {problem}"),
        None => why,
    }
}

/// The console's line: who the node is, what it runs, what it waits for.
#[must_use]
pub(super) fn status_line(facts: &Facts, sets: &[ObservedSet], waiting: Option<&str>) -> String {
    let mut words = Vec::new();
    words.push(facts.node.as_ref().map_or("no name yet".to_owned(), ToString::to_string));
    let addresses = facts.links.iter().flat_map(|link| &link.addresses).map(ToString::to_string);
    words.extend(addresses);
    for set in sets {
        let state = match set.state {
            SetState::Absent => "absent",
            SetState::Staged => "staged",
            SetState::Current => "running",
            SetState::Degraded => "degraded",
            SetState::Failed => "failed",
        };
        words.push(format!("{}:{} {state}", set.name, set.version));
    }
    match waiting {
        Some(waiting) => words.push(format!("waiting: {waiting}")),
        None if sets.is_empty() => words.push("nothing to run".to_owned()),
        None => {}
    }
    words.join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_is_not_valid_at_the_nodes_time_brings_up_the_clock() {
        let clock = |problem: Option<&str>| ObservedClock {
            problem: problem.map(str::to_owned),
            ..ObservedClock::default()
        };
        let (why, silent) = ("TLS: invalid peer certificate: Expired", Some("1.2.3.4 (silent)"));
        let with = |why: &str, problem| with_clock(why.to_owned(), Some(&clock(problem)));
        let expected = format!("{why}; the node's clock may be wrong: 1.2.3.4 (silent)");
        assert_eq!(with(why, silent), expected);
        assert_eq!(with(why, None), why);
        assert_eq!(with("connection refused", silent), "connection refused");
    }

    fn facts() -> Facts {
        let identity = Identity { boot_id: "b".to_owned(), kernel: "6.12".to_owned(), uuid: None };
        Facts {
            node: Some("n1".parse().expect("id")),
            identity,
            links: Vec::new(),
            last_crash: None,
        }
    }

    #[test]
    fn the_status_line_says_who_what_and_why() {
        let mut facts = facts();
        facts.link("eth0", Mac([2, 0, 0, 0, 0, 1]), vec!["10.9.0.101".parse().expect("address")]);
        assert_eq!(status_line(&facts, &[], None), "n1 | 10.9.0.101 | nothing to run");
        facts.lost("eth0");
        assert_eq!(
            status_line(&facts, &[], Some("eth0: no carrier")),
            "n1 | waiting: eth0: no carrier"
        );
    }

    #[test]
    fn an_interface_that_is_gone_is_not_reported_any_more() {
        let mut facts = facts();
        facts.link_waits("eth9", Mac([2; 6]), Some("no carrier".to_owned()));
        let names =
            |facts: &Facts| facts.links.iter().map(|it| it.name.clone()).collect::<Vec<_>>();
        assert!(names(&facts).contains(&"eth9".to_owned()));
        facts.gone("eth9");
        assert!(!names(&facts).contains(&"eth9".to_owned()));
    }

    #[test]
    fn a_node_without_a_name_reports_nothing() {
        let mut facts = facts();
        facts.node = None;
        assert!(facts.observed(&Notes::default(), Vec::new(), None).is_none());
    }
}
