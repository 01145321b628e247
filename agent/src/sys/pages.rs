//! Memory for a large buffer that is soon done with. Unmapped, it is the kernel's again at once, all of it; the allocator keeps up to
//! twice the largest block that it ever gave back (mallopt(3), `M_MMAP_THRESHOLD`).
//!
//! Unsafe because it maps memory and looks at it as bytes.
#![allow(unsafe_code)]

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr;

use nix::libc;

/// Zeroed memory of this process alone.
#[derive(Debug)]
pub struct Pages {
    start: *mut u8,
    length: usize,
}

impl Pages {
    /// So many bytes.
    ///
    /// # Errors
    /// What mmap(2) says: ENOMEM, and EINVAL for none.
    pub fn new(length: usize) -> io::Result<Self> {
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever the kernel likes; nothing else is touched.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), length })
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped, zeroed or written, as long as self lives.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and self is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping of new(), which nobody borrows any more. It cannot fail for a whole mapping.
        let _ = unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_zeroed_and_written_to_their_end() {
        let mut pages = Pages::new(5000).unwrap();
        assert!(pages.iter().all(|byte| *byte == 0));
        pages.fill(7);
        assert_eq!((pages.len(), pages.last()), (5000, Some(&7)));
        assert_eq!(Pages::new(0).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert!(Pages::new(usize::MAX / 2).is_err());
    }
}
