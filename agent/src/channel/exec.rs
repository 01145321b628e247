//! A channel for a command: starts the helper ([`crate::container_exec`]) and carries bytes between the operator and the
//! command's terminal or pipes, both ways only as far as each side takes them.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use protocol::channel::frame::{Exit, Frame, MAX_DATA};
use protocol::channel::{ExecWish, TerminalSize};
use rustix::event::{PollFd, PollFlags};
use rustix::termios::{Winsize, tcsetwinsize};

use super::find::Running;
use super::link::{Link, LinkError, Received, TICK, wait};
use crate::container_exec::{ExecRequest, Said, receive_fds, send_fds};
use crate::monitor::own_program;

/// Longest time until the command runs.
const START: Duration = Duration::from_secs(15);
/// Longest line that the helper says, in bytes.
const MAX_SAID: u64 = 8 << 10;
/// What a terminal takes for the end of input (VEOF of termios(3), where nobody changed it).
const END_OF_TRANSMISSION: u8 = 4;

/// A command that runs. Dropped, it is ended.
#[derive(Debug)]
pub(super) struct Session {
    helper: Child,
    /// To the helper: a byte is a signal for the command. None once the helper has said its last word.
    control: Option<UnixStream>,
    /// What of the helper's next line has come.
    said: Vec<u8>,
    exit: Option<Result<Exit, String>>,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    errors: Option<OwnedFd>,
    terminal: bool,
    /// Came from the operator, not taken by the command yet: never more than a window.
    waiting: VecDeque<u8>,
    input_ended: bool,
}

/// Runs a command in this container, with this program as the helper, by a read-only mount of it (CVE-2019-5736).
///
/// # Errors
/// One sentence.
pub(super) fn start(running: &Running, wish: &ExecWish) -> Result<Session, String> {
    let program = own_program().map_err(|error| format!("open this program read-only: {error}"))?;
    start_with(Path::new(&format!("/proc/self/fd/{}", program.as_raw_fd())), running, wish)
}

fn start_with(program: &Path, running: &Running, wish: &ExecWish) -> Result<Session, String> {
    if let Some(problem) = wish.problem() {
        return Err(problem);
    }
    let failed = |error: io::Error| format!("the command's helper: {error}");
    let (mut ours, theirs) = UnixStream::pair().map_err(failed)?;
    let helper = Command::new(program)
        .arg("container-exec")
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let mut helper = Reaped(Some(helper));
    let terminal = wish.terminal;
    let request = ExecRequest { spec: spec_of(running, wish), pid: running.pid, terminal };
    let told = (|| {
        ours.set_read_timeout(Some(START))?;
        ours.set_write_timeout(Some(START))?;
        send_fds(&ours, &[running.pidfd.as_fd()])?;
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        ours.write_all(&line)
    })();
    // One that ended early has said why, or nothing.
    let asked = told.and_then(|()| receive_ends(&ours));
    let mut ends = asked.map_err(failed)??.into_iter();
    match read_said(&mut BufReader::with_capacity(1, &ours)).map_err(failed)? {
        Said::Started => {}
        Said::Failed(why) => return Err(why),
        other => return Err(format!("the command's helper said {other:?} too early")),
    }
    let (input, output, errors) = (ends.next(), ends.next(), ends.next());
    // A terminal has one end for both directions.
    let output = match (&input, output) {
        (Some(master), None) => Some(master.try_clone().map_err(failed)?),
        (_, output) => output,
    };
    for fd in [&input, &output, &errors].into_iter().flatten() {
        rustix::io::ioctl_fionbio(fd, true).map_err(|error| failed(error.into()))?;
    }
    ours.set_nonblocking(true).map_err(failed)?;
    Ok(Session {
        helper: helper.0.take().ok_or("the command's helper is gone")?,
        control: Some(ours),
        said: Vec::new(),
        exit: None,
        input,
        output,
        errors,
        terminal: terminal.is_some(),
        waiting: VecDeque::new(),
        input_ended: false,
    })
}

/// A helper that is not handed on is killed; the kernel kills the command with it.
struct Reaped(Option<Child>);

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Some(helper) = &mut self.0 {
            // One that has ended cannot be killed, and is waited for all the same.
            let _ = helper.kill();
            let _ = helper.wait();
        }
    }
}

/// The near ends of the terminal or the pipes, or why there are none.
fn receive_ends(ours: &UnixStream) -> io::Result<Result<Vec<OwnedFd>, String>> {
    let mut first = [0];
    // A failure comes as a line; the descriptors come with a `+`.
    let peeked = rustix::net::recv(ours, &mut first, rustix::net::RecvFlags::PEEK)?;
    if peeked.0 == 1 && first == *b"+" {
        return receive_fds(ours).map(Ok);
    }
    match read_said(&mut BufReader::with_capacity(1, ours))? {
        Said::Failed(why) => Ok(Err(why)),
        other => Ok(Err(format!("the command's helper said {other:?} too early"))),
    }
}

fn read_said(reader: &mut impl BufRead) -> io::Result<Said> {
    let mut line = String::new();
    reader.take(MAX_SAID).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without a word"));
    }
    serde_json::from_str(&line).map_err(io::Error::from)
}

/// The container's spec with what the operator wants in place of its own.
fn spec_of(running: &Running, wish: &ExecWish) -> crate::containers::Spec {
    let mut spec = running.spec.clone();
    spec.argv.clone_from(&wish.argv);
    if wish.user.is_some() {
        spec.user.clone_from(&wish.user);
    }
    for entry in &wish.env {
        let key = entry.split_once('=').map_or(entry.as_str(), |(key, _)| key);
        spec.env.retain(|old| old.split_once('=').is_none_or(|(known, _)| known != key));
        spec.env.push(entry.clone());
    }
    spec
}

/// Serves it to its end. An operator who leaves takes the command along.
pub(super) fn serve(link: &mut Link, mut session: Session) -> Result<(), LinkError> {
    link.send(&Frame::Started)?;
    let mut buffer = vec![0; MAX_DATA];
    loop {
        while let Some(received) = link.receive()? {
            session.take(received);
        }
        let taken = session.pass_input();
        if taken > 0 {
            link.input_taken(taken)?;
        }
        session.hear();
        let quiet = session.pass_output(link, &mut buffer)?;
        if quiet && let Some(exit) = session.exit.take() {
            return link.finish(&match exit {
                Ok(exit) => Frame::Exit(exit),
                Err(why) => Frame::Failure(why.into()),
            });
        }
        session.wait(link)?;
    }
}

impl Session {
    fn take(&mut self, received: Received) {
        match received {
            Received::Input(bytes) => self.waiting.extend(bytes),
            Received::EndOfInput => {
                if self.terminal {
                    self.waiting.push_back(END_OF_TRANSMISSION);
                }
                self.input_ended = true;
            }
            Received::Size(size) => self.resize(size),
            Received::Signal(signal) => {
                if let Some(mut control) = self.control.as_ref() {
                    // A helper that takes nothing has ended.
                    let _ = control.write(&[signal]);
                }
            }
        }
    }

    fn resize(&self, size: TerminalSize) {
        let size = Winsize { ws_col: size.columns, ws_row: size.rows, ws_xpixel: 0, ws_ypixel: 0 };
        if let Some(master) = self.output.as_ref().filter(|_| self.terminal)
            && let Err(error) = tcsetwinsize(master, size)
        {
            log::debug!("the size of a command's terminal: {error}");
        }
    }

    /// Gives the command what it takes now. How many bytes of the operator's are done with.
    fn pass_input(&mut self) -> usize {
        let mut taken = 0;
        while let (Some(input), false) = (&self.input, self.waiting.is_empty()) {
            let (first, _) = self.waiting.as_slices();
            match rustix::io::write(input, first) {
                Ok(count) => {
                    self.waiting.drain(..count);
                    taken += count;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return taken,
                // It reads no more.
                Err(_) => self.input = None,
            }
        }
        if self.input.is_none() {
            taken += self.waiting.len();
            self.waiting.clear();
        } else if self.input_ended && !self.terminal {
            self.input = None;
        }
        taken
    }

    /// What the helper says now.
    fn hear(&mut self) {
        while let Some(control) = &mut self.control {
            let mut bytes = [0; 256];
            match control.read(&mut bytes) {
                Ok(count) if count > 0 => {
                    self.said.extend_from_slice(bytes.get(..count).unwrap_or_default());
                    if let Ok(said) = serde_json::from_slice::<Said>(&self.said) {
                        let unclear = || format!("the command's helper said {said:?}");
                        self.exit = Some(match &said {
                            Said::Failed(why) => Err(why.clone()),
                            said => said.exit().ok_or_else(unclear),
                        });
                        self.control = None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    self.control = None;
                    let gone = "the command was killed with its helper; did its container end?";
                    self.exit.get_or_insert_with(|| Err(gone.to_owned()));
                }
            }
        }
    }

    /// Sends what the command has written, as far as there is room. True when there is no more now.
    fn pass_output(&mut self, link: &mut Link, buffer: &mut [u8]) -> Result<bool, LinkError> {
        let mut quiet = [false; 2];
        while quiet != [true; 2] {
            for (index, end) in [&mut self.output, &mut self.errors].into_iter().enumerate() {
                let Some(room) = buffer.get_mut(..link.room()).filter(|room| !room.is_empty())
                else {
                    return Ok(false);
                };
                let read = end.as_ref().map(|fd| rustix::io::read(fd, room));
                match read {
                    Some(Ok(count)) if count > 0 => {
                        let bytes = buffer.get(..count).unwrap_or_default();
                        let frame =
                            if index == 0 { Frame::Output(bytes) } else { Frame::Errors(bytes) };
                        link.send(&frame)?;
                    }
                    Some(Err(rustix::io::Errno::INTR)) => {}
                    other => {
                        // EIO: nobody has the terminal open any more.
                        if !matches!(other, Some(Err(rustix::io::Errno::AGAIN))) {
                            *end = None;
                        }
                        if let Some(quiet) = quiet.get_mut(index) {
                            *quiet = true;
                        }
                    }
                }
            }
        }
        Ok(true)
    }

    fn wait(&self, link: &Link) -> Result<(), LinkError> {
        let (socket, flags) = link.interest();
        let mut fds = vec![PollFd::from_borrowed_fd(socket, flags)];
        let control = self.control.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
        let input = self.input.as_ref().filter(|_| !self.waiting.is_empty());
        let outputs = [&self.output, &self.errors].into_iter().flatten();
        let outputs = outputs.filter(|_| link.room() > 0);
        fds.extend(control);
        fds.extend(input.map(|fd| PollFd::new(fd, PollFlags::OUT)));
        fds.extend(outputs.map(|fd| PollFd::new(fd, PollFlags::IN)));
        wait(&mut fds, TICK)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The helper ends the command when this closes, and itself with it.
        self.control = None;
        self.input = None;
        self.output = None;
        self.errors = None;
        if let Err(error) = self.helper.wait() {
            log::warn!("a command's helper: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::{Keeping, NodeFacts, Place, Spec};

    fn running() -> Running {
        let place = Place {
            id: "hello-web-1".to_owned(),
            set: "hello".parse().expect("name"),
            set_digest: protocol::ids::Digest::of(b"set"),
            root: "/root".into(),
            hostname: "n1".to_owned(),
            log_dir: "/log".into(),
            restarts: 0,
            version: None,
            keeping: Keeping { memory: "/kept".into(), disk: None },
            facts: NodeFacts::default(),
        };
        let container = serde_json::json!({"name": "web", "image": "web", "command": ["httpd"],
            "env": {"A": "1"}, "user": "www", "workdir": "/srv"});
        let container = serde_json::from_value(container).expect("container");
        let image = serde_json::from_str("{\"Env\":[\"PATH=/bin\"]}").expect("image");
        let spec = Spec::plan(place, &container, &image).expect("plan");
        let pid = std::process::id();
        let me = rustix::process::getpid();
        let pidfd = rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty());
        Running { spec, pidfd: pidfd.expect("pidfd"), pid }
    }

    fn wish(env: &[&str], user: Option<&str>) -> ExecWish {
        ExecWish {
            argv: vec!["sh".to_owned()],
            env: env.iter().map(|text| (*text).to_owned()).collect(),
            user: user.map(str::to_owned),
            terminal: None,
        }
    }

    #[test]
    fn a_command_is_the_container_s_own_but_for_what_the_operator_says() {
        let running = running();
        let spec = spec_of(&running, &wish(&["A=2", "TERM=xterm"], None));
        assert_eq!(spec.argv, ["sh"]);
        let env: Vec<&str> = spec.env.iter().map(String::as_str).collect();
        assert!(env.contains(&"PATH=/bin") && !env.contains(&"A=1"), "{env:?}");
        assert!(env.ends_with(&["A=2", "TERM=xterm"]), "{env:?}");
        assert_eq!((spec.user.as_deref(), spec.workdir.as_str()), (Some("www"), "/srv"));
        assert_eq!(spec_of(&running, &wish(&[], Some("0"))).user.as_deref(), Some("0"));
    }

    #[test]
    fn a_helper_that_ends_without_a_word_is_an_error_and_not_left_behind() {
        let error = start_with(Path::new("/bin/true"), &running(), &wish(&[], None));
        let error = error.expect_err("no helper");
        assert!(error.starts_with("the command's helper: "), "{error}");
    }
}
