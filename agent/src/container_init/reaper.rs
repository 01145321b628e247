//! A tiny PID 1 in front of a program that cannot be one: it passes signals on, takes in orphans, and ends as the program
//! ends. It is this process, which forks behind the exec barrier; it allocates nothing more.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, waitpid};

use super::{FAILED, InitError, step};
use crate::sys::process::{OneThread, fork_alone, pidfd_send_signal, reset_signals};

/// What a shell adds to the number of the signal that ended a program.
const SIGNALLED: i32 = 128;
/// SIGCHLD, which is for PID 1 itself.
const SIGCHLD: u32 = 17;

/// PID 1 with one program.
#[derive(Debug)]
pub(super) struct Reaper {
    signals: SignalFd,
    child: Pid,
    pidfd: OwnedFd,
}

/// Forks: `None` in the child, which goes on to become the program.
///
/// # Errors
/// The kernel's refusal.
pub(super) fn split() -> Result<Option<Reaper>, InitError> {
    let all = SigSet::all();
    // A signal that comes between here and the watching waits: a blocked signal is not lost, not even for PID 1.
    all.thread_block().map_err(step("block signals"))?;
    let signals = SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC).map_err(step("signalfd"))?;
    let alone = OneThread::check().map_err(step::<std::io::Error>("fork"))?;
    let Some(child) = fork_alone(alone).map_err(step::<std::io::Error>("fork"))? else {
        reset_signals();
        return Ok(None);
    };
    let pid = i32::try_from(child.pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(Errno::SRCH).map_err(step("fork"))?;
    Ok(Some(Reaper { signals, child: pid, pidfd: child.pidfd }))
}

impl Reaper {
    /// Watches until the program has ended; the result is its exit code, or 128 and the signal's number.
    pub(super) fn watch(self) -> i32 {
        loop {
            // The first look comes before the first wait: the program may have ended already.
            loop {
                match waitpid(None, WaitOptions::NOHANG) {
                    Ok(Some((pid, status))) if pid == self.child => {
                        let signal = status.terminating_signal().map(|it| SIGNALLED + it);
                        return status.exit_status().or(signal).unwrap_or(FAILED);
                    }
                    Ok(Some(_)) | Err(Errno::INTR) => {}
                    Ok(None) | Err(_) => break,
                }
            }
            let Ok(Some(signal)) = self.signals.read_signal() else { continue };
            if signal.ssi_signo != SIGCHLD {
                let number = i32::try_from(signal.ssi_signo).unwrap_or_default();
                // A program that has just ended is found at the next look.
                drop(pidfd_send_signal(self.pidfd.as_fd(), number));
            }
        }
    }
}
