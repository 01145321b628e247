//! A machine's serial console: waiting for a line in its log, and typing at a shell behind it.
//!
//! QEMU writes everything the machine says to a file (`serial.log`), whether or not anybody is connected; reading goes
//! by that file, only typing needs the socket.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wait;

/// Lines of the log that stand in an error.
const SHOWN: usize = 30;
/// Most bytes of a log that are looked at for its last lines.
const TAIL_BYTES: u64 = 1 << 16;

/// The console of one machine.
#[derive(Debug)]
pub struct Console {
    log: PathBuf,
    socket: PathBuf,
    offset: u64,
    lines: Lines,
    commands: u32,
}

impl Console {
    /// A console that logs to `log` and is typed at through `socket`.
    #[must_use]
    pub fn new(log: PathBuf, socket: PathBuf) -> Self {
        Self { log, socket, offset: 0, lines: Lines::default(), commands: 0 }
    }

    /// The log.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Everything said so far.
    #[must_use]
    pub fn text(&self) -> String {
        read_from(&self.log, 0).map(|bytes| clean(&bytes)).unwrap_or_default()
    }

    /// Waits for a line that contains this text, after the line that the last wait found. An unfinished line, such as
    /// a prompt, counts too.
    ///
    /// # Errors
    /// When it does not come in time, with the last lines that did.
    pub fn wait_for(&mut self, text: &str, within: Duration) -> Result<String> {
        let what = format!("`{text}` on the console");
        self.wait_for_line(&what, within, |line| line.contains(text))
    }

    /// Waits for a line that is as wanted, as [`Console::wait_for`] does.
    ///
    /// # Errors
    /// When it does not come in time, with the last lines that did.
    pub fn wait_for_line(
        &mut self,
        what: &str,
        within: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let found = wait::until(what, within, || {
            let bytes = read_from(&self.log, self.offset).unwrap_or_default();
            self.offset += bytes.len() as u64;
            self.lines.push(&bytes);
            Ok(self.lines.take(&wanted))
        });
        found.with_context(|| self.situation())
    }

    /// The end of the log, for errors.
    #[must_use]
    pub fn situation(&self) -> String {
        format!("{} ends with\n{}\n", self.log.display(), last_lines(&self.log, SHOWN))
    }

    /// Runs a command in the shell that stands on the console, and gives what it said. Kernel messages that came
    /// between are in there too.
    ///
    /// # Errors
    /// When the shell does not answer in time, or the command's exit status is not 0.
    pub fn shell(&mut self, command: &str, within: Duration) -> Result<String> {
        self.commands += 1;
        let (begin, end) = (marker("begin", self.commands), marker("end", self.commands));
        let start = std::fs::metadata(&self.log).map(|data| data.len()).unwrap_or(0);
        let mut socket = UnixStream::connect(&self.socket)
            .with_context(|| format!("cannot connect to the console {}", self.socket.display()))?;
        let reader = socket.try_clone().context("cannot share the console's socket")?;
        let said = std::thread::scope(|scope| {
            scope.spawn(|| drain(reader));
            let said = self.converse(&mut socket, command, (&begin, &end), start, within);
            // Ends the thread; a machine that went away has closed the socket itself.
            drop(socket.shutdown(Shutdown::Both));
            said
        })?;
        let (said, status) = said;
        if status != "0" {
            bail!("`{command}` on the console exited with {status}: {}", said.trim());
        }
        Ok(said)
    }

    fn converse(
        &self,
        socket: &mut UnixStream,
        command: &str,
        (begin, end): (&str, &str),
        start: u64,
        within: Duration,
    ) -> Result<(String, String)> {
        // The markers are quoted in two halves, so that the terminal's echo of this line is not taken for its output.
        let (b0, b1) = begin.split_at(4);
        let (e0, e1) = end.split_at(4);
        let line = format!("echo {b0}''{b1}; {command}; echo {e0}''{e1} $?\n");
        socket.write_all(line.as_bytes()).context("cannot type at the console")?;
        let what = format!("the shell on the console to finish `{command}`");
        wait::until(&what, within, || {
            let said = read_from(&self.log, start).unwrap_or_default();
            Ok(between(&clean(&said), begin, end))
        })
        .with_context(|| self.situation())
    }
}

/// Reads the socket empty, lest QEMU stops the machine for it.
fn drain(mut socket: UnixStream) {
    let mut buffer = [0; 4096];
    while matches!(socket.read(&mut buffer), Ok(length) if length > 0) {}
}

fn marker(kind: &str, number: u32) -> String {
    format!("lab-{kind}-{number}")
}

/// What stands between the line of the first marker and the line of the second, and the word after that.
fn between(text: &str, begin: &str, end: &str) -> Option<(String, String)> {
    let (_, rest) = text.split_once(&format!("{begin}\n"))?;
    let (said, rest) = rest.split_once(&format!("{end} "))?;
    let (status, _) = rest.split_once('\n')?;
    Some((said.to_owned(), status.trim().to_owned()))
}

fn read_from(file: &Path, offset: u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(file)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The last lines of a log, cleaned.
#[must_use]
pub fn last_lines(file: &Path, count: usize) -> String {
    let length = std::fs::metadata(file).map(|data| data.len()).unwrap_or(0);
    let text = clean(&read_from(file, length.saturating_sub(TAIL_BYTES)).unwrap_or_default());
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
}

/// Text without the escape sequences (ECMA-48 CSI and two-byte ones) and carriage returns of a terminal.
#[must_use]
pub fn clean(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut cleaned = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        match char {
            '\x1b' => {
                if chars.next() == Some('[') {
                    // To the final byte, 0x40 to 0x7e.
                    chars.by_ref().find(|c| ('\x40'..='\x7e').contains(c));
                }
            }
            '\n' | '\t' => cleaned.push(char),
            _ if char.is_control() => {}
            _ => cleaned.push(char),
        }
    }
    cleaned
}

/// Lines as they come in, each to be looked at once; the unfinished last one again and again.
#[derive(Debug, Default)]
struct Lines {
    pending: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The first line that is wanted; it and the lines before it are used up.
    fn take(&mut self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let line = clean(&self.pending.drain(..=end).collect::<Vec<u8>>());
            let line = line.trim_end();
            if wanted(line) {
                return Some(line.to_owned());
            }
        }
        let rest = clean(&self.pending);
        if wanted(&rest) {
            self.pending.clear();
            return Some(rest);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_sequences_and_carriage_returns_are_removed() {
        assert_eq!(clean(b"\x1b[1;37miPXE\x1b[0m 1.0\r\n\x1bcok"), "iPXE 1.0\nok");
    }

    #[test]
    fn a_line_is_found_once_however_it_arrives() {
        let mut lines = Lines::default();
        lines.push(b"first\r\nsec");
        assert_eq!(lines.take(|line| line.contains("second")), None);
        lines.push(b"ond\r\nthird\r\n");
        assert_eq!(lines.take(|line| line.contains("second")).as_deref(), Some("second"));
        assert_eq!(lines.take(|line| line.contains("second")), None);
    }

    #[test]
    fn a_prompt_without_its_newline_is_found() {
        let mut lines = Lines::default();
        lines.push(b"boot ok\n/ # ");
        assert_eq!(lines.take(|line| line.ends_with("# ")).as_deref(), Some("/ # "));
    }

    #[test]
    fn the_output_of_a_command_is_what_stands_between_its_markers() {
        let text = "/ # echo lab-''begin-1; ls; echo lab-''end-1 $?\nlab-begin-1\nbin\nproc\nlab-end-1 0\n/ # ";
        assert_eq!(
            between(text, "lab-begin-1", "lab-end-1"),
            Some(("bin\nproc\n".to_owned(), "0".to_owned()))
        );
        assert_eq!(between(text, "lab-begin-2", "lab-end-2"), None);
    }

    #[test]
    fn a_shell_on_a_socket_runs_commands_and_reports_their_failure() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (log, path) = (dir.path().join("log"), dir.path().join("socket"));
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("listen");
        let output = File::create(&log).expect("log");
        // A shell whose output goes to the log and whose input is the socket, as QEMU's serial port has it.
        let server = std::thread::spawn(move || {
            for _ in 0..2 {
                let (stream, _) = listener.accept().expect("accept");
                let input: std::os::fd::OwnedFd = stream.into();
                let status = std::process::Command::new("sh")
                    .stdin(input)
                    .stdout(output.try_clone().expect("log"))
                    .status();
                assert!(status.expect("sh").success());
            }
        });
        let mut console = Console::new(log, path);
        let within = Duration::from_secs(20);
        assert_eq!(console.shell("echo one; echo two", within).expect("shell"), "one\ntwo\n");
        let error = console.shell("echo no; (exit 3)", within).unwrap_err().to_string();
        assert_eq!(error, "`echo no; (exit 3)` on the console exited with 3: no");
        server.join().expect("server");
    }
}
