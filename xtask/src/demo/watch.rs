//! Watching the nodes through the server's API until they are where they should be.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use protocol::api::{NodeRecord, RollState};
use protocol::ids::{Name, Version};
use protocol::node::{RollReport, SetState};
use tests::server_peer::Server;
use tests::wait;

use super::Node;
use super::report::{PhaseAt, pulled};
use super::screen::Screen;
use super::stage::Stage;

/// How often the nodes are looked at.
const EVERY: Duration = Duration::from_millis(200);
/// How long the first node may take to boot and run, emulated, on a loaded machine; and each further one more.
const BOOT: Duration = Duration::from_secs(240);
const BOOT_EACH: Duration = Duration::from_secs(60);
/// How long a roll may take, and each further node more.
const ROLL: Duration = Duration::from_secs(120);
const ROLL_EACH: Duration = Duration::from_secs(20);

/// Waits until version 1 runs on every node, and notes when each phase came.
pub(crate) fn until_running(
    screen: &Screen,
    server: &mut Server,
    nodes: &mut [Node],
    name: &Name,
) -> Result<()> {
    let within = BOOT + BOOT_EACH * u32::try_from(nodes.len())?;
    let records = until_arrived(screen, server, nodes, (name, &"1".parse()?), within)?;
    for (node, record) in nodes.iter_mut().zip(&records) {
        let started_ms = node.started_ms;
        node.report.phases = record
            .boot
            .iter()
            .map(|time| PhaseAt { phase: time.phase, ms: time.at_ms.saturating_sub(started_ms) })
            .collect();
        node.report.boot_id = record.observed.as_ref().map(|observed| observed.boot_id.clone());
        node.report.pulled_bytes = last_roll(record, name).map(pulled);
    }
    Ok(())
}

/// Waits until version 2 runs on every node, and notes what it cost.
pub(crate) fn until_rolled(
    screen: &Screen,
    server: &mut Server,
    nodes: &mut [Node],
    name: &Name,
    roll: u64,
) -> Result<()> {
    let within = ROLL + ROLL_EACH * u32::try_from(nodes.len())?;
    let records = until_arrived(screen, server, nodes, (name, &"2".parse()?), within)?;
    let roll = wait::until("the roll to be done", within, || {
        let roll = server.client.roll(roll)?;
        for node in &roll.nodes {
            if node.state == RollState::Superseded {
                bail!("somebody else rolled {} meanwhile", node.node);
            }
        }
        Ok(roll.nodes.iter().all(|node| node.state == RollState::Done).then_some(roll))
    })?;
    for (node, record) in nodes.iter_mut().zip(&records) {
        let boot_id = record.observed.as_ref().map(|observed| observed.boot_id.clone());
        if boot_id != node.report.boot_id {
            bail!("{} was rebooted by the roll", node.machine.id);
        }
        let of_roll = roll.nodes.iter().find(|entry| entry.node == node.machine.id);
        let report = of_roll.and_then(|entry| entry.report.as_ref());
        let Some(report) = report.or_else(|| last_roll(record, name)) else { continue };
        node.report.roll_bytes = Some(pulled(report));
        node.report.blackout_us = report.blackout_us;
    }
    Ok(())
}

/// Looks at every node until all have arrived at this version, and gives their records in the nodes' order.
fn until_arrived(
    screen: &Screen,
    server: &mut Server,
    nodes: &mut [Node],
    (name, version): (&Name, &Version),
    within: Duration,
) -> Result<Vec<NodeRecord>> {
    let what = format!("{name}:{version} to run on every node");
    let mut last = Vec::new();
    let records = wait::until(&what, within, || {
        server.check_alive()?;
        let all = server.client.nodes()?;
        let mut arrived = Vec::new();
        last.clear();
        for node in &mut *nodes {
            node.machine.check_alive()?;
            let record = all.iter().find(|record| record.id == node.machine.id);
            let stage = Stage::of(record, name, version);
            screen.node(node.machine.id.as_str(), &stage);
            last.push(format!("{}: {stage}", node.machine.id));
            // A node tries again what failed: only the end of the wait ends that.
            arrived.extend(record.filter(|_| stage.arrived).cloned());
        }
        if arrived.len() < nodes.len() {
            wait::pause(EVERY)?;
            return Ok(None);
        }
        Ok(Some(arrived))
    });
    screen.clear();
    records.with_context(|| format!("the nodes' last words:\n  {}", last.join("\n  ")))
}

fn last_roll<'a>(record: &'a NodeRecord, name: &Name) -> Option<&'a RollReport> {
    let sets = &record.observed.as_ref()?.imagesets;
    let set = sets.iter().find(|set| set.name == *name && set.state == SetState::Current)?;
    set.last_roll.as_ref()
}
