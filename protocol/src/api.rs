//! Request, reply and error bodies of the boot server's `/v1` API.
//!
//! | method and path | request | reply |
//! |---|---|---|
//! | GET /v1/nodes | | `Vec<NodeRecord>` |
//! | GET /v1/nodes/{id} | | [`NodeRecord`] |
//! | GET /v1/nodes/{id}/why | | [`crate::why::Why`] |
//! | GET /v1/nodes/{id}/desired?after=V&wait=S&registries=TAG | | [`crate::node::Desired`] with the registry table and the node's files; 204 when nothing newer came in S seconds |
//! | PUT /v1/nodes/{id}/observed | [`crate::node::Observed`] | 204 |
//! | POST /v1/nodes/{id}/channels | [`crate::channel::ChannelBody`] | 201 [`crate::channel::ChannelCreated`] |
//! | POST /v1/nodes/{id}/power | [`PowerBody`] | 204 |
//! | POST /v1/nodes/{id}/busy | [`BusyBody`] | 204 |
//! | GET /v1/layer0 | | `Vec<Layer0Record>` |
//! | POST /v1/layer0?name=NAME | a build's `manifest.json` | [`Layer0Upload`] |
//! | PUT /v1/layer0/{hex}/{file} | a file of that build | 204 |
//! | DELETE /v1/layer0/{hex} | | 204 |
//! | POST /v1/layer0/start | [`Layer0Request`] | 201 `Vec<Layer0Node>` |
//! | GET /v1/imagesets | | `Vec<ImageSetRecord>` |
//! | POST /v1/rolls | [`RollRequest`] | 201 [`Roll`] |
//! | POST /v1/rolls/undo | [`UndoRequest`] | 201 `Vec<Roll>` |
//! | GET /v1/rolls, GET /v1/rolls/{id} | | `Vec<Roll>`, [`Roll`] |
//!
//! Every failure answers [`ErrorBody`].

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::ids::{Digest, Mac, Name, NodeId, Version};
use crate::node::{Desired, Layer0How, Observed, Phase, PowerAction, RollReport};
use crate::reference::Reference;

/// Longest wait of the long poll that the server grants, in seconds.
pub const MAX_LONG_POLL_S: u64 = 60;

/// The body of every failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The failure.
    pub error: ErrorDetail,
}

/// What failed, in words and for programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// Stable word for programs, `not_found`.
    pub code: String,
    /// One sentence for people.
    pub message: String,
}

/// When a phase of a node's latest boot was seen, on the server's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// The phase.
    pub phase: Phase,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// A node of the inventory with everything known of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its id.
    pub id: NodeId,
    /// Its Ethernet addresses, the boot interface first.
    pub macs: Vec<Mac>,
    /// SMBIOS UUID, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// The address that DHCP gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// When it was first heard of, milliseconds since the Unix epoch.
    pub first_seen_ms: u64,
    /// When it was last heard of, milliseconds since the Unix epoch.
    pub last_seen_ms: u64,
    /// Its latest boot, phase by phase, on the server's clock.
    pub boot: Vec<PhaseTime>,
    /// What is wanted of it.
    pub desired: Desired,
    /// What its agent last reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed: Option<Observed>,
}

/// `POST /v1/nodes/{id}/power`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerBody {
    /// What to do.
    pub action: PowerAction,
}

/// `POST /v1/nodes/{id}/busy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BusyBody {
    /// Why the node is not to be disturbed; none when it is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy: Option<String>,
}

/// A version of an ImageSet in the server's registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSetRecord {
    /// Its name.
    pub name: Name,
    /// Its version.
    pub version: Version,
    /// Its reference, pinned.
    pub reference: Reference,
    /// The digest of its index.
    pub digest: Digest,
}

/// `POST /v1/rolls`: bring these nodes to this version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RollRequest {
    /// Ids of nodes, or the one word `all`.
    pub nodes: Vec<String>,
    /// `NAME:VERSION` in the server's registry, or a full reference.
    pub imageset: String,
    /// Cut over on busy nodes as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// `POST /v1/rolls/undo`: bring these nodes back to the version of this ImageSet that they ran before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UndoRequest {
    /// Ids of nodes, or the one word `all`: every node that wants the set.
    pub nodes: Vec<String>,
    /// The ImageSet.
    pub name: Name,
    /// Cut over on busy nodes as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// How one node stands in a roll.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RollState {
    /// It has not reported the new digest as current and committed yet.
    Pending,
    /// It runs the new digest, and ran it well for as long as the set is watched.
    Done,
    /// It says it could not; it still runs what it ran, and tries again.
    Failed,
    /// It ran the new digest, which failed, and runs what it ran before. It does not try again by itself.
    #[serde(rename = "rolled_back")]
    RolledBack,
    /// A later roll wants something else of it.
    Superseded,
}

/// One node of a roll.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollNode {
    /// The node.
    pub node: NodeId,
    /// How it stands.
    pub state: RollState,
    /// Why, where there is a why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What it cost, from the cut-over on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<RollReport>,
}

/// A roll: what was asked, and how each node stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roll {
    /// Its number.
    pub id: u64,
    /// The ImageSet.
    pub name: Name,
    /// The version it goes to.
    pub version: Version,
    /// The reference it goes to, pinned.
    pub reference: Reference,
    /// The nodes.
    pub nodes: Vec<RollNode>,
}

/// A Layer0 build that the server has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer0Record {
    /// sha256 of its manifest: what it is known by.
    pub digest: Digest,
    /// The name that an operator gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Version of Layercake that built it.
    pub version: String,
    /// The kernel's release.
    pub kernel: String,
    /// The kernel's flavour.
    pub flavour: String,
    /// Version of the agent in it.
    pub agent: String,
    /// sha256 of the agent in it.
    pub agent_digest: Digest,
    /// Whether its agent is there alone, to replace another in place.
    pub agent_alone: bool,
    /// Whether there is a signature for it.
    pub signed: bool,
    /// Whether nodes boot it that nobody has asked for another.
    pub default: bool,
    /// Size of its files in bytes.
    pub bytes: u64,
    /// When it came here, milliseconds since the Unix epoch.
    pub added_ms: u64,
}

/// What is to follow a manifest that was posted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer0Upload {
    /// The build's digest.
    pub digest: Digest,
    /// Files that are not there yet; none when the build is complete.
    pub missing: Vec<String>,
}

/// `POST /v1/layer0/start`: bring these nodes to this Layer0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer0Request {
    /// Ids of nodes, or the one word `all`.
    pub nodes: Vec<String>,
    /// `default`, the name of a build, its digest or the beginning of it.
    pub layer0: String,
    /// How to get there.
    #[serde(default)]
    pub how: Layer0How,
    /// Also where the node runs it already: a fast reboot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub again: bool,
    /// Go there on busy nodes as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// What a node was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer0Node {
    /// The node.
    pub node: NodeId,
    /// The Layer0.
    pub digest: Digest,
    /// Version of the desired document that says so.
    pub desired_version: u64,
    /// The boot that ends for it; none when nothing needs to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
}
