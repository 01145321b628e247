//! container-init: the first process of a container until it becomes the container's program.
//!
//! The monitor clones it into its namespaces and executes this program anew in it, so that it runs with one thread and clean
//! memory. It builds the container's view of the files (`mounts`), becomes the user it should be ([`users`],
//! [`privileges`]), says `ready`, waits at the exec barrier and executes the program (`exec`). It leaves no process behind.
//!
//! | descriptor | is |
//! |---|---|
//! | 0 | /dev/null |
//! | 1, 2 | the log pipe |
//! | from 3 | the held sockets, N of them, where the program looks for them (sd_listen_fds(3)) |
//! | 3 + N | the barrier: a byte lets it pass; when it closes, the monitor is dead |
//! | 4 + N | status: `ready`, or `error` and a sentence; closed by the exec |
//! | 5 + N | its spec |
//! | 6 + N | files that are put over the image's: JSON, or nothing |
//! | 7 + N | the terminal that becomes /dev/console, when the program is systemd |
//! | 8 + N | the socket for sd_notify(3) as a detached mount, when the program is to speak of itself |
//! | 9 + N | in a user namespace: its root as a detached mount; 10 + N and on: its persistent directories |

mod exec;
pub(crate) mod join;
pub(crate) mod limits;
mod mounts;
mod notify;
pub mod privileges;
mod reaper;
pub mod seccomp;
pub mod users;

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;

use protocol::imageset::Profile;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::Signal;

use crate::containers::Spec;
use crate::containers::files::PlacedFile;
use crate::monitor::machine::{ERROR, READY};
use crate::sys::process::{close_from, inherited_fd};

/// Number of the first held socket's descriptor; what follows is counted from behind the last.
const FIRST_FD: i32 = 3;
/// The barrier's descriptor.
const BARRIER: i32 = 0;
/// The status pipe's.
const STATUS: i32 = 1;
/// The spec's.
const SPEC: i32 = 2;
/// The files'.
const FILES: i32 = 3;
/// The console's.
const CONSOLE: i32 = 4;
/// The notify socket's.
const INBOX: i32 = 5;
/// The root's; what is kept comes behind it.
const ROOT: i32 = 6;
/// Exit code after an error that was told over the status pipe.
const FAILED: i32 = 127;
/// A step that failed. Its text is what the operator reads.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The kernel refused.
    #[error("{step}: {source}")]
    Step {
        /// What was tried, `mount /proc`.
        step: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something in the image cannot be used.
    #[error("the image's {path} {problem}")]
    Image {
        /// The path in the image.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The user cannot be found.
    #[error(transparent)]
    User(#[from] users::UserError),
    /// A capability that this node cannot give.
    #[error("capability {0} is not available on this node")]
    Capability(String),
    /// The capability sets could not be changed.
    #[error("capabilities: {0}")]
    Caps(#[from] caps::errors::CapsError),
    /// The filter of system calls could not be made.
    #[error("seccomp: {0}")]
    Seccomp(#[from] seccompiler::BackendError),
}

/// A shorthand for `map_err`: names the step.
fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> InitError {
    let step = step.into();
    move |source| InitError::Step { step, source: source.into() }
}

/// What the monitor gave, besides the barrier and the status pipe.
#[derive(Debug)]
struct Inherited {
    files: File,
    console: Option<OwnedFd>,
    inbox: OwnedFd,
    root: Option<OwnedFd>,
    kept: Vec<OwnedFd>,
}

impl Inherited {
    /// Takes the descriptors by their numbers.
    fn take(spec: &Spec, base: i32) -> io::Result<Self> {
        let mapped = spec.view.id_base.is_some();
        let kept = spec.view.persistent.iter().filter(|_| mapped).zip(base + ROOT + 1..);
        Ok(Self {
            files: inherited_fd(base + FILES)?.into(),
            console: Some(inherited_fd(base + CONSOLE)?),
            inbox: inherited_fd(base + INBOX)?,
            root: if mapped { Some(inherited_fd(base + ROOT)?) } else { None },
            kept: kept.map(|(_, number)| inherited_fd(number)).collect::<io::Result<_>>()?,
        })
    }

    /// Reads the files and leaves nothing of them behind the descriptor.
    fn files(&self) -> Result<Vec<PlacedFile>, InitError> {
        let read = || {
            let mut file = &self.files;
            let mut bytes = Vec::new();
            // Where there are none it is /dev/null.
            if !file.metadata()?.is_file() {
                return Ok(Vec::new());
            }
            // Who wrote them left the position at the end.
            file.rewind()?;
            file.read_to_end(&mut bytes)?;
            file.set_len(0)?;
            serde_json::from_slice(&bytes).map_err(io::Error::from)
        };
        read().map_err(step::<io::Error>("read its files"))
    }
}

/// Becomes the container. Returns only when it could not, or when the reaper's child has ended; the result is the process's
/// exit code.
///
/// `in_cgroup` says that the process was cloned into the container's own control group, `sockets` how many held sockets it
/// has inherited.
#[must_use]
pub fn run(in_cgroup: bool, sockets: u8) -> i32 {
    let base = FIRST_FD + i32::from(sockets);
    let (Ok(barrier), Ok(status)) = (inherited_fd(base + BARRIER), inherited_fd(base + STATUS))
    else {
        return FAILED;
    };
    let error = match become_container(in_cgroup, base, barrier, &status) {
        Ok(Become::Program(program)) => match program.execute() {
            Err(error) => error,
        },
        Ok(Become::Reaper(reaper)) => {
            drop(status);
            return reaper.watch();
        }
        Err(error) => error,
    };
    let text = error.to_string().replace('\n', " ");
    // When nobody reads this, the monitor is dead, and the next moment this process as well.
    let _ = rustix::io::write(&status, &[ERROR, text.as_bytes(), b"\n"].concat());
    FAILED
}

/// What the process is behind the barrier.
#[derive(Debug)]
enum Become {
    Program(exec::Program),
    Reaper(reaper::Reaper),
}

fn become_container(
    in_cgroup: bool,
    base: i32,
    barrier: OwnedFd,
    status: &OwnedFd,
) -> Result<Become, InitError> {
    die_with_the_monitor()?;
    let spec = read_spec(base).map_err(step::<io::Error>("read its spec"))?;
    let given = Inherited::take(&spec, base).map_err(step::<io::Error>("take its descriptors"))?;
    let last = base + ROOT + i32::try_from(given.kept.len()).unwrap_or_default();
    close_from(last + 1).map_err(step::<io::Error>("close descriptors"))?;
    rustix::process::setsid().map_err(step("setsid"))?;
    rustix::thread::set_name(c"lc-container").map_err(step("set the process's name"))?;
    rustix::process::umask(Mode::empty());
    limits::set(&spec)?;

    mounts::enter(&spec, in_cgroup, &given)?;
    drop(given);
    rustix::system::sethostname(spec.hostname.as_bytes()).map_err(step("set the host name"))?;

    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, "/", flags, Mode::empty()).map_err(step("open its root"))?;
    let user = users::find_in(&root, spec.user.as_deref())?;
    drop(root);
    exec::enter_workdir(&spec.workdir)?;
    let mut program = exec::Program::new(&spec, &user.home)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let capabilities = privileges::of(&spec)?;
    if spec.view.is_filtered() {
        // While CAP_SYS_ADMIN is there: a whole system keeps setuid programs, so that it has no no_new_privs.
        seccomp::apply(spec.profile, &capabilities)?;
    }
    privileges::take(&spec, &capabilities, &user)?;
    if spec.profile == Profile::Service && !spec.view.privileged {
        rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    }
    // A change of credentials clears it (prctl(2)).
    die_with_the_monitor()?;

    // Nothing but the exec is left to do behind the barrier.
    program.prepare()?;
    rustix::io::write(status, READY).map_err(step("tell the monitor"))?;
    wait_at_barrier(barrier)?;
    match spec.view.init {
        false => Ok(Become::Program(program)),
        true => match reaper::split()? {
            Some(reaper) => Ok(Become::Reaper(reaper)),
            None => {
                // The held sockets and the watchdog are this process's, not PID 1's.
                program.tell(&spec)?;
                Ok(Become::Program(program))
            }
        },
    }
}

fn read_spec(base: i32) -> io::Result<Spec> {
    let mut bytes = Vec::new();
    File::from(inherited_fd(base + SPEC)?).read_to_end(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(io::Error::from)
}

fn die_with_the_monitor() -> Result<(), InitError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(step("PR_SET_PDEATHSIG"))
}

/// The pipe's end also covers a monitor that died before the death signal was set.
fn wait_at_barrier(barrier: OwnedFd) -> Result<(), InitError> {
    let mut byte = [0];
    loop {
        match rustix::io::read(&barrier, &mut byte) {
            Ok(0) => {
                let gone = io::Error::new(io::ErrorKind::BrokenPipe, "its monitor is gone");
                return Err(step("wait at the exec barrier")(gone));
            }
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(step("wait at the exec barrier")(error)),
        }
    }
}
