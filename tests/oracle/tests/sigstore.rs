//! The sigstore crate verifies what we sign and signs what we verify, in Debian's docker-registry; and over a matrix of lies
//! both come to the verdict that is expected, ours stricter where SECURITY wants it so.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use imagebuilder::build::{self, BuiltSet};
use imagebuilder::client::Options;
use imagebuilder::sign::key::{self, SigningKey};
use imagebuilder::{description, push, sign};
use protocol::ids::Digest;
use protocol::oci::{MEDIA_LAYER_TAR, MEDIA_MANIFEST};
use protocol::reference::Reference;
use protocol::signature::{ANNOTATION_SIGNATURE, add_signature, payload, signature_tag};
use serde_json::{Value, json};
use sigstore::cosign::constraint::PrivateKeySigner;
use sigstore::cosign::verification_constraint::{PublicKeyVerifier, VerificationConstraint};
use sigstore::cosign::{
    Client, ClientBuilder, Constraint, CosignCapabilities, SignatureLayer, verify_constraints,
};
use sigstore::crypto::SigningScheme;
use sigstore::registry::{Auth, ClientConfig, ClientProtocol, OciReference};
use tempfile::TempDir;

/// Debian's docker-registry with a set in it, `http://ADDRESS/lab/demo:1`.
struct Bench {
    child: Child,
    dir: TempDir,
    built: BuiltSet,
    reference: Reference,
}

impl Bench {
    fn start() -> Self {
        // Two providers are linked in here, so that rustls has no default one. Err: another test was first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().expect("dir");
        let config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n",
            dir.path().join("data").display()
        );
        fs::write(dir.path().join("config.yml"), config).expect("config");
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry (apt-get install docker-registry)");
        let log = child.stderr.take().expect("stderr");
        let (tell, told) = std::sync::mpsc::channel();
        // Reads on to the end, so that the registry never writes into a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                let address = line.split("listening on ").nth(1);
                let end = |c: char| !(c.is_ascii_digit() || c == '.' || c == ':');
                if let Some(address) = address.and_then(|rest| rest.split(end).next()) {
                    let _ = tell.send(address.to_owned());
                }
            }
        });
        let address = told.recv_timeout(Duration::from_secs(60)).expect("its address");
        let built = build_set(dir.path());
        let reference = format!("http://{address}/lab/demo:1").parse().expect("reference");
        let options = Options::default();
        let sent = push::push(&built, &reference, &options, Arc::new(|_| ()));
        wait(sent).expect("push");
        Self { child, dir, built, reference }
    }

    /// Whether sigstore finds a signature by this key.
    fn sigstore_verifies(&self, digest: &Digest, key: &str) -> bool {
        let image = self.image(digest);
        let layers = wait(client().trusted_signature_layers(&Auth::Anonymous, &image));
        let layers = layers.expect("layers");
        let scheme = SigningScheme::ECDSA_P256_SHA256_ASN1;
        let verifier = PublicKeyVerifier::new(key.as_bytes(), &scheme).expect("key");
        let constraints: [Box<dyn VerificationConstraint>; 1] = [Box::new(verifier)];
        !layers.is_empty() && verify_constraints(&layers, constraints.iter()).is_ok()
    }

    /// Whether we find one, and why not.
    fn we_verify(&self, digest: &Digest, key: &str) -> Result<(), String> {
        let path = self.dir.path().join("asked.pem");
        fs::write(&path, key).expect("write");
        let keys = [key::read_public(&path).expect("key")];
        let reference = self.reference.with_digest(*digest);
        let verified = wait(sign::verify(&reference, &keys, false, &Options::default()));
        let checked = verified.expect("verify").checked.remove(0);
        checked.verdict.map(drop).map_err(|error| error.to_string())
    }

    fn image(&self, digest: &Digest) -> OciReference {
        let Reference { registry, repository, .. } = self.reference.clone();
        OciReference::with_digest(registry, repository, digest.to_string())
    }

    /// A key pair: what signs, and the public half.
    fn key(&self, name: &str) -> (SigningKey, String) {
        let files = key::generate(&self.dir.path().join(name)).expect("key");
        (SigningKey::read(&files.private).expect("key"), files.key.to_pem())
    }

    fn push_blob(&self, bytes: &[u8]) {
        let start = format!("{}/blobs/uploads/", self.reference.api_base());
        let answer = ureq::post(start).send_empty().expect("upload");
        let place = answer.headers()["location"].to_str().expect("location");
        let url = format!("{place}&digest={}", Digest::of(bytes));
        let kind = "application/octet-stream";
        ureq::put(url).header("content-type", kind).send(bytes).expect("blob");
    }

    /// Puts a payload and its signature in place, the manifest changed at will.
    fn publish(&self, of: &Digest, payload: &[u8], der: &[u8], change: &dyn Fn(&mut Value)) {
        let built = add_signature(None, payload, der).expect("manifest");
        let mut manifest: Value = serde_json::from_slice(&built.manifest).expect("json");
        change(&mut manifest);
        self.push_blob(payload);
        self.push_blob(&built.config);
        let url = format!("{}/manifests/{}", self.reference.api_base(), signature_tag(of));
        let sent = ureq::put(url).header("content-type", MEDIA_MANIFEST);
        sent.send(manifest.to_string().as_bytes()).expect("manifest");
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn build_set(dir: &Path) -> BuiltSet {
    fs::create_dir_all(dir.join("rootfs")).expect("rootfs");
    fs::write(dir.join("rootfs/a"), "a").expect("file");
    let text = "name = \"demo\"\nversion = \"1\"\n\
                [[image]]\nname = \"a\"\nsource = \"dir:rootfs\"\ncmd = [\"/a\"]\n\
                [[container]]\nname = \"a\"\nimage = \"a\"\n";
    let set = description::parse(text, &dir.join("imageset.toml"), 0).expect("description");
    build::to_layout_blocking(&set, &dir.join("layout")).expect("build")
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("runtime").block_on(work)
}

fn client() -> Client {
    let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
    ClientBuilder::default().with_oci_client_config(config).build().expect("client")
}

#[test]
fn sigstore_verifies_what_we_sign_the_index_and_every_manifest() {
    let bench = Bench::start();
    let ((key, public), (_, other)) = (bench.key("site"), bench.key("other"));
    let digests: Vec<Digest> = bench
        .built
        .manifests
        .iter()
        .chain([&bench.built.index])
        .map(|entry| entry.digest)
        .collect();
    for digest in &digests {
        assert!(!bench.sigstore_verifies(digest, &public), "{digest} is not signed yet");
    }
    let signed = wait(sign::sign(&bench.reference, &key, &Options::default())).expect("sign");
    assert_eq!(signed.added, digests);
    for digest in &digests {
        assert!(bench.sigstore_verifies(digest, &public), "{digest}");
        assert!(!bench.sigstore_verifies(digest, &other), "{digest} by another key");
    }
}

#[test]
fn we_verify_what_sigstore_signs_and_both_signatures_stay() {
    let bench = Bench::start();
    let digest = bench.built.index.digest;
    let signer = SigningScheme::ECDSA_P256_SHA256_ASN1.create_signer().expect("signer");
    let theirs = signer.to_sigstore_keypair().expect("pair").public_key_to_pem().expect("pem");
    let image = bench.image(&digest);
    let mut layer = SignatureLayer::new_unsigned(&image, &digest.to_string()).expect("layer");
    let signer = PrivateKeySigner::new_with_signer(signer);
    assert!(signer.add_constraint(&mut layer).expect("sign"));
    let (place, _) = wait(client().triangulate(&image, &Auth::Anonymous)).expect("place");
    assert!(place.to_string().ends_with(&signature_tag(&digest)), "{place}");
    wait(client().push_signature(None, &Auth::Anonymous, &place, vec![layer])).expect("push");
    bench.we_verify(&digest, &theirs).expect("sigstore's signature");

    let (key, ours) = bench.key("site");
    let error = bench.we_verify(&digest, &ours).expect_err("not signed by us yet");
    assert!(error.contains("made by none of the keys"), "{error}");
    wait(sign::sign(&bench.reference, &key, &Options::default())).expect("sign");
    for public in [&theirs, &ours] {
        bench.we_verify(&digest, public).expect("we");
        assert!(bench.sigstore_verifies(&digest, public), "sigstore");
    }
}

/// What a case expects of us and of sigstore.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Expect {
    BothTake,
    BothRefuse,
    /// Where ours is stricter on purpose.
    OnlySigstoreTakes,
}

#[test]
fn over_a_matrix_of_lies_both_come_to_the_expected_verdict() {
    use Expect::{BothRefuse, BothTake, OnlySigstoreTakes};
    let bench = Bench::start();
    let digest = bench.built.index.digest;
    let ((key, public), (other, _)) = (bench.key("site"), bench.key("other"));
    let good = payload(&bench.reference, &digest);
    let text = String::from_utf8(good.clone()).expect("text");
    let changed = |from: &str, to: &str| {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from}");
        changed.into_bytes()
    };
    let signed = |payload: Vec<u8>| {
        let der = key.sign(&payload).expect("sign");
        (payload, der)
    };
    let der = key.sign(&good).expect("sign");
    let mut flipped = der.clone();
    *flipped.last_mut().expect("byte") ^= 1;
    let registry = bench.reference.registry.clone();
    let cases: Vec<(&str, (Vec<u8>, Vec<u8>), &dyn Fn(&mut Value), Expect)> = vec![
        ("as it should be", signed(good.clone()), &|_| (), BothTake),
        ("claims of the signer", signed(changed("null", "{\"a\":\"b\"}")), &|_| (), BothTake),
        ("white space", signed(changed("\":", "\": ")), &|_| (), BothTake),
        ("another host", signed(changed(&registry, "mirror.example")), &|_| (), BothTake),
        ("another key", (good.clone(), other.sign(&good).expect("sign")), &|_| (), BothRefuse),
        ("a flipped bit of the signature", (good.clone(), flipped), &|_| (), BothRefuse),
        ("no signature", (good.clone(), Vec::new()), &|_| (), BothRefuse),
        ("r and s without DER", (good.clone(), vec![7; 64]), &|_| (), BothRefuse),
        ("another payload", (changed("null", "{}"), der.clone()), &|_| (), BothRefuse),
        (
            "another digest",
            signed(changed(&digest.hex(), &Digest::of(b"other").hex())),
            &|_| (),
            BothRefuse,
        ),
        (
            "the spec page's spelling",
            signed(changed("docker-manifest-digest", "Docker-manifest-digest")),
            &|_| (),
            BothRefuse,
        ),
        ("another type", signed(changed("cosign container", "some")), &|_| (), OnlySigstoreTakes),
        (
            "another repository",
            signed(changed("lab/demo", "prod/demo")),
            &|_| (),
            OnlySigstoreTakes,
        ),
        (
            "another media type",
            signed(good.clone()),
            &|manifest| manifest["layers"][0]["mediaType"] = json!(MEDIA_LAYER_TAR),
            BothRefuse,
        ),
        (
            "no annotation",
            signed(good.clone()),
            &|manifest| manifest["layers"][0]["annotations"] = json!({}),
            BothRefuse,
        ),
        (
            "a signature that is not base64",
            signed(good.clone()),
            &|manifest| {
                let text = format!("?{}", STANDARD.encode(b"x"));
                manifest["layers"][0]["annotations"][ANNOTATION_SIGNATURE] = json!(text);
            },
            BothRefuse,
        ),
    ];
    for (name, (payload, der), change, expected) in cases {
        bench.publish(&digest, &payload, &der, change);
        let ours = bench.we_verify(&digest, &public);
        let theirs = bench.sigstore_verifies(&digest, &public);
        let found = match (&ours, theirs) {
            (Ok(()), true) => Some(BothTake),
            (Err(_), false) => Some(BothRefuse),
            (Err(_), true) => Some(OnlySigstoreTakes),
            (Ok(()), false) => None,
        };
        assert_eq!(found, Some(expected), "{name}: {ours:?}, sigstore {theirs}");
    }
}
