//! What of /proc and /sys a container must not read or write.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags as Attr;

use super::{New, QUIET_RO, Tree, attach, clone_tree, new_mount};
use crate::container_init::{InitError, step};
use crate::sys::process::mount_setattr;

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

impl Tree {
    /// Hides it.
    pub(super) fn hide(&self) -> Result<(), InitError> {
        READ_ONLY.iter().try_for_each(|path| self.make_read_only(path))?;
        MASKED.iter().try_for_each(|path| self.mask(path))
    }

    fn make_read_only(&self, path: &str) -> Result<(), InitError> {
        let failed = || format!("make /{path} read-only");
        let target = match self.open(path, OFlags::empty(), ResolveFlags::NO_SYMLINKS) {
            Err(Errno::NOENT) => return Ok(()),
            target => target.map_err(step(failed()))?,
        };
        let mount = clone_tree(&target, "", true).map_err(step(failed()))?;
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
            self.null().and_then(|null| clone_tree(&null, "", false))
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
