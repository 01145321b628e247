//! Containers as the agent uses them, with the real program as monitor and container-init. Needs root and busybox-static.

#[path = "containers/bench.rs"]
mod bench;
#[path = "containers/leaks.rs"]
mod leaks;
#[path = "containers/view.rs"]
mod view;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::containers::{Adopted, ContainerError, HeldSockets, Spec, adopt, create_with, remove};
use agent::paths::RunDirs;
use bench::{Bench, LONG, PLAY_AGENT, PROGRAM, SIGKILL, SIGTERM, alive, kill, wait_until};
use protocol::imageset::Profile;
use protocol::node::ContainerState;

#[test]
fn a_container_runs_and_its_exit_code_comes_back() {
    let bench = Bench::new();
    let spec = bench.spec("code", &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    let handle = bench.create(&spec).expect("create");
    assert_eq!(handle.state(), ContainerState::Created);
    let released = handle.release().expect("release");
    assert_eq!(released.pid, handle.pid());
    let (id, record) = bench.ended.recv_timeout(LONG).expect("on_end");
    assert_eq!(id, spec.id);
    assert_eq!((record.status.code, record.status.signal, record.asked), (Some(7), None, false));
    assert_eq!(record.exec_at_ns, Some(released.exec_at_ns));
    assert!(record.ended_at_ns >= released.exec_at_ns);
    assert_eq!(handle.state(), ContainerState::Dead);
    handle.remove().expect("remove");
    assert_eq!(bench.log(), "out\nerr\n");
    bench.assert_clean(&spec.id);
}

#[test]
fn inside_it_is_alone_with_a_clean_environment() {
    let bench = Bench::new();
    let mut spec = bench.spec(
        "inside",
        &["sh", "-c", "echo pid=$$; hostname; pwd; env; ls -d /proc/[0-9]*; cat /proc/self/status; ls -l /proc/self/fd"],
    );
    spec.workdir = "/made/for/it".to_owned();
    let (record, log) = bench.run(&spec);
    assert_eq!(record.status.code, Some(0), "{log}");
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(&lines[..3], ["pid=1", "node7", "/made/for/it"]);
    let mut env: Vec<&str> =
        lines[3..].iter().take_while(|line| !line.starts_with("/proc/")).copied().collect();
    env.retain(|line| !line.starts_with("SHLVL=") && !line.starts_with("PWD="));
    env.sort_unstable();
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(env, ["HOME=/root", "HOSTNAME=node7", path, "container=layercake"]);
    // The shell and its ls: nobody else.
    assert!(lines.iter().filter(|line| line.starts_with("/proc/")).count() <= 2, "{log}");
    let field = |name: &str| {
        let line = lines.iter().find(|line| line.starts_with(name)).expect("field");
        line.rsplit('\t').next().expect("value").to_owned()
    };
    // CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, KILL 5, SETGID 6, SETUID 7, SETPCAP 8, NET_BIND_SERVICE 10.
    for (name, expected) in [
        ("CapBnd", "00000000000005fb"),
        ("CapPrm", "00000000000005fb"),
        ("CapEff", "00000000000005fb"),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("SigBlk", "0000000000000000"),
        ("SigIgn", "0000000000000000"),
    ] {
        assert_eq!(field(name), expected, "{name}");
    }
    let fds = lines.iter().filter(|line| line.contains(" -> ")).count();
    assert_eq!(fds, 3, "0, 1 and 2; the one that ls reads is gone by then: {log}");
}

#[test]
fn it_sees_nothing_of_the_node() {
    let bench = Bench::new();
    symlink("../../../../../../etc/shadow", bench.root().join("etc/hosts")).expect("symlink");
    let log = bench.shell(
        "view",
        "cat /proc/self/mountinfo; ls /; cat /proc/cmdline; cat /proc/kcore; \
         echo x 2>/dev/null > /proc/sys/kernel/hostname && echo WRITABLE; \
         echo x 2>/dev/null > /sys/x && echo WRITABLE; \
         echo x 2>/dev/null >> /etc/resolv.conf && echo WRITABLE; \
         for i in null zero full random urandom tty; do stat -c '%n %a %t:%T' /dev/$i; done; \
         readlink /etc/hosts && echo LINK; ls /dev/pts; true",
    );
    assert!(!log.contains("WRITABLE") && !log.contains("LINK"), "{log}");
    let mounts: Vec<&str> = log.lines().filter(|line| line.contains(" - ")).collect();
    let here = bench.dir.path().to_str().expect("utf-8");
    for line in &mounts {
        let at = line.split(' ').nth(4).expect("mount point");
        let known = at == "/"
            || ["/proc", "/sys", "/dev"].iter().any(|dir| at.starts_with(dir))
            || ["/etc/resolv.conf", "/etc/hosts", "/etc/hostname"].contains(&at);
        assert!(known, "{line}");
        assert!(!at.contains(here), "{line}");
    }
    let root = mounts.iter().find(|line| line.split(' ').nth(4) == Some("/")).expect("root");
    assert!(root.contains("nosuid") && root.contains("nodev"), "{root}");
    for device in
        ["/dev/null 666 1:3", "/dev/zero 666 1:5", "/dev/full 666 1:7", "/dev/tty 666 5:0"]
    {
        assert!(log.contains(device), "{device}: {log}");
    }
    assert!(bench.root().join("etc/hosts").symlink_metadata().expect("hosts").is_file());
}

#[test]
fn users_are_the_images_and_have_no_capabilities_but_those_granted() {
    let bench = Bench::new();
    let script = "id; echo $HOME; cat /proc/self/status";
    let mut spec = bench.spec("user", &["sh", "-c", script]);
    spec.user = Some("web".to_owned());
    spec.capabilities = vec!["CAP_NET_BIND_SERVICE".to_owned()];
    let (_, log) = bench.run(&spec);
    assert!(
        log.starts_with("uid=101(web) gid=102(web) groups=102(web),200(log)\n/srv/web\n"),
        "{log}"
    );
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert!(log.contains(&format!("{set}:\t0000000000000400")), "{set}: {log}");
    }
    let bench = Bench::new();
    let mut spec = bench.spec("nobody", &["sh", "-c", script]);
    spec.user = Some("4000:4001".to_owned());
    let (_, log) = bench.run(&spec);
    assert!(log.starts_with("uid=4000 gid=4001"), "{log}");
    for set in ["CapPrm", "CapEff", "CapAmb"] {
        assert!(log.contains(&format!("{set}:\t0000000000000000")), "{set}: {log}");
    }
    spec.user = Some("ghost".to_owned());
    let error = bench.create(&spec).expect_err("no such user").to_string();
    assert!(error.ends_with("user `ghost` is not in the image's /etc/passwd"), "{error}");
    bench.assert_clean(&spec.id);
}

#[test]
fn nothing_is_executed_before_the_release() {
    let bench = Bench::new();
    let spec = bench.spec("barrier", &["sh", "-c", "echo ran > /ran"]);
    let handle = bench.create(&spec).expect("create");
    let comm = fs::read_to_string(format!("/proc/{}/comm", handle.pid())).expect("comm");
    assert_eq!(
        comm,
        "lc-container
"
    );
    assert_eq!(handle.wait(Duration::from_millis(300)), None);
    assert!(!bench.root().join("ran").exists());
    assert_eq!(handle.exec_at_ns(), None);
    handle.release().expect("release");
    assert_eq!(handle.wait(LONG).expect("ends").status.code, Some(0));
    assert!(bench.root().join("ran").exists());
    handle.remove().expect("remove");
}

#[test]
fn a_stop_asks_first_and_kills_after_the_timeout() {
    let bench = Bench::new();
    let polite = "trap 'echo bye; exit 5' TERM; echo up; while true; do sleep 0.05; done";
    let handle = bench.create(&bench.spec("polite", &["sh", "-c", polite])).expect("create");
    handle.release().expect("release");
    wait_until("the trap is set", || bench.log().contains("up"));
    let record = handle.stop().expect("stop");
    assert_eq!((record.status.code, record.asked), (Some(5), true));
    assert_eq!(handle.state(), ContainerState::Exited);
    assert_eq!(bench.log(), "up\nbye\n");
    handle.remove().expect("remove");

    let deaf =
        bench.create(&bench.spec("deaf", &["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"]));
    let deaf = deaf.expect("create");
    deaf.release().expect("release");
    assert!(matches!(deaf.remove(), Err(ContainerError::NotEnded(_))));
    let before = Instant::now();
    let record = deaf.stop_with(SIGTERM, Duration::from_millis(300)).expect("stop");
    assert!(before.elapsed() >= Duration::from_millis(300));
    assert_eq!((record.status.signal, record.asked), (Some(SIGKILL), true));
    deaf.remove().expect("remove");

    let held = bench.create(&bench.spec("held", &["sh"])).expect("create");
    let record = held.stop().expect("stop at the barrier");
    assert_eq!((record.exec_at_ns, record.status.error), (None, None));
    assert!(held.release().is_err());
    held.remove().expect("remove");
}

#[test]
fn a_program_that_cannot_be_executed_is_said_before_the_release_where_a_look_shows_it() {
    let bench = Bench::new();
    fs::write(bench.root().join("bin/text"), "no program").expect("write");
    let table = [
        ("nope", "execute `nope`: No such file or directory"),
        ("text", "execute `text`: Permission denied"),
        ("/bin/nope", "execute `/bin/nope`: No such file or directory"),
    ];
    for (number, (program, expected)) in table.into_iter().enumerate() {
        let spec = bench.spec(&format!("look{number}"), &[program]);
        let error = bench.create(&spec).expect_err(program).to_string();
        assert!(error.contains(expected), "{error}");
        bench.assert_clean(&spec.id);
    }
    fs::write(bench.root().join("bin/noformat"), "no program").expect("write");
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(bench.root().join("bin/noformat"), mode).expect("chmod");
    let expected = "execute `noformat`: Exec format error";
    let spec = bench.spec("noformat", &["noformat"]);
    let handle = bench.create(&spec).expect("create");
    let error = handle.release().expect_err("no format").to_string();
    assert!(error.contains(expected), "{error}");
    let record = handle.wait(LONG).expect("ended");
    assert!(record.status.error.expect("error").starts_with(expected));
    assert_eq!(handle.state(), ContainerState::Dead);
    handle.remove().expect("remove");
    bench.assert_clean(&spec.id);
}

#[test]
fn the_kernel_may_kill_a_container_before_its_monitor() {
    let bench = Bench::new();
    let spec = bench.spec("oom", &["sh", "-c", "cat /proc/self/oom_score_adj"]);
    let handle = bench.create(&spec).expect("create");
    let lock = bench.dirs.containers().join(&spec.id).join("lock");
    let monitor = fs::read_to_string(lock).expect("lock").trim().to_owned();
    let score = fs::read_to_string(format!("/proc/{monitor}/oom_score_adj")).expect("score");
    let refused = handle.notes().iter().any(|note| note.contains("oom_score_adj"));
    assert!(score == "-900\n" || refused, "{score}: {:?}", handle.notes());
    handle.release().expect("release");
    handle.wait(LONG).expect("ends");
    assert_eq!(bench.log(), "0\n");
    handle.remove().expect("remove");
}

#[test]
fn images_that_would_lead_the_setup_astray_are_refused() {
    for (number, name) in ["proc", "sys", "dev"].into_iter().enumerate() {
        let bench = Bench::new();
        symlink("bin", bench.root().join(name)).expect("symlink");
        let spec = bench.spec(&format!("astray{number}"), &["sh"]);
        let error = bench.create(&spec).expect_err(name).to_string();
        let expected =
            format!("the image's /{name} must be a directory, not a symbolic link or a file");
        assert!(error.ends_with(&expected), "{error}");
        bench.assert_clean(&spec.id);
        assert!(!bench.dirs.containers().join(&spec.id).exists());
    }
    let bench = Bench::new();
    let mut spec = bench.spec("cwd", &["sh"]);
    spec.workdir = "/proc/self/fd/3".to_owned();
    let error = bench.create(&spec).expect_err("a working directory outside").to_string();
    assert!(error.contains("working directory /proc/self/fd/3"), "{error}");
    spec.root = bench.dir.path().join("nowhere");
    let error = bench.create(&spec).expect_err("no root").to_string();
    assert!(error.contains("mount the root"), "{error}");
    spec.id = "../x".to_owned();
    assert!(matches!(bench.create(&spec), Err(ContainerError::InvalidId(_))));
}

#[test]
fn a_whole_system_gets_run_and_setuid_and_its_cgroup() {
    let bench = Bench::new();
    let mut spec =
        bench.spec("system", &["sh", "-c", "cat /proc/self/mountinfo /proc/self/status"]);
    spec.profile = Profile::System;
    let (record, log) = bench.run(&spec);
    assert_eq!(record.status.code, Some(0), "{log}");
    let point = |at: &str| {
        log.lines().find(|line| line.contains(" - ") && line.split(' ').nth(4) == Some(at))
    };
    assert!(point("/run").expect("/run").contains("tmpfs"), "{log}");
    assert!(!point("/").expect("/").contains("nosuid"), "{log}");
    if let Some(cgroup) = point("/sys/fs/cgroup") {
        assert_eq!(cgroup.split(' ').nth(3), Some("/"), "its own group is the root: {cgroup}");
        assert!(cgroup.contains(" rw,"), "{cgroup}");
    }
    assert!(log.contains("CapBnd:\t00000000800405fb") && log.contains("NoNewPrivs:\t0"), "{log}");
}

#[test]
fn a_container_dies_with_its_monitor_and_is_reported_so() {
    let bench = Bench::new();
    let spec = bench.spec("orphan", &["sleep", "1000"]);
    let handle = bench.create(&spec).expect("create");
    handle.release().expect("release");
    let lock = bench.dirs.containers().join(&spec.id).join("lock");
    let monitor: u32 = fs::read_to_string(lock).expect("lock").trim().parse().expect("pid");
    kill(monitor);
    let record = handle.wait(LONG).expect("ended");
    assert!(record.status.error.expect("error").contains("monitor died"));
    wait_until("the container is dead", || !alive(handle.pid()));
    handle.remove().expect("remove");
    bench.assert_clean(&spec.id);
}

/// Gives the calling thread, and the monitors it starts, a mount namespace of their own.
fn private_mounts() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("unshare");
    let private =
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).expect("private");
}

fn mount(kind: &str, at: &Path, options: &str) {
    let options = std::ffi::CString::new(options).expect("options");
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount(kind, at, kind, flags, options.as_c_str()).expect("mount");
}

#[test]
fn a_full_disk_costs_lines_but_not_the_container() {
    private_mounts();
    let bench = Bench::new();
    let log = bench.dir.path().join("log");
    fs::create_dir_all(&log).expect("mkdir");
    mount("tmpfs", &log, "size=64k");
    let script = "i=0; while [ $i -lt 5000 ]; do i=$((i + 1)); echo line $i, which is long enough; done; exit 6";
    let (record, text) = bench.run(&bench.spec("full", &["sh", "-c", script]));
    assert_eq!(record.status.code, Some(6));
    assert!(text.starts_with("line 1, which is long enough\n"), "{text}");
    let all: usize = (1..=5000).map(|i| format!("line {i}, which is long enough\n").len()).sum();
    let dropped = usize::try_from(record.log_dropped_bytes).expect("bytes");
    assert!(dropped > 0 && text.len() + dropped == all, "{} + {dropped} != {all}", text.len());
    rustix::mount::unmount(&log, rustix::mount::UnmountFlags::empty()).expect("unmount");
}

#[test]
fn an_overlay_keeps_the_image_as_it_is() {
    private_mounts();
    let bench = Bench::new();
    let base = bench.dir.path();
    let over = base.join("over");
    fs::create_dir_all(&over).expect("mkdir");
    mount("tmpfs", &over, "");
    for name in ["upper", "work", "root"] {
        fs::create_dir_all(over.join(name)).expect("mkdir");
    }
    let (lower, over_text) = (bench.root(), over.display());
    let options =
        format!("lowerdir={},upperdir={over_text}/upper,workdir={over_text}/work", lower.display());
    mount("overlay", &over.join("root"), &options);
    let mut spec = bench.spec("overlay", &["sh", "-c", "echo changed > /etc/passwd; echo done"]);
    spec.root = over.join("root");
    let (record, log) = bench.run(&spec);
    assert_eq!((record.status.code, log.as_str()), (Some(0), "done\n"));
    assert!(fs::read_to_string(lower.join("etc/passwd")).expect("passwd").starts_with("root:"));
    assert!(!lower.join("proc").exists());
    assert_eq!(fs::read_to_string(over.join("upper/etc/passwd")).expect("upper"), "changed\n");
    rustix::mount::unmount(over.join("root"), rustix::mount::UnmountFlags::empty())
        .expect("unmount");
    rustix::mount::unmount(&over, rustix::mount::UnmountFlags::empty()).expect("unmount");
    bench.assert_clean(&spec.id);
}

#[test]
fn twenty_cycles_leave_nothing_behind() {
    let bench = Bench::new();
    for number in 0..20 {
        let spec = bench.spec(&format!("cycle{number}"), &["sleep", "1000"]);
        let handle = bench.create(&spec).expect("create");
        if number % 2 == 0 {
            handle.release().expect("release");
        }
        handle.stop_with(SIGKILL, Duration::ZERO).expect("stop");
        handle.remove().expect("remove");
        bench.assert_clean(&spec.id);
    }
    assert_eq!(fs::read_dir(bench.dirs.containers()).expect("containers").count(), 0);
    assert_eq!(bench.ended.iter().take(20).count(), 20);
    assert!(adopt(&bench.dirs, &bench.on_end).expect("adopt").is_empty());
}

/// Not a test of its own: the process that the next tests start and kill. Without the variable it does nothing.
#[test]
fn play_agent() {
    let Some(base) = std::env::var_os(PLAY_AGENT).map(PathBuf::from) else { return };
    let dirs = RunDirs::new(base.join("run"));
    let spec: Spec =
        serde_json::from_slice(&fs::read(base.join("play.json")).expect("spec")).expect("spec");
    let handle =
        create_with(Path::new(PROGRAM), &dirs, &spec, &HeldSockets::default(), Arc::new(|_, _| {}))
            .expect("create");
    handle.release().expect("release");
    fs::write(base.join("released"), "").expect("tell the test");
    loop {
        std::thread::sleep(LONG);
    }
}

/// Starts a process that plays an agent with this spec and returns it when the container runs.
#[track_caller]
fn another_agent(bench: &Bench, spec: &Spec) -> std::process::Child {
    let base = bench.dir.path();
    fs::write(base.join("play.json"), serde_json::to_vec(spec).expect("json")).expect("write");
    let child = std::process::Command::new(std::env::current_exe().expect("exe"))
        .args(["play_agent", "--exact", "--nocapture"])
        .env(PLAY_AGENT, base)
        .spawn()
        .expect("another agent");
    wait_until("the other agent released it", || base.join("released").exists());
    child
}

#[test]
fn log_and_exit_code_outlive_a_killed_agent() {
    const LINES: usize = 200_000;
    let bench = Bench::new();
    let script = format!(
        "i=0; while [ $i -lt {LINES} ]; do i=$((i + 1)); echo line $i of a log at full rate; done; exit 42"
    );
    let spec = bench.spec("outlive", &["sh", "-c", &script]);
    let mut agent = another_agent(&bench, &spec);
    wait_until("the log has begun", || !bench.log().is_empty());
    agent.kill().expect("kill");
    agent.wait().expect("reap");
    let adopted = adopt(&bench.dirs, &bench.on_end).expect("adopt").pop().expect("one");
    let exit = match adopted {
        Adopted::Live(handle) => handle.wait(LONG).expect("ends"),
        Adopted::Ended { exit, .. } => exit,
    };
    assert_eq!((exit.status.code, exit.log_dropped_bytes), (Some(42), 0));
    let log = bench.log();
    assert_eq!(log.lines().count(), LINES);
    for (number, line) in (1..).zip(log.lines()) {
        assert_eq!(line, format!("line {number} of a log at full rate"));
    }
    remove(&bench.dirs, &spec.id).expect("remove");
    bench.assert_clean(&spec.id);
}

#[test]
fn another_agent_adopts_what_runs_and_stops_it() {
    let bench = Bench::new();
    let script = "trap 'exit 3' TERM; echo up; while true; do sleep 0.05; done";
    let spec = bench.spec("adopt", &["sh", "-c", script]);
    let mut agent = another_agent(&bench, &spec);
    wait_until("the trap is set", || bench.log().contains("up"));
    agent.kill().expect("kill");
    agent.wait().expect("reap");
    let adopted = adopt(&bench.dirs, &bench.on_end).expect("adopt").pop().expect("one");
    let Adopted::Live(handle) = adopted else { panic!("{adopted:?}") };
    assert_eq!((handle.spec(), handle.state()), (&spec, ContainerState::Running));
    assert!(handle.exec_at_ns().is_some() && alive(handle.pid()));
    assert_eq!(handle.stop().expect("stop").status.code, Some(3));
    assert_eq!(bench.ended.recv_timeout(LONG).expect("on_end").0, spec.id);
    handle.remove().expect("remove");
    bench.assert_clean(&spec.id);
}

#[test]
fn one_that_ended_while_no_agent_ran_is_found_with_its_exit_code() {
    let bench = Bench::new();
    let spec =
        bench.spec("ended", &["sh", "-c", "while [ ! -e /go ]; do sleep 0.02; done; exit 9"]);
    let mut agent = another_agent(&bench, &spec);
    agent.kill().expect("kill");
    agent.wait().expect("reap");
    fs::write(bench.root().join("go"), "").expect("go");
    let exit = bench.dirs.containers().join(&spec.id).join("exit.json");
    wait_until("it has ended", || exit.exists());
    match adopt(&bench.dirs, &bench.on_end).expect("adopt").pop().expect("one") {
        Adopted::Ended { spec: found, exit } => {
            assert_eq!((*found, exit.status.code), (spec.clone(), Some(9)));
        }
        Adopted::Live(_) => panic!("it has ended"),
    }
    remove(&bench.dirs, &spec.id).expect("remove");
    bench.assert_clean(&spec.id);
}
