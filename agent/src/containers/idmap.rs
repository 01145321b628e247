//! User ids of containers with a user namespace: the maps of the namespace, and mounts whose owners are seen through them.
//!
//! Which range a container has is decided in [`super::view`]; which mounts are mapped, by whoever makes them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::view::ID_RANGE;
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
