//! `layercake roll`: brings nodes to a version, and shows how that goes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use protocol::api::{NodeRecord, Roll, RollNode, RollRequest, RollState};
use protocol::ids::NodeId;

use super::client::Client;
use super::output::{self, Output, bytes, table};
use crate::sources::Wanted;

/// How often a roll that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Start a roll.
    Start(Start),
    /// List all rolls.
    List,
    /// Show how each node of a roll stands.
    Show {
        /// The roll's number.
        id: u64,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Start {
    /// The nodes, separated by commas, or `all`.
    #[arg(required = true, value_delimiter = ',')]
    nodes: Vec<String>,
    /// The ImageSet: NAME:VERSION in the server's registry, or a full reference.
    #[arg(long, value_parser = wanted)]
    imageset: String,
    /// Wait until every node is done; fail if one of them fails.
    #[arg(long)]
    wait: bool,
    /// Seconds after which --wait gives up; for ever when absent.
    #[arg(long, requires = "wait", value_name = "SECONDS")]
    timeout: Option<u64>,
}

fn wanted(text: &str) -> Result<String, String> {
    match text.parse::<Wanted>() {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn run(command: Command, client: &Client, output: Output) -> anyhow::Result<()> {
    match command {
        Command::Start(start) => start_roll(&start, client, output),
        Command::List => {
            let rolls: Vec<Roll> = client.get("/v1/rolls")?;
            output.result(&rolls, || list_text(&rolls))
        }
        Command::Show { id } => {
            let roll: Roll = client.get(&format!("/v1/rolls/{id}"))?;
            output.result(&roll, || show_text(&roll))
        }
    }
}

fn start_roll(start: &Start, client: &Client, output: Output) -> anyhow::Result<()> {
    let request = RollRequest { nodes: start.nodes.clone(), imageset: start.imageset.clone() };
    let mut roll: Roll = client.post("/v1/rolls", &request)?;
    if start.wait {
        let limit = start.timeout.map(Duration::from_secs);
        roll = wait(roll, limit, client)?;
    }
    output.result(&roll, || show_text(&roll))?;
    let failed: Vec<String> = roll
        .nodes
        .iter()
        .filter(|node| start.wait && node.state != RollState::Done)
        .map(|node| match &node.reason {
            Some(why) => format!("{}: {why}", node.node),
            None => format!("{}: {}", node.node, state_word(node.state)),
        })
        .collect();
    if failed.is_empty() { Ok(()) } else { bail!("roll {} failed: {}", roll.id, failed.join("; ")) }
}

/// Looks at the roll until no node of it is pending.
fn wait(mut roll: Roll, limit: Option<Duration>, client: &Client) -> anyhow::Result<Roll> {
    let start = Instant::now();
    let mut progress = Watch::new(&roll);
    loop {
        let mut open = Vec::new();
        for node in &roll.nodes {
            let pending = node.state == RollState::Pending;
            let record =
                if pending { client.get(&format!("/v1/nodes/{}", node.node)).ok() } else { None };
            let text = progress_text(&roll, node, record.as_ref());
            if pending {
                open.push(format!("{} ({text})", node.node));
            }
            progress.show(&node.node, text);
        }
        if open.is_empty() {
            progress.end();
            return Ok(roll);
        }
        if limit.is_some_and(|limit| start.elapsed() >= limit) {
            progress.end();
            let seconds = start.elapsed().as_secs();
            return Err(anyhow!(
                "roll {} is not done after {seconds} s: {}",
                roll.id,
                open.join(", ")
            ));
        }
        std::thread::sleep(LOOK_EVERY);
        roll = client.get(&format!("/v1/rolls/{}", roll.id))?;
    }
}

/// What a node is doing about a roll, in a few words.
fn progress_text(roll: &Roll, node: &RollNode, record: Option<&NodeRecord>) -> String {
    let reason = |word: &str| match &node.reason {
        Some(why) => format!("{word}: {why}"),
        None => word.to_owned(),
    };
    if node.state != RollState::Pending {
        let blackout = node.report.as_ref().and_then(|report| report.blackout_us);
        return match blackout {
            Some(us) => format!("done, {} ms without service", thousandths(us)),
            None => reason(state_word(node.state)),
        };
    }
    let Some(observed) = record.and_then(|record| record.observed.as_ref()) else {
        return "waiting for its agent".to_owned();
    };
    let set = observed.imagesets.iter().find(|set| set.name == roll.name);
    match set.and_then(|set| set.pull.as_ref()) {
        Some(pull) if pull.total > 0 => format!(
            "pulling {} of {}, {}/s",
            bytes(pull.bytes),
            bytes(pull.total),
            bytes(pull.bytes_per_s)
        ),
        _ => observed.waiting.clone().unwrap_or_else(|| reason("pending")),
    }
}

/// Lines on stderr: one a node that changes in place on a terminal, else one line for every change.
struct Watch {
    bars: BTreeMap<NodeId, ProgressBar>,
    last: BTreeMap<NodeId, String>,
}

impl Watch {
    fn new(roll: &Roll) -> Self {
        let mut bars = BTreeMap::new();
        if output::on_terminal() {
            let all = MultiProgress::new();
            for node in &roll.nodes {
                let bar = all.add(ProgressBar::new_spinner());
                if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_msg}") {
                    bar.set_style(style);
                }
                bar.set_prefix(node.node.to_string());
                bars.insert(node.node.clone(), bar);
            }
        } else {
            output::say(&format!("waiting for roll {} of {} nodes", roll.id, roll.nodes.len()));
        }
        Self { bars, last: BTreeMap::new() }
    }

    fn show(&mut self, node: &NodeId, text: String) {
        if self.last.get(node) == Some(&text) {
            return;
        }
        match self.bars.get(node) {
            Some(bar) => bar.set_message(text.clone()),
            None => output::say(&format!("{node}: {text}")),
        }
        self.last.insert(node.clone(), text);
    }

    fn end(&self) {
        for bar in self.bars.values() {
            bar.abandon();
        }
    }
}

fn state_word(state: RollState) -> &'static str {
    match state {
        RollState::Pending => "pending",
        RollState::Done => "done",
        RollState::Failed => "failed",
        RollState::Superseded => "superseded",
    }
}

/// Microseconds as milliseconds with their fraction.
fn thousandths(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

fn list_text(rolls: &[Roll]) -> String {
    if rolls.is_empty() {
        return "There was no roll yet.\n".to_owned();
    }
    let count = |roll: &Roll, state| {
        roll.nodes.iter().filter(|node| node.state == state).count().to_string()
    };
    let row = |roll: &Roll| {
        vec![
            roll.id.to_string(),
            format!("{}:{}", roll.name, roll.version),
            roll.nodes.len().to_string(),
            count(roll, RollState::Done),
            count(roll, RollState::Pending),
            count(roll, RollState::Failed),
        ]
    };
    let rows: Vec<Vec<String>> = rolls.iter().map(row).collect();
    table(&["ROLL", "IMAGESET", "NODES", "DONE", "PENDING", "FAILED"], &rows)
}

fn show_text(roll: &Roll) -> String {
    let row = |node: &RollNode| {
        let report = node.report.as_ref();
        let blackout = report.and_then(|report| report.blackout_us);
        vec![
            node.node.to_string(),
            state_word(node.state).to_owned(),
            report.map_or("-".to_owned(), |report| bytes(report.bytes)),
            blackout.map_or("-".to_owned(), |us| format!("{} ms", thousandths(us))),
            node.reason.clone().unwrap_or_default(),
        ]
    };
    let rows: Vec<Vec<String>> = roll.nodes.iter().map(row).collect();
    let table = table(&["NODE", "STATE", "FETCHED", "BLACKOUT", "REASON"], &rows);
    format!("roll {} to {}:{}\n{table}", roll.id, roll.name, roll.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roll_is_shown_node_by_node() {
        let digest = protocol::ids::Digest::of(b"x");
        let roll: Roll = serde_json::from_value(serde_json::json!({
            "id": 3, "name": "hello", "version": "2",
            "reference": format!("http://r:1/hello:2@{digest}"),
            "nodes": [
                {"node": "n1", "state": "done", "report":
                    {"to": digest, "bytes": 2048, "staging_ms": 5, "blackout_us": 3100}},
                {"node": "n2", "state": "failed", "reason": "no such blob"},
            ],
        }))
        .expect("roll");
        let expected = "\
roll 3 to hello:2
NODE  STATE   FETCHED   BLACKOUT  REASON
n1    done    2.00 KiB  3.100 ms
n2    failed  -         -         no such blob
";
        assert_eq!(show_text(&roll), expected);
        let text = |index: usize| progress_text(&roll, &roll.nodes[index], None);
        assert_eq!(text(0), "done, 3.100 ms without service");
        assert_eq!(text(1), "failed: no such blob");
    }
}
