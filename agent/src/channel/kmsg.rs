//! The node's own log: the kernel's ring buffer, which holds the kernel's lines and the agent's ([`crate::logging`]).

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::logs::Source;

/// Largest record that the kernel hands out (PRINTKRB_RECORD_MAX and CONSOLE_EXT_LOG_MAX of the kernel are 8192).
const RECORD: usize = 8192;
/// Most lines that a beginning by last lines keeps.
const MAX_LINES: u64 = 100_000;

/// The reader of `/dev/kmsg`.
#[derive(Debug)]
pub(super) struct Kmsg {
    file: File,
    /// Read, not handed on yet.
    waiting: VecDeque<u8>,
}

impl Kmsg {
    /// The log from so many last lines on, or from its beginning.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(super) fn open(lines: Option<u64>) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(nix::libc::O_NONBLOCK);
        let mut log = Self { file: options.open("/dev/kmsg")?, waiting: VecDeque::new() };
        if let Some(lines) = lines {
            let mut kept: VecDeque<Vec<u8>> = VecDeque::new();
            while let Some(line) = log.record()? {
                kept.push_back(line);
                if kept.len() as u64 > lines.min(MAX_LINES) {
                    kept.pop_front();
                }
            }
            log.waiting.extend(kept.into_iter().flatten());
        }
        Ok(log)
    }

    fn record(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; RECORD];
        loop {
            match self.file.read(&mut buffer) {
                Ok(count) => return Ok(Some(line(buffer.get(..count).unwrap_or_default()))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // EPIPE: records were overwritten before they were read; the next read goes on after the gap.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The last lines in which PID 1 or the agent says that something is wrong, oldest first, with their ends. Nothing where the
/// kernel's log cannot be read.
pub(crate) fn last_problems(count: usize) -> Vec<String> {
    let mut kept = VecDeque::new();
    let Ok(mut log) = Kmsg::open(None) else { return Vec::new() };
    while let Ok(Some(line)) = log.record() {
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains("layercake: error: ") || line.contains("layercake: warning: ") {
            kept.push_back(line);
            if kept.len() > count {
                kept.pop_front();
            }
        }
    }
    kept.into()
}

impl Source for Kmsg {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.waiting.len() < buffer.len() {
            let Some(line) = self.record()? else { break };
            self.waiting.extend(line);
        }
        self.waiting.read(buffer)
    }

    fn news(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn take_news(&mut self) {}

    fn tidy(&mut self) {}
}

/// A record (`PRIORITY,SEQUENCE,MICROSECONDS,FLAGS;TEXT`, then lines with details) as dmesg(1) shows it.
fn line(record: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(record);
    let first = text.lines().next().unwrap_or_default();
    let (head, text) = first.split_once(';').unwrap_or(("", first));
    let at_us: u64 = head.split(',').nth(2).and_then(|field| field.parse().ok()).unwrap_or(0);
    let (s, us) = (at_us / 1_000_000, at_us % 1_000_000);
    format!("[{s:5}.{us:06}] {text}\n").into_bytes()
}

/// For fuzzing: whatever a record holds, one line comes of it.
pub fn fuzz_record(bytes: &[u8]) {
    let line = line(bytes);
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn records_look_as_dmesg_shows_them() {
        let table = [
            (
                "6,339,5140900,-;NET: Registered protocol family 10\n SUBSYSTEM=x\n",
                "[    5.140900] NET: Registered protocol family 10\n",
            ),
            ("12,1,7,c;agent: a;b\n", "[    0.000007] agent: a;b\n"),
            ("no record", "[    0.000000] no record\n"),
            ("", "[    0.000000] \n"),
        ];
        for (record, expected) in table {
            assert_eq!(String::from_utf8(line(record.as_bytes())).expect("UTF-8"), expected);
        }
    }

    proptest! {
        #[test]
        fn any_record_is_one_line(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            fuzz_record(&bytes);
        }
    }
}
