//! What a description asks of a container's view, tried from inside.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use agent::containers::Spec;
use agent::containers::files::PlacedFile;
use agent::containers::keep;
use protocol::imageset::Profile;
use protocol::node::FileContent;

use super::bench::{Bench, LONG, wait_until};

/// Fills in a part of a spec's view.
fn with_view(mut spec: Spec, view: serde_json::Value) -> Spec {
    spec.view = serde_json::from_value(view).expect("view");
    spec
}

#[track_caller]
fn run(bench: &Bench, spec: &Spec) -> String {
    let (record, log) = bench.run(spec);
    assert_eq!(record.status.code, Some(0), "{record:?}: {log}");
    log
}

#[test]
fn directories_of_the_node_memory_and_devices_are_where_the_description_says() {
    let bench = Bench::new();
    let node = bench.dir.path().join("node");
    fs::create_dir_all(node.join("below")).expect("mkdir");
    fs::write(node.join("file"), "of the node\n").expect("write");
    // The image sends /var/lib elsewhere: inside itself.
    fs::create_dir_all(bench.root().join("real")).expect("mkdir");
    fs::create_dir_all(bench.root().join("var")).expect("mkdir");
    std::os::unix::fs::symlink("/real", bench.root().join("var/lib")).expect("symlink");
    let script = "cat /data/file; echo x > /data/new; echo x 2>/dev/null > /ro/new && echo WRITABLE; \
        cat /real/app/file; stat -c '%a' /mem; grep ' /mem ' /proc/self/mountinfo; \
        stat -c '%n %t:%T' /dev/fuse /dev/zero; grep ' /dev/shm ' /proc/self/mountinfo; ls /optional; true";
    let spec = with_view(
        bench.spec("view", &["sh", "-c", script]),
        serde_json::json!({
            "mounts": [
                {"source": node, "target": "/data"},
                {"source": node, "target": "/ro", "read_only": true, "recursive": true},
                {"source": node, "target": "/var/lib/app"},
                {"source": "/does/not/exist", "target": "/optional", "optional": true},
            ],
            "tmpfs": [{"target": "/mem", "size": "1MiB", "mode": "0750"}],
            "devices": [{"path": "/dev/fus*"}, {"path": "/dev/not-there", "optional": true}],
            "shm_size": "2MiB",
        }),
    );
    let log = run(&bench, &spec);
    assert!(log.starts_with("of the node\nof the node\n750\n"), "{log}");
    assert!(!log.contains("WRITABLE"), "{log}");
    assert!(log.contains("size=1024k") && log.contains("size=2048k"), "{log}");
    assert!(log.contains("nosuid,nodev,noexec"), "{log}");
    assert!(log.contains("/dev/fuse a:e5"), "{log}");
    assert!(node.join("new").exists());
    bench.assert_clean(&spec.id);

    let missing = with_view(
        bench.spec("missing", &["sh"]),
        serde_json::json!({"devices": [{"path": "/dev/not-there"}]}),
    );
    let error = bench.create(&missing).expect_err("no device").to_string();
    assert!(error.contains("device /dev/not-there"), "{error}");
    let trap = with_view(
        bench.spec("trap", &["sh"]),
        serde_json::json!({"tmpfs": [{"target": "/trap/sys"}]}),
    );
    std::os::unix::fs::symlink("/proc", bench.root().join("trap")).expect("symlink");
    let error = bench.create(&trap).expect_err("a trap").to_string();
    assert!(error.contains("leads into /proc or /sys"), "{error}");
}

#[test]
fn files_lie_over_the_images_in_memory_and_secrets_are_written_nowhere() {
    let bench = Bench::new();
    let script = "cat /etc/app/conf /run/secret; stat -c '%n %a %u:%g' /etc/app/conf /run/secret; \
        grep -c ' tmpfs ' /proc/self/mountinfo; sleep 1000";
    let mut spec = bench.spec("files", &["sh", "-c", script]);
    let file = |target: &str, content: &str, mode, owner| PlacedFile {
        target: target.to_owned(),
        content: FileContent(content.as_bytes().to_vec()),
        mode,
        owner,
    };
    spec.user = Some("web".to_owned());
    spec.files = vec![
        file("/etc/app/conf", "name = n7\n", 0o644, Some((0, 5))),
        file("/run/secret", "s3cret\n", 0o400, None),
    ];
    let handle = bench.create(&spec).expect("create");
    let dir = bench.dir.path().join("run");
    let find = |text: &str| {
        let mut dirs = vec![dir.clone(), bench.root()];
        let mut found = Vec::new();
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).expect("list").flatten() {
                let path = entry.path();
                if path.is_symlink() {
                    continue;
                }
                if path.is_dir() {
                    dirs.push(path);
                } else if path.is_file()
                    && fs::read(&path)
                        .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
                {
                    found.push(path);
                }
            }
        }
        found
    };
    assert_eq!(find("s3cret"), Vec::<PathBuf>::new());
    handle.release().expect("release");
    wait_until("the program has spoken", || bench.log().lines().count() >= 5);
    let log = bench.log();
    assert!(log.starts_with("name = n7\ns3cret\n"), "{log}");
    assert!(log.contains("/etc/app/conf 644 0:5\n/run/secret 400 101:102\n"), "{log}");
    assert_eq!(find("s3cret"), Vec::<PathBuf>::new());
    handle.stop_with(super::bench::SIGKILL, LONG).expect("stop");
    handle.remove().expect("remove");
    bench.assert_clean(&spec.id);
}

#[test]
fn a_persistent_directory_survives_its_container() {
    let bench = Bench::new();
    fs::create_dir_all(bench.root().join("srv/data")).expect("mkdir");
    fs::write(bench.root().join("srv/data/from-image"), "image\n").expect("write");
    let source = bench.dir.path().join("persistent/hello/data");
    let view = serde_json::json!({"persistent": [{"source": source, "target": "/srv/data"}]});
    let script = "cat /srv/data/*; echo more >> /srv/data/more";
    for (id, expected) in [("first", "image\n"), ("second", "image\nimage\nmore\n")] {
        let spec = with_view(bench.spec(id, &["sh", "-c", script]), view.clone());
        keep::prepare(&spec).expect("prepare");
        assert_eq!(run(&bench, &spec), expected);
    }
    assert!(!bench.root().join("srv/data/more").exists());
}

#[test]
fn limits_settings_names_and_clocks_are_the_containers_own() {
    let bench = Bench::new();
    let script = "ulimit -c; ulimit -n; cat /proc/sys/kernel/shmmax /proc/sys/net/core/somaxconn; hostname; \
        read up rest < /proc/uptime; echo up=$up; grep -c : /proc/net/dev; \
        echo 1 2>/dev/null > /proc/sys/kernel/shmmax && echo WRITABLE; true";
    let mut spec = with_view(
        bench.spec("own", &["sh", "-c", script]),
        serde_json::json!({
            "ulimits": {"core": 0, "nofile": {"soft": 100, "hard": 200}},
            "sysctls": {"kernel.shmmax": "123456", "net.core.somaxconn": "77"},
            "namespaces": {"net": "none", "time": true},
        }),
    );
    spec.hostname = "own".to_owned();
    let log = run(&bench, &spec);
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(&lines[..5], ["0", "100", "123456", "77", "own"], "{log}");
    let up: f64 = lines[5].strip_prefix("up=").expect("up").parse().expect("seconds");
    assert!(up < 60.0, "{log}");
    assert_eq!(lines[6], "1", "nothing but lo: {log}");
    assert!(!log.contains("WRITABLE"), "{log}");
    let refused = with_view(
        bench.spec("refused", &["sh"]),
        serde_json::json!({"sysctls": {"kernel.nothing": "1"}}),
    );
    let error = bench.create(&refused).expect_err("no such setting").to_string();
    assert!(error.contains("sysctl kernel.nothing"), "{error}");
}

#[test]
fn mounts_travel_as_far_as_the_description_lets_them() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    super::private_mounts();
    let bench = Bench::new();
    let memory = |at: &Path| {
        fs::create_dir_all(at).expect("mkdir");
        mount("tmpfs", at, "tmpfs", MountFlags::empty(), None).expect("mount");
    };
    let node = bench.dir.path().join("node");
    memory(&node);
    mount_change(&node, MountPropagationFlags::SHARED).expect("share");
    // Two signs pass: the node's mount has come in, and the container's own is there.
    let script = "until [ -e /slave/in/mark ]; do sleep 0.01; done; [ -e /alone/in/mark ] && exit 9; \
        for at in slave shared; do mkdir /$at/of-$at; /bin/busybox mount -t tmpfs x /$at/of-$at || exit 8; \
        touch /$at/of-$at/mark; done; until [ -e /slave/seen ]; do sleep 0.01; done";
    let bind = |target: &str, propagation: &str| serde_json::json!({"source": node, "target": target, "propagation": propagation});
    let spec = with_view(
        bench.spec("travel", &["sh", "-c", script]),
        serde_json::json!({"privileged": true, "hugepages": {"2MiB": "4MiB"},
            "mounts": [bind("/slave", "slave"), bind("/shared", "shared"), bind("/alone", "private")]}),
    );
    let handle = bench.create(&spec).expect("create");
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", handle.pid())).expect("mounts");
    let huge = mounts.lines().find(|line| line.contains(" /dev/hugepages ")).unwrap_or_default();
    assert!(huge.contains("hugetlbfs") && huge.contains("pagesize=2M"), "{mounts}");
    handle.release().expect("release");
    memory(&node.join("in"));
    fs::write(node.join("in/mark"), "").expect("mark");
    wait_until("what the container mounts to be on the node", || {
        node.join("of-shared/mark").exists()
    });
    assert!(node.join("of-slave").exists() && !node.join("of-slave/mark").exists());
    fs::write(node.join("seen"), "").expect("seen");
    let record = handle.wait(LONG).expect("ends");
    assert_eq!(record.status.code, Some(0), "{record:?}: {}", bench.log());
    handle.remove().expect("remove");
}

#[test]
fn a_private_network_reaches_the_node_and_goes_with_its_container() {
    let bench = Bench::new();
    // The node's side is in a network namespace of this thread: nothing of the machine is touched.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare");
    let interfaces = || fs::read_to_string("/proc/thread-self/net/dev").expect("dev");
    let view = serde_json::json!({
        "namespaces": {"net": "private"},
        "network": {"address": "10.88.0.2/24", "host_address": "10.88.0.1/24", "mtu": 1400},
    });
    let busybox =
        |id: &str, script: &str| with_view(bench.spec(id, &["sh", "-c", script]), view.clone());
    let node = std::net::TcpListener::bind("0.0.0.0:7777").expect("bind");
    let answers = std::thread::spawn(move || {
        let (mut stream, peer) = node.accept().expect("accept");
        stream.write_all(b"the node answers\n").expect("write");
        peer.ip().to_string()
    });
    let spec = busybox(
        "net",
        "/bin/busybox ip addr; /bin/busybox ip route; /bin/busybox nc 10.88.0.1 7777 < /dev/null",
    );
    let handle = bench.create(&spec).expect("create");
    assert!(interfaces().contains("lc-"), "{}", interfaces());
    handle.release().expect("release");
    let record = handle.wait(LONG).expect("ends");
    let log = bench.log();
    assert_eq!(record.status.code, Some(0), "{record:?}: {log}");
    assert!(log.contains("the node answers"), "{log}");
    assert_eq!(answers.join().expect("the node's end"), "10.88.0.2");
    assert!(log.contains("inet 10.88.0.2/24") && log.contains("mtu 1400"), "{log}");
    assert!(log.contains("default via 10.88.0.1 dev eth0"), "{log}");
    handle.remove().expect("remove");
    wait_until("the pair is gone", || !interfaces().contains("lc-"));

    // A version and its successor stand side by side.
    let (one, two) = (busybox("one", "sleep 1000"), busybox("two", "sleep 1000"));
    let (one, two) = (bench.create(&one).expect("one"), bench.create(&two).expect("two"));
    assert_eq!(interfaces().matches("lc-").count(), 2);
    for handle in [one, two] {
        super::bench::kill(handle.pid());
        handle.wait(LONG).expect("ends");
        handle.remove().expect("remove");
    }
    wait_until("both pairs are gone", || !interfaces().contains("lc-"));
}

#[test]
fn a_reaper_passes_signals_on_takes_orphans_in_and_ends_as_its_program() {
    let bench = Bench::new();
    let view = serde_json::json!({"init": true});
    let script = "echo pid=$$; trap 'echo got; exit 9' USR1; (sleep 0.1 & ); sleep 0.3; ls -d /proc/[0-9]*; echo up; \
        while true; do sleep 0.05; done";
    let spec = with_view(bench.spec("reaper", &["sh", "-c", script]), view.clone());
    let handle = bench.create(&spec).expect("create");
    handle.release().expect("release");
    wait_until("the trap is set", || bench.log().contains("up"));
    handle.kill(10).expect("signal");
    let record = handle.wait(LONG).expect("ends");
    let log = bench.log();
    assert_eq!(record.status.code, Some(9), "{log}");
    assert!(log.starts_with("pid=2\n") && log.ends_with("got\n"), "{log}");
    // PID 1, the shell and its ls; the orphan has been taken in.
    assert!(log.lines().filter(|line| line.starts_with("/proc/")).count() <= 3, "{log}");
    handle.remove().expect("remove");
    let killed = with_view(bench.spec("killed", &["sh", "-c", "kill -9 $$"]), view.clone());
    assert_eq!(bench.run(&killed).0.status.code, Some(137));
    let missing = with_view(bench.spec("missing", &["/bin/sh"]), view);
    let handle = bench.create(&missing).expect("create");
    fs::remove_file(bench.root().join("bin/busybox")).expect("remove");
    assert!(handle.release().is_err() || handle.wait(LONG).is_some());
    bench.assert_clean("none");
}

#[test]
fn a_privileged_container_has_the_nodes_devices_and_capabilities() {
    let bench = Bench::new();
    let script = "cat /proc/self/status; ls /dev/fuse; cat /proc/cmdline > /dev/null && echo CMDLINE; \
        mount -t tmpfs none /mnt 2>/dev/null; /bin/busybox mount -t tmpfs none /tmp && echo MOUNTED";
    fs::create_dir_all(bench.root().join("tmp")).expect("mkdir");
    let mut spec = with_view(
        bench.spec("priv", &["sh", "-c", script]),
        serde_json::json!({"privileged": true, "drop_capabilities": ["CAP_SYS_BOOT"]}),
    );
    spec.profile = Profile::Service;
    let log = run(&bench, &spec);
    for expected in ["NoNewPrivs:\t0", "Seccomp:\t0", "/dev/fuse", "CMDLINE", "MOUNTED"] {
        assert!(log.contains(expected), "{expected}: {log}");
    }
    let field = |name: &str, text: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).expect("field").to_owned();
        u64::from_str_radix(line.rsplit('\t').next().expect("value"), 16).expect("hex")
    };
    let own = field("CapBnd", &fs::read_to_string("/proc/self/status").expect("status"));
    // CAP_SYS_BOOT is 22.
    assert_eq!(field("CapEff", &log), own & !(1 << 22));
}

/// Set in a container for a copy of this test that tries forbidden calls.
const TRY_CALLS: &str = "LAYERCAKE_TEST_TRY_CALLS";

#[test]
fn the_filter_refuses_what_it_should_to_every_thread() {
    if std::env::var_os(TRY_CALLS).is_some() {
        return try_calls();
    }
    let bench = Bench::new();
    let program = std::env::current_exe().expect("own program");
    let here = program.parent().expect("directory");
    let name = program.file_name().expect("name").to_string_lossy().into_owned();
    let libraries =
        ["/lib", "/lib64", "/usr/lib"].into_iter().filter(|dir| Path::new(dir).exists());
    let mut mounts: Vec<_> = libraries
        .map(|dir| serde_json::json!({"source": dir, "read_only": true, "recursive": true}))
        .collect();
    mounts.push(serde_json::json!({"source": here, "target": "/test", "read_only": true}));
    let command = format!("/test/{name}");
    let test = "view::the_filter_refuses_what_it_should_to_every_thread";
    let base = bench.spec("calls", &[&command, "--exact", test, "--nocapture"]);
    for (mode, seccomp) in [("filtered", "default"), ("open", "unconfined")] {
        let mut spec = base.clone();
        spec.id = format!("{mode}-{}", spec.id);
        spec.env.push(format!("{TRY_CALLS}={mode}"));
        spec.capabilities = vec!["CAP_SYS_CHROOT".to_owned()];
        let view = serde_json::json!({"mounts": mounts, "seccomp": seccomp});
        let log = run(&bench, &with_view(spec, view));
        assert!(log.contains("tried everything"), "{log}");
    }
}

/// In the container: calls, and the error number that each must get with the filter.
fn try_calls() {
    use nix::libc;
    let filtered = std::env::var(TRY_CALLS).is_ok_and(|mode| mode == "filtered");
    let table = BTreeMap::from([
        (libc::SYS_keyctl, libc::EPERM),
        (libc::SYS_userfaultfd, libc::EPERM),
        (libc::SYS_io_uring_setup, libc::EPERM),
        (libc::SYS_kexec_load, libc::EPERM),
        (libc::SYS_mount, libc::EPERM),
        (libc::SYS_clone3, libc::ENOSYS),
    ]);
    let calls = move || {
        for (call, expected) in &table {
            let error = agent_try(*call);
            if filtered {
                assert_eq!(error, *expected, "call {call}");
            } else if *call == libc::SYS_clone3 {
                assert_eq!(error, libc::EINVAL, "clone3 reaches the kernel");
            }
        }
    };
    calls();
    // A thread is under the same filter; that it starts at all shows that clone is allowed, and clone3 was fallen back from.
    std::thread::spawn(calls).join().expect("thread");
    let status = fs::read_to_string("/proc/self/status").expect("status");
    assert!(status.contains(if filtered { "Seccomp:\t2" } else { "Seccomp:\t0" }), "{status}");
    std::io::Write::write_all(&mut std::io::stdout(), b"tried everything\n").expect("say so");
}

/// Makes a call with zeroes for arguments and returns its error number.
fn agent_try(call: i64) -> i32 {
    agent::sys::process::try_call(call)
}

#[test]
fn a_container_whose_monitor_hangs_is_ended_all_the_same() {
    let bench = Bench::new();
    let spec = bench.spec("hung", &["sleep", "1000"]);
    let handle = bench.create(&spec).expect("create");
    handle.release().expect("release");
    let lock = bench.dirs.containers().join(&spec.id).join("lock");
    let monitor: i32 = fs::read_to_string(lock).expect("lock").trim().parse().expect("pid");
    let monitor = rustix::process::Pid::from_raw(monitor).expect("pid");
    // A monitor that does nothing any more.
    rustix::process::kill_process(monitor, rustix::process::Signal::STOP).expect("stop it");
    let record = handle
        .stop_with(super::bench::SIGTERM, std::time::Duration::from_millis(10))
        .expect("ended by force");
    assert!(record.status.error.is_some_and(|error| error.contains("monitor died")));
    wait_until("the program is dead", || !super::bench::alive(handle.pid()));
    handle.remove().expect("remove");
    bench.assert_clean(&spec.id);
}

#[test]
fn a_container_with_users_of_its_own_is_root_inside_and_nobody_outside() {
    super::private_mounts();
    let bench = Bench::new();
    let base = bench.dir.path();
    let over = base.join("over");
    fs::create_dir_all(&over).expect("mkdir");
    super::mount("tmpfs", &over, "");
    let (layer, first) = (over.join("layer"), 1 << 20);
    super::bench::build_root(&layer);
    std::os::unix::fs::chown(layer.join("etc/group"), Some(7), Some(7)).expect("chown");
    let kept = over.join("keep/site/data");
    let script = "id -u; stat -c '%u:%g' / /etc/passwd /etc/group /data /dev/null; echo new > /made; echo new > /data/made; \
        cat /proc/self/uid_map; /bin/busybox chown 5:5 /made && ls /sys > /dev/null && echo fine; /bin/busybox mount -t tmpfs none /bin || true";
    let mut spec = with_view(
        bench.spec("users", &["sh", "-c", script]),
        serde_json::json!({
            "namespaces": {"user": true},
            "id_base": first,
            "persistent": [{"source": kept, "target": "/data"}],
        }),
    );
    let instance = over.join("instance");
    spec.root =
        agent::containers::idmap::mount_overlay(std::slice::from_ref(&layer), &instance, first)
            .expect("mount");
    keep::prepare(&spec).expect("prepare");
    let log = run(&bench, &spec);
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(&lines[..5], ["0", "0:0", "0:0", "7:7", "0:0"], "{log}");
    assert!(log.contains("1048576") && log.contains("fine"), "{log}");
    use std::os::unix::fs::MetadataExt;
    let owner = |path: PathBuf| fs::metadata(path).expect("stat").uid();
    assert_eq!(owner(instance.join("upper/made")), first + 5);
    assert_eq!(owner(kept.join("made")), 0, "what is kept is independent of the range");
    assert_eq!(owner(layer.join("etc/group")), 7, "the layer is as it was");
    agent::mounts::unmount_overlay(&instance).expect("unmount");
    rustix::mount::unmount(&over, rustix::mount::UnmountFlags::empty()).expect("unmount");
    bench.assert_clean(&spec.id);
}
