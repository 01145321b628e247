//! `layercake node`: the inventory.

mod facts;

use clap::ValueEnum;
use protocol::api::{BusyBody, NodeRecord, PowerBody};
use protocol::ids::NodeId;
use protocol::node::{
    HealthState, Observed, ObservedClock, ObservedLink, ObservedSet, Phase, PowerAction, SetState,
};
use serde_json::json;

use super::client::Client;
use super::output::{Output, ago, bytes, table};
use crate::clock::now_ms;
use crate::why::{SILENT_MS, is_new};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List all nodes.
    List,
    /// Show one node: its boot, what is wanted of it, what it runs.
    Show {
        /// The node.
        id: NodeId,
    },
    /// Show what hardware nodes have, as their agents found it. With --json it is what `cargo xtask build-image --for` reads.
    Facts {
        /// The node, or the one word `all`.
        #[arg(value_name = "NODE|all")]
        nodes: String,
    },
    /// Say that a node is busy, or free again. A busy node stages what is rolled, and cuts over when it is free.
    Busy {
        /// The node.
        id: NodeId,
        /// Whether it is.
        #[arg(default_value = "on")]
        busy: Busy,
        /// Why, for those who wait for it.
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Power a node off or reboot it, in order. Its agent does it.
    Power {
        /// The node.
        id: NodeId,
        /// What to do.
        action: Action,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Busy {
    /// Not to be disturbed.
    On,
    /// Free.
    Off,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Action {
    /// Power off.
    Off,
    /// Reboot.
    Reboot,
}

pub(super) fn run(command: Command, client: &Client, output: Output) -> anyhow::Result<()> {
    match command {
        Command::List => {
            let nodes: Vec<NodeRecord> = client.get("/v1/nodes")?;
            output.result(&nodes, || list_text(&nodes, now_ms()))
        }
        Command::Show { id } => {
            let node: NodeRecord = client.get(&format!("/v1/nodes/{id}"))?;
            output.result(&node, || show_text(&node, now_ms()))
        }
        Command::Facts { nodes } => facts::run(&nodes, client, output),
        Command::Busy { id, busy, reason } => {
            let why = reason.unwrap_or_else(|| "an operator says so".to_owned());
            let body = BusyBody { busy: (busy == Busy::On).then_some(why) };
            client.post_only(&format!("/v1/nodes/{id}/busy"), &body)?;
            let value = json!({ "node": id, "busy": body.busy });
            output.result(&value, || match &body.busy {
                Some(why) => format!("{id} is busy: {why}\n"),
                None => format!("{id} is free\n"),
            })
        }
        Command::Power { id, action } => {
            let action = match action {
                Action::Off => PowerAction::Off,
                Action::Reboot => PowerAction::Reboot,
            };
            let body = PowerBody { action };
            client.post_only(&format!("/v1/nodes/{id}/power"), &body)?;
            let value = json!({ "node": id, "action": action });
            output.result(&value, || {
                let action = match action {
                    PowerAction::Off => "power off",
                    PowerAction::Reboot => "reboot",
                };
                format!("{id} is asked to {action}; `layercake node show {id}` shows how it goes")
            })
        }
    }
}

fn list_text(nodes: &[NodeRecord], now_ms: u64) -> String {
    if nodes.is_empty() {
        return "No node has been seen yet.\n".to_owned();
    }
    let row = |node: &NodeRecord| {
        vec![
            node.id.to_string(),
            node.address.map_or("-".to_owned(), |address| address.to_string()),
            state(node, now_ms),
            sets(node),
            seen(node, now_ms),
            waiting(node),
        ]
    };
    let rows: Vec<Vec<String>> = nodes.iter().map(row).collect();
    table(&["NODE", "ADDRESS", "STATE", "IMAGESETS", "SEEN", "WAITING FOR"], &rows)
}

fn seen(node: &NodeRecord, now_ms: u64) -> String {
    if is_new(node) { "never".to_owned() } else { ago(node.last_seen_ms, now_ms) }
}

fn seen_ago(node: &NodeRecord, now_ms: u64) -> String {
    if is_new(node) { "never".to_owned() } else { ago(node.last_seen_ms, now_ms) + " ago" }
}

/// What the agent of the present boot reported; nothing while the node is on its way to a new one.
fn report(node: &NodeRecord) -> Option<&Observed> {
    let started = node.boot.iter().any(|time| time.phase > Phase::Kernel);
    node.observed.as_ref().filter(|_| started)
}

/// One word on how the node is: `silent` where nothing was heard for longer than the long poll allows, `new` where
/// nothing is known, how far its boot has come, and once its agent reports: `failed`, `waiting`, `degraded`, `idle`
/// (nothing is wanted of it) or `running`.
fn state(node: &NodeRecord, now_ms: u64) -> String {
    let Some(last) = node.boot.last() else { return "new".to_owned() };
    if now_ms.saturating_sub(node.last_seen_ms) > SILENT_MS {
        return format!("silent ({})", last.phase.as_str());
    }
    let Some(observed) = report(node) else { return last.phase.as_str().to_owned() };
    let any = |state| observed.imagesets.iter().any(|set| set.state == state);
    let word = if any(SetState::Failed) {
        "failed"
    } else if let Some(pull) = observed.imagesets.iter().find_map(|set| set.pull.as_ref()) {
        let percent = pull.bytes.saturating_mul(100).checked_div(pull.total).unwrap_or(0);
        return format!("pulling {percent} %");
    } else if observed.waiting.is_some() {
        "waiting"
    } else if any(SetState::Degraded) {
        "degraded"
    } else if observed.imagesets.is_empty() && node.desired.imagesets.is_empty() {
        "idle"
    } else {
        last.phase.as_str()
    };
    word.to_owned()
}

/// What the node waits for, or why a set of it is not as wanted.
fn waiting(node: &NodeRecord) -> String {
    let Some(observed) = report(node) else { return String::new() };
    let reasons = observed.imagesets.iter().filter_map(|set| {
        let why = set.reason.as_ref()?;
        Some(format!("{}: {why}", set.name))
    });
    let all: Vec<String> = observed.waiting.iter().cloned().chain(reasons).collect();
    all.first().map_or_else(String::new, |first| first.replace(char::is_control, " "))
}

fn state_word(state: SetState) -> &'static str {
    match state {
        SetState::Absent => "absent",
        SetState::Staged => "staged",
        SetState::Current => "current",
        SetState::Degraded => "degraded",
        SetState::Failed => "failed",
    }
}

/// What the node runs, `hello:1`; with its state where that is not `current`.
fn sets(node: &NodeRecord) -> String {
    let running = report(node).into_iter().flat_map(|observed| &observed.imagesets);
    let words: Vec<String> = running
        .map(|set| match set.state {
            SetState::Current => format!("{}:{}", set.name, set.version),
            state => format!("{}:{} ({})", set.name, set.version, state_word(state)),
        })
        .collect();
    if words.is_empty() { "-".to_owned() } else { words.join(", ") }
}

fn show_text(node: &NodeRecord, now_ms: u64) -> String {
    let macs: Vec<String> = node.macs.iter().map(ToString::to_string).collect();
    let mut lines = vec![
        format!("node       {}", node.id),
        format!("mac        {}", macs.join(", ")),
        format!("uuid       {}", node.uuid.as_deref().unwrap_or("-")),
        format!("address    {}", node.address.map_or("-".to_owned(), |a| a.to_string())),
        format!("state      {}", state(node, now_ms)),
        format!("seen       {}", seen_ago(node, now_ms)),
    ];
    if let Some(observed) = &node.observed {
        lines.push(format!("kernel     {}, boot {}", observed.kernel, observed.boot_id));
        let starts = observed.agent_starts;
        lines.push(format!("agent      {}, started {starts} times", observed.agent_version));
        if let Some(layer0) = &observed.layer0 {
            let digest = layer0.digest.map_or("-".to_owned(), |digest| digest.short());
            let state = format!("{:?}", layer0.state).to_lowercase();
            let came = if layer0.kexec { ", by kexec" } else { "" };
            lines.push(format!("layer0     {digest}, {state}{came}"));
        }
        lines.extend(observed.links.iter().map(link_line));
        lines.extend(observed.clock.iter().map(clock_line));
        lines.extend(observed.last_crash.iter().map(|why| format!("crashed    before: {why}")));
        lines.extend(observed.waiting.iter().map(|why| format!("waiting    {why}")));
    }
    lines.extend(node.desired.busy.iter().map(|why| format!("busy       {why}")));
    lines.push(String::new());
    lines.push("latest boot".to_owned());
    if node.boot.is_empty() {
        lines.push("  none seen yet".to_owned());
    }
    let start = node.boot.first().map_or(0, |time| time.at_ms);
    for time in &node.boot {
        let after = time.at_ms.saturating_sub(start);
        let (s, ms) = (after / 1000, after % 1000);
        lines.push(format!("  {:8} {s:4}.{ms:03} s", time.phase.as_str()));
    }
    lines.push(String::new());
    lines.push(format!("wanted (version {})", node.desired.version));
    if node.desired.imagesets.is_empty() {
        lines.push("  nothing; `layercake roll start` changes that".to_owned());
    }
    for set in &node.desired.imagesets {
        lines.push(format!("  {}:{}  {}", set.name, set.version, set.reference));
    }
    lines.push(String::new());
    lines.push("runs".to_owned());
    if node.observed.is_none() {
        lines.push("  unknown: its agent has not reported yet".to_owned());
    }
    for set in node.observed.iter().flat_map(|observed| &observed.imagesets) {
        let reason = set.reason.as_ref().map_or(String::new(), |why| format!(": {why}"));
        let (name, version, state) = (&set.name, &set.version, state_word(set.state));
        lines.push(format!("  {name}:{version}  {}  {state}{reason}", set.digest.short()));
        for container in &set.containers {
            let pid = container.pid.map_or(String::new(), |pid| format!(", pid {pid}"));
            let state = format!("{:?}", container.state).to_lowercase();
            let restarts = container.restarts;
            let health = container.health.map_or("", health_word);
            lines
                .push(format!("    {}  {state}{health}{pid}, {restarts} restarts", container.name));
        }
        lines.extend(roll_lines(set));
    }
    lines.join("\n") + "\n"
}

fn link_line(link: &ObservedLink) -> String {
    let mut words: Vec<String> = link.addresses.iter().map(ToString::to_string).collect();
    words.extend(link.waiting.iter().map(|why| format!("waits: {why}")));
    let words = if words.is_empty() { "no address".to_owned() } else { words.join(", ") };
    format!("link       {} {}: {words}", link.name, link.mac)
}

fn clock_line(clock: &ObservedClock) -> String {
    let set = clock.source.as_ref().map(|source| format!("set by {source}"));
    let problem = clock.problem.as_ref().map(|why| format!("last time: {why}"));
    let words: Vec<String> = set.into_iter().chain(problem).collect();
    let words = if words.is_empty() { "not compared yet".to_owned() } else { words.join("; ") };
    format!("clock      {words}")
}

fn health_word(health: HealthState) -> &'static str {
    match health {
        HealthState::Starting => ", not ready yet",
        HealthState::Healthy => ", healthy",
        HealthState::Unhealthy => ", unhealthy",
    }
}

/// What the last roll cost and what became of it, and what is kept for an undo.
fn roll_lines(set: &ObservedSet) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(report) = &set.last_roll {
        let outcome = report.outcome.map_or("done", protocol::node::RollOutcome::as_str);
        let mut words = vec![
            format!("{} fetched", bytes(report.bytes)),
            format!("staged in {} ms", report.staging_ms),
        ];
        let gap = |us: u64, what: &str| format!("{}.{:03} ms {what}", us / 1000, us % 1000);
        words.extend(report.blackout_us.map(|us| gap(us, "to exec")));
        words.extend(report.ready_us.map(|us| gap(us, "to ready")));
        let why = report.reason.as_ref().map_or(String::new(), |why| format!(": {why}"));
        lines.push(format!(
            "    last roll to {}  {}  {}{why}",
            report.to.short(),
            outcome.replace('_', " "),
            words.join(", ")
        ));
    }
    lines.extend(
        set.previous.as_ref().map(|kept| format!("    kept for an undo: {}", kept.version)),
    );
    lines
}

#[cfg(test)]
mod tests {
    use protocol::api::PhaseTime;
    use protocol::node::{ObservedSet, PullProgress};

    use super::*;

    fn node() -> NodeRecord {
        let observed = include_str!("../../../protocol/golden/v1/observed.json");
        let desired = include_str!("../../../protocol/golden/v1/desired.json");
        NodeRecord {
            id: "n1".parse().expect("id"),
            macs: vec!["52:54:00:00:00:01".parse().expect("mac")],
            uuid: None,
            address: Some([10, 9, 0, 101].into()),
            first_seen_ms: 0,
            last_seen_ms: 10_000,
            boot: vec![
                PhaseTime { phase: Phase::Dhcp, at_ms: 1_000 },
                PhaseTime { phase: Phase::Running, at_ms: 9_250 },
            ],
            desired: serde_json::from_str(desired).expect("desired"),
            observed: Some(serde_json::from_str(observed).expect("observed")),
        }
    }

    #[test]
    fn the_list_has_one_line_for_each_node() {
        let mut waits = node();
        waits.id = "n2".parse().expect("id");
        let observed = waits.observed.as_mut().expect("observed");
        observed.waiting = Some("the registry\ndoes not answer".to_owned());
        let expected = "\
NODE  ADDRESS     STATE    IMAGESETS  SEEN  WAITING FOR
n1    10.9.0.101  running  hello:2    5 s
n2    10.9.0.101  waiting  hello:2    5 s   the registry does not answer
";
        assert_eq!(list_text(&[node(), waits], 15_000), expected);
    }

    #[test]
    fn the_state_is_of_the_present_boot_and_says_what_hurts_most() {
        let now = 15_000;
        let check = |change: fn(&mut NodeRecord), now_ms, expected| {
            let mut node = node();
            change(&mut node);
            assert_eq!(state(&node, now_ms), expected);
        };
        check(|_| (), now, "running");
        check(|_| (), 10_000 + SILENT_MS + 1, "silent (running)");
        check(|node| node.boot.clear(), now, "new");
        // It boots again: what its agent said before does not count.
        check(|node| node.boot.truncate(1), now, "dhcp");
        check(|node| set(node).state = SetState::Degraded, now, "degraded");
        check(
            |node| set(node).pull = Some(PullProgress { bytes: 1, total: 4, bytes_per_s: 1 }),
            now,
            "pulling 25 %",
        );
        check(|node| set(node).state = SetState::Failed, now, "failed");
        check(
            |node| {
                node.desired.imagesets.clear();
                node.observed.as_mut().expect("observed").imagesets.clear();
            },
            now,
            "idle",
        );
    }

    fn set(node: &mut NodeRecord) -> &mut ObservedSet {
        let observed = node.observed.as_mut().expect("observed");
        observed.imagesets.first_mut().expect("a set")
    }

    #[test]
    fn one_node_is_shown_with_boot_wishes_and_containers() {
        let text = show_text(&node(), 15_000);
        for line in ["  dhcp        0.000 s", "  running     8.250 s", "wanted (version 7)"] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.contains("hello  running, healthy, pid 97, 1 restarts"), "{text}");
        let roll =
            "watching  597.66 KiB fetched, staged in 240 ms, 3.100 ms to exec, 41.000 ms to ready";
        assert!(text.contains(roll), "{text}");
        assert!(text.contains("kept for an undo: 1"), "{text}");
        assert!(text.contains("link       eth0 52:54:00:00:00:01: 10.9.0.101\n"), "{text}");
    }

    #[test]
    fn a_nodes_troubles_are_shown_with_it() {
        let mut node = node();
        let observed = node.observed.as_mut().expect("observed");
        observed.last_crash = Some("Oops: 0002".to_owned());
        let source = Some("10.9.0.1".to_owned());
        let problem = Some("no time server answers".to_owned());
        observed.clock = Some(ObservedClock { source, problem, ..ObservedClock::default() });
        let link = observed.links.first_mut().expect("a link");
        (link.addresses, link.waiting) = (Vec::new(), Some("no carrier".to_owned()));
        let text = show_text(&node, 15_000);
        for line in [
            "link       eth0 52:54:00:00:00:01: waits: no carrier\n",
            "clock      set by 10.9.0.1; last time: no time server answers\n",
            "crashed    before: Oops: 0002\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
