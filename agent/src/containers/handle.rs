//! Handles: starting monitors, finding those that live, and asking them for things.
//!
//! A handle holds no descriptor that the container depends on: dropping it, or dying, changes nothing for the container.

use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::node::{ContainerState, ExitStatus};
use rustix::fs::FlockOperation;

use super::cgroup::Cgroup;
use super::control::{MAX_LINE, Reply, Request, Status, line};
use super::{
    ContainerError, EXIT_FILE, ExitRecord, LOCK_FILE, SOCKET_FILE, SPEC_FILE, Spec, boottime_ns,
    read_json, valid_id, write_json,
};
use crate::paths::RunDirs;

/// Longest time from starting a monitor to its container standing at the exec barrier, and of any quick reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time until a monitor that lives has made its socket.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between looks for that socket.
const SOCKET_PAUSE: Duration = Duration::from_millis(10);
/// Stack of a thread that waits for a container's end: it parses one line.
const WATCH_STACK: usize = 256 << 10;

/// Called once when a container has ended, on a thread of its own, with its id and how it ended.
pub type OnEnd = Arc<dyn Fn(&str, ExitRecord) + Send + Sync>;

/// A container whose monitor lives, or lived when the handle was made. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    spec: Spec,
    dir: PathBuf,
    pid: u32,
    notes: Vec<String>,
    ended: Mutex<Option<ExitRecord>>,
    changed: Condvar,
}

/// A container that passed its exec barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Released {
    /// Process id on the node.
    pub pid: u32,
    /// When the program was executed, nanoseconds of CLOCK_BOOTTIME.
    pub exec_at_ns: u64,
}

/// What [`adopt`] found in a container's directory.
#[derive(Debug)]
pub enum Adopted {
    /// Its monitor lives.
    Live(Handle),
    /// It ended while no agent looked. [`remove`] takes its directory away.
    Ended {
        /// What it was.
        spec: Box<Spec>,
        /// How it ended.
        exit: ExitRecord,
    },
}

/// Makes a container and brings it to its exec barrier, with this program as its monitor.
///
/// # Errors
/// As [`create_with`].
pub fn create(dirs: &RunDirs, spec: &Spec, on_end: OnEnd) -> Result<Handle, ContainerError> {
    create_with(Path::new("/proc/self/exe"), dirs, spec, on_end)
}

/// As [`create`], with the agent's program at a given path.
///
/// # Errors
/// [`ContainerError::Refused`] with the step that failed (`mount /proc: …`) when the container could not be set up; nothing of
/// it is left then. Other variants for the directory and the monitor itself.
pub fn create_with(
    program: &Path,
    dirs: &RunDirs,
    spec: &Spec,
    on_end: OnEnd,
) -> Result<Handle, ContainerError> {
    if !valid_id(&spec.id) {
        return Err(ContainerError::InvalidId(spec.id.clone()));
    }
    let dir = dirs.containers().join(&spec.id);
    let file_error = file_errors(&spec.id);
    fs::create_dir_all(dirs.containers())
        .map_err(|source| file_error("make", dirs.containers(), source))?;
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(ContainerError::Exists(spec.id.clone()));
        }
        Err(source) => return Err(file_error("make", dir, source)),
        Ok(()) => {}
    }
    let started = start(program, &dir, spec);
    if started.is_err() {
        clear(&spec.id, &dir)?;
    }
    let (child, stream, status) = started?;
    Handle::new(spec.clone(), dir, status, stream, Some(child), on_end)
}

/// Finds the containers that an earlier agent started.
///
/// A container whose monitor is gone without an exit record was killed with it; its record says so. Directories of
/// containers that never came to life are removed.
///
/// # Errors
/// [`ContainerError::File`] when the directory of containers cannot be read. One strange container is logged and passed over.
pub fn adopt(dirs: &RunDirs, on_end: &OnEnd) -> Result<Vec<Adopted>, ContainerError> {
    let file_error = file_errors("*");
    let entries = match fs::read_dir(dirs.containers()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|source| file_error("list", dirs.containers(), source))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| file_error("list", dirs.containers(), source))?;
        let name = entry.file_name();
        let Some(id) = name.to_str().filter(|id| valid_id(id)) else { continue };
        match adopt_one(id, &entry.path(), on_end) {
            Ok(adopted) => found.extend(adopted),
            Err(error) => log::warn!("{error}: not adopted"),
        }
    }
    Ok(found)
}

/// Takes away what is left of an ended container: its control group and its directory. The log stays.
///
/// # Errors
/// [`ContainerError::NotEnded`] while its monitor lives and has not written the exit record.
pub fn remove(dirs: &RunDirs, id: &str) -> Result<(), ContainerError> {
    if !valid_id(id) {
        return Err(ContainerError::InvalidId(id.to_owned()));
    }
    let dir = dirs.containers().join(id);
    if !dir.join(EXIT_FILE).exists() && monitor_lives(&dir) {
        return Err(ContainerError::NotEnded(id.to_owned()));
    }
    clear(id, &dir)
}

impl Handle {
    fn new(
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
            notes: status.notes,
            ended: Mutex::new(None),
            changed: Condvar::new(),
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
            Ok(Reply::Error { .. }) | Err(_) => {
                self.ended().map_or(ContainerState::Dead, |record| record.state())
            }
        }
    }

    /// When its program was executed, nanoseconds of CLOCK_BOOTTIME; none before.
    #[must_use]
    pub fn exec_at_ns(&self) -> Option<u64> {
        match self.inner.request(&Request::Status, REPLY_TIMEOUT) {
            Ok(Reply::Status(status)) => status.exec_at_ns,
            Ok(Reply::Ended(record)) => record.exec_at_ns,
            Ok(Reply::Error { .. }) | Err(_) => self.ended().and_then(|record| record.exec_at_ns),
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

    /// Asks it to end with its own stop signal, kills it after its own timeout, and waits for either.
    ///
    /// # Errors
    /// [`ContainerError::Monitor`] when the monitor does not answer.
    pub fn stop(&self) -> Result<ExitRecord, ContainerError> {
        let spec = &self.inner.spec;
        self.stop_with(spec.stop_signal, Duration::from_secs(spec.stop_timeout_s.into()))
    }

    /// As [`Self::stop`], with another signal and timeout.
    ///
    /// # Errors
    /// As [`Self::stop`].
    pub fn stop_with(&self, signal: i32, timeout: Duration) -> Result<ExitRecord, ContainerError> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let request = Request::Stop { signal, timeout_ms };
        match self.inner.request(&request, timeout.saturating_add(REPLY_TIMEOUT))? {
            Reply::Ended(record) => Ok(record),
            reply => Err(self.inner.refused(reply)),
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
            reply @ Reply::Error { .. } => Err(self.inner.refused(reply)),
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

    /// Takes away its control group and its directory. The log stays.
    ///
    /// # Errors
    /// [`ContainerError::NotEnded`] while it lives.
    pub fn remove(&self) -> Result<(), ContainerError> {
        let inner = &self.inner;
        if self.ended().is_none() && !inner.dir.join(EXIT_FILE).exists() {
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

    /// For a container whose monitor ended without leaving a record: the kernel killed the container with it.
    fn lost() -> Self {
        let error = "its monitor died, and it was killed with it".to_owned();
        Self {
            status: ExitStatus { code: None, signal: None, error: Some(error) },
            ended_at_ns: boottime_ns(),
            exec_at_ns: None,
            asked: false,
            log_dropped_bytes: 0,
        }
    }
}

impl Inner {
    /// One request on a connection of its own. Where the monitor has gone, the exit record answers.
    fn request(&self, request: &Request, timeout: Duration) -> Result<Reply, ContainerError> {
        let asked = (|| {
            let mut stream = UnixStream::connect(self.dir.join(SOCKET_FILE))?;
            stream.set_read_timeout(Some(timeout))?;
            stream.write_all(&line(request))?;
            read_reply(&mut BufReader::new(stream))
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

/// Starts the monitor with one end of a socket pair as its first client and waits for the barrier.
fn start(
    program: &Path,
    dir: &Path,
    spec: &Spec,
) -> Result<(Child, UnixStream, Status), ContainerError> {
    let file_error = file_errors(&spec.id);
    let path = dir.join(SPEC_FILE);
    write_json(&path, spec).map_err(|source| file_error("write", path, source))?;
    let path = dir.join(LOCK_FILE);
    let lock = File::create(&path).map_err(|source| file_error("make", path, source))?;
    let monitor_error =
        |what, source| ContainerError::Monitor { id: spec.id.clone(), what, source };
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|source| monitor_error("cannot be locked for", source.into()))?;
    let (mut ours, theirs) =
        UnixStream::pair().map_err(|source| monitor_error("cannot be connected", source))?;
    // The lock lives in the open file: the monitor holds it from its first moment, whatever becomes of this process.
    let mut child = Command::new(program)
        .arg("monitor")
        .arg(dir)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(lock))
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| monitor_error("cannot be started", source))?;
    let answer = (|| {
        ours.set_read_timeout(Some(REPLY_TIMEOUT))?;
        ours.write_all(&line(&Request::Watch))?;
        let reply = read_reply(&mut BufReader::with_capacity(1, &ours))?;
        ours.set_read_timeout(None)?;
        Ok(reply)
    })();
    let reason = match answer {
        Ok(Reply::Status(status)) => return Ok((child, ours, status)),
        Ok(Reply::Ended(record)) => {
            let reason = record.status.error.unwrap_or_else(|| "it ended at once".to_owned());
            ContainerError::Refused { id: spec.id.clone(), reason }
        }
        Ok(Reply::Error { message }) => {
            ContainerError::Refused { id: spec.id.clone(), reason: message }
        }
        Err(source) => monitor_error("did not bring it to its exec barrier", source),
    };
    for result in [child.kill(), child.wait().map(drop)] {
        if let Err(error) = result {
            log::warn!("container {}: its monitor does not end: {error}", spec.id);
        }
    }
    Err(reason)
}

fn adopt_one(id: &str, dir: &Path, on_end: &OnEnd) -> Result<Option<Adopted>, ContainerError> {
    let file_error = file_errors(id);
    let lives = monitor_lives(dir);
    let path = dir.join(SPEC_FILE);
    let spec: Spec = match read_json(&path) {
        Ok(spec) => spec,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !lives => {
            clear(id, dir)?;
            return Ok(None);
        }
        Err(source) => return Err(file_error("read", path, source)),
    };
    if lives && !dir.join(EXIT_FILE).exists() {
        match connect(dir) {
            Ok((stream, Reply::Status(status))) => {
                let on_end = Arc::clone(on_end);
                let handle = Handle::new(spec, dir.to_owned(), status, stream, None, on_end)?;
                return Ok(Some(Adopted::Live(handle)));
            }
            Ok((_, Reply::Ended(exit))) => {
                return Ok(Some(Adopted::Ended { spec: Box::new(spec), exit }));
            }
            Ok((_, Reply::Error { message })) => log::warn!("container {id}: {message}"),
            Err(error) if dir.join(EXIT_FILE).exists() || !monitor_lives(dir) => {
                log::debug!("container {id} ended while it was being adopted: {error}");
            }
            Err(error) => kill_monitor(id, dir, &error),
        }
    }
    let exit = record_of_the_dead(dir);
    Ok(Some(Adopted::Ended { spec: Box::new(spec), exit }))
}

/// Watches a monitor that lives, which may not have made its socket yet.
fn connect(dir: &Path) -> io::Result<(UnixStream, Reply)> {
    let until = Instant::now() + SOCKET_TIMEOUT;
    loop {
        match UnixStream::connect(dir.join(SOCKET_FILE)) {
            Err(_) if Instant::now() < until && monitor_lives(dir) => {
                std::thread::sleep(SOCKET_PAUSE)
            }
            Err(error) => return Err(error),
            Ok(mut stream) => {
                stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
                stream.write_all(&line(&Request::Watch))?;
                let reply = read_reply(&mut BufReader::with_capacity(1, &stream))?;
                stream.set_read_timeout(None)?;
                return Ok((stream, reply));
            }
        }
    }
}

/// A monitor that holds its lock but does not answer is of no use: it is killed, and its container with it.
fn kill_monitor(id: &str, dir: &Path, why: &io::Error) {
    log::warn!("container {id}: its monitor does not answer ({why}) and is killed");
    let pid = fs::read_to_string(dir.join(LOCK_FILE))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid
        && let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::KILL)
    {
        log::warn!("container {id}: its monitor cannot be killed: {error}");
    }
}

/// Whether somebody holds the monitor's lock.
fn monitor_lives(dir: &Path) -> bool {
    File::open(dir.join(LOCK_FILE)).is_ok_and(|file| {
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
            == Err(rustix::io::Errno::WOULDBLOCK)
    })
}

/// The exit record, or one that says that the monitor died without leaving it, written for the next reader.
fn record_of_the_dead(dir: &Path) -> ExitRecord {
    let path = dir.join(EXIT_FILE);
    read_json(&path).unwrap_or_else(|_| {
        let record = ExitRecord::lost();
        if let Err(error) = write_json(&path, &record) {
            log::warn!("cannot write {}: {error}", path.display());
        }
        record
    })
}

fn clear(id: &str, dir: &Path) -> Result<(), ContainerError> {
    let file_error = file_errors(id);
    if let Some(group) = Cgroup::find(id) {
        if let Err(error) = group.kill() {
            log::debug!("container {id}: cgroup.kill: {error}");
        }
        group.remove().map_err(|source| file_error("remove", group.path().to_owned(), source))?;
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| file_error("remove", dir.to_owned(), source)),
    }
}

fn read_reply(reader: &mut impl BufRead) -> io::Result<Reply> {
    let mut text = Vec::new();
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
    reader.take(limit).read_until(b'\n', &mut text)?;
    if text.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"));
    }
    serde_json::from_slice(&text).map_err(io::Error::from)
}

fn file_errors(id: &str) -> impl Fn(&'static str, PathBuf, io::Error) -> ContainerError + use<> {
    let id = id.to_owned();
    move |action, path, source| ContainerError::File { id: id.clone(), action, path, source }
}
