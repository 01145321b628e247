//! Channels with the real agent (`agent --standalone`), real containers, and the boot server and the operator in this process: logs
//! over restarts and rolls, commands with and without a terminal, and what happens when somebody goes away.
//! Needs root and busybox-static.

#[path = "standalone/bench.rs"]
mod bench;
#[path = "channels/operator.rs"]
mod operator;
#[path = "standalone/site.rs"]
mod site;

use std::fs;

use protocol::channel::frame::{Exit, Frame, WINDOW};
use protocol::channel::{ChannelWish, ExecWish, TerminalSize};
use serde_json::{Value, json};

use bench::{Bench, LONG, busybox, layer, wait_until};
use operator::Operator;
use site::Published;

/// Counts for as long as it runs.
const COUNT: &str = "i=0; while :; do i=$((i+1)); echo \"$VERSION $i\"; usleep 20000; done";
const SIZE: TerminalSize = TerminalSize { columns: 100, rows: 30 };

impl Bench {
    /// With an agent that runs the container `hello/web`.
    fn counting() -> Self {
        Self::counting_with(&json!({}))
    }

    /// With more said of the container.
    fn counting_with(more: &Value) -> Self {
        let mut bench = Self::new();
        let first = bench.publish("1", more);
        bench.site.want(&[&first]);
        bench.start_with_server();
        bench.runs(&first);
        bench
    }

    fn publish(&self, version: &str, more: &Value) -> Published {
        let busybox = busybox();
        let names = ["sh", "cat", "ls", "id", "sleep", "usleep", "stty", "tty", "yes", "grep"];
        let paths: Vec<String> = names.iter().map(|name| format!("bin/{name}")).collect();
        let users = b"root:x:0:0::/root:/bin/sh\nwww:x:33:33::/srv:/bin/sh\n".as_slice();
        let programs = paths.iter().map(|path| (path.as_str(), busybox.as_slice()));
        let layer = layer(&programs.chain([("etc/passwd", users)]).collect::<Vec<_>>());
        let mut containers = json!([{"name": "web", "image": "web", "command": ["/bin/sh", "-c", COUNT],
            "env": {"VERSION": version}, "workdir": "/srv", "stop_timeout_s": 1}]);
        for (key, value) in more.as_object().expect("an object") {
            containers[0][key] = value.clone();
        }
        self.site.publish(version, &[layer], &containers)
    }

    /// Opens a channel and waits until it has begun.
    #[track_caller]
    fn open(&self, wish: ChannelWish) -> Operator {
        let end = self.site.channel(wish).recv_timeout(LONG).expect("the node comes");
        Operator::new(end)
    }

    #[track_caller]
    fn exec(&self, script: &str) -> Operator {
        self.open(exec(script, None, None))
    }

    /// What a command says on both streams, and how it ends.
    #[track_caller]
    fn said(&self, wish: ChannelWish) -> (String, String, Exit) {
        let mut operator = self.open(wish);
        let exit = operator.until_end();
        (operator.output(), operator.errors(), exit)
    }

    /// The process ids in the container, as a command in it sees them.
    fn processes(&self) -> Vec<u32> {
        let (output, _, _) = self.said(exec("ls /proc", None, None));
        output.lines().filter_map(|name| name.parse().ok()).collect()
    }

    fn agent_memory_kb(&self) -> u64 {
        let pid = self.agent.as_ref().expect("agent").id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.trim().trim_end_matches(" kB").parse().expect("kB")
    }
}

fn exec(script: &str, user: Option<&str>, terminal: Option<TerminalSize>) -> ChannelWish {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let user = user.map(str::to_owned);
    ChannelWish::Exec(ExecWish { argv, env: vec!["EXTRA=yes".to_owned()], user, terminal })
}

/// The counts of a version, in the order in which they came.
fn counts(log: &str, version: &str) -> Vec<u64> {
    let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let numbers = lines.filter_map(|line| line.trim_end().strip_prefix(&format!("{version} ")));
    numbers.map(|number| number.parse().expect("a count")).collect()
}

#[test]
fn a_log_is_followed_through_a_restart_and_a_roll() {
    let bench = Bench::counting();
    let mut operator = bench.open(ChannelWish::Logs { follow: true, tail: None });
    operator.until("five lines", |output, _| counts(output, "1").len() >= 5);
    let (before, seen) = (bench.instances(), operator.output().len());
    bench.kill_container();
    bench.site.wait("another instance", |observed| {
        observed.imagesets[0].containers.iter().all(|it| it.restarts == 1)
    });
    operator.until("lines after that", |output, _| output[seen..].contains("\n1 3\n"));
    assert_ne!(bench.instances(), before);
    let second = bench.publish("2", &json!({}));
    bench.site.want(&[&second]);
    bench.runs(&second);
    operator.until("lines of version 2", |output, _| counts(output, "2").len() >= 5);
    let output = operator.output();
    for version in ["1", "2"] {
        // Every run counts from 1, and no line of it is missing.
        let counts = counts(&output, version);
        let gapless = counts.windows(2).all(|pair| pair[1] == pair[0] + 1 || pair[1] == 1);
        assert!(gapless && counts[0] == 1, "{version}: {counts:?}");
    }
    drop(operator);
    let (tail, _, exit) = bench.said(ChannelWish::Logs { follow: false, tail: Some(3) });
    assert_eq!((tail.lines().count(), exit), (3, Exit::Code(0)));
}

/// What the kernel knows of a command is what it knows of the container's own program.
#[track_caller]
fn is_as_the_container(bench: &Bench) {
    for file in ["cgroup", "limits", "mountinfo", "oom_score_adj"] {
        let (output, errors, _) = bench.said(exec(&format!("cat /proc/1/{file}"), None, None));
        let (own, _, _) = bench.said(exec(&format!("cat /proc/self/{file}"), None, None));
        assert_eq!(own, output, "{file} {errors}");
    }
    let fields = "^Cap|^NoNewPrivs|^Seccomp:|^Groups|^SigIgn|^SigBlk|^Umask";
    let status = |pid: &str| format!("grep -E '{fields}' /proc/{pid}/status");
    let (init, _, _) = bench.said(exec(&status("1"), None, None));
    assert_eq!(bench.said(exec(&status("self"), None, None)).0, init);
    let namespaces = |pid: &str| {
        format!(
            "for n in cgroup ipc mnt net pid uts; do ls -l /proc/{pid}/ns/$n; done | grep -o '[a-z]*:\\[.*'"
        )
    };
    let (init, _, _) = bench.said(exec(&namespaces("1"), None, None));
    assert_eq!(bench.said(exec(&namespaces("self"), None, None)).0, init);
    // Three descriptors, and the one that ls reads.
    let (fds, _, _) = bench.said(exec("exec ls /proc/self/fd", None, None));
    assert_eq!(fds, "0\n1\n2\n3\n");
}

#[test]
fn a_command_joins_namespaces_beyond_the_usual() {
    let bench = Bench::counting_with(&json!({"namespaces": {"user": true, "time": true}}));
    is_as_the_container(&bench);
    let same = |name: &str| {
        let id = |pid: &str| format!("ls -l /proc/{pid}/ns/{name} | grep -o '[a-z]*:\\[.*'");
        let (init, _, _) = bench.said(exec(&id("1"), None, None));
        assert_eq!(bench.said(exec(&id("self"), None, None)).0, init, "{name}");
        init
    };
    let (user, time) = (same("user"), same("time"));
    let ours = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).expect("namespace");
    assert_ne!(user.trim(), ours("user").to_str().expect("UTF-8"));
    assert_ne!(time.trim(), ours("time").to_str().expect("UTF-8"));
    for (wanted, ids) in [(None, "0\n0\n"), (Some("www"), "33\n33\n")] {
        assert_eq!(bench.said(exec("id -u; id -g", wanted, None)).0, ids);
        let mut operator = bench.open(exec("tty; echo by-name > $(tty)", wanted, Some(SIZE)));
        assert_eq!(operator.until_end(), Exit::Code(0), "{}", operator.output());
        assert_eq!(operator.output(), "/dev/pts/0\r\nby-name\r\n");
    }
}

#[test]
fn a_command_is_in_the_container_and_has_no_more_than_it() {
    let bench = Bench::counting();
    let script = "echo $EXTRA $VERSION $container; pwd; id -u; echo to-errors >&2; exit 7";
    let (output, errors, exit) = bench.said(exec(script, None, None));
    assert_eq!(output, "yes 1 layercake\n/srv\n0\n");
    assert_eq!((errors.as_str(), exit), ("to-errors\n", Exit::Code(7)));
    let (output, _, _) = bench.said(exec("id -u; id -g; echo $HOME", Some("www"), None));
    assert_eq!(output, "33\n33\n/srv\n");
    is_as_the_container(&bench);
    for (script, status) in [("exit 0", 0), ("kill -TERM $$", 143)] {
        assert_eq!(bench.said(exec(script, None, None)).2.status(), status, "{script}");
    }
    let mut failed = bench.open(ChannelWish::Exec(ExecWish {
        argv: vec!["/no/such".to_owned()],
        env: Vec::new(),
        user: None,
        terminal: None,
    }));
    let why = failed.until_failure();
    assert!(why.contains("execute `/no/such`: No such file"), "{why}");
    let why = bench.open(exec("true", Some("nobody-here"), None)).until_failure();
    assert!(why.contains("user `nobody-here` is not in the image's /etc/passwd"), "{why}");
}

#[test]
fn ten_megabytes_come_back_as_they_went() {
    const TOTAL: usize = 10 << 20;
    let bench = Bench::counting();
    let mut operator = bench.exec("exec cat");
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = Vec::with_capacity(TOTAL);
    while noise.len() < TOTAL {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    operator.send_all(&noise);
    operator.send(&Frame::EndOfInput);
    assert_eq!(operator.until_end(), Exit::Code(0));
    assert!(operator.raw_output() == noise, "{} bytes came back", operator.raw_output().len());
}

#[test]
fn a_terminal_has_a_size_a_name_and_passes_ctrl_c() {
    let bench = Bench::counting();
    let script = "tty; trap 'stty size; exit 5' WINCH; stty size; while :; do sleep 1; done";
    let mut operator = bench.open(exec(script, None, Some(SIZE)));
    operator.until("its size", |output, _| output.contains("30 100\r\n"));
    assert!(operator.output().starts_with("/dev/pts/0\r\n"), "{}", operator.output());
    operator.send(&Frame::Size(TerminalSize { columns: 70, rows: 20 }));
    assert_eq!(operator.until_end(), Exit::Code(5));
    assert!(operator.output().ends_with("20 70\r\n"), "{}", operator.output());
    // A key.
    let mut operator = bench.open(exec("echo ready; sleep 1000", None, Some(SIZE)));
    operator.until("ready", |output, _| output.contains("ready"));
    operator.send(&Frame::Input(&[3]));
    assert_eq!(operator.until_end().status(), 130);
    // A user may open the terminal by its name.
    let mut operator = bench.open(exec("echo by-name > $(tty)", Some("www"), Some(SIZE)));
    assert_eq!((operator.until_end(), operator.output().as_str()), (Exit::Code(0), "by-name\r\n"));
    // A signal, without a terminal.
    let mut operator = bench.exec("echo ready; exec sleep 1000");
    operator.until("ready", |output, _| output.contains("ready"));
    operator.send(&Frame::Signal(15));
    assert_eq!(operator.until_end(), Exit::Signal(15));
}

#[test]
fn a_reader_that_stops_costs_no_memory_and_its_command_ends_with_it() {
    let bench = Bench::counting();
    bench.said(exec("true", None, None));
    let before = bench.agent_memory_kb();
    let mut operator = bench.exec("echo $$; exec yes");
    operator.grants = false;
    operator.until("a full window", |output, _| output.len() == WINDOW as usize);
    let pid: u32 = operator.output().lines().next().expect("a line").parse().expect("a pid");
    assert!(bench.processes().contains(&pid));
    operator.sends_nothing_more();
    let grown = bench.agent_memory_kb().saturating_sub(before);
    assert!(grown < 4096, "the agent grew by {grown} kB");
    // What is granted comes, and no more.
    operator.grant(100_000);
    operator.until("the grant", |output, _| output.len() == WINDOW as usize + 100_000);
    drop(operator);
    wait_until("the command's end", || !bench.processes().contains(&pid));
}

#[test]
fn a_command_runs_once_and_ends_with_its_agent() {
    let mut bench = Bench::counting();
    // The server goes on asking for it, as if it had not heard; so it does with every channel here.
    assert_eq!(bench.said(exec("echo ran >> /srv/ran", None, None)).2, Exit::Code(0));
    let mut operator = bench.exec("echo $$; exec sleep 1000");
    operator.until("its pid", |output, _| output.ends_with('\n'));
    let pid: u32 = operator.output().trim().parse().expect("a pid");
    assert!(bench.processes().contains(&pid));
    bench.kill_agent();
    assert!(operator.until_failure().contains("connection"), "the node's end closes");
    bench.start_with_server();
    bench.site.wait("another agent", |observed| observed.agent_starts == 2);
    wait_until("the command's end", || !bench.processes().contains(&pid));
    assert_eq!(bench.said(exec("cat /srv/ran", None, None)).0, "ran\n");
}

#[test]
fn what_cannot_be_is_said() {
    let bench = Bench::counting();
    let table = [
        (ChannelWish::NodeLog { follow: false, tail: None }, "--standalone"),
        (ChannelWish::Unknown, "does not know how to do that"),
    ];
    for (wish, expected) in table {
        let why = bench.open(wish).until_failure();
        assert!(why.contains(expected), "{why}");
    }
    bench.site.want(&[]);
    bench.site.wait("nothing runs", |observed| observed.imagesets.is_empty());
    let why = bench.exec("true").until_failure();
    assert!(why.contains("there is no container hello/web on this node now"), "{why}");
    // Its log is still there.
    let (log, _, _) = bench.said(ChannelWish::Logs { follow: false, tail: Some(1) });
    assert!(log.starts_with("1 "), "{log}");
}
