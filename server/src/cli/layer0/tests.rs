//! What is printed, and how a wait judges.

use serde_json::json;

use super::wait::{Verdict, judge};
use super::*;

fn node(layer0: serde_json::Value) -> NodeRecord {
    let digest = Digest::of(b"b");
    let mut observed: serde_json::Value =
        serde_json::from_str(include_str!("../../../../protocol/golden/v1/observed.json"))
            .expect("golden");
    observed["boot_id"] = json!("boot-2");
    observed["layer0"] = layer0;
    serde_json::from_value(json!({
        "id": "n1", "macs": [], "first_seen_ms": 1, "last_seen_ms": 2,
        "boot": [{"phase": "kexec", "at_ms": 1}, {"phase": "init", "at_ms": 2}],
        "desired": {"version": 7, "node": "n1", "imagesets": [],
                    "layer0": {"digest": digest, "how": "auto", "request": 7}},
        "observed": observed,
    }))
    .expect("record")
}

fn asked(boot_id: &str) -> Layer0Node {
    Layer0Node {
        node: "n1".parse().expect("id"),
        digest: Digest::of(b"b"),
        desired_version: 7,
        boot_id: Some(boot_id.to_owned()),
    }
}

#[test]
fn a_wait_ends_when_another_boot_runs_it_and_not_before() {
    let current = node(json!({"state": "current"}));
    let auto = Layer0How::Auto;
    assert_eq!(judge(&asked("boot-1"), auto, &current), Verdict::Done);
    // To boot the same again is not done while the first boot lasts.
    assert!(matches!(judge(&asked("boot-2"), auto, &current), Verdict::Pending(_)));
    assert_eq!(judge(&asked("boot-2"), Layer0How::Agent, &current), Verdict::Done);
    let stale = node(json!({"state": "stale", "reason": "fetching"}));
    assert_eq!(judge(&asked("boot-2"), auto, &stale), Verdict::Pending("fetching".to_owned()));
    assert_eq!(judge(&asked("boot-1"), auto, &stale), Verdict::Failed("fetching".to_owned()));
    let failed = node(json!({"state": "failed", "reason": "no kernel"}));
    assert_eq!(judge(&asked("boot-2"), auto, &failed), Verdict::Failed("no kernel".to_owned()));
    let mut early = current.clone();
    early.observed.as_mut().expect("observed").desired_version = 6;
    let waits = Verdict::Pending("waiting for its agent".to_owned());
    assert_eq!(judge(&asked("boot-1"), auto, &early), waits);
    let mut booting = current.clone();
    booting.boot.truncate(1);
    let boots = Verdict::Pending("booting (kexec)".to_owned());
    assert_eq!(judge(&asked("boot-1"), auto, &booting), boots);
    let mut other = current;
    other.desired.layer0.as_mut().expect("layer0").request = 8;
    assert!(matches!(judge(&asked("boot-1"), auto, &other), Verdict::Failed(_)));
}

#[test]
fn status_says_what_runs_what_is_wanted_and_why_these_differ() {
    let build: Layer0Record = serde_json::from_value(json!({
        "digest": Digest::of(b"d"), "version": "0.1.0", "kernel": "6.12", "flavour": "virt",
        "agent": "0.1.0", "agent_digest": Digest::of(b"x"), "agent_alone": true, "signed": false,
        "default": true, "bytes": 2048, "added_ms": 0,
    }))
    .expect("build");
    let asked = node(json!({"state": "stale", "reason": "no route", "version": "0.1.0"}));
    let mut plain = node(json!({"state": "current", "digest": Digest::of(b"a")}));
    plain.desired.layer0 = None;
    let builds = [build];
    let rows = [standing(&asked, &builds), standing(&plain, &builds)];
    let (a, b, d) = (Digest::of(b"a").short(), Digest::of(b"b").short(), Digest::of(b"d").short());
    let blank = " ".repeat(18);
    let expected = format!(
        "NODE  LAYER0{}  VERSION  AGENT  WANTED{}  STATE  REASON\n\
         n1    -{blank}  0.1.0    -      {b}  stale  no route\n\
         n1    {a}  -        -      {d}  stale  the default has changed since it booted\n",
        " ".repeat(13),
        " ".repeat(13),
    );
    assert_eq!(status_text(&rows), expected);
    let text = list_text(&builds, 5000);
    assert!(text.contains("default  0.1.0    6.12 (virt)") && text.contains("2.00 KiB"), "{text}");
    assert!(show_text(&builds[0], 5000).contains("signed   no"));
}
