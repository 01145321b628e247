//! container-exec-init: the child of [`crate::container_exec`], in the container's namespaces and control group already, until
//! it becomes the command.
//!
//! It takes on what the container's own program has: user, capabilities, limits, no_new_privs. It is executed anew so that nothing
//! of the helper's memory is in it.
//!
//! | descriptor | is |
//! |---|---|
//! | 0, 1, 2 | the terminal, or pipes |
//! | 3 | the request; closed by the exec |
//! | 4 | for one sentence when it cannot be done; closed by the exec |

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use protocol::imageset::Profile;
use rustix::fs::Mode;
use rustix::process::DumpableBehavior;

use super::{FAILED, InitError, exec, privileges, set_limits, step, users};
use crate::container_exec::ExecRequest;
use crate::sys::process::{close_from, inherited_fd};

/// Number of the request's descriptor.
const REQUEST_FD: i32 = 3;
/// Number of the status pipe's descriptor.
const STATUS_FD: i32 = 4;

/// Becomes the command. Returns only when it could not; the result is the process's exit code.
#[must_use]
pub fn run() -> i32 {
    let (Ok(request), Ok(status)) = (inherited_fd(REQUEST_FD), inherited_fd(STATUS_FD)) else {
        return FAILED;
    };
    let Err(error) = become_command(request);
    // When nobody reads this, the helper is dead, and the next moment this process as well.
    let _ = rustix::io::write(&status, error.to_string().as_bytes());
    FAILED
}

fn become_command(request: OwnedFd) -> Result<Infallible, InitError> {
    super::die_with_the_monitor()?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(step("PR_SET_DUMPABLE"))?;
    close_from(STATUS_FD + 1).map_err(step::<io::Error>("close descriptors"))?;
    let mut text = Vec::new();
    File::from(request).read_to_end(&mut text).map_err(step::<io::Error>("read the request"))?;
    let request: ExecRequest = serde_json::from_slice(&text)
        .map_err(|error| step::<io::Error>("read the request")(error.into()))?;
    let spec = &request.spec;
    rustix::process::setsid().map_err(step("setsid"))?;
    rustix::thread::set_name(c"lc-exec").map_err(step("set the process's name"))?;
    set_limits();

    let user = users::find(spec.user.as_deref())?;
    if request.terminal.is_some() {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())
            .map_err(step("take the terminal"))?;
        let owner = Some(rustix::fs::Uid::from_raw(user.uid));
        rustix::fs::fchown(rustix::stdio::stdin(), owner, None)
            .map_err(step("give the terminal to the user"))?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    exec::enter_workdir(&spec.workdir)?;
    let program = exec::Program::new(spec, &user.home)?;
    privileges::take(spec, &user)?;
    if spec.profile == Profile::Service {
        rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    }
    // A change of credentials clears it (prctl(2)).
    super::die_with_the_monitor()?;
    program.prepare()?;
    program.execute()
}
