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

mod exec;
mod mounts;
mod notify;
pub mod privileges;
pub mod users;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use protocol::imageset::Profile;
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, Signal};

use crate::containers::{SPEC_FILE, Spec, read_json};
use crate::monitor::machine::{ERROR, READY};
use crate::sys::process::{close_from, inherited_fd};

/// Number of the first held socket's descriptor; behind the last come the barrier and the status pipe.
const FIRST_FD: i32 = 3;
/// Exit code after an error that was told over the status pipe.
const FAILED: i32 = 127;
/// Open files a program may ask for; it starts with the traditional limit.
const MAX_OPEN_FILES: u64 = 524_288;
/// What select(2) can take, and what programs expect to start with.
const OPEN_FILES: u64 = 1024;

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
}

/// A shorthand for `map_err`: names the step.
fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> InitError {
    let step = step.into();
    move |source| InitError::Step { step, source: source.into() }
}

/// Becomes the container in this directory. Returns only when it could not; the result is the process's exit code.
///
/// `in_cgroup` says that the process was cloned into the container's own control group, `sockets` how many held sockets it
/// has inherited.
#[must_use]
pub fn run(dir: &Path, in_cgroup: bool, sockets: u8) -> i32 {
    let first = FIRST_FD + i32::from(sockets);
    let (Ok(barrier), Ok(status)) = (inherited_fd(first), inherited_fd(first + 1)) else {
        return FAILED;
    };
    if close_from(first + 2).is_err() {
        return FAILED;
    }
    let Err(error) = become_container(dir, in_cgroup, barrier, &status);
    let text = error.to_string().replace('\n', " ");
    // When nobody reads this, the monitor is dead, and the next moment this process as well.
    let _ = rustix::io::write(&status, &[ERROR, text.as_bytes(), b"\n"].concat());
    FAILED
}

fn become_container(
    dir: &Path,
    in_cgroup: bool,
    barrier: OwnedFd,
    status: &OwnedFd,
) -> Result<std::convert::Infallible, InitError> {
    die_with_the_monitor()?;
    rustix::process::setsid().map_err(step("setsid"))?;
    rustix::thread::set_name(c"lc-container").map_err(step("set the process's name"))?;
    rustix::process::umask(Mode::empty());
    let spec: Spec = read_json(&dir.join(SPEC_FILE)).map_err(step::<io::Error>("read its spec"))?;
    set_limits();

    mounts::enter(&spec, dir, in_cgroup)?;
    rustix::system::sethostname(spec.hostname.as_bytes()).map_err(step("set the host name"))?;

    let user = users::find(spec.user.as_deref())?;
    exec::enter_workdir(&spec.workdir)?;
    let program = exec::Program::new(&spec, &user.home)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    privileges::take(&spec, &user)?;
    if spec.profile == Profile::Service {
        rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    }
    // A change of credentials clears it (prctl(2)).
    die_with_the_monitor()?;

    // Nothing but the exec is left to do behind the barrier.
    program.prepare()?;
    rustix::io::write(status, READY).map_err(step("tell the monitor"))?;
    wait_at_barrier(barrier)?;
    program.execute()
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

/// Both are best effort: without CAP_SYS_RESOURCE a limit cannot be raised, and what is inherited does as well.
fn set_limits() {
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    let files = Rlimit { current: Some(OPEN_FILES), maximum: Some(MAX_OPEN_FILES) };
    let _ = rustix::process::setrlimit(Resource::Nofile, files);
}
