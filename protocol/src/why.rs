//! The answer to "why is this node not what I want": `GET /v1/nodes/{id}/why`. Only its form; the server finds it.

use serde::{Deserialize, Serialize};

use crate::ids::NodeId;

/// How far a node is from what is wanted of it, the worse the later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhyState {
    /// It is what is wanted.
    AsWanted,
    /// It gets there by itself, as far as can be seen.
    OnItsWay,
    /// Something keeps it from getting there, and it tries again, or waits, by itself.
    Waiting,
    /// It gets there only when somebody does something.
    Stuck,
    /// Nothing is heard of it any more.
    Silent,
    /// Nothing was ever heard of it.
    NeverSeen,
}

/// Why a node is as it is. Every text is one sentence, or a part of one, without a full stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// The node.
    pub node: NodeId,
    /// How far it is from what is wanted.
    pub state: WhyState,
    /// The plain answer.
    pub answer: String,
    /// What is wanted of it.
    pub wanted: Vec<String>,
    /// What is seen of it.
    pub seen: Vec<String>,
    /// The reasons, the nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub because: Vec<String>,
    /// What happens next by itself, and when.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub next: Vec<String>,
    /// What the operator can do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub you_can: Vec<String>,
}
