//! Draws the screen ([`super::screen`]) on the machine's consoles: in place on a virtual terminal, line by line, as something
//! changes, on a serial one, which may be a log collector's. At most once a second, and never where a rescue shell is.
//!
//! Consoles are written without waiting: one that takes nothing loses lines, and the node goes on.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use log::LevelFilter;

use super::screen::{fit, news};
use crate::paths::RunDirs;
use crate::why;

/// Shortest time between two drawings.
const PACE: Duration = Duration::from_secs(1);
/// The kernel's consoles, parted by blanks; the last one is `/dev/console` (`Documentation/ABI/testing/sysfs-tty`).
const ACTIVE: &str = "/sys/class/tty/console/active";

#[derive(Debug)]
struct Terminal {
    file: File,
    /// Knows VT100's sequences, and is looked at rather than recorded.
    virtual_terminal: bool,
    /// Is `/dev/console`, where the rescue shell is.
    main: bool,
}

/// The consoles and what stands on them.
#[derive(Debug)]
pub(super) struct Console {
    terminals: Vec<Terminal>,
    /// The agent's notes, and PID 1's.
    dirs: RunDirs,
    wanted: Vec<String>,
    drawn: Vec<String>,
    drawn_at: Option<Duration>,
}

impl Console {
    /// Nothing is drawn yet. Without `status` only the file for `why` is written.
    #[must_use]
    pub(super) fn open(dirs: &RunDirs, status: bool) -> Self {
        let active = fs::read_to_string(ACTIVE).unwrap_or_default();
        let terminals = if status { terminals(&active) } else { Vec::new() };
        // Lines of the log would spoil the screen: there the last one stands in it. Elsewhere what is wrong is still said.
        if let Some(main) = terminals.iter().find(|it| it.main) {
            let screen = main.virtual_terminal;
            let level = if screen { LevelFilter::Off } else { LevelFilter::Warn };
            crate::logging::limit_console(level);
        }
        Self {
            terminals,
            dirs: dirs.clone(),
            wanted: Vec::new(),
            drawn: Vec::new(),
            drawn_at: None,
        }
    }

    /// When it is to be drawn again; None while what stands there is right.
    pub(super) fn deadline(&self) -> Option<Duration> {
        (self.wanted != self.drawn).then(|| self.drawn_at.map_or(Duration::ZERO, |at| at + PACE))
    }

    /// Wants these lines shown, and shows them unless something was shown only just now.
    pub(super) fn show(&mut self, lines: Vec<String>, now: Duration) {
        self.wanted = lines;
        if self.deadline().is_none_or(|due| now < due) {
            return;
        }
        let (seconds, millis) = (now.as_secs(), now.subsec_millis());
        let since = format!("as of {seconds}.{millis:03} s after its kernel started");
        let text = format!("{}\n{since}\n", self.wanted.join("\n"));
        why::keep(&self.dirs, &text);
        let rescue = why::processes(&self.dirs).is_some_and(|(_, shell)| shell);
        for terminal in self.terminals.iter_mut().filter(|it| !(rescue && it.main)) {
            let text = if terminal.virtual_terminal {
                screen(&fit(&self.wanted), &since, self.drawn_at.is_none())
            } else {
                let prefix = format!("[{seconds:>3}.{millis:03}] ");
                let new = news(&self.drawn, &self.wanted);
                new.iter().map(|line| format!("{prefix}{}\r\n", line.trim_end())).collect()
            };
            // What it does not take now is lost: nobody waits for a console.
            terminal.file.write(text.as_bytes()).unwrap_or_default();
        }
        self.drawn.clone_from(&self.wanted);
        self.drawn_at = Some(now);
    }
}

/// The screen in place: home, each line to its end, nothing below (ECMA-48). The first time all is cleared and the cursor hidden.
fn screen(lines: &[String], since: &str, first: bool) -> String {
    let mut text = String::from(if first { "\x1b[2J\x1b[?25l\x1b[H" } else { "\x1b[H" });
    for line in lines.iter().map(String::as_str).chain([since]) {
        text.push_str(line);
        text.push_str("\x1b[K\r\n");
    }
    text.push_str("\x1b[J");
    text
}

fn terminals(active: &str) -> Vec<Terminal> {
    let mut terminals = Vec::new();
    for (name, main) in consoles(active) {
        // Not ours as a controlling terminal, and never waited for.
        let flags = nix::libc::O_NOCTTY | nix::libc::O_NONBLOCK;
        let path = format!("/dev/{name}");
        match OpenOptions::new().write(true).custom_flags(flags).open(&path) {
            Ok(file) => {
                terminals.push(Terminal { file, virtual_terminal: is_virtual(name), main });
            }
            Err(error) => log::debug!("{path}: {error}"),
        }
    }
    terminals
}

/// The consoles' names, and which of them is `/dev/console`.
fn consoles(active: &str) -> impl Iterator<Item = (&str, bool)> {
    let last = active.split_whitespace().next_back();
    active.split_whitespace().map(move |name| (name, Some(name) == last))
}

/// `tty0` and its like; serial ones have letters behind `tty`, or another name (`ttyS0`, `hvc0`).
fn is_virtual(name: &str) -> bool {
    name.strip_prefix("tty")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn virtual_terminals_are_told_from_serial_ones_and_the_last_is_the_main_one() {
        let found: Vec<_> = consoles("tty0 ttyS0\n").collect();
        assert_eq!(found, [("tty0", false), ("ttyS0", true)]);
        for (name, expected) in [("tty0", true), ("tty12", true), ("ttyS0", false), ("tty", false)]
        {
            assert_eq!(is_virtual(name), expected, "{name}");
        }
    }

    fn console(dir: &Path) -> Console {
        let file = File::create(dir.join("serial")).expect("file");
        let screen = File::create(dir.join("vt")).expect("file");
        fs::create_dir(dir.join("state")).expect("state");
        let mut console = Console::open(&RunDirs::new(dir), false);
        console.terminals = vec![
            Terminal { file: screen, virtual_terminal: true, main: false },
            Terminal { file, virtual_terminal: false, main: true },
        ];
        console
    }

    #[test]
    fn it_is_drawn_on_change_at_most_once_a_second_and_a_serial_console_gets_news_only() {
        let dir = tempfile::tempdir().expect("dir");
        let mut console = console(dir.path());
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).expect("read");
        let lines = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let at = Duration::from_millis;
        console.show(lines("a b"), at(500));
        console.show(lines("a b"), at(9000));
        assert_eq!(console.deadline(), None, "nothing to draw wakes nobody");
        console.show(lines("a c"), at(9100));
        console.show(lines("a d"), at(9200));
        assert_eq!(console.deadline(), Some(at(10_100)));
        console.show(lines("a d"), at(10_100));
        let expected = "[  0.500] a\r\n[  0.500] b\r\n[  9.100] c\r\n[ 10.100] d\r\n";
        assert_eq!(read("serial"), expected);
        assert_eq!(read("state/screen"), "a\nd\nas of 10.100 s after its kernel started\n");
        let vt = read("vt");
        assert_eq!(vt.matches("\x1b[2J").count(), 1, "{vt:?}");
        assert!(vt.ends_with(
            "\x1b[Ha\x1b[K\r\nd\x1b[K\r\nas of 10.100 s after its kernel started\x1b[K\r\n\x1b[J"
        ));
    }

    #[test]
    fn where_a_rescue_shell_is_nothing_is_drawn() {
        let dir = tempfile::tempdir().expect("dir");
        let mut console = console(dir.path());
        fs::write(dir.path().join("state/init"), "1 1 1 1 \n").expect("note");
        console.show(vec!["a".to_owned()], Duration::from_secs(2));
        assert_eq!(fs::read_to_string(dir.path().join("serial")).expect("read"), "");
        assert!(fs::read_to_string(dir.path().join("vt")).expect("read").contains('a'));
        let kept = fs::read_to_string(dir.path().join("state/screen")).expect("read");
        assert!(kept.starts_with("a\n"));
    }
}
