//! Finds the disk with the cache's label among the block devices and mounts it. Looks and mounts; what a superblock says
//! stands in [`super::superblock`].

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use super::superblock::{LOOKED_AT, Superblock, recognise};
use crate::identity;
use crate::modules::load::Loader;

/// Where the kernel lists block devices, partitions included.
const BLOCK_DEVICES: &str = "/sys/class/block";
/// Devices that hold no cache: in memory, in files, or removable media that must be spun up to be read.
const SKIPPED: [&str; 6] = ["ram", "loop", "zram", "sr", "fd", "nbd"];

/// A disk that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// Its device, `/dev/vda1`.
    pub(super) device: PathBuf,
    /// The kernel's name of its file system.
    pub(super) kind: &'static str,
}

/// The disk with this label; of several the first by name, which the log says.
pub(super) fn find(label: &str) -> Option<Disk> {
    let mut names: Vec<String> = fs::read_dir(BLOCK_DEVICES)
        .map(|entries| {
            entries.flatten().filter_map(|it| it.file_name().into_string().ok()).collect()
        })
        .unwrap_or_default();
    names.retain(|name| !SKIPPED.iter().any(|prefix| name.starts_with(prefix)));
    names.sort();
    let mut found: Option<Disk> = None;
    for name in names {
        // A slash in a device's name is an exclamation mark here.
        let device = Path::new("/dev").join(name.replace('!', "/"));
        match look(&device) {
            Ok(Some(block)) if block.label == label => match &found {
                None => found = Some(Disk { device, kind: block.kind }),
                Some(first) => log::warn!(
                    "cache: {} has the label {label}, too; {} is used",
                    device.display(),
                    first.device.display()
                ),
            },
            Ok(_) => {}
            Err(error) => log::debug!("cache: {}: {error}", device.display()),
        }
    }
    found
}

fn look(device: &Path) -> io::Result<Option<Superblock>> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = File::options().read(true).custom_flags(flags).open(device)?;
    let mut bytes = Vec::new();
    file.take(LOOKED_AT as u64).read_to_end(&mut bytes)?;
    Ok(recognise(&bytes))
}

/// Mounts a disk, read-only where it cannot be written.
///
/// # Errors
/// A sentence, with what the kernel says.
pub(super) fn mount_at(disk: &Disk, place: &Path) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| {
        format!("cannot {what} {} ({}): {error}", disk.device.display(), disk.kind)
    };
    fs::create_dir_all(place).map_err(|error| failed("make a place for", error))?;
    // The kernel's own helper for this is not in Layer0. Whether it worked shows by what comes next.
    let loaded = Loader::open(&identity::release()).and_then(|mut it| it.load(disk.kind));
    if let Err(error) = loaded {
        log::debug!("module {}: {error}", disk.kind);
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    // A damaged disk may ask for a panic by itself.
    let data: Option<&CStr> = (disk.kind == "ext4").then_some(c"errors=remount-ro");
    let attempt = |flags| mount(&disk.device, place, disk.kind, flags, data);
    match attempt(flags) {
        Err(Errno::ROFS | Errno::ACCESS) => attempt(flags | MountFlags::RDONLY),
        mounted => mounted,
    }
    .map_err(|errno| failed("mount", errno.into()))
}

/// What is mounted at a place already, by an earlier agent (`/proc/self/mountinfo`, proc(5)).
pub(super) fn mounted_at(place: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    source_of(&text, place.to_str()?)
}

fn source_of(mountinfo: &str, place: &str) -> Option<PathBuf> {
    let line = mountinfo.lines().find(|line| line.split(' ').nth(4) == Some(place))?;
    let (_, behind) = line.split_once(" - ")?;
    behind.split(' ').nth(1).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_of_a_mount_is_read() {
        let text = "30 1 0:26 / /run/layercake rw - tmpfs tmpfs rw\n\
                    31 30 254:0 / /run/layercake/cache rw,nosuid shared:7 - ext4 /dev/vda rw\nbad\n";
        assert_eq!(source_of(text, "/run/layercake/cache"), Some(PathBuf::from("/dev/vda")));
        assert_eq!(source_of(text, "/run"), None);
    }

    #[test]
    fn no_disk_has_a_label_that_nobody_gave() {
        assert_eq!(find("no-such-label-16"), None);
    }
}
