//! Slewing the clock: adjtime(3), which neither rustix nor nix has.
//!
//! Unsafe because it is a call of the C library.
#![allow(unsafe_code)]

use std::io;

use nix::libc;

/// Lets the kernel bring `CLOCK_REALTIME` these microseconds ahead, or back, at 500 parts per million; it replaces what is left of
/// an earlier wish.
///
/// # Errors
/// What the call says: `EPERM`, or `EINVAL` for more than some 2000 seconds.
pub fn adjust(microseconds: i64) -> io::Result<()> {
    let delta = libc::timeval {
        tv_sec: microseconds.div_euclid(1_000_000),
        tv_usec: microseconds.rem_euclid(1_000_000),
    };
    // SAFETY: the first argument points to a timeval that lives until the call returns and is only read; the second may be null.
    match unsafe { libc::adjtime(&raw const delta, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
