//! Builds in real directories: imported, uploaded, named, swept, never half.

use std::path::Path;

use tempfile::TempDir;

use super::*;

/// Writes a build whose files hold this text; returns its digest.
pub(crate) fn build(dir: &Path, text: &str) -> Digest {
    fs::create_dir_all(dir).expect("dir");
    let files = [KERNEL, INITRAMFS, AGENT].map(|name| (name, format!("{name} {text}")));
    let artifact = |(name, text): &(&str, String)| serde_json::json!({"name": name, "digest": Digest::of(text.as_bytes()), "size": text.len()});
    let manifest = serde_json::json!({
        "name": "layer0", "version": text, "kernel": "6.12", "kernel_source": "x", "flavour": "virt",
        "agent": "1", "agent_digest": Digest::of(files[2].1.as_bytes()), "modules": [],
        "artifacts": files.iter().map(artifact).collect::<Vec<_>>(),
    });
    for (name, text) in &files {
        fs::write(dir.join(name), text).expect("file");
    }
    let manifest = manifest.to_string();
    fs::write(dir.join(MANIFEST), &manifest).expect("manifest");
    Digest::of(manifest.as_bytes())
}

struct World {
    dir: TempDir,
    store: Layer0Store,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let store = Layer0Store::open(dir.path().join("data"), dir.path().join("source"));
        Self { store: store.expect("open"), dir }
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    fn default_build(&self, pinned: &[Digest]) -> Option<Digest> {
        self.store.default_build(|| pinned.iter().copied().collect())
    }

    fn read(&self, digest: &Digest, name: &str) -> String {
        fs::read_to_string(self.store.file(digest, name).expect(name)).expect("read")
    }
}

#[test]
fn the_default_is_copied_when_it_changes_and_what_nobody_needs_goes() {
    let world = World::new();
    assert_eq!(world.default_build(&[]), None, "there is none yet");
    let a = build(&world.source(), "a");
    assert_eq!(world.default_build(&[]), Some(a));
    // What the copy holds is not what happens in the source.
    fs::write(world.source().join(KERNEL), "changed").expect("write");
    assert_eq!(world.read(&a, KERNEL), "vmlinuz a");
    let b = build(&world.source(), "bb");
    assert_eq!(world.default_build(&[a]), Some(b));
    assert!(world.store.has(&a), "a node still runs it");
    let c = build(&world.source(), "ccc");
    assert_eq!(world.default_build(&[a]), Some(c));
    assert!(world.store.has(&a) && !world.store.has(&b) && world.store.has(&c));
    let defaults: Vec<_> = world.store.list().iter().map(|it| (it.digest, it.default)).collect();
    assert_eq!(defaults.len(), 2);
    assert!(defaults.contains(&(a, false)) && defaults.contains(&(c, true)));
}

#[test]
fn a_build_in_the_middle_of_its_replacement_is_not_given() {
    let world = World::new();
    let a = build(&world.source(), "a");
    assert_eq!(world.default_build(&[]), Some(a));
    build(&world.source(), "bb");
    // The manifest is of one build, the initramfs of another.
    fs::write(world.source().join(INITRAMFS), "torn").expect("write");
    assert_eq!(world.default_build(&[]), Some(a));
    let b = build(&world.source(), "bb");
    fs::write(world.source().join("other"), "x").expect("write");
    // The same manifest, written anew.
    assert_eq!(world.default_build(&[]), Some(b));
}

#[test]
fn an_upload_is_there_when_it_is_whole_and_right() {
    let world = World::new();
    let from = world.dir.path().join("out");
    let digest = build(&from, "a");
    let manifest = fs::read(from.join(MANIFEST)).expect("manifest");
    let name: Name = "lab".parse().expect("name");
    let upload = world.store.begin(&manifest, Some(&name)).expect("begin");
    assert_eq!((upload.digest, upload.missing.len()), (digest, 3));
    world.store.sign(&digest, b"signature").expect("sign");
    let send = |name: &str, text: &[u8]| {
        let mut incoming = world.store.receive(&digest, name)?;
        incoming.write(text)?;
        world.store.received(&digest, incoming)
    };
    let error = send("other", b"x").expect_err("not named").to_string();
    assert!(error.contains("names no such file"), "{error}");
    for wrong in ["vmlinuz", "vmlinuz b", "vmlinuz a and more"] {
        let error = send(KERNEL, wrong.as_bytes()).expect_err(wrong).to_string();
        assert!(error.starts_with("vmlinuz: "), "{error}");
    }
    for name in [KERNEL, INITRAMFS] {
        send(name, format!("{name} a").as_bytes()).expect(name);
    }
    assert!(!world.store.has(&digest) && world.store.list().is_empty());
    let again = world.store.begin(&manifest, None).expect("begin again");
    assert_eq!(again.missing, [AGENT], "what came is not asked for again");
    send(AGENT, b"layercake-agent a").expect("agent");
    let found = world.store.find("lab").expect("by name");
    assert!(found.digest == digest && found.signed && found.agent_alone && !found.default);
    assert_eq!(world.read(&digest, SIGNATURE), "signature");
    assert!(world.store.begin(&manifest, None).expect("is there").missing.is_empty());
    assert_eq!(fs::read_dir(world.dir.path().join("data")).expect("dir").count(), 1, "no rest");
}

#[test]
fn what_an_interrupted_server_left_goes_with_the_next_start_but_a_young_upload_stays() {
    let world = World::new();
    let data = world.dir.path().join("data");
    let begin = |text: &str| {
        let from = world.dir.path().join(text);
        build(&from, text);
        let manifest = fs::read(from.join(MANIFEST)).expect("manifest");
        let digest = world.store.begin(&manifest, None).expect("begin").digest;
        data.join(format!("{PARTIAL}{}", digest.hex()))
    };
    let (young, old) = (begin("young"), begin("old"));
    let yesterday = std::time::SystemTime::now() - std::time::Duration::from_secs(25 * 3600);
    fs::File::open(&old).and_then(|dir| dir.set_modified(yesterday)).expect("age");
    fs::create_dir(data.join("partial-aB3dEf")).expect("a copy");
    fs::write(data.join(".tmpX1"), "half").expect("a file");
    let kept = data.join("somebody's");
    fs::write(&kept, "").expect("another file");
    Layer0Store::open(data.clone(), world.source()).expect("open");
    let mut left: Vec<_> =
        fs::read_dir(&data).expect("list").flatten().map(|entry| entry.path()).collect();
    left.sort();
    let mut expected = vec![young, kept];
    expected.sort();
    assert_eq!(left, expected);
}

#[test]
fn a_manifest_that_is_none_or_lacks_a_kernel_is_refused() {
    let world = World::new();
    let error = world.store.begin(b"{}", None).expect_err("no manifest").to_string();
    assert!(error.contains("manifest.json: missing field"), "{error}");
    let from = world.dir.path().join("out");
    build(&from, "a");
    let text = fs::read_to_string(from.join(MANIFEST)).expect("manifest");
    let without = text.replace("\"vmlinuz\"", "\"bzImage\"");
    let error = world.store.begin(without.as_bytes(), None).expect_err("no kernel").to_string();
    assert!(error.ends_with("manifest.json names no vmlinuz"), "{error}");
}

#[test]
fn a_build_is_found_by_name_and_digits_and_a_name_is_one_builds() {
    let world = World::new();
    let upload = |text: &str| {
        let from = world.dir.path().join(text);
        let digest = build(&from, text);
        let (_, new) =
            import::import(&from, &world.dir.path().join("data"), |_| false).expect(text);
        assert!(new);
        digest
    };
    let (a, b) = (upload("a"), upload("b"));
    let name: Name = "lab".parse().expect("name");
    world.store.set_name(&a, &name).expect("name");
    world.store.set_name(&b, &name).expect("name");
    let find = |text: &str| world.store.find(text).map(|build| build.digest);
    assert_eq!(find("lab").expect("name"), b);
    assert_eq!(find(&a.to_string()).expect("digest"), a);
    assert_eq!(find(&a.hex()[..8]).expect("digits"), a);
    for text in ["other", "default", &a.hex()[..4], ""] {
        assert!(matches!(find(text), Err(Layer0Error::Unknown(_))), "{text}");
    }
    let twice = vec![world.store.find("lab").expect("build"); 2];
    assert!(matches!(choose(twice, &b.hex()), Err(Layer0Error::Ambiguous(_))));
    let error = world.store.remove(&a, Some("node n1 runs it".to_owned())).expect_err("needed");
    assert!(error.to_string().contains("node n1 runs it"));
    world.store.remove(&a, None).expect("remove");
    assert!(matches!(world.store.remove(&a, None), Err(Layer0Error::Unknown(_))));
    assert_eq!(world.store.file(&b, "../x"), None);
    assert_eq!(world.store.file(&b, "name"), None);
}

#[test]
fn a_layer0_that_does_not_come_up_gives_way_to_the_last_that_did() {
    let (a, b, c) = (Digest::of(b"a"), Digest::of(b"b"), Digest::of(b"c"));
    let here = |digest: &Digest| *digest != c;
    let boot = |wanted, good, attempts| to_boot(wanted, Some(a), good, attempts, here);
    assert_eq!(boot(None, None, 0), Some(a));
    assert_eq!(boot(Some(b), Some(a), MAX_ATTEMPTS), Some(b));
    assert_eq!(boot(Some(b), Some(a), MAX_ATTEMPTS + 1), Some(a));
    assert_eq!(boot(Some(b), None, 99), Some(b), "no other is known to be good");
    assert_eq!(boot(Some(b), Some(c), 99), Some(b), "the good one is gone");
    assert_eq!(boot(Some(c), None, 0), Some(a), "what is wanted is gone");
    assert_eq!(to_boot(None, None, None, 0, here), None);
}
