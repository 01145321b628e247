//! The real agent at native speed, `agent --standalone` on this machine, with a run directory and a network of the test's own,
//! and the registry and boot server of [`Site`] in the test's process. What the tests do with it stands in themselves.

// Shared by tests of which not every one uses every part.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use protocol::node::{ContainerState, Observed, ObservedSet, SetState};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde_json::Value;

use crate::site::{Published, Site};

use self::warnings::{show_warnings, warnings};

#[path = "../harness/warnings.rs"]
mod warnings;

/// The real program.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_layercake-agent");
/// Longer than anything here takes on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A run directory on a tmpfs and a loopback network that only this test and its children have, and the agent in them.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) site: Site,
    pub(crate) agent: Option<Child>,
    /// Where the agent logs everything to; without, its warnings go where a test that fails shows them.
    pub(crate) log: Option<PathBuf>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let own = nix::sched::CloneFlags::CLONE_NEWNS | nix::sched::CloneFlags::CLONE_NEWNET;
        nix::sched::unshare(own).expect("unshare");
        let up = Command::new("/bin/busybox").args(["ip", "link", "set", "lo", "up"]).status();
        assert!(up.expect("/bin/busybox: apt-get install busybox-static").success());
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        rustix::mount::mount_change("/", private).expect("private");
        let dir = tempfile::tempdir().expect("tempdir");
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), None)
            .expect("tmpfs");
        Self { dir, site: Site::start(), agent: None, log: None }
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Starts an agent with these options besides the run directory.
    pub(crate) fn start(&mut self, options: &[&str]) {
        let level = if self.log.is_some() { "debug" } else { "warn" };
        let mut command = Command::new(PROGRAM);
        command.args(["agent", "--standalone", "--log", level, "--run-dir"]);
        command.arg(self.run_dir()).args(options);
        match &self.log {
            Some(log) => command.stderr(fs::File::create(log).expect("log")),
            None => command.stderr(warnings(self.dir.path())),
        };
        let child = command.spawn().expect("the agent");
        self.agent = Some(child);
    }

    /// Starts an agent that asks the boot server what to run.
    pub(crate) fn start_with_server(&mut self) {
        let url = self.site.url();
        self.start(&["--server", &url, "--node", "n1"]);
    }

    /// As [`Self::start_with_server`]; the agent kills itself at this step.
    pub(crate) fn start_to_die(&mut self, step: &str) {
        let child = Command::new(PROGRAM)
            .args(["agent", "--standalone", "--log", "warn", "--run-dir"])
            .arg(self.run_dir())
            .args(["--server", &self.site.url(), "--node", "n1"])
            .env("LAYERCAKE_DIE_AT", step)
            .stderr(warnings(self.dir.path()))
            .spawn()
            .expect("the agent");
        self.agent = Some(child);
    }

    pub(crate) fn pid(&self) -> u32 {
        self.agent.as_ref().expect("an agent").id()
    }

    /// SIGKILL, and nobody has time to put anything in order.
    pub(crate) fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().expect("kill");
            agent.wait().expect("reap");
        }
    }

    /// Waits until this set runs as a whole, and returns its report.
    #[track_caller]
    pub(crate) fn runs(&self, published: &Published) -> ObservedSet {
        let good = |observed: &Observed| {
            set(observed).is_some_and(|set| {
                let up = |state| state == ContainerState::Running;
                set.digest == published.digest
                    && set.state == SetState::Current
                    && set.containers.iter().all(|container| up(container.state))
            })
        };
        let what = format!("version {} runs", published.set.version);
        set(&self.site.wait(&what, good)).expect("set").clone()
    }

    /// Overlays below the run directory, as the kernel knows them here.
    pub(crate) fn overlays(&self) -> usize {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").expect("mountinfo");
        let here = self.dir.path().to_str().expect("utf-8");
        mounts.lines().filter(|line| line.contains(here) && line.contains(" - overlay ")).count()
    }

    /// The container instances there are, by their directories.
    pub(crate) fn instances(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.run_dir().join("containers"));
        entries.map_or(Vec::new(), |entries| entries.flatten().map(|e| e.path()).collect())
    }

    /// The agent's own notes.
    pub(crate) fn notes(&self) -> Value {
        let notes = fs::read(self.run_dir().join("state/agent.json")).expect("notes");
        serde_json::from_slice(&notes).expect("json")
    }

    /// SIGKILL to the first process of the only container: the only child of its monitor.
    #[track_caller]
    pub(crate) fn kill_container(&self) {
        let lock = self.instances().first().expect("an instance").join("lock");
        let monitor = fs::read_to_string(lock).expect("lock").trim().to_owned();
        let children = fs::read_to_string(format!("/proc/{monitor}/task/{monitor}/children"));
        let pid = children.expect("children").trim().parse().expect("one pid");
        let pid = rustix::process::Pid::from_raw(pid).expect("pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
    }
}

/// Whatever a failed test left running is ended by the agent itself: nothing is desired any more.
impl Drop for Bench {
    fn drop(&mut self) {
        show_warnings(self.dir.path());
        self.kill_agent();
        self.start_with_server();
        self.site.want(&[]);
        let until = Instant::now() + Duration::from_secs(20);
        while !self.instances().is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill_agent();
        let _ = rustix::mount::unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

pub(crate) fn set(observed: &Observed) -> Option<&ObservedSet> {
    observed.imagesets.iter().find(|set| set.name.as_str() == "hello")
}

#[track_caller]
pub(crate) fn wait_until(what: &str, mut good: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !good() {
        assert!(Instant::now() < until, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A layer with these files, all of them executable.
pub(crate) fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        tar.append_data(&mut header, path, *content).expect("tar");
    }
    tar.into_inner().expect("tar")
}

pub(crate) fn busybox() -> Vec<u8> {
    let busybox = Path::new("/bin/busybox");
    assert!(busybox.exists(), "/bin/busybox is missing: apt-get install busybox-static");
    fs::read(busybox).expect("busybox")
}
