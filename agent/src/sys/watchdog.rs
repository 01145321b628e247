//! The watchdog's devices and requests (Documentation/watchdog/watchdog-api.rst). Unsafe for ioctl(2). Allocates
//! nothing.
//!
//! When to feed it is decided in [`crate::init::resident::watchdog`].
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc::c_int;
use rustix::fs::{Mode, OFlags};

use crate::logging::Line;

nix::ioctl_readwrite! {
    /// WDIOC_SETTIMEOUT.
    set_timeout_request, b'W', 6, c_int
}
nix::ioctl_read! {
    /// WDIOC_KEEPALIVE.
    keep_alive_request, b'W', 5, c_int
}

/// Asks for a timeout in seconds; gives the one that the device took.
///
/// # Errors
/// EINVAL for a timeout that it does not have, EOPNOTSUPP where it has but one.
pub fn set_timeout(watchdog: &OwnedFd, seconds: u32) -> nix::Result<u32> {
    let mut value = c_int::try_from(seconds).map_err(|_| nix::errno::Errno::EINVAL)?;
    // SAFETY: the request reads and writes one int, which `value` is.
    unsafe { set_timeout_request(watchdog.as_raw_fd(), &raw mut value) }?;
    u32::try_from(value).map_err(|_| nix::errno::Errno::EINVAL)
}

/// Begins the timeout anew.
///
/// # Errors
/// What the device says.
pub fn keep_alive(watchdog: &OwnedFd) -> nix::Result<()> {
    let mut value = 0;
    // SAFETY: the request writes one int at most, which `value` is.
    unsafe { keep_alive_request(watchdog.as_raw_fd(), &raw mut value) }.map(drop)
}

/// Opens, and so starts, the first device that is hardware, else the first at all (the kernel's own software watchdog).
#[must_use]
pub fn find() -> Option<(OwnedFd, u32)> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let open = |path: std::fmt::Arguments<'_>, flags| {
        rustix::fs::open(Line::of(path).ended(0).as_c_str(), flags, Mode::empty()).ok()
    };
    let software = |index: u32| {
        let mut text = [0_u8; 8];
        let file = format_args!("/sys/class/watchdog/watchdog{index}/identity");
        let read = open(file, OFlags::RDONLY | OFlags::CLOEXEC)
            .and_then(|fd| rustix::io::read(&fd, &mut text).ok());
        read.is_some() && text == *b"Software"
    };
    let mut indices = [0, 1, 2, 3];
    indices.sort_unstable_by_key(|index| (software(*index), *index));
    indices
        .into_iter()
        .find_map(|index| Some((open(format_args!("/dev/watchdog{index}"), flags)?, index)))
}
