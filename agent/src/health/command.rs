//! A command in a container as a probe: started by the helper of operators' commands ([`crate::container_exec`]), judged by its
//! exit code. What it writes is not read, but for the reason of a failure: it may write 64 KiB, then it waits.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};

use rustix::net::RecvFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::container_exec::{ExecRequest, Said, receive_fds, send_fds};
use crate::containers::Spec;
use crate::monitor::own_program;

/// Most bytes that the helper says.
const MAX_SAID: usize = 8 << 10;
/// Most bytes of the command's own words that are told.
const MAX_WORDS: usize = 200;

/// A command that runs. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Command {
    helper: Child,
    control: UnixStream,
    /// Whether the near ends of its standard streams have come.
    ends: Option<Vec<OwnedFd>>,
    said: Vec<u8>,
}

impl Drop for Command {
    fn drop(&mut self) {
        // The kernel kills the command with its helper. One that has ended cannot be killed, and is waited for all the same.
        let _ = self.helper.kill();
        let _ = self.helper.wait();
    }
}

impl AsFd for Command {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }
}

impl Command {
    /// Starts one in the container whose first process is `pid`, as the container's own user.
    ///
    /// # Errors
    /// One sentence.
    pub(super) fn start(
        program: Option<&Path>,
        spec: &Spec,
        pid: u32,
        argv: &[String],
    ) -> Result<Self, String> {
        Self::try_start(program, spec, pid, argv)
            .map_err(|error| format!("the probe's helper: {error}"))
    }

    fn try_start(
        program: Option<&Path>,
        spec: &Spec,
        pid: u32,
        argv: &[String],
    ) -> io::Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or(io::ErrorKind::NotFound)?;
        let pidfd = pidfd_open(number, PidfdFlags::empty())?;
        // Its own, by a read-only mount (CVE-2019-5736).
        let own = own_program()?;
        let program = match program {
            Some(program) => program.to_owned(),
            None => format!("/proc/self/fd/{}", own.as_raw_fd()).into(),
        };
        let (mut control, theirs) = UnixStream::pair()?;
        let helper = std::process::Command::new(program)
            .arg("container-exec")
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let spec = Spec { argv: argv.to_vec(), sockets: Vec::new(), notify: false, ..spec.clone() };
        let request = ExecRequest { spec, pid, terminal: None };
        // From here on the helper is killed when anything fails.
        let command = Self { helper, control: control.try_clone()?, ends: None, said: Vec::new() };
        send_fds(&control, &[pidfd.as_fd()])?;
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        control.write_all(&line)?;
        control.set_nonblocking(true)?;
        Ok(command)
    }

    /// Hears what the helper says. The outcome, once there is one.
    pub(super) fn go_on(&mut self) -> Option<Result<(), String>> {
        loop {
            if self.ends.is_none() {
                // Descriptors come with a `+`; a failure before that comes as a line.
                let mut first = [0];
                match rustix::net::recv(&self.control, &mut first, RecvFlags::PEEK) {
                    Ok((_, 1)) if first == *b"+" => match receive_fds(&self.control) {
                        Ok(ends) => self.ends = Some(ends),
                        Err(error) => return Some(Err(error.to_string())),
                    },
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return None,
                    _ => self.ends = Some(Vec::new()),
                }
            }
            let mut buffer = [0; 512];
            match self.control.read(&mut buffer) {
                Ok(0) => return Some(Err("the probe's helper ended without a word".to_owned())),
                Ok(count) => self.said.extend(buffer.iter().take(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) => return Some(Err(error.to_string())),
            }
            if let Some(outcome) = self.judge() {
                return Some(outcome);
            }
            if self.said.len() > MAX_SAID {
                return Some(Err("the probe's helper talks too much".to_owned()));
            }
        }
    }

    fn judge(&mut self) -> Option<Result<(), String>> {
        let lines = self.said.split(|byte| *byte == b'\n');
        let mut said = lines.filter_map(|line| serde_json::from_slice::<Said>(line).ok());
        let last = said.rfind(|said| *said != Said::Started)?;
        Some(match last {
            Said::Code(0) => Ok(()),
            Said::Code(code) => Err(format!("it ended with {code}{}", self.words())),
            Said::Signal(signal) => Err(format!("signal {signal} ended it{}", self.words())),
            Said::Failed(why) => Err(why),
            Said::Started => return None,
        })
    }

    /// What it wrote last of all, on standard error or else on standard output: one line.
    fn words(&mut self) -> String {
        let ends = self.ends.take().unwrap_or_default();
        for end in ends.into_iter().skip(1).rev() {
            let mut bytes = [0; 4096];
            // It has ended: what it wrote is there, and then comes the end.
            let quiet = rustix::io::ioctl_fionbio(&end, true).is_err();
            let count = if quiet { 0 } else { File::from(end).read(&mut bytes).unwrap_or(0) };
            let text = String::from_utf8_lossy(bytes.get(..count).unwrap_or_default()).into_owned();
            if let Some(line) = text.lines().rev().find(|line| !line.trim().is_empty()) {
                let line = line.chars().filter(|c| !c.is_control()).take(MAX_WORDS);
                return format!(": {}", line.collect::<String>());
            }
        }
        String::new()
    }
}
