//! Tests of the ImageSet state machine: what it does, in the order in which it happens on a node.

use protocol::node::{RollOutcome, SetState};

use super::*;

#[path = "set_tests/trials.rs"]
mod trials;

/// How long the sets here are watched.
const WINDOW: Duration = Duration::from_secs(10);

fn content(version: &str) -> Content {
    Content { digest: Digest::of(version.as_bytes()), mode: Mode::Contain, bytes: 1 }
}

pub(super) fn set(version: &str) -> DesiredSet {
    let digest = Digest::of(version.as_bytes());
    DesiredSet {
        name: "hello".parse().expect("name"),
        version: version.parse().expect("version"),
        reference: format!("http://r:1/hello:{version}@{digest}").parse().expect("reference"),
        roll: 0,
        force: false,
    }
}

pub(super) fn deployment(version: &str, restart: Restart) -> Deployment {
    let set = set(version);
    let container = ContainerRecord {
        name: "web".parse().expect("name"),
        instance: format!("hello.web.{version}"),
        restart,
        state: ContainerState::Running,
        pid: Some(7),
        restarts: 0,
        exit: None,
        started: Duration::ZERO,
        restart_at: None,
        failures: 0,
        readiness: readiness("{}").begun(1),
        replaced_at_ns: None,
        notes: Vec::new(),
    };
    let digest = set.reference.digest.expect("digest");
    let last_roll = Some(report(version));
    let mode = Mode::Contain;
    Deployment { set, digest, mode, watch: WINDOW, containers: vec![container], last_roll }
}

fn readiness(json: &str) -> Readiness {
    let mut value: serde_json::Value = serde_json::from_str(json).expect("json");
    value["name"] = "web".into();
    value["image"] = "web".into();
    Readiness::of(&serde_json::from_value(value).expect("container"))
}

fn report(version: &str) -> RollReport {
    RollReport {
        from: None,
        to: Digest::of(version.as_bytes()),
        bytes: 1,
        staging_ms: 1,
        blackout_us: None,
        ready_us: None,
        outcome: None,
        reason: None,
    }
}

/// A machine whose set, where one runs, was committed by an earlier agent.
fn machine(running: Option<Deployment>) -> SetMachine {
    let Some(running) = running else { return SetMachine::new("hello".parse().expect("name")) };
    let commitment = Commitment {
        set: running.set.clone(),
        digest: running.digest,
        mode: running.mode,
        last_roll: None,
        kept: None,
        trial: None,
        refused: None,
        cutting_over: false,
    };
    SetMachine::adopted(running, None, &commitment, Duration::ZERO)
}

struct Bench {
    machine: SetMachine,
    now: Duration,
}

impl Bench {
    fn new(running: Option<Deployment>) -> Self {
        Self { machine: machine(running), now: Duration::ZERO }
    }

    #[track_caller]
    fn expect(&mut self, event: SetEvent, actions: &[SetAction]) {
        assert_eq!(self.machine.handle(event, self.now, 1.0), actions);
    }

    fn state(&self) -> SetState {
        self.machine.observed(None).expect("observed").state
    }

    fn outcome(&self) -> Option<RollOutcome> {
        self.machine.observed(None).expect("observed").last_roll.expect("report").outcome
    }

    fn note(&self) -> Commitment {
        self.machine.note().expect("note")
    }
}

fn started(instance: &str, pid: u32) -> Result<Started, String> {
    Ok(Started { instance: instance.to_owned(), pid, exec_at_ns: 1 })
}

fn ended(version: &str, code: i32) -> SetEvent {
    SetEvent::Ended {
        instance: format!("hello.web.{version}"),
        exit: ExitStatus { code: Some(code), signal: None, error: None },
    }
}

#[test]
fn a_wanted_set_is_pulled_staged_and_cut_over() {
    let mut bench = Bench::new(None);
    bench.expect(SetEvent::Want(Some(set("1"))), &[SetAction::Pull(set("1"))]);
    assert_eq!(bench.state(), SetState::Absent);
    bench.expect(SetEvent::Pulled(Ok(content("1"))), &[SetAction::Stage(set("1"))]);
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::CutOver(set("1"))]);
    assert_eq!(bench.state(), SetState::Staged);
    bench.expect(SetEvent::CutOver(Ok(Box::new(deployment("1", Restart::Always)))), &[]);
    assert_eq!(bench.state(), SetState::Current);
    bench.expect(SetEvent::Want(Some(set("1"))), &[]);
}

#[test]
fn a_roll_keeps_the_old_set_until_the_new_one_is_staged() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("2"))), &[SetAction::Pull(set("2"))]);
    let observed = bench.machine.observed(None).expect("observed");
    assert_eq!((observed.digest, observed.state), (Digest::of(b"1"), SetState::Current));
    bench.expect(SetEvent::Pulled(Ok(content("2"))), &[SetAction::Stage(set("2"))]);
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::AskBusy]);
    bench.expect(SetEvent::Busy(None), &[SetAction::CutOver(set("2"))]);
    bench.expect(SetEvent::CutOver(Ok(Box::new(deployment("2", Restart::Always)))), &[]);
    assert_eq!(bench.machine.observed(None).expect("observed").digest, Digest::of(b"2"));
}

#[test]
fn a_failed_pull_waits_longer_each_time_and_says_why() {
    let mut bench = Bench::new(None);
    bench.expect(SetEvent::Want(Some(set("1"))), &[SetAction::Pull(set("1"))]);
    bench.expect(SetEvent::Pulled(Err("registry is down".to_owned())), &[]);
    assert_eq!(bench.machine.deadline(), Some(Duration::from_millis(500)));
    assert_eq!(bench.state(), SetState::Failed);
    assert!(bench.machine.waiting().expect("waiting").contains("registry is down"));
    bench.now = Duration::from_millis(499);
    bench.expect(SetEvent::Tick, &[]);
    bench.now = Duration::from_millis(500);
    bench.expect(SetEvent::Tick, &[SetAction::Pull(set("1"))]);
    bench.expect(SetEvent::Pulled(Err("registry is down".to_owned())), &[]);
    assert_eq!(bench.machine.deadline(), Some(Duration::from_millis(1500)));
}

#[test]
fn a_failed_roll_leaves_the_old_set_running_and_degraded() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("2"))), &[SetAction::Pull(set("2"))]);
    bench.expect(SetEvent::Pulled(Ok(content("2"))), &[SetAction::Stage(set("2"))]);
    bench.expect(SetEvent::Staged(Err("no /proc in the image".to_owned())), &[]);
    let observed = bench.machine.observed(None).expect("observed");
    assert_eq!((observed.digest, observed.state), (Digest::of(b"1"), SetState::Degraded));
    assert_eq!(observed.reason.as_deref(), Some("no /proc in the image"));
    bench.expect(SetEvent::Want(Some(set("1"))), &[]);
    assert_eq!(bench.state(), SetState::Current);
}

#[test]
fn a_failed_cut_over_comes_back_to_the_old_set() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("2"))), &[SetAction::Pull(set("2"))]);
    bench.expect(SetEvent::Pulled(Ok(content("2"))), &[SetAction::Stage(set("2"))]);
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::AskBusy]);
    bench.expect(SetEvent::Busy(None), &[SetAction::CutOver(set("2"))]);
    let running = Some(deployment("1", Restart::Always));
    let report = Some(report("2"));
    let failure = CutOverFailure { reason: "exec /x: not found".to_owned(), running, report };
    bench.expect(SetEvent::CutOver(Err(Box::new(failure))), &[]);
    assert_eq!(bench.state(), SetState::Degraded);
    assert_eq!(bench.outcome(), Some(RollOutcome::RolledBack));
    assert_eq!(bench.machine.deadline(), None, "not tried again by itself");
    assert!(bench.machine.waiting().expect("waiting").contains("stays on version 1"));
    // The very same asked for again by a new roll is tried again.
    let again = DesiredSet { roll: 1, ..set("2") };
    bench.expect(SetEvent::Want(Some(again.clone())), &[SetAction::Pull(again)]);
}

#[test]
fn a_change_of_mind_cancels_the_pull_and_discards_what_was_staged() {
    let mut bench = Bench::new(None);
    bench.expect(SetEvent::Want(Some(set("1"))), &[SetAction::Pull(set("1"))]);
    bench.expect(SetEvent::Want(Some(set("2"))), &[SetAction::CancelPull]);
    bench.expect(SetEvent::Want(Some(set("3"))), &[]);
    bench.expect(SetEvent::Pulled(Err("cancelled".to_owned())), &[SetAction::Pull(set("3"))]);
    bench.expect(SetEvent::Pulled(Ok(content("3"))), &[SetAction::Stage(set("3"))]);
    bench.expect(SetEvent::Want(Some(set("4"))), &[]);
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::Discard, SetAction::Pull(set("4"))]);
}

#[test]
fn what_is_no_longer_wanted_is_stopped_and_forgotten() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("1"))), &[]);
    bench.expect(SetEvent::Want(None), &[SetAction::Stop]);
    assert!(!bench.machine.is_spent());
    bench.expect(SetEvent::Stopped, &[]);
    assert!(bench.machine.is_spent());
}

#[test]
fn a_dead_container_is_started_again_with_a_growing_pause() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("1"))), &[]);
    bench.expect(ended("1", 3), &[]);
    assert_eq!(bench.state(), SetState::Degraded);
    assert_eq!(bench.machine.deadline(), Some(Duration::from_millis(10)));
    bench.now = Duration::from_millis(10);
    let web: Name = "web".parse().expect("name");
    bench.expect(SetEvent::Tick, &[SetAction::Restart { container: web.clone(), restarts: 1 }]);
    let result = started("hello.web.again", 9);
    bench.expect(SetEvent::Restarted { container: web.clone(), result }, &[]);
    assert_eq!(bench.state(), SetState::Current);
    let exit = ExitStatus { code: None, signal: Some(9), error: None };
    bench.expect(SetEvent::Ended { instance: "hello.web.again".to_owned(), exit }, &[]);
    assert_eq!(bench.machine.deadline(), Some(Duration::from_millis(30)));
    assert_eq!(bench.machine.observed(None).expect("observed").containers[0].restarts, 1);
}

#[test]
fn restart_policies_are_kept() {
    for (restart, code, again) in [
        (Restart::Always, 0, true),
        (Restart::OnFailure, 0, false),
        (Restart::OnFailure, 1, true),
        (Restart::Never, 1, false),
    ] {
        let mut bench = Bench::new(Some(deployment("1", restart)));
        bench.expect(SetEvent::Want(Some(set("1"))), &[]);
        bench.expect(ended("1", code), &[]);
        assert_eq!(bench.machine.deadline().is_some(), again, "{restart:?} {code}");
    }
}

#[test]
fn a_pivoted_set_is_not_replaced_and_says_so() {
    let mut pivoted = deployment("1", Restart::Always);
    pivoted.mode = Mode::Pivot;
    let mut bench = Bench::new(Some(pivoted));
    bench.expect(SetEvent::Want(Some(set("2"))), &[]);
    assert!(bench.machine.waiting().expect("waiting").contains("next reboot"));
    bench.expect(SetEvent::Want(None), &[]);
}

/// A bench at the moment at which version 2 is being cut over to, with version 1 running.
fn cutting_over() -> Bench {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("2"))), &[SetAction::Pull(set("2"))]);
    bench.expect(SetEvent::Pulled(Ok(content("2"))), &[SetAction::Stage(set("2"))]);
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::AskBusy]);
    bench.expect(SetEvent::Busy(None), &[SetAction::CutOver(set("2"))]);
    bench
}

#[test]
fn a_container_that_ends_before_its_cut_over_is_heard_of_is_started_again() {
    let mut bench = cutting_over();
    bench.expect(ended("2", 1), &[]);
    let why = "container web ended: exit code 1".to_owned();
    let runs = SetEvent::CutOver(Ok(Box::new(deployment("2", Restart::Always))));
    bench.expect(runs, &[SetAction::GoBack(why)]);
    assert_eq!(bench.note().digest, Digest::of(b"1"));
}

/// A bench on which version 2 has just been cut over to, in place of version 1.
#[test]
fn a_container_that_ends_before_its_restart_is_heard_of_is_started_again_and_its_exit_stays() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("1"))), &[]);
    bench.expect(ended("1", 3), &[]);
    bench.now = Duration::from_millis(10);
    let web: Name = "web".parse().expect("name");
    bench.expect(SetEvent::Tick, &[SetAction::Restart { container: web.clone(), restarts: 1 }]);
    // The old instance's end once more, from an earlier agent's watch: known.
    bench.expect(ended("1", 3), &[]);
    bench.expect(ended("again", 4), &[]);
    let result = started("hello.web.again", 9);
    bench.expect(SetEvent::Restarted { container: web.clone(), result }, &[]);
    assert_eq!(bench.machine.deadline(), Some(Duration::from_millis(30)));
    bench.now = Duration::from_millis(30);
    bench.expect(SetEvent::Tick, &[SetAction::Restart { container: web.clone(), restarts: 2 }]);
    let result = started("hello.web.third", 10);
    bench.expect(SetEvent::Restarted { container: web, result }, &[]);
    let observed = bench.machine.observed(None).expect("observed");
    assert_eq!(observed.state, SetState::Current);
    assert_eq!(observed.containers[0].exit.as_ref().and_then(|exit| exit.code), Some(4));
}

#[test]
fn the_same_content_under_another_name_is_renamed_and_not_touched() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("1"))), &[]);
    // By digest: known at once.
    let release = DesiredSet { version: "release".parse().expect("version"), ..set("1") };
    bench.expect(SetEvent::Want(Some(release.clone())), &[SetAction::Rename(release)]);
    assert_eq!(bench.machine.observed(None).expect("observed").version.as_str(), "release");
    // By tag: known after the pull.
    let latest = DesiredSet {
        name: "hello".parse().expect("name"),
        version: "latest".parse().expect("version"),
        reference: "http://r:1/hello:latest".parse().expect("reference"),
        roll: 0,
        force: false,
    };
    bench.expect(SetEvent::Want(Some(latest.clone())), &[SetAction::Pull(latest.clone())]);
    bench.expect(SetEvent::Pulled(Ok(content("1"))), &[SetAction::Rename(latest)]);
    assert_eq!(bench.state(), SetState::Current);
}

#[test]
fn a_restart_that_is_due_does_not_wake_the_loop_while_the_set_is_replaced() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("1"))), &[]);
    bench.expect(SetEvent::Want(Some(set("2"))), &[SetAction::Pull(set("2"))]);
    bench.expect(SetEvent::Pulled(Ok(content("2"))), &[SetAction::Stage(set("2"))]);
    bench.expect(ended("1", 1), &[]);
    assert!(bench.machine.deadline().is_some());
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::AskBusy]);
    bench.expect(SetEvent::Busy(None), &[SetAction::CutOver(set("2"))]);
    assert_eq!(bench.machine.deadline(), None);
}
