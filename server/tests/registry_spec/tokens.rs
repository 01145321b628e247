//! Tokens: who may push, who may pull, and how refusals say so; with our own push and skopeo.

use std::process::Command;

use server::registry::{Access, TokenHash};

use crate::harness::{Embedded, ask, manifest, run};
use crate::program::Program;
use crate::{get, json};

/// Base64 of `any:push-token` and `any:pull-token`.
const BASIC_PUSH: &str = "authorization: Basic YW55OnB1c2gtdG9rZW4=\r\n";
const BASIC_PULL: &str = "authorization: Basic YW55OnB1bGwtdG9rZW4=\r\n";
const BEARER_PUSH: &str = "authorization: Bearer push-token\r\n";
const WRONG: &str = "authorization: Bearer push-tokem\r\n";

#[test]
fn only_a_token_pushes_and_anybody_pulls() {
    let access = Access::new(vec![TokenHash::of("push-token")], Vec::new());
    let registry = Embedded::start_for(access);
    let ping = |header: &str| ask(registry.address, "GET", "/v2/", header, b"");
    for header in ["", WRONG, BASIC_PULL] {
        let answer = ping(header);
        assert_eq!((answer.status, answer.code().as_str()), (401, "UNAUTHORIZED"));
        assert_eq!(answer.headers["www-authenticate"], "Basic realm=\"layercake\"");
    }
    for header in [BASIC_PUSH, BEARER_PUSH] {
        assert_eq!(ping(header).status, 200);
    }
    let digest = protocol::ids::Digest::of(b"{}");
    let path = format!("/v2/a/blobs/uploads/?digest={digest}");
    for header in ["", WRONG] {
        let answer = ask(registry.address, "POST", &path, header, b"{}");
        assert_eq!((answer.status, answer.code().as_str()), (401, "UNAUTHORIZED"));
        assert!(answer.headers.contains_key("www-authenticate"));
    }
    assert_eq!(ask(registry.address, "POST", &path, BEARER_PUSH, b"{}").status, 201);
    assert_eq!(get(registry.address, &format!("/v2/a/blobs/{digest}")).status, 200);
    let text = manifest(&digest);
    let kind = crate::harness::MANIFEST_TYPE;
    let put = |header: &str| {
        let headers = format!("{kind}{header}");
        ask(registry.address, "PUT", "/v2/a/manifests/1", &headers, text.as_bytes()).status
    };
    assert_eq!((put(""), put(BASIC_PUSH)), (401, 201));
    for (method, path) in [
        ("DELETE", "/v2/a/manifests/1".to_owned()),
        ("DELETE", format!("/v2/a/blobs/{digest}")),
        ("PATCH", "/v2/a/blobs/uploads/x".to_owned()),
        ("PUT", "/v2/a/blobs/uploads/x".to_owned()),
        ("DELETE", "/v2/a/blobs/uploads/x".to_owned()),
        ("BREW", "/v2/nonsense".to_owned()),
    ] {
        let answer = ask(registry.address, method, &path, WRONG, b"");
        assert_eq!(answer.status, 401, "{method} {path}");
    }
    assert_eq!(get(registry.address, "/v2/a/manifests/1").status, 200);
}

#[test]
fn with_pull_tokens_nobody_pulls_without_and_a_pull_token_does_not_push() {
    let access = Access::new(vec![TokenHash::of("push-token")], vec![TokenHash::of("pull-token")]);
    let registry = Embedded::start_for(access);
    let ask = |method: &str, path: &str, header: &str| {
        ask(registry.address, method, path, header, b"").status
    };
    let list = "/v2/_catalog";
    assert_eq!((ask("GET", list, ""), ask("GET", list, BASIC_PULL)), (401, 200));
    assert_eq!(ask("GET", list, BEARER_PUSH), 200);
    let begin = "/v2/a/blobs/uploads/";
    assert_eq!((ask("POST", begin, BASIC_PULL), ask("POST", begin, BASIC_PUSH)), (403, 202));
}

#[test]
fn skopeo_pushes_with_its_credentials_and_pulls_without() {
    let dir = tempfile::tempdir().expect("dir");
    let layout = crate::peers::layout(dir.path());
    let hash = TokenHash::of("push-token");
    let more = format!("[registry]\npush_tokens = [\"{hash}\"]\n");
    let program = Program::start(dir.path(), &more);
    let remote = format!("docker://{}/a:1", program.address);
    let copy = |credentials: &[&str]| {
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet", "--dest-tls-verify=false"]).args(credentials);
        skopeo.arg(&layout).arg(&remote);
        skopeo
    };
    let refused = copy(&[]).output().expect("skopeo");
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && error.contains("unauthorized"), "{error}");
    run(&mut copy(&["--dest-creds", "any:push-token"]));
    run(Command::new("skopeo").args(["inspect", "--tls-verify=false"]).arg(&remote));

    // Collection is a change, too.
    let gc = |header: &str| {
        let headers = format!("content-type: application/json\r\n{header}");
        let body = br#"{"dry_run":true}"#;
        crate::harness::ask(program.address, "POST", "/v1/imagesets/gc", &headers, body)
    };
    assert_eq!((gc("").status, gc(WRONG).status), (401, 401));
    let report = gc(BEARER_PUSH);
    assert_eq!((report.status, json(&report)["dry_run"].as_bool()), (200, Some(true)));
}
