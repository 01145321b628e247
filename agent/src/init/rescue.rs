//! The shell on the console, for a person with a broken node in front of them.
//!
//! The image has no shell of its own: one comes by overlay, or this says so. Allocates nothing.

use std::ffi::CStr;

use nix::errno::Errno;
use rustix::fs::Access;

use crate::sys::start::{Start, start};

/// What may be started, the first that is there, with the arguments that make it a shell. A leading `-` makes it a login
/// shell, which reads /etc/profile.
const SHELLS: [(&CStr, &[&CStr]); 5] = [
    (c"/etc/layercake/rescue", &[c"/etc/layercake/rescue"]),
    (c"/bin/sh", &[c"-sh"]),
    (c"/bin/bash", &[c"-sh"]),
    (c"/bin/busybox", &[c"/bin/busybox", c"sh"]),
    (c"/busybox", &[c"/busybox", c"sh"]),
];

/// Why there is no shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RescueError {
    /// There is none to start.
    #[error("no shell in this image: add one with build-image --overlay")]
    NoShell,
    /// It could not be started.
    #[error("the shell could not be started: {0}")]
    Start(Errno),
}

/// Starts the shell on the console, in a session of its own; returns its PID.
///
/// # Errors
/// That there is none, or what the kernel says.
pub fn start_shell() -> Result<i32, RescueError> {
    let usable = |path: &CStr| rustix::fs::access(path, Access::EXEC_OK).is_ok();
    let (program, args) =
        SHELLS.iter().find(|(path, _)| usable(path)).ok_or(RescueError::NoShell)?;
    let [path, home] = super::ENVIRONMENT;
    let start = start(&Start {
        program,
        args,
        env: &[path, home, c"TERM=vt220", c"PS1=layer0# "],
        fds: &[],
        writes: &[],
        terminal: true,
    });
    start.map_err(RescueError::Start)
}
