//! Which Layer0 nodes shall run, run, and boot.

use std::collections::BTreeSet;

use protocol::api::Layer0Node;
use protocol::ids::{Digest, NodeId};
use protocol::node::{DesiredLayer0, Layer0How};

use super::{Inventory, InventoryError};
use crate::desired;
use crate::storage::NodeRow;

/// What an operator wants of nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer0Wish {
    /// The build.
    pub digest: Digest,
    /// How to get there.
    pub how: Layer0How,
    /// Its agent, where only that is wanted.
    pub agent: Option<Digest>,
    /// Also where the node runs it already.
    pub again: bool,
    /// Also where the node is busy.
    pub force: bool,
}

/// What decides which build a machine boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layer0Choice {
    /// What is wanted of it.
    pub wanted: Option<Digest>,
    /// What it last reported from.
    pub last_good: Option<Digest>,
    /// How often it fetched its script since.
    pub attempts: u32,
}

impl Layer0Wish {
    /// What this means for a node. The boot that is to end is named: the present one, unless nothing needs to end.
    fn of(&self, row: &NodeRow) -> DesiredLayer0 {
        let observed = row.observed.as_ref();
        let runs = observed.and_then(|it| it.layer0.as_ref()).and_then(|layer0| layer0.digest);
        let ends = self.how != Layer0How::Agent && (self.again || runs != Some(self.digest));
        DesiredLayer0 {
            digest: self.digest,
            how: self.how,
            boot_id: observed.filter(|_| ends).map(|it| it.boot_id.clone()),
            request: row.desired.version + 1,
            agent: self.agent,
            force: self.force,
            archives: Vec::new(),
        }
    }
}

impl Inventory {
    /// Wants a Layer0 of these nodes. A node that has never reported boots it the next time. Durable on return.
    ///
    /// # Errors
    /// If a node does not exist, or its agent cannot change its Layer0; nothing is changed then. If the storage fails.
    pub async fn want_layer0(
        &self,
        nodes: &[NodeId],
        wish: &Layer0Wish,
    ) -> Result<Vec<Layer0Node>, InventoryError> {
        let _turn = self.writing.lock().await;
        let mut rows = self.state().rows(nodes)?;
        let mut asked = Vec::new();
        for row in &mut rows {
            if row.observed.as_ref().is_some_and(|observed| observed.layer0.is_none()) {
                return Err(InventoryError::NotInLayer0(row.id.clone()));
            }
            let layer0 = wish.of(row);
            let boot_id = layer0.boot_id.clone();
            row.desired = desired::with_layer0(&row.desired, layer0);
            asked.push(Layer0Node {
                node: row.id.clone(),
                digest: wish.digest,
                desired_version: row.desired.version,
                boot_id,
            });
        }
        self.storage.save_desired(&rows).await?;
        self.state().publish(rows);
        Ok(asked)
    }

    /// What decides which build a node boots.
    #[must_use]
    pub fn layer0_choice(&self, id: &NodeId) -> Layer0Choice {
        let state = self.state();
        let Some(row) = state.nodes.get(id).map(|node| &node.row) else {
            return Layer0Choice::default();
        };
        let observed = row.observed.as_ref().and_then(|it| it.layer0.as_ref());
        Layer0Choice {
            wanted: row.desired.layer0.as_ref().map(|layer0| layer0.digest),
            last_good: observed.and_then(|layer0| layer0.digest),
            attempts: row.timeline.attempts,
        }
    }

    /// The builds that nodes shall run, or run.
    #[must_use]
    pub fn layer0_pinned(&self) -> BTreeSet<Digest> {
        let state = self.state();
        state.nodes.values().flat_map(|node| needed(&node.row)).collect()
    }

    /// Who shall run a build, or runs it, in words.
    #[must_use]
    pub fn layer0_users(&self, digest: &Digest) -> Option<String> {
        let state = self.state();
        let uses = |row: &&NodeRow| needed(row).any(|needed| needed == *digest);
        let mut users = state.nodes.values().map(|node| &node.row).filter(uses);
        let first = users.next()?;
        Some(match users.count() {
            0 => format!("node {} runs it, or shall", first.id),
            more => format!("node {} and {more} more run it, or shall", first.id),
        })
    }
}

fn needed(row: &NodeRow) -> impl Iterator<Item = Digest> + '_ {
    let wanted = row.desired.layer0.as_ref().map(|layer0| layer0.digest);
    let observed = row.observed.as_ref().and_then(|it| it.layer0.as_ref());
    wanted.into_iter().chain(observed.and_then(|layer0| layer0.digest))
}
