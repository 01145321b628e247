//! Garbage collection over the registry's requests, and by the command.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use protocol::ids::Digest;
use server::registry::collect_regularly;

use crate::harness::{Embedded, ask, begin, manifest, run, runtime};
use crate::program::Program;
use crate::{blob, delete, get, put, put_index};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Makes everything in the store look as if it had come two days ago.
fn age(dir: &Path) {
    for entry in fs::read_dir(dir).expect("list") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            age(&path);
        } else {
            let file = fs::File::options().append(true).open(&path).expect("open");
            file.set_modified(SystemTime::now() - 2 * DAY).expect("age");
        }
    }
}

fn collect(registry: &Embedded) -> (usize, u64) {
    collect_but(registry, &BTreeSet::new())
}

fn collect_but(registry: &Embedded, pinned: &BTreeSet<Digest>) -> (usize, u64) {
    let report = registry.store.collect(pinned, DAY, true).expect("dry run");
    let before = registry.blobs().len();
    assert!(report.dry_run);
    let again = registry.store.collect(pinned, DAY, false).expect("collect");
    assert_eq!(
        (&report.manifests, report.blobs, report.bytes),
        (&again.manifests, again.blobs, again.bytes)
    );
    assert_eq!(registry.blobs().len() as u64, before as u64 - again.blobs);
    assert_eq!(again.skipped, Vec::<String>::new());
    (again.manifests.len(), again.blobs)
}

/// An image with a config of its own; its digest.
fn image(registry: &Embedded, repository: &str, key: Option<&str>, name: &str) -> Digest {
    let config = blob(registry.address, repository, format!("{{\"x\":\"{name}\"}}").as_bytes());
    let text = manifest(&config);
    let digest = Digest::of(text.as_bytes());
    let key = key.map_or(digest.to_string(), str::to_owned);
    assert_eq!(put(registry.address, repository, &key, &text).status, 201);
    digest
}

fn has(registry: &Embedded, digest: &Digest) -> bool {
    get(registry.address, &format!("/v2/a/manifests/{digest}")).status == 200
}

#[test]
fn what_a_tag_reaches_stays_and_the_rest_goes() {
    let registry = Embedded::start();
    let tagged = image(&registry, "a", Some("1"), "tagged");
    let (in_index, loose) =
        (image(&registry, "a", None, "in"), image(&registry, "a", None, "loose"));
    let index = put_index(registry.address, "a", "set", &[in_index]);
    blob(registry.address, "a", b"of no manifest");
    age(registry.dir.path());
    // The loose one with its config, and the blob.
    assert_eq!(collect(&registry), (1, 3));
    for (digest, there) in [(tagged, true), (in_index, true), (index, true), (loose, false)] {
        assert_eq!(has(&registry, &digest), there, "{digest}");
    }
    assert_eq!(collect(&registry), (0, 0));
    assert_eq!(delete(registry.address, "/v2/a/manifests/set").status, 202);
    assert_eq!(collect(&registry), (2, 3), "the index, what was in it, its config");
    assert_eq!(delete(registry.address, "/v2/a/manifests/1").status, 202);
    assert_eq!(collect(&registry), (1, 2));
    assert_eq!(registry.store.repositories().expect("repositories"), Vec::<String>::new());
    assert_eq!(fs::read_dir(registry.dir.path().join("repositories")).expect("list").count(), 0);
    image(&registry, "a", Some("1"), "tagged");
}

#[test]
fn referrers_live_as_long_as_their_subject() {
    let registry = Embedded::start();
    let subject = image(&registry, "a", Some("1"), "subject");
    let config = blob(registry.address, "a", b"{}");
    let about = |subject: &Digest| {
        let mut text = manifest(&config);
        text.pop();
        let text = format!(
            r#"{text},"subject":{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{subject}","size":2}}}}"#
        );
        let digest = Digest::of(text.as_bytes());
        assert_eq!(put(registry.address, "a", &digest.to_string(), &text).status, 201);
        digest
    };
    let signature = about(&subject);
    let of_signature = about(&signature);
    let of_nothing = about(&Digest::of(b"nothing"));
    age(registry.dir.path());
    assert_eq!(collect(&registry), (1, 1));
    for (digest, there) in [(signature, true), (of_signature, true), (of_nothing, false)] {
        assert_eq!(has(&registry, &digest), there, "{digest}");
    }
    assert_eq!(delete(registry.address, "/v2/a/manifests/1").status, 202);
    assert_eq!(collect(&registry), (3, 5));
    assert_eq!(registry.blobs(), Vec::<String>::new());
}

#[test]
fn what_a_node_is_to_run_stays_without_a_tag() {
    let registry = Embedded::start();
    let old = image(&registry, "a", Some("1"), "old");
    image(&registry, "a", Some("1"), "new");
    age(registry.dir.path());
    assert_eq!(collect_but(&registry, &BTreeSet::from([old])), (0, 0));
    assert!(has(&registry, &old));
    assert_eq!(collect(&registry), (1, 2));
}

#[test]
fn what_is_fresh_stays_and_what_is_asked_for_is_fresh() {
    let registry = Embedded::start();
    let asked = blob(registry.address, "a", b"asked for");
    let loose = image(&registry, "a", None, "asked for, too");
    blob(registry.address, "a", b"forgotten");
    blob(registry.address, "only/blobs", b"forgotten here");
    age(registry.dir.path());
    // As a push does that finds that it need not send this, and whose manifest is still to come.
    let head = |path: &str| ask(registry.address, "HEAD", path, "", b"").status;
    assert_eq!(head(&format!("/v2/a/blobs/{asked}")), 200);
    assert_eq!(head(&format!("/v2/a/manifests/{loose}")), 200);
    let mount = format!("/v2/b/blobs/uploads/?mount={asked}&from=a");
    assert_eq!(ask(registry.address, "POST", &mount, "", b"").status, 201);
    let fresh = blob(registry.address, "a", b"fresh");
    let at = begin(&registry, "a");
    assert_eq!(ask(registry.address, "PATCH", &at, "", b"half").status, 202);
    assert_eq!(collect(&registry), (0, 2), "the forgotten ones");
    for (repository, digest) in [("a", asked), ("b", asked), ("a", fresh)] {
        assert_eq!(head(&format!("/v2/{repository}/blobs/{digest}")), 200);
    }
    assert!(has(&registry, &loose));
    assert_eq!(put(registry.address, "b", "1", &manifest(&asked)).status, 201);
    assert_eq!(get(registry.address, &at).status, 204);
}

#[test]
fn a_damaged_repository_is_left_alone_and_the_others_are_collected() {
    let registry = Embedded::start();
    let damaged = image(&registry, "a", Some("1"), "damaged");
    blob(registry.address, "a", b"of no manifest");
    blob(registry.address, "b", b"of no manifest either");
    let path = registry.dir.path().join("blobs/sha256").join(damaged.hex());
    fs::write(&path, b"damage").expect("damage");
    age(registry.dir.path());
    let report = registry.store.collect(&BTreeSet::new(), DAY, false).expect("collect");
    assert_eq!((report.skipped, report.blobs), (vec!["a".to_owned()], 1));
    assert_eq!(registry.blobs().len(), 3);
}

/// Makes a blob of a repository look old, unless it is just being collected.
fn age_blob(registry: &Embedded, repository: &str, digest: &Digest) {
    let dir = registry.dir.path();
    let link = dir.join("repositories").join(repository).join("_blobs").join(digest.hex());
    for path in [link, dir.join("blobs/sha256").join(digest.hex())] {
        if let Ok(file) = fs::File::options().append(true).open(path) {
            file.set_modified(SystemTime::now() - 2 * DAY).expect("age");
        }
    }
}

#[test]
fn a_push_that_was_told_that_a_blob_is_there_never_loses_it_to_a_collection() {
    let registry = Embedded::start();
    let resent = AtomicU64::new(0);
    let push = &|repository: &str| {
        let content = repository.repeat(100);
        let digest = Digest::of(content.as_bytes());
        let path = format!("/v2/{repository}/blobs/{digest}");
        for round in 0.. {
            // Long enough to see blobs go between two pushes.
            if round >= 60 && resent.load(Ordering::Relaxed) > 4 {
                break;
            }
            assert!(round < 20_000, "nothing is ever collected beside the pushes");
            age_blob(&registry, repository, &digest);
            if ask(registry.address, "HEAD", &path, "", b"").status != 200 {
                blob(registry.address, repository, content.as_bytes());
                resent.fetch_add(1, Ordering::Relaxed);
            }
            let text = manifest(&digest);
            let answer = put(registry.address, repository, "1", &text);
            assert_eq!(answer.status, 201, "round {round}");
            assert_eq!(get(registry.address, &path).body, content.as_bytes());
            let text = Digest::of(text.as_bytes());
            let path = format!("/v2/{repository}/manifests/{text}");
            assert_eq!(delete(registry.address, &path).status, 202);
        }
    };
    std::thread::scope(|scope| {
        let pushes = ["a", "b"].map(|repository| scope.spawn(move || push(repository)));
        while !pushes.iter().all(|push| push.is_finished()) {
            registry.store.collect(&BTreeSet::new(), DAY, false).expect("collect");
        }
    });
}

#[test]
fn the_server_collects_by_itself() {
    let registry = Embedded::start();
    blob(registry.address, "a", b"of no manifest");
    let (stop, stopping) = tokio::sync::watch::channel(false);
    let rounds = AtomicU64::new(0);
    let pinned = move || {
        // The second round begins when the first is done.
        if rounds.fetch_add(1, Ordering::Relaxed) == 1 {
            stop.send_replace(true);
        }
        BTreeSet::new()
    };
    let (every, grace) = (Duration::from_millis(1), Duration::ZERO);
    runtime().block_on(collect_regularly(registry.store.clone(), every, grace, pinned, stopping));
    assert_eq!(registry.blobs(), Vec::<String>::new());
}

#[test]
fn the_command_says_what_would_go_and_then_removes_it() {
    let dir = tempfile::tempdir().expect("dir");
    let program = Program::start(dir.path(), "");
    blob(program.address, "a", &[1; 2048]);
    let gc = |args: &[&str]| {
        let server = format!("http://{}", program.address);
        let mut command = Command::new(env!("CARGO_BIN_EXE_layercake"));
        run(command.args(["--server", &server, "imageset", "gc"]).args(args))
    };
    assert!(gc(&[]).starts_with("0 manifests and 0 blobs removed"), "it is fresh");
    let dry = gc(&["--dry-run", "--grace", "0"]);
    assert!(dry.starts_with("0 manifests and 1 blobs would be removed, 2"), "{dry}");
    let report: serde_json::Value =
        serde_json::from_str(&gc(&["--grace", "0", "--json"])).expect("JSON");
    assert_eq!((report["blobs"].as_u64(), report["bytes"].as_u64()), (Some(1), Some(2048)));
    assert!(gc(&["--grace", "0"]).starts_with("0 manifests and 0 blobs removed"));
}
