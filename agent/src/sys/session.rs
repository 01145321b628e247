//! What passes from one process to the next: a child's session and terminal, inherited descriptors, SIGPIPE.
//!
//! Unsafe because code between fork and exec may only make async-signal-safe calls, and because a descriptor's number
//! from the environment proves no ownership.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;
use nix::sys::signal::SigSet;

/// Makes the command start in a new session with no signal blocked; with `terminal`, its stdin becomes the controlling
/// terminal of that session.
pub fn in_new_session(command: &mut Command, terminal: bool) -> &mut Command {
    let nothing_blocked = SigSet::empty();
    let prepare = move || {
        // Command hands its parent's signal mask on, and PID 1 blocks what it reads from a signalfd.
        nothing_blocked.thread_set_mask()?;
        rustix::process::setsid()?;
        if terminal {
            // A terminal that cannot be taken still carries the shell, only without job control.
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).unwrap_or_default();
        }
        Ok(())
    };
    // SAFETY: the closure only makes three system calls through nix and rustix; it neither allocates nor takes a lock.
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

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use nix::sys::signal::Signal;

    use super::*;

    #[test]
    fn a_child_has_a_session_of_its_own_and_blocks_nothing() {
        let set: SigSet = [Signal::SIGUSR2].into_iter().collect();
        set.thread_block().unwrap();
        let mut command = Command::new("cat");
        command.args(["/proc/self/status", "/proc/self/stat"]);
        let output = in_new_session(&mut command, false).output().unwrap();
        set.thread_unblock().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("SigBlk:\t0000000000000000\n"), "{text}");
        // proc(5), stat: pid (comm) state ppid pgrp session
        let stat: Vec<&str> = text.lines().last().unwrap().split(' ').collect();
        assert_eq!(stat[0], stat[5]);
    }

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
