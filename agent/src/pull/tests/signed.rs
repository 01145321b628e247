//! Tests: with keys installed, only what they signed gets into the store or out of it.

use std::path::PathBuf;

use protocol::signature::{
    BuiltManifest, Policy, PublicKey, add_signature, payload, signature_tag,
};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};

use super::*;
use crate::pull::signed::load_policy;

struct Signer {
    pair: EcdsaKeyPair,
    public: PublicKey,
}

impl Signer {
    fn new(name: &str) -> Self {
        let (random, algorithm) = (SystemRandom::new(), &ECDSA_P256_SHA256_ASN1_SIGNING);
        let der = EcdsaKeyPair::generate_pkcs8(algorithm, &random).expect("key");
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, der.as_ref(), &random).expect("key");
        let public = PublicKey::from_point(name, pair.public_key().as_ref()).expect("point");
        Self { pair, public }
    }

    fn policy(&self) -> Policy {
        Policy::Signed(vec![self.public.clone()])
    }

    /// Publishes a signature of a set, and returns the paths of manifest and payload.
    fn sign(&self, bench: &Bench, reference: &Reference) -> [String; 2] {
        let digest = reference.digest.expect("digest");
        let payload = payload(reference, &digest);
        let der = self.pair.sign(&SystemRandom::new(), &payload).expect("sign");
        let built = add_signature(None, &payload, der.as_ref()).expect("manifest");
        publish(bench, &digest, built, payload)
    }
}

fn publish(bench: &Bench, of: &Digest, built: BuiltManifest, payload: Vec<u8>) -> [String; 2] {
    let manifest = format!("/v2/set/manifests/{}", signature_tag(of));
    let blob = format!("/v2/set/blobs/{}", Digest::of(&payload));
    bench.fake.add(&manifest, Answer::ok(built.manifest));
    bench.fake.add(&blob, Answer::ok(payload));
    [manifest, blob]
}

/// A registry with a set, and a node that trusts the signer alone.
fn bench() -> (Bench, Signer, Reference) {
    let (mut bench, signer) = (Bench::new(), Signer::new("site.pem"));
    bench.puller = bench.puller.clone().with_policy(signer.policy());
    let reference = bench.publish(&[("app", vec![gzip(&noise("f", 10))])]);
    (bench, signer, reference)
}

/// An agent that starts anew over the same store.
fn started_anew(bench: &Bench, policy: Policy) -> Puller {
    let store = Store::open(&RunDirs::new(bench.dir.path())).expect("store");
    Puller::new(store, bench.puller.registries.clone()).with_policy(policy)
}

#[test]
fn a_signed_set_is_pulled_and_re_opened_without_network_under_the_same_key_only() {
    let (bench, signer, reference) = bench();
    let [manifest, _] = signer.sign(&bench, &reference);
    let digest = reference.digest.expect("digest");
    let pulled = bench.pull(&reference).expect("signed");
    assert_eq!(bench.fake.requests("")[0].0, manifest, "before anything of the set");
    let before = bench.fake.requests("").len();
    assert!(bench.puller.reopen(&digest).is_some());
    bench.pull(&reference).expect("again");
    let other = Signer::new("other.pem");
    let both = Policy::Signed(vec![other.public.clone(), signer.public.clone()]);
    let reopened = started_anew(&bench, both).reopen(&digest).expect("either key");
    assert_eq!(reopened.images, pulled.images);
    assert!(started_anew(&bench, other.policy()).reopen(&digest).is_none(), "another key");
    assert!(started_anew(&bench, Policy::Unusable("x".to_owned())).reopen(&digest).is_none());
    assert!(started_anew(&bench, Policy::Unsigned).reopen(&digest).is_some());
    assert_eq!(bench.fake.requests("").len(), before, "a known set needs no request");
}

#[test]
fn an_unsigned_set_is_refused_by_the_key_s_name_and_nothing_of_it_is_fetched() {
    let (bench, signer, reference) = bench();
    let error = bench.refused(&reference);
    assert!(error.contains("is not signed; a signature by key site.pem (sha256:"), "{error}");
    assert!(error.contains(&signer.public.to_string()), "{error}");
    assert_eq!(bench.fake.requests("").len(), 1, "{:?}", bench.fake.requests(""));
    assert!(bench.puller.reopen(&reference.digest.expect("digest")).is_none());
}

#[test]
fn a_set_that_was_pulled_without_keys_is_not_re_opened_with_them() {
    let (mut bench, signer, reference) = bench();
    bench.puller = bench.puller.clone().with_policy(Policy::Unsigned);
    bench.pull(&reference).expect("no key, no signature");
    assert!(bench.fake.requests(".sig").is_empty());
    let strict = started_anew(&bench, signer.policy());
    assert!(strict.reopen(&reference.digest.expect("digest")).is_none());
    let error = strict.pull_set(&reference, &bench.progress, &AtomicBool::new(false));
    assert!(error.expect_err("unsigned").to_string().contains("is not signed"));
}

#[test]
fn a_signature_by_another_key_for_another_set_or_another_repository_is_refused() {
    let (bench, signer, reference) = bench();
    Signer::new("other.pem").sign(&bench, &reference);
    let error = bench.refused(&reference);
    assert!(error.contains("made by none of the keys; a signature by key site.pem"), "{error}");
    let digest = reference.digest.expect("digest");
    let elsewhere: Reference =
        format!("{}/other@{digest}", bench.fake.url()).parse().expect("reference");
    let other = reference.with_digest(Digest::of(b"other"));
    for (wrong, reason) in [(elsewhere, "not for the repository `set`"), (other, "but for sha256:")]
    {
        let payload = payload(&wrong, &wrong.digest.expect("digest"));
        let der = signer.pair.sign(&SystemRandom::new(), &payload).expect("sign");
        let built = add_signature(None, &payload, der.as_ref()).expect("manifest");
        publish(&bench, &digest, built, payload);
        let error = bench.refused(&reference);
        assert!(error.contains(reason) && error.contains("site.pem"), "{error}");
    }
}

#[test]
fn a_registry_that_spoils_signatures_is_asked_again_and_then_refused() {
    let (bench, signer, reference) = bench();
    let [manifest, payload] = signer.sign(&bench, &reference);
    bench.fake.change(&payload, |answer| answer.faults.extend([Fault::Corrupt(9), Fault::Cut(3)]));
    bench.fake.change(&manifest, |answer| answer.faults.push_back(Fault::Status(503)));
    bench.pull(&reference).expect("the third try");
    let (bench, signer, reference) = self::bench();
    let [manifest, payload] = signer.sign(&bench, &reference);
    bench.fake.change(&payload, |answer| answer.faults.extend([Fault::Corrupt(9); 3]));
    let error = bench.refused(&reference);
    assert!(error.contains("the content's digest is"), "{error}");
    bench.fake.change(&payload, |answer| answer.faults.push_back(Fault::Status(404)));
    let error = bench.refused(&reference);
    assert!(error.contains("its payload is not there"), "{error}");
    bench.fake.change(&manifest, |answer| answer.body = b"[]".to_vec());
    let error = bench.refused(&reference);
    assert!(error.contains("cannot be read; a signature by key site.pem"), "{error}");
}

#[test]
fn no_flipped_bit_of_what_a_registry_says_about_signatures_lets_another_set_in() {
    // The set that is signed is another one; each flip tries to turn its signature into one of this set.
    let (bench, signer, reference) = bench();
    let other = reference.with_digest(Digest::of(b"other"));
    let payload = payload(&other, &other.digest.expect("digest"));
    let der = signer.pair.sign(&SystemRandom::new(), &payload).expect("sign");
    let built = add_signature(None, &payload, der.as_ref()).expect("manifest");
    let digest = reference.digest.expect("digest");
    for at in 0..payload.len() {
        let mut flipped = payload.clone();
        flipped[at] ^= 1 << (at % 8);
        let rebuilt = add_signature(None, &flipped, der.as_ref()).expect("manifest");
        publish(&bench, &digest, rebuilt, flipped);
        bench.refused(&reference);
    }
    publish(&bench, &digest, built, payload);
    bench.refused(&reference);
}

#[test]
fn what_was_kept_of_signatures_is_collected_with_the_set_and_worthless_when_spoiled() {
    let (bench, signer, reference) = bench();
    signer.sign(&bench, &reference);
    bench.pull(&reference).expect("signed");
    let digest = reference.digest.expect("digest");
    let kept = |bench: &Bench| -> Vec<PathBuf> {
        let entries = fs::read_dir(bench.dir.path().join("signatures")).expect("signatures");
        entries.map(|entry| entry.expect("entry").path()).collect()
    };
    let file = kept(&bench).pop().expect("kept");
    let good = fs::read(&file).expect("kept");
    for at in (0..good.len()).step_by(3) {
        let mut bad = good.clone();
        bad[at] ^= 0x15;
        fs::write(&file, &bad).expect("spoil");
        // What does not matter may be spoiled: the unused config's address. Whatever is let pass is this very set.
        if let Some(reopened) = bench.puller.reopen(&digest) {
            let text = String::from_utf8_lossy(&good);
            let layers = text.find("layers").expect("layers");
            assert!(at < layers && reopened.digest == digest, "byte {at}");
        }
    }
    fs::write(&file, "").expect("spoil");
    assert!(bench.puller.reopen(&digest).is_none());
    bench.pull(&reference).expect("asks the registry again");
    assert!(bench.puller.reopen(&digest).is_some());
    bench.puller.collect(&[digest]).expect("collect");
    assert_eq!(kept(&bench).len(), 1);
    bench.puller.collect(&[]).expect("collect");
    assert_eq!(kept(&bench), Vec::<PathBuf>::new());
}

#[test]
fn key_files_make_the_policy_and_whatever_is_no_key_closes_it() {
    let dir = tempfile::tempdir().expect("dir");
    let (site, old) = (Signer::new("site.pem"), Signer::new("old.pub"));
    assert_eq!(load_policy(&dir.path().join("none")), Policy::Unsigned);
    assert_eq!(load_policy(dir.path()), Policy::Unsigned);
    fs::write(dir.path().join(".gitkeep"), "").expect("write");
    assert_eq!(load_policy(dir.path()), Policy::Unsigned);
    for signer in [&site, &old] {
        let path = dir.path().join(signer.public.name());
        fs::write(path, signer.public.to_pem()).expect("write");
    }
    assert_eq!(load_policy(dir.path()), Policy::Signed(vec![old.public, site.public]));
    for (name, content, reason) in [
        ("new.key", "", "neither *.pem nor *.pub"),
        ("new.pem", "", "no whole PEM block"),
        ("new.pem", "-----BEGIN PRIVATE KEY-----", "is a private key"),
    ] {
        fs::write(dir.path().join(name), content).expect("write");
        match load_policy(dir.path()) {
            Policy::Unusable(found) => assert!(found.contains(reason), "{found}"),
            other => panic!("{name}: {other:?}"),
        }
        fs::remove_file(dir.path().join(name)).expect("remove");
    }
    fs::create_dir(dir.path().join("dir.pem")).expect("dir");
    assert!(matches!(load_policy(dir.path()), Policy::Unusable(_)));
    assert!(matches!(load_policy(Path::new("/proc/self/mem")), Policy::Unusable(_)));
}
