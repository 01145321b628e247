//! Loop devices (loop(4)): a file as a read-only block device. Unsafe because rustix and nix have no such ioctls.
//!
//! A device made here is the kernel's to take away: it is marked autoclear and goes with its last user, so a process
//! that dies at any moment leaves none behind. Nothing is mounted here.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use nix::libc;

/// Where free devices are asked for.
pub const CONTROL: &str = "/dev/loop-control";
/// How often another device is asked for when somebody else took the one that was free.
const TRIES: usize = 64;

// linux/loop.h
const LOOP_CTL_GET_FREE: u64 = 0x4C82;
const LOOP_CONFIGURE: u64 = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

// The sizes that the kernel's headers give (x86_64 and aarch64 alike).
const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);

/// A loop device that is held: once it is dropped, only what mounted it keeps it.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    _device: File,
}

impl LoopDevice {
    /// The device's node, `/dev/loopN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a read-only device of this file, without a second copy in the page cache where the file system can do
    /// that (O_DIRECT).
    ///
    /// # Errors
    /// The kernel's answer: no loop driver (ENOENT, ENODEV), no right to (EACCES, EPERM), no device free.
    pub fn attach(file: &File) -> io::Result<Self> {
        let control = File::options().read(true).write(true).open(CONTROL)?;
        let mut last = io::Error::from_raw_os_error(libc::EBUSY);
        for _ in 0..TRIES {
            let number = free_device(&control)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::open(&path)?;
            // Direct I/O where it works: a kernel that minds says EINVAL.
            let flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
            let configured = match configure(&device, file, flags | LO_FLAGS_DIRECT_IO) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    configure(&device, file, flags)
                }
                done => done,
            };
            match configured {
                Ok(()) => return Ok(Self { path, _device: device }),
                // Somebody was quicker.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }
}

fn free_device(control: &File) -> io::Result<i32> {
    // SAFETY: the descriptor is open, and this request takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
    if number < 0 { Err(io::Error::last_os_error()) } else { Ok(number) }
}

fn configure(device: &File, file: &File, flags: u32) -> io::Result<()> {
    let fd = u32::try_from(file.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let info = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let config = LoopConfig { fd, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: both descriptors are open, and `config` has the layout and size of `struct loop_config`, which the kernel
    // only reads during the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
