//! What the ImageAPI's tests share: an agent in a namespace of its own, curl as the client that is not ours, images in every form,
//! and a look at what is left.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde_json::Value;

use self::warnings::{show_warnings, warnings};

#[path = "../harness/warnings.rs"]
mod warnings;

/// The real program.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_layercake-agent");
/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// A program that runs until it is asked to end; as PID 1 of its namespace it must take the signal itself.
pub(crate) const RUNS: &str = "sh -c 'trap \"exit 0\" TERM; while :; do sleep 0.05; done'";

/// A run directory on a tmpfs, and a loopback network, that only this test and its children have.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    agent: Option<Child>,
    helpers: Vec<Child>,
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
        build_root(&dir.path().join("root"));
        let mut bench = Self { dir, agent: None, helpers: Vec::new() };
        bench.start(&[]);
        bench
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("utf-8").to_owned()
    }

    /// Starts an agent with these options besides its run directory, and waits for its socket.
    pub(crate) fn start(&mut self, options: &[&str]) {
        let socket = self.run_dir().join("imageapi.sock");
        drop(fs::remove_file(&socket));
        let child = Command::new(PROGRAM)
            .args(["agent", "--standalone", "--imageapi", "--log", "warn", "--run-dir"])
            .arg(self.run_dir())
            .args(options)
            .stderr(warnings(self.dir.path()))
            .spawn()
            .expect("the agent");
        self.agent = Some(child);
        wait_until("the agent listens", || socket.exists());
    }

    /// SIGKILL, and nobody has time to put anything in order.
    pub(crate) fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().expect("kill");
            agent.wait().expect("reap");
        }
    }

    pub(crate) fn restart(&mut self) {
        self.kill();
        self.start(&[]);
    }

    /// A process that ends with the test.
    pub(crate) fn helper(&mut self, command: &mut Command) {
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.helpers.push(child.unwrap_or_else(|error| panic!("{command:?}: {error}")));
    }

    /// One request by curl over the socket: status, headers, body.
    pub(crate) fn curl(&self, method: &str, target: &str, body: &str) -> (u16, String, Value) {
        let mut command = Command::new("curl");
        command.args(["-s", "-S", "-D", "-", "-X", method, "--max-time", "50", "--unix-socket"]);
        command.arg(self.run_dir().join("imageapi.sock"));
        command.arg(format!("http://node/imageapi/v1{target}"));
        if !body.is_empty() {
            // No `Expect: 100-continue` for a large body: the answer's head would be two.
            command.args(["-H", "expect:", "-H", "content-type: application/json", "-d", body]);
        }
        answer_of(&mut command)
    }

    /// One request that must be answered with this status; its body.
    #[track_caller]
    pub(crate) fn ask(&self, method: &str, target: &str, body: &str, status: u16) -> Value {
        let (found, _, answer) = self.curl(method, target, body);
        assert_eq!(found, status, "{method} {target} {body}: {answer}");
        answer
    }

    #[track_caller]
    pub(crate) fn mount(&self, body: &str) -> (i64, PathBuf) {
        let mount = self.ask("POST", "/mount", body, 201);
        let point = mount["mountpoint"].as_str().expect("mountpoint");
        (mount["id"].as_i64().expect("id"), PathBuf::from(point))
    }

    #[track_caller]
    pub(crate) fn unmount(&self, id: i64) {
        self.ask("DELETE", &format!("/mount?id={id}"), "", 200);
    }

    pub(crate) fn state(&self, name: &str) -> String {
        let found = self.ask("GET", &format!("/container?name={name}"), "", 200);
        found[0]["state"].as_str().expect("state").to_owned()
    }

    /// Nothing is left: no object, mount, loop device, process or control group.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        for things in ["/container", "/mount", "/attach"] {
            let mut left = Value::Null;
            wait_until("what nobody holds is gone", || {
                left = self.ask("GET", things, "", 200);
                left == Value::Array(Vec::new())
            });
        }
        let here = self.run_dir().join("imageapi").to_str().expect("utf-8").to_owned();
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").expect("mountinfo");
        assert!(!mounts.contains(&here), "{mounts}");
        let left = |dir: &str| {
            fs::read_dir(self.run_dir().join("imageapi").join(dir)).map_or(0, Iterator::count)
        };
        assert_eq!([left("mounts"), left("containers"), left("log")], [0, 0, 0]);
        wait_until("no loop device is left", || self.loops().is_empty());
        wait_until("no process is left", || !processes().contains(&format!("{here}/containers")));
        for entry in fs::read_dir("/sys/fs/cgroup/layercake").into_iter().flatten().flatten() {
            assert!(!entry.file_name().to_string_lossy().starts_with("imageapi."), "{entry:?}");
        }
    }

    /// The loop devices whose file is in the test's directory.
    pub(crate) fn loops(&self) -> Vec<String> {
        let here = self.dir.path().to_str().expect("utf-8");
        let tail = self.dir.path().file_name().expect("name").to_str().expect("utf-8");
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").expect("/sys/block").flatten() {
            let file = fs::read_to_string(entry.path().join("loop/backing_file"));
            // The kernel shows the path as far as its reader can see it.
            if file.is_ok_and(|file| file.contains(here) || file.contains(tail)) {
                found.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        found
    }
}

/// Whatever a failed test left is taken away by the agent itself: it finds an empty table.
impl Drop for Bench {
    fn drop(&mut self) {
        show_warnings(self.dir.path());
        self.kill();
        drop(fs::remove_file(self.run_dir().join("imageapi/objects.json")));
        self.start(&[]);
        self.kill();
        for helper in &mut self.helpers {
            drop(helper.kill());
            drop(helper.wait());
        }
        // The namespace goes with its last process; this only makes it sooner.
        rustix::mount::unmount(self.dir.path(), UnmountFlags::DETACH).unwrap_or_default();
    }
}

/// What curl `-D -` prints, taken apart.
pub(crate) fn answer_of(command: &mut Command) -> (u16, String, Value) {
    let output = command.output().expect("curl: apt-get install curl");
    let text = String::from_utf8(output.stdout).expect("utf-8");
    let problem = String::from_utf8_lossy(&output.stderr);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text} {problem}"));
    let status = head.split(' ').nth(1).expect("status").parse().expect("number");
    (status, head.to_owned(), serde_json::from_str(body).unwrap_or(Value::Null))
}

/// A small root with busybox in it.
fn build_root(root: &Path) {
    fs::create_dir_all(root.join("bin")).expect("mkdir");
    fs::create_dir_all(root.join("etc")).expect("mkdir");
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("copy busybox");
    for name in ["sh", "cat", "sleep", "env", "true", "false", "readlink"] {
        symlink("busybox", root.join("bin").join(name)).expect("symlink");
    }
    fs::write(root.join("etc/release"), "tested\n").expect("release");
}

/// Runs a tool that must be there and must succeed.
#[track_caller]
pub(crate) fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; is it installed?"));
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {problem}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The command lines of every process.
fn processes() -> String {
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
