//! The shell on the console, for a person with a broken node in front of them.
//!
//! The image has no shell of its own: one comes by overlay, or this says so.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::sys::session::in_new_session;

/// Where a shell may lie, with the arguments that make it one.
const SHELLS: [(&str, &[&str]); 4] =
    [("/bin/sh", &[]), ("/bin/bash", &[]), ("/bin/busybox", &["sh"]), ("/busybox", &["sh"])];

/// What is said when there is none.
pub const NO_SHELL: &str = "no shell in this image: add one with build-image --overlay";

/// Starts the shell on the console, in a session of its own; returns its PID.
///
/// # Errors
/// [`NO_SHELL`], or what went wrong with the shell that was found.
pub fn start() -> Result<i32, String> {
    let (path, args) = SHELLS.iter().find(|(path, _)| executable(path)).ok_or(NO_SHELL)?;
    let console = || {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/console")
            .map_err(|e| format!("/dev/console: {e}"))
    };
    let mut command = Command::new(path);
    // A leading `-` makes it a login shell, which reads /etc/profile.
    command.arg0(if args.is_empty() { "-sh" } else { path });
    command.args(*args).env_clear().current_dir("/");
    command.env("PATH", super::PATH).env("HOME", "/").env("TERM", "vt220").env("PS1", "layer0# ");
    command.stdin(Stdio::from(console()?));
    command.stdout(Stdio::from(console()?)).stderr(Stdio::from(console()?));
    let child = in_new_session(&mut command, true).spawn().map_err(|e| format!("{path}: {e}"))?;
    i32::try_from(child.id()).map_err(|e| e.to_string())
}

fn executable(path: &str) -> bool {
    fs::metadata(Path::new(path))
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
