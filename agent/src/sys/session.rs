//! What passes from one process to the next: inherited descriptors, SIGPIPE.
//!
//! Unsafe because a descriptor's number from the environment proves no ownership.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::libc;

/// Takes over a descriptor that this process inherited under a number its environment names; sets close-on-exec. Call
/// it once a number. `None` if nothing is open there.
#[must_use]
pub fn inherited_fd(number: RawFd) -> Option<OwnedFd> {
    if number <= 2 {
        return None;
    }
    // SAFETY: fcntl only looks the number up and sets a flag; it fails on a number that is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: the number is open, was opened by our parent for us, and nobody else in this process owns it.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Gives SIGPIPE its default action back, which Rust's start-up took away: for a program that is executed next.
pub fn default_sigpipe() {
    // SAFETY: SIG_DFL is a valid disposition and no handler is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn only_what_is_open_is_inherited_and_it_closes_on_exec() {
        for number in [-1, 0, 2, 987] {
            assert!(inherited_fd(number).is_none(), "{number}");
        }
        let (file, _other) = rustix::pipe::pipe().unwrap();
        let number = file.into_raw_fd();
        let taken = inherited_fd(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        let flags = rustix::io::fcntl_getfd(&taken).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}
