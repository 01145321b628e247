//! Starting a program without allocating: fork, a few system calls, exec. And descriptors at fixed numbers, which PID 1 finds
//! again when it executes itself.
//!
//! Unsafe for clone3(2), for what the child calls before its exec, and because a number proves no ownership. Not for
//! containers ([`super::process::spawn`]) and not for whoever may allocate (`std::process::Command`).
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::process::reset_signals;

/// Most arguments, and most variables, of a program.
const MAX_WORDS: usize = 7;
/// Exit code of a child that could not exec.
pub const EXEC_FAILED: i32 = 127;

/// What to start, and how.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    /// The file.
    pub program: &'a CStr,
    /// Its arguments, `argv[0]` first; at most seven.
    pub args: &'a [&'a CStr],
    /// Its environment; at most seven variables.
    pub env: &'a [&'a CStr],
    /// Descriptors from 3 on; their own numbers must lie above those. 0, 1 and 2 are the caller's, all others are closed.
    pub fds: &'a [RawFd],
    /// Files that the child writes to first: what cannot be written is passed over.
    pub writes: &'a [(&'a CStr, &'a [u8])],
    /// Descriptor 0 becomes the terminal of its session.
    pub terminal: bool,
}

/// Starts a program in a session of its own, with every signal at its default. The child ends with [`EXEC_FAILED`] when the
/// exec fails. For a caller with one thread; allocates nothing.
///
/// # Errors
/// What clone3(2) says; E2BIG for too many words.
pub fn start(start: &Start<'_>) -> Result<i32, Errno> {
    let args = pointers(start.args)?;
    let env = pointers(start.env)?;
    // flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls: the first version of clone_args.
    let request = [0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    // SAFETY: a valid clone_args; without CLONE_VM the child has its own copy of the memory, and the caller has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const request, size_of_val(&request)) };
    if pid < 0 {
        return Err(Errno::last());
    }
    if pid == 0 {
        // SAFETY: the child of the clone above; both arrays end with null and point to C strings that it has copies of.
        unsafe { in_child(start, args.as_ptr(), env.as_ptr()) }
    }
    i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)
}

/// A child of [`fork`].
#[derive(Debug)]
#[must_use]
pub struct Child(nix::unistd::Pid);

impl Child {
    /// Waits until it has ended, at most so long. It is left to whoever reaps.
    pub fn wait(&self, most: Duration) {
        let pid = Pid::from_raw(self.0.as_raw());
        let Some(Ok(fd)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else { return };
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        // Whoever is woken too early goes on too early, no more.
        let _ = poll(&mut fds, Timespec::try_from(most).ok().as_ref());
    }
}

/// Runs a part of this program in a child, without an exec: a crash ends it, all else is the child's copy of what the caller has.
/// Nobody is told how it ends. For a caller with one thread.
///
/// # Errors
/// What fork(2) says.
pub fn fork(body: impl FnOnce()) -> Result<Child, Errno> {
    // SAFETY: the caller has one thread, so the child is in no way less than its parent.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(Child(child)),
        nix::unistd::ForkResult::Child => {
            super::crash::uninstall();
            body();
            // SAFETY: ends the child alone, without running what the parent has registered for its own end.
            unsafe { libc::_exit(0) }
        }
    }
}

type Words = [*const libc::c_char; MAX_WORDS + 1];

fn pointers(words: &[&CStr]) -> Result<Words, Errno> {
    let mut pointers: Words = [ptr::null(); MAX_WORDS + 1];
    if words.len() > MAX_WORDS {
        return Err(Errno::E2BIG);
    }
    for (pointer, word) in pointers.iter_mut().zip(words) {
        *pointer = word.as_ptr();
    }
    Ok(pointers)
}

/// # Safety
/// Only in a freshly cloned child; `argv` and `envp` must be arrays of C strings that end with null.
unsafe fn in_child(
    start: &Start<'_>,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
) -> ! {
    // SAFETY: plain system calls on memory of the child's own, as the caller promises.
    unsafe {
        libc::setsid();
        for (path, bytes) in start.writes {
            let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            libc::write(fd, bytes.as_ptr().cast(), bytes.len());
            libc::close(fd);
        }
        let mut target = 3;
        for fd in start.fds {
            if libc::dup2(*fd, target) < 0 {
                libc::_exit(EXEC_FAILED);
            }
            target += 1;
        }
        libc::syscall(libc::SYS_close_range, target, libc::c_uint::MAX, 0);
        if start.terminal {
            // One that cannot be taken still carries the shell, only without job control.
            libc::ioctl(0, libc::TIOCSCTTY, 0);
        }
        reset_signals();
        libc::chdir(c"/".as_ptr());
        libc::execve(start.program.as_ptr(), argv, envp);
        libc::_exit(EXEC_FAILED)
    }
}

/// Moves a descriptor to this number, where it stays open across exec; what was open there is closed.
///
/// # Errors
/// What dup3(2) says.
pub fn keep_at(fd: OwnedFd, number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the number is one of PID 1's own, and whoever owned it before has been dropped or is replaced by this.
    if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
        return Err(Errno::last());
    }
    // SAFETY: dup2 has just made it, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// What [`keep_at`] left at this number, in this program or in the one that was executed before it.
#[must_use]
pub fn kept(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: fcntl looks the number up, no more.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: it is open, and by agreement nobody but the caller uses this number.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Marks a descriptor close-on-exec, or takes the mark away.
///
/// # Errors
/// EBADF when it is not open.
pub fn close_on_exec(number: RawFd, close: bool) -> Result<(), Errno> {
    let flag = if close { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: no memory is involved.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETFD, flag) }).map(drop)
}

/// Gives the pages of this program's code and constants back to the page cache, from where they come again when they are
/// needed (madvise(2), MADV_DONTNEED): in an initramfs, which is a tmpfs, they count as memory of whoever has them mapped.
pub fn give_back_program() {
    const PAGE: usize = 4096;
    unsafe extern "C" {
        // The linker's names for where the program begins and where its code ends; what is written to lies behind that.
        static __executable_start: u8;
        static etext: u8;
    }
    let begin = (&raw const __executable_start).addr().next_multiple_of(PAGE);
    let end = (&raw const etext).addr() & !(PAGE - 1);
    let length = end.saturating_sub(begin);
    // SAFETY: whole pages of the program's read-only segments: mapped from its file, never written to, read again on access.
    unsafe { libc::madvise(ptr::without_provenance_mut(begin), length, libc::MADV_DONTNEED) };
}

/// Sends a signal. One who is gone needs none.
pub fn kill(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid);
    if let Some(Err(error)) = pid.map(|pid| rustix::process::kill_process(pid, signal)) {
        log::debug!("signal {}: {}", signal.as_raw(), errno(error));
    }
}

/// The error in the form that is written without the heap.
#[must_use]
pub fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::process::WaitOptions;

    use super::*;

    #[test]
    fn a_child_has_a_session_what_it_was_given_and_nothing_else() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = std::ffi::CString::new(dir.path().join("f").to_str().unwrap()).unwrap();
        std::fs::write(dir.path().join("f"), b"").unwrap();
        let script =
            c"echo $0 $A; cat /proc/self/stat | cut -d' ' -f1,6; ls /proc/self/fd | tr '\\n' ' '";
        let script = [script.to_str().unwrap(), "; grep SigBlk /proc/self/status"].concat();
        let script = std::ffi::CString::new(format!("exec >&3; {script}")).unwrap();
        let high = keep_at(writer, 990).unwrap();
        let pid = start(&Start {
            program: c"/bin/sh",
            args: &[c"sh", c"-c", &script, c"zero"],
            env: &[c"A=b", c"PATH=/usr/bin:/bin"],
            fds: &[high.as_raw_fd()],
            writes: &[(&file, b"written"), (c"/nowhere/x", b"1")],
            terminal: false,
        })
        .unwrap();
        drop(high);
        let mut said = String::new();
        std::fs::File::from(reader).read_to_string(&mut said).unwrap();
        rustix::process::waitpid(rustix::process::Pid::from_raw(pid), WaitOptions::empty())
            .unwrap();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines[0], "zero b", "{said}");
        assert_eq!(lines[1].split(' ').nth(1), Some(pid.to_string().as_str()), "{said}");
        // ls itself holds the directory as the last one.
        assert!(lines[2].starts_with("0 1 2 3 4 SigBlk"), "{said}");
        assert!(lines[2].ends_with("\t0000000000000000"), "{said}");
        assert_eq!(std::fs::read(dir.path().join("f")).unwrap(), b"written");
    }

    #[test]
    fn a_program_that_is_not_there_ends_with_127_and_too_many_words_are_refused() {
        let nothing = Start {
            program: c"/nowhere/program",
            args: &[c"x"],
            env: &[],
            fds: &[],
            writes: &[],
            terminal: false,
        };
        let pid = start(&nothing).unwrap();
        let pid = rustix::process::Pid::from_raw(pid);
        let (_, status) = rustix::process::waitpid(pid, WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(EXEC_FAILED));
        let many = Start { args: &[c"x"; 8], ..nothing };
        assert_eq!(start(&many), Err(Errno::E2BIG));
    }

    #[test]
    fn a_program_whose_pages_are_given_back_goes_on() {
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let own = std::env::current_exe().unwrap().display().to_string();
            let code = maps.split_once(" r-xp ").map(|(_, rest)| rest).unwrap();
            assert!(code.lines().next().unwrap().ends_with(&own), "{code}");
            let line = code.lines().find(|line| line.starts_with("Rss:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        let before = mapped();
        give_back_program();
        let after = mapped();
        assert!(after < before, "{before} KiB of code were mapped, now {after}");
    }

    #[test]
    fn a_kept_descriptor_is_found_by_its_number_alone() {
        assert!(kept(993).is_none() && close_on_exec(993, true).is_err());
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let fd = keep_at(reader, 994).unwrap();
        let flags = || rustix::io::fcntl_getfd(&fd).unwrap();
        assert!(flags().is_empty());
        close_on_exec(994, true).unwrap();
        assert!(flags().contains(rustix::io::FdFlags::CLOEXEC));
    }
}
