//! The whole agent at native speed: the real program as `agent --standalone` on this machine, against a registry and boot
//! server in this process. Needs root and busybox-static.

#[path = "standalone/files.rs"]
mod files;
#[path = "standalone/mount.rs"]
mod mount;
#[path = "standalone/rolls.rs"]
mod rolls;
#[path = "standalone/site.rs"]
mod site;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use protocol::ids::Digest;
use protocol::node::{ContainerState, Observed, ObservedSet, SetState};
use protocol::registries::{RegistryEntry, Secret};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde_json::{Value, json};

use site::{Published, Site};

/// The real program.
const PROGRAM: &str = env!("CARGO_BIN_EXE_layercake-agent");
/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);
/// Where the container serves: not a port that the kernel gives to connections.
const PORT: u16 = 8080;
/// Rolls that the blackout's median is taken of.
const ROLLS: usize = 20;
/// What the median may be beside other tests on a busy machine. Alone it is a few milliseconds.
const BLACKOUT_LIMIT_US: u64 = 100_000;

/// A run directory on a tmpfs and a loopback network that only this test and its children have, and the agent in them.
struct Bench {
    dir: tempfile::TempDir,
    site: Site,
    agent: Option<Child>,
    /// Where the agent logs everything to, if anywhere.
    log: Option<PathBuf>,
}

impl Bench {
    fn new() -> Self {
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

    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Starts an agent with these options besides the run directory.
    fn start(&mut self, options: &[&str]) {
        let level = if self.log.is_some() { "debug" } else { "warn" };
        let mut command = Command::new(PROGRAM);
        command.args(["agent", "--standalone", "--log", level, "--run-dir"]);
        command.arg(self.run_dir()).args(options);
        if let Some(log) = &self.log {
            command.stderr(fs::File::create(log).expect("log"));
        }
        let child = command.spawn().expect("the agent");
        self.agent = Some(child);
    }

    /// Starts an agent that asks the boot server what to run.
    fn start_with_server(&mut self) {
        let url = self.site.url();
        self.start(&["--server", &url, "--node", "n1"]);
    }

    /// As [`Self::start_with_server`]; the agent kills itself at this step.
    fn start_to_die(&mut self, step: &str) {
        let child = Command::new(PROGRAM)
            .args(["agent", "--standalone", "--log", "warn", "--run-dir"])
            .arg(self.run_dir())
            .args(["--server", &self.site.url(), "--node", "n1"])
            .env("LAYERCAKE_DIE_AT", step)
            .spawn()
            .expect("the agent");
        self.agent = Some(child);
    }

    fn pid(&self) -> u32 {
        self.agent.as_ref().expect("an agent").id()
    }

    /// SIGKILL, and nobody has time to put anything in order.
    fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().expect("kill");
            agent.wait().expect("reap");
        }
    }

    /// Waits until this set runs as a whole, and returns its report.
    #[track_caller]
    fn runs(&self, published: &Published) -> ObservedSet {
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
    fn overlays(&self) -> usize {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").expect("mountinfo");
        let here = self.dir.path().to_str().expect("utf-8");
        mounts.lines().filter(|line| line.contains(here) && line.contains(" - overlay ")).count()
    }

    /// The container instances there are, by their directories.
    fn instances(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.run_dir().join("containers"));
        entries.map_or(Vec::new(), |entries| entries.flatten().map(|e| e.path()).collect())
    }

    /// The agent's own notes.
    fn notes(&self) -> Value {
        let notes = fs::read(self.run_dir().join("state/agent.json")).expect("notes");
        serde_json::from_slice(&notes).expect("json")
    }

    /// SIGKILL to the first process of the only container: the only child of its monitor.
    #[track_caller]
    fn kill_container(&self) {
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

fn set(observed: &Observed) -> Option<&ObservedSet> {
    observed.imagesets.iter().find(|set| set.name.as_str() == "hello")
}

#[track_caller]
fn wait_until(what: &str, mut good: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !good() {
        assert!(Instant::now() < until, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A layer with these files, all of them executable.
fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        tar.append_data(&mut header, path, *content).expect("tar");
    }
    tar.into_inner().expect("tar")
}

fn busybox() -> Vec<u8> {
    let busybox = Path::new("/bin/busybox");
    assert!(busybox.exists(), "/bin/busybox is missing: apt-get install busybox-static");
    fs::read(busybox).expect("busybox")
}

/// The base layer that all versions share: a shell and a web server.
fn base() -> Vec<u8> {
    let busybox = busybox();
    layer(&[("bin/sh", &busybox), ("bin/httpd", &busybox)])
}

/// A container that serves its version at [`PORT`] until it is asked to end.
fn server() -> Value {
    let script =
        format!("trap 'kill $!; exit 0' TERM; httpd -f -p 127.0.0.1:{PORT} -h /www & wait; exit 1");
    json!([{"name": "web", "image": "web", "command": ["/bin/sh", "-c", script]}])
}

fn version(site: &Site, version: &str, base: &[u8]) -> Published {
    let layers = [base.to_vec(), layer(&[("www/version", version.as_bytes())])];
    site.publish(version, &layers, &server())
}

/// What the container's web server says its version is; waits until there is one.
#[track_caller]
fn ask() -> String {
    let until = Instant::now() + LONG;
    loop {
        let answer = TcpStream::connect(("127.0.0.1", PORT)).and_then(|mut stream| {
            stream.write_all(b"GET /version HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        match answer {
            Ok(answer) if answer.contains("200 OK") => {
                return answer.rsplit("\r\n").next().expect("body").to_owned();
            }
            answer => assert!(Instant::now() < until, "no answer: {answer:?}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_set_of_the_command_line_is_pulled_and_outlives_its_agent() {
    let mut bench = Bench::new();
    version(&bench.site, "1", &base());
    let reference = format!("{}/hello:1", bench.site.url());
    bench.start(&["--imageset", &reference]);
    assert_eq!(ask(), "1");
    let before = bench.instances();
    bench.kill_agent();
    assert_eq!(ask(), "1", "it serves while no agent runs");
    bench.start(&["--imageset", &reference]);
    // The second agent is the one that starts it again when it dies.
    wait_until("a second agent knows it", || bench.notes()["starts"] == 2);
    assert_eq!(ask(), "1");
    assert_eq!(bench.instances(), before, "the same instance goes on");
    bench.kill_container();
    wait_until("another instance", || bench.instances() != before && bench.instances().len() == 1);
    assert_eq!(ask(), "1");
    assert_eq!(bench.overlays(), 1);
}

#[test]
fn rolls_are_short_and_leave_nothing_behind() {
    let mut bench = Bench::new();
    let base = base();
    let versions = ["1", "2"].map(|text| version(&bench.site, text, &base));
    bench.site.want(&[&versions[0]]);
    bench.start_with_server();
    bench.runs(&versions[0]);
    assert_eq!(ask(), "1");
    let mut blackouts = Vec::new();
    for number in 0..ROLLS {
        let (from, to) = (&versions[number % 2], &versions[(number + 1) % 2]);
        bench.site.want(&[to]);
        let report = bench.runs(to).last_roll.expect("a report of the roll");
        assert_eq!((report.from, report.to), (Some(from.digest), to.digest));
        blackouts.push(report.blackout_us.expect("a blackout"));
        assert_eq!(ask(), to.set.version.as_str());
    }
    assert_eq!(bench.site.fetches(&Digest::of(&base)), 1, "the shared layer came once");
    blackouts.sort_unstable();
    let median = blackouts[ROLLS / 2];
    let (least, most) = (blackouts[0], blackouts[ROLLS - 1]);
    let line = format!("blackout of {ROLLS} rolls: median {median} us ({least}-{most})\n");
    std::io::stderr().write_all(line.as_bytes()).expect("stderr");
    assert!(median < BLACKOUT_LIMIT_US, "{line}");
    bench.site.want(&[]);
    bench.site.wait("nothing runs", |observed| observed.imagesets.is_empty());
    assert_eq!((bench.instances().len(), bench.overlays()), (0, 0));
}

#[test]
fn credentials_in_the_desired_document_take_effect_at_once_and_show_nowhere() {
    let mut bench = Bench::new();
    let published = version(&bench.site, "1", &base());
    // `ann:s3cret-word`.
    bench.site.guard("Basic YW5uOnMzY3JldC13b3Jk");
    bench.site.want(&[&published]);
    let log = bench.dir.path().join("agent.log");
    bench.log = Some(log.clone());
    bench.start_with_server();
    bench.site.wait("the registry refuses", |observed| {
        let reason = set(observed).and_then(|set| set.reason.as_deref());
        reason.is_some_and(|reason| reason.contains("it asks for a password"))
    });
    let entry = RegistryEntry {
        host: bench.site.url().trim_start_matches("http://").to_owned(),
        plain_http: true,
        username: Some("ann".to_owned()),
        password: Some(Secret::new("s3cret-word")),
        ..RegistryEntry::default()
    };
    bench.site.tell_registries(&[entry], &[&published]);
    bench.runs(&published);
    assert_eq!(ask(), "1");
    let agents = bench.site.wait("one agent", |_| true).agent_starts;
    assert_eq!(agents, 1, "it was not restarted");
    bench.kill_agent();
    let said = fs::read_to_string(&log).expect("log");
    assert!(said.contains("needs a login"), "{said}");
    assert!(!said.contains("s3cret-word") && !said.contains("YW5uOnMzY3JldC13b3Jk"), "{said}");
}

#[test]
fn what_a_killed_agent_had_begun_is_cleared_away() {
    let mut bench = Bench::new();
    let published = version(&bench.site, "1", &base());
    bench.site.want(&[&published]);
    bench.start_with_server();
    bench.runs(&published);
    bench.kill_agent();
    // As after a kill in the middle of staging another version.
    let mounts = bench.run_dir().join("mounts");
    let lower = bench.dir.path().join("lower");
    fs::create_dir_all(&lower).expect("lower");
    agent::mounts::mount_overlay(&[lower], &mounts.join("hello.web.0123456789ab")).expect("mount");
    assert_eq!(bench.overlays(), 2);
    bench.start_with_server();
    wait_until("it is unmounted", || bench.overlays() == 1);
    assert_eq!(ask(), "1");
    // A store that lost the set: what runs of it is stopped, and all is pulled anew.
    let before = bench.instances();
    bench.kill_agent();
    for entry in fs::read_dir(bench.run_dir().join("blobs")).expect("blobs").flatten() {
        fs::remove_file(entry.path()).expect("remove");
    }
    bench.start_with_server();
    bench.site.wait("a third agent reports", |observed| observed.agent_starts == 3);
    bench.runs(&published);
    assert_eq!(ask(), "1");
    let after = bench.instances();
    assert!(after.len() == 1 && after != before, "{before:?} {after:?}");
    assert_eq!(bench.overlays(), 1);
}

#[test]
fn a_large_layer_is_pulled_in_little_memory() {
    const SIZE: usize = 200 << 20;
    let mut bench = Bench::new();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = Vec::with_capacity(SIZE);
    while noise.len() < SIZE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    let layers = [layer(&[("bin/sh", &busybox())]), layer(&[("noise", &noise)])];
    drop(noise);
    let containers = json!([{"name": "web", "image": "web", "command": ["/bin/sh", "-c", "while :; do :; sleep 1; done"]}]);
    let published = bench.site.publish("1", &layers, &containers);
    bench.site.want(&[&published]);
    bench.start_with_server();
    bench.runs(&published);
    let status = fs::read_to_string(format!("/proc/{}/status", bench.pid())).expect("status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("kB");
    assert!(peak < 64 << 10, "the agent's memory peaked at {peak} kB");
}
