//! A global allocator that ends the process when it allocates after [`seal`]: PID 1 in debug builds.
//!
//! Unsafe because `GlobalAlloc` is. Release builds have the system's allocator and a `seal` that does nothing.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, Ordering};

static SEALED: AtomicBool = AtomicBool::new(false);

/// From here on nothing may be allocated.
pub fn seal() {
    SEALED.store(true, Ordering::SeqCst);
}

/// Allocating is allowed again: for the last words of a crash.
pub fn unseal() {
    SEALED.store(false, Ordering::SeqCst);
}

/// The system's allocator, with the seal. A binary makes it its global one in debug builds.
#[derive(Debug)]
pub struct Sealed;

fn look() {
    if SEALED.swap(false, Ordering::SeqCst) {
        let text = "PID 1 has allocated memory after its start\n";
        // Nobody is told when that fails; the abort tells enough.
        let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
        std::process::abort();
    }
}

// SAFETY: every call is the system allocator's own, with the caller's promises.
unsafe impl GlobalAlloc for Sealed {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        look();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        look();
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        look();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}
