//! Finds the containers of an earlier agent, and takes away what ended ones leave.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::node::ExitStatus;
use rustix::fs::FlockOperation;

use super::cgroup::Cgroup;
use super::control::{Reply, Request, line};
use super::handle::{Handle, OnEnd, REPLY_TIMEOUT, read_reply};
use super::{
    ContainerError, EXIT_FILE, ExitRecord, LOCK_FILE, SOCKET_FILE, SPEC_FILE, Spec, boottime_ns,
    file_errors, read_json, valid_id, write_json,
};
use crate::paths::RunDirs;

/// Times that a directory is tried to be removed while somebody writes into it.
const MAX_REMOVALS: u32 = 16;

/// Longest time until a monitor that lives has made its socket.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between looks for that socket.
const SOCKET_PAUSE: Duration = Duration::from_millis(10);

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

/// Finds the containers that an earlier agent started.
///
/// A container whose monitor is gone without an exit record was killed with it; its record says so. Directories of
/// containers that never came to life are removed. To be called once, before anything is created.
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
            Ok((_, reply)) => log::warn!("container {id}: a strange reply: {reply:?}"),
            Err(error) if dir.join(EXIT_FILE).exists() || !monitor_lives(dir) => {
                log::debug!("container {id} ended while it was being adopted: {error}");
            }
            Err(error) => {
                log::warn!("container {id}: its monitor does not answer ({error}) and is killed");
                kill_monitor(id, dir);
            }
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
pub(super) fn kill_monitor(id: &str, dir: &Path) {
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
pub(super) fn monitor_lives(dir: &Path) -> bool {
    File::open(dir.join(LOCK_FILE)).is_ok_and(|file| {
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
            == Err(rustix::io::Errno::WOULDBLOCK)
    })
}

/// The exit record, or one that says that the monitor died without leaving it, written for the next reader.
pub(super) fn record_of_the_dead(dir: &Path) -> ExitRecord {
    let path = dir.join(EXIT_FILE);
    read_json(&path).unwrap_or_else(|_| {
        let record = lost();
        if let Err(error) = write_json(&path, &record) {
            log::warn!("cannot write {}: {error}", path.display());
        }
        record
    })
}

/// For a container whose monitor ended without leaving a record: the kernel killed the container with it.
fn lost() -> ExitRecord {
    let error = "its monitor died, and it was killed with it".to_owned();
    ExitRecord {
        status: ExitStatus { code: None, signal: None, error: Some(error) },
        ended_at_ns: boottime_ns(),
        exec_at_ns: None,
        asked: false,
        log_dropped_bytes: 0,
    }
}

/// Kills what is left and removes the control group and the directory.
pub(super) fn clear(id: &str, dir: &Path) -> Result<(), ContainerError> {
    let file_error = file_errors(id);
    if let Some(group) = Cgroup::find(id) {
        if let Err(error) = group.kill() {
            log::debug!("container {id}: cgroup.kill: {error}");
        }
        group.remove().map_err(|source| file_error("remove", group.path().to_owned(), source))?;
    }
    // Whoever asks the container how it is may be writing that down this very moment: what appears in between goes, too.
    let mut removed = fs::remove_dir_all(dir);
    for _ in 0..MAX_REMOVALS {
        match &removed {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            _ => break,
        }
        removed = fs::remove_dir_all(dir);
    }
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| file_error("remove", dir.to_owned(), source)),
    }
}
