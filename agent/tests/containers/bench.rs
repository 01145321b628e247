//! What the containers' tests share: a run directory with one small root, and a look at what is left.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use agent::containers::{
    Adopted, ContainerError, ExitRecord, Handle, HeldSockets, Keeping, NodeFacts, OnEnd, Place,
    Spec, adopt, create_with, remove,
};
use agent::paths::RunDirs;
use protocol::ids::{Digest, Name};
use protocol::imageset::{Container, Restart};
use protocol::oci::RunConfig;

/// The real program.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_layercake-agent");
/// Longer than anything here takes on a busy machine, or in QEMU without KVM.
pub(crate) const LONG: Duration = Duration::from_secs(180);
/// Set for a process of this test that plays an agent, with the run directory.
pub(crate) const PLAY_AGENT: &str = "LAYERCAKE_TEST_PLAY_AGENT";

pub(crate) const SIGKILL: i32 = 9;
pub(crate) const SIGTERM: i32 = 15;

/// A run directory with one small root, cleaned up at the end.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) dirs: RunDirs,
    pub(crate) ended: mpsc::Receiver<(String, ExitRecord)>,
    pub(crate) on_end: OnEnd,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        build_root(&dir.path().join("root"));
        let (sender, ended) = mpsc::channel();
        let sender = Mutex::new(sender);
        let on_end: OnEnd = Arc::new(move |id, record| {
            drop(sender.lock().expect("sender").send((id.to_owned(), record)));
        });
        Self { dirs: RunDirs::new(dir.path().join("run")), dir, ended, on_end }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub(crate) fn spec(&self, id: &str, command: &[&str]) -> Spec {
        spec(self.dir.path(), id, command)
    }

    pub(crate) fn create(&self, spec: &Spec) -> Result<Handle, ContainerError> {
        self.create_holding(spec, &HeldSockets::default())
    }

    pub(crate) fn create_holding(
        &self,
        spec: &Spec,
        sockets: &HeldSockets,
    ) -> Result<Handle, ContainerError> {
        create_with(Path::new(PROGRAM), &self.dirs, spec, sockets, Arc::clone(&self.on_end))
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log/web.log")).unwrap_or_default()
    }

    /// Runs a container to its end and returns its log.
    #[track_caller]
    pub(crate) fn run(&self, spec: &Spec) -> (ExitRecord, String) {
        let handle = self.create(spec).expect("create");
        handle.release().expect("release");
        let record = handle.wait(LONG).expect("it ends");
        handle.remove().expect("remove");
        (record, self.log())
    }

    #[track_caller]
    pub(crate) fn shell(&self, id: &str, script: &str) -> String {
        let (record, log) = self.run(&self.spec(id, &["sh", "-c", script]));
        assert_eq!(record.status.code, Some(0), "{record:?}: {log}");
        log
    }

    /// Nothing of it is left: no mount and no process that knows the directory, no control group.
    #[track_caller]
    pub(crate) fn assert_clean(&self, id: &str) {
        let here = self.dir.path().to_str().expect("utf-8").to_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        assert!(!mounts.contains(&here), "{mounts}");
        wait_until("its monitor is gone", || !processes().contains(&here));
        assert!(agent::containers::cgroup::Cgroup::find(id).is_none(), "a control group is left");
    }
}

/// A test that failed half-way leaves a container that runs.
impl Drop for Bench {
    fn drop(&mut self) {
        for adopted in adopt(&self.dirs, &self.on_end).unwrap_or_default() {
            match adopted {
                Adopted::Live(handle) => {
                    drop(handle.stop_with(SIGKILL, Duration::ZERO));
                    drop(handle.remove());
                }
                Adopted::Ended { spec, .. } => drop(remove(&self.dirs, &spec.id)),
            }
        }
    }
}

pub(crate) fn build_root(root: &Path) {
    let busybox = Path::new("/bin/busybox");
    assert!(busybox.exists(), "/bin/busybox is missing: apt-get install busybox-static");
    fs::create_dir_all(root.join("bin")).expect("mkdir");
    fs::create_dir_all(root.join("etc")).expect("mkdir");
    fs::copy(busybox, root.join("bin/busybox")).expect("copy busybox");
    for name in ["sh", "cat", "sleep", "id", "hostname", "ls", "env", "grep", "readlink", "stat"] {
        symlink("busybox", root.join("bin").join(name)).expect("symlink");
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:101:102::/srv/web:/bin/sh\n",
    )
    .expect("passwd");
    fs::write(root.join("etc/group"), "root:x:0:\nweb:x:102:\nlog:x:200:web\n").expect("group");
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).expect("chmod");
}

pub(crate) fn spec(base: &Path, id: &str, command: &[&str]) -> Spec {
    let name: Name = "web".parse().expect("name");
    let container = Container {
        command: command.iter().map(|&word| word.to_owned()).collect(),
        restart: Restart::Never,
        ..Container::new(name.clone(), name)
    };
    let place = Place {
        // Control groups are the machine's, whatever the run directory: two runs of the tests must not meet.
        id: format!("{id}-{}", base.file_name().expect("name").to_string_lossy().replace('.', "t")),
        set: "hello".parse().expect("name"),
        set_digest: Digest::of(b"hello"),
        root: base.join("root"),
        hostname: "node7".to_owned(),
        log_dir: base.join("log"),
        restarts: 0,
        version: None,
        keeping: Keeping { memory: base.join("persistent"), disk: None },
        facts: NodeFacts::default(),
    };
    Spec::plan(place, &container, &RunConfig::default()).expect("plan")
}

/// The command lines of every process.
pub(crate) fn processes() -> String {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ") + "\n").collect()
}

#[track_caller]
pub(crate) fn wait_until(what: &str, mut good: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !good() {
        assert!(Instant::now() < until, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn alive(pid: u32) -> bool {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("pid")).expect("pid");
    rustix::process::test_kill_process(pid).is_ok()
}

pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("pid")).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
}
