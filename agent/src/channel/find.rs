//! Finds the instance of a container that runs now, by what stands in the run directory: a set may have several during a roll.

use std::fs;
use std::io::{BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use protocol::channel::ContainerPath;
use protocol::node::ContainerState;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::containers::control::{Reply, Request, Status, line};
use crate::containers::{EXIT_FILE, SOCKET_FILE, SPEC_FILE, Spec, read_json, read_reply};
use crate::paths::RunDirs;

/// How long a monitor may take to say how its container stands.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A container that runs.
#[derive(Debug)]
pub(super) struct Running {
    /// What it is.
    pub spec: Spec,
    /// Its first process, which the monitor has not reaped: the descriptor is of that process and no other.
    pub pidfd: OwnedFd,
    /// Its process id on the node.
    pub pid: u32,
}

/// The directories and specs of all instances of a container that have not ended.
pub(super) fn instances(dirs: &RunDirs, path: &ContainerPath) -> Vec<(PathBuf, Spec)> {
    let entries = fs::read_dir(dirs.containers()).into_iter().flatten().flatten();
    let of_path = |spec: &Spec| {
        spec.name == path.name && path.set.as_ref().is_none_or(|set| *set == spec.set)
    };
    entries
        .map(|entry| entry.path())
        .filter(|dir| !dir.join(EXIT_FILE).exists())
        .filter_map(|dir| Some((dir.clone(), read_json::<Spec>(&dir.join(SPEC_FILE)).ok()?)))
        .filter(|(_, spec)| of_path(spec))
        .collect()
}

/// The one that runs.
///
/// # Errors
/// A sentence, when none does, or several sets have one of that name.
pub(super) fn running(dirs: &RunDirs, path: &ContainerPath) -> Result<Running, String> {
    let mut found: Vec<Running> = Vec::new();
    let mut states = Vec::new();
    for (dir, spec) in instances(dirs, path) {
        match open(&dir, spec) {
            Ok(running) => found.push(running),
            Err(state) => states.push(state),
        }
    }
    if let Some(other) =
        found.iter().find(|one| Some(&one.spec.set) != found.first().map(|f| &f.spec.set))
    {
        let first = found.first().map_or(String::new(), |one| one.spec.set.to_string());
        let (set, name) = (&other.spec.set, &path.name);
        return Err(format!(
            "several sets have a container `{name}`: say {first}/{name} or {set}/{name}"
        ));
    }
    // Of two at the end of a roll, the one that started last.
    found.pop().ok_or_else(|| match states.first() {
        Some(state) => format!("container {path} does not run: {state}"),
        None => format!("there is no container {path} on this node now"),
    })
}

/// Asks before and after the descriptor is opened: the process it names then is the container's.
fn open(dir: &std::path::Path, spec: Spec) -> Result<Running, String> {
    let before = ask(dir)?;
    let pid = i32::try_from(before.pid).ok().and_then(Pid::from_raw).ok_or("it has no process")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| error.to_string())?;
    let after = ask(dir)?;
    match after.state {
        ContainerState::Running if after.pid == before.pid => {
            Ok(Running { spec, pidfd, pid: after.pid })
        }
        ContainerState::Created => Err("it waits to be started".to_owned()),
        state => Err(format!("it is {}", format!("{state:?}").to_lowercase())),
    }
}

fn ask(dir: &std::path::Path) -> Result<Status, String> {
    let asked = || {
        let mut stream = UnixStream::connect(dir.join(SOCKET_FILE))?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.write_all(&line(&Request::Status))?;
        read_reply(&mut BufReader::new(&stream))
    };
    match asked() {
        Ok(Reply::Status(status)) => Ok(status),
        Ok(Reply::Ended(_)) => Err("it has ended".to_owned()),
        Ok(Reply::Error { message }) => Err(message),
        Ok(_) => Err("its monitor answers something else".to_owned()),
        Err(error) => Err(format!("its monitor does not answer: {error}")),
    }
}
