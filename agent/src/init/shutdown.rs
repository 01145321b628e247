//! The end in order: the agent first, then everybody, then the file systems, then the machine.

use std::fs;
use std::time::Duration;

use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::system::RebootCommand;

use super::early::mount_points;
use crate::identity::uptime_ms;

/// How long the agent may take to stop its containers, in milliseconds.
const AGENT_MS: u64 = 10_000;
/// How long everybody else may take after SIGTERM, in milliseconds.
const TERM_MS: u64 = 3_000;
/// How long SIGKILL may take to be felt, in milliseconds.
const KILL_MS: u64 = 2_000;
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

    fn command(self) -> RebootCommand {
        match self {
            Self::PowerOff => RebootCommand::PowerOff,
            Self::Reboot => RebootCommand::Restart,
            Self::Kexec => RebootCommand::Kexec,
            Self::Halt => RebootCommand::Halt,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::PowerOff => "power off",
            Self::Reboot => "reboot",
            Self::Kexec => "kexec",
            Self::Halt => "halt",
        }
    }
}

/// Ends everything. Comes back only if the kernel refuses, with its reason.
#[must_use]
pub fn run(end: End, agent: Option<i32>) -> String {
    log::info!("{}: stopping the agent and its containers", end.text());
    if let Some(agent) = agent.and_then(Pid::from_raw) {
        signal(agent, Signal::TERM);
        if !wait_until(AGENT_MS, || reap().contains(&agent)) {
            log::warn!("the agent did not stop within {} s", AGENT_MS / 1000);
        }
    }
    log::info!("{}: stopping what is left", end.text());
    signal_all(Signal::TERM);
    // An interactive shell ignores SIGTERM but not the loss of its terminal.
    signal_all(Signal::HUP);
    if !wait_until(TERM_MS, no_children) {
        log::warn!("processes that ignore SIGTERM are killed");
        signal_all(Signal::KILL);
        if !wait_until(KILL_MS, no_children) {
            log::warn!("processes hang in the kernel");
        }
    }
    unmount_all();
    rustix::fs::sync();
    log::info!("{}: now", end.text());
    match rustix::system::reboot(end.command()) {
        Ok(()) => "the kernel went on".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn signal(pid: Pid, signal: Signal) {
    if let Err(error) = rustix::process::kill_process(pid, signal) {
        log::debug!("signal {} to {}: {error}", signal.as_raw(), pid.as_raw_nonzero());
    }
}

/// To every process but PID 1 itself (kill(2) with -1).
fn signal_all(signal: Signal) {
    let all = nix::unistd::Pid::from_raw(-1);
    let signal = nix::sys::signal::Signal::try_from(signal.as_raw());
    if let Err(error) = signal.and_then(|signal| nix::sys::signal::kill(all, signal)) {
        log::debug!("signal to all: {error}");
    }
}

/// Everything descends from PID 1 and comes back to it, so no children means no processes.
fn no_children() -> bool {
    reap();
    matches!(rustix::process::wait(WaitOptions::NOHANG), Err(rustix::io::Errno::CHILD))
}

fn reap() -> Vec<Pid> {
    let mut ended = Vec::new();
    while let Ok(Some((pid, _))) = rustix::process::wait(WaitOptions::NOHANG) {
        ended.push(pid);
    }
    ended
}

fn wait_until(limit_ms: u64, mut done: impl FnMut() -> bool) -> bool {
    let end = uptime_ms().saturating_add(limit_ms);
    loop {
        if done() {
            return true;
        }
        if uptime_ms() >= end {
            return false;
        }
        std::thread::sleep(TICK);
    }
}

fn unmount_all() {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for point in to_unmount(&text) {
        if let Err(error) = rustix::mount::unmount(&point, UnmountFlags::empty()) {
            log::debug!("unmount {point}: {error}");
        }
    }
}

/// Mount points in the order of unmounting: last mounted first, without the kernel's own.
fn to_unmount(mountinfo: &str) -> Vec<String> {
    let mut points = mount_points(mountinfo);
    points.retain(|point| {
        point != "/"
            && !["/proc", "/sys", "/dev"]
                .iter()
                .any(|own| std::path::Path::new(point).starts_with(own))
    });
    points.reverse();
    points
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

    #[test]
    fn unmounting_goes_backwards_and_leaves_the_kernels_own() {
        let line = |point: &str| format!("1 1 0:1 / {point} rw - t t rw\n");
        let points =
            ["/", "/proc", "/dev/pts", "/run", "/run/layercake", "/sys/fs/cgroup", "/data"];
        let text: String = points.iter().map(|point| line(point)).collect();
        assert_eq!(to_unmount(&text), ["/data", "/run/layercake", "/run"]);
    }
}
