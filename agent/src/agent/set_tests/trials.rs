//! A set on trial after its cut-over: committed, gone back from, undone, held back by a busy node.

use super::*;

fn watching(readiness: Readiness) -> Bench {
    let mut bench = cutting_over();
    let mut new = deployment("2", Restart::Always);
    new.containers[0].readiness = readiness;
    new.containers[0].replaced_at_ns = Some(1_000_000);
    bench.expect(SetEvent::CutOver(Ok(Box::new(new))), &[]);
    bench
}

fn word(word: Word, at_ns: u64) -> SetEvent {
    SetEvent::Word { instance: "hello.web.2".to_owned(), word, at_ns }
}

const HEALTH: &str = r#"{"health":{"tcp":"127.0.0.1:1","start_period_ms":1000,"retries":2}}"#;

#[test]
fn a_set_that_stays_well_for_its_window_is_committed_and_the_old_one_stays_kept() {
    let mut bench = watching(readiness("{}").begun(4_000_000));
    assert_eq!((bench.state(), bench.outcome()), (SetState::Current, Some(RollOutcome::Watching)));
    let note = bench.note();
    assert_eq!((note.digest, note.trial.is_some()), (Digest::of(b"2"), true));
    assert_eq!(note.kept.expect("kept").digest, Digest::of(b"1"));
    let observed = bench.machine.observed(None).expect("observed");
    assert_eq!(observed.last_roll.expect("report").ready_us, Some(3000));
    assert_eq!(bench.machine.deadline(), Some(WINDOW));
    bench.now = WINDOW;
    bench.expect(SetEvent::Tick, &[]);
    assert_eq!((bench.outcome(), bench.machine.deadline()), (Some(RollOutcome::Committed), None));
    let observed = bench.machine.observed(None).expect("observed");
    assert_eq!(observed.previous.expect("previous").version.as_str(), "1");
    assert_eq!(bench.note().trial, None);
}

#[test]
fn a_set_on_trial_that_fails_is_gone_back_from_and_not_tried_again() {
    let never = r#"{"notify":true}"#;
    let table: [(&str, Vec<SetEvent>, u64, &str); 5] = [
        ("{}", vec![ended("2", 3)], 1, "container web ended: exit code 3"),
        ("{}", vec![ended("2", 0)], 1, "container web ended: exit code 0"),
        (
            HEALTH,
            vec![word(Word::Healthy, 9), word(Word::Unhealthy("500".to_owned()), 10)],
            9,
            "container web is unhealthy: 500",
        ),
        (HEALTH, vec![], 11, "container web is not ready after 10 s"),
        (never, vec![], 96, "container web is not ready after 95 s"),
    ];
    for (container, events, at, why) in table {
        let mut bench = watching(readiness(container).begun(4_000_000));
        bench.now = Duration::from_secs(at);
        let mut actions = Vec::new();
        for event in events.into_iter().chain([SetEvent::Tick]) {
            actions.extend(bench.machine.handle(event, bench.now, 1.0));
        }
        assert_eq!(actions, [SetAction::GoBack(why.to_owned())], "{container}");
        let note = bench.note();
        assert_eq!(
            (note.digest, note.kept),
            (Digest::of(b"1"), None),
            "before the new one is stopped"
        );
        assert_eq!(note.refused.expect("refused").set, set("2"));
        let running = Some(deployment("1", Restart::Always));
        let failure = CutOverFailure { reason: why.to_owned(), running, report: None };
        bench.expect(SetEvent::CutOver(Err(Box::new(failure))), &[]);
        let observed = bench.machine.observed(None).expect("observed");
        assert_eq!((observed.digest, observed.state), (Digest::of(b"1"), SetState::Degraded));
        let report = observed.last_roll.expect("report");
        assert_eq!((report.to, report.outcome), (Digest::of(b"2"), Some(RollOutcome::RolledBack)));
        assert_eq!(report.reason.as_deref(), Some(why));
        assert_eq!(bench.machine.deadline(), None);
        // Nor by a new agent.
        let note = bench.note();
        let adopted = SetMachine::adopted(deployment("1", Restart::Always), None, &note, bench.now);
        bench.machine = adopted;
        bench.expect(SetEvent::Want(Some(set("2"))), &[]);
        assert_eq!(bench.state(), SetState::Degraded);
    }
}

#[test]
fn a_container_that_is_asked_is_watched_from_the_moment_it_is_well() {
    let mut bench = watching(readiness(HEALTH).begun(4_000_000));
    assert_eq!(bench.state(), SetState::Staged);
    assert!(bench.machine.waiting().expect("waiting").contains("web is not ready yet"));
    bench.now = Duration::from_secs(2);
    bench.expect(word(Word::Healthy, 51_000_000), &[]);
    assert_eq!(bench.state(), SetState::Current);
    assert_eq!(bench.machine.deadline(), Some(bench.now + WINDOW));
    let observed = bench.machine.observed(None).expect("observed");
    assert_eq!(observed.last_roll.expect("report").ready_us, Some(50_000));
}

#[test]
fn a_first_start_has_nothing_to_go_back_to_and_is_started_again() {
    let mut bench = Bench::new(None);
    bench.expect(SetEvent::Want(Some(set("1"))), &[SetAction::Pull(set("1"))]);
    bench.expect(SetEvent::Pulled(Ok(content("1"))), &[SetAction::Stage(set("1"))]);
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::CutOver(set("1"))]);
    bench.expect(SetEvent::CutOver(Ok(Box::new(deployment("1", Restart::Always)))), &[]);
    bench.expect(ended("1", 1), &[]);
    assert_eq!(bench.state(), SetState::Degraded);
    bench.now = Duration::from_secs(1);
    let web: Name = "web".parse().expect("name");
    bench.expect(SetEvent::Tick, &[SetAction::Restart { container: web.clone(), restarts: 1 }]);
    let result = started("again", 9);
    bench.expect(SetEvent::Restarted { container: web, result }, &[]);
    assert_eq!(bench.machine.deadline(), Some(bench.now + WINDOW), "watched anew");
}

#[test]
fn an_undo_takes_the_kept_set_without_a_pull_and_is_final() {
    let mut bench = watching(readiness("{}").begun(1));
    bench.now = WINDOW;
    bench.expect(SetEvent::Tick, &[]);
    let back = DesiredSet { roll: 3, ..set("1") };
    bench.expect(SetEvent::Want(Some(back.clone())), &[SetAction::StageKept(back.clone())]);
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::AskBusy]);
    bench.expect(SetEvent::Busy(None), &[SetAction::CutOver(back.clone())]);
    let mut old = deployment("1", Restart::Always);
    old.set = back;
    bench.expect(SetEvent::CutOver(Ok(Box::new(old))), &[]);
    assert_eq!((bench.outcome(), bench.machine.deadline()), (Some(RollOutcome::Undone), None));
    let previous = bench.machine.observed(None).expect("observed").previous;
    assert_eq!(previous.expect("previous").version.as_str(), "2");
}

#[test]
fn a_kept_set_that_cannot_be_staged_is_pulled_again() {
    let mut bench = watching(readiness("{}").begun(1));
    bench.expect(SetEvent::Want(Some(set("1"))), &[SetAction::StageKept(set("1"))]);
    let gone = SetEvent::Staged(Err("the mount is gone".to_owned()));
    bench.expect(gone, &[SetAction::DropKept]);
    bench.now = Duration::from_secs(1);
    bench.expect(SetEvent::Tick, &[SetAction::Pull(set("1"))]);
}

#[test]
fn the_kept_set_makes_room_for_the_next_roll_and_for_memory_but_never_during_a_trial() {
    let mut bench = watching(readiness("{}").begun(1));
    bench.expect(SetEvent::Pressure, &[]);
    bench.now = WINDOW;
    bench.expect(SetEvent::Tick, &[]);
    bench.expect(SetEvent::Want(Some(set("3"))), &[SetAction::Pull(set("3"))]);
    let staged = [SetAction::DropKept, SetAction::Stage(set("3"))];
    bench.expect(SetEvent::Pulled(Ok(content("3"))), &staged);
    let mut bench = watching(readiness("{}").begun(1));
    bench.now = WINDOW;
    bench.expect(SetEvent::Tick, &[]);
    bench.expect(SetEvent::Pressure, &[SetAction::DropKept]);
    assert_eq!(bench.note().kept, None);
}

#[test]
fn a_busy_node_stages_and_waits_until_it_is_free() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    bench.expect(SetEvent::Want(Some(set("2"))), &[SetAction::Pull(set("2"))]);
    bench.expect(SetEvent::Pulled(Ok(content("2"))), &[SetAction::Stage(set("2"))]);
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::AskBusy]);
    bench.expect(SetEvent::Busy(Some("job 123".to_owned())), &[]);
    assert_eq!(bench.machine.waiting().as_deref(), Some("node is busy: job 123"));
    assert_eq!(bench.state(), SetState::Current);
    bench.now = BUSY_PACE;
    bench.expect(SetEvent::Tick, &[SetAction::AskBusy]);
    bench.expect(SetEvent::Busy(Some("job 123".to_owned())), &[]);
    bench.expect(SetEvent::BusyChanged, &[SetAction::AskBusy]);
    bench.expect(SetEvent::Busy(None), &[SetAction::CutOver(set("2"))]);
}

#[test]
fn a_forced_roll_does_not_ask_whether_the_node_is_busy() {
    let mut bench = Bench::new(Some(deployment("1", Restart::Always)));
    let forced = DesiredSet { force: true, ..set("2") };
    bench.expect(SetEvent::Want(Some(forced.clone())), &[SetAction::Pull(forced.clone())]);
    bench.expect(SetEvent::Pulled(Ok(content("2"))), &[SetAction::Stage(forced.clone())]);
    bench.expect(SetEvent::Staged(Ok(())), &[SetAction::CutOver(forced)]);
}

#[test]
fn an_unhealthy_container_is_started_again_by_its_policy() {
    for (restart, again) in
        [(Restart::Always, true), (Restart::OnFailure, true), (Restart::Never, false)]
    {
        let mut running = deployment("2", restart);
        running.containers[0].readiness = readiness(HEALTH).begun(1);
        let mut bench = Bench::new(Some(running));
        bench.expect(SetEvent::Want(Some(set("2"))), &[]);
        bench.expect(word(Word::Healthy, 5), &[]);
        bench.expect(word(Word::Unhealthy("timeout".to_owned()), 6), &[]);
        assert_eq!(bench.state(), SetState::Degraded);
        let reason = bench.machine.observed(None).expect("observed").reason;
        assert_eq!(reason.as_deref(), Some("container web is unhealthy: timeout"));
        assert_eq!(bench.machine.deadline().is_some(), again, "{restart:?}");
    }
}

#[test]
fn a_trial_goes_on_in_a_new_agent_with_the_time_that_is_left() {
    let bench = watching(readiness("{}").begun(1));
    let note = bench.note();
    let kept = note.kept.clone();
    let now = Duration::from_secs(4);
    let mut machine = SetMachine::adopted(deployment("2", Restart::Always), kept, &note, now);
    assert_eq!(machine.handle(SetEvent::Want(Some(set("2"))), now, 1.0), []);
    assert_eq!(machine.deadline(), Some(WINDOW));
    let actions = machine.handle(ended("2", 1), now, 1.0);
    assert_eq!(actions, [SetAction::GoBack("container web ended: exit code 1".to_owned())]);
}
