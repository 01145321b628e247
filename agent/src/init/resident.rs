//! The part of PID 1 that stays: one thread, one poll loop, no memory beyond what it has at its start.
//!
//! It starts the agent and starts it again when it dies ([`supervisor`]), reaps every orphan, offers a shell, feeds the
//! watchdog ([`watchdog`]) . What needs memory is done by other stages
//! of PID 1, which it executes: taking up what the last one left, a pivot, the end. `cargo xtask tidy` counts its lines, debug builds abort when
//! it allocates.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use protocol::boot_args::Rescue;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::RecvFlags;
use rustix::process::{Signal as Killed, WaitOptions, WaitStatus};

use super::shutdown::End;
use super::{AGENT_NAME, ENVIRONMENT, STARTS_VARIABLE, control, early, rescue};
use crate::identity::uptime_ms;
use crate::logging::Line;
use crate::sys::start::{Start, errno, give_back_program, keep_at, kill, start};
use crate::sys::{allocator, crash};
use message::Asked;
use note::Note;
use program::Program;
use supervisor::Supervisor;
use watchdog::{Health, Watchdog};

pub mod message;
pub mod note;
pub mod program;
pub mod supervisor;
pub mod watchdog;

/// The control socket's number in PID 1: it outlives an exec of PID 1, as the next ones do.
pub const CONTROL_FD: i32 = 60;
/// The number of the counter that the agent gives its signs of life by.
pub const PULSE_FD: i32 = 61;
/// The watchdog's number.
pub const WATCHDOG_FD: i32 = 62;
/// Used while a child is started.
const PASSED_FD: i32 = 63;
/// Most children that are reaped in a row before something else is looked at.
const REAPED_IN_ROW: u32 = 512;

/// The resident PID 1.
#[derive(Debug)]
pub struct Resident {
    pub(super) rescue: Rescue,
    pub(super) agent: Supervisor,
    pub(super) since_ms: u64,
    pub(super) program: Program,
    pub(super) control: Option<OwnedFd>,
    pub(super) pulse: Option<OwnedFd>,
    pub(super) health: Health,
    pub(super) watchdog: Watchdog,
    pub(super) look_ms: u64,
    /// Present once a shell is wanted.
    pub(super) shell: Option<Supervisor>,
    pub(super) signals: SignalFd,
}

impl Resident {
    /// Runs for ever.
    pub fn run(mut self) -> ! {
        allocator::seal();
        let mut reaped_all = true;
        loop {
            self.start_due();
            let (signalled, asked) = self.wait(reaped_all);
            if signalled && let Some(end) = self.read_signals() {
                crash::restart_as(end.stage());
            }
            reaped_all = self.reap();
            if asked {
                self.serve_request();
            }
            self.look();
        }
    }

    fn start_due(&mut self) {
        let now = uptime_ms();
        if self.agent.due(now) {
            match self.start_agent() {
                Ok(pid) => {
                    self.agent.started(pid, now);
                    self.since_ms = now;
                    self.write_note();
                }
                Err(error) => {
                    log::error!("agent could not be started: {error}");
                    self.agent_ended(now);
                }
            }
        }
        if let Some(shell) = self.shell.as_mut().filter(|shell| shell.due(now)) {
            if let Some(Ok(pid)) = rescue::start_shell() {
                shell.started(pid, now);
                log::info!("a rescue shell is on the console");
                self.write_note();
            } else if shell.ended(now).wait_ms == 0 {
                // It is tried again, now and then; that there is none is said once.
                log::info!("{}", rescue::NO_SHELL);
            }
        }
    }

    /// Starts the agent with the other ends of a control socket and a pulse of its own.
    fn start_agent(&mut self) -> Result<i32, Errno> {
        let (ours, theirs) = control::pair().map_err(errno)?;
        let pulse = eventfd(0, EventfdFlags::NONBLOCK).map_err(errno)?;
        self.control = Some(keep_at(ours, CONTROL_FD)?);
        self.pulse = Some(keep_at(pulse, PULSE_FD)?);
        let theirs = keep_at(theirs, PASSED_FD)?;
        let count = self.agent.starts().saturating_add(1);
        let starts = Line::of(format_args!("{STARTS_VARIABLE}={count}")).ended(0);
        let [path, home] = ENVIRONMENT;
        start(&Start {
            program: self.program.path(),
            args: &[AGENT_NAME, c"agent"],
            env: &[path, home, starts.as_c_str(), control::FD_ENTRY, control::PULSE_ENTRY],
            fds: &[theirs.as_raw_fd(), PULSE_FD],
            writes: &[(early::AGENT_PROCS, b"0"), (c"/proc/self/oom_score_adj", b"-900")],
            terminal: false,
        })
    }

    /// Waits for a signal, the agent, the next start or the next look. Returns which of the first two has something to say.
    fn wait(&self, reaped_all: bool) -> (bool, bool) {
        let now = uptime_ms();
        let shell = self.shell.as_ref().and_then(|shell| shell.wait_ms(now));
        let waits = [self.agent.wait_ms(now), shell, Some(self.look_ms.saturating_sub(now))];
        let wait_ms = waits.into_iter().flatten().min().filter(|_| reaped_all).unwrap_or(0);
        let timeout = Timespec::try_from(Duration::from_millis(wait_ms)).ok();
        let signals = self.signals.as_fd();
        let control = self.control.as_ref().map_or(signals, AsFd::as_fd);
        let mut fds = [signals, control].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        if poll(&mut fds, timeout.as_ref()).is_err() {
            // Whatever it is, it is not to be repeated at full speed.
            std::thread::sleep(Duration::from_millis(20));
        }
        let [signalled, asked] = fds.map(|fd| !fd.revents().is_empty());
        (signalled, asked && self.control.is_some())
    }

    /// Collects who has ended: ours, and the orphans of everybody else. False when there may be more.
    fn reap(&mut self) -> bool {
        for _ in 0..REAPED_IN_ROW {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.ended(pid.as_raw_pid(), status),
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => return true,
            }
        }
        false
    }

    fn ended(&mut self, pid: i32, status: WaitStatus) {
        let now = uptime_ms();
        if self.agent.pid() == Some(pid) {
            match (status.exit_status(), status.terminating_signal().map(Signal::try_from)) {
                (Some(code), _) => log::error!("agent (pid {pid}) exited with status {code}"),
                (_, Some(Ok(signal))) => log::error!("agent (pid {pid}) was killed by {signal}"),
                _ => log::error!("agent (pid {pid}) was killed"),
            }
            self.agent_ended(now);
        } else if let Some(shell) = self.shell.as_mut().filter(|shell| shell.pid() == Some(pid)) {
            shell.ended(now);
        }
    }

    fn agent_ended(&mut self, now: u64) {
        self.control = None;
        self.pulse = None;
        let ended = self.agent.ended(now);
        log::info!("agent lived {} ms, starts again in {} ms", ended.lived_ms, ended.wait_ms);
        if self.program.died(ended.failing) {
            log::error!("the agent that took over has failed: back to Layer0's own");
            self.agent = Supervisor::new(self.agent.starts());
        } else if ended.failing && self.rescue == Rescue::OnFailure && self.shell.is_none() {
            log::error!("the agent keeps failing: a rescue shell is offered, the agent tries on");
            self.shell = Some(Supervisor::new(0));
        }
    }

    fn serve_request(&mut self) {
        let Some(socket) = self.control.take() else { return };
        let mut buffer = [0_u8; 512];
        // Looked at first: a pivot stays in the socket for the stage that has the memory for it.
        let look = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let length = match rustix::net::recv(&socket, &mut buffer, look) {
            Ok((_, length)) if length > 0 => length,
            // The agent is gone or going; its end will be reaped.
            Ok(_) | Err(_) => return,
        };
        if buffer.starts_with(b"pivot\0") {
            crash::restart_as(super::PIVOT);
        }
        let _ = rustix::net::recv(&socket, &mut [0_u8; 1], RecvFlags::DONTWAIT);
        let result = match buffer.get(..length).map(message::parse) {
            Some(Ok(Asked::End(end))) => {
                let _ = control::answer(&socket, Ok(()));
                return crash::restart_as(end.stage());
            }
            Some(Ok(Asked::Steady)) => {
                self.program.steady();
                Ok(())
            }
            Some(Ok(Asked::Agent(path))) => self.replace_agent(path),
            Some(Ok(Asked::Pivot(_)) | Err(_)) => Err("unknown request"),
            None => Err("the request is too long"),
        };
        // An agent that cannot take the answer is ending.
        let _ = control::answer(&socket, result);
        self.control = Some(socket);
    }

    /// The present agent's end is reaped like any other; the new one starts then.
    fn replace_agent(&mut self, path: &str) -> Result<(), &'static str> {
        if rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_err() {
            return Err("there is no such program");
        }
        log::info!("agents are started from {path} from here on");
        // The death of the present agent is not the new one's.
        self.program = Program::new(path, -1);
        self.agent.renewed();
        kill(self.agent.pid().unwrap_or(0), Killed::KILL);
        Ok(())
    }

    /// Feeds the watchdog of a healthy machine, and kills an agent that hangs.
    fn look(&mut self) {
        let now = uptime_ms();
        if now < self.look_ms {
            return;
        }
        self.look_ms = now + self.watchdog.pace_ms();
        let signs = self.pulse.as_ref().is_some_and(|fd| rustix::io::read(fd, &mut [0; 8]).is_ok());
        if signs {
            self.health.sign(self.agent.starts(), now);
        }
        if let Some(pid) = self.agent.pid()
            && self.health.hangs(self.agent.starts(), self.since_ms, now)
        {
            log::error!("agent (pid {pid}) gives no sign of life: it is killed");
            kill(pid, Killed::KILL);
        }
        let shell = self.shell.as_ref().and_then(Supervisor::pid);
        self.watchdog.feed(self.health.feeds(shell.is_some(), now));
        give_back_program();
    }

    fn write_note(&self) {
        let agent = (self.agent.pid().unwrap_or(0), self.agent.starts());
        let shell = self.shell.as_ref().map_or((0, 0), |it| (it.pid().unwrap_or(0), it.starts()));
        let program = self.program.other().to_str().unwrap_or_default();
        let written = Note { agent, shell, program }.write();
        written.unwrap_or_else(|error| log::error!("PID 1's note: {}", errno(error)));
    }

    /// Reads what has come; the last that means an end counts. SIGCHLD needs no answer: children are looked at anyway.
    fn read_signals(&self) -> Option<End> {
        let mut end = None;
        while let Ok(Some(info)) = self.signals.read_signal() {
            end = End::from_signal(i32::try_from(info.ssi_signo).unwrap_or(0)).or(end);
        }
        end
    }
}
