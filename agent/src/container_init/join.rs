//! The child of [`crate::container_exec`], in the container's namespaces and control group already, until it becomes the command.
//!
//! It takes on what the container's own program has: user, capabilities, limits, filter of system calls, no_new_privs.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;

use protocol::imageset::Profile;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};

use super::{FAILED, InitError, exec, privileges, seccomp, step, users};
use crate::container_exec::ExecRequest;
use crate::sys::process::{close_on_exec_from, exit_now};

/// Becomes the command, with `stdio` as its standard streams. When it cannot, one sentence goes to `status` and the process ends.
pub(crate) fn run(request: &ExecRequest, stdio: &[OwnedFd], status: &OwnedFd) -> ! {
    let Err(error) = become_command(request, stdio, status);
    // When nobody reads this, the helper is dead, and the next moment this process as well.
    let _ = rustix::io::write(status, error.to_string().as_bytes());
    exit_now(FAILED)
}

fn become_command(
    request: &ExecRequest,
    stdio: &[OwnedFd],
    status: &OwnedFd,
) -> Result<Infallible, InitError> {
    super::die_with_the_monitor()?;
    // A helper that died before that: nobody reads the status any more.
    let mut reader = [PollFd::new(status, PollFlags::empty())];
    poll(&mut reader, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(step("poll"))?;
    if reader.iter().any(|fd| fd.revents().contains(PollFlags::ERR)) {
        return Err(step("start")(io::Error::from(io::ErrorKind::BrokenPipe)));
    }
    let [input, output, errors] = stdio else {
        return Err(step("standard streams")(io::Error::from(io::ErrorKind::InvalidInput)));
    };
    rustix::stdio::dup2_stdin(input).map_err(step("standard input"))?;
    rustix::stdio::dup2_stdout(output).map_err(step("standard output"))?;
    rustix::stdio::dup2_stderr(errors).map_err(step("standard error"))?;
    close_on_exec_from(3).map_err(step::<io::Error>("close descriptors"))?;
    let spec = &request.spec;
    rustix::process::setsid().map_err(step("setsid"))?;
    rustix::thread::set_name(c"lc-exec").map_err(step("set the process's name"))?;

    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, "/", flags, Mode::empty()).map_err(step("open its root"))?;
    let user = users::find_in(&root, spec.user.as_deref())?;
    drop(root);
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
    let capabilities = privileges::of(spec)?;
    if spec.view.is_filtered() {
        // While CAP_SYS_ADMIN is there, as for the container's own program.
        seccomp::apply(spec.profile, &capabilities)?;
    }
    privileges::take(spec, &capabilities, &user)?;
    if spec.profile == Profile::Service && !spec.view.privileged {
        rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    }
    // A change of credentials clears it (prctl(2)).
    super::die_with_the_monitor()?;
    program.prepare()?;
    program.execute()
}
