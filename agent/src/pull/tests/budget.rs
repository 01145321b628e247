//! Tests: pulls into a store with little room.

use nix::sched::{CloneFlags, unshare};
use protocol::oci::unpacked::Unpacked;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use super::*;

/// Room in the store, in bytes.
const ROOM: usize = 8 << 20;

/// A node whose store lies on a tmpfs of [`ROOM`] bytes that only this test's thread and its children see.
fn small() -> Bench {
    unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .expect("private");
    let mut bench = Bench::new();
    let data = std::ffi::CString::new(format!("size={ROOM}")).expect("option");
    mount("tmpfs", bench.dir.path(), "tmpfs", MountFlags::empty(), Some(data.as_c_str()))
        .expect("tmpfs");
    let store = Store::open(&RunDirs::new(bench.dir.path())).expect("store");
    let (registries, retry) = (bench.puller.registries.clone(), bench.puller.retry);
    bench.puller = Puller::new(store, registries);
    bench.puller.retry = retry;
    bench
}

/// Says what each layer takes: its one file, and this much more.
fn said(file: usize, more: u64) -> impl Fn(&mut Descriptor) {
    move |layer| {
        let mut unpacked = Unpacked::default();
        unpacked.add(file as u64);
        unpacked.bytes += more;
        unpacked.annotate(layer);
    }
}

fn blob_requests(bench: &Bench, blob: &Blob) -> usize {
    bench.requests(blob).len()
}

#[test]
fn what_cannot_fit_is_refused_before_the_first_byte_of_a_blob() {
    let bench = small();
    let blob = gzip(&noise("f", 1000));
    let reference = bench.publish_changed(&[("app", vec![blob.clone()])], said(1000, 9 << 20));
    let error = bench.refused(&reference);
    assert!(
        error.contains("the pull needs 9.0 MiB unpacked (1.1 KiB to fetch in 1 blob), "),
        "{error}"
    );
    let place = bench.dir.path().join("layers");
    assert!(error.contains(&format!("MiB free of 8.0 MiB on {}, ", place.display())), "{error}");
    assert!(error.contains("of memory available"), "{error}");
    assert_eq!(blob_requests(&bench, &blob), 0);
    // By the estimate: three times its bytes.
    let large = gzip(&noise("g", 3 << 20));
    let error = bench.refused(&bench.publish(&[("app", vec![large.clone()])]));
    assert!(error.contains("the pull needs about 9.4 MiB unpacked (3.1 MiB"), "{error}");
    assert_eq!(blob_requests(&bench, &large), 0);
}

#[test]
fn what_nobody_needs_goes_first_and_what_is_held_stays() {
    let bench = small();
    let size = 3 << 20;
    let publish = |name: &str| {
        let blob = gzip(&noise(name, size));
        bench.publish_changed(&[("app", vec![blob])], said(size, 0))
    };
    let (one, two, three) = (publish("one"), publish("two"), publish("three"));
    drop(bench.pull(&one).expect("one"));
    let held = bench.pull(&two).expect("two");
    let third = bench.pull(&three).expect("three takes the place of one");
    assert_eq!(bench.layers(), 2);
    let digest = |reference: &Reference| reference.digest.expect("digest");
    assert!(bench.puller.reopen(&digest(&one)).is_none());
    assert!(bench.puller.reopen(&digest(&two)).is_some());
    let error = chain(&bench.pull(&one).expect_err("both are held"));
    assert!(error.contains("nothing is left there that could be removed"), "{error}");
    drop(held);
    bench.pull(&one).expect("one takes the place of two");
    drop(third);
}

#[test]
fn the_oldest_goes_first_and_no_more_than_must() {
    let bench = small();
    let size = 2 << 20;
    let sets: Vec<Reference> = ["a", "b", "c", "d"]
        .iter()
        .map(|name| {
            bench.publish_changed(&[("app", vec![gzip(&noise(name, size))])], said(size, 0))
        })
        .collect();
    for set in &sets {
        drop(bench.pull(set).expect("pull"));
    }
    let there: Vec<bool> = sets
        .iter()
        .map(|set| bench.puller.reopen(&set.digest.expect("digest")).is_some())
        .collect();
    assert_eq!(there, [false, true, true, true]);
}

#[test]
fn a_layer_that_takes_more_than_it_said_is_stopped() {
    let bench = small();
    let blob = gzip(&noise("f", 2 << 20));
    let reference = bench.publish_changed(&[("app", vec![blob])], said(1 << 20, 0));
    let error = bench.refused(&reference);
    assert!(error.contains("layer sha256:"), "{error}");
}

#[test]
fn a_layer_that_takes_more_than_was_free_is_stopped_and_leaves_the_store_usable() {
    let bench = small();
    // Compresses to nearly nothing: no estimate foresees it.
    let zeros = Tar::default().file("zeros", &vec![0; 2 * ROOM]).end();
    let error = bench.refused(&bench.publish(&[("app", vec![gzip(&zeros)])]));
    assert!(error.contains("more than was free when the pull began"), "{error}");
    bench.pull(&bench.publish(&[("app", vec![gzip(&noise("f", 1 << 20))])])).expect("the next one");
}
