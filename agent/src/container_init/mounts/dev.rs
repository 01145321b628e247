//! /dev: a memory file system of the container's own with the devices that every program expects, and those that its
//! description names.
//!
//! Devices are made by mknod(2), or bound from the node's /dev: those that are named, and all of them in a user namespace,
//! where none can be made.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags as Attr;

use super::{New, QUIET, Tree, attach, attributes, clone_tree};
use crate::container_init::{Inherited, InitError, step};
use crate::containers::View;

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
/// /dev/shm of a container that does not say otherwise, in bytes: as Docker and podman.
const SHM_SIZE: u64 = 64 << 20;

/// Devices of the node that a container will see: detached mounts by their paths.
pub(super) type Devices = Vec<(String, OwnedFd)>;

/// Takes hold of every device that the description names, while the node's /dev can still be reached.
///
/// # Errors
/// One that is not there, or is no device.
pub(super) fn take(view: &View) -> Result<Devices, InitError> {
    let mut taken = Devices::new();
    for device in &view.devices {
        let found = matching(&device.path);
        if found.is_empty() && !device.optional {
            let missing = Errno::NOENT;
            return Err(step(format!("device {}", device.path))(missing));
        }
        for path in found {
            let failed = || format!("device {path}");
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let opened = openat2(CWD, &path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
                .map_err(step(failed()))?;
            let stat = rustix::fs::fstat(&opened).map_err(step(failed()))?;
            use FileType::{BlockDevice, CharacterDevice, Directory};
            if !matches!(
                FileType::from_raw_mode(stat.st_mode),
                BlockDevice | CharacterDevice | Directory
            ) {
                return Err(step(failed())(Errno::NODEV));
            }
            let mount = clone_tree(&opened, "", true).map_err(step(failed()))?;
            taken.push((path, mount));
        }
    }
    if view.id_base.is_some() {
        for (name, _, _) in DEVICES {
            let mount = clone_tree(CWD, &format!("/dev/{name}"), false)
                .map_err(step(format!("device /dev/{name}")))?;
            taken.push((format!("/dev/{name}"), mount));
        }
    }
    Ok(taken)
}

/// The node's paths that a device's path stands for: itself, or with `*` in its last name every one that fits.
fn matching(path: &str) -> Vec<String> {
    let Some((dir, pattern)) = path.rsplit_once('/').filter(|(_, name)| name.contains('*')) else {
        return Some(path.to_owned()).filter(|path| Path::new(path).exists()).into_iter().collect();
    };
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut found: Vec<String> =
        names.filter(|name| fits(pattern, name)).map(|name| format!("{dir}/{name}")).collect();
    found.sort();
    found
}

/// Whether a name fits a pattern in which `*` stands for any characters.
fn fits(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut last = None;
    for part in parts {
        if let Some(before) = last.replace(part) {
            let Some((_, after)) = rest.split_once(before) else { return false };
            rest = after;
        }
    }
    last.map_or(rest.is_empty(), |last| rest.ends_with(last))
}

impl Tree {
    /// Builds /dev.
    pub(super) fn fill_dev(
        &self,
        view: &View,
        devices: Devices,
        given: &Inherited,
    ) -> Result<(), InitError> {
        if view.privileged {
            let dev = self.real_dir("dev")?;
            let mount = clone_tree(CWD, "/dev", false).map_err(step("bind the node's /dev"))?;
            attach(&mount, &dev).map_err(step("bind the node's /dev"))?;
        } else {
            self.mount_new(&New {
                at: "dev",
                kind: "tmpfs",
                options: &[("mode", "0755"), ("size", "4m"), ("nr_inodes", "4096")],
                attributes: Attr::MOUNT_ATTR_NOSUID,
                required: true,
            })?;
            self.make_devices(view)?;
        }
        for (path, mount) in devices.into_iter().filter(|_| !view.privileged) {
            let failed = || format!("device {path}");
            let stat = rustix::fs::fstat(&mount).map_err(step(failed()))?;
            let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let target = self.target(&path, directory)?;
            attach(&mount, &target).map_err(step(failed()))?;
        }
        self.mount_in_dev(view)?;
        match given.console.as_ref().filter(|_| view.systemd) {
            Some(console) => self.bind_console(console),
            None => Ok(()),
        }
    }

    fn make_devices(&self, view: &View) -> Result<(), InitError> {
        let dev = self.real_dir("dev")?;
        for (name, major, minor) in DEVICES.into_iter().filter(|_| view.id_base.is_none()) {
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

    /// What is mounted in /dev: terminals, shared memory, queues, huge pages.
    fn mount_in_dev(&self, view: &View) -> Result<(), InitError> {
        self.mount_new(&New {
            at: "dev/pts",
            kind: "devpts",
            options: &[("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")],
            attributes: attributes(&[Attr::MOUNT_ATTR_NOSUID, Attr::MOUNT_ATTR_NOEXEC]),
            required: true,
        })?;
        let size = view.shm_size.map_or(SHM_SIZE, |size| size.0).to_string();
        self.mount_new(&New {
            at: "dev/shm",
            kind: "tmpfs",
            options: &[("mode", "1777"), ("size", size.as_str())],
            attributes: QUIET,
            required: true,
        })?;
        self.mount_new(&New {
            at: "dev/mqueue",
            kind: "mqueue",
            options: &[],
            attributes: QUIET,
            required: false,
        })?;
        let mut pages: Vec<_> = view
            .hugepages
            .keys()
            .filter_map(|page| page.parse::<protocol::imageset::ByteSize>().ok())
            .collect();
        pages.sort_by_key(|page| std::cmp::Reverse(page.0));
        for (index, page) in pages.iter().enumerate() {
            let at = match index {
                0 => "dev/hugepages".to_owned(),
                _ => format!("dev/hugepages-{page}"),
            };
            let bytes = page.0.to_string();
            let options = [("pagesize", bytes.as_str()), ("mode", "1770")];
            let new = New {
                at: &at,
                kind: "hugetlbfs",
                options: &options,
                attributes: attributes(&[Attr::MOUNT_ATTR_NOSUID, Attr::MOUNT_ATTR_NODEV]),
                required: true,
            };
            self.mount_new(&new)?;
        }
        Ok(())
    }

    /// Lays the terminal that the monitor reads over /dev/console.
    fn bind_console(&self, console: &OwnedFd) -> Result<(), InitError> {
        let failed = || "bind /dev/console";
        let path = std::fs::read_link(format!("/proc/self/fd/{}", console.as_raw_fd()))
            .map_err(step::<std::io::Error>(failed()))?;
        let mount = clone_tree(CWD, &path.to_string_lossy(), false).map_err(step(failed()))?;
        let target = self.target("/dev/console", false)?;
        attach(&mount, &target).map_err(step(failed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name, expected) in [
            ("nvidia*", "nvidia0", true),
            ("nvidia*", "nvidia", true),
            ("nvidia*", "nvme0", false),
            ("*", "x", true),
            ("tty*1", "ttyS1", true),
            ("tty*1", "ttyS10", false),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "a1c2b", false),
            ("a", "ab", false),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
    }
}
