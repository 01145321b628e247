//! The inventory's data and the small changes to it: who is who, what is dirty, who waits. No locks, no storage.

use std::collections::{BTreeMap, BTreeSet};

use protocol::api::NodeRecord;
use protocol::ids::{Mac, Name, NodeId};
use protocol::node::{DesiredSet, Observed};
use tokio::sync::watch;

use super::{InventoryError, MAX_AUTO_NODES, MAX_MACS};
use crate::config::NodeSection;
use crate::desired;
use crate::rolls::{RollRecord, undo_target};
use crate::storage::NodeRow;

#[derive(Debug)]
pub(super) struct Node {
    pub(super) row: NodeRow,
    pub(super) dirty: bool,
    /// Whether its hardware is to be written too: it is large and changes seldom.
    pub(super) hardware_dirty: bool,
    /// The version of `row.desired`: what long polls wait on.
    pub(super) news: watch::Sender<u64>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) nodes: BTreeMap<NodeId, Node>,
    pub(super) by_mac: BTreeMap<Mac, NodeId>,
    pub(super) rolls: Vec<RollRecord>,
    pub(super) dirty_rolls: BTreeSet<u64>,
    /// Machines that asked DHCP for boot and are not registered yet: when first.
    pub(super) early: BTreeMap<Mac, u64>,
}

impl Node {
    pub(super) fn seen(&mut self, now_ms: u64) {
        self.row.last_seen_ms = now_ms;
        self.dirty = true;
    }

    pub(super) fn set_uuid(&mut self, uuid: Option<&str>) {
        if let Some(uuid) = uuid.filter(|uuid| !uuid.is_empty()) {
            self.row.uuid = Some(uuid.chars().take(64).collect());
        }
    }
}

impl State {
    pub(super) fn insert(&mut self, row: NodeRow, dirty: bool) {
        for mac in &row.macs {
            self.by_mac.insert(*mac, row.id.clone());
        }
        let news = watch::Sender::new(row.desired.version);
        let node = Node { row, dirty, hardware_dirty: false, news };
        self.nodes.insert(node.row.id.clone(), node);
    }

    pub(super) fn node_of(&mut self, mac: Mac) -> Option<&mut Node> {
        let id = self.by_mac.get(&mac)?;
        self.nodes.get_mut(id)
    }

    pub(super) fn register(
        &mut self,
        id: NodeId,
        mac: Option<Mac>,
        now_ms: u64,
    ) -> Result<(), InventoryError> {
        if let Some(node) = self.nodes.get_mut(&id) {
            // Its agent came before its firmware did: the kernel was booted without us.
            node.row.macs.extend(mac);
        } else {
            if self.nodes.len() >= MAX_AUTO_NODES {
                return Err(InventoryError::Crowded);
            }
            tracing::info!(node = %id, "registered a new node");
            self.insert(new_row(id.clone(), mac, now_ms), true);
        }
        self.by_mac.extend(mac.map(|mac| (mac, id)));
        Ok(())
    }

    pub(super) fn node_or_register(
        &mut self,
        id: &NodeId,
        auto_register: bool,
        now_ms: u64,
    ) -> Result<&mut Node, InventoryError> {
        if !self.nodes.contains_key(id) {
            if !auto_register {
                return Err(InventoryError::Unregistered(format!("node {id}")));
            }
            self.register(id.clone(), None, now_ms)?;
        }
        self.nodes.get_mut(id).ok_or_else(|| unknown(id))
    }

    /// Takes in a node of the config; returns nodes that have lost their last interface to it and are gone.
    pub(super) fn configure(&mut self, section: &NodeSection, now_ms: u64) -> Vec<NodeId> {
        let mut emptied = Vec::new();
        let before = self.by_mac.insert(section.mac, section.id.clone());
        if let Some(before) = before.filter(|before| *before != section.id)
            && let Some(node) = self.nodes.get_mut(&before)
        {
            node.row.macs.retain(|mac| *mac != section.mac);
            node.dirty = true;
            if node.row.macs.is_empty() {
                tracing::info!(node = %before, now = %section.id, "the config renames a node");
                self.nodes.remove(&before);
                emptied.push(before);
            }
        }
        match self.nodes.get_mut(&section.id) {
            Some(node) => {
                node.row.macs.retain(|mac| *mac != section.mac);
                node.row.macs.insert(0, section.mac);
                node.dirty = true;
            }
            None => self.insert(new_row(section.id.clone(), Some(section.mac), now_ms), true),
        }
        emptied
    }

    pub(super) fn learn_macs(&mut self, id: &NodeId, observed: &Observed) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        for link in &observed.links {
            let room = node.row.macs.len() < MAX_MACS;
            if room && link.mac != Mac([0; 6]) && !self.by_mac.contains_key(&link.mac) {
                self.by_mac.insert(link.mac, id.clone());
                node.row.macs.push(link.mac);
            }
        }
    }

    pub(super) fn rows(&self, ids: &[NodeId]) -> Result<Vec<NodeRow>, InventoryError> {
        let mut rows = Vec::new();
        let mut missing = Vec::new();
        for id in ids {
            match self.nodes.get(id) {
                Some(node) => rows.push(node.row.clone()),
                None => missing.push(id.to_string()),
            }
        }
        if missing.is_empty() { Ok(rows) } else { Err(InventoryError::UnknownNodes(missing)) }
    }

    /// What each of these nodes is brought back to by an undo; nodes that go to the same version together.
    pub(super) fn undo_targets(
        &self,
        nodes: &[NodeId],
        name: &Name,
        force: bool,
    ) -> Result<Vec<(DesiredSet, Vec<NodeId>)>, InventoryError> {
        let mut targets: Vec<(DesiredSet, Vec<NodeId>)> = Vec::new();
        for row in self.rows(nodes)? {
            let mut sets = row.desired.imagesets.iter();
            let wanted = sets.find(|set| set.name == *name).ok_or_else(|| {
                InventoryError::NoSuchSet { node: row.id.clone(), name: name.clone() }
            })?;
            let target = undo_target(&row.id, wanted, row.observed.as_ref(), &self.rolls);
            let target = target.ok_or_else(|| InventoryError::NothingBefore {
                node: row.id.clone(),
                name: name.clone(),
                version: wanted.version.clone(),
            })?;
            let target = DesiredSet { roll: 0, force, ..target };
            match targets.iter_mut().find(|(set, _)| *set == target) {
                Some((_, of_set)) => of_set.push(row.id),
                None => targets.push((target, vec![row.id])),
            }
        }
        Ok(targets)
    }

    /// Shows what is wanted now, and wakes the long polls. Reports that came meanwhile stay as they are.
    pub(super) fn publish(&mut self, rows: Vec<NodeRow>) {
        for row in rows {
            if let Some(node) = self.nodes.get_mut(&row.id) {
                node.row.desired = row.desired;
                node.news.send_replace(node.row.desired.version);
            }
        }
    }

    pub(super) fn take_dirty(&mut self) -> (Vec<NodeRow>, Vec<RollRecord>) {
        let mut nodes = Vec::new();
        for node in self.nodes.values_mut().filter(|node| node.dirty) {
            node.dirty = false;
            let mut row = node.row.clone();
            row.hardware = row.hardware.filter(|_| std::mem::take(&mut node.hardware_dirty));
            nodes.push(row);
        }
        let dirty = std::mem::take(&mut self.dirty_rolls);
        let rolls = self.rolls.iter().filter(|roll| dirty.contains(&roll.id)).cloned().collect();
        (nodes, rolls)
    }
}

pub(super) fn unknown(id: &NodeId) -> InventoryError {
    InventoryError::UnknownNodes(vec![id.to_string()])
}

fn new_row(id: NodeId, mac: Option<Mac>, now_ms: u64) -> NodeRow {
    NodeRow {
        desired: desired::first(id.clone()),
        id,
        macs: mac.into_iter().collect(),
        uuid: None,
        address: None,
        first_seen_ms: now_ms,
        last_seen_ms: now_ms,
        timeline: crate::timeline::Timeline::default(),
        observed: None,
        hardware: None,
    }
}

pub(super) fn record(row: &NodeRow) -> NodeRecord {
    NodeRecord {
        id: row.id.clone(),
        macs: row.macs.clone(),
        uuid: row.uuid.clone(),
        address: row.address,
        first_seen_ms: row.first_seen_ms,
        last_seen_ms: row.last_seen_ms,
        boot: row.timeline.phases.clone(),
        desired: row.desired.clone(),
        observed: row.observed.clone(),
    }
}
