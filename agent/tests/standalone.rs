//! The whole agent at native speed: the real program as `agent --standalone` on this machine, against a registry and boot
//! server in this process. Needs root and busybox-static.

#[path = "standalone/bench.rs"]
mod bench;
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
use std::time::{Duration, Instant};

use protocol::ids::Digest;
use protocol::registries::{RegistryEntry, Secret};
use serde_json::{Value, json};

use bench::{Bench, LONG, busybox, layer, set, wait_until};
use site::{Published, Site};

/// Where the container serves: not a port that the kernel gives to connections.
const PORT: u16 = 8080;
/// Rolls that the blackout's median is taken of.
const ROLLS: usize = 20;
/// What the median may be beside other tests on a busy machine. Alone it is a few milliseconds.
const BLACKOUT_LIMIT_US: u64 = 100_000;

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
