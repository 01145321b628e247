//! "Content management": deleting tags, manifests and blobs; and "Error codes".

use protocol::ids::Digest;

use crate::harness::{Embedded, ask, manifest};
use crate::{blob, delete, get, json, put};

#[test]
fn a_tag_goes_alone_and_a_manifest_with_all_its_tags() {
    let registry = Embedded::start();
    let text = manifest(&blob(registry.address, "a", b"{}"));
    let digest = Digest::of(text.as_bytes());
    for tag in ["1", "2", "3"] {
        assert_eq!(put(registry.address, "a", tag, &text).status, 201);
    }
    let at = |key: &str| format!("/v2/a/manifests/{key}");
    let by_digest = at(&digest.to_string());
    assert_eq!(delete(registry.address, &at("1")).status, 202);
    assert_eq!(get(registry.address, &at("1")).code(), "MANIFEST_UNKNOWN");
    assert_eq!(delete(registry.address, &at("1")).status, 404);
    assert_eq!(get(registry.address, &by_digest).status, 200);
    assert_eq!(delete(registry.address, &by_digest).status, 202);
    for path in [&by_digest, &at("2"), &at("3")] {
        assert_eq!(get(registry.address, path).code(), "MANIFEST_UNKNOWN", "{path}");
    }
    assert_eq!(delete(registry.address, &by_digest).status, 404);
    assert_eq!(json(&get(registry.address, "/v2/a/tags/list"))["tags"], serde_json::json!([]));
    let nowhere = format!("/v2/nowhere/manifests/{digest}");
    assert_eq!(delete(registry.address, &nowhere).status, 404);
    assert_eq!(put(registry.address, "a", "1", &text).status, 201, "its blobs are still there");
}

#[test]
fn a_blob_goes_from_one_repository_only() {
    let registry = Embedded::start();
    let digest = blob(registry.address, "a", b"content");
    blob(registry.address, "b", b"content");
    let at = |repository: &str| format!("/v2/{repository}/blobs/{digest}");
    assert_eq!(delete(registry.address, &at("a")).status, 202);
    assert_eq!(get(registry.address, &at("a")).code(), "BLOB_UNKNOWN");
    let again = delete(registry.address, &at("a"));
    assert_eq!((again.status, again.code().as_str()), (404, "BLOB_UNKNOWN"));
    assert_eq!(get(registry.address, &at("b")).body, b"content");
}

#[test]
fn every_refusal_has_the_form_of_the_spec() {
    let registry = Embedded::start();
    let digest = Digest::of(b"nothing");
    let cases = [
        ("GET", format!("/v2/a/blobs/{digest}"), 404, "BLOB_UNKNOWN"),
        ("GET", "/v2/a/blobs/sha256:1".to_owned(), 400, "DIGEST_INVALID"),
        ("GET", "/v2/a/manifests/x".to_owned(), 404, "MANIFEST_UNKNOWN"),
        ("GET", format!("/v2/a/manifests/{digest}"), 404, "MANIFEST_UNKNOWN"),
        ("GET", "/v2/a/tags/list".to_owned(), 404, "NAME_UNKNOWN"),
        ("GET", "/v2/A/tags/list".to_owned(), 400, "NAME_INVALID"),
        ("PATCH", "/v2/a/blobs/uploads/1".to_owned(), 404, "BLOB_UPLOAD_UNKNOWN"),
        ("PUT", format!("/v2/a/blobs/uploads/1?digest={digest}"), 404, "BLOB_UPLOAD_UNKNOWN"),
        ("DELETE", "/v2/a/blobs/uploads/1".to_owned(), 404, "BLOB_UPLOAD_UNKNOWN"),
        ("DELETE", "/v2/a/tags/list".to_owned(), 405, "UNSUPPORTED"),
        ("POST", "/v2/".to_owned(), 405, "UNSUPPORTED"),
        ("GET", "/v2/a/what".to_owned(), 404, "NOT_FOUND"),
    ];
    for (method, path, status, code) in cases {
        let answer = ask(registry.address, method, &path, "", b"");
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{method} {path}");
        let error = &json(&answer)["errors"][0];
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
        assert_eq!(answer.headers["content-type"], "application/json");
    }
}
