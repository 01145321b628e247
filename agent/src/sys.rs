//! The kernel's side of the agent: the only modules with unsafe code. Each wraps a few system calls that the crates lack.

pub mod process;
