//! The kernel's edges that need unsafe code; the only place that may have any. Each file says why it needs it.

pub mod allocator;
pub mod clock;
pub mod crash;
pub mod disks;
pub mod kexec;
pub mod loop_device;
pub mod packet;
pub mod pages;
pub mod process;
pub mod session;
pub mod start;
pub mod swap;
pub mod watchdog;
