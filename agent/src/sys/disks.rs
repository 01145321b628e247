//! Letting go of disks at the end of a machine: swap, loop devices, device mappings. Unsafe for swapoff(2) and ioctl(2).
//!
//! All of them, whoever made them: nobody is left who could use one. See [`crate::init::settle`].
#![allow(unsafe_code)]

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::{fs, io};

use nix::errno::Errno;
use nix::libc;

/// Ends swapping to this file or device.
///
/// # Errors
/// What swapoff(2) says.
pub fn swap_off(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a C string that lives through the call.
    Errno::result(unsafe { libc::swapoff(path.as_ptr()) })?;
    Ok(())
}

/// `struct dm_ioctl` (linux/dm-ioctl.h) without data behind it.
#[repr(C)]
#[derive(Debug)]
pub struct Request {
    version: [u32; 3],
    size: u32,
    start: u32,
    rest: [u8; 292],
}

nix::ioctl_readwrite! {
    /// DM_REMOVE_ALL.
    remove_all, 0xfd, 1, Request
}

/// Removes every device mapping that nobody has open; gives how many files that let go of.
pub fn remove_mappings() -> usize {
    use std::os::fd::AsRawFd;
    let count = || fs::read_dir("/dev/mapper").map_or(0, Iterator::count);
    let before = count();
    let Ok(control) = fs::File::options().read(true).write(true).open("/dev/mapper/control") else {
        return 0;
    };
    const SIZE: u32 = 312;
    let mut request = Request { version: [4, 0, 0], size: SIZE, start: SIZE, rest: [0; 292] };
    // SAFETY: the request reads and writes a dm_ioctl of the size that it names, which `request` is.
    if let Err(error) = unsafe { remove_all(control.as_raw_fd(), &raw mut request) } {
        log::debug!("device mappings stay: {error}");
    }
    before.saturating_sub(count())
}

/// Takes the files away from loop devices that nobody uses; gives how many that were.
pub fn detach_loops() -> usize {
    let Ok(entries) = fs::read_dir("/sys/block") else { return 0 };
    let used = entries.flatten().filter(|entry| entry.path().join("loop").is_dir());
    used.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("loop")?.parse().ok())
        .filter(|number| super::loop_device::clear(*number).is_ok())
        .count()
}

const _: () = assert!(size_of::<Request>() == 312);
