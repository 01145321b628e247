//! Disks that firmware boots from: a FAT file system with a few files, and a GUID partition table around one. Pure.
//!
//! | module | what it writes | after |
//! |---|---|---|
//! | [`fat`] | a FAT32 or FAT16 volume | Microsoft's "FAT32 File System Specification" 1.03 |
//! | [`gpt`] | a disk with one EFI system partition | UEFI 2.10 chapter 5 |
//!
//! Nothing here is a file system for daily use: volumes are written once, whole, and the same files give the same bytes.

pub mod fat;
pub mod gpt;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// Puts bytes at an offset of a buffer that is large enough.
fn put(buffer: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = buffer.get_mut(at..at.saturating_add(bytes.len())) {
        place.copy_from_slice(bytes);
    }
}
