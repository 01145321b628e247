//! The programs that xtask starts: cargo and what it builds. Each has a process group of its own, which Ctrl-C ends with
//! everything below it.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use ::tests::artifacts::workspace_root;
use ::tests::wait;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long any of them may take: the whole workspace from nothing, or every case, on two slow cores.
const WITHIN: Duration = Duration::from_secs(60 * 60);

/// cargo, as a person would type it in the workspace. `cargo run`, which started us, sets variables about our own package that
/// build scripts look at: inherited they build half the workspace anew each time.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace_root());
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_of_our_package) {
            command.env_remove(name);
        }
    }
    command
}

/// The target of static programs, named so that the flags below miss build scripts and procedural macros.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";
/// Cargo's variable for the flags of that target alone.
const STATIC_FLAGS: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS";

/// Flags for those programs. Relocations are packed (RELR), which glibc's static start-up code reads since 2.36. Nothing unwinds
/// there, so `static.ld` leaves the tables for it away: a quarter of a megabyte of a compressed initramfs.
const FLAGS: [&str; 4] = [
    "-Ctarget-feature=+crt-static",
    "-Clink-arg=-Wl,-z,pack-relative-relocs",
    "-Clink-arg=-Wl,--no-eh-frame-hdr",
    // Below the workspace, in which rustc links: the same bytes wherever that lies.
    "-Clink-arg=-Wl,-T,xtask/static.ld",
];

/// A build of this package with profile `agent`, without any library that a node would have to bring.
pub(crate) fn static_build(package: &str) -> Command {
    let mut build = cargo();
    build.args(["build", "--package", package, "--profile", "agent", "--target", STATIC_TARGET]);
    build.env(STATIC_FLAGS, FLAGS.join(" "));
    // These would take the place of the flags above.
    build.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    build
}

/// Whether `cargo run` set this variable to say something of the package that it runs.
fn is_of_our_package(name: &str) -> bool {
    name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name == "OUT_DIR"
}

/// Runs a program to its end.
///
/// # Errors
/// When it cannot be started, fails, takes too long, or the wait is interrupted; it has ended then.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = line(command);
    command.stdin(Stdio::null()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot start `{line}`"))?;
    let ended = wait::until(&format!("`{line}`"), WITHIN, || Ok(child.try_wait()?));
    if ended.is_err() {
        let group = i32::try_from(child.id()).context("a pid beyond the kernel's")?;
        killpg(Pid::from_raw(group), Signal::SIGTERM)
            .with_context(|| format!("cannot end `{line}`"))?;
        child.wait().with_context(|| format!("cannot wait for `{line}`"))?;
    }
    let status = ended?;
    if !status.success() {
        bail!("`{line}` failed ({status})");
    }
    Ok(())
}

/// What a person would have typed.
fn line(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    let name = program.rsplit('/').next().unwrap_or_default().to_owned();
    let args = command.get_args().map(|arg| arg.to_string_lossy().into_owned());
    std::iter::once(name).chain(args).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_said_of_our_own_package_is_hidden_from_cargo() {
        for name in ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "OUT_DIR"] {
            assert!(is_of_our_package(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO", "RUSTUP_TOOLCHAIN", "PATH"] {
            assert!(!is_of_our_package(name), "{name}");
        }
    }

    #[test]
    fn a_program_that_fails_is_an_error_with_its_command_line() {
        let error = run(Command::new("/bin/sh").args(["-c", "exit 3"])).unwrap_err().to_string();
        assert_eq!(error, "`sh -c exit 3` failed (exit status: 3)");
    }
}
