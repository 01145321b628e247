//! How a stage of PID 1 finds what the one before it left: children by its note, descriptors by their numbers.

use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use protocol::boot_args::{BootArgs, Rescue};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, WaitId, WaitIdOptions};

use super::resident::note::{self, Note};
use super::resident::program::Program;
use super::resident::supervisor::Supervisor;
use super::resident::watchdog::{Health, Watchdog};
use super::resident::{CONTROL_FD, PULSE_FD, Resident, WATCHDOG_FD};
use crate::identity::uptime_ms;
use crate::sys::start::kept;

const HANDLED: [Signal; 5] =
    [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2];

/// Takes up what the program before this one left: children, and descriptors at their numbers.
#[must_use]
pub fn resident(args: &BootArgs) -> Resident {
    let now = uptime_ms();
    let mut this = Resident {
        rescue: args.rescue,
        agent: Supervisor::new(0),
        since_ms: now,
        program: Program::new("", 0),
        control: kept(CONTROL_FD),
        pulse: kept(PULSE_FD),
        health: Health::default(),
        watchdog: watchdog(args),
        look_ms: 0,
        shell: (args.rescue == Rescue::Always).then(|| Supervisor::new(0)),
        signals: block_signals(),
    };
    let mut buffer = [0; 512];
    if let Some(note) = parse(read(&mut buffer)) {
        this.program = Program::new(note.program, 0);
        this.agent = adopted(note.agent, now).unwrap_or(Supervisor::new(note.agent.1));
        this.shell = adopted(note.shell, now).or(this.shell);
    }
    // An agent that is there was well a moment ago.
    this.health.sign(this.agent.starts(), now);
    this
}

/// The agent's PID, by the note.
#[must_use]
pub fn agent() -> Option<i32> {
    let mut buffer = [0; 512];
    adopted(parse(read(&mut buffer))?.agent, 0)?.pid()
}

/// The watchdog, as it was left.
#[must_use]
pub fn watchdog(args: &BootArgs) -> Watchdog {
    Watchdog::new(args.watchdog.seconds(), kept(WATCHDOG_FD))
}

/// A child that the program before this one has started, and that has not been reaped.
fn adopted((pid, starts): (i32, u32), now: u64) -> Option<Supervisor> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let child = Pid::from_raw(pid).filter(|_| pid > 1)?;
    rustix::process::waitid(WaitId::Pid(child), options).ok()?;
    let mut supervisor = Supervisor::new(starts.saturating_sub(1));
    supervisor.started(pid, now);
    Some(supervisor)
}

/// A descriptor for what PID 1 is told by signals. The kernel refuses it when it is out of memory alone.
fn block_signals() -> SignalFd {
    let set: SigSet = HANDLED.into_iter().collect();
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    loop {
        match set.thread_block().and_then(|()| SignalFd::with_flags(&set, flags)) {
            Ok(fd) => return fd,
            Err(error) => log::error!("signalfd: {error}"),
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Reads the note's text.
fn parse(text: &str) -> Option<Note<'_>> {
    let mut words = text.trim_end_matches('\n').splitn(5, ' ');
    let mut pair = || Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?));
    Some(Note { agent: pair()?, shell: pair()?, program: words.next()? })
}

/// Reads the file into a buffer; empty where there is none.
fn read(buffer: &mut [u8]) -> &str {
    let file = rustix::fs::open(note::FILE, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let length = file.and_then(|file| rustix::io::read(file, &mut *buffer)).unwrap_or(0);
    std::str::from_utf8(buffer.get(..length).unwrap_or_default()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_survives_and_a_torn_one_is_none() {
        for program in ["", "/run/layercake/agents/a b"] {
            let note = Note { agent: (17, 3), shell: (0, 0), program };
            let line = note.line();
            let text = std::str::from_utf8(line.as_bytes()).unwrap();
            assert_eq!(parse(text), Some(note), "{text}");
        }
        for text in ["", "1 2", "1 2 3 4", "x 2 3 4 ", "1 2 3"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
