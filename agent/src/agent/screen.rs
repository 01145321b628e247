//! What the console shows of the node: one calm screen. Pure: the agent's state in, lines out; [`super::console`] draws them.
//!
//! Nothing in it ticks: a line changes only when something has happened.

use protocol::node::{ContainerState, HealthState, ObservedContainer, ObservedSet, SetState};

use super::report::Facts;

/// Most lines, and most characters of one: what every terminal has (VT100), less the line that says when.
pub(super) const ROWS: usize = 23;
pub(super) const COLUMNS: usize = 79;
/// Width of the first column.
const TITLE: usize = 10;

/// What is shown.
#[derive(Debug)]
pub(super) struct View<'a> {
    /// The machine.
    pub facts: &'a Facts,
    /// The boot servers, and why none of them answers, where that is so.
    pub server: (&'a str, Option<&'a str>),
    /// The ImageSets.
    pub sets: &'a [ObservedSet],
    /// What the node waits for.
    pub waiting: Option<&'a str>,
    /// What happened last.
    pub event: &'a str,
}

/// The lines, whole; [`fit`] makes them fit a terminal.
#[must_use]
pub(super) fn lines(view: &View<'_>) -> Vec<String> {
    let node = view.facts.node.as_ref().map_or("no name yet", |node| node.as_str());
    let version = env!("CARGO_PKG_VERSION");
    let mut lines = vec![
        row("Layercake", &format!("{version}, kernel {}", view.facts.identity.kernel)),
        row("node", node),
    ];
    for link in &view.facts.links {
        let addresses: Vec<String> = link.addresses.iter().map(ToString::to_string).collect();
        let text =
            if addresses.is_empty() { "no address".to_owned() } else { addresses.join(", ") };
        lines.push(row(&link.name, &text));
    }
    if view.facts.links.is_empty() {
        lines.push(row("network", "none yet"));
    }
    lines.push(row(
        "server",
        &match view.server {
            ("", _) => "none".to_owned(),
            (urls, None) => format!("{urls} answers"),
            (urls, Some(why)) => {
                format!("{urls}: {}", why.strip_prefix("boot server: ").unwrap_or(why))
            }
        },
    ));
    for set in view.sets {
        push_set(&mut lines, set);
    }
    if view.sets.is_empty() {
        lines.push(row("ImageSets", "none"));
    }
    lines.push(row("waits for", view.waiting.unwrap_or("nothing")));
    lines.push(row("last", view.event));
    lines
}

/// The lines cut to what a terminal has. Those in the middle go first: what the node is stands above, what it waits for below.
#[must_use]
pub(super) fn fit(lines: &[String]) -> Vec<String> {
    let cut = |line: &String| line.chars().take(COLUMNS).collect();
    if lines.len() <= ROWS {
        return lines.iter().map(cut).collect();
    }
    let (head, tail) = (lines.iter().take(ROWS - 3), lines.iter().skip(lines.len() - 2));
    let missing = lines.len() - (ROWS - 1);
    let more = row("", &format!("and {missing} lines more"));
    head.chain(std::iter::once(&more)).chain(tail).map(cut).collect()
}

/// What is new on a screen, for a terminal that only goes on.
#[must_use]
pub(super) fn news<'a>(before: &[String], now: &'a [String]) -> Vec<&'a str> {
    now.iter().filter(|line| !before.contains(line)).map(String::as_str).collect()
}

fn row(title: &str, text: &str) -> String {
    let calm = |c: char| if c.is_control() { ' ' } else { c };
    format!("{title:<TITLE$} {}", text.chars().map(calm).collect::<String>())
}

fn push_set(lines: &mut Vec<String>, set: &ObservedSet) {
    let state = match set.state {
        SetState::Absent => "not there yet",
        SetState::Staged => "ready to start",
        SetState::Current => "runs",
        SetState::Degraded => "degraded",
        SetState::Failed => "does not run",
    };
    let mut text = format!("{} {state}", set.version);
    if let Some(pull) = &set.pull {
        // In tens: a line for each, not for every block.
        let tenths = pull.bytes.saturating_mul(10).checked_div(pull.total).unwrap_or(0);
        text.push_str(&format!(", {tenths}0 % fetched"));
    }
    if let Some(reason) = &set.reason {
        text.push_str(": ");
        text.push_str(reason);
    }
    lines.push(row(set.name.as_str(), &text));
    for container in &set.containers {
        lines.push(row("", &format!("{} {}", container.name, words(container))));
    }
}

fn words(container: &ObservedContainer) -> String {
    let state = match (container.state, container.health) {
        (ContainerState::Running, Some(HealthState::Unhealthy)) => "unhealthy",
        (ContainerState::Running, Some(HealthState::Starting)) => "starts",
        (ContainerState::Running, _) => "runs",
        (ContainerState::Created, _) => "ready to start",
        (ContainerState::Stopping, _) => "stops",
        (ContainerState::Exited, _) => "has ended",
        (ContainerState::Dead, _) => "has failed",
    };
    match container.restarts {
        0 => state.to_owned(),
        count => format!("{state}, started again {count} times"),
    }
}

#[cfg(test)]
mod tests {
    use protocol::ids::Mac;
    use protocol::node::{Observed, PullProgress};

    use super::*;
    use crate::identity::Identity;

    fn facts() -> Facts {
        let identity = Identity { boot_id: "b".to_owned(), kernel: "6.12".to_owned(), uuid: None };
        let mut facts = Facts {
            node: Some("n1".parse().expect("id")),
            identity,
            links: Vec::new(),
            last_crash: None,
        };
        facts.link("eth0", Mac([2, 0, 0, 0, 0, 1]), vec!["10.9.0.101".parse().expect("address")]);
        facts.link("eth1", Mac([2, 0, 0, 0, 0, 2]), Vec::new());
        facts
    }

    fn sets() -> Vec<ObservedSet> {
        let golden = include_str!("../../../protocol/golden/v1/observed.json");
        serde_json::from_str::<Observed>(golden).expect("golden").imagesets
    }

    #[test]
    fn the_screen_says_who_what_and_why() {
        let (facts, mut sets) = (facts(), sets());
        sets[0].reason = Some("pulling\nversion 3".to_owned());
        sets[0].pull = Some(PullProgress { bytes: 57, total: 100, bytes_per_s: 1 });
        let view = View {
            facts: &facts,
            server: ("http://10.9.0.1:8080", Some("boot server: connection refused")),
            sets: &sets,
            waiting: Some("boot server: connection refused"),
            event: "[  1.234] hello: runs",
        };
        let expected = format!(
            "\
Layercake  {}, kernel 6.12
node       n1
eth0       10.9.0.101
eth1       no address
server     http://10.9.0.1:8080: connection refused
hello      2 runs, 50 % fetched: pulling version 3
           hello runs, started again 1 times
waits for  boot server: connection refused
last       [  1.234] hello: runs",
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(lines(&view).join("\n"), expected);
        let idle = lines(&View { server: ("http://s", None), sets: &[], waiting: None, ..view })
            .join("\n");
        for line in ["server     http://s answers", "ImageSets  none", "waits for  nothing"] {
            assert!(idle.contains(line), "{line} is not in\n{idle}");
        }
    }

    #[test]
    fn a_screen_fits_a_terminal_and_keeps_both_its_ends() {
        let many: Vec<String> = (0..40).map(|n| format!("{n} {}", "x".repeat(100))).collect();
        let fitted = fit(&many);
        assert_eq!(fitted.len(), ROWS);
        assert!(fitted.iter().all(|line| line.chars().count() <= COLUMNS));
        assert!(fitted[0].starts_with("0 ") && fitted[ROWS - 1].starts_with("39 "));
        assert_eq!(fitted[ROWS - 3].trim(), "and 18 lines more");
        assert_eq!(fit(&many[..5]).len(), 5);
    }

    #[test]
    fn only_what_is_new_is_news() {
        let text = |lines: &[&str]| lines.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        let (before, now) = (text(&["a", "b"]), text(&["a", "c"]));
        assert_eq!(news(&before, &now), ["c"]);
        assert!(news(&now, &now).is_empty());
    }
}
