//! Handles: asking a container's monitor for things, and being told of its end.
//!
//! A handle holds no descriptor that the container depends on: dropping it, or dying, changes nothing for the container.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::node::ContainerState;

use super::adopt::{clear, kill_monitor, monitor_lives, record_of_the_dead};
use super::cgroup::Cgroup;
use super::control::{MAX_LINE, Reply, Request, Status, line};
use super::sockets::{HeldSockets, receive_with};
use super::{ContainerError, EXIT_FILE, ExitRecord, SOCKET_FILE, Spec, read_json};

/// Longest time from starting a monitor to its container standing at the exec barrier, and of any quick reply.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a monitor may take to tell of a death it has brought about: it answers in a millisecond.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// How long a monitor that was killed may take to be gone, and the pause between two looks.
const FORCE_TIMEOUT: Duration = Duration::from_secs(10);
const FORCE_PAUSE: Duration = Duration::from_millis(2);
/// Stack of a thread that waits for a container's end: it parses one line.
const WATCH_STACK: usize = 256 << 10;

/// Called once when a container has ended, on a thread of its own, with its id and how it ended.
pub type OnEnd = Arc<dyn Fn(&str, ExitRecord) + Send + Sync>;

/// Called whenever a container's program has said something new of itself, with its id and how it stands.
pub type OnStatus = Box<dyn Fn(&str, &Status) + Send>;

/// A container whose monitor lives, or lived when the handle was made. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    inner: Arc<Inner>,
}

struct Inner {
    spec: Spec,
    dir: PathBuf,
    pid: u32,
    notes: Vec<String>,
    /// Its monitor has said that it is dead; the record may still be to come.
    dead: AtomicBool,
    ended: Mutex<Option<ExitRecord>>,
    changed: Condvar,
    told: Mutex<Told>,
}

/// The last that the monitor told of itself, and who wants to know.
struct Told {
    status: Status,
    listener: Option<OnStatus>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("id", &self.spec.id).field("pid", &self.pid).finish()
    }
}

/// A container that passed its exec barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Released {
    /// Process id on the node.
    pub pid: u32,
    /// When the program was executed, nanoseconds of CLOCK_BOOTTIME.
    pub exec_at_ns: u64,
}

impl Handle {
    pub(super) fn new(
        spec: Spec,
        dir: PathBuf,
        status: Status,
        stream: UnixStream,
        child: Option<Child>,
        on_end: OnEnd,
    ) -> Result<Self, ContainerError> {
        let inner = Arc::new(Inner {
            spec,
            dir,
            pid: status.pid,
            notes: status.notes.clone(),
            dead: AtomicBool::new(false),
            ended: Mutex::new(None),
            changed: Condvar::new(),
            told: Mutex::new(Told { status, listener: None }),
        });
        let watched = Arc::clone(&inner);
        std::thread::Builder::new()
            .name(format!("watch {}", inner.spec.id))
            .stack_size(WATCH_STACK)
            .spawn(move || watched.watch(stream, child, &on_end))
            .map_err(|source| inner.monitor_error("cannot be watched", source))?;
        Ok(Self { inner })
    }

    /// What it is.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.inner.spec
    }

    /// Its directory on the node.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// How it stood when its monitor last told of itself, without asking.
    #[must_use]
    pub fn last_status(&self) -> Status {
        self.inner.told.lock().unwrap_or_else(PoisonError::into_inner).status.clone()
    }

    /// Process id on the node of its first process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.inner.pid
    }

    /// What could not be had on this machine, one sentence each (`limits_unavailable: …`).
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.inner.notes
    }

    /// How it stands, asked of its monitor.
    #[must_use]
    pub fn state(&self) -> ContainerState {
        match self.inner.request(&Request::Status, REPLY_TIMEOUT) {
            Ok(Reply::Status(status)) => status.state,
            Ok(Reply::Ended(record)) => record.state(),
            Ok(_) | Err(_) => self.ended().map_or(ContainerState::Dead, |record| record.state()),
        }
    }

    /// Calls this with what its program has said of itself so far, and whenever that changes until it ends, on the thread that
    /// waits for its end. Whoever was called before is not any more.
    pub fn on_status(&self, listener: OnStatus) {
        let mut told = self.inner.told.lock().unwrap_or_else(PoisonError::into_inner);
        listener(&self.inner.spec.id, &told.status);
        told.listener = Some(listener);
    }

    /// Its held sockets, asked of its monitor, which keeps them while the container lives.
    ///
    /// # Errors
    /// [`ContainerError::Monitor`] or [`ContainerError::Refused`] when the monitor does not hand them out.
    pub fn sockets(&self) -> Result<HeldSockets, ContainerError> {
        let inner = &self.inner;
        if inner.spec.sockets.is_empty() {
            return Ok(HeldSockets::default());
        }
        let asked = (|| {
            let mut stream = UnixStream::connect(inner.dir.join(SOCKET_FILE))?;
            stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
            stream.write_all(&line(&Request::Sockets))?;
            let (begun, descriptors) = receive_with(&stream, MAX_LINE)?;
            let reply = read_reply(&mut BufReader::new(begun.as_slice().chain(stream)))?;
            Ok((reply, descriptors))
        })();
        let (reply, descriptors) =
            asked.map_err(|source| inner.monitor_error("does not hand out its sockets", source))?;
        match reply {
            Reply::Sockets { .. } => HeldSockets::of(&inner.spec.sockets, descriptors)
                .ok_or_else(|| inner.refused(reply)),
            Reply::Ended(record) => Err(inner.ended_error(record)),
            reply => Err(inner.refused(reply)),
        }
    }

    /// When its program was executed, nanoseconds of CLOCK_BOOTTIME; none before.
    #[must_use]
    pub fn exec_at_ns(&self) -> Option<u64> {
        match self.inner.request(&Request::Status, REPLY_TIMEOUT) {
            Ok(Reply::Status(status)) => status.exec_at_ns,
            Ok(Reply::Ended(record)) => record.exec_at_ns,
            Ok(_) | Err(_) => self.ended().and_then(|record| record.exec_at_ns),
        }
    }

    /// Lets it pass the exec barrier and waits until its program runs.
    ///
    /// # Errors
    /// [`ContainerError::Refused`] with the reason when the program cannot be executed; the container has ended then.
    pub fn release(&self) -> Result<Released, ContainerError> {
        match self.inner.request(&Request::Release, REPLY_TIMEOUT)? {
            Reply::Status(Status { pid, exec_at_ns: Some(exec_at_ns), .. }) => {
                Ok(Released { pid, exec_at_ns })
            }
            Reply::Ended(record) => Err(self.inner.ended_error(record)),
            reply => Err(self.inner.refused(reply)),
        }
    }

    /// Asks it to end with its own stop signal, kills it after its own timeout, and returns as soon as it is dead: the bytes
    /// dropped from its log are counted only in the record that comes to those who watch.
    ///
    /// # Errors
    /// [`ContainerError::Monitor`] when the monitor neither answers nor can be killed: the container may run on then.
    pub fn stop(&self) -> Result<ExitRecord, ContainerError> {
        let spec = &self.inner.spec;
        self.stop_with(spec.stop_signal, Duration::from_secs(spec.stop_timeout_s.into()))
    }

    /// As [`Self::stop`], with another signal and timeout. A container whose monitor does not answer is ended through its
    /// control group, and the monitor with it.
    ///
    /// # Errors
    /// As [`Self::stop`].
    pub fn stop_with(&self, signal: i32, timeout: Duration) -> Result<ExitRecord, ContainerError> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let request = Request::Stop { signal, timeout_ms };
        match self.inner.request(&request, timeout.saturating_add(STOP_PATIENCE)) {
            Ok(Reply::Ended(record)) => Ok(record),
            Ok(reply) => Err(self.inner.refused(reply)),
            // Whatever came over its monitor: a container that was to stop must not run on beside its successor.
            Err(error) => self.inner.end_by_force(error),
        }
    }

    /// Sends it a signal and nothing else.
    ///
    /// # Errors
    /// [`ContainerError::Ended`] when it has ended.
    pub fn kill(&self, signal: i32) -> Result<(), ContainerError> {
        match self.inner.request(&Request::Kill { signal }, REPLY_TIMEOUT)? {
            Reply::Status(_) => Ok(()),
            Reply::Ended(record) => Err(self.inner.ended_error(record)),
            reply => Err(self.inner.refused(reply)),
        }
    }

    /// How it ended; none while it lives.
    #[must_use]
    pub fn ended(&self) -> Option<ExitRecord> {
        self.inner.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for its end; none when the time is over before.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<ExitRecord> {
        let guard = self.inner.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let (guard, _) = self
            .inner
            .changed
            .wait_timeout_while(guard, timeout, |ended| ended.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        guard.clone()
    }

    /// Takes away its control group and its directory. The log stays. After a stop or a failed release this waits for the
    /// monitor, which writes the last of the log and the record behind its answer.
    ///
    /// # Errors
    /// [`ContainerError::NotEnded`] while it lives.
    pub fn remove(&self) -> Result<(), ContainerError> {
        let inner = &self.inner;
        let patience = match inner.dead.load(Ordering::Relaxed) {
            true => REPLY_TIMEOUT,
            false => Duration::ZERO,
        };
        if self.wait(patience).is_none() && !inner.dir.join(EXIT_FILE).exists() {
            return Err(ContainerError::NotEnded(inner.spec.id.clone()));
        }
        clear(&inner.spec.id, &inner.dir)
    }
}

impl ExitRecord {
    /// Exited when it ended with 0 or was asked to, else Dead.
    #[must_use]
    pub fn state(&self) -> ContainerState {
        let well = self.status.error.is_none() && (self.asked || self.status.code == Some(0));
        if well { ContainerState::Exited } else { ContainerState::Dead }
    }
}

impl Inner {
    /// One request on a connection of its own. Where the monitor has gone, the exit record answers.
    fn request(&self, request: &Request, timeout: Duration) -> Result<Reply, ContainerError> {
        let asked = (|| {
            let mut stream = UnixStream::connect(self.dir.join(SOCKET_FILE))?;
            stream.set_read_timeout(Some(timeout))?;
            stream.write_all(&line(request))?;
            let reply = read_reply(&mut BufReader::new(stream))?;
            if matches!(reply, Reply::Ended(_)) {
                self.dead.store(true, Ordering::Relaxed);
            }
            Ok(reply)
        })();
        asked.or_else(|source| match read_json(&self.dir.join(EXIT_FILE)) {
            Ok(record) => Ok(Reply::Ended(record)),
            Err(_) => match self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone() {
                Some(record) => Ok(Reply::Ended(record)),
                None => Err(self.monitor_error("does not answer", source)),
            },
        })
    }

    /// The thread that waits for the end.
    fn watch(&self, stream: UnixStream, child: Option<Child>, on_end: &OnEnd) {
        let mut reader = BufReader::new(stream);
        let record = loop {
            match read_reply(&mut reader) {
                Ok(Reply::Ended(record)) => break record,
                Ok(Reply::Status(status)) => self.tell(status),
                Ok(_) => {}
                Err(_) => break record_of_the_dead(&self.dir),
            }
        };
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(record.clone());
        self.changed.notify_all();
        on_end(&self.spec.id, record);
        if let Some(mut child) = child
            && let Err(error) = child.wait()
        {
            log::warn!("container {}: its monitor cannot be waited for: {error}", self.spec.id);
        }
    }

    /// Kills everything in the container's control group, and its monitor, with which the kernel ends the container where
    /// there is no group. Returns when the monitor is gone: its lock says so.
    fn end_by_force(&self, why: ContainerError) -> Result<ExitRecord, ContainerError> {
        log::error!("{}: ended by force", crate::agent::chain(&why));
        if let Some(group) = Cgroup::find(&self.spec.id)
            && let Err(error) = group.kill()
        {
            log::warn!("container {}: cgroup.kill: {error}", self.spec.id);
        }
        kill_monitor(&self.spec.id, &self.dir);
        let until = Instant::now() + FORCE_TIMEOUT;
        while monitor_lives(&self.dir) {
            if Instant::now() >= until {
                return Err(why);
            }
            std::thread::sleep(FORCE_PAUSE);
        }
        self.dead.store(true, Ordering::Relaxed);
        Ok(record_of_the_dead(&self.dir))
    }

    fn tell(&self, status: Status) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.status = status;
        if let Some(listener) = &told.listener {
            listener(&self.spec.id, &told.status);
        }
    }

    fn monitor_error(&self, what: &'static str, source: io::Error) -> ContainerError {
        ContainerError::Monitor { id: self.spec.id.clone(), what, source }
    }

    fn ended_error(&self, record: ExitRecord) -> ContainerError {
        match &record.status.error {
            Some(reason) => {
                ContainerError::Refused { id: self.spec.id.clone(), reason: reason.clone() }
            }
            None => ContainerError::Ended { id: self.spec.id.clone(), record: Box::new(record) },
        }
    }

    fn refused(&self, reply: Reply) -> ContainerError {
        let reason = match reply {
            Reply::Error { message } => message,
            other => format!("its monitor gave a strange reply: {other:?}"),
        };
        ContainerError::Refused { id: self.spec.id.clone(), reason }
    }
}

pub(crate) fn read_reply(reader: &mut impl BufRead) -> io::Result<Reply> {
    let mut text = Vec::new();
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
    reader.take(limit).read_until(b'\n', &mut text)?;
    if text.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"));
    }
    serde_json::from_slice(&text).map_err(io::Error::from)
}
