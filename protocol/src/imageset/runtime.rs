//! What a container sees and may use: namespaces, mounts, devices, files, limits. Words and their checks, nothing that acts.

use serde::{Deserialize, Serialize};

use super::values::{ByteSize, Cpus, FileMode};
use crate::ids::Name;

/// The network a container is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetMode {
    /// The node's own. The default.
    #[default]
    Host,
    /// One of its own with nothing but a loopback interface.
    None,
    /// One of its own, tied to the node by a pair of veth interfaces; `network` has the addresses.
    Private,
}

/// Namespaces beyond those that every container has (mnt, pid, ipc, uts, cgroup; namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespaces {
    /// Its network.
    #[serde(default)]
    pub net: NetMode,
    /// User ids of its own, mapped to unprivileged ones of the node (user_namespaces(7)).
    #[serde(default)]
    pub user: bool,
    /// Clocks of its own that start at its start (time_namespaces(7)).
    #[serde(default)]
    pub time: bool,
}

/// Addresses of a private network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Address and prefix length of the container's `eth0`, `10.88.0.2/24`.
    pub address: String,
    /// Address and prefix length of the node's end, which is the container's default gateway, `10.88.0.1/24`.
    pub host_address: String,
    /// Largest packet in bytes; the kernel's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// How mounts and unmounts travel between node and container (mount_namespaces(7), shared subtrees).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Propagation {
    /// Not at all. The default.
    #[default]
    Private,
    /// From the node to the container.
    Slave,
    /// Both ways.
    Shared,
}

/// A directory or file of the node that the container sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// Absolute path on the node.
    pub source: String,
    /// Absolute path in the container; the same as `source` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Whether the container may not write there.
    #[serde(default)]
    pub read_only: bool,
    /// Whether mounts below it come along.
    #[serde(default)]
    pub recursive: bool,
    /// How mounts travel.
    #[serde(default)]
    pub propagation: Propagation,
    /// Whether the container starts without it where the node has no such path.
    #[serde(default)]
    pub optional: bool,
}

/// Memory that the container sees as a directory; gone with the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tmpfs {
    /// Absolute path in the container.
    pub target: String,
    /// Its bound; half of the node's memory when absent (tmpfs(5)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// Permissions; `"1777"` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<FileMode>,
    /// Whether programs may be run from it.
    #[serde(default)]
    pub exec: bool,
}

/// Where a persistent directory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// On the disk labelled LAYERCAKE where there is one, else in memory. The default.
    #[default]
    Auto,
    /// On that disk; without one the container does not start.
    Disk,
    /// In memory: it survives rolls and restarts, not a reboot.
    Memory,
}

/// A directory that outlives the instance: restarts, rolls and, on a disk, reboots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Persistent {
    /// Its name; containers of one set that use the same name share it.
    pub name: Name,
    /// Absolute path in the container. What the image has there is copied into it when it is new and empty.
    pub target: String,
    /// Where it lies.
    #[serde(default)]
    pub storage: Storage,
    /// Permissions when it is made; the image directory's, else `"0755"`, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<FileMode>,
    /// `USER[:GROUP]` by number, owner when it is made; the image directory's, else root, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// A file that is put over the image's, from the description or from the server; it lies on a private tmpfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Absolute path in the container.
    pub target: String,
    /// Its text. Exactly one of `content` and `from` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Name of a file or secret that the server gives the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Name>,
    /// Whether `{{ node.name }}` and the like are replaced by the node's facts.
    #[serde(default)]
    pub template: bool,
    /// Permissions; `"0644"`, for `from` `"0400"`, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<FileMode>,
    /// `USER[:GROUP]` by number; the container's user when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// A device of the node that the container may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Its path on the node and in the container, `/dev/fuse`; a directory stands for every device in it, `/dev/infiniband`.
    pub path: String,
    /// Whether the container starts without it where the node has none.
    #[serde(default)]
    pub optional: bool,
}

/// Whether system calls are filtered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Seccomp {
    /// Those that programs use are let through, others fail with EPERM; a privileged container is not filtered. The default.
    #[default]
    Default,
    /// All are let through.
    Unconfined,
}

/// What a container may use of the node (cgroup v2, Documentation/admin-guide/cgroup-v2.rst).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// `memory.max`: beyond it the whole container is killed (`memory.oom.group`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// `memory.high`: beyond it the container is slowed and its memory reclaimed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_high: Option<ByteSize>,
    /// `memory.swap.max`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<ByteSize>,
    /// `cpu.max`, in processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Cpus>,
    /// `cpu.weight`, 1 to 10000; the kernel's default is 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u32>,
    /// `cpuset.cpus`, `0-3,8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpuset: Option<String>,
    /// `pids.max`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u32>,
    /// `io.weight`, 1 to 10000; the kernel's default is 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_weight: Option<u32>,
    /// Whether the container does not start where a limit cannot be set; otherwise it starts and the limit is reported.
    #[serde(default)]
    pub required: bool,
}

/// Whether a text is an absolute path without `..`, NUL or an empty name, other than `/` itself.
#[must_use]
pub(super) fn is_target(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(|rest| {
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        !rest.contains('\0') && rest.split('/').all(|name| !matches!(name, "" | "." | ".."))
    })
}

/// Whether a text is `USER` or `USER:GROUP`, by number.
#[must_use]
pub(super) fn is_owner(text: &str) -> bool {
    let (user, group) = text.split_once(':').unwrap_or((text, "0"));
    user.parse::<u32>().is_ok() && group.parse::<u32>().is_ok()
}

/// Whether a text is an address with a prefix length, `10.88.0.2/24`.
#[must_use]
pub(super) fn is_cidr(text: &str) -> bool {
    let parsed = text.split_once('/').and_then(|(address, length)| {
        let address: std::net::IpAddr = address.parse().ok()?;
        let length: u8 = length.parse().ok()?;
        Some(length <= if address.is_ipv4() { 32 } else { 128 })
    });
    parsed.unwrap_or(false)
}
