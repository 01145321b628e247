//! Waiting until nodes run the Layer0 that they were asked for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use protocol::api::{Layer0Node, NodeRecord};
use protocol::ids::NodeId;
use protocol::node::{Layer0How, Layer0State};

use crate::cli::client::Client;
use crate::cli::output;

/// How often nodes that are waited for are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How a node stands to what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Done,
    Pending(String),
    Failed(String),
}

/// Judges by what the node last reported. Pure.
pub(super) fn judge(asked: &Layer0Node, how: Layer0How, node: &NodeRecord) -> Verdict {
    let wanted = node.desired.layer0.as_ref();
    if wanted.is_none_or(|layer0| layer0.request != asked.desired_version) {
        return Verdict::Failed("it was asked for something else meanwhile".to_owned());
    }
    let Some(observed) = &node.observed else {
        return Verdict::Pending("waiting for its first boot".to_owned());
    };
    let same_boot = asked.boot_id.as_ref() == Some(&observed.boot_id);
    let heard = observed.desired_version >= asked.desired_version;
    let on_its_way = node.boot.iter().all(|time| time.phase <= protocol::node::Phase::Kexec);
    if let Some(last) = node.boot.last().filter(|_| on_its_way) {
        return Verdict::Pending(format!("booting ({})", last.phase.as_str()));
    }
    let Some(layer0) = observed.layer0.as_ref().filter(|_| heard) else {
        return Verdict::Pending("waiting for its agent".to_owned());
    };
    let reason = layer0.reason.clone();
    let or = |text: &str| reason.clone().unwrap_or(text.to_owned());
    match layer0.state {
        Layer0State::Failed => Verdict::Failed(or("failed")),
        // It was asked to boot it again, and has not ended yet.
        Layer0State::Current if same_boot && how != Layer0How::Agent => {
            Verdict::Pending(or("about to go"))
        }
        Layer0State::Current => Verdict::Done,
        Layer0State::Stale if same_boot || how == Layer0How::Agent => {
            Verdict::Pending(or("pending"))
        }
        Layer0State::Stale => Verdict::Failed(or("another boot did not bring it")),
    }
}

/// Waits until no node is pending. Returns those that failed, with the reason.
pub(super) fn wait(
    asked: &[Layer0Node],
    how: Layer0How,
    timeout: Option<u64>,
    client: &Client,
) -> anyhow::Result<Vec<(NodeId, String)>> {
    let start = Instant::now();
    let mut said: BTreeMap<NodeId, String> = BTreeMap::new();
    loop {
        let (mut open, mut failed) = (Vec::new(), Vec::new());
        for it in asked {
            let node: NodeRecord = client.get(&format!("/v1/nodes/{}", it.node))?;
            let text = match judge(it, how, &node) {
                Verdict::Done => "done".to_owned(),
                Verdict::Failed(why) => {
                    failed.push((it.node.clone(), why.clone()));
                    format!("failed: {why}")
                }
                Verdict::Pending(why) => {
                    open.push(format!("{} ({why})", it.node));
                    why
                }
            };
            if said.get(&it.node) != Some(&text) {
                output::say(&format!("{}: {text}", it.node));
                said.insert(it.node.clone(), text);
            }
        }
        if open.is_empty() {
            return Ok(failed);
        }
        if timeout.is_some_and(|seconds| start.elapsed() >= Duration::from_secs(seconds)) {
            let seconds = start.elapsed().as_secs();
            anyhow::bail!("not done after {seconds} s: {}", open.join(", "));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
