//! swapon(2), which neither nix nor rustix has.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;

use nix::libc;

/// Flag of swapon(2): the low bits are the priority.
const PREFER: libc::c_int = 0x8000;

/// Swaps to this device, which has a swap signature, before others of lower priority (0 to 32767).
///
/// # Errors
/// What swapon(2) says: EINVAL where there is no signature, ENOSYS on a kernel without swap.
pub fn swap_on(device: &CStr, priority: u16) -> io::Result<()> {
    let flags = PREFER | libc::c_int::from(priority & 0x7fff);
    // SAFETY: the pointer is to a live string with its NUL, which the call only reads.
    let result = unsafe { libc::swapon(device.as_ptr(), flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
