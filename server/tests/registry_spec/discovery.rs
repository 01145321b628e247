//! "Listing tags" and "Listing referrers".

use std::fs;

use protocol::ids::Digest;
use protocol::oci::{MEDIA_INDEX, MEDIA_MANIFEST};
use serde_json::json;

use crate::harness::{Embedded, ask, manifest};
use crate::{blob, delete, get, json, put};

/// A manifest about a subject.
fn about(config: &Digest, subject: &Digest, more: &str) -> String {
    let subject = format!(
        r#","subject":{{"mediaType":"{MEDIA_MANIFEST}","digest":"{subject}","size":2}}{more}}}"#
    );
    let mut text = manifest(config);
    text.pop();
    text + &subject
}

fn listed(registry: &Embedded, path: &str) -> Vec<String> {
    let answer = get(registry.address, path);
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, MEDIA_INDEX));
    let list = json(&answer)["manifests"].as_array().expect("list").clone();
    list.iter().map(|entry| entry["digest"].as_str().expect("digest").to_owned()).collect()
}

#[test]
fn tags_come_in_order_in_pages_and_none_for_n_0() {
    let registry = Embedded::start();
    let text = manifest(&blob(registry.address, "a", b"{}"));
    for tag in ["b", "A", "a", "1.2", "1-x", "_z"] {
        assert_eq!(put(registry.address, "a", tag, &text).status, 201);
    }
    let sorted = ["1-x", "1.2", "A", "_z", "a", "b"];
    let all = get(registry.address, "/v2/a/tags/list");
    assert_eq!(json(&all), json!({ "name": "a", "tags": sorted }));
    let (mut path, mut seen) = ("/v2/a/tags/list?n=4".to_owned(), Vec::new());
    for expected in [4, 2] {
        let page = get(registry.address, &path);
        let tags = json(&page)["tags"].as_array().expect("tags").clone();
        assert_eq!(tags.len(), expected);
        seen.extend(tags);
        let link = page.headers.get("link");
        path = link.map_or(String::new(), |link| {
            let (path, rest) =
                link.strip_prefix('<').and_then(|l| l.split_once('>')).expect("link");
            assert_eq!(rest, "; rel=\"next\"");
            path.to_owned()
        });
    }
    assert_eq!((seen, path.as_str()), (sorted.map(serde_json::Value::from).to_vec(), ""));
    let none = get(registry.address, "/v2/a/tags/list?n=0");
    assert_eq!((json(&none)["tags"].clone(), none.headers.get("link")), (json!([]), None));
    let rest = get(registry.address, "/v2/a/tags/list?last=_z");
    assert_eq!(json(&rest)["tags"], json!(["a", "b"]));
}

#[test]
fn referrers_are_listed_with_type_and_annotations_and_filtered() {
    let registry = Embedded::start();
    let config = blob(registry.address, "a", b"{}");
    let image = manifest(&config);
    let subject = Digest::of(image.as_bytes());
    let path = format!("/v2/a/referrers/{subject}");
    assert_eq!(listed(&registry, &path), Vec::<String>::new(), "no repository, but no 404");

    // Before its subject, as the spec allows.
    let more = r#","artifactType":"application/x-sbom+json","annotations":{"k":"v"}"#;
    let sbom = about(&config, &subject, more);
    let pushed = put(registry.address, "a", &Digest::of(sbom.as_bytes()).to_string(), &sbom);
    assert_eq!((pushed.status, &pushed.headers["oci-subject"]), (201, &subject.to_string()));
    let plain = put(registry.address, "a", "1", &image);
    assert_eq!((plain.status, plain.headers.get("oci-subject")), (201, None));
    let other = about(&config, &subject, "");
    assert_eq!(put(registry.address, "a", "other", &other).status, 201);

    let answer = get(registry.address, &path);
    assert_eq!(answer.headers.get("oci-filters-applied"), None);
    let mut expected = vec![
        json!({
            "mediaType": MEDIA_MANIFEST, "digest": Digest::of(sbom.as_bytes()), "size": sbom.len(),
            "artifactType": "application/x-sbom+json", "annotations": { "k": "v" },
        }),
        json!({
            "mediaType": MEDIA_MANIFEST, "digest": Digest::of(other.as_bytes()), "size": other.len(),
            "artifactType": "application/vnd.oci.image.config.v1+json",
        }),
    ];
    expected.sort_by_key(|entry| entry["digest"].as_str().map(str::to_owned));
    assert_eq!(
        json(&answer),
        json!({ "schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": expected })
    );
    let filter = format!("{path}?artifactType=application%2Fx-sbom%2Bjson");
    let filtered = get(registry.address, &filter);
    assert_eq!(filtered.headers["oci-filters-applied"], "artifactType");
    assert_eq!(listed(&registry, &filter), [Digest::of(sbom.as_bytes()).to_string()]);
    assert_eq!(listed(&registry, &format!("{path}?artifactType=x")), Vec::<String>::new());

    let page = get(registry.address, &format!("{path}?n=1"));
    let link = &page.headers["link"];
    let next = link.strip_prefix('<').and_then(|l| l.split_once('>')).expect("link").0;
    let both = [listed(&registry, &format!("{path}?n=1")), listed(&registry, next)].concat();
    assert_eq!(both, listed(&registry, &path));
    assert_eq!(get(registry.address, next).headers.get("link"), None);

    for wrong in ["sha256:zz", "1", "sha512:00"] {
        let answer = get(registry.address, &format!("/v2/a/referrers/{wrong}"));
        assert_eq!((answer.status, answer.code().as_str()), (400, "DIGEST_INVALID"));
    }
    let gone = Digest::of(sbom.as_bytes());
    assert_eq!(delete(registry.address, &format!("/v2/a/manifests/{gone}")).status, 202);
    assert_eq!(listed(&registry, &path), [Digest::of(other.as_bytes()).to_string()]);
}

#[test]
fn a_large_list_of_referrers_comes_in_pages_that_clients_take() {
    let registry = Embedded::start();
    let config = blob(registry.address, "a", b"{}");
    let subject = Digest::of(b"subject");
    let mut pushed = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        let more = format!(r#","annotations":{{"{name}":"{}"}}"#, "x".repeat(1 << 20));
        let text = about(&config, &subject, &more);
        assert_eq!(put(registry.address, "a", name, &text).status, 201);
        pushed.push(Digest::of(text.as_bytes()).to_string());
    }
    pushed.sort();
    let (mut seen, mut path) = (Vec::new(), format!("/v2/a/referrers/{subject}"));
    while !path.is_empty() {
        let page = get(registry.address, &path);
        assert!(page.body.len() <= 4 << 20, "{} bytes", page.body.len());
        seen.extend(listed(&registry, &path));
        let link =
            page.headers.get("link").and_then(|link| link.strip_prefix('<')?.split_once('>'));
        path = link.map_or(String::new(), |(path, _)| path.to_owned());
    }
    assert_eq!(seen, pushed);
}

#[test]
fn what_was_pushed_before_there_was_a_list_is_listed_after_a_restart() {
    let registry = Embedded::start();
    let config = blob(registry.address, "a/b", b"{}");
    let subject = Digest::of(b"subject");
    let text = about(&config, &subject, "");
    assert_eq!(put(registry.address, "a/b", "1", &text).status, 201);
    // As a store of an older version is.
    let dir = registry.dir.path();
    fs::remove_dir_all(dir.join("repositories/a/b/_referrers")).expect("entries");
    fs::remove_file(dir.join("referrers-indexed")).expect("marker");
    let path = format!("/v2/a/b/referrers/{subject}");
    assert_eq!(listed(&registry, &path), Vec::<String>::new());
    let registry = registry.restart();
    assert_eq!(listed(&registry, &path), [Digest::of(text.as_bytes()).to_string()]);
    let tag = format!("/v2/a/b/manifests/sha256-{}", subject.hex());
    let fallback = ask(registry.address, "GET", &tag, "", b"");
    assert_eq!(fallback.status, 404, "clients need no list under a tag");
}
