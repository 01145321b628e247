//! Tests: the golden signature (made by OpenSSL), every kind of lie, and every flipped bit.

use proptest::prelude::*;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};

use super::*;

const PAYLOAD: &[u8] = include_bytes!("../../golden/v1/signature/payload.json");
const MANIFEST: &[u8] = include_bytes!("../../golden/v1/signature/manifest.json");
const INDEX: &[u8] = include_bytes!("../../golden/v1/index.json");
const RELEASE: &str = include_str!("../../golden/v1/signature/release.pub");
const OTHER: &str = include_str!("../../golden/v1/signature/other.pub");

fn key(name: &str, pem: &str) -> PublicKey {
    PublicKey::from_pem(name, pem).expect("key")
}

fn release() -> Policy {
    Policy::Signed(vec![key("release.pub", RELEASE)])
}

fn subject() -> Subject {
    Subject { digest: Digest::of(INDEX), repository: "l0/hello".to_owned() }
}

fn payloads(payload: &[u8]) -> BTreeMap<Digest, Vec<u8>> {
    BTreeMap::from([(Digest::of(payload), payload.to_vec())])
}

/// A signer of the test's own.
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

    fn sign(&self, bytes: &[u8]) -> Vec<u8> {
        self.pair.sign(&SystemRandom::new(), bytes).expect("sign").as_ref().to_vec()
    }

    fn policy(&self) -> Policy {
        Policy::Signed(vec![self.public.clone()])
    }

    /// The verdict over a payload of any content, signed by this key.
    fn verdict(&self, payload: &[u8]) -> Result<(), String> {
        let built = add_signature(None, payload, &self.sign(payload)).expect("manifest");
        let policy = self.policy();
        let verified = policy.verify(&subject(), Some(&built.manifest), &payloads(payload));
        verified.map(drop).map_err(|error| error.to_string())
    }
}

#[test]
fn the_golden_signature_made_by_openssl_is_good() {
    let policy = Policy::Signed(vec![key("other.pub", OTHER), key("release.pub", RELEASE)]);
    let by = policy.verify(&subject(), Some(MANIFEST), &payloads(PAYLOAD)).expect("good");
    assert_eq!(by.expect("a key").name(), "release.pub");
}

#[test]
fn our_payload_and_manifest_are_byte_for_byte_the_golden_ones() {
    let reference: Reference = "http://reg.example/l0/hello:1".parse().expect("reference");
    assert_eq!(payload(&reference, &Digest::of(INDEX)), PAYLOAD);
    let golden: Value = serde_json::from_slice(MANIFEST).expect("golden");
    let der = &parse_signatures(MANIFEST).expect("golden")[0].der;
    let built = add_signature(None, PAYLOAD, der).expect("build");
    assert_eq!(serde_json::from_slice::<Value>(&built.manifest).expect("ours"), golden);
    assert_eq!(golden["config"]["digest"], Digest::of(&built.config).to_string());
}

#[test]
fn the_tag_is_the_digest_with_a_dash_and_sig() {
    let tag = signature_tag(&Digest::of(b""));
    assert_eq!(tag, "sha256-e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855.sig");
    assert!(
        "h/a"
            .parse::<Reference>()
            .expect("reference")
            .with_tag(&tag)
            .to_string()
            .parse::<Reference>()
            .is_ok()
    );
}

#[test]
fn a_key_survives_pem_and_has_openssl_s_fingerprint() {
    let release = key("release.pub", RELEASE);
    assert_eq!(release.to_pem(), RELEASE);
    assert_eq!(release.to_string(), format!("release.pub ({})", release.fingerprint().short()));
    assert_eq!(release.der().len(), 91);
}

#[test]
fn what_is_not_a_p256_public_key_is_refused_with_the_reason() {
    let ed25519 = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n";
    for (text, reason) in [
        (String::new(), "no whole PEM block"),
        (RELEASE.replace("END", "FIN"), "no whole PEM block"),
        (RELEASE.replace("PUBLIC", "PRIVATE"), "is a private key"),
        (format!("{RELEASE}{OTHER}"), "more than one PEM block"),
        (RELEASE.replacen("MFkw", "M?kw", 1), "not base64"),
        (ed25519.to_owned(), "another kind than ECDSA P-256"),
        ("x".repeat(MAX_KEY_BYTES + 1), "larger than 64 KiB"),
    ] {
        let error = PublicKey::from_pem("k.pem", &text).expect_err(reason).to_string();
        assert!(error.contains(reason) && error.starts_with("k.pem is not"), "{error}");
    }
}

#[test]
fn without_keys_everything_is_taken_and_with_unreadable_ones_nothing() {
    let none = BTreeMap::new();
    assert_eq!(Policy::default().verify(&subject(), None, &none).expect("unsigned"), None);
    assert!(!Policy::default().asks_for_signatures());
    let policy = Policy::Unusable("keys/a.pem is empty".to_owned());
    let error = policy.verify(&subject(), Some(MANIFEST), &payloads(PAYLOAD)).expect_err("none");
    assert_eq!(error.to_string(), "signatures cannot be verified: keys/a.pem is empty");
}

#[test]
fn a_refusal_names_the_digest_and_every_key_that_was_asked() {
    let (release, other) = (key("release.pub", RELEASE), key("other.pub", OTHER));
    let policy = Policy::Signed(vec![other.clone()]);
    let error = policy.verify(&subject(), None, &BTreeMap::new()).expect_err("unsigned");
    let text =
        format!("{} is not signed; a signature by key {other} is asked for", subject().digest);
    assert_eq!(error.to_string(), text);
    let error = policy.verify(&subject(), Some(MANIFEST), &payloads(PAYLOAD)).expect_err("other");
    assert!(error.to_string().contains("signature 1: it was made by none of the keys"), "{error}");
    let policy = Policy::Signed(vec![release.clone(), other.clone()]);
    let error = policy.verify(&subject(), Some(MANIFEST), &BTreeMap::new()).expect_err("payload");
    assert!(error.to_string().contains("its payload is not there"), "{error}");
    assert!(error.to_string().contains(&format!("one of the keys {release}, {other}")), "{error}");
}

#[test]
fn a_well_signed_payload_that_says_something_else_is_refused() {
    let signer = Signer::new("mine.pub");
    let good = String::from_utf8(PAYLOAD.to_vec()).expect("text");
    signer.verdict(good.as_bytes()).expect("good");
    let spaced = good.replace(':', ": ").replace("sha256: ", "sha256:");
    signer.verdict(spaced.as_bytes()).expect("verified as it came, never written anew");
    let claims = good.replace("null", "{\"creator\":\"ann\",\"timestamp\":1}");
    signer.verdict(claims.as_bytes()).expect("claims are the signer's own");
    let tagged = good.replace("l0/hello", "l0/hello:1@sha256:00");
    signer.verdict(tagged.as_bytes()).expect("a tag in the reference");
    let mirror = good.replace("reg.example/", "mirror.example:5000/");
    signer.verdict(mirror.as_bytes()).expect("another host");
    let hex = subject().digest.hex();
    for (payload, reason) in [
        (good.replace("cosign container", "atomic container"), "its type is `atomic container"),
        (good.replace(&hex, &Digest::of(b"other").hex()), "but for sha256:"),
        (good.replace(&hex, &hex.to_uppercase()), "its payload is malformed"),
        (good.replace("docker-manifest-digest", "Docker-manifest-digest"), "malformed"),
        (good.replace("l0/hello", "l0/other"), "not for the repository `l0/hello`"),
        (good.replace("l0/hello", "hello"), "not for the repository `l0/hello`"),
        (good.replace("l0/hello", "l0/hello/more"), "not for the repository `l0/hello`"),
        (good.replace("reg.example/l0/hello", "hello"), "not for the repository `l0/hello`"),
        (format!("{good}x"), "its payload is malformed"),
        ("[".repeat(60_000), "its payload is malformed"),
    ] {
        let error = signer.verdict(payload.as_bytes()).expect_err(reason);
        assert!(error.contains(reason), "`{error}` does not say `{reason}`");
    }
}

#[test]
fn rotation_keeps_both_signers_and_either_key_is_enough() {
    let (old, new) = (Signer::new("old.pub"), Signer::new("new.pub"));
    let first = add_signature(None, PAYLOAD, &old.sign(PAYLOAD)).expect("first");
    // Another tool's annotations survive.
    let mut whole: Value = serde_json::from_slice(&first.manifest).expect("json");
    whole["layers"][0]["annotations"]["dev.sigstore.cosign/bundle"] = json!("{}");
    let bytes = whole.to_string();
    let both = add_signature(Some(bytes.as_bytes()), PAYLOAD, &new.sign(PAYLOAD)).expect("second");
    let after: Value = serde_json::from_slice(&both.manifest).expect("json");
    assert_eq!(after["layers"][0], whole["layers"][0]);
    for signer in [&old, &new] {
        let policy = signer.policy();
        let by = policy.verify(&subject(), Some(&both.manifest), &payloads(PAYLOAD));
        assert_eq!(by.expect("good"), Some(&signer.public));
    }
}

#[test]
fn more_than_eight_signatures_are_neither_written_nor_read() {
    let mut built = add_signature(None, PAYLOAD, b"x").expect("first");
    for _ in 1..MAX_SIGNATURES {
        built = add_signature(Some(&built.manifest), PAYLOAD, b"x").expect("more");
    }
    assert_eq!(parse_signatures(&built.manifest).expect("eight").len(), MAX_SIGNATURES);
    let error = add_signature(Some(&built.manifest), PAYLOAD, b"x").expect_err("nine");
    assert!(matches!(error, ManifestError::TooMany(9)), "{error}");
    let mut whole: Value = serde_json::from_slice(&built.manifest).expect("json");
    let layer = whole["layers"][0].clone();
    whole["layers"].as_array_mut().expect("layers").push(layer);
    let error = parse_signatures(whole.to_string().as_bytes()).expect_err("nine");
    assert!(matches!(error, ManifestError::TooMany(9)), "{error}");
}

#[track_caller]
fn unreadable(change: impl FnOnce(&mut Value), expected: &str) {
    let mut whole: Value = serde_json::from_slice(MANIFEST).expect("golden");
    change(&mut whole);
    let bytes = whole.to_string();
    let policy = release();
    let verified = policy.verify(&subject(), Some(bytes.as_bytes()), &payloads(PAYLOAD));
    let error = verified.expect_err(expected);
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    let text = format!("{error}: {source}");
    assert!(text.contains(expected) && text.contains("release.pub"), "{text}");
}

#[test]
fn a_manifest_that_is_something_else_is_refused() {
    unreadable(|whole| whole["schemaVersion"] = json!(1), "schemaVersion is 1");
    unreadable(|whole| whole["mediaType"] = json!(crate::oci::MEDIA_INDEX), "mediaType is");
    unreadable(|whole| drop(whole.as_object_mut().expect("map").remove("mediaType")), "is none");
    unreadable(|whole| whole["config"]["mediaType"] = json!("x/y"), "the config is x/y");
    unreadable(|whole| whole["layers"][0]["mediaType"] = json!("x/y"), "a layer is x/y");
    unreadable(|whole| whole["layers"] = json!([]), "is not signed");
    unreadable(|whole| whole["layers"] = json!(1), "cannot be read");
    unreadable(|whole| whole["layers"][0]["annotations"] = json!({}), "is not signed");
    unreadable(|whole| whole["layers"][0]["size"] = json!(70_000), "is not signed");
    unreadable(|whole| whole["layers"][0]["size"] = json!(235), "has 236 bytes, not 235");
    unreadable(|whole| whole["x"] = json!("x".repeat(MAX_SIGNATURE_MANIFEST_BYTES)), "at most");
}

#[test]
fn every_flipped_bit_of_the_payload_is_noticed_even_under_its_new_digest() {
    for (at, bit) in (0..PAYLOAD.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
        let mut flipped = PAYLOAD.to_vec();
        flipped[at] ^= 1 << bit;
        // As a registry would serve it, and as one would that describes it anew.
        let mut whole: Value = serde_json::from_slice(MANIFEST).expect("golden");
        whole["layers"][0]["digest"] = json!(Digest::of(&flipped));
        let under_old = BTreeMap::from([(Digest::of(PAYLOAD), flipped.clone())]);
        for (manifest, payloads) in
            [(MANIFEST.to_vec(), under_old), (whole.to_string().into_bytes(), payloads(&flipped))]
        {
            let verified = release().verify(&subject(), Some(&manifest), &payloads).is_ok();
            assert!(!verified, "byte {at}, bit {bit}");
        }
    }
}

#[test]
fn every_flipped_bit_of_the_signed_index_is_noticed() {
    for (at, bit) in (0..INDEX.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
        let mut flipped = INDEX.to_vec();
        flipped[at] ^= 1 << bit;
        let subject = Subject { digest: Digest::of(&flipped), ..subject() };
        let verified = release().verify(&subject, Some(MANIFEST), &payloads(PAYLOAD)).is_ok();
        assert!(!verified, "byte {at}, bit {bit}");
    }
}

#[test]
fn every_flipped_bit_of_the_signature_manifest_is_noticed_but_in_the_unused_config_s_address() {
    // Nothing vouches for this manifest: what counts is that no flip leads to another payload, signature or key.
    let text = std::str::from_utf8(MANIFEST).expect("text");
    let begin = text.find("\"digest\":").expect("config digest") + "\"digest\":".len();
    let digest = begin..text.find(",\"mediaType\"").expect("end");
    let begin = text.find("\"size\":").expect("config size") + "\"size\":".len();
    let size = begin..text.find("},\"layers\"").expect("end");
    let mut taken = 0;
    for (at, bit) in (0..MANIFEST.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
        let mut flipped = MANIFEST.to_vec();
        flipped[at] ^= 1 << bit;
        let verified = release().verify(&subject(), Some(&flipped), &payloads(PAYLOAD)).is_ok();
        assert!(
            !verified || digest.contains(&at) || size.contains(&at),
            "byte {at}, bit {bit}: {}",
            String::from_utf8_lossy(&flipped)
        );
        taken += usize::from(verified);
    }
    assert!(taken < 300, "{taken} flips of the config's address");
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        fuzz_signature(&bytes);
    }

    #[test]
    fn no_mutation_of_the_golden_documents_makes_a_parser_panic(
        which in 0..4_usize, at in any::<prop::sample::Index>(), bytes in proptest::collection::vec(any::<u8>(), 0..8),
    ) {
        let mut mutated = [MANIFEST, PAYLOAD, RELEASE.as_bytes(), INDEX][which].to_vec();
        let at = at.index(mutated.len());
        let end = (at + bytes.len()).min(mutated.len());
        mutated.splice(at..end, bytes);
        fuzz_signature(&mutated);
    }

    #[test]
    fn what_is_signed_verifies_and_truncated_does_not(
        repository in "[a-z0-9]{1,8}(/[a-z0-9]{1,8}){0,3}", seed in any::<[u8; 16]>(), cut in any::<prop::sample::Index>(),
    ) {
        let signer = Signer::new("k");
        let reference: Reference = format!("reg.example:5000/{repository}:tag").parse().expect("reference");
        let subject = Subject::of(&reference, Digest::of(&seed));
        let payload = payload(&reference, &subject.digest);
        let built = add_signature(None, &payload, &signer.sign(&payload)).expect("manifest");
        let policy = signer.policy();
        prop_assert!(policy.verify(&subject, Some(&built.manifest), &payloads(&payload)).is_ok());
        let short = &built.manifest[..cut.index(built.manifest.len())];
        prop_assert!(policy.verify(&subject, Some(short), &payloads(&payload)).is_err());
        let short = &payload[..cut.index(payload.len())];
        let of_old_digest = BTreeMap::from([(Digest::of(&payload), short.to_vec())]);
        prop_assert!(policy.verify(&subject, Some(&built.manifest), &of_old_digest).is_err());
    }
}
