//! What is answered for nodes at every step of their way, and in every trouble that they report.

use protocol::api::PhaseTime;
use protocol::ids::Digest;
use protocol::node::{
    ObservedClock, ObservedSet, PhaseMark, PowerRequest, PullProgress, RollOutcome, RollReport,
    SetState,
};

use super::*;

const NOW: u64 = 1_000_000_000;
const STARTED: u64 = NOW - 60_000;

/// A node that runs hello:2 as wanted, heard of 4 s ago, its kernel started a minute ago.
fn node() -> NodeRecord {
    let observed = include_str!("../../../protocol/golden/v1/observed.json");
    let desired = include_str!("../../../protocol/golden/v1/desired.json");
    let mut node = NodeRecord {
        id: "n1".parse().expect("id"),
        macs: vec!["52:54:00:00:00:01".parse().expect("mac")],
        uuid: None,
        address: None,
        first_seen_ms: 0,
        last_seen_ms: NOW - 4_000,
        boot: vec![PhaseTime { phase: Phase::Running, at_ms: STARTED + 2_950 }],
        desired: serde_json::from_str(desired).expect("desired"),
        observed: Some(serde_json::from_str(observed).expect("observed")),
    };
    (node.desired.power, node.desired.busy) = (None, None);
    node.desired.layer0 = None;
    node.observed.as_mut().expect("observed").layer0 = None;
    set(&mut node).last_roll = None;
    node
}

fn set(node: &mut NodeRecord) -> &mut ObservedSet {
    observed(node).imagesets.first_mut().expect("a set")
}

fn observed(node: &mut NodeRecord) -> &mut Observed {
    node.observed.as_mut().expect("observed")
}

/// The node still runs hello:1, and hello:2 is wanted.
fn behind(node: &mut NodeRecord, state: SetState, reason: &str) {
    let set = set(node);
    (set.version, set.digest) = ("1".parse().expect("version"), Digest::of(b"old"));
    (set.state, set.reason) = (state, Some(reason.to_owned()));
}

#[track_caller]
fn check(change: impl Fn(&mut NodeRecord), state: WhyState, expected: &[&str]) -> Why {
    let mut node = node();
    change(&mut node);
    let why = why(&node, NOW);
    let json = serde_json::to_string_pretty(&why).expect("render");
    assert_eq!(why.state, state, "{json}");
    for text in expected {
        assert!(json.contains(text), "`{text}` is not in {json}");
    }
    assert!(why.answer.starts_with("n1 "), "{json}");
    assert!(state == WhyState::AsWanted || !why.next.is_empty(), "nothing next: {json}");
    why
}

#[test]
fn a_node_that_is_as_wanted_says_so_and_nothing_else() {
    let why = check(|_| (), WhyState::AsWanted, &["n1 is as wanted: it runs hello:2", "4 s ago"]);
    assert_eq!((why.because.len(), why.next.len(), why.you_can.len()), (0, 0, 0), "{why:?}");
    check(
        |node| {
            node.desired.imagesets.clear();
            observed(node).imagesets.clear();
        },
        WhyState::AsWanted,
        &["nothing is wanted of it", "roll start n1"],
    );
}

#[test]
fn on_its_way_up_it_is_told_where_it_stands_and_when_it_is_late() {
    let at = |phase, since: u64| {
        move |node: &mut NodeRecord| {
            node.boot = vec![PhaseTime { phase, at_ms: NOW - since }];
        }
    };
    let fresh = |node: &mut NodeRecord| {
        node.boot.clear();
        node.observed = None;
        node.first_seen_ms = node.last_seen_ms;
    };
    check(fresh, WhyState::NeverSeen, &["52:54:00:00:00:01", "switch it on"]);
    let why = check(at(Phase::Dhcp, 5_000), WhyState::OnItsWay, &["boot script", "5 s ago"]);
    assert!(why.you_can.is_empty(), "{why:?}");
    check(at(Phase::Dhcp, 200_000), WhyState::Stuck, &["has not fetched its boot script", "TFTP"]);
    check(at(Phase::Ipxe, 200_000), WhyState::Stuck, &["layer0_dir"]);
    check(
        at(Phase::Kernel, 200_000),
        WhyState::Stuck,
        &["fetched 3 min ago and its agent has been silent since", "boot before it ran hello:2"],
    );
}

#[test]
fn a_silent_node_is_not_called_dead_and_one_that_was_switched_off_is_as_wanted() {
    let silent = |node: &mut NodeRecord| node.last_seen_ms = NOW - 600_000;
    check(silent, WhyState::Silent, &["nothing was heard of it for 10 min", "ping 10.9.0.101"]);
    let off = |node: &mut NodeRecord| {
        silent(node);
        let boot_id = observed(node).boot_id.clone();
        node.desired.power = Some(PowerRequest { action: PowerAction::Off, boot_id });
    };
    check(off, WhyState::AsWanted, &["asked to power off"]);
    let going = |node: &mut NodeRecord| {
        off(node);
        node.last_seen_ms = NOW;
    };
    check(going, WhyState::OnItsWay, &["asked to power off and still reports"]);
    let quiet = |node: &mut NodeRecord| node.last_seen_ms = NOW - 40_000;
    check(quiet, WhyState::AsWanted, &["nothing was heard of it for 40 s"]);
}

#[test]
fn a_failed_pull_says_why_what_runs_meanwhile_and_when_it_is_tried_again() {
    let failing = |node: &mut NodeRecord| {
        behind(node, SetState::Degraded, "GET http://r:5000/v2/ failed: Connection refused");
        // Its kernel started at STARTED; the phase was seen 50 ms after it was stamped.
        observed(node).timeline = vec![PhaseMark { phase: Phase::Running, uptime_ms: 2_900 }];
        let set = set(node);
        (set.attempts, set.retry_at_ms) = (Some(4), Some(72_000));
    };
    check(
        failing,
        WhyState::Waiting,
        &[
            "hello:2 does not run, hello:1 does: GET http://r:5000/v2/ failed: Connection refused",
            "tries again in 12 s (failed 4 times)",
            "hello:1 goes on running meanwhile",
            "see that the registry runs",
            "roll undo hello --node n1",
        ],
    );
    let first = |node: &mut NodeRecord| {
        failing(node);
        set(node).containers.clear();
        (set(node).state, set(node).retry_at_ms) = (SetState::Failed, None);
    };
    check(first, WhyState::Waiting, &["hello:2 does not run: GET", "trying again right now"]);
}

#[test]
fn pulls_busy_nodes_and_versions_that_went_back_have_their_own_answers() {
    let pulling = |node: &mut NodeRecord| {
        behind(node, SetState::Current, "pulling version 2");
        set(node).pull = Some(PullProgress { bytes: 25, total: 100, bytes_per_s: 5 });
    };
    check(pulling, WhyState::OnItsWay, &["it fetches hello:2, 25 % are there", "about 16 s"]);
    let held = |node: &mut NodeRecord| {
        behind(node, SetState::Current, "version 2 is staged and waits: node is busy: job 7");
        node.desired.busy = Some("job 7".to_owned());
    };
    check(held, WhyState::Waiting, &["the node is busy: job 7", "node busy n1 off", "--force"]);
    let back = |node: &mut NodeRecord| {
        behind(node, SetState::Degraded, "exit code 3");
        let to = node.desired.imagesets[0].reference.digest.expect("digest");
        set(node).last_roll = Some(RollReport {
            from: None,
            to,
            bytes: 0,
            staging_ms: 0,
            blackout_us: None,
            ready_us: None,
            outcome: Some(RollOutcome::RolledBack),
            reason: Some("container web ended: exit code 3".to_owned()),
        });
    };
    check(
        back,
        WhyState::Stuck,
        &[
            "hello:2 did not do well and was taken back, hello:1 runs",
            "exit code 3",
            "is not tried",
        ],
    );
}

#[test]
fn what_the_node_has_not_taken_up_or_waits_for_by_itself_is_told() {
    let unaware = |node: &mut NodeRecord| {
        observed(node).imagesets.clear();
        observed(node).desired_version = 6;
    };
    check(unaware, WhyState::OnItsWay, &["has not taken up hello:2", "version 6"]);
    let left = |node: &mut NodeRecord| node.desired.imagesets.clear();
    check(left, WhyState::OnItsWay, &["hello:2 is not wanted any more", "stops hello"]);
    let waits = |node: &mut NodeRecord| observed(node).waiting = Some("eth1: no\ncarrier".into());
    check(waits, WhyState::Waiting, &["it waits: eth1: no carrier"]);
    let again = |node: &mut NodeRecord| observed(node).agent_starts = 3;
    check(again, WhyState::AsWanted, &["started 3 times", "logs n1 --agent"]);
    let crashed = |node: &mut NodeRecord| {
        observed(node).last_crash = Some("Oops: 0002 [#1]".to_owned());
        let problem = Some("no time server answers: 10.9.0.2 (silent)".to_owned());
        observed(node).clock = Some(ObservedClock { problem, ..ObservedClock::default() });
    };
    check(crashed, WhyState::AsWanted, &["kernel crashed: Oops: 0002 [#1]", "10.9.0.2 (silent)"]);
}

#[test]
fn another_layer0_than_the_wanted_one_is_an_answer() {
    let other = |state, reason: &'static str| {
        move |node: &mut NodeRecord| {
            let digest = Digest::of(b"wanted");
            let wanted = serde_json::json!({ "digest": digest });
            node.desired.layer0 = Some(serde_json::from_value(wanted).expect("desired"));
            observed(node).layer0 = Some(protocol::node::ObservedLayer0 {
                digest: None,
                version: None,
                agent: None,
                kexec: false,
                state,
                reason: Some(reason.to_owned()),
            });
        }
    };
    check(
        other(Layer0State::Current, "x"),
        WhyState::AsWanted,
        &["runs hello:2", "Layer0 sha256:"],
    );
    check(other(Layer0State::Stale, "fetching it"), WhyState::OnItsWay, &["fetching it"]);
    check(
        other(Layer0State::Failed, "not signed"),
        WhyState::Stuck,
        &["stays on another Layer0: not signed"],
    );
}

#[test]
fn a_container_that_ails_is_named_with_its_log() {
    let dead = |node: &mut NodeRecord| {
        let set = set(node);
        set.state = SetState::Degraded;
        set.containers[0].health = Some(protocol::node::HealthState::Unhealthy);
        set.containers[0].reason = Some("status 500".to_owned());
    };
    let expected =
        ["hello:2 runs, but not well", "unhealthy, 1 restarts: status 500", "logs n1 hello/hello"];
    check(dead, WhyState::Waiting, &expected);
}

#[test]
fn times_are_one_figure() {
    for (seconds, text) in [(5, "5 s"), (200, "3 min"), (7300, "2 h"), (400_000, "4 d")] {
        assert_eq!(span(seconds * 1000), text);
    }
}
