//! "Pushing blobs" and "Pushing manifests": chunks, places, lengths; uploads over a restart; mounts.

use protocol::ids::Digest;

use crate::harness::{Embedded, ask, begin, manifest};
use crate::{blob, get, put};

#[test]
fn a_chunk_is_taken_only_where_and_as_long_as_its_content_range_says() {
    let registry = Embedded::start();
    let at = begin(&registry, "a");
    for (method, range, body, status, there) in [
        ("PATCH", "content-range: 1-2\r\n", "bc", 416, "0-0"),
        ("PATCH", "content-range: 0-1\r\n", "ab", 202, "0-1"),
        ("PATCH", "content-range: 0-1\r\n", "ab", 416, "0-1"),
        ("PATCH", "content-range: 3-4\r\n", "de", 416, "0-1"),
        ("PATCH", "content-range: 2-2\r\n", "cd", 400, ""),
        ("PATCH", "content-range: 2-9\r\n", "cd", 400, ""),
        ("PATCH", "content-range: x\r\n", "cd", 400, ""),
        ("PATCH", "content-range: 2-1\r\n", "cd", 400, ""),
        ("PATCH", "content-range: 0-99999999999999999999\r\n", "cd", 400, ""),
        ("PATCH", "content-range: 2-3\r\n", "cd", 202, "0-3"),
        ("PATCH", "", "ef", 202, "0-5"),
    ] {
        let answer = ask(registry.address, method, &at, range, body.as_bytes());
        let range = answer.headers.get("range").map_or("", String::as_str);
        assert_eq!((answer.status, range), (status, there), "{method} {range} {body}");
    }
    let digest = Digest::of(b"abcdefgh");
    let path = format!("{at}?digest={digest}");
    let early = ask(registry.address, "PUT", &path, "content-range: 5-6\r\n", b"gh");
    assert_eq!((early.status, early.headers["range"].as_str()), (416, "0-5"));
    let done = ask(registry.address, "PUT", &path, "content-range: 6-7\r\n", b"gh");
    assert_eq!((done.status, &done.headers["location"]), (201, &format!("/v2/a/blobs/{digest}")));
    assert_eq!(get(registry.address, &done.headers["location"]).body, b"abcdefgh");
}

#[test]
fn a_chunk_of_unknown_length_that_is_not_what_it_says_leaves_nothing() {
    let registry = Embedded::start();
    let at = begin(&registry, "a");
    assert_eq!(ask(registry.address, "PATCH", &at, "content-range: 0-1\r\n", b"ab").status, 202);
    for range in ["2-2", "2-9"] {
        let head = format!("content-range: {range}\r\ntransfer-encoding: chunked\r\n");
        let answer = crate::harness::ask_raw(
            registry.address,
            format!("PATCH {at} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}\r\n4\r\ncdef\r\n0\r\n\r\n").as_bytes(),
        );
        assert_eq!((answer.status, answer.code().as_str()), (400, "SIZE_INVALID"), "{range}");
        let status = get(registry.address, &at);
        assert_eq!((status.status, status.headers["range"].as_str()), (204, "0-1"));
    }
    let digest = Digest::of(b"abcd");
    let path = format!("{at}?digest={digest}");
    assert_eq!(ask(registry.address, "PUT", &path, "", b"cd").status, 201);
}

#[test]
fn an_upload_goes_on_after_a_restart_and_its_whole_content_is_checked() {
    let registry = Embedded::start();
    let (good, bad) = (begin(&registry, "a"), begin(&registry, "a/b"));
    for at in [&good, &bad] {
        assert_eq!(ask(registry.address, "PATCH", at, "", &[7; 3_000_000]).status, 202);
    }
    let registry = registry.restart();
    let status = get(registry.address, &good);
    assert_eq!((status.status, status.headers["range"].as_str()), (204, "0-2999999"));
    let whole = [vec![7; 3_000_000], vec![8; 10]].concat();
    let path = format!("{good}?digest={}", Digest::of(&whole));
    assert_eq!(ask(registry.address, "PUT", &path, "", &[8; 10]).status, 201);
    let path = format!("{bad}?digest={}", Digest::of(&[8; 10]));
    assert_eq!(ask(registry.address, "PUT", &path, "", &[8; 10]).code(), "DIGEST_INVALID");
    assert_eq!(get(registry.address, &bad).code(), "BLOB_UPLOAD_UNKNOWN");
    assert_eq!(registry.blobs(), [Digest::of(&whole).hex()]);
}

#[test]
fn a_mount_without_its_blob_or_source_begins_an_upload() {
    let registry = Embedded::start();
    let digest = blob(registry.address, "a", b"content");
    let mount = |query: &str| {
        ask(registry.address, "POST", &format!("/v2/b/blobs/uploads/?{query}"), "", b"")
    };
    let other = Digest::of(b"other");
    for query in [format!("mount={digest}"), format!("mount={other}&from=a")] {
        let answer = mount(&query);
        assert_eq!(answer.status, 202, "{query}");
        assert!(answer.headers["location"].starts_with("/v2/b/blobs/uploads/"));
    }
    let mounted = mount(&format!("mount={digest}&from=a"));
    assert_eq!(mounted.status, 201);
    assert_eq!(get(registry.address, &mounted.headers["location"]).body, b"content");
    assert_eq!(mount("mount=sha256:zz&from=a").code(), "DIGEST_INVALID");
}

#[test]
fn empty_content_is_content() {
    let registry = Embedded::start();
    let digest = blob(registry.address, "a", b"");
    let path = format!("/v2/a/blobs/{digest}");
    let whole = get(registry.address, &path);
    assert_eq!((whole.status, whole.headers["content-length"].as_str()), (200, "0"));
    let range = ask(registry.address, "GET", &path, "range: bytes=0-\r\n", b"");
    assert_eq!((range.status, range.headers["content-range"].as_str()), (416, "bytes */0"));
}

#[test]
fn a_manifest_comes_back_byte_for_byte_with_the_type_it_was_pushed_with() {
    let registry = Embedded::start();
    let config = blob(registry.address, "a", b"{}");
    let text = format!("\n  {}\n", manifest(&config));
    let parameters = "content-type: application/vnd.oci.image.manifest.v1+json; charset=utf-8\r\n";
    let put = ask(registry.address, "PUT", "/v2/a/manifests/1", parameters, text.as_bytes());
    assert_eq!(put.status, 201);
    let got = get(registry.address, &put.headers["location"]);
    assert_eq!(got.body, text.as_bytes());
    assert_eq!(got.headers["content-type"], "application/vnd.oci.image.manifest.v1+json");
    let etag = format!("if-none-match: {}\r\n", got.headers["etag"]);
    let same = ask(registry.address, "GET", "/v2/a/manifests/1", &etag, b"");
    assert_eq!((same.status, same.body.len()), (304, 0));
}

#[test]
fn hostile_manifests_are_refused_in_the_form_of_the_spec() {
    let registry = Embedded::start();
    let deep = "[".repeat(2_000_000);
    let wide = format!("{{\"a\":[{}1]}}", "1,".repeat(1_000_000));
    let twice = r#"{"schemaVersion":2,"schemaVersion":2}"#;
    for text in [&deep, &wide, twice, "\u{0}", "{\"config\":", "[]", "\"\""] {
        let answer = put(registry.address, "a", "1", text);
        assert_eq!((answer.status, answer.code().as_str()), (400, "MANIFEST_INVALID"));
    }
    assert_eq!(get(registry.address, "/v2/a/tags/list").status, 404);
    assert_eq!(registry.blobs(), Vec::<String>::new());
}
