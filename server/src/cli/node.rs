//! `layercake node`: the inventory.

use clap::ValueEnum;
use protocol::api::{NodeRecord, PowerBody};
use protocol::ids::NodeId;
use protocol::node::{PowerAction, SetState};

use super::client::Client;
use super::output::{self, Output, ago, table};
use crate::clock::now_ms;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List all nodes.
    List,
    /// Show one node: its boot, what is wanted of it, what it runs.
    Show {
        /// The node.
        id: NodeId,
    },
    /// Power a node off or reboot it, in order. Its agent does it.
    Power {
        /// The node.
        id: NodeId,
        /// What to do.
        action: Action,
    },
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
        Command::Power { id, action } => {
            let action = match action {
                Action::Off => PowerAction::Off,
                Action::Reboot => PowerAction::Reboot,
            };
            let body = PowerBody { action };
            client.post_only(&format!("/v1/nodes/{id}/power"), &body)?;
            output::say(&format!("{id}: asked"));
            Ok(())
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
            node.boot.last().map_or("-", |time| time.phase.as_str()).to_owned(),
            sets(node),
            ago(node.last_seen_ms, now_ms),
        ]
    };
    let rows: Vec<Vec<String>> = nodes.iter().map(row).collect();
    table(&["NODE", "ADDRESS", "BOOT", "IMAGESETS", "SEEN"], &rows)
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
    let running = node.observed.iter().flat_map(|observed| &observed.imagesets);
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
        format!("seen       {} ago", ago(node.last_seen_ms, now_ms)),
    ];
    if let Some(observed) = &node.observed {
        lines.push(format!("kernel     {}, boot {}", observed.kernel, observed.boot_id));
        let starts = observed.agent_starts;
        lines.push(format!("agent      {}, started {starts} times", observed.agent_version));
        lines.extend(observed.waiting.iter().map(|why| format!("waiting    {why}")));
    }
    lines.push(String::new());
    lines.push("latest boot".to_owned());
    let start = node.boot.first().map_or(0, |time| time.at_ms);
    for time in &node.boot {
        let after = time.at_ms.saturating_sub(start);
        let (s, ms) = (after / 1000, after % 1000);
        lines.push(format!("  {:8} {s:4}.{ms:03} s", time.phase.as_str()));
    }
    lines.push(String::new());
    lines.push(format!("wanted (version {})", node.desired.version));
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
            lines.push(format!("    {}  {state}{pid}, {restarts} restarts", container.name));
        }
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use protocol::api::PhaseTime;
    use protocol::node::Phase;

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
        let expected = "\
NODE  ADDRESS     BOOT     IMAGESETS  SEEN
n1    10.9.0.101  running  hello:2    5 s
";
        assert_eq!(list_text(&[node()], 15_000), expected);
    }

    #[test]
    fn one_node_is_shown_with_boot_wishes_and_containers() {
        let text = show_text(&node(), 15_000);
        for line in ["  dhcp        0.000 s", "  running     8.250 s", "wanted (version 7)"] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.contains("hello  running, pid 97, 1 restarts"), "{text}");
    }
}
