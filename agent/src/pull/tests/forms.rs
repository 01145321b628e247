//! Tests: images that come as file systems, made here by mkfs.erofs and mksquashfs and mounted by this kernel.

use protocol::oci::mount::{MountEntry, MountForm};

use super::*;
use crate::mounts::{FileSystem, testing};

/// A file system that holds `etc/form` with the form's name, and something to fetch.
#[track_caller]
fn file_system(form: MountForm) -> Vec<u8> {
    let noise = noise("noise", 200_000);
    testing::file_system(form, &[("etc/form", form.as_str().as_bytes()), ("noise", &noise)])
}

impl Bench {
    /// Publishes a set of one image, `app`, of one layer and these mount forms.
    fn publish_forms(&self, forms: &[(MountForm, Vec<u8>)]) -> Reference {
        let layer = gzip(&Tar::default().file("etc", b"a layer").end());
        let plain = self.publish(&[("app", vec![layer])]);
        let registry = self.puller.registries.open(&plain).expect("registry");
        let bytes = registry.manifest(&plain.digest.expect("digest")).expect("index");
        let mut index = protocol::oci::parse_index(&bytes).expect("index");
        let image = index.manifests[1].clone();
        let name = "app".parse().expect("name");
        for (form, bytes) in forms {
            let blob = self.put("blobs", bytes.clone(), form.media_type());
            let annotations = MountEntry::annotations(&name, *form, architecture(), &image.digest);
            let manifest = MountEntry::new_manifest(blob, annotations.clone());
            let mut entry = self.put_json("manifests", &manifest, MEDIA_MANIFEST);
            entry.annotations = annotations;
            index.manifests.push(entry);
        }
        let index = self.put_json("manifests", &index, MEDIA_INDEX);
        format!("{}/set@{}", self.fake.url(), index.digest).parse().expect("reference")
    }

    fn path(bytes: &[u8]) -> String {
        format!("/v2/set/blobs/{}", Digest::of(bytes))
    }

    fn kept(&self) -> usize {
        fs::read_dir(self.dir.path().join("filesystems")).expect("list").count()
    }
}

fn mounted(pulled: &PulledSet) -> &FileSystem {
    match &pulled.images[&"app".parse().expect("name")].root {
        ImageRoot::FileSystem(file_system) => file_system,
        ImageRoot::Layers(layers) => panic!("it was unpacked: {layers:?}"),
    }
}

#[test]
fn a_mount_form_is_kept_as_it_comes_and_nothing_is_unpacked() {
    for form in MountForm::ALL {
        let bench = Bench::new();
        let bytes = file_system(form);
        let reference = bench.publish_forms(&[(form, bytes.clone())]);
        let pulled = bench.pull(&reference).expect("pull");
        let blob = &mounted(&pulled).blob;
        assert_eq!(Digest::of(&fs::read(blob).expect("blob")), Digest::of(&bytes));
        assert_eq!((bench.layers(), pulled.bytes), (0, bytes.len() as u64));
        assert_eq!(bench.progress.bytes.load(Ordering::Relaxed), pulled.bytes);
        let digest = reference.digest.expect("digest");
        let again = bench.puller.reopen(&digest).expect("complete");
        assert_eq!(PulledSet { bytes: pulled.bytes, ..again }, pulled);
        assert_eq!(bench.pull(&reference).expect("again").bytes, 0);
        assert_eq!(bench.puller.collect(&[digest]).expect("kept").layers, 0);
        assert_eq!(bench.puller.collect(&[]).expect("held").layers, 0);
        drop(pulled);
        assert_eq!((bench.puller.collect(&[]).expect("collect").layers, bench.kept()), (1, 0));
    }
}

#[test]
fn the_preferred_form_is_taken_and_without_one_the_layers() {
    let bench = Bench::new();
    let forms = MountForm::ALL.map(|form| (form, file_system(form)));
    let reference = bench.publish_forms(&forms);
    for first in MountForm::ALL {
        let mut order = MountForm::ALL.to_vec();
        order.sort_by_key(|form| *form != first);
        let puller = bench.puller.clone().with_mount_forms(&order);
        let pulled = puller.pull_set(&reference, &bench.progress, &AtomicBool::new(false));
        assert_eq!(mounted(&pulled.expect("pull")).form, first);
    }
    // What lies in the store is what a set is re-opened with, whatever is preferred.
    assert_eq!(bench.puller.collect(&[]).expect("collect").layers, 2);
    let puller = bench.puller.clone().with_mount_forms(&[]);
    let pulled = puller.pull_set(&reference, &bench.progress, &AtomicBool::new(false));
    let pulled = pulled.expect("the tar form");
    assert_eq!((bench.layers(), bench.kept()), (1, 0));
    let again = bench.puller.reopen(&pulled.digest).expect("of layers");
    assert_eq!(again.images, pulled.images);
}

#[test]
fn a_blob_that_is_cut_or_damaged_comes_again_and_is_never_seen_before_it_is_whole() {
    let bench = Bench::new();
    let bytes = file_system(MountForm::Squashfs);
    let reference = bench.publish_forms(&[(MountForm::Squashfs, bytes.clone())]);
    let path = Bench::path(&bytes);
    bench.fake.change(&path, |answer| answer.faults.push_back(Fault::Cut(100_000)));
    let pulled = bench.pull(&reference).expect("resumed");
    let ranges: Vec<_> = bench.fake.requests(&path).into_iter().map(|(_, range)| range).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".to_owned())]);
    drop(pulled);
    bench.puller.collect(&[]).expect("collect");
    bench.fake.change(&path, |answer| answer.faults.push_back(Fault::Corrupt(5000)));
    drop(bench.pull(&reference).expect("fetched again"));
    bench.puller.collect(&[]).expect("collect");
    for _ in 0..TRIES {
        bench.fake.change(&path, |answer| answer.faults.push_back(Fault::Corrupt(5000)));
    }
    let error = bench.refused(&reference);
    assert!(error.contains("the blob's digest is"), "{error}");
    assert_eq!(bench.kept(), 0);
}

#[test]
fn a_blob_of_another_size_than_declared_is_refused() {
    let bench = Bench::new();
    let bytes = file_system(MountForm::Squashfs);
    let reference = bench.publish_forms(&[(MountForm::Squashfs, bytes.clone())]);
    bench.fake.change(&Bench::path(&bytes), |answer| answer.faults.push_back(Fault::Longer(1)));
    let error = bench.refused(&reference);
    assert!(error.contains("its descriptor says"), "{error}");
    assert_eq!(bench.kept(), 0);
}

#[test]
fn what_the_kernel_does_not_mount_is_not_kept_and_the_next_form_or_the_layers_are_taken() {
    let bench = Bench::new();
    // Its digest is right; it is no file system.
    let junk = noise("junk", 50_000);
    let good = file_system(MountForm::Erofs);
    let reference =
        bench.publish_forms(&[(MountForm::Squashfs, junk.clone()), (MountForm::Erofs, good)]);
    let pulled = bench.pull(&reference).expect("the other form");
    assert_eq!((mounted(&pulled).form, bench.kept()), (MountForm::Erofs, 1));
    let reference = bench.publish_forms(&[(MountForm::Squashfs, junk)]);
    let pulled = bench.pull(&reference).expect("the layers");
    assert_eq!(layers(&pulled.images[&"app".parse().expect("name")]).len(), 1);
    assert_eq!(bench.kept(), 1, "the junk is not there");
    let again = bench.puller.reopen(&pulled.digest).expect("of layers");
    assert_eq!(again.images, pulled.images);
}
