//! The container's view of the files: its root, its own /proc, /sys and /dev, the node's /etc files, and of the node only what
//! its description names.
//!
//! Every path in the image is opened inside the image's root (openat2(2), RESOLVE_IN_ROOT) and mounted on by descriptor, so a
//! symbolic link in an image cannot lead out of it, nor make us mount somewhere else. Rooms: `dev` has devices, `hide` what
//! is masked, `node` the node's own files, `own` what the description asks for.

mod dev;
mod hide;
mod node;
mod own;

use std::os::fd::{AsFd, OwnedFd};

use protocol::imageset::Profile;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags as Attr, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};

use super::notify::INBOX_NAME;
use super::{Inherited, InitError, step};
use crate::containers::Spec;
use crate::containers::view::keeps_setuid;
use crate::sys::process::mount_setattr;

/// A file system that is mounted anew.
struct New<'a> {
    at: &'a str,
    kind: &'a str,
    options: &'a [(&'a str, &'a str)],
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
const NO_SUID_DEV: Attr = attributes(&[Attr::MOUNT_ATTR_NOSUID, Attr::MOUNT_ATTR_NODEV]);

const PROC: New<'_> =
    New { at: "proc", kind: "proc", options: &[], attributes: QUIET, required: true };

/// In memory for a whole system; for systemd all of it (systemd.io/CONTAINER_INTERFACE).
const SYSTEM: [New<'_>; 3] = [
    New {
        at: "run",
        kind: "tmpfs",
        options: &[("mode", "0755")],
        attributes: NO_SUID_DEV,
        required: true,
    },
    New {
        at: "run/lock",
        kind: "tmpfs",
        options: &[("mode", "1777"), ("size", "16m")],
        attributes: QUIET,
        required: true,
    },
    New {
        at: "tmp",
        kind: "tmpfs",
        options: &[("mode", "1777")],
        attributes: NO_SUID_DEV,
        required: true,
    },
];

/// Builds the view and makes it the process's root. The node's file systems are out of reach afterwards.
///
/// # Errors
/// The step that failed, or what in the image cannot be used.
pub(super) fn enter(spec: &Spec, in_cgroup: bool, given: &Inherited) -> Result<(), InitError> {
    let view = &spec.view;
    // Before anything is private: what travels must be taken from a mount that still shares.
    let travelling = own::take_travelling(view)?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(step("make the mounts private"))?;
    let taken = own::take(view, travelling)?;
    let devices = dev::take(view)?;
    let sys = sysfs(spec)?;
    let tree = Tree { root: own_root(spec, given)? };
    tree.mount_new(&PROC)?;
    let at = tree.real_dir("sys")?;
    attach(&sys, &at).map_err(step("mount /sys"))?;
    tree.fill_dev(view, devices, given)?;
    let system = spec.profile == Profile::System;
    let memory = SYSTEM.iter().take(if view.systemd { 3 } else { usize::from(system) });
    for new in memory.filter(|new| !view.has_target(&format!("/{}", new.at))) {
        tree.mount_new(new)?;
    }
    if in_cgroup {
        let writable = system || view.privileged;
        let attributes = if writable { QUIET } else { QUIET_RO };
        let at = "sys/fs/cgroup";
        let new = New { at, kind: "cgroup2", options: &[], attributes, required: true };
        tree.mount_new(&new)?;
    }
    tree.bind_node_files(spec)?;
    if system && !view.has_target("/lib/modules") {
        tree.bind_modules()?;
    }
    if spec.notify {
        tree.attach_inbox(given)?;
    }
    tree.set_sysctls(view)?;
    if !view.privileged {
        tree.hide()?;
    }
    tree.mount_own(view, taken, given)?;
    tree.place_files(spec, given)?;
    pivot(&tree.root)
}

/// A new /sys of the container's network namespace. Where that is the node's and the container has a user namespace, the
/// kernel gives none, and it sees the node's (user_namespaces(7)).
fn sysfs(spec: &Spec) -> Result<OwnedFd, InitError> {
    let attributes = if spec.view.privileged { QUIET } else { QUIET_RO };
    let new = New { at: "sys", kind: "sysfs", options: &[], attributes, required: true };
    match new_mount(&new) {
        Err(Errno::PERM) if spec.view.id_base.is_some() => {
            let mount = clone_tree(CWD, "/sys", true).map_err(step("bind /sys"))?;
            mount_setattr(&mount, QUIET_RO.bits().into(), true)
                .map_err(step::<std::io::Error>("bind /sys"))?;
            Ok(mount)
        }
        mount => mount.map_err(step("mount /sys")),
    }
}

/// A copy of the root's mount, laid over it: pivot_root(2) wants a mount, and its attributes are ours alone. In a user
/// namespace the monitor gave it, and it is laid where the process can get at.
fn own_root(spec: &Spec, given: &Inherited) -> Result<OwnedFd, InitError> {
    let failed = || format!("mount the root {}", spec.root.display());
    let (root, at) = match &given.root {
        Some(root) => {
            let root = rustix::io::fcntl_dupfd_cloexec(root, 3).map_err(step(failed()))?;
            (root, std::path::Path::new("/sys"))
        }
        None => {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE;
            let root = open_tree(CWD, &spec.root, flags).map_err(step(failed()))?;
            (root, spec.root.as_path())
        }
    };
    if !keeps_setuid(spec.profile, &spec.view) {
        mount_setattr(&root, NO_SUID_DEV.bits().into(), true)
            .map_err(step::<std::io::Error>(failed()))?;
    }
    move_mount(&root, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
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

    fn mount_new(&self, new: &New<'_>) -> Result<(), InitError> {
        let target = self.real_dir(new.at)?;
        let mount = match new_mount(new) {
            Err(Errno::NODEV) if !new.required => return Ok(()),
            mount => mount.map_err(step(format!("mount /{}", new.at)))?,
        };
        attach(&mount, &target).map_err(step(format!("mount /{}", new.at)))
    }

    /// Lays the monitor's socket for sd_notify(3) into /dev, which is the container's own.
    fn attach_inbox(&self, given: &Inherited) -> Result<(), InitError> {
        let failed = || format!("mount /dev/{INBOX_NAME}");
        let dev = self.real_dir("dev")?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let target = rustix::fs::openat(&dev, INBOX_NAME, flags, Mode::from_raw_mode(0o600));
        attach(&given.inbox, &target.map_err(step(failed()))?).map_err(step(failed()))
    }
}

fn new_mount(new: &New<'_>) -> Result<OwnedFd, Errno> {
    let fs = fsopen(new.kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", new.kind)?;
    for (key, value) in new.options {
        fsconfig_set_string(&fs, *key, *value)?;
    }
    fsconfig_create(&fs)?;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, new.attributes)
}

/// A detached copy of the mount at a path, or at the descriptor itself when the path is empty.
fn clone_tree(at: impl AsFd, path: &str, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    if path.is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    open_tree(at, path, flags)
}

fn attach(mount: &OwnedFd, target: &OwnedFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}
