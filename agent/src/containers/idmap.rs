//! User ids of containers with a user namespace: the maps of the namespace, and mounts whose owners are seen through them.
//!
//! Which range a container has is decided in [`super::view`]; which mounts are mapped, by whoever makes them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount, mount_change,
    move_mount, open_tree,
};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::view::ID_RANGE;
use crate::mounts::MountError;
use crate::sys::process::{mount_idmap, pidfd_send_signal, spawn_idle_in_user_namespace};

/// Writes the maps of a process's new user namespace: its ids from 0 are the node's from `base` on.
///
/// # Errors
/// The kernel's error; EPERM once they are written.
pub fn write_maps(pid: u32, base: u32) -> io::Result<()> {
    for map in ["gid_map", "uid_map"] {
        fs::write(format!("/proc/{pid}/{map}"), format!("0 {base} {ID_RANGE}\n"))?;
    }
    Ok(())
}

/// Lets a detached mount's files that belong to 0 and on belong to `base` and on.
///
/// # Errors
/// The kernel's error; EINVAL where the file system cannot do that (overlay; tmpfs before Linux 6.3).
pub fn apply(mount: impl AsFd, base: u32) -> io::Result<()> {
    mount_idmap(mount, namespace(base)?.as_fd())
}

/// A user namespace with these maps that nobody lives in.
fn namespace(base: u32) -> io::Result<File> {
    let idle = spawn_idle_in_user_namespace()?;
    let made =
        write_maps(idle.pid, base).and_then(|()| File::open(format!("/proc/{}/ns/user", idle.pid)));
    pidfd_send_signal(idle.pidfd.as_fd(), nix::libc::SIGKILL)?;
    waitid(WaitId::PidFd(idle.pidfd.as_fd()), WaitIdOptions::EXITED)?;
    made
}

/// As [`crate::mounts::mount_overlay`], with the layers' owners seen through a container's maps: what belongs to 0 in the
/// image belongs to `base` on the node, and to 0 again in the container.
///
/// Overlay itself cannot be mapped, so its layers are, in a mount namespace that is gone when this returns, however it ends.
///
/// # Errors
/// [`MountError::Mapped`]. Needs Linux 6.5, and file systems that can be mapped under the layers.
pub fn mount_overlay(layers: &[PathBuf], dir: &Path, base: u32) -> Result<PathBuf, MountError> {
    let fail = |source: io::Error| MountError::Mapped { layers: layers.len(), base, source };
    let root = dir.join("root");
    for name in ["upper", "work", "root", "layers"] {
        fs::create_dir_all(dir.join(name)).map_err(fail)?;
    }
    // Only this directory is closed: the container's root user walks through none of it.
    rustix::fs::chmod(dir, rustix::fs::Mode::from_raw_mode(0o700)).map_err(|e| fail(e.into()))?;
    let overlay = std::thread::scope(|scope| {
        let apart = std::thread::Builder::new().stack_size(256 << 10);
        let thread = apart.spawn_scoped(scope, || overlay_apart(layers, dir, base))?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("its thread died")))
    });
    let overlay = overlay.map_err(fail)?;
    move_mount(&overlay, "", CWD, &root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| fail(e.into()))?;
    Ok(root)
}

/// On a thread of its own, which leaves the agent's mount namespace for good.
fn overlay_apart(layers: &[PathBuf], dir: &Path, base: u32) -> io::Result<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let space = dir.join("layers");
    mount("tmpfs", &space, "tmpfs", MountFlags::empty(), None)?;
    let userns = namespace(base)?;
    let mut lowers = Vec::new();
    for (index, layer) in layers.iter().enumerate().rev() {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, layer, flags)?;
        mount_idmap(&tree, userns.as_fd())?;
        let at = space.join(index.to_string());
        fs::create_dir(&at)?;
        move_mount(&tree, "", CWD, &at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        lowers.push(at);
    }
    if lowers.is_empty() {
        let empty = space.join("empty");
        fs::create_dir(&empty)?;
        lowers.push(empty);
    }
    let upper = dir.join("upper");
    // The root of an overlay has the upper directory's owner and mode: those of the image's highest layer are meant.
    let top = rustix::fs::stat(lowers.first().ok_or(Errno::INVAL)?)?;
    std::os::unix::fs::chown(&upper, Some(top.st_uid), Some(top.st_gid))?;
    rustix::fs::chmod(&upper, rustix::fs::Mode::from_raw_mode(top.st_mode & 0o7777))?;
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "overlay")?;
    for lower in &lowers {
        fsconfig_set_string(&context, "lowerdir+", lower)?;
    }
    fsconfig_set_string(&context, "upperdir", &upper)?;
    fsconfig_set_string(&context, "workdir", dir.join("work"))?;
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}
