//! The monitor: one small single-threaded process per container, its parent, with everything that must outlive the agent.
//!
//! It is started by [`crate::containers::create`] with one client connected on descriptor 0, over which the held sockets of the
//! container come first where it has any, and its lock file on descriptor 1. It leaves the agent's session and control group, clones the container's first process ([`crate::container_init`]) into its
//! namespaces and then waits on its log, its end, and clients. When the container has ended it writes `exit.json`, tells the
//! clients and ends. When it dies itself, the kernel kills the container with it (PR_SET_PDEATHSIG).
//!
//! It decides nothing about restarts, images or mounts. What it does about what happens stands in [`machine`], without I/O.

mod clients;
mod inbox;
pub mod machine;
mod network;
pub mod notify;
pub mod ring;
mod start;

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use clients::{Clients, Received};
use inbox::Inbox;
use machine::{Action, ClientId, Event, Machine};
use ring::Ring;
use start::Started;

pub(crate) use start::own_program;

use crate::containers::control::{Reply, line, parse_request};
use crate::containers::sockets::receive_with;
use crate::containers::{
    EXIT_FILE, ExitRecord, SOCKET_FILE, SPEC_FILE, Spec, boottime_ns, cgroup, read_json, write_json,
};
use crate::sys::process::{close_from, pidfd_send_signal};

/// Longest wait for the rest of the log once the container has ended: its processes are dead, so it ends at once or never.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// Bytes read from the log pipe at once.
const LOG_CHUNK: usize = 64 << 10;
/// Pause before a clock is looked at again when nothing is due.
const IDLE: Duration = Duration::from_secs(3600);
/// Points of oom_score_adj(5): the monitor is small and must outlive what it watches.
const OOM_SCORE: &str = "-900";

/// Runs the monitor of the container in this directory until it has ended. The result is the process's exit code.
#[must_use]
pub fn run(dir: &Path) -> i32 {
    match Monitor::prepare(dir) {
        Ok(mut monitor) => match monitor.watch_over(dir) {
            Ok(()) => 0,
            Err(_) => 1,
        },
        Err((client, message)) => {
            if let Some(mut client) = client {
                // Nobody is left to be told when this fails.
                drop(client.write_all(&line(&Reply::Error { message })));
            }
            1
        }
    }
}

struct Monitor {
    machine: Machine,
    clients: Clients,
    ring: Ring,
    signals: SignalFd,
    started: Started,
    /// The container's held sockets, kept open so that no connection is lost while it is replaced.
    sockets: Vec<OwnedFd>,
    /// Where its program speaks of itself, if it does.
    inbox: Option<Inbox>,
    /// Held open until the end: its lock says that the monitor lives.
    _lock: OwnedFd,
}

/// A descriptor of the poll set, by what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Status,
    Log,
    Console,
    End,
    Signals,
    Listener,
    Inbox,
    Client(ClientId),
}

type Failure = (Option<UnixStream>, String);

impl Monitor {
    fn prepare(dir: &Path) -> Result<Self, Failure> {
        let (client, lock, files) =
            take_inherited().map_err(|e| (None, format!("monitor: {e}")))?;
        match Self::prepare_with(dir, lock, files, &client) {
            Ok(mut monitor) => {
                monitor.clients.add(client);
                Ok(monitor)
            }
            Err(message) => Err((Some(client), message)),
        }
    }

    fn prepare_with(
        dir: &Path,
        lock: OwnedFd,
        files: OwnedFd,
        client: &UnixStream,
    ) -> Result<Self, String> {
        let mut notes = detach(&lock).map_err(|e| format!("monitor: {e}"))?;
        let spec: Spec = read_json(&dir.join(SPEC_FILE)).map_err(|e| format!("its spec: {e}"))?;
        let sockets = take_sockets(&spec, client)?;
        let signals = take_signals().map_err(|e| format!("monitor: signals: {e}"))?;
        let listener = UnixListener::bind(dir.join(SOCKET_FILE))
            .map_err(|e| format!("its control socket: {e}"))?;
        let clients = Clients::new(listener).map_err(|e| format!("its control socket: {e}"))?;
        let inbox = spec.notify.then(|| Inbox::open(dir)).transpose();
        let inbox = inbox.map_err(|e| format!("its notify socket: {e}"))?;
        let started = start::start(dir, &spec, &sockets, files, &mut notes)?;
        let machine = Machine::new(started.pid, notes, spec.stop_signal, spec.stop_timeout_s);
        Ok(Self {
            machine: machine.with_watchdog(spec.watchdog_ms),
            clients,
            ring: Ring::new(spec.log_dir.join(format!("{}.log", spec.name)), spec.log_size / 2),
            signals,
            started,
            sockets,
            inbox,
            _lock: lock,
        })
    }

    fn watch_over(&mut self, dir: &Path) -> io::Result<()> {
        loop {
            let ready = self.wait()?;
            // In this order: what container-init said comes before what clients want, and both before the end.
            for source in &ready {
                match source {
                    Source::Status => self.read_status(),
                    Source::Log => {
                        self.read_log();
                    }
                    Source::Console => self.read_console(),
                    Source::Signals => self.read_signals(),
                    Source::Listener => self.clients.accept(),
                    Source::Inbox => self.read_inbox(),
                    Source::Client(id) => self.read_client(*id),
                    Source::End => {}
                }
            }
            self.handle(Event::Tick);
            if ready.contains(&Source::End) {
                return self.finish(dir);
            }
        }
    }

    /// Waits for something to happen and says to what.
    fn wait(&self) -> io::Result<Vec<Source>> {
        let status = self.started.status.as_ref().map(|fd| (Source::Status, fd.as_fd()));
        let log = self.started.log.as_ref().map(|fd| (Source::Log, fd.as_fd()));
        let console = self.started.console.as_ref();
        let console = console.map(|console| (Source::Console, console.ours.as_fd()));
        let fixed = [
            (Source::Signals, self.signals.as_fd()),
            (Source::Listener, self.clients.listener().as_fd()),
            (Source::End, self.started.pidfd.as_fd()),
        ];
        let inbox = self.inbox.as_ref().map(|inbox| (Source::Inbox, inbox.as_fd()));
        let clients = self.clients.connections().map(|(id, fd)| (Source::Client(id), fd));
        let sources: Vec<(Source, BorrowedFd<'_>)> = status
            .into_iter()
            .chain(log)
            .chain(console)
            .chain(fixed)
            .chain(inbox)
            .chain(clients)
            .collect();
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let timeout =
            timespec(self.machine.deadline_ns().map_or(IDLE, |at| {
                Duration::from_nanos(at.saturating_sub(boottime_ns())).min(IDLE)
            }));
        match poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            result => result?,
        };
        let ready = sources.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|((source, _), _)| *source).collect())
    }

    fn handle(&mut self, event: Event<'_>) {
        for action in self.machine.handle(event, boottime_ns()) {
            match action {
                Action::OpenBarrier => {
                    // A container-init that is dead already cannot be let through; its end is told by the pidfd.
                    if let Some(barrier) = self.started.barrier.take() {
                        let _ = rustix::io::write(&barrier, b"x");
                    }
                }
                Action::Signal(signal) => self.signal(signal),
                Action::KillAll => {
                    if let Some(group) = &self.started.cgroup {
                        // The pidfd below kills them too, one after the other.
                        drop(group.kill());
                    }
                    self.signal(Signal::SIGKILL as i32);
                }
                Action::Reply(client, reply) => self.clients.send(client, &reply),
                Action::LastReply(client, reply) => {
                    self.clients.send(client, &reply);
                    self.clients.close(client);
                }
                Action::Sockets(client) => self.clients.send_sockets(client, &self.sockets),
            }
        }
    }

    /// A process that has ended, or a number that is no signal: neither is the monitor's trouble.
    fn signal(&self, signal: i32) {
        drop(pidfd_send_signal(self.started.pidfd.as_fd(), signal));
    }

    fn read_status(&mut self) {
        let mut buffer = [0; 1024];
        while let Some(fd) = &self.started.status {
            match rustix::io::read(fd, &mut buffer) {
                Ok(0) => {
                    self.started.status = None;
                    self.handle(Event::StatusClosed);
                }
                Ok(count) => self.handle(Event::Status(buffer.get(..count).unwrap_or_default())),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Moves one chunk of the log. False when there is nothing now.
    fn read_log(&mut self) -> bool {
        let Some(fd) = &self.started.log else { return false };
        let mut buffer = [0; LOG_CHUNK];
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) => {
                self.started.log = None;
                false
            }
            Ok(count) => {
                self.ring.append(buffer.get(..count).unwrap_or_default());
                true
            }
            Err(error) => error == rustix::io::Errno::INTR,
        }
    }

    fn read_inbox(&mut self) {
        let Some(inbox) = &self.inbox else { return };
        for message in inbox.receive(self.started.pid) {
            self.handle(Event::Notify(message));
        }
    }

    /// What systemd shows on its console stands in the log.
    fn read_console(&mut self) {
        let Some(console) = &self.started.console else { return };
        let mut buffer = [0; 4096];
        match rustix::io::read(&console.ours, &mut buffer) {
            Ok(count) if count > 0 => {
                // A terminal ends its lines with two characters.
                let bytes = buffer.iter().take(count).copied().filter(|byte| *byte != b'\r');
                self.ring.append(&bytes.collect::<Vec<u8>>());
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Ok(_) | Err(_) => self.started.console = None,
        }
    }

    fn read_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if i32::try_from(info.ssi_signo) == Ok(Signal::SIGTERM as i32) {
                self.handle(Event::Terminate);
            }
        }
    }

    fn read_client(&mut self, id: ClientId) {
        match self.clients.receive(id) {
            Received::Nothing => {}
            Received::Gone => self.handle(Event::Gone(id)),
            Received::Line(text) => match parse_request(&text) {
                Ok(request) => self.handle(Event::Request(id, request)),
                Err(error) => {
                    let message = format!("not a request: {error}");
                    self.clients.send(id, &Reply::Error { message });
                    self.clients.close(id);
                }
            },
        }
    }

    /// The container has ended. Whoever asked for that is told at once: the next version waits for nothing else. Then the
    /// rest of its log and its record, and those who watch it are told when all that is in place.
    fn finish(&mut self, dir: &Path) -> io::Result<()> {
        let now = boottime_ns();
        self.read_status();
        let status = waitid(WaitId::PidFd(self.started.pidfd.as_fd()), WaitIdOptions::EXITED)?;
        let code = status.as_ref().and_then(rustix::process::WaitIdStatus::exit_status);
        let signal = status.as_ref().and_then(rustix::process::WaitIdStatus::terminating_signal);
        let mut record = self.machine.ended(code, signal, now);
        for client in self.machine.take_askers() {
            self.clients.send(client, &Reply::Ended(record.clone()));
            self.clients.close(client);
        }
        self.drain_log();
        record.log_dropped_bytes = self.ring.dropped();
        let written = write_json(&dir.join(EXIT_FILE), &record);
        self.tell(record);
        written
    }

    fn drain_log(&mut self) {
        let until =
            boottime_ns().saturating_add(u64::try_from(DRAIN_LIMIT.as_nanos()).unwrap_or(0));
        while boottime_ns() < until {
            if self.read_log() {
                continue;
            }
            let Some(log) = &self.started.log else { return };
            let left = Duration::from_nanos(until.saturating_sub(boottime_ns()));
            let mut fds = [PollFd::new(log, PollFlags::IN)];
            if poll(&mut fds, Some(&timespec(left))).is_err() {
                return;
            }
        }
    }

    fn tell(&mut self, record: ExitRecord) {
        let reply = Reply::Ended(record);
        for client in self.machine.watching() {
            self.clients.send(*client, &reply);
        }
        // Whoever connected in these last moments: better an answer than a closed connection.
        self.clients.accept();
        let late: Vec<ClientId> = self.clients.connections().map(|(id, _)| id).collect();
        for client in late {
            if matches!(self.clients.receive(client), Received::Line(_)) {
                self.clients.send(client, &reply);
            }
        }
    }
}

/// The container's held sockets, which come with the very first byte.
fn take_sockets(spec: &Spec, client: &UnixStream) -> Result<Vec<OwnedFd>, String> {
    if spec.sockets.is_empty() {
        return Ok(Vec::new());
    }
    let (_, sockets) = receive_with(client, 1).map_err(|e| format!("its held sockets: {e}"))?;
    let (got, wanted) = (sockets.len(), spec.sockets.len());
    if got != wanted {
        return Err(format!("its held sockets: {got} came instead of {wanted}"));
    }
    Ok(sockets)
}

/// The client on descriptor 0, the lock on 1 and the files on 2; all three standard descriptors then lead nowhere.
fn take_inherited() -> io::Result<(UnixStream, OwnedFd, OwnedFd)> {
    close_from(3)?;
    let client = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let lock = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
    let files = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3)?;
    let nowhere = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    rustix::stdio::dup2_stderr(&nowhere)?;
    Ok((UnixStream::from(client), lock, files))
}

/// Leaves everything of the agent's that could take this process down with it. What could not be left comes back as notes.
fn detach(lock: &OwnedFd) -> io::Result<Vec<String>> {
    rustix::process::setsid()?;
    rustix::thread::set_name(c"lc-monitor")?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    rustix::io::write(lock, format!("{}\n", std::process::id()).as_bytes())?;
    let mut notes = Vec::new();
    if let Err(error) = cgroup::leave_the_agents_group() {
        notes.push(format!("the monitor stays in the agent's control group: {error}"));
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE) {
        notes.push(format!("the monitor's oom_score_adj stays as it is: {error}"));
    }
    Ok(notes)
}

/// SIGTERM stops the container in order; what terminals send is ignored.
fn take_signals() -> nix::Result<SignalFd> {
    let taken: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    taken.thread_block()?;
    SignalFd::with_flags(&taken, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
