//! Tests: whole pulls from a registry in this process, whole and broken.

mod broken;
mod budget;
mod cached;
mod forms;
mod mirrors;
mod signed;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use protocol::ids::Digest;
use protocol::oci::{
    ANNOTATION_IMAGE_NAME, ARTIFACT_IMAGESET, Descriptor, Index, MEDIA_CONFIG,
    MEDIA_IMAGESET_CONFIG, MEDIA_INDEX, MEDIA_LAYER_GZIP, MEDIA_LAYER_TAR, MEDIA_LAYER_ZSTD,
    MEDIA_MANIFEST, Manifest, Platform,
};
use protocol::reference::Reference;

use super::fake::{Answer, Fake, Fault};
use super::plan::architecture;
use super::*;
use crate::layer::testing::Tar;
use crate::paths::RunDirs;
use crate::transport::{Timeouts, Transport};

/// The layers of an image that was unpacked.
#[track_caller]
fn layers(image: &PulledImage) -> &[std::path::PathBuf] {
    match &image.root {
        ImageRoot::Layers(layers) => layers,
        ImageRoot::FileSystem(other) => panic!("{other:?}"),
    }
}

/// A layer as it is published.
#[derive(Clone)]
struct Blob {
    media_type: &'static str,
    bytes: Vec<u8>,
    diff_id: Digest,
}

fn gzip(tar: &[u8]) -> Blob {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(tar).expect("gzip");
    let bytes = encoder.finish().expect("gzip");
    Blob { media_type: MEDIA_LAYER_GZIP, bytes, diff_id: Digest::of(tar) }
}

fn zstd_layer(tar: &[u8], level: i32, window_log: Option<u32>) -> Blob {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), level).expect("zstd");
    if let Some(log) = window_log {
        encoder.window_log(log).expect("window");
    }
    encoder.write_all(tar).expect("zstd");
    let bytes = encoder.finish().expect("zstd");
    Blob { media_type: MEDIA_LAYER_ZSTD, bytes, diff_id: Digest::of(tar) }
}

fn plain(tar: &[u8]) -> Blob {
    Blob { media_type: MEDIA_LAYER_TAR, bytes: tar.to_vec(), diff_id: Digest::of(tar) }
}

/// A file whose content does not compress.
fn noise(name: &str, size: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    let data: Vec<u8> = (0..size).map(|_| next()).collect();
    Tar::default().file(name, &data).end()
}

/// A registry with one repository `set`, and a node with an empty store.
struct Bench {
    fake: Fake,
    dir: tempfile::TempDir,
    puller: Puller,
    progress: Progress,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let store = Store::open(&RunDirs::new(dir.path())).expect("store");
        let timeouts =
            Timeouts { connect: Duration::from_secs(5), stall: Duration::from_millis(400) };
        let transport = Transport::with_timeouts(Path::new("/nonexistent"), timeouts);
        let registries = Registries::new(transport.expect("transport"));
        let mut puller = Puller::new(store, registries);
        puller.retry.backoff = Duration::from_millis(1);
        Self { fake: Fake::start(), dir, puller, progress: Progress::default() }
    }

    fn put(&self, kind: &str, bytes: Vec<u8>, media_type: &str) -> Descriptor {
        let descriptor = Descriptor::of(media_type, &bytes);
        let path = format!("/v2/set/{kind}/{}", descriptor.digest);
        self.fake.add(&path, Answer::ok(bytes));
        descriptor
    }

    fn put_json(&self, kind: &str, value: &impl serde::Serialize, media_type: &str) -> Descriptor {
        self.put(kind, serde_json::to_vec(value).expect("json"), media_type)
    }

    fn manifest(&self, config: Descriptor, layers: Vec<Descriptor>, artifact: bool) -> Descriptor {
        let artifact_type = artifact.then(|| ARTIFACT_IMAGESET.to_owned());
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(MEDIA_MANIFEST.to_owned()),
            artifact_type: artifact_type.clone(),
            config,
            layers,
            annotations: BTreeMap::new(),
        };
        let descriptor = self.put_json("manifests", &manifest, MEDIA_MANIFEST);
        Descriptor { artifact_type, ..descriptor }
    }

    /// Publishes a set of these images and returns its reference by digest.
    fn publish(&self, images: &[(&str, Vec<Blob>)]) -> Reference {
        self.publish_changed(images, |_| ())
    }

    fn publish_changed(
        &self,
        images: &[(&str, Vec<Blob>)],
        change: impl Fn(&mut Descriptor),
    ) -> Reference {
        let named: Vec<_> =
            images.iter().map(|(name, _)| serde_json::json!({"name": name})).collect();
        let containers: Vec<_> = images
            .iter()
            .map(|(name, _)| serde_json::json!({"name": name, "image": name}))
            .collect();
        let set = serde_json::json!({
            "name": "set", "version": "1", "image": named, "container": containers});
        let config = self.put_json("blobs", &set, MEDIA_IMAGESET_CONFIG);
        let mut manifests = vec![self.manifest(config, vec![Descriptor::empty()], true)];
        for (name, layers) in images {
            let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
            let config = serde_json::json!({"architecture": architecture(), "os": "linux",
                "config": {"Cmd": [name]}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
            let config = self.put_json("blobs", &config, MEDIA_CONFIG);
            let layers = layers.iter().map(|layer| {
                let mut blob = self.put("blobs", layer.bytes.clone(), layer.media_type);
                change(&mut blob);
                blob
            });
            let mut manifest = self.manifest(config, layers.collect(), false);
            manifest.platform = Some(Platform {
                architecture: architecture().to_owned(),
                os: "linux".to_owned(),
                variant: None,
            });
            manifest.annotations.insert(ANNOTATION_IMAGE_NAME.to_owned(), (*name).to_owned());
            manifests.push(manifest);
        }
        let index = Index {
            schema_version: 2,
            media_type: Some(MEDIA_INDEX.to_owned()),
            artifact_type: Some(ARTIFACT_IMAGESET.to_owned()),
            manifests,
            annotations: BTreeMap::new(),
        };
        let index = self.put_json("manifests", &index, MEDIA_INDEX);
        let base = self.fake.url();
        format!("{base}/set@{}", index.digest).parse().expect("reference")
    }

    fn pull(&self, reference: &Reference) -> Result<PulledSet, PullError> {
        self.puller.pull_set(reference, &self.progress, &AtomicBool::new(false))
    }

    fn blob_path(blob: &Blob) -> String {
        format!("/v2/set/blobs/{}", Digest::of(&blob.bytes))
    }

    fn fault(&self, blob: &Blob, faults: &[Fault]) {
        self.fake.change(&Self::blob_path(blob), |answer| answer.faults.extend(faults));
    }

    /// What lies in the layer store, complete or not.
    fn layers(&self) -> usize {
        fs::read_dir(self.dir.path().join("layers")).expect("layers").count()
    }

    fn requests(&self, blob: &Blob) -> Vec<Option<String>> {
        let requests = self.fake.requests(&Self::blob_path(blob));
        requests.into_iter().map(|(_, range)| range).collect()
    }

    /// The error of a pull, with its causes, after which the store holds no layer.
    #[track_caller]
    fn refused(&self, reference: &Reference) -> String {
        let error = self.pull(reference).expect_err("the pull succeeded");
        assert_eq!(self.layers(), 0, "something was kept of it: {error}");
        chain(&error)
    }
}

#[test]
fn a_set_of_every_compression_is_pulled_and_re_opened_without_network() {
    let bench = Bench::new();
    let base = gzip(&Tar::default().dir("etc").file("etc/a", b"base").end());
    let top = zstd_layer(&Tar::default().file("etc/b", b"top").end(), 3, None);
    let other = plain(&Tar::default().file("c", b"other").end());
    let images =
        [("one", vec![base.clone(), top]), ("two", vec![base.clone(), other]), ("void", vec![])];
    let reference = bench.publish(&images);
    let pulled = bench.pull(&reference).expect("pull");
    let one = &pulled.images[&"one".parse().expect("name")];
    assert_eq!(one.config.cmd, ["one"]);
    assert_eq!(fs::read(layers(one)[0].join("etc/a")).expect("a"), b"base");
    assert_eq!(fs::read(layers(one)[1].join("etc/b")).expect("b"), b"top");
    assert!(layers(&pulled.images[&"void".parse().expect("name")]).is_empty());
    assert_eq!(bench.layers(), 3, "the shared layer lies there once");
    assert_eq!(bench.requests(&base).len(), 1, "and was fetched once");
    let total = bench.progress.total.load(Ordering::Relaxed);
    assert_eq!((bench.progress.bytes.load(Ordering::Relaxed), pulled.bytes), (total, total));
    // A second agent over the same directory, and no registry.
    let digest = reference.digest.expect("digest");
    let store = Store::open(&RunDirs::new(bench.dir.path())).expect("store");
    let again = Puller::new(store, bench.puller.registries.clone());
    let before = bench.fake.requests("").len();
    let reopened = again.reopen(&digest).expect("complete");
    assert_eq!(PulledSet { bytes: pulled.bytes, ..reopened }, pulled);
    assert_eq!(bench.pull(&reference).expect("again").bytes, 0);
    assert_eq!(bench.fake.requests("").len(), before, "a known set needs no request");
    assert!(again.reopen(&Digest::of(b"other")).is_none());
}

#[test]
fn a_tag_whose_set_is_there_costs_one_head_request() {
    let bench = Bench::new();
    let layer = gzip(&Tar::default().file("a", b"a").end());
    let by_digest = bench.publish(&[("one", vec![layer])]);
    let digest = by_digest.digest.expect("digest");
    let (from, to) = (format!("/v2/{}/manifests/{digest}", by_digest.repository), "tag");
    let by_tag = Reference { digest: None, tag: Some(to.to_owned()), ..by_digest };
    bench.fake.alias(&from, &format!("/v2/{}/manifests/{to}", by_tag.repository));
    bench.pull(&by_tag).expect("first");
    let before = bench.fake.requests("").len();
    assert_eq!(bench.pull(&by_tag).expect("again").bytes, 0);
    let asked = bench.fake.requests("").split_off(before);
    assert!(matches!(&asked[..], [(path, None)] if path.starts_with("HEAD /v2/")), "{asked:?}");
}

#[test]
fn a_roll_fetches_only_what_is_new_and_collecting_removes_the_old() {
    let bench = Bench::new();
    let (base, old, new) =
        (gzip(&noise("base", 3000)), gzip(&noise("old", 10)), gzip(&noise("new", 10)));
    let first = bench.publish(&[("app", vec![base.clone(), old])]);
    bench.pull(&first).expect("first");
    let second = bench.publish(&[("app", vec![base.clone(), new.clone()])]);
    let rolled = bench.pull(&second).expect("second");
    assert_eq!(rolled.bytes, new.bytes.len() as u64);
    assert_eq!(bench.progress.total.load(Ordering::Relaxed), new.bytes.len() as u64);
    let keep = second.digest.expect("digest");
    let collected = bench.puller.collect(&[keep]).expect("collect");
    assert_eq!((collected.layers, bench.layers()), (1, 2));
    assert!(bench.puller.reopen(&keep).is_some());
    assert!(bench.puller.reopen(&first.digest.expect("digest")).is_none());
    assert!(bench.puller.collect(&[first.digest.expect("digest")]).is_err());
    assert_eq!(bench.layers(), 2, "nothing is removed when a kept set cannot be read");
}

#[test]
fn a_pulled_set_is_not_collected_until_nobody_holds_it_any_more() {
    let bench = Bench::new();
    let reference = bench.publish(&[("app", vec![gzip(&noise("held", 10))])]);
    let pulled = bench.pull(&reference).expect("pull");
    let held = pulled.clone();
    drop(pulled);
    bench.puller.collect(&[]).expect("collect");
    assert!(held.images.values().flat_map(layers).all(|layer| layer.exists()));
    assert!(bench.puller.reopen(&held.digest).is_some());
    drop(held);
    assert_eq!(bench.puller.collect(&[]).expect("collect").layers, 1);
}

#[test]
fn a_tag_is_resolved_first() {
    let bench = Bench::new();
    let reference = bench.publish(&[("app", vec![gzip(&noise("f", 10))])]);
    let digest = reference.digest.expect("digest");
    let transport = Transport::new(Path::new("/nonexistent")).expect("transport");
    let index = transport
        .get(&format!("{}/v2/set/manifests/{digest}", bench.fake.url()), &[])
        .expect("index");
    let index = index.into_bytes(1 << 20).expect("bytes");
    bench.fake.add("/v2/set/manifests/v7", Answer::ok(index));
    let pulled = bench.pull(&reference.with_tag("v7")).expect("by tag");
    assert_eq!(pulled.digest, digest);
}

#[test]
fn a_blob_of_another_size_than_declared_is_refused() {
    let blob = gzip(&noise("f", 10_000));
    for wrong in [-1_i64, 1] {
        let bench = Bench::new();
        let reference = bench.publish_changed(&[("app", vec![blob.clone()])], |layer| {
            layer.size = layer.size.checked_add_signed(wrong).expect("size");
        });
        let error = bench.refused(&reference);
        assert!(error.contains("its descriptor says"), "{wrong}: {error}");
        assert_eq!(bench.requests(&blob).len(), 1, "a wrong size is not tried again");
    }
    // Endless data without a declared length stops at the declared byte plus one.
    let bench = Bench::new();
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    bench.fault(&blob, &[Fault::Longer(5_000_000)]);
    let error = bench.refused(&reference);
    assert!(error.contains(&format!("has {} bytes", blob.bytes.len() + 1)), "{error}");
}

#[test]
fn content_that_is_not_what_the_config_says_is_refused() {
    let bench = Bench::new();
    let blob = Blob { diff_id: Digest::of(b"other"), ..gzip(&noise("f", 100)) };
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    let error = bench.refused(&reference);
    assert!(error.contains("the image's config says sha256:"), "{error}");
    assert_eq!(bench.requests(&blob).len(), 1);
}

#[test]
fn hostile_layers_leave_nothing_behind() {
    let bomb = Tar::default().file("zeros", &vec![0; 80 << 20]).end();
    let escape = Tar::default().file("../x", b"x").end();
    for (blob, expected) in [
        (gzip(&bomb), "more than 20 times"),
        (zstd_layer(&bomb, 3, None), "more than 20 times"),
        (gzip(&escape), "`..` component"),
        (zstd_layer(&noise("f", 100), 3, Some(24)), "reading the layer's stream"),
        (Blob { media_type: "application/x-tar", ..plain(&escape) }, "media type"),
        (Blob { media_type: MEDIA_LAYER_ZSTD, ..gzip(&escape) }, "reading the layer's stream"),
    ] {
        let bench = Bench::new();
        let error = bench.refused(&bench.publish(&[("app", vec![blob])]));
        assert!(error.contains(expected), "`{error}` does not say `{expected}`");
    }
}

#[test]
fn gzip_members_in_a_row_and_zstd_19_are_read() {
    let bench = Bench::new();
    let tar = noise("f", 200_000);
    let (head, tail) = tar.split_at(70_000);
    let members = [gzip(head).bytes, gzip(tail).bytes].concat();
    let blob = Blob { media_type: MEDIA_LAYER_GZIP, bytes: members, diff_id: Digest::of(&tar) };
    let strong = zstd_layer(&noise("g", 100), 19, Some(23));
    bench.pull(&bench.publish(&[("app", vec![blob, strong])])).expect("pull");
}

#[test]
fn a_set_that_cannot_fit_is_refused_with_the_figures() {
    let bench = Bench::new();
    let blob = gzip(&noise("f", 100));
    let reference = bench.publish_changed(&[("app", vec![blob.clone()])], |layer| {
        layer.size = 1 << 60;
    });
    let error = bench.refused(&reference);
    assert!(
        error.contains(
            "the pull needs about 3221225472.0 GiB unpacked (1073741824.0 GiB to fetch in 1 blob)"
        ),
        "{error}"
    );
    assert_eq!(bench.requests(&blob).len(), 0);
}

#[test]
fn a_cancelled_pull_stops_and_leaves_nothing_half_done() {
    let bench = Bench::new();
    let blob = gzip(&noise("f", 100_000));
    let reference = bench.publish(&[("app", vec![blob])]);
    let cancel = AtomicBool::new(true);
    let error = bench.puller.pull_set(&reference, &bench.progress, &cancel).expect_err("cancelled");
    assert!(matches!(error, PullError::Cancelled), "{error}");
    assert_eq!(bench.layers(), 0);
    bench.pull(&reference).expect("and can be pulled again");
}

#[test]
fn one_failed_layer_ends_the_pull_and_is_the_one_that_is_named() {
    let bench = Bench::new();
    let bad = gzip(&Tar::default().file("../x", b"x").end());
    let layers: Vec<_> = (0..12).map(|n| gzip(&noise(&format!("f{n}"), 50_000 + n))).collect();
    let reference = bench.publish(&[("app", [vec![bad.clone()], layers].concat())]);
    let error = bench.pull(&reference).expect_err("one is bad");
    assert!(error.to_string().contains(&Digest::of(&bad.bytes).to_string()), "{error}");
    let names = fs::read_dir(bench.dir.path().join("layers")).expect("layers").flatten();
    let half = names.filter(|entry| entry.file_name().to_string_lossy().starts_with("tmp-"));
    assert_eq!(half.count(), 0);
}

#[test]
fn documents_that_lie_are_refused() {
    let bench = Bench::new();
    let reference = bench.publish(&[("app", vec![gzip(&noise("f", 10))])]);
    let digest = reference.digest.expect("digest");
    let path = format!("/v2/set/manifests/{digest}");
    for _ in 0..3 {
        bench.fake.change(&path, |answer| answer.faults.push_back(Fault::Corrupt(3)));
    }
    let error = bench.refused(&reference);
    assert!(error.contains(&format!("expected {digest}")), "{error}");
    assert_eq!(bench.fake.requests(&path).len(), 3);
    let missing = reference.with_digest(Digest::of(b"missing"));
    let error = bench.refused(&missing);
    assert!(error.contains("status 404: no such path"), "{error}");
}

#[test]
fn an_anonymous_token_is_fetched_when_the_registry_wants_one() {
    let bench = Bench::new();
    let blob = gzip(&noise("f", 10));
    let reference = bench.publish(&[("app", vec![blob.clone()])]);
    let challenge = format!(
        "Bearer realm=\"{}/token\",service=\"reg\",scope=\"repository:set:pull\"",
        bench.fake.url()
    );
    bench.fake.add("/token", Answer::ok(br#"{"token":"secret"}"#.to_vec()));
    bench.fake.change(&Bench::blob_path(&blob), |answer| {
        answer.token = Some("Bearer secret".to_owned());
        answer.headers.push(("WWW-Authenticate".to_owned(), challenge));
    });
    bench.pull(&reference).expect("with a token");
    assert_eq!(
        bench.fake.requests("/token")[0].0,
        "/token?service=reg&scope=repository%3Aset%3Apull"
    );
}
