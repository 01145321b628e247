//! Whether the node may be disturbed: what the operator says goes first, then a program of the site that asks, for example,
//! Slurm. It ends with 0 when the node is free; otherwise the first line that it writes is the reason.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest that the program may take. One that takes longer is killed, and the node counts as busy.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause between looks whether it has ended.
const PAUSE: Duration = Duration::from_millis(10);
/// Most bytes of its words that are read.
const MAX_WORDS: u64 = 512;

/// Runs the program and says why the node is busy; none when it is free, or when there is no such program. One that cannot be
/// run says nothing good: the node counts as busy, with the reason.
#[must_use]
pub(super) fn ask(program: &Path) -> Option<String> {
    if !program.exists() {
        return None;
    }
    let shown = program.display();
    let started = Command::new(program)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => return Some(format!("{shown} cannot be run: {error}")),
    };
    let until = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < until => std::thread::sleep(PAUSE),
            ended => {
                for result in [child.kill(), child.wait().map(drop)] {
                    if let Err(error) = result {
                        log::warn!("{shown}: {error}");
                    }
                }
                let why = ended.err().map_or("has not ended".to_owned(), |error| error.to_string());
                return Some(format!("{shown} {why} after {} s", PATIENCE.as_secs()));
            }
        }
    };
    if status.success() {
        return None;
    }
    let mut words = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        // A pipe holds more than this: a program that has ended has written it.
        let _ = stdout.take(MAX_WORDS).read_to_end(&mut words);
    }
    Some(reason(&words).unwrap_or_else(|| format!("{shown} says so ({status})")))
}

/// The first line, without control characters; none when it is empty.
fn reason(words: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(words);
    let line = text.lines().next()?.trim().replace(char::is_control, " ");
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_says_whether_the_node_is_busy_and_why() {
        let dir = tempfile::tempdir().expect("tempdir");
        let check = |script: &str, expected: Option<&str>| {
            let (text, path) = (dir.path().join("text"), dir.path().join("busy"));
            std::fs::write(&text, format!("#!/bin/sh\n{script}\n")).expect("write");
            // By another process: a child that a test beside this one forks would have it open for writing (ETXTBSY).
            let made = Command::new("install").args(["-m", "755"]).args([&text, &path]).status();
            assert!(made.expect("install").success());
            assert_eq!(ask(&path).as_deref(), expected, "{script}");
        };
        check("exit 0", None);
        check("echo job 123; echo more; exit 1", Some("job 123"));
        check("echo free; exit 0", None);
        assert_eq!(ask(&dir.path().join("none")), None);
        std::fs::write(dir.path().join("plain"), "x").expect("write");
        assert!(ask(&dir.path().join("plain")).expect("busy").contains("cannot be run"));
        check(
            "exit 3",
            Some(&format!("{} says so (exit status: 3)", dir.path().join("busy").display())),
        );
    }
}
