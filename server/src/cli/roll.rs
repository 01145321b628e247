//! `layercake roll`: brings nodes to a version, and shows how that goes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use protocol::api::{NodeRecord, Roll, RollNode, RollRequest, RollState, UndoRequest};
use protocol::ids::{Name, NodeId};
use protocol::node::RollOutcome;

use super::client::Client;
use super::output::{self, Output, bytes, table};
use crate::sources::Wanted;

/// How often a roll that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Bring nodes to a version: staged while the old one serves, cut over, watched, and gone back from where it fails.
    Start(Start),
    /// Bring nodes back to the version that they ran before; at once where it is kept staged.
    Undo(Undo),
    /// List all rolls.
    List,
    /// Show how each node of a roll stands, and what it cost.
    #[command(visible_alias = "status")]
    Show {
        /// The roll's number; the latest roll when absent.
        id: Option<u64>,
    },
}

#[derive(Debug, clap::Args)]
struct Waiting {
    /// Return as soon as the roll is started. Otherwise the command waits until every node has committed, and fails if one
    /// fails or goes back.
    #[arg(long)]
    no_wait: bool,
    /// Wait; this is what happens anyway.
    #[arg(long, hide = true, conflicts_with = "no_wait")]
    wait: bool,
    /// Seconds after which it waits no longer and fails; for ever when absent.
    #[arg(long, conflicts_with = "no_wait", value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Roll busy nodes as well.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Undo {
    /// The ImageSet's name.
    imageset: Name,
    /// The nodes, separated by commas.
    #[arg(long = "node", value_delimiter = ',', required_unless_present = "all")]
    nodes: Vec<String>,
    /// Every node that has the ImageSet.
    #[arg(long, conflicts_with = "nodes")]
    all: bool,
    #[command(flatten)]
    waiting: Waiting,
}

#[derive(Debug, clap::Args)]
pub(super) struct Start {
    /// The nodes, separated by commas, or `all`.
    #[arg(required = true, value_delimiter = ',')]
    nodes: Vec<String>,
    /// The ImageSet: NAME:VERSION in the server's registry, or a full reference.
    #[arg(long, value_parser = wanted)]
    imageset: String,
    #[command(flatten)]
    waiting: Waiting,
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
        Command::Undo(undo) => start_undo(undo, client, output),
        Command::Show { id } => {
            let roll: Roll = match id {
                Some(id) => client.get(&format!("/v1/rolls/{id}"))?,
                None => {
                    let rolls: Vec<Roll> = client.get("/v1/rolls")?;
                    rolls.into_iter().next_back().context("there is no roll yet")?
                }
            };
            output.result(&roll, || show_text(&roll))
        }
    }
}

fn start_roll(start: &Start, client: &Client, output: Output) -> anyhow::Result<()> {
    let request = RollRequest {
        nodes: start.nodes.clone(),
        imageset: start.imageset.clone(),
        force: start.waiting.force,
    };
    let mut roll: Roll = client.post("/v1/rolls", &request)?;
    if !start.waiting.no_wait {
        roll = wait(roll, start.waiting.limit(), client)?;
    }
    output.result(&roll, || show_text(&roll))?;
    start.waiting.verdict(&[roll])
}

fn start_undo(undo: Undo, client: &Client, output: Output) -> anyhow::Result<()> {
    let nodes = if undo.all { vec!["all".to_owned()] } else { undo.nodes };
    let request = UndoRequest { nodes, name: undo.imageset, force: undo.waiting.force };
    let mut rolls: Vec<Roll> = client.post("/v1/rolls/undo", &request)?;
    if !undo.waiting.no_wait {
        for roll in &mut rolls {
            *roll = wait(roll.clone(), undo.waiting.limit(), client)?;
        }
    }
    output.result(&rolls, || rolls.iter().map(show_text).collect::<Vec<_>>().join("\n"))?;
    undo.waiting.verdict(&rolls)
}

impl Waiting {
    fn limit(&self) -> Option<Duration> {
        self.timeout.map(Duration::from_secs)
    }

    /// Fails when a node that was waited for is not done, naming each with its reason.
    fn verdict(&self, rolls: &[Roll]) -> anyhow::Result<()> {
        let failed: Vec<String> = rolls
            .iter()
            .flat_map(|roll| &roll.nodes)
            .filter(|node| !self.no_wait && node.state != RollState::Done)
            .map(|node| match &node.reason {
                Some(why) => format!("{}: {}: {why}", node.node, state_word(node)),
                None => format!("{}: {}", node.node, state_word(node)),
            })
            .collect();
        let ids: Vec<String> = rolls.iter().map(|roll| roll.id.to_string()).collect();
        if failed.is_empty() {
            return Ok(());
        }
        bail!("roll {} failed: {}", ids.join(", "), failed.join("; "))
    }
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
        return match blackout.filter(|_| node.state == RollState::Done) {
            Some(us) => format!("done, {} ms without service", thousandths(us)),
            None => reason(state_word(node)),
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

/// How the node stands: what its agent said became of the roll, where it said so.
fn state_word(node: &RollNode) -> &'static str {
    let outcome = node.report.as_ref().and_then(|report| report.outcome);
    match (node.state, outcome) {
        (RollState::Pending, Some(RollOutcome::Watching)) => "watching",
        (RollState::Pending, _) => "pending",
        (RollState::Done, Some(RollOutcome::Undone)) => "undone",
        (RollState::Done, Some(RollOutcome::Committed)) => "committed",
        (RollState::Done, _) => "done",
        (RollState::Failed, _) => "failed",
        (RollState::RolledBack, _) => "rolled back",
        (RollState::Superseded, _) => "superseded",
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
            count(roll, RollState::RolledBack),
        ]
    };
    let rows: Vec<Vec<String>> = rolls.iter().map(row).collect();
    table(&["ROLL", "IMAGESET", "NODES", "DONE", "PENDING", "FAILED", "BACK"], &rows)
}

fn show_text(roll: &Roll) -> String {
    let row = |node: &RollNode| {
        let report = node.report.as_ref();
        let blackout = report.and_then(|report| report.blackout_us);
        let ready = report.and_then(|report| report.ready_us);
        vec![
            node.node.to_string(),
            state_word(node).to_owned(),
            report.map_or("-".to_owned(), |report| bytes(report.bytes)),
            report.map_or("-".to_owned(), |report| format!("{} ms", report.staging_ms)),
            blackout.map_or("-".to_owned(), |us| format!("{} ms", thousandths(us))),
            ready.map_or("-".to_owned(), |us| format!("{} ms", thousandths(us))),
            node.reason.clone().unwrap_or_default(),
        ]
    };
    let rows: Vec<Vec<String>> = roll.nodes.iter().map(row).collect();
    let table =
        table(&["NODE", "STATE", "FETCHED", "STAGING", "BLACKOUT", "TO READY", "REASON"], &rows);
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
                    {"to": digest, "bytes": 2048, "staging_ms": 5, "blackout_us": 3100,
                     "ready_us": 12000, "outcome": "committed"}},
                {"node": "n2", "state": "failed", "reason": "no such blob"},
                {"node": "n3", "state": "rolled_back", "reason": "container web ended: exit code 1",
                 "report": {"to": digest, "bytes": 0, "staging_ms": 7, "outcome": "rolled_back"}},
            ],
        }))
        .expect("roll");
        let expected = "\
roll 3 to hello:2
NODE  STATE        FETCHED   STAGING  BLACKOUT  TO READY   REASON
n1    committed    2.00 KiB  5 ms     3.100 ms  12.000 ms
n2    failed       -         -        -         -          no such blob
n3    rolled back  0 B       7 ms     -         -          container web ended: exit code 1
";
        assert_eq!(show_text(&roll), expected);
        let text = |index: usize| progress_text(&roll, &roll.nodes[index], None);
        assert_eq!(text(0), "done, 3.100 ms without service");
        assert_eq!(text(1), "failed: no such blob");
        let waiting = Waiting { no_wait: false, wait: false, timeout: None, force: false };
        let error = waiting.verdict(&[roll]).expect_err("failed").to_string();
        let expected = "roll 3 failed: n2: failed: no such blob; n3: rolled back: container web ended: exit code 1";
        assert_eq!(error, expected);
    }
}
