//! Starts containers: the directory, the monitor, and the wait for the exec barrier.

use std::fs::{self, DirBuilder, File};
use std::io::{self, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::{FlockOperation, MemfdFlags, memfd_create};

use super::adopt::clear;
use super::control::{Reply, Request, Status, line};
use super::handle::{Handle, OnEnd, REPLY_TIMEOUT, read_reply};
use super::sockets::{HeldSockets, send_with};
use super::{ContainerError, LOCK_FILE, SPEC_FILE, Spec, file_errors, valid_id, write_json};
use crate::paths::RunDirs;

/// The byte that held sockets come with: a monitor reads it before any request.
const SOCKETS: &[u8] = b"s";

/// Makes a container and brings it to its exec barrier, with this program as its monitor. `sockets` are those of its spec,
/// as [`super::sockets::obtain`] gave them.
///
/// # Errors
/// As [`create_with`].
pub fn create(
    dirs: &RunDirs,
    spec: &Spec,
    sockets: &HeldSockets,
    on_end: OnEnd,
) -> Result<Handle, ContainerError> {
    create_with(Path::new("/proc/self/exe"), dirs, spec, sockets, on_end)
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
    sockets: &HeldSockets,
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
    let started = start(program, &dir, spec, sockets);
    if started.is_err() {
        clear(&spec.id, &dir)?;
    }
    let (child, stream, status) = started?;
    Handle::new(spec.clone(), dir, status, stream, Some(child), on_end)
}

/// Starts the monitor with one end of a socket pair as its first client and waits for the barrier.
fn start(
    program: &Path,
    dir: &Path,
    spec: &Spec,
    sockets: &HeldSockets,
) -> Result<(Child, UnixStream, Status), ContainerError> {
    let file_error = file_errors(&spec.id);
    let path = dir.join(LOCK_FILE);
    let lock = File::create(&path).map_err(|source| file_error("make", path, source))?;
    let monitor_error =
        |what, source| ContainerError::Monitor { id: spec.id.clone(), what, source };
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|source| monitor_error("cannot be locked for", source.into()))?;
    let path = dir.join(SPEC_FILE);
    write_json(&path, spec).map_err(|source| file_error("write", path, source))?;
    let files = in_memory(spec).map_err(|source| monitor_error("cannot be given files", source))?;
    let (mut ours, theirs) =
        UnixStream::pair().map_err(|source| monitor_error("cannot be connected", source))?;
    if !sockets.is_empty() {
        // Before anything else that the monitor reads; they wait in the connection until it does.
        send_with(&ours, SOCKETS, &sockets.descriptors())
            .map_err(|source| monitor_error("cannot be given its sockets", source))?;
    }
    // The lock lives in the open file: the monitor holds it from its first moment, whatever becomes of this process.
    let mut child = Command::new(program)
        .arg("monitor")
        .arg(dir)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(lock))
        .stderr(files.map_or_else(Stdio::null, Stdio::from))
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
        Ok(reply @ (Reply::Sockets { .. } | Reply::Unknown)) => {
            let reason = format!("its monitor gave a strange reply: {reply:?}");
            ContainerError::Refused { id: spec.id.clone(), reason }
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

/// The container's files on a descriptor: no disk and no directory ever has them.
fn in_memory(spec: &Spec) -> io::Result<Option<OwnedFd>> {
    if spec.files.is_empty() {
        return Ok(None);
    }
    let mut file = File::from(memfd_create(c"layercake-files", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(&spec.files)?)?;
    Ok(Some(file.into()))
}
