//! The result of the demo: as a table for people, as JSON for programs (`--json`). Pure.
//!
//! The JSON is one object, [`Report`]; its keys stay, new ones may come. What was not seen is `null`.

use protocol::node::{Phase, RollReport};
use serde::Serialize;

use super::stage::size;

/// The whole result.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// The ImageSet.
    pub(crate) imageset: String,
    /// The version that the nodes booted into.
    pub(crate) from: String,
    /// The version that they were rolled to.
    pub(crate) to: String,
    /// What ran the machines: `kvm` or `tcg`.
    pub(crate) accelerator: &'static str,
    /// Milliseconds from the first machine's power-on to the last answer of the new version.
    pub(crate) took_ms: u64,
    /// Every node, in the order of their numbers.
    pub(crate) nodes: Vec<NodeReport>,
}

/// When a phase was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct PhaseAt {
    /// The phase.
    pub(crate) phase: Phase,
    /// Milliseconds since the machine's power came on, on the server's clock.
    pub(crate) ms: u64,
}

/// What was seen of one node.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct NodeReport {
    /// Its id.
    pub(crate) node: String,
    /// Its address.
    pub(crate) address: String,
    /// Its boot, phase by phase.
    pub(crate) phases: Vec<PhaseAt>,
    /// The kernel's boot id, the same before and after the roll.
    pub(crate) boot_id: Option<String>,
    /// Compressed bytes fetched for version 1.
    pub(crate) pulled_bytes: Option<u64>,
    /// Compressed bytes fetched for version 2.
    pub(crate) roll_bytes: Option<u64>,
    /// The roll's blackout as the agent measured it, in microseconds.
    pub(crate) blackout_us: Option<u64>,
    /// Requests of a client that asked all the time during the roll.
    pub(crate) requests: Option<u64>,
    /// Those of them that had no answer.
    pub(crate) failed: Option<u64>,
    /// The longest time that the service gave a client no answer during the roll, in milliseconds.
    pub(crate) client_gap_ms: Option<u64>,
    /// What its service answered before the roll.
    pub(crate) before: String,
    /// What its service answered after the roll.
    pub(crate) after: String,
}

/// Those that the demo's boots have: none of them begins with a kexec.
fn phases() -> impl Iterator<Item = Phase> {
    Phase::ALL.into_iter().filter(|phase| *phase != Phase::Kexec)
}

impl NodeReport {
    /// A node of which nothing has been seen.
    pub(crate) fn new(node: String, address: String) -> Self {
        Self { node, address, ..Self::default() }
    }

    fn cells(&self) -> Vec<String> {
        let unknown = || "-".to_owned();
        let mut cells = vec![self.node.clone()];
        for phase in phases() {
            let at = self.phases.iter().find(|at| at.phase == phase);
            cells.push(at.map_or_else(unknown, |at| seconds(at.ms)));
        }
        cells.push(self.pulled_bytes.map_or_else(unknown, size));
        cells.push(self.roll_bytes.map_or_else(unknown, size));
        cells.push(self.blackout_us.map_or_else(unknown, milliseconds));
        cells.push(match (self.failed, self.requests) {
            (Some(failed), Some(requests)) => format!("{failed} of {requests}"),
            _ => unknown(),
        });
        cells.push(self.client_gap_ms.map_or_else(unknown, |ms| format!("{ms} ms")));
        cells
    }
}

impl Report {
    /// Failed ones, and all, of the clients' requests during the roll.
    pub(crate) fn requests(&self) -> (u64, u64) {
        let failed = self.nodes.iter().filter_map(|node| node.failed).sum();
        (failed, self.nodes.iter().filter_map(|node| node.requests).sum())
    }

    /// The table, and what its columns mean.
    pub(crate) fn table(&self) -> String {
        let mut head = vec!["node".to_owned()];
        head.extend(phases().map(|phase| phase.as_str().to_owned()));
        head.extend(["fetched", "for roll", "blackout", "failed", "client gap"].map(str::to_owned));
        let mut rows = vec![head];
        rows.extend(self.nodes.iter().map(NodeReport::cells));
        let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len))
            .map(|column| rows.iter().filter_map(|row| row.get(column)).map(String::len).max())
            .map(Option::unwrap_or_default)
            .collect();
        let mut text = String::new();
        for row in &rows {
            for (cell, width) in row.iter().zip(&widths) {
                text.push_str(&format!("{cell:>width$}  "));
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        let Self { imageset, from, to, .. } = self;
        text.push_str(&format!(
            "\n\
             dhcp to running  seconds from power-on until the node was there\n\
             fetched          compressed bytes of {imageset}:{from}, fetched at boot\n\
             for roll         compressed bytes fetched for {imageset}:{to}: only what is new in it\n\
             blackout         from the old program's end to the new one's start, by the node's clock\n\
             failed           requests without answer, of a client that asked all the time during the roll\n\
             client gap       the longest that a client of the service waited for its next answer\n"
        ));
        text
    }
}

/// Compressed bytes of a roll.
pub(crate) fn pulled(report: &RollReport) -> u64 {
    report.bytes
}

fn seconds(ms: u64) -> String {
    format!("{}.{}", ms / 1000, ms % 1000 / 100)
}

fn milliseconds(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up_and_shows_what_is_not_known() {
        let mut node = NodeReport::new("n1".to_owned(), "10.9.0.101".to_owned());
        node.phases = vec![
            PhaseAt { phase: Phase::Dhcp, ms: 2_150 },
            PhaseAt { phase: Phase::Running, ms: 12_900 },
        ];
        node.pulled_bytes = Some(654_632);
        node.blackout_us = Some(3_450);
        let table = report(vec![node]).table();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines[0],
            "node  dhcp  ipxe  kernel  init  agent  pulling  staged  running  fetched  for roll  blackout  failed  client gap"
        );
        assert_eq!(
            lines[1],
            "  n1   2.1     -       -     -      -        -       -     12.9   655 kB         -    3.4 ms       -           -"
        );
    }

    fn report(nodes: Vec<NodeReport>) -> Report {
        let (imageset, from, to) = ("hello".to_owned(), "1".to_owned(), "2".to_owned());
        Report { imageset, from, to, accelerator: "tcg", took_ms: 11_000, nodes }
    }

    #[test]
    fn the_json_has_every_key_whether_it_was_seen_or_not() {
        let mut node = NodeReport::new("n1".to_owned(), "10.9.0.101".to_owned());
        node.phases = vec![PhaseAt { phase: Phase::Dhcp, ms: 2_150 }];
        let json = serde_json::to_value(report(vec![node])).expect("json");
        let expected = serde_json::json!({
            "imageset": "hello", "from": "1", "to": "2", "accelerator": "tcg", "took_ms": 11_000,
            "nodes": [{
                "node": "n1", "address": "10.9.0.101",
                "phases": [{ "phase": "dhcp", "ms": 2150 }],
                "boot_id": null, "pulled_bytes": null, "roll_bytes": null, "blackout_us": null,
                "requests": null, "failed": null, "client_gap_ms": null, "before": "", "after": ""
            }]
        });
        assert_eq!(json, expected);
    }
}
