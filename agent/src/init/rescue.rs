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

/// What is said when there is none.
pub const NO_SHELL: &str = "rescue: no shell in this image: add one with build-image --overlay";

/// Starts the shell on the console, in a session of its own; returns its PID, or None where there is no shell.
///
/// # Errors
/// What the kernel says.
pub fn start_shell() -> Option<Result<i32, Errno>> {
    let usable = |path: &CStr| rustix::fs::access(path, Access::EXEC_OK).is_ok();
    let (program, args) = SHELLS.iter().find(|(path, _)| usable(path))?;
    let [path, home] = super::ENVIRONMENT;
    let env = &[path, home, c"TERM=vt220", c"PS1=layer0# "];
    Some(start(&Start { program, args, env, fds: &[], writes: &[], terminal: true }))
}
