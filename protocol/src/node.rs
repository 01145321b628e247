//! The two documents of a node: what is wanted of it, and what has been seen of it.
//!
//! Readers ignore unknown fields: agent and server may be one version apart.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::channel::ChannelRequest;
use crate::facts::Hardware;
use crate::ids::{Digest, Mac, Name, NodeId, Version};
use crate::reference::Reference;
use crate::registries::RegistryEntry;

mod clock;
mod given;
mod layer0;

pub use clock::ObservedClock;
pub use given::{FileContent, GivenFile, Usage};
pub use layer0::{DesiredLayer0, Layer0Archive, Layer0How, Layer0State, ObservedLayer0};

/// An ImageSet that a node should run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredSet {
    /// Its name. At most one version of a name runs at a time.
    pub name: Name,
    /// Its version, for people: the digest decides.
    pub version: Version,
    /// Where it is fetched from, pinned by digest.
    pub reference: Reference,
    /// Changes with every roll that an operator starts, so that a version which the node went back from is tried again when
    /// it is asked for again. 0 when no roll brought it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub roll: u64,
    /// Cut over to it although the node is busy.
    #[serde(default, skip_serializing_if = "is_false")]
    pub force: bool,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn is_false(value: &bool) -> bool {
    !value
}

/// What to do with the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PowerAction {
    /// Power off, in order.
    Off,
    /// Reboot, in order.
    Reboot,
}

/// A request for power-off or reboot. It names the boot it is meant for, so that a rebooted node does not obey it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerRequest {
    /// What to do.
    pub action: PowerAction,
    /// The kernel's boot id (`/proc/sys/kernel/random/boot_id`) of the boot that should end.
    pub boot_id: String,
}

/// What the operator wants of a node: `GET /v1/nodes/{id}/desired`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// Grows with every change; the long poll asks for what comes after it.
    pub version: u64,
    /// The node it is for.
    pub node: NodeId,
    /// The ImageSets to run.
    pub imagesets: Vec<DesiredSet>,
    /// A request for power-off or reboot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<PowerRequest>,
    /// What the server knows of registries; goes before what the node brought along, host by host. Has secrets in it: only
    /// the node's own request is answered with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub registries: Vec<RegistryEntry>,
    /// Changes whenever `registries` or `files` may have, also when the version does not; the long poll says which one it
    /// has (`registries=`). None without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registries_tag: Option<String>,
    /// Channels that the server wants opened now. They do not change the version: nothing of them lasts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub channels: Vec<ChannelRequest>,
    /// Why the node is not to be disturbed; none when it is free. A busy node stages what is wanted, and cuts over when it is
    /// free again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy: Option<String>,
    /// Files and secrets that containers of this node name by `from`: only the node's own request is answered with them.
    /// A container has them as they were when it was made ready to start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<GivenFile>,
    /// The Layer0 to run; none while nobody has asked for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer0: Option<DesiredLayer0>,
}

impl Desired {
    /// A document in which nothing is wanted of the node, with version 0.
    #[must_use]
    pub const fn empty(node: NodeId) -> Self {
        Self {
            version: 0,
            node,
            imagesets: Vec::new(),
            power: None,
            registries: Vec::new(),
            registries_tag: None,
            channels: Vec::new(),
            busy: None,
            files: Vec::new(),
            layer0: None,
        }
    }
}

/// A step of a node's boot, in the order in which they happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The firmware asked for an address (first DHCPDISCOVER of a PXE or HTTP client).
    Dhcp,
    /// iPXE fetched its script.
    Ipxe,
    /// The kernel and the initramfs were fetched.
    Kernel,
    /// The kernel was started by the one before, in the place of all of the above. Agents do not report it as a mark.
    Kexec,
    /// PID 1 started.
    Init,
    /// The agent reached its server for the first time.
    Agent,
    /// The first byte of an ImageSet was asked for.
    Pulling,
    /// Every container stands at its exec barrier.
    Staged,
    /// Every container runs.
    Running,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 9] = [
        Self::Dhcp,
        Self::Ipxe,
        Self::Kernel,
        Self::Kexec,
        Self::Init,
        Self::Agent,
        Self::Pulling,
        Self::Staged,
        Self::Running,
    ];

    /// Its name in tables and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dhcp => "dhcp",
            Self::Ipxe => "ipxe",
            Self::Kernel => "kernel",
            Self::Kexec => "kexec",
            Self::Init => "init",
            Self::Agent => "agent",
            Self::Pulling => "pulling",
            Self::Staged => "staged",
            Self::Running => "running",
        }
    }
}

/// A phase with the node's own clock: milliseconds since its kernel started (CLOCK_BOOTTIME).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseMark {
    /// The phase.
    pub phase: Phase,
    /// Milliseconds since the kernel started.
    pub uptime_ms: u64,
}

/// How an ImageSet stands, relative to its desired digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SetState {
    /// Nothing of it is there.
    Absent,
    /// Everything is fetched, verified, mounted and held at the exec barrier.
    Staged,
    /// It runs, at the desired digest.
    Current,
    /// It runs, but not as desired; `reason` says why.
    Degraded,
    /// It does not run; `reason` says why.
    Failed,
}

/// How a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerState {
    /// Held at the exec barrier.
    Created,
    /// Its program runs.
    Running,
    /// It was asked to end.
    Stopping,
    /// It ended with 0, or because it was asked to.
    Exited,
    /// It ended otherwise, or could not start.
    Dead,
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// Exit code, when it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    /// Signal number, when one killed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Why it could not even start, when it did not; or why the node killed it (`watchdog: …`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a container's health check, or its own word, says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthState {
    /// Not ready yet.
    Starting,
    /// Ready, and well as far as anybody asks.
    Healthy,
    /// The check failed as often as it may.
    Unhealthy,
}

/// A container as the agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedContainer {
    /// Its name in the set.
    pub name: Name,
    /// How it stands.
    pub state: ContainerState,
    /// Process id on the node of its init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
    /// How its program last ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitStatus>,
    /// Whether it is ready to serve: its program has said so (`notify`) and its health check was good once, as far as it has
    /// either. Absent where it does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    /// Its health; none when it has no health check and does not tell when it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthState>,
    /// Why it is unhealthy, or what its program says of itself (sd_notify(3), STATUS=).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What could not be had on this node, one sentence each, `limits_unavailable: …`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What it used of the node when it was last looked at: with other news, and every half minute at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// How far a pull has come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PullProgress {
    /// Compressed bytes received.
    pub bytes: u64,
    /// Compressed bytes that the manifests promise, less what was already there.
    pub total: u64,
    /// Bytes a second, over the pull so far.
    pub bytes_per_s: u64,
}

/// How a roll ended, or that it has not ended yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RollOutcome {
    /// The new set runs and is watched; when it fails now, the old one comes back by itself.
    Watching,
    /// The new set ran well for its whole window.
    Committed,
    /// The old set runs again; the report's `reason` says why.
    RolledBack,
    /// The operator went back to the set that was kept staged.
    Undone,
}

impl RollOutcome {
    /// Its name in tables and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Watching => "watching",
            Self::Committed => "committed",
            Self::RolledBack => "rolled_back",
            Self::Undone => "undone",
        }
    }
}

/// What the last cut-over cost, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollReport {
    /// Digest that ran before; none on a first start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Digest>,
    /// Digest that runs now.
    pub to: Digest,
    /// Compressed bytes fetched for it.
    pub bytes: u64,
    /// Milliseconds from the decision to the exec barrier.
    pub staging_ms: u64,
    /// Microseconds from the old program's end to the new one's exec, the longest of the set's containers. 0 where the old one
    /// ran until the new one was ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_us: Option<u64>,
    /// Microseconds from the old program's end until the new one was ready, the longest of the set's containers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_us: Option<u64>,
    /// What became of it; none from an agent that does not watch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<RollOutcome>,
    /// Why the old set came back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// An ImageSet as the agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedSet {
    /// Its name.
    pub name: Name,
    /// The version that runs, or that is being fetched when none runs.
    pub version: Version,
    /// The digest of that version.
    pub digest: Digest,
    /// How it stands.
    pub state: SetState,
    /// Why it stands so, or what it waits for: one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How often in a row it failed, where it is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// When it is tried again, milliseconds since the kernel started (CLOCK_BOOTTIME).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at_ms: Option<u64>,
    /// A pull under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull: Option<PullProgress>,
    /// Its containers.
    #[serde(default)]
    pub containers: Vec<ObservedContainer>,
    /// What the last cut-over cost, and what became of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_roll: Option<RollReport>,
    /// The set that is kept staged: wanting it again costs no pull and no mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<DesiredSet>,
}

/// An interface of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedLink {
    /// The kernel's name, `eth0`.
    pub name: String,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its IP addresses.
    pub addresses: Vec<IpAddr>,
    /// What it waits for (`no carrier`), if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
}

/// The disk that a node keeps blobs on across reboots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedCache {
    /// The block device (`/dev/vda1`), or the directory of a standalone agent.
    pub place: String,
    /// Bytes of blobs kept there.
    pub used: u64,
    /// Most bytes that are kept.
    pub limit: u64,
    /// Why it is not, or not fully, used: one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What has been seen of a node: `PUT /v1/nodes/{id}/observed`, written by the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// [`crate::PROTOCOL_VERSION`] of the agent.
    pub protocol: u32,
    /// The node.
    pub node: NodeId,
    /// The kernel's boot id: changes with every boot, and only then.
    pub boot_id: String,
    /// Version of the agent.
    pub agent_version: String,
    /// The kernel's release (`uname -r`).
    pub kernel: String,
    /// SMBIOS UUID, where the firmware gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// How often the agent itself was started in this boot, counting from 1.
    pub agent_starts: u32,
    /// Whether the node has pivoted: its PID 1 is the image's init.
    #[serde(default)]
    pub pivoted: bool,
    /// Its interfaces.
    pub links: Vec<ObservedLink>,
    /// The `version` of the desired document that was last acted on; 0 before the first.
    pub desired_version: u64,
    /// Phases of this boot on the node's own clock.
    pub timeline: Vec<PhaseMark>,
    /// What the node waits for, and why: one sentence. None when all is as desired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
    /// How the node's kernel crashed before this boot: one line, at most 200 bytes. None when it did not, or could keep no record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_crash: Option<String>,
    /// The disk that keeps blobs across reboots, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<ObservedCache>,
    /// Its Layer0; none from an agent that is not in one (`--standalone`) or does not know how to change it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer0: Option<ObservedLayer0>,
    /// Its clock; none from an agent that does not look after it (`--standalone`) or has not compared it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<ObservedClock>,
    /// Its ImageSets.
    pub imagesets: Vec<ObservedSet>,
    /// What its hardware is: in the first report of a boot, and when it changes. The server keeps the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<Hardware>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn unchanged<T: Serialize + serde::de::DeserializeOwned>(golden: &str) -> T {
        let document: T = serde_json::from_str(golden).expect("golden");
        assert_eq!(serde_json::to_string_pretty(&document).expect("render") + "\n", golden);
        document
    }

    #[test]
    fn the_golden_documents_are_read_and_written_unchanged() {
        let desired: Desired = unchanged(include_str!("../golden/v1/desired.json"));
        assert_eq!(desired.imagesets.len(), 1);
        let observed: Observed = unchanged(include_str!("../golden/v1/observed.json"));
        assert_eq!(observed.imagesets[0].state, SetState::Current);
    }

    #[test]
    fn fields_of_a_later_version_are_ignored() {
        let golden = include_str!("../golden/v1/desired.json");
        let later = golden.replacen("\"version\"", "\"colour\": \"red\", \"version\"", 1);
        serde_json::from_str::<Desired>(&later).expect("one version apart");
    }

    #[test]
    fn phases_are_ordered_as_they_happen() {
        assert!(Phase::ALL.is_sorted());
        for phase in Phase::ALL {
            let json = serde_json::to_string(&phase).expect("render");
            assert_eq!(json.trim_matches('"'), phase.as_str());
        }
    }
}
