//! The embedded registry over real connections, beside Debian's docker-registry, with our own push and Debian's tools.
//!
//! Needs skopeo, umoci, podman, docker-registry, mkfs.erofs and mksquashfs; says how to install them where they are missing. Loopback only.

#[path = "harness/registry.rs"]
mod harness;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use imagebuilder::build::{self, BuiltSet};
use imagebuilder::client::Options;
use imagebuilder::{description, push, resolve};
use protocol::ids::Digest;
use protocol::oci;
use protocol::reference::Reference;
use server::registry::RegistryStore;

use harness::{Debian, Embedded, MANIFEST_TYPE, ask, begin, manifest, run, runtime, upload};

fn example(dir: &Path, version: &str) -> BuiltSet {
    let etc = dir.join("rootfs/etc");
    fs::create_dir_all(&etc).expect("rootfs");
    fs::write(etc.join("version"), version).expect("file");
    // More than one chunk, and not compressible.
    let mut seed = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed.to_be_bytes()[0]
    })
    .take(3 << 20)
    .collect();
    fs::write(dir.join("rootfs/noise"), noise).expect("file");
    let image = |name: &str, more: &str| {
        format!(
            "[[image]]\nname = \"{name}\"\nsource = \"dir:rootfs\"\ncmd = [\"/{name}\"]\n{more}\n"
        )
    };
    let text = format!(
        "name = \"demo\"\nversion = \"{version}\"\n{}{}[[container]]\nname = \"a\"\nimage = \"a\"\n",
        image("a", "mount = [\"erofs\", \"squashfs\"]"),
        image("b", "compression = \"zstd\"")
    );
    let set = description::parse(&text, &dir.join("imageset.toml"), 0).expect("description");
    build::to_layout_blocking(&set, &dir.join("layout")).expect("build")
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    runtime().block_on(work)
}

/// Pushes, resolves, and lets skopeo and umoci read what was pushed.
fn push_and_read_back(address: SocketAddr) {
    let dir = tempfile::tempdir().expect("dir");
    let built = example(dir.path(), "1");
    let reference: Reference = format!("http://{address}/demo").parse().expect("reference");
    let told = Arc::new(AtomicU64::new(0));
    let teller = Arc::clone(&told);
    let on_progress: push::OnProgress = Arc::new(move |progress| {
        teller.store(progress.sent + progress.skipped, Ordering::Relaxed);
    });
    let options = Options::default();
    let send = || push::push(&built, &reference, &options, Arc::clone(&on_progress));
    let pushed = wait(send()).expect("push");
    assert_eq!(pushed.digest, built.index.digest);
    assert_eq!(pushed.reference.to_string(), format!("http://{address}/demo:1@{}", pushed.digest));
    assert_eq!(told.load(Ordering::Relaxed), pushed.progress.total);
    let again = wait(send()).expect("push again");
    assert_eq!((again.progress.sent, again.progress.skipped), (0, again.progress.total));

    let resolved = wait(resolve::digest(&reference.with_tag("1"))).expect("resolve");
    assert_eq!(resolved, built.index.digest);
    let (_, index) =
        wait(resolve::manifest(&pushed.reference, &Options::default())).expect("index");
    let entries = oci::resolve_set(&oci::parse_index(&index).expect("index"), "amd64");
    let entries = entries.expect("ImageSet");
    assert_eq!(entries.images, built.images);
    let forms: Vec<_> = entries.mounts.values().flatten().collect();
    assert_eq!(forms.iter().map(|it| it.image.as_str()).collect::<Vec<_>>(), ["a", "a"]);
    let last = built.manifests.iter().rev().take(2).rev();
    assert!(forms.iter().map(|it| &it.manifest).eq(last), "mount forms come last");
    for (name, image) in &built.images {
        let tag = build::image_tag(&built.set, name);
        let found = wait(resolve::digest(&reference.with_tag(&tag))).expect("image tag");
        assert_eq!(found, image.digest);
    }

    let remote = |tag: &str| format!("docker://{address}/demo:{tag}");
    let raw = run(Command::new("skopeo")
        .args(["inspect", "--raw", "--tls-verify=false"])
        .arg(remote("1")));
    assert_eq!(Digest::of(raw.as_bytes()), built.index.digest);
    let image =
        run(Command::new("skopeo").args(["inspect", "--tls-verify=false"]).arg(remote("1-a")));
    assert!(image.contains("amd64"), "{image}");
    let copy = dir.path().join("copy");
    run(Command::new("skopeo")
        .args(["copy", "--all", "--src-tls-verify=false"])
        .arg(remote("1"))
        .arg(format!("oci:{}:1", copy.display())));
    let copied = BuiltSet::open(&copy, None).expect("the copy is an ImageSet");
    assert_eq!(copied.index.digest, built.index.digest);
    let one = dir.path().join("one");
    run(Command::new("skopeo")
        .args(["copy", "--src-tls-verify=false"])
        .arg(remote("1-a"))
        .arg(format!("oci:{}:a", one.display())));
    let bundle = dir.path().join("bundle");
    run(Command::new("umoci")
        .args(["unpack", "--rootless", "--image"])
        .arg(format!("{}:a", one.display()))
        .arg(&bundle));
    assert_eq!(fs::read_to_string(bundle.join("rootfs/etc/version")).expect("version"), "1");
    let podman = |args: &[&str]| {
        let mut podman = Command::new("podman");
        podman.arg("--root").arg(dir.path().join("podman"));
        podman.arg("--runroot").arg(dir.path().join("run"));
        podman.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]);
        run(podman.args(args))
    };
    // The image by its tag, and out of the whole set: podman takes the first that is for this platform.
    for tag in ["1-a", "1"] {
        podman(&["pull", "--quiet", "--tls-verify=false", &format!("{address}/demo:{tag}")]);
    }
}

#[test]
fn a_set_is_pushed_to_the_embedded_registry_and_read_by_skopeo_and_umoci() {
    let registry = Embedded::start();
    push_and_read_back(registry.address);
    assert_eq!(registry.store.repositories().expect("repositories"), ["demo"]);
    assert_eq!(registry.store.tags("demo").expect("tags"), ["1", "1-a", "1-b"]);
    let digest = registry.store.resolve_tag("demo", "1").expect("tag").expect("there");
    let index = registry.store.manifest("demo", &digest).expect("manifest").expect("there");
    assert_eq!(Digest::of(&index), digest);
    // What a tag refers to stays, mount forms and their blobs too.
    let report = registry.store.collect(&BTreeSet::new(), Duration::ZERO, false).expect("collect");
    assert_eq!((report.manifests.len(), report.blobs), (0, 0), "{report:?}");
    assert_eq!(registry.store.resolve_tag("demo", "2").expect("tag"), None);
    assert!(registry.store.resolve_tag("../demo", "1").is_err());
}

#[test]
fn a_set_is_pushed_to_debians_registry_and_read_by_skopeo_and_umoci() {
    push_and_read_back(Debian::open().address);
}

#[test]
fn skopeo_copies_a_set_into_the_embedded_registry() {
    let registry = Embedded::start();
    let dir = tempfile::tempdir().expect("dir");
    let built = example(dir.path(), "1");
    run(Command::new("skopeo")
        .args(["copy", "--all", "--dest-tls-verify=false"])
        .arg(format!("oci:{}:1", built.layout.display()))
        .arg(format!("docker://{}/a/b:7", registry.address)));
    let found = registry.store.resolve_tag("a/b", "7").expect("tag");
    assert_eq!(found, Some(built.index.digest));
}

#[test]
fn an_unreachable_registry_is_one_error_with_url_and_cause() {
    let free = TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address");
    let dir = tempfile::tempdir().expect("dir");
    let built = example(dir.path(), "1");
    let reference: Reference = format!("http://{free}/demo").parse().expect("reference");
    let options = Options { attempts: 2, ..Options::default() };
    let error = wait(push::push(&built, &reference, &options, Arc::new(|_| {})));
    let error = error.expect_err("nobody listens").to_string();
    assert!(
        error.contains(&format!("registry http://{free}/v2/demo cannot be reached: ")),
        "{error}"
    );
    assert!(error.contains("Connection refused"), "{error}");
}

/// Answers `/v2/` with 200, every other request with the next of these statuses, and closes each time.
fn broken_registry(statuses: &'static [u16]) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address");
    let (asked, mut left) = (Arc::new(AtomicU64::new(0)), statuses.iter().copied());
    let counter = Arc::clone(&asked);
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let mut reader = BufReader::new(stream);
            let (mut line, mut header) = (String::new(), String::new());
            reader.read_line(&mut line).expect("line");
            while reader.read_line(&mut header).expect("header") > 2 {}
            let mut status = 200;
            if !line.contains(" /v2/ ") {
                counter.fetch_add(1, Ordering::Relaxed);
                let Some(next) = left.next() else { return };
                status = next;
            }
            let answer =
                format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            reader.get_mut().write_all(answer.as_bytes()).expect("answer");
        }
    });
    (address, asked)
}

#[test]
fn a_registry_that_is_busy_is_asked_again_and_one_that_refuses_is_not() {
    for (statuses, words, requests) in [
        (&[429, 503, 404][..], "does not have it", 3),
        (&[401, 200], "refuses access", 1),
        (&[500; 9], "/v2/demo/manifests/1: ", 4),
    ] {
        let (address, asked) = broken_registry(statuses);
        let reference: Reference = format!("http://{address}/demo:1").parse().expect("reference");
        let error = wait(resolve::digest(&reference)).expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(asked.load(Ordering::Relaxed), requests, "{error}");
    }
}

#[test]
fn a_blob_comes_whole_in_ranges_and_as_head() {
    let registry = Embedded::start();
    let digest = upload(registry.address, "a", b"0123456789");
    let path = format!("/v2/a/blobs/{digest}");
    let whole = ask(registry.address, "GET", &path, "", b"");
    assert_eq!((whole.status, &whole.body[..]), (200, &b"0123456789"[..]));
    assert_eq!(whole.headers["docker-content-digest"], digest.to_string());
    let head = ask(registry.address, "HEAD", &path, "", b"");
    assert_eq!(
        (head.status, head.headers["content-length"].as_str(), head.body.len()),
        (200, "10", 0)
    );
    for (range, status, body, content_range) in [
        ("bytes=2-4", 206, "234", "bytes 2-4/10"),
        ("bytes=7-", 206, "789", "bytes 7-9/10"),
        ("bytes=-2", 206, "89", "bytes 8-9/10"),
        ("bytes=10-", 416, "", "bytes */10"),
    ] {
        let part = ask(registry.address, "GET", &path, &format!("range: {range}\r\n"), b"");
        assert_eq!(
            (part.status, part.body, part.headers["content-range"].as_str()),
            (status, body.as_bytes().to_vec(), content_range)
        );
    }
    let other = ask(registry.address, "GET", &format!("/v2/b/blobs/{digest}"), "", b"");
    assert_eq!((other.status, other.code().as_str()), (404, "BLOB_UNKNOWN"));
}

#[test]
fn an_upload_in_chunks_is_resumed_where_it_stands() {
    let registry = Embedded::start();
    let at = begin(&registry, "a");
    let first = ask(registry.address, "PATCH", &at, "content-range: 0-3\r\n", b"0123");
    assert_eq!((first.status, first.headers["range"].as_str()), (202, "0-3"));
    let gap = ask(registry.address, "PATCH", &at, "content-range: 6-7\r\n", b"67");
    assert_eq!((gap.status, gap.headers["range"].as_str()), (416, "0-3"));
    let status = ask(registry.address, "GET", &at, "", b"");
    assert_eq!((status.status, status.headers["range"].as_str()), (204, "0-3"));
    let digest = Digest::of(b"012345");
    let done = ask(registry.address, "PUT", &format!("{at}?digest={digest}"), "", b"45");
    assert_eq!(done.status, 201);
    assert_eq!(registry.blobs(), [digest.hex()]);
    let gone = ask(registry.address, "GET", &at, "", b"");
    assert_eq!((gone.status, gone.code().as_str()), (404, "BLOB_UPLOAD_UNKNOWN"));
}

#[test]
fn an_upload_with_another_digest_is_refused_and_nothing_is_stored() {
    let registry = Embedded::start();
    let digest = Digest::of(b"other");
    for digest in [digest.to_string(), "sha512:00".to_owned(), String::new()] {
        let at = begin(&registry, "a");
        let answer = ask(registry.address, "PUT", &format!("{at}?digest={digest}"), "", b"content");
        assert_eq!((answer.status, answer.code().as_str()), (400, "DIGEST_INVALID"));
        ask(registry.address, "DELETE", &at, "", b"");
    }
    assert_eq!(registry.blobs(), Vec::<String>::new());
    let uploads = fs::read_dir(registry.dir.path().join("uploads")).expect("list").count();
    assert_eq!(uploads, 0, "files of refused uploads are left");
}

#[test]
fn a_truncated_upload_stores_nothing_and_can_go_on() {
    let registry = Embedded::start();
    let at = begin(&registry, "a");
    let digest = Digest::of(b"0123456789");
    let mut stream = TcpStream::connect(registry.address).expect("connect");
    let head =
        format!("PUT {at}?digest={digest} HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n01234");
    stream.write_all(head.as_bytes()).expect("half");
    stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/1.1 201"), "half an upload was taken");
    assert_eq!(registry.blobs(), Vec::<String>::new());
    let status = ask(registry.address, "GET", &at, "", b"");
    assert_eq!((status.status, status.headers["range"].as_str()), (204, "0-4"));
    let done = ask(registry.address, "PUT", &format!("{at}?digest={digest}"), "", b"56789");
    assert_eq!(done.status, 201);
}

#[test]
fn a_cancelled_upload_is_gone() {
    let registry = Embedded::start();
    let at = begin(&registry, "a");
    assert_eq!(ask(registry.address, "DELETE", &at, "", b"").status, 204);
    assert_eq!(ask(registry.address, "PATCH", &at, "", b"x").code(), "BLOB_UPLOAD_UNKNOWN");
    let other = begin(&registry, "a").replace("/v2/a/", "/v2/b/");
    assert_eq!(ask(registry.address, "PATCH", &other, "", b"x").code(), "BLOB_UPLOAD_UNKNOWN");
}

#[test]
fn a_blob_is_mounted_from_another_repository() {
    let registry = Embedded::start();
    let digest = upload(registry.address, "a", b"content");
    let mount = |from: &str| {
        let path = format!("/v2/b/blobs/uploads/?mount={digest}&from={from}");
        ask(registry.address, "POST", &path, "", b"").status
    };
    assert_eq!(mount("c"), 202, "an upload is begun where there is nothing to mount");
    assert_eq!(mount("..%2fa"), 202);
    assert_eq!(mount("a"), 201);
    let there = ask(registry.address, "HEAD", &format!("/v2/b/blobs/{digest}"), "", b"");
    assert_eq!(there.status, 200);
}

#[test]
fn a_manifest_is_taken_only_with_what_it_names() {
    let registry = Embedded::start();
    let text = manifest(&Digest::of(b"{}"));
    let put = |key: &str, kind: &str, body: &str| {
        ask(registry.address, "PUT", &format!("/v2/a/manifests/{key}"), kind, body.as_bytes())
    };
    assert_eq!(put("1", MANIFEST_TYPE, &text).code(), "MANIFEST_BLOB_UNKNOWN");
    upload(registry.address, "a", b"{}");
    let other = Digest::of(b"other").to_string();
    assert_eq!(put(&other, MANIFEST_TYPE, &text).code(), "DIGEST_INVALID");
    assert_eq!(put("1", MANIFEST_TYPE, "{").code(), "MANIFEST_INVALID");
    assert_eq!(put("1", "content-type: text/plain\r\n", &text).code(), "MANIFEST_INVALID");
    let large = put("1", MANIFEST_TYPE, &" ".repeat(oci::MAX_MANIFEST_BYTES + 1));
    assert_eq!((large.status, large.code().as_str()), (413, "SIZE_INVALID"));
    let index_type = format!("content-type: {}\r\n", oci::MEDIA_INDEX);
    let digest = Digest::of(text.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{digest}","size":2}}]}}"#,
        oci::MEDIA_MANIFEST
    );
    assert_eq!(put("2", &index_type, &index).code(), "MANIFEST_BLOB_UNKNOWN");
    assert_eq!(ask(registry.address, "GET", "/v2/a/tags/list", "", b"").code(), "NAME_UNKNOWN");

    let stored = put("1", MANIFEST_TYPE, &text);
    assert_eq!(
        (stored.status, &stored.headers["docker-content-digest"]),
        (201, &digest.to_string())
    );
    assert_eq!(put("2", &index_type, &index).status, 201);
    for key in ["1".to_owned(), digest.to_string()] {
        let path = format!("/v2/a/manifests/{key}");
        let got = ask(registry.address, "GET", &path, "", b"");
        assert_eq!((got.status, got.body), (200, text.as_bytes().to_vec()));
        assert_eq!(got.headers["content-type"], oci::MEDIA_MANIFEST);
        let head = ask(registry.address, "HEAD", &path, "", b"");
        assert_eq!(head.headers["content-length"], text.len().to_string());
    }
    assert_eq!(
        ask(registry.address, "GET", "/v2/a/manifests/9", "", b"").code(),
        "MANIFEST_UNKNOWN"
    );
    assert_eq!(ask(registry.address, "POST", "/v2/a/manifests/1", "", b"").code(), "UNSUPPORTED");
}

#[test]
fn tags_and_the_catalog_come_in_pages() {
    let registry = Embedded::start();
    for repository in ["a", "a/b", "c"] {
        upload(registry.address, repository, b"{}");
        for tag in ["1", "2", "3"] {
            let path = format!("/v2/{repository}/manifests/{tag}");
            let text = manifest(&Digest::of(b"{}"));
            assert_eq!(
                ask(registry.address, "PUT", &path, MANIFEST_TYPE, text.as_bytes()).status,
                201
            );
        }
    }
    let get = |path: &str| {
        let answer = ask(registry.address, "GET", path, "", b"");
        (String::from_utf8(answer.body).expect("text"), answer.headers.get("link").cloned())
    };
    let next = Some("</v2/a/b/tags/list?n=2&last=2>; rel=\"next\"".to_owned());
    assert_eq!(
        get("/v2/a/b/tags/list?n=2"),
        (r#"{"name":"a/b","tags":["1","2"]}"#.to_owned(), next)
    );
    let rest = (r#"{"name":"a/b","tags":["3"]}"#.to_owned(), None);
    assert_eq!(get("/v2/a/b/tags/list?n=2&last=2"), rest);
    assert_eq!(get("/v2/_catalog"), (r#"{"repositories":["a","a/b","c"]}"#.to_owned(), None));
    assert_eq!(get("/v2/_catalog?n=1&last=a").0, r#"{"repositories":["a/b"]}"#);
    assert_eq!(get("/v2/").0, "{}");
}

#[test]
fn names_that_are_tricks_touch_nothing() {
    let registry = Embedded::start();
    for path in [
        "/v2/../../etc/blobs/uploads/",
        "/v2/a/../../x/blobs/uploads/",
        "/v2/%2e%2e/blobs/uploads/",
        "/v2/_tags/blobs/uploads/",
        "/v2/a//b/blobs/uploads/",
    ] {
        let answer = ask(registry.address, "POST", path, "", b"");
        assert_eq!((answer.status, answer.code().as_str()), (400, "NAME_INVALID"), "{path}");
    }
    let repositories = fs::read_dir(registry.dir.path().join("repositories")).expect("list");
    assert_eq!(repositories.count(), 0);
}

#[test]
fn a_store_opened_again_has_everything() {
    let registry = Embedded::start();
    let digest = upload(registry.address, "a", b"{}");
    let text = manifest(&digest);
    ask(registry.address, "PUT", "/v2/a/manifests/1", MANIFEST_TYPE, text.as_bytes());
    let at = begin(&registry, "a");
    ask(registry.address, "PATCH", &at, "", b"half");
    let registry = registry.restart();
    let status = ask(registry.address, "GET", &at, "", b"");
    assert_eq!((status.status, status.headers["range"].as_str()), (204, "0-3"));
    let again = RegistryStore::open(registry.dir.path()).expect("again");
    let found = again.resolve_tag("a", "1").expect("tag").expect("there");
    assert_eq!(again.manifest("a", &found).expect("read").expect("there"), text.as_bytes());
    fs::write(registry.dir.path().join("blobs/sha256").join(found.hex()), "damage").expect("write");
    let error = again.manifest("a", &found).expect_err("damaged").to_string();
    assert!(error.contains("is damaged"), "{error}");
}
