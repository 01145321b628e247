//! Whether there is memory for it, whether a new agent runs at all, and what it means when the kernel refuses to load another.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::super::Failure;
use super::never;
use crate::agent::worker;

/// Memory that must be left beside what is needed, in bytes.
const SPARE_MEMORY: u64 = 32 << 20;
/// How long a new agent may take to say its version.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between looks whether it has.
const PAUSE: Duration = Duration::from_millis(10);

/// Refuses what does not fit, with the figures.
pub(super) fn check_memory(needed: u64) -> Result<(), Failure> {
    let available = worker::available_memory().unwrap_or(u64::MAX);
    let needed = needed.saturating_add(SPARE_MEMORY);
    if available >= needed {
        return Ok(());
    }
    let (needed, available) = (needed >> 20, available >> 20);
    Err(never(format!("it needs {needed} MiB of memory, and {available} MiB are available")))
}

/// Why the kernel does not load another.
pub(super) fn refusal(error: &io::Error) -> String {
    let why = match Errno::from_io_error(error) {
        Some(Errno::PERM) => "not permitted (lockdown, or kernel.kexec_load_disabled)",
        Some(Errno::NOSYS) => "this kernel is built without it",
        Some(Errno::KEYREJECTED | Errno::NOKEY | Errno::BADMSG) => {
            "this kernel wants it signed by another key"
        }
        Some(Errno::NOEXEC) => "the file is no kernel for this machine",
        _ => return format!("kexec_file_load: {error}"),
    };
    format!("kexec_file_load: {why}")
}

/// Starts a program that has just been written. A process that another thread forked in between has it open for writing until its
/// own exec: ETXTBSY is over in a moment.
fn start(program: &Path, until: Instant) -> io::Result<Child> {
    loop {
        let mut command = Command::new(program);
        command.arg("--version").env_clear();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match command.spawn() {
            Err(error)
                if error.kind() == io::ErrorKind::ExecutableFileBusy && Instant::now() < until =>
            {
                std::thread::sleep(PAUSE);
            }
            started => return started,
        }
    }
}

/// Lets a program say its version: one that cannot even do that is not this machine's agent.
pub(super) fn check_agent(program: &Path) -> Result<(), Failure> {
    let failed = |what: String| never(format!("the new agent does not run here: {what}"));
    let until = Instant::now() + PATIENCE;
    let mut child = start(program, until).map_err(|error| failed(error.to_string()))?;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(failed(status.to_string())),
            Ok(None) if Instant::now() < until => std::thread::sleep(PAUSE),
            ended => {
                for result in [child.kill(), child.wait().map(drop)] {
                    if let Err(error) = result {
                        log::warn!("{}: {error}", program.display());
                    }
                }
                let why = ended.err().map_or("no answer".to_owned(), |error| error.to_string());
                return Err(failed(why));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    #[test]
    fn a_program_that_somebody_still_has_open_for_writing_is_waited_for() {
        let dir = tempfile::tempdir().expect("directory");
        let program = dir.path().join("agent");
        let mut open = std::fs::OpenOptions::new();
        let mut file = open.write(true).create_new(true).mode(0o755).open(&program).expect("file");
        io::Write::write_all(&mut file, b"#!/bin/sh\ntest \"$1\" = --version\n").expect("write");
        let busy = start(&program, Instant::now()).expect_err("it is open");
        assert_eq!(busy.kind(), io::ErrorKind::ExecutableFileBusy);
        let closing = std::thread::spawn(move || {
            std::thread::sleep(PAUSE * 5);
            drop(file);
        });
        assert_eq!(check_agent(&program), Ok(()));
        closing.join().expect("thread");
    }
}
