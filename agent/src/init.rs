//! PID 1 of Layer0: tiny, and it never ends.
//!
//! It prepares the machine ([`early`]), starts the agent and starts it again when it dies ([`supervisor`]), reaps every
//! orphan, offers a shell ([`rescue`]), and does what only PID 1 can: [`shutdown`] and [`pivot`], asked for over
//! [`control`]. One thread, one poll loop. It knows nothing of ImageSets, containers or the network, and holds nothing
//! that they need. When it crashes it executes itself again as `init --recover`, which finds mounts and children in place.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use protocol::boot_args::{BootArgs, LogLevel, Rescue};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitOptions, WaitStatus};

use crate::identity::{self, uptime_ms};
use crate::logging::{self, Target};
use crate::paths::{RUN_DIR, RunDirs};
use crate::sys::{crash, session};
use control::{ControlError, Request};
use shutdown::End;
use supervisor::Supervisor;

pub mod control;
pub mod early;
pub mod pivot;
pub mod rescue;
pub mod roles;
pub mod shutdown;
pub mod supervisor;

/// `PATH` of what PID 1 starts.
pub const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// The environment variable that tells the agent which start of this boot it is, 1 for the first.
pub const STARTS_VARIABLE: &str = "LAYERCAKE_AGENT_STARTS";
/// `argv[0]` of the agent; systemd spares processes with an `@` there when it takes over (pivot).
pub const AGENT_NAME: &str = "@layercake-agent";

const HANDLED: [Signal; 5] =
    [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2];
const LONGEST_POLL_MS: u64 = 60_000;

/// Runs PID 1. `recover`: it has crashed and executed itself again.
pub fn run(recover: bool) -> ! {
    let crash_handlers = crash::install();
    let clear_mask = SigSet::empty().thread_set_mask();
    // On recovery `/proc` stands and the root has been made pivotable; doing it twice would stack.
    let root = if recover { Ok(()) } else { early::make_root_pivotable() };
    let problems = early::mount_all();
    let console = early::attach_console();
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let args = BootArgs::parse(&command_line);
    let debug = args.log == LogLevel::Debug;
    logging::init(if debug { LogLevel::Debug } else { LogLevel::Info }, Target::Layer0("init"));
    std::panic::set_hook(Box::new(|info| {
        log::error!("{}; starting over", logging::panic_text(info));
        crash::restart_self();
    }));
    logging::quiet_kernel_console();
    log::info!(
        "Layercake {} Layer0, kernel {}{}",
        env!("CARGO_PKG_VERSION"),
        identity::release(),
        if recover { ", recovered from a crash of PID 1" } else { "" }
    );
    if let Err(error) = root {
        log::warn!("pivot mode will not work: {error}");
    }
    report("crash handlers", crash_handlers);
    report("signal mask", clear_mask.map_err(Into::into));
    report("/dev/console", console);
    for (required, problem) in problems {
        if required { log::error!("{problem}") } else { log::debug!("{problem}") }
    }
    if !recover {
        early::link_devices();
        early::tune_kernel();
        early::prepare_cgroups();
    } else {
        // Should the crash repeat at once, let it do so calmly.
        std::thread::sleep(Duration::from_secs(1));
    }
    report(RUN_DIR, fs::create_dir_all(RunDirs::new(RUN_DIR).state()));
    PidOne::new(args.rescue, recover).run()
}

/// Says what went wrong without stopping for it.
fn report(what: &str, result: std::io::Result<()>) {
    if let Err(error) = result {
        log::error!("{what}: {error}");
    }
}

#[derive(Debug)]
struct PidOne {
    rescue: Rescue,
    agent: Supervisor,
    control: Option<OwnedFd>,
    /// Present once a shell is wanted.
    shell: Option<Supervisor>,
}

impl PidOne {
    fn new(rescue: Rescue, recover: bool) -> Self {
        let mut this = Self { rescue, agent: Supervisor::default(), control: None, shell: None };
        if recover {
            this.take_over();
        }
        if rescue == Rescue::Always && this.shell.is_none() {
            this.shell = Some(Supervisor::default());
        }
        this
    }

    /// After a crash the children are still ours, but nobody speaks to the agent: a new one takes its place, which finds
    /// the containers by itself. A shell goes on.
    fn take_over(&mut self) {
        if let Some((pid, starts)) = read_note("agent.pid").filter(|(pid, _)| is_agent(*pid)) {
            log::info!("the agent (pid {pid}) lost its link to PID 1: a new one takes over");
            self.agent = Supervisor::new(starts);
            if let Some(pid) = Pid::from_raw(pid)
                && let Err(error) =
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL)
            {
                log::warn!("agent: {error}");
            }
        }
        if let Some((pid, starts)) = read_note("rescue.pid")
            && Pid::from_raw(pid).is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
        {
            let mut shell = Supervisor::new(starts);
            shell.started(pid, uptime_ms());
            self.shell = Some(shell);
        }
    }

    fn run(mut self) -> ! {
        let signals = block_signals();
        loop {
            self.start_due();
            let (signalled, asked) = self.wait(signals.as_ref());
            if signalled && let Some(end) = signals.as_ref().and_then(read_signals) {
                self.end(end);
            }
            self.reap();
            if asked {
                self.serve_request();
            }
        }
    }

    fn start_due(&mut self) {
        let now = uptime_ms();
        if self.agent.due(now) {
            match start_agent(self.agent.starts().saturating_add(1)) {
                Ok((pid, socket)) => {
                    self.agent.started(pid, now);
                    self.control = Some(socket);
                    write_note("agent.pid", pid, self.agent.starts());
                }
                Err(error) => {
                    log::error!("agent could not be started: {error}");
                    self.agent_ended(now);
                }
            }
        }
        if let Some(shell) = self.shell.as_mut().filter(|shell| shell.due(now)) {
            match rescue::start() {
                Ok(pid) => {
                    shell.started(pid, now);
                    write_note("rescue.pid", pid, shell.starts());
                    log::info!("a rescue shell is on the console");
                }
                Err(error) => {
                    shell.ended(now);
                    // It is tried again, now and then; that it failed is said once.
                    logging::status(&format!("rescue: {error}"));
                }
            }
        }
    }

    /// Waits for a signal, the agent, or the next start. Returns which of the first two has something to say.
    fn wait(&self, signals: Option<&SignalFd>) -> (bool, bool) {
        let now = uptime_ms();
        let waits = [self.agent.wait_ms(now), self.shell.as_ref().and_then(|s| s.wait_ms(now))];
        let mut wait_ms = waits.into_iter().flatten().min().unwrap_or(LONGEST_POLL_MS);
        if signals.is_none() {
            wait_ms = wait_ms.min(100);
        }
        let timeout = Timespec::try_from(Duration::from_millis(wait_ms.min(LONGEST_POLL_MS))).ok();
        let mut fds = Vec::with_capacity(2);
        if let Some(signals) = signals {
            fds.push(PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN));
        }
        if let Some(control) = &self.control {
            fds.push(PollFd::new(control, PollFlags::IN));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log::error!("poll: {error}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let signalled = signals.is_some() && ready.next().unwrap_or(false);
        (signalled, ready.next().unwrap_or(false))
    }

    /// Collects everybody who has ended: ours, and the orphans of everybody else.
    fn reap(&mut self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.ended(pid.as_raw_pid(), status),
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn ended(&mut self, pid: i32, status: WaitStatus) {
        let now = uptime_ms();
        if self.agent.pid() == Some(pid) {
            log::error!("agent (pid {pid}) {}", describe(status));
            self.agent_ended(now);
        } else if let Some(shell) = self.shell.as_mut().filter(|shell| shell.pid() == Some(pid)) {
            shell.ended(now);
        } else {
            log::debug!("orphan {pid} {}", describe(status));
        }
    }

    fn agent_ended(&mut self, now: u64) {
        self.control = None;
        let ended = self.agent.ended(now);
        let (lived, wait) = (ended.lived_ms, ended.wait_ms);
        log::info!("agent lived {lived} ms, starts again in {wait} ms");
        if ended.failing && self.rescue == Rescue::OnFailure && self.shell.is_none() {
            log::error!("the agent keeps failing: a rescue shell is offered, the agent tries on");
            self.shell = Some(Supervisor::default());
        }
    }

    fn serve_request(&mut self) {
        let Some(socket) = self.control.take() else { return };
        let result = match control::receive(&socket) {
            // The agent is gone or going; its end will be reaped.
            Err(ControlError::Closed) => return,
            Err(error) => Err(error.to_string()),
            Ok(Request::PowerOff) => self.accept_end(&socket, End::PowerOff),
            Ok(Request::Reboot) => self.accept_end(&socket, End::Reboot),
            Ok(Request::Kexec) => self.accept_end(&socket, End::Kexec),
            Ok(Request::Steady) => Ok(()),
            Ok(Request::ReplaceAgent { .. }) => Err("not in this version".to_owned()),
            Ok(Request::Pivot { root, argv, env }) => {
                log::info!("pivot to {}, init {}", root.display(), argv.join(" "));
                let reason = pivot::run(&root, &argv, &env, prepare_exec, after_failed_exec);
                log::error!("pivot failed, Layer0 stays: {reason}");
                Err(reason)
            }
        };
        if let Err(error) =
            control::answer(&socket, result.as_ref().map(|()| ()).map_err(String::as_str))
        {
            log::warn!("answer to the agent: {error}");
        }
        self.control = Some(socket);
    }

    fn accept_end(&mut self, socket: &OwnedFd, end: End) -> Result<(), String> {
        if let Err(error) = control::answer(socket, Ok(())) {
            log::warn!("answer to the agent: {error}");
        }
        Err(self.end(end))
    }

    /// Ends the machine; comes back only if the kernel refuses.
    fn end(&mut self, end: End) -> String {
        let reason = shutdown::run(end, self.agent.pid());
        log::error!("{end:?} refused: {reason}");
        // Whoever was there is gone; begin again.
        self.agent = Supervisor::new(self.agent.starts());
        self.shell = self.shell.as_ref().map(|shell| Supervisor::new(shell.starts()));
        self.control = None;
        reason
    }
}

fn block_signals() -> Option<SignalFd> {
    let set: SigSet = HANDLED.into_iter().collect();
    let blocked = set.thread_block();
    let fd = blocked
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK));
    fd.inspect_err(|error| log::error!("signalfd: {error}; looking around every 100 ms")).ok()
}

/// Reads what has come; the last that means an end counts. SIGCHLD needs no answer: children are looked at anyway.
fn read_signals(signals: &SignalFd) -> Option<End> {
    let mut end = None;
    while let Ok(Some(info)) = signals.read_signal() {
        let signal = i32::try_from(info.ssi_signo).unwrap_or(0);
        end = End::from_signal(signal).or(end);
    }
    end
}

/// Starts the agent in a session and a cgroup of its own; returns its PID and our end of the control socket.
fn start_agent(starts: u32) -> Result<(i32, OwnedFd), String> {
    let (ours, theirs) = control::pair().map_err(|e| format!("socketpair: {e}"))?;
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())
        .map_err(|e| format!("fcntl: {e}"))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(AGENT_NAME).arg("agent").current_dir("/").env_clear();
    command.env("PATH", PATH).env("HOME", "/").env(STARTS_VARIABLE, starts.to_string());
    command.env(control::FD_VARIABLE, theirs.as_raw_fd().to_string());
    let child = session::in_new_session(&mut command, false).spawn().map_err(|e| e.to_string())?;
    let pid = child.id();
    for (file, value) in [
        (format!("{}/cgroup.procs", early::AGENT_CGROUP), pid.to_string()),
        (format!("/proc/{pid}/oom_score_adj"), "-900".to_owned()),
    ] {
        if let Err(error) = fs::write(&file, value) {
            log::warn!("{file}: {error}");
        }
    }
    Ok((i32::try_from(pid).map_err(|e| e.to_string())?, ours))
}

fn describe(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(number)) => match Signal::try_from(number) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {number}"),
        },
        (None, None) => "ended".to_owned(),
    }
}

/// The image's init starts as the kernel would start it: no signal blocked or ignored, Ctrl-Alt-Del with the kernel.
fn prepare_exec() {
    session::default_sigpipe();
    report("signal mask", SigSet::empty().thread_set_mask().map_err(Into::into));
    let cad = rustix::system::reboot(rustix::system::RebootCommand::CadOn);
    report("ctrl-alt-del", cad.map_err(Into::into));
}

fn after_failed_exec() {
    let set: SigSet = HANDLED.into_iter().collect();
    report("signal mask", set.thread_block().map_err(Into::into));
    let cad = rustix::system::reboot(rustix::system::RebootCommand::CadOff);
    report("ctrl-alt-del", cad.map_err(Into::into));
}

/// Notes for `init --recover`, in the state directory: a PID and how often it was started.
fn write_note(name: &str, pid: i32, starts: u32) {
    let path = RunDirs::new(RUN_DIR).state().join(name);
    report(name, fs::write(path, format!("{pid} {starts}\n")));
}

fn read_note(name: &str) -> Option<(i32, u32)> {
    let text = fs::read_to_string(RunDirs::new(RUN_DIR).state().join(name)).ok()?;
    let (pid, starts) = text.trim().split_once(' ')?;
    Some((pid.parse().ok()?, starts.parse().ok()?))
}

fn is_agent(pid: i32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.starts_with(AGENT_NAME.as_bytes()))
}
