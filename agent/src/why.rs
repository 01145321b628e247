//! `layercake-agent why`: what the node waits for, for somebody at its rescue shell. Reads what the agent left; asks nobody.

use std::fs;
use std::path::PathBuf;

use crate::channel::kmsg::last_problems;
use crate::paths::RunDirs;

/// Lines of the node's log that are shown.
const PROBLEMS: usize = 8;

fn screen(dirs: &RunDirs) -> PathBuf {
    dirs.state().join("screen")
}

/// Keeps what the console shows.
pub(crate) fn keep(dirs: &RunDirs, text: &str) {
    if let Err(error) = fs::write(screen(dirs), text) {
        log::debug!("{}: {error}", screen(dirs).display());
    }
}

/// Whether the agent lives, and whether there is a rescue shell, from PID 1's note; none where there is no note.
pub(crate) fn processes(dirs: &RunDirs) -> Option<(bool, bool)> {
    let note = fs::read_to_string(dirs.state().join("init")).ok()?;
    let mut words = note.split(' ').step_by(2);
    let mut lives = || {
        let pid: u32 = words.next()?.parse().ok()?;
        Some(pid > 0 && fs::metadata(format!("/proc/{pid}")).is_ok())
    };
    Some((lives()?, lives()?))
}

/// What the console shows of the node, whole, and what went wrong last.
#[must_use]
pub fn text(dirs: &RunDirs) -> String {
    let mut text = fs::read_to_string(screen(dirs))
        .unwrap_or_else(|_| "The agent has not come so far as to say anything.\n".to_owned());
    if let Some((false, _)) = processes(dirs) {
        text.push_str("The agent does not run just now: PID 1 starts it again.\n");
    }
    let problems = last_problems(PROBLEMS);
    if !problems.is_empty() {
        text.push_str("\nThe last things that went wrong (dmesg shows all):\n");
        text.extend(problems);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_was_kept_and_whether_the_agent_lives() {
        let dir = tempfile::tempdir().expect("dir");
        let dirs = RunDirs::new(dir.path());
        assert!(text(&dirs).starts_with("The agent has not come so far"));
        fs::create_dir_all(dirs.state()).expect("state");
        keep(&dirs, "node       n1\n");
        assert!(text(&dirs).starts_with("node       n1\n"));
        let me = std::process::id();
        for (note, expected) in [
            (format!("{me} 1 0 0 \n"), Some((true, false))),
            (format!("0 1 {me} 1 /run/agent\n"), Some((false, true))),
            ("nothing".to_owned(), None),
        ] {
            fs::write(dirs.state().join("init"), &note).expect("note");
            assert_eq!(processes(&dirs), expected, "{note}");
        }
    }
}
