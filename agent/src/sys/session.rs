//! What passes from one process to the next: a child's session and terminal, inherited descriptors, SIGPIPE.
//!
//! Unsafe because code between fork and exec may only make async-signal-safe calls, and because a descriptor's number
//! from the environment proves no ownership.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;

/// Makes the command start in a new session; with `terminal`, its stdin becomes the controlling terminal of that session.
pub fn in_new_session(command: &mut Command, terminal: bool) -> &mut Command {
    let prepare = move || {
        rustix::process::setsid()?;
        if terminal {
            // A terminal that cannot be taken still carries the shell, only without job control.
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).unwrap_or_default();
        }
        Ok(())
    };
    // SAFETY: the closure only makes two system calls through rustix; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(prepare) }
}

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
