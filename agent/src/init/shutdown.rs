//! The end in order, each step with its limit: the agent first, then everybody, then file systems and disks (by a child,
//! [`super::settle`], because they can hang), then the machine.
//!
//! A stage of PID 1 of its own, as systemd has it: the resident part executes the program again as `init --reboot`.

use std::ffi::CStr;
use std::time::Duration;

use nix::errno::Errno;
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::system::RebootCommand;

use super::resident::program::OWN;
use super::resident::watchdog::Watchdog;
use crate::identity::uptime_ms;
use crate::sys::start::{Start, errno, kill, start};

/// How long the agent may take to stop its containers, in milliseconds.
const AGENT_MS: u64 = 10_000;
/// How long everybody else may take after SIGTERM, in milliseconds.
const TERM_MS: u64 = 3_000;
/// How long SIGKILL may take to be felt, in milliseconds.
const KILL_MS: u64 = 2_000;
/// How long unmounting, letting go of disks and writing back may take, in milliseconds.
const SETTLE_MS: u64 = 30_000;
/// How often children are looked at meanwhile.
const TICK: Duration = Duration::from_millis(20);

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Switched off.
    PowerOff,
    /// Started again.
    Reboot,
    /// The kernel that was loaded for it is started.
    Kexec,
    /// Stopped, with the power on.
    Halt,
}

impl End {
    /// What a signal to PID 1 asks for, as busybox's init has it: SIGUSR1 halt, SIGUSR2 power off, SIGTERM and SIGINT
    /// (which is Ctrl-Alt-Del) reboot.
    #[must_use]
    pub fn from_signal(signal: i32) -> Option<Self> {
        let is = |other: Signal| signal == other.as_raw();
        if is(Signal::USR1) {
            Some(Self::Halt)
        } else if is(Signal::USR2) {
            Some(Self::PowerOff)
        } else if is(Signal::TERM) || is(Signal::INT) {
            Some(Self::Reboot)
        } else {
            None
        }
    }

    /// Every end.
    pub const ALL: [Self; 4] = [Self::PowerOff, Self::Reboot, Self::Kexec, Self::Halt];

    /// The argument of PID 1 that ends so.
    #[must_use]
    pub fn stage(self) -> &'static CStr {
        match self {
            Self::PowerOff => c"--poweroff",
            Self::Reboot => c"--reboot",
            Self::Kexec => c"--kexec",
            Self::Halt => c"--halt",
        }
    }

    fn parts(self) -> (RebootCommand, &'static str) {
        match self {
            Self::PowerOff => (RebootCommand::PowerOff, "power off"),
            Self::Reboot => (RebootCommand::Restart, "reboot"),
            Self::Kexec => (RebootCommand::Kexec, "kexec"),
            Self::Halt => (RebootCommand::Halt, "halt"),
        }
    }
}

/// Ends everything. Comes back only if the kernel refuses; it has said so then.
pub fn run(end: End, agent: Option<i32>, watchdog: &mut Watchdog) {
    let (command, name) = end.parts();
    let mut fed = 0;
    let mut wait = |limit_ms: u64, done: &mut dyn FnMut() -> bool| {
        let end = uptime_ms().saturating_add(limit_ms);
        while !done() {
            let now = uptime_ms();
            if now >= end {
                return false;
            }
            if now >= fed {
                watchdog.feed(true);
                fed = now + 1000;
            }
            std::thread::sleep(TICK);
        }
        true
    };
    log::info!("{name}: stopping the agent and its containers");
    if let Some(agent) = agent.and_then(Pid::from_raw) {
        kill(agent.as_raw_pid(), Signal::TERM);
        if !wait(AGENT_MS, &mut || reaped(agent)) {
            log::warn!("the agent did not stop within {} s", AGENT_MS / 1000);
        }
    }
    log::info!("{name}: stopping what is left");
    signal_all(Signal::TERM);
    // An interactive shell ignores SIGTERM but not the loss of its terminal.
    signal_all(Signal::HUP);
    if !wait(TERM_MS, &mut no_children) {
        log::warn!("processes that ignore SIGTERM are killed");
        signal_all(Signal::KILL);
        if !wait(KILL_MS, &mut no_children) {
            log::warn!("processes hang in the kernel");
        }
    }
    match settle() {
        Ok(child) if wait(SETTLE_MS, &mut || reaped(child)) => {}
        Ok(_) => log::warn!("disks hang: they are left after {} s", SETTLE_MS / 1000),
        Err(error) => log::warn!("file systems stay mounted: {error}"),
    }
    watchdog.release(matches!(end, End::Reboot | End::Kexec));
    log::info!("{name}: now");
    let mut result = rustix::system::reboot(command);
    if end == End::Kexec {
        log::error!("kexec refused ({}): reboot", result.map_or_else(errno, |()| Errno::EINVAL));
        result = rustix::system::reboot(RebootCommand::Restart);
    }
    log::error!("{name} refused: {}", result.map_or_else(errno, |()| Errno::EAGAIN));
}

fn settle() -> Result<Pid, Errno> {
    let child = start(&Start {
        program: OWN,
        args: &[c"init", c"settle"],
        env: &[],
        fds: &[],
        writes: &[],
        terminal: false,
    })?;
    Pid::from_raw(child).ok_or(Errno::ESRCH)
}

/// To every process but PID 1 itself (kill(2) with -1).
fn signal_all(signal: Signal) {
    let all = nix::unistd::Pid::from_raw(-1);
    let signal = nix::sys::signal::Signal::try_from(signal.as_raw());
    if let Err(error) = signal.and_then(|signal| nix::sys::signal::kill(all, signal)) {
        log::debug!("signal to all: {error}");
    }
}

/// Reaps all that have ended; whether this one is not among the living any more.
fn reaped(pid: Pid) -> bool {
    no_children() || rustix::process::test_kill_process(pid).is_err()
}

/// Everything descends from PID 1 and comes back to it, so no children means no processes.
fn no_children() -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_mean_what_busybox_has_them_mean() {
        let table = [
            (Signal::USR1, Some(End::Halt)),
            (Signal::USR2, Some(End::PowerOff)),
            (Signal::TERM, Some(End::Reboot)),
            (Signal::INT, Some(End::Reboot)),
            (Signal::CHILD, None),
        ];
        for (signal, expect) in table {
            assert_eq!(End::from_signal(signal.as_raw()), expect, "{signal:?}");
        }
    }
}
