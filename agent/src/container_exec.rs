//! container-exec: puts one more command into a running container, beside the container's own program.
//!
//! The agent ([`crate::channel`]) starts this role as a fresh process with one thread. It enters the container's control group and
//! namespaces by the descriptor of the container's first process, opens a terminal in the container's own devpts or makes pipes,
//! and forks a child, which becomes the command (`container_init::join`). The near ends of the terminal or the pipes go
//! to the agent; this process stays to pass signals on and to reap. When the agent or its channel goes away, the command is
//! ended.
//!
//! Nothing of the node reaches the command: both processes are out of the container's reach (not dumpable) until the exec, which
//! closes every descriptor but the standard ones; this program is executed from a read-only mount of its own (CVE-2019-5736); and
//! the working directory is entered as the container's own program's is (CVE-2024-21626).

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use protocol::channel::TerminalSize;
use protocol::channel::frame::Exit;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, fstat, fstatfs, major, minor, open};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde::{Deserialize, Serialize};

use crate::container_init::limits;
use crate::containers::Spec;
use crate::containers::cgroup::{Cgroup, find_v2};
use crate::sys::process::{OneThread, Spawned, close_from, fork_alone};

/// Longest request, in bytes: a command of the longest, and what the container's spec says besides.
const MAX_REQUEST: u64 = 4 << 20;
/// What the file system of terminals is called by statfs(2) (DEVPTS_SUPER_MAGIC).
const DEVPTS_MAGIC: i64 = 0x1cd1;
/// Device number of `/dev/ptmx` (Documentation/admin-guide/devices.txt).
const PTMX: (u32, u32) = (5, 2);
/// What a command gets between SIGHUP and SIGKILL when its operator has gone.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest complaint that is read from the child, in bytes.
const MAX_COMPLAINT: u64 = 4 << 10;

/// What the agent asks for: one line of JSON, after one byte that carries the descriptor of the container's first process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The container, with command, environment and user of what is to run.
    pub spec: Spec,
    /// Its first process's id on the node.
    pub pid: u32,
    /// The size of the terminal, where there is to be one.
    pub terminal: Option<TerminalSize>,
}

/// What the agent is told: one line of JSON each, after one byte that carries the ends of the terminal or the pipes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Said {
    /// The command runs.
    Started,
    /// It could not be run: one sentence. The last line.
    Failed(String),
    /// It ended with this code. The last line.
    Code(i32),
    /// This signal ended it. The last line.
    Signal(i32),
}

impl Said {
    /// How the command ended, where this says so.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        match self {
            Self::Code(code) => Some(Exit::Code(*code)),
            Self::Signal(signal) => Some(Exit::Signal(*signal)),
            Self::Started | Self::Failed(_) => None,
        }
    }
}

/// Runs the role, with the agent connected on descriptor 0. The result is the process's exit code.
#[must_use]
pub fn run() -> i32 {
    let Ok(agent) = take_inherited() else { return 1 };
    let said = match serve(&agent) {
        Ok(exit) => exit,
        Err(why) => Said::Failed(why),
    };
    // An agent that has gone is told nothing.
    i32::from(say(&agent, &said).is_err())
}

fn take_inherited() -> io::Result<UnixStream> {
    close_from(3)?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // Nobody in the container may look into this process or its child before the exec (CVE-2016-9962).
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let agent = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let nowhere = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    rustix::stdio::dup2_stderr(&nowhere)?;
    Ok(UnixStream::from(agent))
}

fn say(mut agent: &UnixStream, said: &Said) -> io::Result<()> {
    let mut line = serde_json::to_vec(said)?;
    line.push(b'\n');
    agent.write_all(&line)
}

fn step<E: Into<io::Error>>(name: &'static str) -> impl FnOnce(E) -> String {
    move |error| format!("{name}: {}", error.into())
}

fn serve(agent: &UnixStream) -> Result<Said, String> {
    let mut fds = receive_fds(agent).map_err(step("the request"))?;
    let pidfd = fds.pop().ok_or("the request has no process with it")?;
    let mut line = String::new();
    let reader = BufReader::new(agent).take(MAX_REQUEST).read_line(&mut line);
    reader.map_err(step("the request"))?;
    let request: ExecRequest =
        serde_json::from_str(&line).map_err(|error| format!("the request: {error}"))?;

    // All that is needed of the node, before the container is entered.
    let alone = OneThread::check().map_err(step("fork"))?;
    let namespaces = foreign_namespaces(request.pid).map_err(step("its namespaces"))?;
    join_cgroup(&request).map_err(|error| format!("join its control group: {error}"))?;
    // The command inherits them; in a user namespace they could not be raised.
    limits::set(&request.spec).map_err(|error| error.to_string())?;
    std::env::set_current_dir("/").map_err(step("leave the working directory"))?;
    setns(&pidfd, namespaces).map_err(step("enter its namespaces"))?;
    if namespaces.contains(CloneFlags::CLONE_NEWUSER) {
        // Until then this is nobody there.
        rustix::thread::set_thread_res_gid(gid0(), gid0(), gid0())
            .map_err(step("become its root"))?;
        rustix::thread::set_thread_res_uid(uid0(), uid0(), uid0())
            .map_err(step("become its root"))?;
    }
    let (ours, theirs) = match request.terminal {
        Some(size) => terminal(size)?,
        None => pipes().map_err(step("pipes"))?,
    };
    let (child, status) = start(&request, theirs, alone)?;
    let ends: Vec<BorrowedFd<'_>> = ours.iter().map(AsFd::as_fd).collect();
    send_fds(agent, &ends).map_err(step("hand the terminal over"))?;
    drop(ours);
    watch(agent, &child, status)
}

fn uid0() -> rustix::fs::Uid {
    rustix::fs::Uid::ROOT
}

fn gid0() -> rustix::fs::Gid {
    rustix::fs::Gid::ROOT
}

/// The namespaces of that process which are not this one's.
fn foreign_namespaces(pid: u32) -> io::Result<CloneFlags> {
    const NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);
    let all = [
        ("mnt", CloneFlags::CLONE_NEWNS),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
        ("net", CloneFlags::CLONE_NEWNET),
        ("user", CloneFlags::CLONE_NEWUSER),
        ("time", NEWTIME),
    ];
    let mut flags = CloneFlags::empty();
    for (name, flag) in all {
        let of = |who: &str| std::fs::metadata(format!("/proc/{who}/ns/{name}"));
        // A kernel without this kind of namespace has no such file.
        let Ok(mine) = of("self") else { continue };
        let its = of(&pid.to_string())?;
        if (mine.dev(), mine.ino()) != (its.dev(), its.ino()) {
            flags |= flag;
        }
    }
    Ok(flags)
}

/// Into the container's own group, or, where an init has divided that further and it takes no process, into the init's.
fn join_cgroup(request: &ExecRequest) -> io::Result<()> {
    let Some(group) = Cgroup::find(&request.spec.id) else { return Ok(()) };
    match std::fs::write(group.path().join("cgroup.procs"), "0") {
        Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {}
        result => return result,
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let root = find_v2(&mounts).ok_or(io::ErrorKind::NotFound)?;
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", request.pid))?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = own.filter(|own| !own.contains("..")).ok_or(io::ErrorKind::NotFound)?;
    std::fs::write(root.join(own).join("cgroup.procs"), "0")
}

type Ends = (Vec<OwnedFd>, Vec<OwnedFd>);

/// A terminal in the container's own devpts: the master for the agent, the slave three times for the command.
///
/// What lies at /dev/pts is the container's to choose: nothing but the real thing is taken (CVE-2025-52565).
fn terminal(size: TerminalSize) -> Result<Ends, String> {
    // Non-blocking, so that a FIFO there holds nobody up; no symbolic link but the container's own into its devpts.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = open("/dev/pts/ptmx", flags | OFlags::NOFOLLOW, Mode::empty())
        .map_err(|error| format!("open the container's /dev/pts/ptmx: {error}"))?;
    let stat = fstat(&master).map_err(step("the container's /dev/pts/ptmx"))?;
    let system = fstatfs(&master).map_err(step("the container's /dev/pts/ptmx"))?;
    let device = (major(stat.st_rdev), minor(stat.st_rdev));
    let character = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device();
    if !character || device != PTMX || system.f_type != DEVPTS_MAGIC {
        return Err("the container's /dev/pts/ptmx is not that of a devpts".to_owned());
    }
    unlockpt(&master).map_err(step("open a terminal"))?;
    let slave =
        ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .map_err(step("open a terminal"))?;
    let size = Winsize { ws_col: size.columns, ws_row: size.rows, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&slave, size).map_err(step("size the terminal"))?;
    let more = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3);
    let slaves = [more(&slave), more(&slave)].into_iter().collect::<Result<Vec<_>, _>>();
    let mut slaves = slaves.map_err(step("open a terminal"))?;
    slaves.push(slave);
    Ok((vec![master], slaves))
}

/// For standard input, output and error.
fn pipes() -> io::Result<Ends> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let ((read_in, write_in), (read_out, write_out), (read_err, write_err)) =
        (pipe()?, pipe()?, pipe()?);
    Ok((vec![write_in, read_out, read_err], vec![read_in, write_out, write_err]))
}

/// Forks the child. What it has to complain of comes out of the returned pipe.
fn start(
    request: &ExecRequest,
    stdio: Vec<OwnedFd>,
    alone: OneThread,
) -> Result<(Spawned, OwnedFd), String> {
    let pipe = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (status, status_out) = pipe.map_err(step("pipe"))?;
    match fork_alone(alone).map_err(step("fork"))? {
        Some(child) => Ok((child, status)),
        None => {
            drop(status);
            crate::container_init::join::run(request, &stdio, &status_out)
        }
    }
}

/// Until the command has ended, one way or another.
fn watch(agent: &UnixStream, child: &Spawned, status: OwnedFd) -> Result<Said, String> {
    let mut complaint = String::new();
    let read = File::from(status).take(MAX_COMPLAINT).read_to_string(&mut complaint);
    read.map_err(step("the command's start"))?;
    if !complaint.is_empty() {
        reap(child)?;
        return Ok(Said::Failed(complaint.trim_end().to_owned()));
    }
    say(agent, &Said::Started).map_err(step("tell the agent"))?;
    let mut signals = agent;
    let mut deadline: Option<Instant> = None;
    let mut killed = false;
    loop {
        let mut fds = vec![PollFd::new(&child.pidfd, PollFlags::IN)];
        if deadline.is_none() {
            fds.push(PollFd::new(agent, PollFlags::IN));
        }
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result.map_err(step("poll"))?,
        };
        let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        if ready(0) {
            return reap(child);
        }
        if ready(1) {
            let mut signal = [0];
            match signals.read(&mut signal) {
                Ok(1) => kill(child, i32::from(signal[0])),
                // The agent, or its channel, is gone.
                Ok(_) | Err(_) => {
                    kill(child, nix::libc::SIGHUP);
                    kill(child, nix::libc::SIGCONT);
                    deadline = Some(Instant::now() + PATIENCE);
                }
            }
        } else if deadline.is_some_and(|at| at <= Instant::now()) {
            if killed {
                return Err("the command cannot be killed".to_owned());
            }
            killed = true;
            kill(child, nix::libc::SIGKILL);
            deadline = Some(Instant::now() + PATIENCE);
        }
    }
}

/// To the command's process group; it is not reaped yet, so the number is still its own. One that has ended takes none.
fn kill(child: &Spawned, signal: i32) {
    let signal = nix::sys::signal::Signal::try_from(signal).ok();
    let group = i32::try_from(child.pid).ok().map(nix::unistd::Pid::from_raw);
    if let (Some(signal), Some(group)) = (signal, group) {
        let _ = nix::sys::signal::killpg(group, signal);
    }
}

fn reap(child: &Spawned) -> Result<Said, String> {
    let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED);
    let status = status.map_err(step("wait for the command"))?.ok_or("it has not ended")?;
    Ok(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Said::Code(code),
        (None, signal) => Said::Signal(signal.unwrap_or_default()),
    })
}

/// Sends descriptors with one byte.
///
/// # Errors
/// The kernel's.
pub fn send_fds(socket: &UnixStream, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(socket, &[IoSlice::new(b"+")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives the descriptors that come with the next byte; none when another byte came alone.
///
/// # Errors
/// The kernel's, or that the other side has gone.
pub fn receive_fds(socket: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags)?;
    if got.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(fds)
}
