//! Keys, signatures and verification as an operator uses them: the `layercake` binary against the embedded registry and
//! Debian's docker-registry, with OpenSSL as a second judge of every signature.
//!
//! Needs docker-registry and openssl; says how to install them where they are missing. Loopback only.

#[path = "harness/debian.rs"]
mod debian;

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use debian::DebianRegistry;
use imagebuilder::build::{self, BuiltSet};
use imagebuilder::client::Options;
use imagebuilder::sign::key::{self, SigningKey};
use imagebuilder::{description, push, resolve, sign};
use protocol::ids::Digest;
use protocol::reference::Reference;
use protocol::signature::{ANNOTATION_SIGNATURE, signature_tag};
use serde_json::Value;
use server::registry::{RegistryStore, router};
use tempfile::TempDir;

const INSTALL: &str = "apt-get install docker-registry openssl";

/// Our registry on a port of its own, as long as the test's process lives.
struct Registry {
    _dir: TempDir,
}

impl Registry {
    fn embedded() -> (Self, SocketAddr) {
        let dir = tempfile::tempdir().expect("dir");
        let store = RegistryStore::open(dir.path()).expect("store");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        listener.set_nonblocking(true).expect("nonblocking");
        let address = listener.local_addr().expect("address");
        std::thread::spawn(move || {
            runtime().block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
                axum::serve(listener, router(store)).await.expect("serve");
            });
        });
        (Self { _dir: dir }, address)
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    runtime().block_on(work)
}

fn layercake(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_layercake"))
        .args(args)
        .current_dir(dir)
        .output()
        .expect("layercake")
}

/// Standard output of a command that succeeds.
#[track_caller]
fn good(dir: &Path, args: &[&str]) -> String {
    let output = layercake(dir, args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout).expect("text")
}

/// Standard output and error of a command that fails.
#[track_caller]
fn bad(dir: &Path, args: &[&str]) -> (String, String) {
    let output = layercake(dir, args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (text(output.stdout), text(output.stderr))
}

/// Pushes a set of two images and returns it with its reference, `http://ADDRESS/lab/demo:1`.
fn pushed(dir: &Path, address: SocketAddr) -> (BuiltSet, Reference) {
    fs::create_dir_all(dir.join("rootfs/etc")).expect("rootfs");
    fs::write(dir.join("rootfs/etc/version"), "1").expect("file");
    let text = "name = \"demo\"\nversion = \"1\"\n\
                [[image]]\nname = \"a\"\nsource = \"dir:rootfs\"\ncmd = [\"/a\"]\n\
                [[image]]\nname = \"b\"\nsource = \"dir:rootfs\"\ncmd = [\"/b\"]\n\
                [[container]]\nname = \"a\"\nimage = \"a\"\n";
    let set = description::parse(text, &dir.join("imageset.toml"), 0).expect("description");
    let built = build::to_layout_blocking(&set, &dir.join("layout")).expect("build");
    let reference: Reference = format!("http://{address}/lab/demo:1").parse().expect("reference");
    let options = Options::default();
    let sent = push::push(&built, &reference, &options, Arc::new(|_| ()));
    wait(sent).expect("push");
    (built, reference)
}

fn raw(reference: &Reference) -> Vec<u8> {
    wait(resolve::manifest(reference, &Options::default())).expect("manifest").1
}

/// `openssl dgst -verify` over every signature of a digest, by layer.
fn openssl_verdicts(dir: &Path, reference: &Reference, of: &Digest, key: &str) -> Vec<bool> {
    let manifest = raw(&reference.with_tag(&signature_tag(of)));
    let manifest: Value = serde_json::from_slice(&manifest).expect("json");
    let verdict = |layer: &Value| {
        let url =
            format!("{}/blobs/{}", reference.api_base(), layer["digest"].as_str().expect("digest"));
        let payload =
            ureq::get(url).call().expect("payload").body_mut().read_to_vec().expect("payload");
        assert_eq!(layer["digest"], Digest::of(&payload).to_string());
        assert_eq!(layer["size"], payload.len());
        let said: Value = serde_json::from_slice(&payload).expect("json");
        assert_eq!(said["critical"]["image"]["docker-manifest-digest"], of.to_string());
        let base64 = layer["annotations"][ANNOTATION_SIGNATURE].as_str().expect("annotation");
        fs::write(dir.join("payload"), payload).expect("write");
        fs::write(dir.join("der"), STANDARD.decode(base64).expect("base64")).expect("write");
        let output = Command::new("openssl")
            .args(["dgst", "-sha256", "-verify", key, "-signature", "der", "payload"])
            .current_dir(dir)
            .output()
            .unwrap_or_else(|error| panic!("openssl: {error}; {INSTALL}"));
        output.status.success()
    };
    manifest["layers"].as_array().expect("layers").iter().map(verdict).collect()
}

/// The whole life of signatures in a registry.
fn sign_and_verify_in(address: SocketAddr) {
    let dir = tempfile::tempdir().expect("dir");
    let dir = dir.path();
    let (built, reference) = pushed(dir, address);
    let target = reference.to_string();
    let index = raw(&reference);
    for name in ["old", "new"] {
        let told = good(dir, &["imageset", "keygen", name, "--json"]);
        let told: Value = serde_json::from_str(&told).expect("json");
        assert_eq!(
            (&told["private"], &told["public"]),
            (&format!("{name}.key").into(), &format!("{name}.pem").into())
        );
    }
    let verify = ["imageset", "verify", &target, "--key", "old.pem"];
    let (out, error) = bad(dir, &verify);
    assert_eq!(out.matches("is not signed; a signature by key old.pem").count(), 4, "{out}");
    assert!(error.contains("4 of 4 not signed"), "{error}");

    let sign = ["imageset", "sign", &target, "--key", "old.key", "--json"];
    let told: Value = serde_json::from_str(&good(dir, &sign)).expect("json");
    let everything: Vec<String> = built
        .manifests
        .iter()
        .chain([&built.index])
        .map(|descriptor| descriptor.digest.to_string())
        .collect();
    assert_eq!(told["added"], serde_json::json!(everything), "the index comes last");
    assert_eq!(good(dir, &verify).matches("signed by old.pem").count(), 4);
    assert_eq!(raw(&reference), index, "what is signed does not change");
    // The same key again changes nothing.
    let place = reference.with_tag(&signature_tag(&built.index.digest));
    let before = raw(&place);
    let told: Value = serde_json::from_str(&good(dir, &sign)).expect("json");
    assert_eq!(
        (told["added"].clone(), told["kept"].clone()),
        (serde_json::json!([]), serde_json::json!(everything))
    );
    assert_eq!(raw(&place), before);

    let (out, _) = bad(dir, &["imageset", "verify", &target, "--key", "new.pem", "--json"]);
    let told: Value = serde_json::from_str(&out).expect("json on stdout");
    assert_eq!(told["signed"], false);
    let reason = told["checked"][0]["reason"].as_str().expect("reason");
    assert!(reason.contains("made by none of the keys; a signature by key new.pem"), "{reason}");

    // Another signer: both stay.
    good(dir, &["imageset", "sign", &target, "--key", "new.key"]);
    for key in ["old.pem", "new.pem"] {
        good(dir, &["imageset", "verify", &target, "--key", key]);
    }
    for descriptor in built.manifests.iter().chain([&built.index]) {
        let digest = &descriptor.digest;
        assert_eq!(openssl_verdicts(dir, &reference, digest, "old.pem"), [true, false]);
        assert_eq!(openssl_verdicts(dir, &reference, digest, "new.pem"), [false, true]);
    }
    // A manifest that is not signed is noticed, and is not what a node asks for.
    let image = format!("http://{address}/lab/demo:1-a");
    good(dir, &["imageset", "verify", &image, "--key", "new.pem"]);
    let unsign =
        reference.with_tag(&signature_tag(&built.images.values().next().expect("image").digest));
    put_manifest(&unsign, br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"CONFIG","size":SIZE},"layers":[]}"#, &before);
    let (out, error) = bad(dir, &["imageset", "verify", &target, "--key", "new.pem"]);
    assert!(out.contains("is not signed") && error.contains("1 of 4 not signed"), "{out}{error}");
    good(dir, &["imageset", "verify", &target, "--key", "new.pem", "--index-only"]);
}

/// Puts a manifest with the config of another one, which the registry has.
fn put_manifest(place: &Reference, template: &[u8], like: &[u8]) {
    let like: Value = serde_json::from_slice(like).expect("json");
    let template = String::from_utf8(template.to_vec()).expect("text");
    let config = &like["config"];
    let manifest = template
        .replace("CONFIG", config["digest"].as_str().expect("digest"))
        .replace("SIZE", &config["size"].to_string());
    let url = format!("{}/manifests/{}", place.api_base(), place.manifest_key());
    let sent = ureq::put(url)
        .header("content-type", "application/vnd.oci.image.manifest.v1+json")
        .send(manifest.as_bytes());
    assert_eq!(sent.expect("put").status(), 201);
}

#[test]
fn signatures_live_in_the_embedded_registry() {
    let (_registry, address) = Registry::embedded();
    sign_and_verify_in(address);
}

#[test]
fn signatures_live_in_debians_registry() {
    let registry = DebianRegistry::open();
    sign_and_verify_in(registry.address);
}

#[test]
fn signers_at_the_same_time_all_stay() {
    let (_registry, address) = Registry::embedded();
    let dir = tempfile::tempdir().expect("dir");
    let (built, reference) = pushed(dir.path(), address);
    let keys: Vec<_> =
        (0..3).map(|n| key::generate(&dir.path().join(format!("k{n}"))).expect("key")).collect();
    let results: Vec<_> = std::thread::scope(|scope| {
        let sign = |private: &Path| {
            let key = SigningKey::read(private).expect("key");
            wait(async { sign::sign(&reference, &key, &Options::default()).await })
        };
        let threads: Vec<_> =
            keys.iter().map(|files| scope.spawn(move || sign(&files.private))).collect();
        threads.into_iter().map(|thread| thread.join().expect("thread")).collect()
    });
    // A signer that was told that it is done may still be overwritten by a later write: signing again mends it.
    for result in results {
        let done = result.is_ok() || matches!(result, Err(sign::SignError::Lost { .. }));
        assert!(done, "{result:?}");
    }
    for files in &keys {
        let key = SigningKey::read(&files.private).expect("key");
        wait(sign::sign(&reference, &key, &Options::default())).expect("alone");
    }
    for files in &keys {
        let keys = [files.key.clone()];
        let verified = wait(sign::verify(&reference, &keys, true, &Options::default()));
        assert!(verified.expect("verify").is_good());
    }
    let manifest: Value =
        serde_json::from_slice(&raw(&reference.with_tag(&signature_tag(&built.index.digest))))
            .expect("json");
    assert_eq!(manifest["layers"].as_array().expect("layers").len(), 3, "{manifest}");
}

#[test]
fn wrong_keys_and_targets_are_one_error_each() {
    let (_registry, address) = Registry::embedded();
    let dir = tempfile::tempdir().expect("dir");
    let dir = dir.path();
    let (_, reference) = pushed(dir, address);
    let target = reference.to_string();
    good(dir, &["imageset", "keygen"]);
    let missing = format!("http://{address}/lab/none:1");
    for (args, expected) in [
        (vec!["keygen"], "cannot create layercake.key: File exists"),
        (vec!["sign", &target, "--key", "none.key"], "cannot read none.key"),
        (vec!["sign", &target, "--key", "layercake.pem"], "it is a public key"),
        (
            vec!["verify", &target, "--key", "layercake.key"],
            "layercake.key is not a public key for signatures: it is a private key",
        ),
        (vec!["sign", &missing, "--key", "layercake.key"], "does not have it"),
        (vec!["verify", &missing, "--key", "layercake.pem"], "does not have it"),
        (vec!["sign", "A/b", "--key", "layercake.key"], "registry"),
    ] {
        let (out, error) = bad(dir, &[&["imageset"], &args[..]].concat());
        assert!(error.contains(expected) && out.is_empty(), "{args:?}: {out}{error}");
    }
    // What is no signature manifest is not written over.
    let place = reference.with_tag(&signature_tag(&Digest::of(&raw(&reference))));
    let index = Bytes::from(raw(&reference));
    let url = format!("{}/manifests/{}", place.api_base(), place.manifest_key());
    let kind = "application/vnd.oci.image.index.v1+json";
    ureq::put(url).header("content-type", kind).send(&index[..]).expect("put");
    let (_, error) = bad(dir, &["imageset", "sign", &target, "--key", "layercake.key"]);
    assert!(error.contains("has what signatures cannot be added to"), "{error}");
    assert_eq!(raw(&place), index);
}

/// Whether openssl takes the signature in this file, base64 of DER, over these bytes.
fn openssl_takes(dir: &Path, signature: &str, bytes: &[u8]) -> bool {
    let text = fs::read_to_string(dir.join(signature)).expect("signature");
    fs::write(dir.join("der"), STANDARD.decode(text.trim_end()).expect("base64")).expect("write");
    fs::write(dir.join("signed"), bytes).expect("write");
    let output = Command::new("openssl")
        .args(["dgst", "-sha256", "-verify", "site.pem", "-signature", "der", "signed"])
        .current_dir(dir)
        .output()
        .unwrap_or_else(|error| panic!("openssl: {error}; {INSTALL}"));
    output.status.success()
}

#[test]
fn a_layer0_and_a_sites_archive_are_signed_in_files_beside_them() {
    let dir = tempfile::tempdir().expect("dir");
    let dir = dir.path();
    good(dir, &["imageset", "keygen", "site"]);
    fs::create_dir(dir.join("layer0")).expect("directory");
    fs::write(dir.join("layer0/manifest.json"), "{}").expect("manifest");
    good(dir, &["layer0", "sign", "layer0", "--key", "site.key"]);
    assert!(openssl_takes(dir, "layer0/manifest.json.sig", b"{}"));
    assert!(!openssl_takes(dir, "layer0/manifest.json.sig", b"[]"));
    fs::write(dir.join("site.cpio.zst"), "archive").expect("archive");
    let json = good(dir, &["layer0", "sign", "site.cpio.zst", "--key", "site.key", "--json"]);
    let digest = Digest::of(b"archive");
    let said: Value = serde_json::from_str(&json).expect("json");
    assert_eq!(said["digest"], digest.to_string());
    let statement = format!("layercake overlay {digest}\n");
    assert!(openssl_takes(dir, "site.cpio.zst.sig", statement.as_bytes()));
    let (_, error) = bad(dir, &["layer0", "sign", "none.cpio", "--key", "site.key"]);
    assert!(error.contains("none.cpio"), "{error}");
}
