//! Every node and roll, in RAM; the one place where they change. What happens to them is decided in
//! [`crate::timeline`], [`crate::desired`] and [`crate::rolls`].
//!
//! What an operator wants is in the storage before it shows here, and before anybody is answered. What is seen of
//! nodes changes here at once and is written by [`Inventory::flush`], in batches: a lost batch is reported again.

mod layer0;
mod state;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::PROTOCOL_VERSION;
use protocol::api::{NodeRecord, Roll, RollState};
use protocol::facts::Hardware;
use protocol::ids::{Digest, Mac, Name, NodeId};
use protocol::node::{Desired, DesiredSet, Observed, PowerAction};
use tokio::sync::watch;

pub use self::layer0::{Layer0Choice, Layer0Wish};
use self::state::{State, record, unknown};
use crate::config::NodeSection;
use crate::desired;
use crate::rolls::{Member, RollRecord};
use crate::storage::{NewRoll, Storage, StorageError};

/// Most nodes that register themselves: strangers on the boot network must not fill the memory.
pub const MAX_AUTO_NODES: usize = 16_384;
/// Most machines whose DHCP request is remembered before they have fetched a script.
const MAX_EARLY: usize = 1024;
/// Most Ethernet addresses that a node reports and we remember.
const MAX_MACS: usize = 32;

/// Why the inventory says no.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// These nodes do not exist.
    #[error("there is no node {}; `layercake node list` shows all", .0.join(", "))]
    UnknownNodes(Vec<String>),
    /// A roll names no node at all.
    #[error("there are no nodes to roll")]
    NoNodes,
    /// A node does not want the set, so there is nothing to undo.
    #[error("node {node} has no ImageSet {name}")]
    NoSuchSet {
        /// The node.
        node: NodeId,
        /// The set.
        name: Name,
    },
    /// Nothing is known that a node ran before.
    #[error(
        "node {node}: no version of ImageSet {name} is known that it ran before {version}; `layercake roll start` brings it to any"
    )]
    NothingBefore {
        /// The node.
        node: NodeId,
        /// The set.
        name: Name,
        /// What it is wanted to run.
        version: protocol::ids::Version,
    },
    /// A machine that nobody has named, and `server.auto_register` is false.
    #[error(
        "{0} is not in the inventory and server.auto_register is false: give it a [[node]] in the config"
    )]
    Unregistered(String),
    /// Too many nodes have registered themselves.
    #[error("{MAX_AUTO_NODES} nodes have registered themselves; no more are taken")]
    Crowded,
    /// This roll does not exist.
    #[error("there is no roll {0}")]
    UnknownRoll(u64),
    /// Power requests name the boot they end, which is not known before the first report.
    #[error("node {0} has not reported since it was registered, so there is no boot to end")]
    NotReported(NodeId),
    /// Its agent is no Layer0's, or an old one.
    #[error(
        "node {0} does not say which Layer0 it runs: its agent is not in one (--standalone), or older than this server"
    )]
    NotInLayer0(NodeId),
    /// A report under another node's name.
    #[error("the report is of node {found}, not of {expected}")]
    OtherNode {
        /// The node in the URL.
        expected: NodeId,
        /// The node in the report.
        found: NodeId,
    },
    /// An agent of a far version.
    #[error("the agent speaks protocol {0}, this server {PROTOCOL_VERSION}; they may be one apart")]
    Protocol(u32),
    /// The storage failed; nothing was changed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Every node and roll.
#[derive(Debug)]
pub struct Inventory {
    storage: Box<dyn Storage>,
    state: Mutex<State>,
    /// Held over every durable write, so that each builds on the one before.
    writing: tokio::sync::Mutex<()>,
    auto_register: bool,
}

impl Inventory {
    /// Reads the storage and takes in the nodes of the config.
    ///
    /// # Errors
    /// If the storage cannot be read or written.
    pub async fn open(
        storage: Box<dyn Storage>,
        configured: &[NodeSection],
        auto_register: bool,
        now_ms: u64,
    ) -> Result<Arc<Self>, InventoryError> {
        let loaded = storage.load().await?;
        let mut state = State { rolls: loaded.rolls, ..State::default() };
        for row in loaded.nodes {
            state.insert(row, false);
        }
        for section in configured {
            for emptied in state.configure(section, now_ms) {
                storage.remove_node(&emptied).await?;
            }
        }
        let state = Mutex::new(state);
        let writing = tokio::sync::Mutex::new(());
        let inventory = Arc::new(Self { storage, state, writing, auto_register });
        inventory.flush().await?;
        Ok(inventory)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All nodes, by id.
    #[must_use]
    pub fn list(&self) -> Vec<NodeRecord> {
        self.state().nodes.values().map(|node| record(&node.row)).collect()
    }

    /// The digests of what nodes are to run, and of what they could be brought back to: a reboot fetches it again, whatever its
    /// tag stands for by then.
    #[must_use]
    pub fn pinned(&self) -> BTreeSet<Digest> {
        let state = self.state();
        let rows = || state.nodes.values().map(|node| &node.row);
        let observed = rows().filter_map(|row| row.observed.as_ref());
        let kept = observed.flat_map(|it| &it.imagesets).filter_map(|set| set.previous.as_ref());
        let sets = rows().flat_map(|row| &row.desired.imagesets).chain(kept);
        sets.filter_map(|set| set.reference.digest).collect()
    }

    /// One node.
    ///
    /// # Errors
    /// If there is none of this id.
    pub fn get(&self, id: &NodeId) -> Result<NodeRecord, InventoryError> {
        self.state().nodes.get(id).map(|node| record(&node.row)).ok_or_else(|| unknown(id))
    }

    /// What a node's hardware is, as far as its agent has said.
    ///
    /// # Errors
    /// If there is none of this id.
    pub fn hardware(&self, id: &NodeId) -> Result<Option<Hardware>, InventoryError> {
        self.state().nodes.get(id).map(|node| node.row.hardware.clone()).ok_or_else(|| unknown(id))
    }

    /// What is wanted of a node.
    ///
    /// # Errors
    /// If there is none of this id.
    pub fn desired(&self, id: &NodeId) -> Result<Desired, InventoryError> {
        self.state().nodes.get(id).map(|node| node.row.desired.clone()).ok_or_else(|| unknown(id))
    }

    /// A node's agent asks what is wanted: notes that it lives, and returns what wakes its long poll.
    ///
    /// # Errors
    /// If there is no such node and it may not register itself.
    pub fn subscribe(
        &self,
        id: &NodeId,
        now_ms: u64,
    ) -> Result<watch::Receiver<u64>, InventoryError> {
        let mut state = self.state();
        let node = state.node_or_register(id, self.auto_register, now_ms)?;
        node.seen(now_ms);
        Ok(node.news.subscribe())
    }

    /// DHCP: a machine's firmware or iPXE asked for an address in order to boot.
    pub fn dhcp_discover(&self, mac: Mac, uuid: Option<&str>, now_ms: u64) {
        let mut state = self.state();
        if let Some(node) = state.node_of(mac) {
            node.row.timeline.dhcp(now_ms);
            node.set_uuid(uuid);
            node.seen(now_ms);
        } else if state.early.len() < MAX_EARLY || state.early.contains_key(&mac) {
            state.early.entry(mac).or_insert(now_ms);
        }
    }

    /// DHCP: a machine got this address.
    pub fn dhcp_leased(&self, mac: Mac, address: Ipv4Addr, now_ms: u64) {
        let mut state = self.state();
        if let Some(node) = state.node_of(mac) {
            node.row.address = Some(IpAddr::V4(address));
            node.seen(now_ms);
        }
    }

    /// iPXE fetches its script: which node is it? An unknown machine registers itself, where that is allowed.
    ///
    /// # Errors
    /// If it is unknown and may not register itself.
    pub fn script_fetched(
        &self,
        mac: Mac,
        uuid: Option<&str>,
        now_ms: u64,
    ) -> Result<NodeId, InventoryError> {
        let mut state = self.state();
        if !state.by_mac.contains_key(&mac) {
            if !self.auto_register {
                return Err(InventoryError::Unregistered(mac.to_string()));
            }
            state.register(NodeId::from_mac(mac), Some(mac), now_ms)?;
        }
        let early = state.early.remove(&mac);
        let node =
            state.node_of(mac).ok_or_else(|| InventoryError::Unregistered(mac.to_string()))?;
        if let Some(asked_ms) = early {
            node.row.timeline.dhcp(asked_ms);
        }
        node.row.timeline.ipxe(now_ms);
        node.set_uuid(uuid);
        node.seen(now_ms);
        Ok(node.row.id.clone())
    }

    /// The initramfs was sent to this machine, to its last byte.
    pub fn initramfs_sent(&self, mac: Mac, now_ms: u64) {
        if let Some(node) = self.state().node_of(mac) {
            node.row.timeline.kernel(now_ms);
            node.seen(now_ms);
        }
    }

    /// A node's agent reports.
    ///
    /// # Errors
    /// If it is another node's report, of a far protocol version, or the node is unknown and may not register itself.
    pub fn observed(
        &self,
        id: &NodeId,
        mut observed: Observed,
        now_ms: u64,
    ) -> Result<(), InventoryError> {
        let hardware = observed.hardware.take();
        if observed.node != *id {
            return Err(InventoryError::OtherNode { expected: id.clone(), found: observed.node });
        }
        if observed.protocol.abs_diff(PROTOCOL_VERSION) > 1 {
            return Err(InventoryError::Protocol(observed.protocol));
        }
        let mut state = self.state();
        state.node_or_register(id, self.auto_register, now_ms)?;
        state.learn_macs(id, &observed);
        let mut changed = Vec::new();
        for roll in &mut state.rolls {
            if roll.observe(&observed) {
                changed.push(roll.id);
            }
        }
        state.dirty_rolls.extend(changed);
        if let Some(node) = state.nodes.get_mut(id) {
            let kexec = observed.layer0.as_ref().is_some_and(|layer0| layer0.kexec);
            let (boot_id, marks) = (&observed.boot_id, &observed.timeline);
            node.row.timeline.observed(boot_id, marks, kexec, now_ms);
            node.set_uuid(observed.uuid.as_deref());
            node.row.observed = Some(observed);
            if hardware.is_some() && node.row.hardware != hardware {
                node.row.hardware = hardware;
                node.hardware_dirty = true;
            }
            node.seen(now_ms);
        }
        Ok(())
    }

    /// The nodes that a roll asks for: ids, or the one word `all`.
    ///
    /// # Errors
    /// If there are none, or some do not exist; all of those are named.
    pub fn select(&self, asked: &[String]) -> Result<Vec<NodeId>, InventoryError> {
        let state = self.state();
        let mut chosen = BTreeSet::new();
        let mut missing = Vec::new();
        for text in asked {
            match text.parse::<NodeId>() {
                Ok(id) if state.nodes.contains_key(&id) => drop(chosen.insert(id)),
                _ if text == "all" => chosen.extend(state.nodes.keys().cloned()),
                _ => missing.push(text.chars().take(80).collect()),
            }
        }
        if !missing.is_empty() {
            return Err(InventoryError::UnknownNodes(missing));
        }
        if chosen.is_empty() {
            return Err(InventoryError::NoNodes);
        }
        Ok(chosen.into_iter().collect())
    }

    /// Starts a roll: these nodes shall run this set. Durable on return.
    ///
    /// # Errors
    /// If a node does not exist or the storage fails; nothing is changed then.
    pub async fn start_roll(
        &self,
        nodes: &[NodeId],
        set: DesiredSet,
    ) -> Result<Roll, InventoryError> {
        let _turn = self.writing.lock().await;
        let (rows, superseded) = {
            let state = self.state();
            let mut rows = state.rows(nodes)?;
            for row in &mut rows {
                row.desired = desired::with_roll(&row.desired, set.clone());
            }
            let mut superseded = state.rolls.clone();
            superseded.retain_mut(|roll| roll.supersede(&set.name, nodes));
            (rows, superseded)
        };
        let members = rows.iter().map(|row| Member {
            node: row.id.clone(),
            desired_version: row.desired.version,
            state: RollState::Pending,
            reason: None,
            report: None,
        });
        let roll = NewRoll {
            name: set.name.clone(),
            version: set.version,
            reference: set.reference,
            members: members.collect(),
        };
        let id = self.storage.create_roll(&roll, &rows, &superseded).await?;
        let NewRoll { name, version, reference, members } = roll;
        let roll = RollRecord { id, name, version, reference, members };
        let answer = roll.to_api();
        let mut state = self.state();
        for older in &mut state.rolls {
            older.supersede(&set.name, nodes);
        }
        state.rolls.push(roll);
        state.publish(rows);
        Ok(answer)
    }

    /// Brings nodes back to the version of a set that they ran before: one roll for every version that comes of it. Durable on
    /// return.
    ///
    /// # Errors
    /// If a node does not exist, does not want the set, or nothing is known that it ran before; nothing is changed then. If the
    /// storage fails.
    pub async fn undo(
        &self,
        nodes: &[NodeId],
        name: &Name,
        force: bool,
    ) -> Result<Vec<Roll>, InventoryError> {
        let targets = self.state().undo_targets(nodes, name, force)?;
        let mut rolls = Vec::new();
        for (set, of_set) in targets {
            rolls.push(self.start_roll(&of_set, set).await?);
        }
        Ok(rolls)
    }

    /// The nodes that want a set.
    #[must_use]
    pub fn nodes_with(&self, name: &Name) -> Vec<NodeId> {
        let state = self.state();
        let rows = state.nodes.values().map(|node| &node.row);
        let wants = |row: &&crate::storage::NodeRow| {
            row.desired.imagesets.iter().any(|set| set.name == *name)
        };
        rows.filter(wants).map(|row| row.id.clone()).collect()
    }

    /// Says that a node is busy, and why, or that it is free. Durable on return.
    ///
    /// # Errors
    /// If the node does not exist or the storage fails.
    pub async fn busy(&self, id: &NodeId, busy: Option<String>) -> Result<(), InventoryError> {
        let _turn = self.writing.lock().await;
        let mut rows = self.state().rows(std::slice::from_ref(id))?;
        rows.retain(|row| row.desired.busy != busy);
        for row in &mut rows {
            row.desired = desired::with_busy(&row.desired, busy.clone());
        }
        self.storage.save_desired(&rows).await?;
        self.state().publish(rows);
        Ok(())
    }

    /// What a configured node shall run until an operator says otherwise: set where no version of it is wanted yet.
    /// Durable on return.
    ///
    /// # Errors
    /// If the node does not exist or the storage fails.
    pub async fn assign(&self, id: &NodeId, set: DesiredSet) -> Result<(), InventoryError> {
        let _turn = self.writing.lock().await;
        let mut rows = self.state().rows(std::slice::from_ref(id))?;
        rows.retain(|row| row.desired.imagesets.iter().all(|wanted| wanted.name != set.name));
        for row in &mut rows {
            row.desired = desired::with_set(&row.desired, set.clone());
        }
        self.storage.save_desired(&rows).await?;
        self.state().publish(rows);
        Ok(())
    }

    /// Asks a node to end its present boot. Durable on return.
    ///
    /// # Errors
    /// If the node does not exist, has never reported, or the storage fails.
    pub async fn power(&self, id: &NodeId, action: PowerAction) -> Result<(), InventoryError> {
        let _turn = self.writing.lock().await;
        let mut rows = self.state().rows(std::slice::from_ref(id))?;
        for row in &mut rows {
            let observed = row.observed.as_ref();
            let observed = observed.ok_or_else(|| InventoryError::NotReported(id.clone()))?;
            row.desired = desired::with_power(&row.desired, action, &observed.boot_id);
        }
        self.storage.save_desired(&rows).await?;
        self.state().publish(rows);
        Ok(())
    }

    /// All rolls, oldest first.
    #[must_use]
    pub fn rolls(&self) -> Vec<Roll> {
        self.state().rolls.iter().map(RollRecord::to_api).collect()
    }

    /// One roll.
    ///
    /// # Errors
    /// If there is none of this number.
    pub fn roll(&self, id: u64) -> Result<Roll, InventoryError> {
        let state = self.state();
        let roll = state.rolls.iter().find(|roll| roll.id == id);
        roll.map(RollRecord::to_api).ok_or(InventoryError::UnknownRoll(id))
    }

    /// Writes everything seen since the last flush, in one transaction.
    ///
    /// # Errors
    /// If the storage fails; the next flush then tries all of it again.
    pub async fn flush(&self) -> Result<(), InventoryError> {
        let _turn = self.writing.lock().await;
        let (nodes, rolls) = self.state().take_dirty();
        if nodes.is_empty() && rolls.is_empty() {
            return Ok(());
        }
        let saved = self.storage.save_seen(&nodes, &rolls).await;
        if saved.is_err() {
            let mut state = self.state();
            state.dirty_rolls.extend(rolls.iter().map(|roll| roll.id));
            for row in &nodes {
                if let Some(node) = state.nodes.get_mut(&row.id) {
                    node.dirty = true;
                    node.hardware_dirty |= row.hardware.is_some();
                }
            }
        }
        Ok(saved?)
    }
}

#[cfg(test)]
mod tests;
