//! Processes: clone3(2) into namespaces with an exec, signals by pidfd, mount_setattr(2) and what goes with an execve.
//!
//! Not a wrapper of everything: what rustix or nix offer safely is used from there.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;

/// `clone_args` of clone3(2), as of Linux 5.7 (with `cgroup`).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// `CLONE_INTO_CGROUP` (linux/sched.h); libc has it only for some targets.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// The first descriptor number that [`spawn`] uses for its copies: above every target number.
const HIGH_FD: RawFd = 128;
/// Exit code of a child that could not exec.
const EXEC_FAILED: i32 = 127;

/// A mount namespace, a process id namespace and so on: everything a container gets of its own.
pub const CONTAINER_NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u64;

/// A user namespace: besides, where it is asked for.
pub const USER_NAMESPACE: u64 = libc::CLONE_NEWUSER as u64;

/// A child that [`spawn`] made.
#[derive(Debug)]
pub struct Spawned {
    /// Its process id in the caller's namespace.
    pub pid: u32,
    /// The descriptor that names it for good; readable when it has ended.
    pub pidfd: OwnedFd,
}

/// Starts `program` (an open file) in new namespaces, with `fds` as its descriptors 0, 1, 2 and so on.
///
/// The caller must have only one thread: the child runs its code up to the exec. The signal mask is emptied in the child.
///
/// # Errors
/// The kernel's error of clone3(2) or fcntl(2). A child that cannot exec ends with 127.
///
/// With a `gate` the child waits for a byte from it before the exec, and becomes root of its user namespace then: until its
/// maps are written it is nobody there (user_namespaces(7)).
pub fn spawn(
    program: BorrowedFd<'_>,
    args: &[&CStr],
    namespaces: u64,
    cgroup: Option<BorrowedFd<'_>>,
    gate: Option<BorrowedFd<'_>>,
    fds: &[BorrowedFd<'_>],
) -> io::Result<Spawned> {
    let copies = fds
        .iter()
        .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, HIGH_FD))
        .collect::<Result<Vec<_>, _>>()?;
    let program = rustix::io::fcntl_dupfd_cloexec(program, HIGH_FD)?;
    let mut argv: Vec<*const libc::c_char> = args.iter().map(|arg| arg.as_ptr()).collect();
    argv.push(std::ptr::null());
    let envp: [*const libc::c_char; 1] = [std::ptr::null()];
    let mut pidfd: RawFd = -1;
    let mut request = CloneArgs {
        flags: namespaces | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        request.flags |= CLONE_INTO_CGROUP;
        request.cgroup = u64::try_from(cgroup.as_raw_fd()).unwrap_or_default();
    }
    // SAFETY: `request` is a valid clone_args whose pidfd points to a live i32; without CLONE_VM the child has its own copy of
    // the memory, and the caller has one thread, so no lock is held by somebody who does not exist in the child.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut request, size_of::<CloneArgs>()) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        // SAFETY: the child of the clone above; every pointer is to memory of its own copy, argv and envp end with null.
        unsafe {
            if let Some(gate) = gate {
                pass_gate(gate.as_raw_fd());
            }
            exec_in_child(program.as_raw_fd(), &copies, argv.as_ptr(), envp.as_ptr())
        }
    }
    // SAFETY: clone3 stored a new descriptor there, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let pid = u32::try_from(pid).map_err(|_| io::Error::other("clone3 returned a strange pid"))?;
    Ok(Spawned { pid, pidfd })
}

/// Waits for a byte and becomes root of the user namespace. Ends with 127 when that fails.
///
/// # Safety
/// Only in a freshly cloned child.
unsafe fn pass_gate(gate: RawFd) {
    let mut byte = 0_u8;
    // SAFETY: plain system calls; `byte` is a live byte. The kernel is asked directly because glibc would tell its other
    // threads, of which the child has none.
    unsafe {
        let passed = libc::read(gate, (&raw mut byte).cast(), 1) == 1
            && libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) == 0
            && libc::syscall(libc::SYS_setresgid, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_setresuid, 0, 0, 0) == 0;
        if !passed {
            libc::_exit(EXEC_FAILED);
        }
    }
}

/// The child's way from clone to exec: descriptors, signal mask, exec. Ends with 127 when that fails.
///
/// # Safety
/// Only in a freshly cloned child; `argv` and `envp` must be arrays of C strings that end with null.
unsafe fn exec_in_child(
    program: RawFd,
    copies: &[OwnedFd],
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
) -> ! {
    // SAFETY: plain system calls on descriptors that exist and memory that outlives them, as the caller promises.
    unsafe {
        for (target, copy) in (0..).zip(copies) {
            if libc::dup2(copy.as_raw_fd(), target) < 0 {
                libc::_exit(EXEC_FAILED);
            }
        }
        reset_signals();
        libc::syscall(libc::SYS_execveat, program, c"".as_ptr(), argv, envp, libc::AT_EMPTY_PATH);
        libc::_exit(EXEC_FAILED)
    }
}

/// Gives every signal its default action and empties the mask: what a program expects to find after an exec.
///
/// The Rust runtime ignores SIGPIPE, and ignored signals stay ignored through execve(2). The kernel is asked directly because
/// glibc keeps 32 and 33 for itself and refuses them.
pub fn reset_signals() {
    const LAST_SIGNAL: i32 = 64;
    const KERNEL_SET: usize = 8;
    // All zero: SIG_DFL, no flags, an empty mask. As large as the kernel's struct on every 64-bit architecture.
    let default = [0_u64; 4];
    // SAFETY: the default action runs no code of ours; the kernel reads `default` and the empty set within their sizes.
    unsafe {
        for signal in 1..=LAST_SIGNAL {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                KERNEL_SET,
            );
        }
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            default.as_ptr(),
            std::ptr::null_mut::<u64>(),
            KERNEL_SET,
        );
    }
}

/// Sends a signal, real-time signals included, by pidfd (pidfd_send_signal(2)).
///
/// # Errors
/// ESRCH when the process has ended, EINVAL for no signal.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no pointer but the null siginfo, which the kernel allows.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes every descriptor from `first` on (close_range(2)).
///
/// # Errors
/// The kernel's error; none is known for a plain range.
///
/// Only for the first lines of a process: whoever owns such a descriptor would find it gone.
pub fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: no memory is involved; callers are at the start of a process, before anything owns a descriptor.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Marks every descriptor from `first` on close-on-exec (close_range(2)).
///
/// # Errors
/// The kernel's error; none is known for a plain range.
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let flag = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: no memory is involved, and no descriptor is closed now.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, flag) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// That this process has one thread. Whoever has this starts no other.
#[derive(Debug)]
pub struct OneThread(());

impl OneThread {
    /// Looks into `/proc/self/task`.
    ///
    /// # Errors
    /// That there are more threads, or no `/proc` of this process.
    pub fn check() -> io::Result<Self> {
        match std::fs::read_dir("/proc/self/task")?.count() {
            1 => Ok(Self(())),
            count => Err(io::Error::other(format!("this process has {count} threads"))),
        }
    }
}

/// Forks a process that has one thread. None in the child, which has a copy of everything.
///
/// # Errors
/// The kernel's error.
pub fn fork_alone(_alone: OneThread) -> io::Result<Option<Spawned>> {
    // SAFETY: there is one thread, so the child's memory is whole and no lock in it is held by somebody else.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        return Ok(None);
    }
    let of_child = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    // The child is not reaped before its pidfd is there: the number is its own.
    let pidfd = rustix::process::pidfd_open(of_child, rustix::process::PidfdFlags::empty())?;
    let pid = u32::try_from(pid).map_err(|_| io::Error::other("fork returned a strange pid"))?;
    Ok(Some(Spawned { pid, pidfd }))
}

/// Ends a forked child at once: nothing that belongs to its parent is flushed or run (_exit(2)).
pub fn exit_now(code: i32) -> ! {
    // SAFETY: no memory is involved.
    unsafe { libc::_exit(code) }
}

/// Takes ownership of a descriptor that the parent left open under a number both know, and marks it close-on-exec.
///
/// # Errors
/// EBADF when it is not open.
pub fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: borrowed only for the call, which fails when the number is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and by the protocol between parent and child nobody else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// `mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Adds attributes (`MOUNT_ATTR_*`) to the mount that `mount` is open on, and to those below it when `recursive`.
///
/// # Errors
/// The kernel's error, EINVAL where `mount` is not the root of a mount.
pub fn mount_setattr(mount: impl AsFd, attributes: u64, recursive: bool) -> io::Result<()> {
    let request = MountAttr { set: attributes, clear: 0, propagation: 0, userns_fd: 0 };
    set_attributes(mount.as_fd(), &request, recursive)
}

/// Changes how mounts travel to and from the mount that `mount` is open on, and those below it (`MS_SLAVE`, `MS_PRIVATE`).
///
/// # Errors
/// As [`mount_setattr`].
pub fn mount_propagation(mount: impl AsFd, propagation: u64) -> io::Result<()> {
    let request = MountAttr { set: 0, clear: 0, propagation, userns_fd: 0 };
    set_attributes(mount.as_fd(), &request, true)
}

/// Maps the owners of files on a detached mount by a user namespace's maps (`MOUNT_ATTR_IDMAP`, Linux 5.12).
///
/// # Errors
/// EINVAL where the file system cannot do that (overlay; tmpfs before Linux 6.3).
pub fn mount_idmap(mount: impl AsFd, userns: BorrowedFd<'_>) -> io::Result<()> {
    const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
    let userns_fd = u64::try_from(userns.as_raw_fd()).unwrap_or_default();
    let request = MountAttr { set: MOUNT_ATTR_IDMAP, clear: 0, propagation: 0, userns_fd };
    set_attributes(mount.as_fd(), &request, true)
}

fn set_attributes(mount: BorrowedFd<'_>, request: &MountAttr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string and `request` is a live mount_attr of the given size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(request),
            size_of::<MountAttr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A process that only waits to be killed, in a user namespace of its own: the caller writes its maps and opens the
/// namespace. For a caller with any number of threads.
///
/// # Errors
/// The kernel's error of clone3(2).
pub fn spawn_idle_in_user_namespace() -> io::Result<Spawned> {
    let mut pidfd: RawFd = -1;
    let mut request = CloneArgs {
        flags: (libc::CLONE_NEWUSER | libc::CLONE_PIDFD) as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    // SAFETY: a valid clone_args whose pidfd points to a live i32; the child makes system calls only.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut request, size_of::<CloneArgs>()) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        // SAFETY: plain system calls without memory. It ends with its parent.
        unsafe {
            libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
            loop {
                libc::syscall(libc::SYS_pause);
            }
        }
    }
    // SAFETY: clone3 stored a new descriptor there, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let pid = u32::try_from(pid).map_err(|_| io::Error::other("clone3 returned a strange pid"))?;
    Ok(Spawned { pid, pidfd })
}

/// Lets processes that are started from here on live in a time namespace of their own (time_namespaces(7)).
///
/// # Errors
/// EINVAL where the kernel has none.
pub fn unshare_time() -> io::Result<()> {
    const CLONE_NEWTIME: libc::c_int = 0x80;
    // SAFETY: no memory is involved.
    let result = unsafe { libc::unshare(CLONE_NEWTIME) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Filters the calling thread's system calls from here on, and those of all it starts (seccomp(2), SECCOMP_SET_MODE_FILTER).
///
/// # Errors
/// EACCES without CAP_SYS_ADMIN or no_new_privs, EINVAL for a program that is none.
pub fn set_seccomp_filter(program: &[seccompiler::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::Error::other("too long"))?,
        // The two crates' types are one C struct; the kernel does not write to it.
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: a live sock_fprog whose filter has as many instructions as it says.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes a system call with nothing but zeroes and returns its error number, 0 for none: for tests of filters.
#[must_use]
pub fn try_call(number: i64) -> i32 {
    // SAFETY: null pointers and empty sizes: the kernel refuses them or does nothing; numbers that do something with zeroes
    // are not for this.
    let result = unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) };
    if result < 0 { io::Error::last_os_error().raw_os_error().unwrap_or_default() } else { 0 }
}
