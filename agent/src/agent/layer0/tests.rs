//! The machine alone: what it asks for when, and that no boot ends that nobody named.

use super::*;

const NOW: Duration = Duration::from_secs(100);

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn running() -> Running {
    Running {
        digest: Some(digest("a")),
        version: Some("1".to_owned()),
        agent: Some(digest("agent a")),
        boot_id: "boot-1".to_owned(),
        kexec: false,
    }
}

fn wanted(how: Layer0How) -> DesiredLayer0 {
    DesiredLayer0 {
        digest: digest("b"),
        how,
        boot_id: Some("boot-1".to_owned()),
        request: 7,
        agent: (how == Layer0How::Agent).then(|| digest("agent b")),
        force: false,
        archives: Vec::new(),
    }
}

fn machine() -> Machine {
    Machine::new(running(), None)
}

fn staged(machine: &mut Machine, way: Way) -> Vec<Action> {
    machine.handle(Layer0Event::Staged(machine.staging, Ok(way)), NOW)
}

fn failed(machine: &mut Machine, why: &str, last: bool) -> Vec<Action> {
    let failure = Failure { why: why.to_owned(), last };
    machine.handle(Layer0Event::Staged(machine.staging, Err(failure)), NOW)
}

fn free(machine: &mut Machine) -> Vec<Action> {
    machine.handle(Layer0Event::Busy(None), NOW)
}

#[track_caller]
fn stands(machine: &Machine, state: Layer0State, reason: &str) {
    let observed = machine.observed();
    let found = observed.reason.unwrap_or_default();
    assert_eq!(observed.state, state, "{found}");
    assert!(found.contains(reason) && reason.is_empty() == found.is_empty(), "{found}");
}

#[test]
fn a_kexec_is_staged_then_the_node_is_asked_then_it_goes() {
    let mut it = machine();
    let wish = wanted(Layer0How::Auto);
    assert_eq!(it.want(Some(wish.clone())), [Action::Stage(1, wish.clone())]);
    assert!(it.want(Some(wish)).is_empty(), "the same again is no news");
    it.handle(Layer0Event::Progress(1, "fetching vmlinuz, 5 kB".to_owned()), NOW);
    stands(&it, Layer0State::Stale, "fetching vmlinuz");
    assert_eq!(staged(&mut it, Way::Kexec), [Action::AskBusy]);
    assert_eq!(free(&mut it), [Action::Go(Way::Kexec, None)]);
    stands(&it, Layer0State::Stale, "kexec into sha256:");
    assert!(it.waiting().is_some_and(|text| text.starts_with("layer0: kexec")));
}

#[test]
fn a_busy_node_stages_waits_and_is_asked_again() {
    let mut it = machine();
    it.want(Some(wanted(Layer0How::Kexec)));
    staged(&mut it, Way::Kexec);
    assert!(it.handle(Layer0Event::Busy(Some("job 1".to_owned())), NOW).is_empty());
    stands(&it, Layer0State::Stale, "ready for kexec; the node is busy: job 1");
    assert!(it.tick(NOW).is_empty());
    let due = it.deadline().expect("asks again");
    assert_eq!(it.tick(due), [Action::AskBusy]);
    it.handle(Layer0Event::Busy(Some("job 2".to_owned())), due);
    assert_eq!(it.ask_again(), [Action::AskBusy], "the operator says something else now");
    assert_eq!(free(&mut it), [Action::Go(Way::Kexec, None)]);
}

#[test]
fn who_forces_it_is_not_asked_whether_the_node_is_busy() {
    let mut it = machine();
    it.want(Some(DesiredLayer0 { force: true, ..wanted(Layer0How::Kexec) }));
    assert_eq!(staged(&mut it, Way::Kexec), [Action::Go(Way::Kexec, None)]);
}

#[test]
fn a_boot_that_is_not_named_is_never_ended() {
    for boot_id in [None, Some("boot-0".to_owned())] {
        for how in [Layer0How::Auto, Layer0How::Kexec, Layer0How::Reboot] {
            let mut it = machine();
            let wish = DesiredLayer0 { boot_id: boot_id.clone(), ..wanted(how) };
            assert!(it.want(Some(wish.clone())).is_empty());
            stands(&it, Layer0State::Stale, "this boot began with sha256:");
            assert!(it.waiting().is_none(), "there is nothing to wait for");
            let same = DesiredLayer0 { digest: digest("a"), ..wish };
            assert!(it.want(Some(same)).is_empty());
            stands(&it, Layer0State::Current, "");
        }
    }
}

#[test]
fn the_same_again_ends_the_boot_that_is_named() {
    let mut it = machine();
    let again = DesiredLayer0 { digest: digest("a"), ..wanted(Layer0How::Kexec) };
    assert_eq!(it.want(Some(again.clone())), [Action::Stage(1, again)]);
}

#[test]
fn what_pid_1_refuses_becomes_a_reboot_only_where_that_was_left_open() {
    for (how, expected) in [
        (Layer0How::Auto, vec![Action::Go(Way::Reboot(Some("no".to_owned())), None)]),
        (Layer0How::Kexec, vec![]),
    ] {
        let mut it = machine();
        it.want(Some(wanted(how)));
        staged(&mut it, Way::Kexec);
        free(&mut it);
        assert_eq!(it.handle(Layer0Event::Refused("no".to_owned()), NOW), expected);
        let state = if expected.is_empty() { Layer0State::Failed } else { Layer0State::Stale };
        stands(&it, state, "no");
        // Even the reboot.
        assert!(it.handle(Layer0Event::Refused("never".to_owned()), NOW).is_empty());
        stands(&it, Layer0State::Failed, if expected.is_empty() { "no" } else { "never" });
    }
}

#[test]
fn a_failure_is_tried_again_later_and_later_but_a_final_one_only_when_asked() {
    let mut it = machine();
    it.want(Some(wanted(Layer0How::Kexec)));
    let mut pauses = Vec::new();
    for number in 2..10 {
        assert!(failed(&mut it, "no route", false).is_empty());
        stands(&it, Layer0State::Stale, "no route; it is tried again");
        let due = it.deadline().expect("tried again");
        pauses.push((due - NOW).as_secs());
        assert_eq!(it.tick(due), [Action::Stage(number, wanted(Layer0How::Kexec))]);
    }
    assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300]);
    assert!(failed(&mut it, "no kernel", true).is_empty());
    stands(&it, Layer0State::Failed, "no kernel");
    assert_eq!(it.deadline(), None);
    let asked_again = DesiredLayer0 { request: 8, ..wanted(Layer0How::Kexec) };
    assert_eq!(it.want(Some(asked_again.clone())), [Action::Stage(10, asked_again)]);
}

#[test]
fn what_is_loaded_and_wanted_no_more_is_dropped() {
    let mut it = machine();
    it.want(Some(wanted(Layer0How::Kexec)));
    staged(&mut it, Way::Kexec);
    assert_eq!(it.want(None), [Action::Drop]);
    stands(&it, Layer0State::Current, "");
    // Loaded only after nobody wanted it any more.
    it.want(Some(wanted(Layer0How::Kexec)));
    let old = it.staging;
    it.want(None);
    let late = it.handle(Layer0Event::Staged(old, Ok(Way::Kexec)), NOW);
    assert_eq!(late, [Action::Drop]);
}

#[test]
fn a_reboot_needs_no_staging() {
    let mut it = machine();
    assert_eq!(it.want(Some(wanted(Layer0How::Reboot))), [Action::AskBusy]);
    assert_eq!(free(&mut it), [Action::Go(Way::Reboot(None), None)]);
}

#[test]
fn an_agent_is_replaced_without_asking_in_any_boot_and_once_a_request() {
    let wish = DesiredLayer0 { boot_id: None, ..wanted(Layer0How::Agent) };
    let mut it = machine();
    assert_eq!(it.want(Some(wish.clone())), [Action::Stage(1, wish.clone())]);
    let path = Way::Agent("/run/b".into());
    let actions = staged(&mut it, path.clone());
    let tried = Tried { agent: digest("agent b"), request: 7 };
    assert_eq!(actions, [Action::Go(path, Some(tried.clone()))]);
    // It stayed up: the agent that reads the notes is the one that was wanted.
    let new = Running { agent: Some(digest("agent b")), ..running() };
    let mut good = Machine::new(new, Some(tried.clone()));
    assert!(good.want(Some(wish.clone())).is_empty());
    stands(&good, Layer0State::Current, "");
    // It did not: the one before reads them.
    let mut bad = Machine::new(running(), Some(tried));
    assert!(bad.want(Some(wish.clone())).is_empty());
    stands(&bad, Layer0State::Failed, "did not stay up");
    assert!(bad.waiting().is_some() && good.waiting().is_none());
    let again = DesiredLayer0 { request: 8, ..wish };
    assert_eq!(bad.want(Some(again.clone())), [Action::Stage(1, again)]);
}

#[test]
fn a_request_that_comes_while_pid_1_is_asked_counts_when_that_refuses() {
    let mut it = machine();
    it.want(Some(wanted(Layer0How::Kexec)));
    staged(&mut it, Way::Kexec);
    free(&mut it);
    let other = DesiredLayer0 { digest: digest("c"), request: 8, ..wanted(Layer0How::Kexec) };
    assert!(it.want(Some(other.clone())).is_empty());
    let actions = it.handle(Layer0Event::Refused("no".to_owned()), NOW);
    assert_eq!(actions, [Action::Stage(2, other)]);
}

mod any_order {
    use proptest::prelude::*;

    use super::*;

    fn event() -> impl Strategy<Value = u8> {
        0_u8..12
    }

    proptest! {
        /// Whatever happens: PID 1 is asked only for what is wanted, a boot ends only if it is named, a busy node is not disturbed.
        #[test]
        fn nothing_goes_that_may_not(events in proptest::collection::vec(event(), 0..60)) {
            let mut it = machine();
            let (mut now, mut named, mut asked_busy) = (NOW, false, false);
            for event in events {
                now += Duration::from_secs(7);
                let number = it.staging;
                let actions = match event {
                    0..=3 => {
                        let hows = [Layer0How::Auto, Layer0How::Kexec, Layer0How::Reboot, Layer0How::Agent];
                        let wish = wanted(hows[usize::from(event)]);
                        named = true;
                        it.want(Some(DesiredLayer0 { request: now.as_secs(), ..wish }))
                    }
                    4 => {
                        named = false;
                        it.want(Some(DesiredLayer0 { boot_id: None, ..wanted(Layer0How::Auto) }))
                    }
                    5 => { named = false; it.want(None) }
                    6 => it.handle(Layer0Event::Staged(number, Ok(Way::Kexec)), now),
                    7 => it.handle(Layer0Event::Staged(number, Err(Failure { why: "x".to_owned(), last: false })), now),
                    8 => it.handle(Layer0Event::Busy(None), now),
                    9 => it.handle(Layer0Event::Busy(Some("y".to_owned())), now),
                    10 => it.handle(Layer0Event::Refused("z".to_owned()), now),
                    _ => it.tick(now),
                };
                for action in actions {
                    if let Action::Go(Way::Kexec | Way::Reboot(_), _) = action {
                        prop_assert!(named, "nobody named this boot");
                        prop_assert!(asked_busy || event == 10, "nobody asked whether it is busy");
                        asked_busy = false;
                    } else if action == Action::AskBusy {
                        asked_busy = true;
                    }
                }
            }
        }
    }
}
