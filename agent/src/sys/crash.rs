//! PID 1 must not end: its crash handlers execute the program again as `init --recover`.
//!
//! Unsafe for `sigaction`, `sigaltstack` and `execve` in a signal handler. The handler touches only static data and makes
//! only system calls that signal-safety(7) lists. Signals that are pending or children that have ended stay where they
//! are, in the kernel: execve keeps the PID, the children and the mounts.
#![allow(unsafe_code)]

use std::ptr;

use nix::libc;

/// The stage of PID 1 after a crash.
pub const RECOVER: &std::ffi::CStr = c"--recover";
const STACK_SIZE: usize = 64 * 1024;
const SIGNALS: [(libc::c_int, &[u8]); 5] = [
    (libc::SIGSEGV, b"<26>layercake: init: SIGSEGV, starting over\n"),
    (libc::SIGBUS, b"<26>layercake: init: SIGBUS, starting over\n"),
    (libc::SIGABRT, b"<26>layercake: init: SIGABRT, starting over\n"),
    (libc::SIGILL, b"<26>layercake: init: SIGILL, starting over\n"),
    (libc::SIGFPE, b"<26>layercake: init: SIGFPE, starting over\n"),
];

/// Executes this program again as `init STAGE`; children, mounts and descriptors that are not marked stay. Returns only when
/// neither `/proc/self/exe` nor `/init` can be executed.
pub fn restart_as(stage: &std::ffi::CStr) {
    let arguments = [c"init".as_ptr(), stage.as_ptr(), ptr::null()];
    const ENVIRONMENT: [*const libc::c_char; 1] = [ptr::null()];
    for path in [c"/proc/self/exe", c"/init"] {
        // SAFETY: both arrays end with a null pointer and hold pointers to C strings.
        unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), ENVIRONMENT.as_ptr()) };
    }
}

/// [`restart_as`] after a crash.
pub fn restart_self() {
    restart_as(RECOVER);
}

extern "C" fn on_crash(signal: libc::c_int) {
    for (number, text) in SIGNALS {
        if number == signal {
            // SAFETY: open and write are async-signal-safe; the path and the text are static. The descriptor is
            // closed by execve.
            unsafe {
                let fd = libc::open(c"/dev/kmsg".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                libc::write(fd, text.as_ptr().cast(), text.len());
            }
        }
    }
    restart_self();
    // SAFETY: _exit is async-signal-safe. As PID 1 it makes the kernel panic and, with `panic=`, reboot: nothing is
    // left that could run.
    unsafe { libc::_exit(70) };
}

/// Installs the handlers, on a stack of their own: a stack overflow is a crash too.
///
/// # Errors
/// What the kernel says to `sigaltstack` or `sigaction`.
pub fn install() -> std::io::Result<()> {
    // Never written to but by a crash, so that it takes no memory.
    let memory = Box::leak(Box::<[u8]>::new_uninit_slice(STACK_SIZE));
    let stack =
        libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK_SIZE };
    // SAFETY: `stack` describes memory that is never freed; no old stack is asked for.
    if unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    for (signal, _) in SIGNALS {
        // SAFETY: an all-zero sigaction is a valid value: default action, empty mask, no flags.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_crash as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // Without SA_NODEFER the signal would stay blocked across execve, and the next crash would be fatal.
        action.sa_flags = libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: the handler is an `extern "C"` function of one int, as sa_flags without SA_SIGINFO says.
        if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Takes the handlers away again: in a child that is not to become PID 1.
pub fn uninstall() {
    for (signal, _) in SIGNALS {
        // SAFETY: SIG_DFL is a valid disposition and no handler is involved.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handlers_install_for_every_crash_signal() {
        install().unwrap();
        for (signal, text) in SIGNALS {
            let mut action: libc::sigaction =
                // SAFETY: an all-zero sigaction is a valid value to be written over.
                unsafe { std::mem::zeroed() };
            // SAFETY: only reads the present action into `action`.
            let result = unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
            assert_eq!(result, 0);
            assert_ne!(action.sa_sigaction, libc::SIG_DFL, "{}", text.escape_ascii());
            assert_ne!(action.sa_flags & libc::SA_NODEFER, 0);
        }
    }
}
