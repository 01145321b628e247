//! What outlives the server: one trait, and the databases behind it.
//!
//! The inventory holds everything in RAM and reads the storage once, at the start. Two kinds of writes exist: what an
//! operator wants is durable before the call returns; what has been seen of nodes comes in batches.

pub mod sqlite;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use futures_util::future::BoxFuture;
use protocol::facts::Hardware;
use protocol::ids::{Mac, Name, NodeId, Version};
use protocol::node::{Desired, Observed};
use protocol::reference::Reference;

use crate::rolls::{Member, RollRecord};
use crate::timeline::Timeline;

/// Most rolls that are read back at the start, the newest.
pub const MAX_ROLLS: u32 = 500;

/// A node, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRow {
    /// Its id.
    pub id: NodeId,
    /// Its Ethernet addresses, the boot interface first.
    pub macs: Vec<Mac>,
    /// SMBIOS UUID.
    pub uuid: Option<String>,
    /// The address that DHCP gave it.
    pub address: Option<IpAddr>,
    /// When it was first heard of, milliseconds since the Unix epoch.
    pub first_seen_ms: u64,
    /// When it was last heard of, milliseconds since the Unix epoch.
    pub last_seen_ms: u64,
    /// Its latest boot.
    pub timeline: Timeline,
    /// What its agent last reported.
    pub observed: Option<Observed>,
    /// What is wanted of it.
    pub desired: Desired,
    /// What its hardware is; None in a row that is to be written says that this has not changed.
    pub hardware: Option<Hardware>,
}

/// A roll that has no number yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRoll {
    /// The ImageSet.
    pub name: Name,
    /// The version it goes to.
    pub version: Version,
    /// The reference it goes to, pinned.
    pub reference: Reference,
    /// The nodes.
    pub members: Vec<Member>,
}

/// Everything that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Loaded {
    /// The nodes.
    pub nodes: Vec<NodeRow>,
    /// The newest [`MAX_ROLLS`] rolls, oldest first.
    pub rolls: Vec<RollRecord>,
}

/// Why the storage failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// It could not be opened or brought to this version's form.
    #[error("the inventory {} could not be opened", path.display())]
    Open {
        /// The database file.
        path: PathBuf,
        /// The database's words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is damaged.
    #[error("the inventory {} is damaged: {reason}; restore it from a backup or move it away", path.display())]
    Damaged {
        /// The database file.
        path: PathBuf,
        /// Where.
        reason: String,
    },
    /// The disk is full. It heals by itself once there is room.
    #[error("the disk of the inventory is full")]
    Full,
    /// A statement failed.
    #[error("the inventory could not be {action}")]
    Query {
        /// `read` or `written`.
        action: &'static str,
        /// The database's words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A database. Each call is one transaction: all of it happens, or nothing.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Reads everything.
    fn load(&self) -> BoxFuture<'_, Result<Loaded, StorageError>>;

    /// Writes what has been seen of these nodes (everything but `desired`, which is only written for a node that is
    /// new) and how these rolls stand.
    fn save_seen<'a>(
        &'a self,
        nodes: &'a [NodeRow],
        rolls: &'a [RollRecord],
    ) -> BoxFuture<'a, Result<(), StorageError>>;

    /// Writes what is wanted of these nodes; durable on return.
    fn save_desired<'a>(&'a self, nodes: &'a [NodeRow]) -> BoxFuture<'a, Result<(), StorageError>>;

    /// Writes a new roll, what it makes wanted of its nodes, and the rolls that it supersedes; durable on return.
    /// Returns the roll's number.
    fn create_roll<'a>(
        &'a self,
        roll: &'a NewRoll,
        nodes: &'a [NodeRow],
        superseded: &'a [RollRecord],
    ) -> BoxFuture<'a, Result<u64, StorageError>>;

    /// Forgets a node.
    fn remove_node<'a>(&'a self, id: &'a NodeId) -> BoxFuture<'a, Result<(), StorageError>>;
}
