//! A file in memory that nobody can reach by a name, for the kernel to load.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use rustix::fs::{MemfdFlags, memfd_create};

/// The file, while it is written.
#[derive(Debug)]
pub(super) struct Memory(File);

impl Memory {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(memfd_create("layer0", MemfdFlags::CLOEXEC)?.into()))
    }

    pub(super) fn file(&self) -> &File {
        &self.0
    }

    /// Fills up with zeros after an archive of this size: the next one begins at a multiple of four, and the kernel skips zeros
    /// between two (Documentation/driver-api/early-userspace/buffer-format.rst).
    pub(super) fn pad(&self, size: u64) -> io::Result<()> {
        let zeros = usize::try_from(size.wrapping_neg() % 4).unwrap_or(0);
        (&self.0).write_all([0; 4].get(..zeros).unwrap_or_default())
    }

    /// The same file, which nobody has open for writing from now on: the kernel reads no other.
    pub(super) fn read_only(self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}
