//! The last child of PID 1: lets file systems and disks go and writes back what is not written, so that nothing is torn.
//!
//! It is a process of its own because each of these can hang in the kernel: PID 1 waits for it no longer than its limit. What
//! cannot hang comes first: network file systems are detached, without a word to their servers.

use std::fs;
use std::path::Path;

use rustix::mount::UnmountFlags;

use super::early::unescape;
use crate::sys;

/// File systems that wait for somebody else.
const REMOTE: [&str; 8] = ["nfs", "nfs4", "ceph", "cifs", "smb3", "9p", "lustre", "fuse"];
/// Rounds of unmounting: what lies below goes first, and what was busy with it then.
const ROUNDS: u32 = 4;

/// Does all of it. Nothing is waited for but the kernel.
pub fn run() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for (point, _) in to_unmount(&mounts()).into_iter().filter(|(_, remote)| *remote) {
        unmount(&point, UnmountFlags::FORCE | UnmountFlags::DETACH);
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for swap in swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()) {
        if let Err(error) = sys::disks::swap_off(Path::new(&unescape(swap))) {
            log::warn!("swap {swap} stays: {error}");
        }
    }
    for _ in 0..ROUNDS {
        let points = to_unmount(&mounts());
        let done = points.iter().filter(|(point, _)| unmount(point, UnmountFlags::empty())).count();
        // Loop devices hold files of file systems, device mappings hold loop devices.
        if done + sys::disks::remove_mappings() + sys::disks::detach_loops() == 0 {
            break;
        }
    }
    for (point, _) in to_unmount(&mounts()) {
        log::warn!("{point} is still in use: it is left behind");
        unmount(&point, UnmountFlags::DETACH);
    }
    rustix::fs::sync();
}

fn unmount(point: &str, flags: UnmountFlags) -> bool {
    let done = rustix::mount::unmount(point, flags | UnmountFlags::NOFOLLOW);
    if let Err(error) = done {
        log::debug!("unmount {point}: {error}");
    }
    done.is_ok()
}

/// Mount points in the order of unmounting, last mounted first, without the kernel's own; and whether somebody else is
/// needed for it (proc(5), `/proc/PID/mountinfo`).
fn to_unmount(mountinfo: &str) -> Vec<(String, bool)> {
    let kernels = |point: &str| {
        let below = |own| Path::new(point).starts_with(own);
        point == "/" || ["/proc", "/sys", "/dev"].iter().any(below)
    };
    let mut points: Vec<_> = mountinfo
        .lines()
        .filter_map(|line| {
            let (head, tail) = line.split_once(" - ")?;
            let point = unescape(head.split(' ').nth(4)?);
            let kind = tail.split(' ').next()?.split('.').next()?;
            (!kernels(&point)).then(|| (point, REMOTE.contains(&kind)))
        })
        .collect();
    points.reverse();
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmounting_goes_backwards_and_leaves_the_kernels_own() {
        let line = |(point, kind): &(&str, &str)| {
            format!("1 1 0:1 / {point} rw,relatime shared:1 - {kind} t rw\n")
        };
        let mounts = [
            ("/", "rootfs"),
            ("/proc", "proc"),
            ("/dev/pts", "devpts"),
            ("/run", "tmpfs"),
            ("/run/layercake", "tmpfs"),
            ("/sys/fs/cgroup", "cgroup2"),
            ("/data\\0401", "ext4"),
            ("/home", "nfs4"),
            ("/mnt", "fuse.sshfs"),
        ];
        let text: String = mounts.iter().map(line).collect();
        let expected = [
            ("/mnt", true),
            ("/home", true),
            ("/data 1", false),
            ("/run/layercake", false),
            ("/run", false),
        ];
        let found = to_unmount(&(text + "broken\n1 2 3 - x\n"));
        let found: Vec<_> = found.iter().map(|(point, remote)| (point.as_str(), *remote)).collect();
        assert_eq!(found, expected);
    }
}
