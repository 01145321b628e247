//! Tests: pulls with a cache that outlives the store.

use super::*;
use crate::cache::Cache;

/// A registry with a set of one image of these layers, and a cache that has all of it.
struct Cached {
    bench: Bench,
    cache: tempfile::TempDir,
    reference: Reference,
    layers: Vec<Blob>,
}

fn cached() -> Cached {
    let mut bench = Bench::new();
    let cache = tempfile::tempdir().expect("cache");
    let layers = vec![gzip(&noise("a", 400_000)), zstd_layer(&noise("b", 100_000), 3, None)];
    let reference = bench.publish(&[("app", layers.clone())]);
    bench.puller = bench.puller.clone().with_cache(Cache::in_directory(cache.path()));
    let pulled = bench.pull(&reference).expect("first");
    let size: usize = layers.iter().map(|layer| layer.bytes.len()).sum();
    assert_eq!(pulled.bytes, size as u64);
    bench.puller.cache().flush();
    Cached { bench, cache, reference, layers }
}

impl Cached {
    /// The node after a reboot: the store is empty, the disk is not.
    fn reboot(&mut self) {
        self.bench.dir = tempfile::tempdir().expect("directory");
        let store = Store::open(&RunDirs::new(self.bench.dir.path())).expect("store");
        let (registries, retry) = (self.bench.puller.registries.clone(), self.bench.puller.retry);
        let cache = Cache::in_directory(self.cache.path());
        self.bench.puller = Puller::new(store, registries).with_cache(cache);
        self.bench.puller.retry = retry;
        self.bench.progress = Progress::default();
    }

    fn path(&self, layer: usize) -> std::path::PathBuf {
        let digest = Digest::of(&self.layers[layer].bytes);
        self.cache.path().join("layercake-v1").join(digest.hex())
    }

    /// Pulls, and returns the requests that this took.
    #[track_caller]
    fn requests(&mut self) -> usize {
        let before = self.bench.fake.requests("").len();
        let pulled = self.bench.pull(&self.reference).expect("pull");
        assert_eq!(pulled.images.len(), 1);
        assert_eq!(self.bench.layers(), 2);
        self.bench.puller.cache().flush();
        self.bench.fake.requests("").len() - before
    }
}

#[test]
fn after_a_reboot_nothing_is_asked_of_the_registry() {
    let mut it = cached();
    it.reboot();
    assert_eq!(it.requests(), 0);
    let pulled = it.bench.pull(&it.reference).expect("again");
    assert_eq!(pulled.bytes, 0);
}

#[test]
fn bytes_of_the_cache_are_not_counted_as_fetched() {
    let mut it = cached();
    fs::remove_file(it.path(1)).expect("remove");
    it.reboot();
    let pulled = it.bench.pull(&it.reference).expect("pull");
    assert_eq!(pulled.bytes, it.layers[1].bytes.len() as u64);
}

#[test]
fn every_kind_of_damage_is_found_and_mended() {
    for damage in [0, 200_000, usize::MAX] {
        let mut it = cached();
        let mut bytes = fs::read(it.path(0)).expect("read");
        match bytes.get_mut(damage) {
            Some(byte) => *byte ^= 1,
            None => bytes.truncate(100_000),
        }
        fs::write(it.path(0), &bytes).expect("spoil");
        it.reboot();
        assert_eq!(it.requests(), 1, "one blob at {damage}");
        assert_eq!(fs::read(it.path(0)).expect("mended"), it.layers[0].bytes);
        it.reboot();
        assert_eq!(it.requests(), 0);
    }
}

#[test]
fn damage_costs_no_try_at_the_registry() {
    let mut it = cached();
    let mut bytes = fs::read(it.path(0)).expect("read");
    bytes[7] ^= 1;
    fs::write(it.path(0), &bytes).expect("spoil");
    it.reboot();
    let layer = it.layers[0].clone();
    it.bench.fault(&layer, &[Fault::Corrupt(1), Fault::Corrupt(2)]);
    assert_eq!(it.requests(), 3);
}

#[test]
fn a_set_whose_signature_is_asked_for_is_verified_although_it_comes_from_the_cache() {
    let mut it = cached();
    it.reboot();
    let point = [4; 65];
    let strict = match protocol::signature::PublicKey::from_point("site.pem", &point) {
        Ok(key) => Policy::Signed(vec![key]),
        Err(_) => Policy::Unusable("no key".to_owned()),
    };
    it.bench.puller = it.bench.puller.clone().with_policy(strict);
    it.bench.refused(&it.reference);
}
