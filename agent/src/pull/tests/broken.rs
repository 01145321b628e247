//! Connections that break and bytes that are damaged on the way.

use super::*;

#[test]
fn a_broken_connection_is_resumed_where_it_broke() {
    let bench = Bench::new();
    let blob = gzip(&noise("f", 600_000));
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    bench.fault(&blob, &[Fault::Cut(300_000), Fault::Stall(100_000), Fault::Status(503)]);
    bench.pull(&reference).expect("pull");
    let ranges = bench.requests(&blob);
    let expected = [None, Some("bytes=300000-"), Some("bytes=400000-"), Some("bytes=400000-")];
    assert_eq!(ranges, expected.map(|range| range.map(str::to_owned)));
    let received = bench.progress.bytes.load(Ordering::Relaxed);
    assert_eq!(received, blob.bytes.len() as u64);
}

#[test]
fn a_registry_without_ranges_is_read_over_again() {
    let bench = Bench::new();
    let blob = zstd_layer(&noise("f", 300_000), 3, None);
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    bench.fake.change(&Bench::blob_path(&blob), |answer| answer.ranges = false);
    bench.fault(&blob, &[Fault::Cut(200_000), Fault::Cut(250_000)]);
    bench.pull(&reference).expect("pull");
    assert_eq!(bench.requests(&blob).len(), 3);
}

#[test]
fn a_blob_that_never_comes_fails_with_its_place() {
    let bench = Bench::new();
    let blob = gzip(&noise("f", 100_000));
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    bench.fault(&blob, &[Fault::Cut(60_000), Fault::Cut(0), Fault::Cut(0), Fault::Cut(0)]);
    let error = bench.refused(&reference);
    let place =
        format!("{}: broke off at byte 60000 of {}", Bench::blob_path(&blob), blob.bytes.len());
    assert!(error.contains(&place), "{error}");
    assert_eq!(bench.requests(&blob).len(), 3);
}

#[test]
fn a_damaged_blob_is_fetched_again_and_named_if_it_stays_damaged() {
    let bench = Bench::new();
    let blob = gzip(&noise("f", 100_000));
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    // The first byte breaks gzip's header, a middle one the stream, the last the checksum: all are digest errors.
    bench.fault(&blob, &[Fault::Corrupt(0), Fault::Corrupt(50_000)]);
    bench.pull(&reference).expect("third time");
    assert_eq!(bench.requests(&blob).len(), 3);
    assert_eq!(bench.progress.bytes.load(Ordering::Relaxed), blob.bytes.len() as u64);

    let bench = Bench::new();
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    bench.fault(
        &blob,
        &[Fault::Corrupt(0), Fault::Corrupt(50_000), Fault::Corrupt(blob.bytes.len() - 1)],
    );
    let error = bench.refused(&reference);
    let expected = format!("expected {}", Digest::of(&blob.bytes));
    assert!(error.contains(&expected) && error.contains(&Bench::blob_path(&blob)), "{error}");
    assert_eq!(bench.requests(&blob).len(), 3, "at most three tries");
}

#[test]
fn every_single_damaged_byte_of_a_small_layer_is_found() {
    let bench = Bench::new();
    let blob = gzip(&noise("f", 100));
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    for at in 0..blob.bytes.len() {
        bench.fault(&blob, &[Fault::Corrupt(at); 3]);
        let error = bench.refused(&reference);
        assert!(error.contains("the blob's digest is"), "byte {at}: {error}");
    }
}
