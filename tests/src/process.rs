//! Children of the lab. They die with it, whatever happens: dropped they are killed and reaped; when the whole program
//! is killed by SIGKILL the kernel kills them too (setpriv sets PR_SET_PDEATHSIG before it becomes the program).

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::namespace::Namespace;
use crate::{console, prerequisites, wait};

/// How long a program that was asked to end may take before it is killed.
const END_WITHIN: Duration = Duration::from_secs(10);

/// A running child and where its output goes.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program in the namespace, in a process group of its own (a terminal's Ctrl-C is ours to pass on), with
    /// its output appended to `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start<S: AsRef<OsStr>>(
        namespace: &Namespace,
        program: &Path,
        args: impl IntoIterator<Item = S>,
        log: &Path,
    ) -> Result<Self> {
        let output = File::options()
            .append(true)
            .create(true)
            .open(log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let errors = output.try_clone().with_context(|| log.display().to_string())?;
        let mut command = mortal(program)?;
        command.args(args);
        without_proxies(&mut command);
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        let name = program.file_name().unwrap_or(program.as_os_str());
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            child: namespace.spawn(command)?,
            log: log.to_path_buf(),
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Fails when it has ended, with its last words.
    ///
    /// # Errors
    /// That it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.ended()? {
            let words = console::last_lines(&self.log, 15);
            bail!("{} ended ({status}); {} ends with\n{words}", self.name, self.log.display());
        }
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended in time.
    pub fn wait_end(&mut self, within: Duration) -> Result<ExitStatus> {
        let what = format!("{} (pid {}) to end", self.name, self.pid());
        wait::until(&what, within, || self.ended())
    }

    /// Sends it a signal. One that has ended already is no error.
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        let pid = i32::try_from(self.pid()).context("a pid beyond the kernel's")?;
        kill(Pid::from_raw(pid), signal)
            .with_context(|| format!("cannot send {signal} to {} (pid {pid})", self.name))
    }

    /// Asks it to end, and kills it when it does not.
    ///
    /// # Errors
    /// When it cannot be signalled or waited for.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        if self.wait_end(END_WITHIN).is_err() {
            self.kill()?;
        }
        Ok(())
    }

    /// Kills it without asking, and reaps it.
    ///
    /// # Errors
    /// When it cannot be killed or waited for.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait().with_context(|| format!("cannot wait for {}", self.name))?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // What cannot be killed has ended already, or nobody is left who could be told.
        drop(self.kill());
    }
}

/// A program that the kernel kills when the thread that starts it ends, however that comes (prctl(2) PR_SET_PDEATHSIG).
pub(crate) fn mortal(program: &Path) -> Result<Command> {
    let setpriv = prerequisites::find_program("setpriv")
        .context("setpriv is missing (package util-linux)")?;
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    Ok(command)
}

/// Hides the host's HTTP proxy from a child: it cannot be reached from inside.
pub(crate) fn without_proxies(command: &mut Command) {
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"]
    {
        command.env_remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str) -> (tempfile::TempDir, Namespace, Process) {
        let dir = tempfile::tempdir().expect("tempdir");
        let namespace = Namespace::new().expect("namespace");
        let log = dir.path().join("log");
        let process =
            Process::start(&namespace, Path::new("/bin/sh"), ["-c", script], &log).expect("start");
        (dir, namespace, process)
    }

    #[test]
    fn a_child_that_ended_is_reported_with_its_last_words() {
        let (_dir, _namespace, mut process) = start("echo out of cake >&2; exit 3");
        assert_eq!(process.wait_end(Duration::from_secs(20)).expect("end").code(), Some(3));
        let error = process.check_alive().unwrap_err().to_string();
        assert!(error.contains("out of cake"), "{error}");
    }

    #[test]
    fn a_dropped_child_is_dead_and_reaped() {
        let (_dir, _namespace, process) = start("exec sleep 600");
        let proc = PathBuf::from(format!("/proc/{}", process.pid()));
        assert!(proc.exists());
        drop(process);
        assert!(!proc.exists());
    }

    #[test]
    fn a_child_dies_with_the_namespace_even_when_nobody_kills_it() {
        let (_dir, namespace, mut process) = start("exec sleep 600");
        // The program must be there before its parent goes: setpriv asks for the signal first.
        let comm = format!("/proc/{}/comm", process.pid());
        wait::until("sleep to run", Duration::from_secs(20), || {
            Ok(std::fs::read_to_string(&comm).is_ok_and(|name| name == "sleep\n").then_some(()))
        })
        .expect("sleep");
        drop(namespace);
        let status = process.wait_end(Duration::from_secs(20)).expect("end");
        assert!(!status.success());
    }
}
