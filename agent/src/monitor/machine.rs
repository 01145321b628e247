//! What a monitor does about what happens. Pure: events and the time go in, actions come out.
//!
//! ```text
//! starting --ready--> created --release--> releasing --exec--> running --stop--> stopping --+
//!     |                  |                     |                  |                         v
//!     +------------------+------- ended -------+------------------+-------------------> (record)
//! ```

use protocol::node::{ContainerState, ExitStatus};

use super::notify::{Due, Message, Said};
use crate::containers::ExitRecord;
use crate::containers::control::{Reply, Request, Status};

/// Names a client of the control socket.
pub type ClientId = u64;

/// What container-init writes when it stands at the barrier.
pub const READY: &[u8] = b"ready\n";
/// What it writes before the reason why it could not go on.
pub const ERROR: &[u8] = b"error ";

/// SIGABRT: what a program gets that starves its watchdog, so that it leaves a core.
const SIGABRT: i32 = 6;
/// Nanoseconds from that to SIGKILL.
const ABORT_TIME_NS: u64 = 1_000_000_000;

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes from container-init.
    Status(&'a [u8]),
    /// container-init's status pipe was closed: by the exec, or by its end.
    StatusClosed,
    /// A client asks.
    Request(ClientId, Request),
    /// The program says something of itself.
    Notify(Message),
    /// A client is gone.
    Gone(ClientId),
    /// Somebody wants the container stopped with its own signal and timeout (SIGTERM to the monitor).
    Terminate,
    /// Time has passed.
    Tick,
}

/// Something is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Let container-init pass the barrier.
    OpenBarrier,
    /// Send the container's first process a signal.
    Signal(i32),
    /// Kill everything in the container.
    KillAll,
    /// Answer a client.
    Reply(ClientId, Reply),
    /// Answer a client and close its connection.
    LastReply(ClientId, Reply),
    /// Give a client the held sockets and close its connection.
    Sockets(ClientId),
}

/// A container as its monitor knows it.
#[derive(Debug)]
pub struct Machine {
    pid: u32,
    notes: Vec<String>,
    stop_signal: i32,
    stop_timeout_ns: u64,
    step: Step,
    exec_at_ns: Option<u64>,
    said: Vec<u8>,
    asked: bool,
    kill_at_ns: Option<u64>,
    word: Said,
    /// Milliseconds of the watchdog that was missed.
    starved_ms: Option<u64>,
    watchdog_ms: Option<u32>,
    watching: Vec<ClientId>,
    releasing: Vec<ClientId>,
    stopping: Vec<ClientId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Starting,
    Created,
    Releasing,
    Running,
    Stopping,
}

/// Most bytes of container-init's words that are kept.
const MAX_SAID: usize = 4096;

impl Machine {
    /// A container that was just cloned.
    #[must_use]
    pub fn new(pid: u32, notes: Vec<String>, stop_signal: i32, stop_timeout_s: u32) -> Self {
        Self {
            pid,
            notes,
            stop_signal,
            stop_timeout_ns: u64::from(stop_timeout_s) * 1_000_000_000,
            step: Step::Starting,
            exec_at_ns: None,
            said: Vec::new(),
            asked: false,
            kill_at_ns: None,
            word: Said::default(),
            starved_ms: None,
            watchdog_ms: None,
            watching: Vec::new(),
            releasing: Vec::new(),
            stopping: Vec::new(),
        }
    }

    /// Asks the program for a WATCHDOG=1 at least that often.
    #[must_use]
    pub fn with_watchdog(mut self, watchdog_ms: Option<u32>) -> Self {
        self.word = Said::new(watchdog_ms.map(|ms| u64::from(ms) * 1_000_000));
        self.watchdog_ms = watchdog_ms;
        self
    }

    /// When [`Event::Tick`] is due.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        self.kill_at_ns.into_iter().chain(self.word.deadline_ns()).min()
    }

    /// Takes an event at a time (nanoseconds of CLOCK_BOOTTIME) and says what to do.
    pub fn handle(&mut self, event: Event<'_>, now_ns: u64) -> Vec<Action> {
        match event {
            Event::Status(bytes) => self.status_bytes(bytes),
            Event::StatusClosed => self.status_closed(now_ns),
            Event::Request(client, request) => self.request(client, request, now_ns),
            Event::Gone(client) => {
                for list in [&mut self.watching, &mut self.releasing, &mut self.stopping] {
                    list.retain(|known| *known != client);
                }
                Vec::new()
            }
            Event::Terminate => self.stop(self.stop_signal, self.stop_timeout_ns, now_ns),
            Event::Notify(message) => self.notify(&message, now_ns),
            Event::Tick => self.tick(now_ns),
        }
    }

    fn tick(&mut self, now_ns: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.kill_at_ns.is_some_and(|at| at <= now_ns) {
            self.kill_at_ns = None;
            actions.push(Action::KillAll);
        }
        match self.word.due(now_ns) {
            Some(Due::Starved) => {
                self.starved_ms = Some(self.watchdog_ms.unwrap_or_default().into());
                self.kill_at_ns = Some(now_ns.saturating_add(ABORT_TIME_NS));
                actions.push(Action::Signal(SIGABRT));
            }
            Some(Due::Tell) => actions.extend(self.tell_watching()),
            None => {}
        }
        actions
    }

    fn notify(&mut self, message: &Message, now_ns: u64) -> Vec<Action> {
        let tell = self.word.take(message, now_ns);
        if self.step == Step::Stopping {
            self.word.rest();
        }
        if tell { self.tell_watching() } else { Vec::new() }
    }

    fn tell_watching(&self) -> Vec<Action> {
        self.watching.iter().map(|client| Action::Reply(*client, self.status())).collect()
    }

    /// The container's first process has ended: how, for the record.
    #[must_use]
    pub fn ended(&self, code: Option<i32>, signal: Option<i32>, now_ns: u64) -> ExitRecord {
        let ran = self.exec_at_ns.is_some();
        let error = match self.said.strip_prefix(ERROR) {
            Some(text) if !ran => Some(String::from_utf8_lossy(text).trim_end().to_owned()),
            _ if !ran && !self.asked => {
                Some("its container-init died before the program was executed".to_owned())
            }
            _ => None,
        };
        if let (Some(ms), None) = (self.starved_ms, &error) {
            let text = format!("watchdog: it sent no WATCHDOG=1 for {ms} ms");
            return ExitRecord {
                status: ExitStatus { code, signal, error: Some(text) },
                ended_at_ns: now_ns,
                exec_at_ns: self.exec_at_ns,
                asked: self.asked,
                log_dropped_bytes: 0,
            };
        }
        let (code, signal) = if error.is_some() { (None, None) } else { (code, signal) };
        ExitRecord {
            status: ExitStatus { code, signal, error },
            ended_at_ns: now_ns,
            exec_at_ns: self.exec_at_ns,
            asked: self.asked,
            log_dropped_bytes: 0,
        }
    }

    /// Those who asked for the stop, or for a release that cannot come any more: the end itself is their answer.
    pub fn take_askers(&mut self) -> Vec<ClientId> {
        let mut askers = std::mem::take(&mut self.stopping);
        askers.append(&mut self.releasing);
        askers
    }

    /// Those who watch: they are told when the record is complete.
    #[must_use]
    pub fn watching(&self) -> &[ClientId] {
        &self.watching
    }

    fn status(&self) -> Reply {
        let state = match self.step {
            Step::Starting | Step::Created | Step::Releasing => ContainerState::Created,
            Step::Running => ContainerState::Running,
            Step::Stopping => ContainerState::Stopping,
        };
        let notes = self.notes.clone();
        Reply::Status(Status {
            state,
            pid: self.pid,
            exec_at_ns: self.exec_at_ns,
            ready_at_ns: self.word.ready_at_ns,
            stopping: self.word.stopping,
            text: self.word.text.clone(),
            notes,
        })
    }

    fn status_bytes(&mut self, bytes: &[u8]) -> Vec<Action> {
        let room = MAX_SAID.saturating_sub(self.said.len());
        self.said.extend(bytes.iter().take(room));
        if self.step != Step::Starting || !self.said.starts_with(READY) {
            return Vec::new();
        }
        self.said.drain(..READY.len());
        self.step = Step::Created;
        self.tell_watching()
    }

    fn status_closed(&mut self, now_ns: u64) -> Vec<Action> {
        let executed = self.step == Step::Releasing && !self.said.starts_with(ERROR);
        if !executed {
            return Vec::new();
        }
        self.exec_at_ns = Some(now_ns);
        self.step = Step::Running;
        let waiting = std::mem::take(&mut self.releasing);
        waiting.into_iter().map(|client| Action::LastReply(client, self.status())).collect()
    }

    fn request(&mut self, client: ClientId, request: Request, now_ns: u64) -> Vec<Action> {
        match request {
            Request::Watch => {
                self.watching.push(client);
                match self.step {
                    Step::Starting => Vec::new(),
                    _ => vec![Action::Reply(client, self.status())],
                }
            }
            Request::Status => vec![Action::LastReply(client, self.status())],
            Request::Sockets => vec![Action::Sockets(client)],
            Request::Release => self.release(client),
            Request::Kill { signal } => {
                vec![Action::Signal(signal), Action::LastReply(client, self.status())]
            }
            Request::Stop { signal, timeout_ms } => {
                self.stopping.push(client);
                self.stop(signal, timeout_ms.saturating_mul(1_000_000), now_ns)
            }
        }
    }

    fn release(&mut self, client: ClientId) -> Vec<Action> {
        let refuse =
            |text: &str| vec![Action::LastReply(client, Reply::Error { message: text.to_owned() })];
        match self.step {
            Step::Starting => refuse("it is not at its exec barrier yet"),
            Step::Stopping => refuse("it is being stopped"),
            Step::Running => vec![Action::LastReply(client, self.status())],
            Step::Releasing => {
                self.releasing.push(client);
                Vec::new()
            }
            Step::Created => {
                self.step = Step::Releasing;
                self.releasing.push(client);
                vec![Action::OpenBarrier]
            }
        }
    }

    /// Before the exec there is no program to ask. A later stop may shorten the time, never lengthen it.
    fn stop(&mut self, signal: i32, timeout_ns: u64, now_ns: u64) -> Vec<Action> {
        self.asked = true;
        self.word.rest();
        let ran = self.exec_at_ns.is_some();
        self.step = Step::Stopping;
        if !ran || timeout_ns == 0 {
            return vec![Action::KillAll];
        }
        let at = now_ns.saturating_add(timeout_ns);
        self.kill_at_ns = Some(self.kill_at_ns.map_or(at, |known| known.min(at)));
        vec![Action::Signal(signal)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn created() -> Machine {
        let mut machine = Machine::new(7, vec!["note".to_owned()], 15, 10);
        assert_eq!(machine.handle(Event::Request(1, Request::Watch), 0), []);
        assert_eq!(machine.handle(Event::Status(b"rea"), 1), []);
        let actions = machine.handle(Event::Status(b"dy\n"), 2);
        assert!(matches!(&actions[..], [Action::Reply(1, Reply::Status(status))]
            if status.state == ContainerState::Created && status.pid == 7));
        machine
    }

    fn running() -> Machine {
        let mut machine = created();
        assert_eq!(machine.handle(Event::Request(2, Request::Release), 3), [Action::OpenBarrier]);
        let actions = machine.handle(Event::StatusClosed, 4);
        assert!(matches!(&actions[..], [Action::LastReply(2, Reply::Status(status))]
            if status.exec_at_ns == Some(4) && status.state == ContainerState::Running));
        machine
    }

    #[test]
    fn a_program_runs_from_the_moment_its_status_pipe_closes() {
        let record = running().ended(Some(3), None, 9);
        assert_eq!((record.exec_at_ns, record.ended_at_ns), (Some(4), 9));
        assert_eq!((record.status.code, record.status.error, record.asked), (Some(3), None, false));
    }

    #[test]
    fn a_setup_that_fails_ends_with_its_own_sentence() {
        let mut machine = Machine::new(7, Vec::new(), 15, 10);
        machine.handle(Event::Request(1, Request::Watch), 0);
        machine.handle(Event::Status(b"error mount /proc: EPERM\n"), 1);
        assert_eq!(machine.handle(Event::StatusClosed, 2), []);
        let record = machine.ended(Some(1), None, 3);
        assert_eq!(record.status.error.as_deref(), Some("mount /proc: EPERM"));
        assert_eq!((record.status.code, record.exec_at_ns), (None, None));
        assert_eq!(machine.watching(), [1]);
    }

    #[test]
    fn a_program_that_cannot_be_executed_ends_with_its_own_sentence() {
        let mut machine = created();
        machine.handle(Event::Request(2, Request::Release), 3);
        machine.handle(Event::Status(b"error exec nope: not found\n"), 4);
        assert_eq!(machine.handle(Event::StatusClosed, 5), []);
        assert_eq!((machine.take_askers(), machine.watching()), (vec![2], &[1][..]));
        let record = machine.ended(Some(127), None, 6);
        assert_eq!(record.status.error.as_deref(), Some("exec nope: not found"));
    }

    #[test]
    fn a_stop_signals_then_kills_and_a_later_one_only_shortens() {
        let mut machine = running();
        let stop = |timeout_ms| Request::Stop { signal: 2, timeout_ms };
        assert_eq!(machine.handle(Event::Request(3, stop(10)), 100), [Action::Signal(2)]);
        assert_eq!(machine.deadline_ns(), Some(10_000_100));
        assert_eq!(machine.handle(Event::Request(4, stop(1000)), 100), [Action::Signal(2)]);
        assert_eq!(machine.deadline_ns(), Some(10_000_100));
        assert_eq!(machine.handle(Event::Tick, 10_000_099), []);
        assert_eq!(machine.handle(Event::Tick, 10_000_100), [Action::KillAll]);
        assert_eq!(machine.handle(Event::Tick, 10_000_101), []);
        assert_eq!(machine.handle(Event::Gone(3), 10_000_101), []);
        assert_eq!((machine.take_askers(), machine.watching()), (vec![4], &[1][..]));
        assert!(machine.take_askers().is_empty(), "each is told once");
        assert!(machine.ended(None, Some(9), 5).asked);
    }

    #[test]
    fn a_stop_at_the_barrier_kills_at_once_and_is_no_error() {
        let mut machine = created();
        assert_eq!(machine.handle(Event::Terminate, 5), [Action::KillAll]);
        assert_eq!(machine.ended(None, Some(9), 6).status.error, None);
        let refused = machine.handle(Event::Request(5, Request::Release), 7);
        assert!(matches!(&refused[..], [Action::LastReply(5, Reply::Error { .. })]));
    }

    #[test]
    fn what_a_program_says_is_told_to_those_who_watch() {
        let mut machine = running();
        let ready = Message { ready: true, text: Some("up".to_owned()), ..Message::default() };
        let actions = machine.handle(Event::Notify(ready), 9);
        assert!(matches!(&actions[..], [Action::Reply(1, Reply::Status(status))]
            if status.ready_at_ns == Some(9) && status.text.as_deref() == Some("up")));
        assert_eq!(machine.handle(Event::Request(8, Request::Sockets), 10), [Action::Sockets(8)]);
    }

    #[test]
    fn a_starved_watchdog_aborts_then_kills_and_says_so() {
        let mut machine = running().with_watchdog(Some(5));
        let ready = Message { ready: true, ..Message::default() };
        machine.handle(Event::Notify(ready), 10);
        assert_eq!(machine.deadline_ns(), Some(5_000_010));
        assert_eq!(machine.handle(Event::Tick, 5_000_010), [Action::Signal(SIGABRT)]);
        assert_eq!(machine.handle(Event::Tick, 1_005_000_010), [Action::KillAll]);
        let record = machine.ended(None, Some(9), 1_005_000_011);
        assert_eq!(
            record.status.error.as_deref(),
            Some("watchdog: it sent no WATCHDOG=1 for 5 ms")
        );
        assert_eq!((record.status.signal, record.asked), (Some(9), false));
        let mut machine = running().with_watchdog(Some(5));
        machine.handle(Event::Notify(Message { ready: true, ..Message::default() }), 10);
        machine.handle(Event::Request(3, Request::Stop { signal: 15, timeout_ms: 60_000 }), 11);
        machine.handle(Event::Notify(Message { alive: true, ..Message::default() }), 12);
        assert_eq!(machine.handle(Event::Tick, 100_000_000), [], "one that drains may be busy");
    }

    #[test]
    fn a_second_release_is_answered_like_the_first() {
        let mut machine = running();
        let again = machine.handle(Event::Request(6, Request::Release), 50);
        assert!(
            matches!(&again[..], [Action::LastReply(6, Reply::Status(s))] if s.exec_at_ns == Some(4))
        );
    }
}
