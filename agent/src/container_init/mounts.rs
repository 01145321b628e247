//! The container's view of the files: its root, its own /proc, /sys and /dev, the node's /etc files, and nothing of the node.
//!
//! Every path in the image is opened inside the image's root (openat2(2), RESOLVE_IN_ROOT) and mounted on by descriptor, so a
//! symbolic link in an image cannot lead out of it, nor make us mount somewhere else.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use protocol::imageset::Profile;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags as Attr, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};

use super::notify::INBOX_NAME;
use super::{InitError, step};
use crate::containers::{NOTIFY_FILE, Spec};
use crate::sys::process::mount_setattr;

/// A file system that is mounted anew.
struct New {
    at: &'static str,
    kind: &'static str,
    options: &'static [(&'static str, &'static str)],
    attributes: Attr,
    /// Whether a kernel without it can still run containers.
    required: bool,
}

const fn attributes(list: &[Attr]) -> Attr {
    let mut bits = 0;
    let mut at = 0;
    while at < list.len() {
        #[expect(clippy::indexing_slicing, reason = "a constant, bounded by the loop")]
        let attr = list[at];
        bits |= attr.bits();
        at += 1;
    }
    Attr::from_bits_retain(bits)
}

const QUIET: Attr =
    attributes(&[Attr::MOUNT_ATTR_NOSUID, Attr::MOUNT_ATTR_NODEV, Attr::MOUNT_ATTR_NOEXEC]);
const QUIET_RO: Attr = attributes(&[QUIET, Attr::MOUNT_ATTR_RDONLY]);

/// In this order: what comes later may lie in what comes before.
const NEW: [New; 6] = [
    New { at: "proc", kind: "proc", options: &[], attributes: QUIET, required: true },
    New { at: "sys", kind: "sysfs", options: &[], attributes: QUIET_RO, required: true },
    New {
        at: "dev",
        kind: "tmpfs",
        options: &[("mode", "0755"), ("size", "4m"), ("nr_inodes", "4096")],
        attributes: Attr::MOUNT_ATTR_NOSUID,
        required: true,
    },
    New {
        at: "dev/pts",
        kind: "devpts",
        options: &[("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")],
        attributes: attributes(&[Attr::MOUNT_ATTR_NOSUID, Attr::MOUNT_ATTR_NOEXEC]),
        required: true,
    },
    New {
        at: "dev/shm",
        kind: "tmpfs",
        options: &[("mode", "1777"), ("size", "64m")],
        attributes: QUIET,
        required: true,
    },
    New { at: "dev/mqueue", kind: "mqueue", options: &[], attributes: QUIET, required: false },
];

/// What a whole system expects besides.
const SYSTEM_RUN: New = New {
    at: "run",
    kind: "tmpfs",
    options: &[("mode", "0755")],
    attributes: attributes(&[Attr::MOUNT_ATTR_NOSUID, Attr::MOUNT_ATTR_NODEV]),
    required: true,
};

/// Character devices in /dev, by major and minor number (Documentation/admin-guide/devices.txt).
const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const DEVICE_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Nothing can be read there: containerd's list, and what tells of the node's boot and interrupts.
const MASKED: [&str; 14] = [
    "proc/acpi",
    "proc/asound",
    "proc/cmdline",
    "proc/interrupts",
    "proc/kcore",
    "proc/keys",
    "proc/latency_stats",
    "proc/sched_debug",
    "proc/scsi",
    "proc/timer_list",
    "proc/timer_stats",
    "sys/devices/virtual/powercap",
    "sys/firmware",
    "sys/kernel/security",
];
/// Nothing can be written there: containerd's list.
const READ_ONLY: [&str; 5] = ["proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger"];

/// Files of the node that stand over the image's, read-only.
const NODE_FILES: [&str; 3] = ["resolv.conf", "hosts", "hostname"];
const SYSTEM_FILES: [&str; 1] = ["machine-id"];

/// Builds the view and makes it the process's root; `dir` is the container's directory on the node. The node's file systems are out of reach afterwards.
///
/// # Errors
/// The step that failed, or what in the image cannot be used.
pub(super) fn enter(spec: &Spec, dir: &Path, in_cgroup: bool) -> Result<(), InitError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(step("make the mounts private"))?;
    let tree = Tree { root: own_root(spec)? };
    let system = spec.profile == Profile::System;
    for new in NEW.iter().chain(system.then_some(&SYSTEM_RUN)) {
        if new.at == "dev/pts" {
            tree.fill_dev()?;
        }
        tree.mount_new(new)?;
    }
    if in_cgroup {
        let attributes = if system { QUIET } else { QUIET_RO };
        let cgroup =
            New { at: "sys/fs/cgroup", kind: "cgroup2", options: &[], attributes, required: true };
        tree.mount_new(&cgroup)?;
    }
    for name in NODE_FILES.iter().chain(SYSTEM_FILES.iter().filter(|_| system)) {
        tree.bind_node_file(name)?;
    }
    if system {
        tree.bind_modules()?;
    }
    if spec.notify {
        tree.bind_inbox(&dir.join(NOTIFY_FILE))?;
    }
    for path in READ_ONLY {
        tree.make_read_only(path)?;
    }
    for path in MASKED {
        tree.mask(path)?;
    }
    pivot(&tree.root)
}

/// A copy of the root's mount, laid over it: pivot_root(2) wants a mount, and its attributes are ours alone.
fn own_root(spec: &Spec) -> Result<OwnedFd, InitError> {
    let failed = || format!("mount the root {}", spec.root.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let root = open_tree(CWD, &spec.root, flags).map_err(step(failed()))?;
    if spec.profile == Profile::Service {
        let attributes = Attr::MOUNT_ATTR_NOSUID | Attr::MOUNT_ATTR_NODEV;
        mount_setattr(&root, attributes.bits().into(), true)
            .map_err(step::<io::Error>(failed()))?;
    }
    move_mount(&root, "", CWD, &spec.root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(step(failed()))?;
    Ok(root)
}

fn pivot(root: &OwnedFd) -> Result<(), InitError> {
    rustix::process::fchdir(root).map_err(step("enter the root"))?;
    rustix::process::pivot_root(".", ".").map_err(step("pivot_root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("detach the node's root"))?;
    rustix::process::chdir("/").map_err(step("enter the root"))
}

/// The image's root and what is done in it.
struct Tree {
    root: OwnedFd,
}

impl Tree {
    fn open(&self, path: &str, flags: OFlags, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
        let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.root, path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// A directory without any symbolic link on the way, made when missing. An image whose /proc or /dev is a link would have
    /// us mount, and later mask, somewhere else.
    fn real_dir(&self, path: &str) -> Result<OwnedFd, InitError> {
        let open = || self.open(path, OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS);
        let opened = match open() {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&self.root, path, Mode::from_raw_mode(0o755))
                    .map_err(step(format!("make /{path} in the image")))?;
                open()
            }
            opened => opened,
        };
        opened.map_err(|error| match error {
            Errno::LOOP | Errno::NOTDIR => InitError::Image {
                path: format!("/{path}"),
                problem: "must be a directory, not a symbolic link or a file",
            },
            error => step(format!("open /{path} in the image"))(error),
        })
    }

    fn mount_new(&self, new: &New) -> Result<(), InitError> {
        let target = self.real_dir(new.at)?;
        let mount = match new_mount(new) {
            Err(Errno::NODEV) if !new.required => return Ok(()),
            mount => mount.map_err(step(format!("mount /{}", new.at)))?,
        };
        attach(&mount, &target).map_err(step(format!("mount /{}", new.at)))
    }

    fn fill_dev(&self) -> Result<(), InitError> {
        let dev = self.real_dir("dev")?;
        for (name, major, minor) in DEVICES {
            let device = rustix::fs::makedev(major, minor);
            let mode = Mode::from_raw_mode(0o666);
            rustix::fs::mknodat(&dev, name, FileType::CharacterDevice, mode, device)
                .map_err(step(format!("make /dev/{name}")))?;
        }
        for (name, target) in DEVICE_LINKS {
            rustix::fs::symlinkat(target, &dev, name).map_err(step(format!("make /dev/{name}")))?;
        }
        Ok(())
    }

    /// Lays a file of the node's /etc over the image's. What the image has there as a link is replaced by a file.
    fn bind_node_file(&self, name: &str) -> Result<(), InitError> {
        let failed = || format!("bind the node's /etc/{name}");
        let mount = match clone_tree(CWD, &format!("/etc/{name}")) {
            Err(Errno::NOENT) => return Ok(()),
            mount => mount.map_err(step(failed()))?,
        };
        mount_setattr(&mount, QUIET_RO.bits().into(), false)
            .map_err(step::<io::Error>(failed()))?;
        let etc = match self.open("etc", OFlags::DIRECTORY, ResolveFlags::empty()) {
            Err(Errno::NOENT) => self.real_dir("etc")?,
            etc => etc.map_err(step("open /etc in the image"))?,
        };
        let create = |flags| {
            let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            rustix::fs::openat(&etc, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        };
        match rustix::fs::statat(&etc, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => create(OFlags::WRONLY).map_err(step(failed()))?,
            stat => match FileType::from_raw_mode(stat.map_err(step(failed()))?.st_mode) {
                FileType::RegularFile => {}
                FileType::Symlink => {
                    rustix::fs::unlinkat(&etc, name, AtFlags::empty()).map_err(step(failed()))?;
                    create(OFlags::WRONLY).map_err(step(failed()))?;
                }
                _ => {
                    let problem = "must be a file";
                    return Err(InitError::Image { path: format!("/etc/{name}"), problem });
                }
            },
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let target =
            rustix::fs::openat(&etc, name, flags, Mode::empty()).map_err(step(failed()))?;
        attach(&mount, &target).map_err(step(failed()))
    }

    /// Lays the monitor's socket for sd_notify(3) into /dev, which is the container's own.
    fn bind_inbox(&self, inbox: &Path) -> Result<(), InitError> {
        let failed = || format!("bind {} at /dev/{INBOX_NAME}", inbox.display());
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = open_tree(CWD, inbox, flags).map_err(step(failed()))?;
        let dev = self.real_dir("dev")?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let target = rustix::fs::openat(&dev, INBOX_NAME, flags, Mode::from_raw_mode(0o600));
        attach(&mount, &target.map_err(step(failed()))?).map_err(step(failed()))
    }

    /// The kernel's modules belong to the kernel, which is Layer0's: a whole system may load them.
    fn bind_modules(&self) -> Result<(), InitError> {
        let failed = || "bind the node's /lib/modules";
        let mount = match clone_tree(CWD, "/lib/modules") {
            Err(Errno::NOENT) => return Ok(()),
            mount => mount.map_err(step(failed()))?,
        };
        mount_setattr(&mount, QUIET_RO.bits().into(), true).map_err(step::<io::Error>(failed()))?;
        let lib = match self.open("lib", OFlags::DIRECTORY, ResolveFlags::empty()) {
            Err(Errno::NOENT) => self.real_dir("lib")?,
            lib => lib.map_err(step("open /lib in the image"))?,
        };
        match rustix::fs::mkdirat(&lib, "modules", Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(step(failed())(error)),
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let target =
            rustix::fs::openat(&lib, "modules", flags, Mode::empty()).map_err(step(failed()))?;
        attach(&mount, &target).map_err(step(failed()))
    }

    fn make_read_only(&self, path: &str) -> Result<(), InitError> {
        let failed = || format!("make /{path} read-only");
        let target = match self.open(path, OFlags::empty(), ResolveFlags::NO_SYMLINKS) {
            Err(Errno::NOENT) => return Ok(()),
            target => target.map_err(step(failed()))?,
        };
        let mount = clone_tree(&target, "").map_err(step(failed()))?;
        mount_setattr(&mount, Attr::MOUNT_ATTR_RDONLY.bits().into(), true).map_err(step::<
            io::Error,
        >(
            failed()
        ))?;
        attach(&mount, &target).map_err(step(failed()))
    }

    /// An empty read-only directory over a directory, /dev/null over a file.
    fn mask(&self, path: &str) -> Result<(), InitError> {
        let failed = || format!("mask /{path}");
        let target = match self.open(path, OFlags::empty(), ResolveFlags::NO_SYMLINKS) {
            Err(Errno::NOENT) => return Ok(()),
            target => target.map_err(step(failed()))?,
        };
        let stat = rustix::fs::fstat(&target).map_err(step(failed()))?;
        let mount = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let options = &[("mode", "0555"), ("size", "4k"), ("nr_inodes", "1")];
            let kind = "tmpfs";
            new_mount(&New { at: "", kind, options, attributes: QUIET_RO, required: true })
        } else {
            self.null().and_then(|null| clone_tree(&null, ""))
        };
        attach(&mount.map_err(step(failed()))?, &target).map_err(step(failed()))
    }

    /// Our own /dev/null, looked at again: a mask must not be anything else (CVE-2025-31133).
    fn null(&self) -> Result<OwnedFd, Errno> {
        let null = self.open("dev/null", OFlags::empty(), ResolveFlags::NO_SYMLINKS)?;
        let stat = rustix::fs::fstat(&null)?;
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        let is_null = is_device && stat.st_rdev == rustix::fs::makedev(1, 3);
        if is_null { Ok(null) } else { Err(Errno::NODEV) }
    }
}

fn new_mount(new: &New) -> Result<OwnedFd, Errno> {
    let fs = fsopen(new.kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", new.kind)?;
    for (key, value) in new.options {
        fsconfig_set_string(&fs, *key, *value)?;
    }
    fsconfig_create(&fs)?;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, new.attributes)
}

/// A detached copy of the mount at a path, or at the descriptor itself when the path is empty.
fn clone_tree(at: impl AsFd, path: &str) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    if path.is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    open_tree(at, path, flags)
}

fn attach(mount: &OwnedFd, target: &OwnedFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}
