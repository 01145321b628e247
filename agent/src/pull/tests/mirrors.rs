//! Tests: mirrors come first, and none of them can do more than cost time.

use protocol::registries::RegistryEntry;

use super::*;

/// A registry, a set in it, and mirrors of it that this node knows.
struct Mirrored {
    bench: Bench,
    blob: Blob,
    reference: Reference,
    mirrors: Vec<Fake>,
}

fn mirrored(count: usize) -> Mirrored {
    let bench = Bench::new();
    let blob = gzip(&noise("f", 300_000));
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    let mirrors: Vec<Fake> = (0..count).map(|_| bench.fake.mirror()).collect();
    let urls = mirrors.iter().map(Fake::url).collect();
    let host = bench.fake.host();
    let entry = RegistryEntry { host, mirrors: urls, ..RegistryEntry::default() };
    assert_eq!(bench.puller.registries.set_desired(&[entry]), Vec::<String>::new());
    Mirrored { bench, blob, reference, mirrors }
}

impl Mirrored {
    #[track_caller]
    fn pulls(&self) {
        let pulled = self.bench.pull(&self.reference).expect("pull");
        assert_eq!(pulled.bytes, self.blob.bytes.len() as u64);
        let received = self.bench.progress.bytes.load(Ordering::Relaxed);
        assert_eq!(received, self.blob.bytes.len() as u64);
    }

    fn ranges(&self, mirror: usize) -> Vec<Option<String>> {
        let requests = self.mirrors[mirror].requests(&Bench::blob_path(&self.blob));
        requests.into_iter().map(|(_, range)| range).collect()
    }

    fn fault(&self, mirror: usize, fault: Fault) {
        let path = Bench::blob_path(&self.blob);
        self.mirrors[mirror].change(&path, |answer| answer.faults.push_back(fault));
    }
}

#[test]
fn a_whole_set_comes_from_the_first_mirror() {
    let it = mirrored(2);
    it.pulls();
    assert_eq!(it.bench.fake.requests(""), []);
    assert_eq!(it.mirrors[1].requests(""), []);
}

#[test]
fn the_registry_itself_need_not_be_there() {
    let it = mirrored(1);
    it.bench.fake.change_all("", |answer| answer.status = 503);
    it.pulls();
    assert_eq!(it.bench.fake.requests(""), []);
}

#[test]
fn a_mirror_that_stalls_or_breaks_is_left_where_it_did_and_for_all_that_follows() {
    for fault in [Fault::Stall(100_000), Fault::Cut(100_000)] {
        let it = mirrored(2);
        it.fault(0, fault);
        it.pulls();
        assert_eq!(it.ranges(0), [None]);
        assert_eq!(it.ranges(1), [Some("bytes=100000-".to_owned())]);
        assert_eq!(it.bench.fake.requests(""), []);
    }
}

#[test]
fn a_mirror_that_lacks_a_blob_is_passed_over_and_asked_for_others() {
    let it = mirrored(1);
    it.mirrors[0].change(&Bench::blob_path(&it.blob), |answer| answer.status = 404);
    it.pulls();
    assert_eq!(it.bench.requests(&it.blob), [None]);
    assert_eq!(it.bench.fake.requests("").len(), 1, "all else came from the mirror");
}

#[test]
fn a_mirror_that_errs_is_left_at_once() {
    for status in [500, 403, 418] {
        let it = mirrored(1);
        it.mirrors[0].change_all("", |answer| answer.status = status);
        it.pulls();
        assert_eq!(it.mirrors[0].requests("").len(), 1, "{status}");
    }
}

#[test]
fn mirrors_that_lie_cost_no_try_at_the_registry_itself() {
    let it = mirrored(3);
    for (mirror, at) in [0, 200_000, it.blob.bytes.len() - 1].into_iter().enumerate() {
        it.fault(mirror, Fault::Corrupt(at));
    }
    // The first two tries at the registry itself fail as well: it has its three.
    it.bench.fault(&it.blob, &[Fault::Corrupt(7), Fault::Corrupt(8)]);
    it.pulls();
    assert_eq!(it.bench.requests(&it.blob).len(), 3);
}

#[test]
fn a_mirror_that_goes_on_after_the_end_is_left_and_what_came_before_is_right() {
    let it = mirrored(1);
    it.fault(0, Fault::Longer(5));
    it.pulls();
    assert_eq!(it.bench.fake.requests(""), []);
}

#[test]
fn a_mirror_with_a_manifest_of_another_digest_is_left() {
    let it = mirrored(1);
    it.mirrors[0].change_all("/manifests/", |answer| answer.body = b"{}".to_vec());
    it.pulls();
    assert_eq!(it.mirrors[0].requests("").len(), 1);
}

#[test]
fn a_mirror_of_another_length_is_left() {
    let it = mirrored(1);
    it.mirrors[0].change(&Bench::blob_path(&it.blob), |answer| answer.body.truncate(9));
    it.pulls();
    assert_eq!(it.bench.requests(&it.blob), [None]);
}
