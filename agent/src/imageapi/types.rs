//! The documents of the ImageAPI as they stand on the wire: attachments, mounts, containers.
//!
//! Field names are those of Kraken's ImageAPI 0.2.0 (`max_comands` is its spelling); `oci`, `uri`, `partition` and `size` are
//! ours. Scalars that are zero are left out, arrays that are absent are `null`, fields stand in alphabetical order. What a
//! request may say of them is checked in `schema`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whether a scalar is left out.
fn zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// An error's body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// 601 and above: what is wrong with a request's content; else the HTTP status.
    pub code: i64,
    /// One sentence.
    pub message: String,
}

/// How a block device comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachKind {
    /// A LUN of an iSCSI target.
    Iscsi,
    /// A block device that is there already.
    Local,
    /// A file as a block device.
    Loopback,
    /// An image of a Ceph cluster.
    Rbd,
}

/// How a file system comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// From a block device.
    Attach,
    /// From a directory.
    Bind,
    /// From an NFS server.
    Nfs,
    /// From an image in a registry.
    Oci,
    /// From other mounts, laid over each other, with a writable part on top.
    Overlay,
    /// From a file on an HTTP server, by its digest.
    Uri,
}

/// What a path is relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// The node's own root.
    Root,
    /// Another mount.
    Mount,
}

/// How a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Never started.
    Created,
    /// Its program runs.
    Running,
    /// It was asked to end and has not yet.
    Stopping,
    /// It ended with 0, or because it was asked to.
    Exited,
    /// It failed, was killed, or could not be started.
    Dead,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Exited => "exited",
            Self::Dead => "dead",
        })
    }
}

/// A block device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attach {
    /// Its device file; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub device_file: String,
    /// Its number; in a request it stands for the attachment of that number.
    #[serde(skip_serializing_if = "zero")]
    pub id: i64,
    /// For kind `iscsi`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iscsi: Option<AttachIscsi>,
    /// How it comes about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<AttachKind>,
    /// For kind `local`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local: Option<AttachLocal>,
    /// For kind `loopback`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loopback: Option<AttachLoopback>,
    /// For kind `rbd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rbd: Option<AttachRbd>,
    /// Who holds it; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub refs: i64,
}

/// A LUN of an iSCSI target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AttachIscsi {
    /// The target's address or name.
    pub host: String,
    /// Our own name (IQN).
    pub initiator: String,
    /// The LUN; 0 by default.
    #[serde(skip_serializing_if = "zero")]
    pub lun: i64,
    /// Most commands of the session at a time; 128 by default.
    #[serde(rename = "max_comands", skip_serializing_if = "zero")]
    pub max_commands: i64,
    /// TCP port; 3260 by default.
    #[serde(skip_serializing_if = "zero")]
    pub port: i64,
    /// Most commands of the LUN at a time; 16 by default.
    #[serde(skip_serializing_if = "zero")]
    pub queue_depth: i64,
    /// I/O scheduler of the device; `mq-deadline` by default.
    #[serde(skip_serializing_if = "zero")]
    pub scheduler: String,
    /// The target's name (IQN).
    pub target: String,
}

/// A block device that is there already.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AttachLocal {
    /// Its device file.
    pub path: String,
}

/// A file as a block device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AttachLoopback {
    /// What `path` is relative to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// The mount, for base `mount`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount: Option<Box<Mount>>,
    /// Which partition the device file is of; the whole disk when 0. Ours.
    #[serde(skip_serializing_if = "zero")]
    pub partition: i64,
    /// The file.
    pub path: String,
    /// Whether its partitions become devices too.
    #[serde(rename = "readPartitions", skip_serializing_if = "zero")]
    pub read_partitions: bool,
}

/// An image of a Ceph cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AttachRbd {
    /// The kernel's number of it; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub device_id: i64,
    /// The image.
    pub image: String,
    /// The cluster's monitors, IPv4 addresses.
    pub monitors: Option<Vec<String>>,
    /// Options of the mapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<RbdOptions>,
    /// The pool.
    pub pool: String,
    /// The snapshot; the image's head when empty.
    #[serde(skip_serializing_if = "zero")]
    pub snapshot: String,
}

/// Options of an rbd mapping, as the kernel has them (`drivers/block/rbd.c`, `net/ceph/ceph_common.c`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the kernel's own names; what they mean is the kernel's to say")]
pub struct RbdOptions {
    #[serde(skip_serializing_if = "zero")]
    pub abort_on_full: bool,
    #[serde(skip_serializing_if = "zero")]
    pub alloc_size: i64,
    #[serde(skip_serializing_if = "zero")]
    pub ceph_requires_signatures: bool,
    #[serde(skip_serializing_if = "zero")]
    pub cephx_sign_messages: bool,
    #[serde(skip_serializing_if = "zero")]
    pub crc: bool,
    #[serde(skip_serializing_if = "zero")]
    pub exclusive: bool,
    #[serde(skip_serializing_if = "zero")]
    pub force: bool,
    #[serde(skip_serializing_if = "zero")]
    pub fsid: String,
    #[serde(skip_serializing_if = "zero")]
    pub ip: String,
    #[serde(skip_serializing_if = "zero")]
    pub lock_on_read: bool,
    #[serde(skip_serializing_if = "zero")]
    pub lock_timeout: i64,
    #[serde(skip_serializing_if = "zero")]
    pub mount_timeout: i64,
    #[serde(skip_serializing_if = "zero")]
    pub name: String,
    #[serde(skip_serializing_if = "zero")]
    pub namespace: String,
    #[serde(skip_serializing_if = "zero")]
    pub noceph_requires_signatures: bool,
    #[serde(skip_serializing_if = "zero")]
    pub nocephx_sign_messages: bool,
    #[serde(skip_serializing_if = "zero")]
    pub nocrc: bool,
    #[serde(skip_serializing_if = "zero")]
    pub noshare: bool,
    #[serde(skip_serializing_if = "zero")]
    pub notcp_nodelay: bool,
    #[serde(skip_serializing_if = "zero")]
    pub notrim: bool,
    #[serde(skip_serializing_if = "zero")]
    pub osd_idle_ttl: i64,
    #[serde(skip_serializing_if = "zero")]
    pub osdkeepalive: i64,
    #[serde(skip_serializing_if = "zero")]
    pub queue_depth: i64,
    #[serde(skip_serializing_if = "zero")]
    pub ro: bool,
    #[serde(skip_serializing_if = "zero")]
    pub rw: bool,
    /// Goes to the kernel and nowhere else: neither into an answer nor onto a disk.
    #[serde(skip_serializing)]
    pub secret: String,
    #[serde(skip_serializing_if = "zero")]
    pub share: bool,
    #[serde(skip_serializing_if = "zero")]
    pub tcp_nodelay: bool,
}

/// A file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// For kind `attach`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attach: Option<MountAttach>,
    /// For kind `bind`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bind: Option<MountBind>,
    /// Its number; in a request it stands for the mount of that number.
    #[serde(skip_serializing_if = "zero")]
    pub id: i64,
    /// How it comes about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<MountKind>,
    /// Where it is mounted on the node; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub mountpoint: String,
    /// For kind `nfs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nfs: Option<MountNfs>,
    /// For kind `oci`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oci: Option<MountOci>,
    /// For kind `overlay`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay: Option<MountOverlay>,
    /// Who holds it; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub refs: i64,
    /// For kind `uri`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uri: Option<MountUri>,
}

/// A file system on a block device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountAttach {
    /// The block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attach: Option<Box<Attach>>,
    /// The file system's kind, as the kernel calls it.
    pub fs_type: String,
    /// Options as in fstab(5): flags such as `ro`, and the file system's own.
    pub mount_options: Option<Vec<String>>,
}

/// A directory, seen in a second place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountBind {
    /// What `path` is relative to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// The mount, for base `mount`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount: Option<Box<Mount>>,
    /// The directory.
    pub path: String,
    /// Whether the mounts below it come along.
    #[serde(skip_serializing_if = "zero")]
    pub recursive: bool,
    /// Read-only.
    #[serde(skip_serializing_if = "zero")]
    pub ro: bool,
}

/// An export of an NFS server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountNfs {
    /// The server's address or name.
    pub host: String,
    /// Options of the kernel's client (nfs(5)).
    pub options: Option<Vec<String>>,
    /// The export.
    pub path: String,
    /// Read-only.
    #[serde(skip_serializing_if = "zero")]
    pub ro: bool,
    /// NFS version; 4.2 by default.
    #[serde(skip_serializing_if = "zero")]
    pub version: String,
}

/// An image in a registry. Ours.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountOci {
    /// What the reference stood for; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub digest: String,
    /// Its reference; `http://` before it for a registry without TLS.
    pub image: String,
    /// Read-only.
    #[serde(skip_serializing_if = "zero")]
    pub ro: bool,
    /// Most bytes that can be written to it; a quarter of the node's memory by default.
    #[serde(skip_serializing_if = "zero")]
    pub size: i64,
}

/// Mounts laid over each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountOverlay {
    /// What lies below, topmost first.
    pub lower: Option<Vec<Mount>>,
    /// Most bytes that can be written to it; a quarter of the node's memory by default. Ours.
    #[serde(skip_serializing_if = "zero")]
    pub size: i64,
    /// Where what is written lies; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub upperdir: String,
    /// overlayfs' own directory; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub workdir: String,
}

/// What a file holds. Ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// A newc cpio archive, plain or compressed with gzip or zstd.
    Cpio,
    /// An EROFS image.
    Erofs,
    /// A squashfs image.
    Squashfs,
    /// A tar archive, plain or compressed with gzip or zstd.
    Tar,
}

/// A file on an HTTP server. Ours.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountUri {
    /// The digest of the file as it is served, `sha256:HEX`.
    pub digest: String,
    /// What it holds; found out by itself, and an error where it is something else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Read-only. Image formats always are.
    #[serde(skip_serializing_if = "zero")]
    pub ro: bool,
    /// Most bytes that can be written to it; a quarter of the node's memory by default.
    #[serde(skip_serializing_if = "zero")]
    pub size: i64,
    /// `http://` or `https://`.
    pub uri: String,
}

/// A program on a mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Container {
    /// Program and arguments, in words; quotes hold a word together.
    pub command: String,
    /// Its number.
    #[serde(skip_serializing_if = "zero")]
    pub id: i64,
    /// Where what it prints is written; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub logfile: String,
    /// Its root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mount: Option<Box<Mount>>,
    /// Its name; unique unless empty.
    #[serde(skip_serializing_if = "zero")]
    pub name: String,
    /// Namespaces of its own, beyond those that every container has.
    pub namespaces: Option<Vec<String>>,
    /// Who holds it; only in answers.
    #[serde(skip_serializing_if = "zero")]
    pub refs: i64,
    /// How it stands; in a request `created` (the default) or `running`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// Whether the program is an init such as systemd.
    #[serde(skip_serializing_if = "zero")]
    pub systemd: bool,
}
