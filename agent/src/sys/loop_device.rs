//! Loop devices (loop(4)): a file as a block device. Unsafe because rustix and nix have no such ioctls.
//!
//! A [`LoopDevice`] is the kernel's to take away: it is marked autoclear and goes with its last user, so a process that dies at
//! any moment leaves none behind. What [`set_up`] makes stays until [`clear`]; its label tells a later process whose it is.
//! Nothing is mounted here.

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
const LOOP_CLR_FD: u64 = 0x4C01;
const LOOP_GET_STATUS64: u64 = 0x4C05;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_PARTSCAN: u32 = 8;
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
        // Direct I/O where it works: a kernel that minds says EINVAL.
        let flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
        let (number, device) = claim(file, &[flags | LO_FLAGS_DIRECT_IO, flags], "")?;
        Ok(Self { path: PathBuf::from(format!("/dev/loop{number}")), _device: device })
    }
}

/// How [`set_up`] makes a device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Setup<'a> {
    /// Nobody may write to it.
    pub read_only: bool,
    /// The kernel looks for partitions.
    pub partitions: bool,
    /// At most 63 bytes, for [`label`].
    pub label: &'a str,
}

/// Makes a device of this file that stays until [`clear`], and returns its number.
///
/// # Errors
/// As [`LoopDevice::attach`].
pub fn set_up(file: &File, setup: &Setup<'_>) -> io::Result<u32> {
    let read_only = if setup.read_only { LO_FLAGS_READ_ONLY } else { 0 };
    let partitions = if setup.partitions { LO_FLAGS_PARTSCAN } else { 0 };
    Ok(claim(file, &[read_only | partitions], setup.label)?.0)
}

/// Takes the file away from a device, as soon as nobody uses it any more.
///
/// # Errors
/// The kernel's answer; ENXIO when it has no file.
pub fn clear(number: u32) -> io::Result<()> {
    let device = File::open(format!("/dev/loop{number}"))?;
    // SAFETY: the descriptor is open, and this request takes no argument.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD as _) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The label of a device, or what else made it has written there.
///
/// # Errors
/// The kernel's answer; ENXIO when it has no file.
pub fn label(number: u32) -> io::Result<String> {
    let device = File::open(format!("/dev/loop{number}"))?;
    let mut info = LoopInfo::new(0, "");
    // SAFETY: the descriptor is open, and the kernel writes a `struct loop_info64`, which `info` is.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64 as _, &raw mut info) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    let text = info.file_name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Takes a free device with the first of these flags that the kernel does not mind (EINVAL).
fn claim(file: &File, flags: &[u32], label: &str) -> io::Result<(u32, File)> {
    let control = File::options().read(true).write(true).open(CONTROL)?;
    let mut last = io::Error::from_raw_os_error(libc::EBUSY);
    for _ in 0..TRIES {
        let number = free_device(&control)?;
        let path = format!("/dev/loop{number}");
        // A device is writable only if it is configured by a descriptor that is.
        let device = File::options().read(true).write(true).open(&path);
        let device = device.or_else(|_| File::open(&path))?;
        let mut configured = Err(io::Error::from_raw_os_error(libc::EINVAL));
        for flags in flags {
            configured = configure(&device, file, *flags, label);
            if !matches!(&configured, Err(error) if error.raw_os_error() == Some(libc::EINVAL)) {
                break;
            }
        }
        match configured {
            Ok(()) => return Ok((number, device)),
            // Somebody was quicker.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

fn free_device(control: &File) -> io::Result<u32> {
    // SAFETY: the descriptor is open, and this request takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

impl LoopInfo {
    fn new(flags: u32, label: &str) -> Self {
        let mut file_name = [0; 64];
        // The last byte stays zero.
        let bytes = label.bytes().take(file_name.len() - 1);
        file_name.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name,
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

fn configure(device: &File, file: &File, flags: u32, label: &str) -> io::Result<()> {
    let fd = u32::try_from(file.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let info = LoopInfo::new(flags, label);
    let config = LoopConfig { fd, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: both descriptors are open, and `config` has the layout and size of `struct loop_config`, which the kernel
    // only reads during the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
