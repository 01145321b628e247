//! The last step: working directory, environment, finding the program and executing it.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;

use nix::errno::Errno;
use nix::unistd::{AccessFlags, eaccess};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use super::notify::words;
use super::{InitError, step};
use crate::containers::Spec;
use crate::sys::process::reset_signals;

/// Makes the working directory when it is missing and enters it. The process's root must be the image's.
///
/// # Errors
/// The step with the directory's name.
pub(super) fn enter_workdir(path: &str) -> Result<(), InitError> {
    let failed = || format!("enter the working directory {path}");
    std::fs::create_dir_all(path).map_err(step::<io::Error>(failed()))?;
    // Through /proc/self/fd it could lead out of the root (CVE-2024-21626).
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
        .map_err(step(failed()))?;
    rustix::process::fchdir(&directory).map_err(step(failed()))
}

/// A program ready to be executed: everything that allocates is done.
#[derive(Debug)]
pub(super) struct Program {
    name: String,
    candidates: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// From the spec, with HOME added where the environment has none.
    ///
    /// # Errors
    /// A NUL byte or an empty command.
    pub(super) fn new(spec: &Spec, home: &str) -> Result<Self, InitError> {
        let mut env = spec.env.clone();
        if !env.iter().any(|entry| entry.starts_with("HOME=")) {
            env.push(format!("HOME={home}"));
        }
        let path = env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
        let name = spec.argv.first().cloned().unwrap_or_default();
        let candidates = candidates(&name, path);
        let strings = |texts: &[String]| {
            texts
                .iter()
                .map(|text| CString::new(text.as_str()))
                .collect::<Result<Vec<_>, _>>()
                .map_err(step::<std::ffi::NulError>("a NUL byte in command or environment"))
        };
        let mut program = Self {
            candidates: strings(&candidates)?,
            argv: strings(&spec.argv)?,
            env: strings(&env)?,
            name,
        };
        program.tell(spec)?;
        Ok(program)
    }

    /// Says in its environment which sockets it has and where it may speak of itself, as the process that calls this.
    ///
    /// # Errors
    /// A NUL byte in a socket's name.
    pub(super) fn tell(&mut self, spec: &Spec) -> Result<(), InitError> {
        for (key, value) in words(spec, std::process::id()) {
            let is_it = |entry: &CString| {
                entry
                    .to_bytes()
                    .strip_prefix(key.as_bytes())
                    .is_some_and(|rest| rest.starts_with(b"="))
            };
            self.env.retain(|entry| !is_it(entry));
            let entry = CString::new(format!("{key}={value}"));
            self.env
                .push(entry.map_err(step::<std::ffi::NulError>("a NUL byte in a socket's name"))?);
        }
        Ok(())
    }

    /// Does what can be done before the exec: signals are reset, and a program that is not there or not executable is found
    /// out while the old version still runs. The look also brings the file into the kernel's caches.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub(super) fn prepare(&self) -> Result<(), InitError> {
        reset_signals();
        let mut reason = Errno::ENOENT;
        for candidate in &self.candidates {
            match eaccess(candidate.as_c_str(), AccessFlags::X_OK) {
                Ok(()) => return Ok(()),
                Err(error) => reason = more_telling(reason, error),
            }
        }
        Err(self.failed(reason))
    }

    /// Executes it, or says why that cannot be. As execvp(3), but without a shell for files of no known format.
    ///
    /// # Errors
    /// The most telling of the candidates' errors.
    pub(super) fn execute(&self) -> Result<Infallible, InitError> {
        let mut reason = Errno::ENOENT;
        for candidate in &self.candidates {
            let Err(error) = nix::unistd::execve(candidate, &self.argv, &self.env);
            reason = more_telling(reason, error);
            if !matches!(error, Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES) {
                break;
            }
        }
        Err(self.failed(reason))
    }

    fn failed(&self, reason: Errno) -> InitError {
        step::<io::Error>(format!("execute `{}`", self.name))(reason.into())
    }
}

/// That a directory of PATH has no such program says less than any other error.
fn more_telling(known: Errno, new: Errno) -> Errno {
    if matches!(new, Errno::ENOENT | Errno::ENOTDIR) { known } else { new }
}

/// Where a program may lie: a name with a slash is a path, another is looked for in PATH, where an empty entry means here.
fn candidates(name: &str, path: &str) -> Vec<String> {
    if name.is_empty() || name.contains('/') {
        return vec![name.to_owned()];
    }
    path.split(':')
        .map(|dir| if dir.is_empty() { format!("./{name}") } else { format!("{dir}/{name}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_as_a_shell_does() {
        assert_eq!(candidates("sh", "/usr/bin:/bin"), ["/usr/bin/sh", "/bin/sh"]);
        assert_eq!(candidates("sh", "/bin::x"), ["/bin/sh", "./sh", "x/sh"]);
        assert_eq!(candidates("/bin/sh", "/usr/bin"), ["/bin/sh"]);
        assert_eq!(candidates("./sh", "/usr/bin"), ["./sh"]);
        assert_eq!(candidates("", "/usr/bin"), [""]);
    }
}
