//! Rolls with real containers: gone back from, undone, held back, handed over, and with the agent killed at every step.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use protocol::node::{DesiredSet, ObservedSet, RollOutcome, SetState};
use serde_json::{Value, json};

use super::site::Published;
use super::{Bench, LONG, ask, base, layer, server, set, wait_until};

/// How long good sets here are watched, in seconds.
const WATCH_S: u32 = 1;
/// The steps at which an agent that rolls forward is killed, in their order.
const FORWARD: [&str; 10] = [
    "pulled",
    "kept-dropped",
    "staging",
    "staged",
    "noted",
    "old-stopped",
    "waiting",
    "released",
    "watching",
    "committed",
];
/// The steps at which an agent that goes back is killed.
const BACK: [&str; 3] = ["going-back-noted", "going-back", "new-stopped"];

/// A web server, and a container that starts after it.
fn pair() -> Value {
    let mut both = server();
    let rest = json!({"name": "side", "image": "web", "after": ["web"],
        "command": ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1 & wait; done"]});
    both.as_array_mut().expect("array").push(rest);
    both
}

/// A container that ends badly soon after it was started.
fn crashing() -> Value {
    json!([{"name": "web", "image": "web", "command": ["/bin/sh", "-c", "sleep 0.2; exit 3"]}])
}

fn publish(bench: &Bench, version: &str, containers: &Value, watch_s: u32) -> Published {
    let layers = [base(), layer(&[("www/version", version.as_bytes())])];
    bench.site.publish_watched(version, &layers, containers, Some(watch_s))
}

/// Waits until the set stands with this outcome of its last roll, at this digest.
#[track_caller]
fn outcome(bench: &Bench, runs: &Published, outcome: RollOutcome) -> ObservedSet {
    let what = format!("version {} runs, {outcome:?}", runs.set.version);
    let observed = bench.site.wait(&what, |observed| {
        set(observed).is_some_and(|set| {
            let last = set.last_roll.as_ref().and_then(|report| report.outcome);
            set.digest == runs.digest && last == Some(outcome)
        })
    });
    set(&observed).expect("set").clone()
}

#[test]
fn a_version_that_fails_while_it_is_watched_is_gone_back_from_and_says_why() {
    let mut bench = Bench::new();
    let good = publish(&bench, "1", &server(), WATCH_S);
    let mut sick = server();
    // Nobody listens there.
    sick[0]["health"] = json!({"tcp": "127.0.0.1:9", "start_period_ms": 0, "interval_ms": 50,
        "timeout_ms": 1000, "retries": 2});
    let mut strange = server();
    // Executable, and nothing that the kernel could execute.
    strange[0]["command"] = json!(["/www/version"]);
    let table = [
        ("2", crashing(), "container web ended: exit code 3"),
        ("3", sick, "container web is unhealthy: "),
        ("4", strange, "container web: "),
    ];
    bench.site.want(&[&good]);
    bench.start_with_server();
    bench.runs(&good);
    for (version, containers, why) in table {
        let bad = publish(&bench, version, &containers, 30);
        bench.site.want(&[&bad]);
        let observed = bench.site.wait("it went back", |observed| {
            let report = set(observed).and_then(|set| set.last_roll.as_ref());
            report.is_some_and(|report| {
                report.to == bad.digest && report.outcome == Some(RollOutcome::RolledBack)
            })
        });
        let set = set(&observed).expect("set").clone();
        assert_eq!(set.digest, good.digest);
        let report = set.last_roll.clone().expect("report");
        let reason = report.reason.expect("reason");
        assert!(reason.starts_with(why), "{reason}");
        assert_eq!((set.state, report.from), (SetState::Degraded, Some(good.digest)));
        assert_eq!(ask(), "1");
        wait_until("only the old set is there", || {
            bench.instances().len() == 1 && bench.overlays() == 1
        });
    }
    // Not tried again, nor by a new agent, until it is asked for again.
    bench.kill_agent();
    bench.start_with_server();
    bench.site.wait("a second agent stays", |observed| {
        observed.agent_starts == 2
            && observed.waiting.as_ref().is_some_and(|it| it.contains("stays on version 1"))
    });
    let pid = |set: &ObservedSet| set.containers.first().and_then(|container| container.pid);
    let before = bench.instances();
    bench.site.tell(|desired| desired.imagesets[0].roll = 1);
    bench.site.wait("it was tried again", |observed| {
        let back = set(observed).filter(|set| set.state == SetState::Degraded);
        observed.desired_version == 5
            && back.and_then(pid).is_some()
            && bench.instances().len() == 1
            && bench.instances() != before
    });
    assert_eq!(ask(), "1");
}

#[test]
fn an_undo_asks_nothing_of_the_registry() {
    let mut bench = Bench::new();
    let versions = ["1", "2"].map(|version| publish(&bench, version, &server(), WATCH_S));
    bench.site.want(&[&versions[0]]);
    bench.start_with_server();
    bench.runs(&versions[0]);
    bench.site.want(&[&versions[1]]);
    let set = outcome(&bench, &versions[1], RollOutcome::Committed);
    assert_eq!(set.previous.as_ref(), Some(&versions[0].set), "the old one is kept");
    assert!(set.last_roll.expect("report").ready_us.is_some());
    assert_eq!((bench.instances().len(), bench.overlays()), (1, 2));
    let before = bench.site.requests();
    let start = Instant::now();
    let back = DesiredSet { roll: 3, ..versions[0].set.clone() };
    bench.site.tell(|desired| desired.imagesets = vec![back]);
    let set = outcome(&bench, &versions[0], RollOutcome::Undone);
    let took = start.elapsed();
    assert_eq!(ask(), "1");
    assert_eq!(bench.site.requests(), before);
    assert_eq!(set.previous.map(|kept| kept.version), Some(versions[1].set.version.clone()));
    assert!(took < Duration::from_secs(5), "an undo took {took:?}");
    // And forth again, by another agent.
    bench.kill_agent();
    bench.start_with_server();
    bench.site.tell(|desired| desired.imagesets = vec![versions[1].set.clone()]);
    outcome(&bench, &versions[1], RollOutcome::Undone);
    assert_eq!(bench.site.requests(), before);
    assert_eq!((bench.instances().len(), bench.overlays()), (1, 2));
}

#[test]
fn a_busy_node_is_rolled_when_it_is_free_or_when_it_is_forced() {
    let mut bench = Bench::new();
    let versions = ["1", "2", "3"].map(|version| publish(&bench, version, &server(), WATCH_S));
    let (program, free) = (bench.dir.path().join("busy"), bench.dir.path().join("free"));
    let script = format!("#!/bin/sh\ntest -e {} || {{ echo job 123; exit 1; }}\n", free.display());
    fs::write(&program, script).expect("write");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("mode");
    bench.site.want(&[&versions[0]]);
    let url = bench.site.url();
    let program = program.to_str().expect("utf-8").to_owned();
    bench.start(&["--server", &url, "--node", "n1", "--busy", &program]);
    bench.runs(&versions[0]);
    let waits = |why: &str| {
        let why = format!("node is busy: {why}");
        let waiting = bench.site.wait(&why, |observed| observed.waiting.as_ref() == Some(&why));
        assert_eq!(set(&waiting).expect("set").digest, versions[0].digest);
        assert_eq!(ask(), "1");
    };
    bench.site.tell(|desired| {
        desired.imagesets = vec![versions[1].set.clone()];
        desired.busy = Some("maintenance".to_owned());
    });
    waits("maintenance");
    bench.site.tell(|desired| desired.busy = None);
    waits("job 123");
    fs::write(&free, "").expect("write");
    bench.site.tell(|desired| desired.busy = Some("a moment".to_owned()));
    bench.site.tell(|desired| desired.busy = None);
    bench.runs(&versions[1]);
    fs::remove_file(&free).expect("remove");
    let forced = DesiredSet { force: true, ..versions[2].set.clone() };
    bench.site.tell(|desired| desired.imagesets = vec![forced]);
    bench.runs(&versions[2]);
}

#[test]
fn a_handover_runs_both_until_the_new_one_is_healthy() {
    both_run_until_the_new_one_is_healthy(&json!({"strategy": "handover",
        "sockets": [{"name": "http", "listen": "tcp://127.0.0.1:8081"}]}));
}

#[test]
fn an_overlap_runs_both_in_networks_of_their_own_until_the_new_one_is_healthy() {
    both_run_until_the_new_one_is_healthy(
        &json!({"strategy": "overlap", "namespaces": {"net": "none"}}),
    );
}

/// A roll of a container that is described with this as well.
fn both_run_until_the_new_one_is_healthy(how: &Value) {
    let mut bench = Bench::new();
    // Healthy as soon as there is a file: then it listens at a port of its own.
    let containers = |port: u16| {
        let script = format!(
            "trap 'kill $!; exit 0' TERM; while ! test -e /ready; do sleep 0.05; done; httpd -f -p 127.0.0.1:{port} & wait"
        );
        let mut web = json!({"name": "web", "image": "web",
            "health": {"tcp": format!("127.0.0.1:{port}"), "start_period_ms": 60000,
                "interval_ms": 20, "timeout_ms": 5000, "retries": 1},
            "command": ["/bin/sh", "-c", script]});
        for (key, value) in how.as_object().expect("object") {
            web[key] = value.clone();
        }
        json!([web])
    };
    let [one, two] = [("1", 8091), ("2", 8092)]
        .map(|(version, port)| publish(&bench, version, &containers(port), WATCH_S));
    let root = |version: &Published| {
        let digest: String = version.digest.hex().chars().take(12).collect();
        bench.run_dir().join(format!("mounts/hello.web.{digest}/root"))
    };
    let (ready_one, ready_two) = (root(&one).join("ready"), root(&two).join("ready"));
    let waits = |bench: &Bench, version: &str| {
        let text = format!("ImageSet hello:{version}: ");
        bench.site.wait("it says what it waits for", |observed| {
            let waiting = observed.waiting.as_ref();
            waiting.is_some_and(|it| it.starts_with(&text) && it.contains("container web"))
        });
    };
    bench.site.want(&[&one]);
    bench.start_with_server();
    waits(&bench, "1");
    fs::write(&ready_one, "").expect("write");
    bench.runs(&one);
    let before = bench.instances();
    bench.site.want(&[&two]);
    waits(&bench, "2");
    assert_eq!(bench.instances().len(), 2, "both run");
    fs::write(&ready_two, "").expect("write");
    let set = outcome(&bench, &two, RollOutcome::Committed);
    let report = set.last_roll.expect("report");
    assert_eq!((report.blackout_us, report.ready_us), (Some(0), Some(0)));
    wait_until("the old one has drained", || bench.instances().len() == 1);
    assert_ne!(bench.instances(), before);
}

/// One agent that dies at a step of a roll, and the one after it. `back`: the new version fails.
fn killed_at(step: &str, back: bool) {
    let mut bench = Bench::new();
    let versions = ["0", "1", "2"].map(|version| publish(&bench, version, &pair(), WATCH_S));
    let bad = publish(&bench, "3", &crashing(), 30);
    bench.start_with_server();
    // A version is kept when the roll begins.
    bench.site.want(&[&versions[0]]);
    bench.runs(&versions[0]);
    bench.site.want(&[&versions[1]]);
    outcome(&bench, &versions[1], RollOutcome::Committed);
    bench.kill_agent();
    let to = if back { &bad } else { &versions[2] };
    bench.start_to_die(step);
    bench.site.want(&[to]);
    let until = Instant::now() + LONG;
    let agent = bench.agent.as_mut().expect("an agent");
    while agent.try_wait().expect("wait").is_none() {
        assert!(Instant::now() < until, "no agent came to the step {step}");
        std::thread::sleep(Duration::from_millis(5));
    }
    bench.start_with_server();
    let (runs, outcome_wanted) = match back {
        true => (&versions[1], RollOutcome::RolledBack),
        false => (&versions[2], RollOutcome::Committed),
    };
    bench.site.wait("a new agent", |observed| observed.agent_starts == 3);
    outcome(&bench, runs, outcome_wanted);
    assert_eq!(ask(), runs.set.version.as_str(), "{step}");
    wait_until(&format!("{step}: exactly one set runs"), || bench.instances().len() == 2);
    let kept = if back { 0 } else { 2 };
    wait_until(&format!("{step}: nothing is leaked"), || bench.overlays() == 2 + kept);
}

#[test]
fn an_agent_killed_at_any_step_of_a_roll_ends_in_exactly_one_set() {
    let all = FORWARD.map(|step| (step, false)).into_iter().chain(BACK.map(|step| (step, true)));
    for some in all.collect::<Vec<_>>().chunks(4) {
        std::thread::scope(|scope| {
            let started = some.iter().map(|(step, back)| scope.spawn(|| killed_at(step, *back)));
            let started: Vec<_> = started.collect();
            for (thread, (step, _)) in started.into_iter().zip(some) {
                assert!(thread.join().is_ok(), "killed at {step}");
            }
        });
    }
}
