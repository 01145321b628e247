//! kexec_file_load(2): gives the kernel its successor, or takes it away again. Unsafe because rustix has no such call.
//!
//! Nothing is started here: that is reboot(2) with `LINUX_REBOOT_CMD_KEXEC`, which PID 1 calls once everything has ended.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;

// linux/kexec.h
const KEXEC_FILE_UNLOAD: libc::c_ulong = 1;

/// Loads a kernel and its initramfs, with this command line, in the place of what was loaded before. Both files are read whole
/// and must not be open for writing anywhere.
///
/// # Errors
/// The kernel's answer: EPERM under lockdown, with `kernel.kexec_load_disabled=1` or without CAP_SYS_BOOT; ENOSYS where it is not
/// built in; EKEYREJECTED, ENOKEY, EBADMSG where it wants another signature; ENOEXEC for what is no kernel; ETXTBSY for a file
/// that somebody may write; ENOMEM, EADDRNOTAVAIL without room. EINVAL for a command line with a zero byte or of too many bytes.
pub fn load(kernel: &File, initramfs: &File, command_line: &str) -> io::Result<()> {
    let line = CString::new(command_line)?;
    let length = line.as_bytes_with_nul().len();
    // SAFETY: both descriptors are open; `line` has `length` bytes, the last of them zero, and outlives the call, which only reads.
    let done = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            length,
            line.as_ptr(),
            0 as libc::c_ulong,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes away what was loaded, and gives its memory back. Nothing happens where nothing was.
///
/// # Errors
/// The kernel's answer, as for [`load`].
pub fn unload() -> io::Result<()> {
    // SAFETY: with this flag the kernel looks at no other argument.
    let done = unsafe {
        let none = std::ptr::null::<libc::c_char>();
        libc::syscall(libc::SYS_kexec_file_load, -1, -1, 0_usize, none, KEXEC_FILE_UNLOAD)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
