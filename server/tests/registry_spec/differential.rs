//! The same requests to our registry and to Debian's docker-registry, answer by answer.
//!
//! Where the two differ on purpose the table has both answers.

use std::net::SocketAddr;

use protocol::ids::Digest;
use protocol::oci::{MEDIA_INDEX, MEDIA_MANIFEST};

use crate::harness::{Answer, Debian, Embedded, ask, manifest};

/// What is compared: the status, the code of a refusal, and these headers, places without their host and id.
const HEADERS: [&str; 9] = [
    "content-length",
    "content-type",
    "content-range",
    "range",
    "location",
    "docker-content-digest",
    "accept-ranges",
    "etag",
    "docker-distribution-api-version",
];

struct Step {
    method: &'static str,
    /// `{at}` stands for the place of the upload that the last answer named.
    path: String,
    headers: String,
    body: Vec<u8>,
    /// What differs on purpose: header, or `status`, or `code`.
    but: &'static [&'static str],
}

fn step(method: &'static str, path: impl Into<String>) -> Step {
    Step { method, path: path.into(), headers: String::new(), body: Vec::new(), but: &[] }
}

impl Step {
    fn with(mut self, header: &str) -> Self {
        self.headers.push_str(header);
        self.headers.push_str("\r\n");
        self
    }

    fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_vec();
        self
    }

    fn but(mut self, what: &'static [&'static str]) -> Self {
        self.but = what;
        self
    }
}

/// A place without scheme, host and state, and with `ID` for the id of an upload.
fn place(location: &str) -> String {
    let path = location.find("/v2/").map_or(location, |at| &location[at..]);
    let path = path.split('?').next().unwrap_or(path);
    match path.split_once("/blobs/uploads/") {
        Some((front, _)) => format!("{front}/blobs/uploads/ID"),
        None => path.to_owned(),
    }
}

/// The answer in the form in which it is compared.
fn seen(method: &str, answer: &Answer, but: &[&str]) -> Vec<(String, String)> {
    let mut seen = vec![("status".to_owned(), answer.status.to_string())];
    let refused = answer.status >= 400;
    let told = answer.headers.get("content-type").map_or("", String::as_str);
    let is_json = told.starts_with("application/json") && !answer.body.is_empty();
    if refused && is_json && method != "HEAD" {
        seen.push(("code".to_owned(), answer.code()));
    } else if is_json {
        let body: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
        seen.push(("json".to_owned(), body.to_string()));
    }
    for name in HEADERS {
        let Some(value) = answer.headers.get(name) else { continue };
        let value = match name {
            // Of a refusal the form counts, not the length of its words; nor has an empty answer a type.
            "content-length" | "content-type" if refused || answer.status == 304 => continue,
            "content-length" if is_json || (method != "HEAD" && answer.body.is_empty()) => continue,
            "content-type" if answer.body.is_empty() && method != "HEAD" => continue,
            "content-type" => value.split(';').next().unwrap_or("").to_owned(),
            "location" => place(value),
            _ => value.clone(),
        };
        seen.push((name.to_owned(), value));
    }
    seen.retain(|(name, _)| !but.contains(&name.as_str()));
    seen
}

fn play(address: SocketAddr, steps: &[Step]) -> Vec<(String, Vec<(String, String)>)> {
    let mut at = String::new();
    let mut answers = Vec::new();
    for step in steps {
        let mut path = step.path.replace("{at}", &at);
        // The other registry keeps state in the query of its place.
        if let Some((front, back)) = path.split_once('?') {
            path = format!("{front}?{}", back.replace('?', "&"));
        }
        let answer = ask(address, step.method, &path, &step.headers, &step.body);
        if let Some(location) = answer.headers.get("location").filter(|l| l.contains("/uploads/")) {
            let from = location.find("/v2/").expect("place");
            location[from..].clone_into(&mut at);
        }
        let headers = step.headers.trim();
        let name = format!("{} {} {headers}", step.method, step.path);
        answers.push((name, seen(step.method, &answer, step.but)));
    }
    answers
}

#[track_caller]
fn compare(steps: &[Step]) {
    let (ours, theirs) = (Embedded::start(), Debian::open());
    let ours = play(ours.address, steps);
    let theirs = play(theirs.address, steps);
    let mut differences = String::new();
    for ((name, ours), (_, theirs)) in ours.iter().zip(&theirs) {
        if ours != theirs {
            differences.push_str(&format!("{name}\n  ours   {ours:?}\n  theirs {theirs:?}\n"));
        }
    }
    assert!(differences.is_empty(), "\n{differences}");
}

#[test]
fn uploads_are_answered_alike() {
    let digest = Digest::of(b"0123456789");
    let other = Digest::of(b"other");
    compare(&[
        step("GET", "/v2/"),
        step("POST", "/v2/a/blobs/uploads/"),
        step("PATCH", "{at}").with("content-type: application/octet-stream").body("0123"),
        step("GET", "{at}"),
        step("PATCH", "{at}")
            .with("content-type: application/octet-stream")
            .with("content-range: 4-5")
            .body("45"),
        step("PUT", format!("{{at}}?digest={digest}")).body("6789"),
        step("GET", "{at}"),
        step("HEAD", format!("/v2/a/blobs/{digest}")),
        step("POST", "/v2/a/blobs/uploads/"),
        step("PUT", format!("{{at}}?digest={digest}")).body("0123456789"),
        step("POST", "/v2/a/blobs/uploads/"),
        step("PUT", format!("{{at}}?digest={other}")).body("0123456789"),
        step("POST", "/v2/a/blobs/uploads/"),
        step("PUT", "{at}").body("0123456789"),
        step("POST", "/v2/a/blobs/uploads/"),
        step("DELETE", "{at}"),
        step("GET", "{at}"),
        step("POST", format!("/v2/b/blobs/uploads/?mount={digest}&from=a")),
        step("HEAD", format!("/v2/b/blobs/{digest}")),
        step("POST", format!("/v2/b/blobs/uploads/?mount={other}&from=a")),
        step("POST", format!("/v2/b/blobs/uploads/?mount={digest}")),
    ]);
}

#[test]
fn pulls_and_ranges_are_answered_alike() {
    let digest = Digest::of(b"0123456789");
    let blob = format!("/v2/a/blobs/{digest}");
    let mut steps = vec![
        step("POST", "/v2/a/blobs/uploads/"),
        step("PUT", format!("{{at}}?digest={digest}")).body("0123456789"),
        step("GET", blob.clone()),
        step("HEAD", blob.clone()),
        step("GET", format!("/v2/other/blobs/{digest}")),
        step("HEAD", format!("/v2/other/blobs/{digest}")),
        step("GET", blob.clone()).with(&format!("if-none-match: \"{digest}\"")),
        step("GET", blob.clone()).with("if-none-match: \"other\""),
        step("GET", blob.clone()).with("range: bytes=2-4").with(&format!("if-range: \"{digest}\"")),
        step("GET", blob.clone()).with("range: bytes=2-4").with("if-range: \"other\""),
    ];
    for range in ["0-0", "2-4", "2-", "2-99", "-3", "-30"] {
        steps.push(step("GET", blob.clone()).with(&format!("range: bytes={range}")));
    }
    for range in ["10-", "10-12"] {
        let step = step("GET", blob.clone()).with(&format!("range: bytes={range}"));
        steps.push(step.but(&["docker-content-digest", "etag"]));
    }
    compare(&steps);
}

#[test]
fn manifests_tags_and_deletes_are_answered_alike() {
    let config = Digest::of(b"{}");
    let text = manifest(&config).replace(
        "\"schemaVersion\":2",
        &format!("\"schemaVersion\":2,\"mediaType\":\"{MEDIA_MANIFEST}\""),
    );
    let digest = Digest::of(text.as_bytes());
    let kind = format!("content-type: {MEDIA_MANIFEST}");
    let accept = format!("accept: {MEDIA_MANIFEST}, {MEDIA_INDEX}");
    let put = |key: &str| step("PUT", format!("/v2/a/manifests/{key}")).with(&kind).body(&text);
    let get = |method, key: &str| step(method, format!("/v2/a/manifests/{key}")).with(&accept);
    let by_digest = digest.to_string();
    compare(&[
        put("1"),
        step("POST", "/v2/a/blobs/uploads/"),
        step("PUT", format!("{{at}}?digest={config}")).body("{}"),
        put("1"),
        put("2"),
        put(&by_digest),
        get("GET", "1"),
        get("HEAD", "1"),
        get("GET", &by_digest),
        // RFC 9110 wants the ETag with a 304, too.
        get("GET", "1")
            .with(&format!("if-none-match: \"{digest}\""))
            .but(&["docker-content-digest", "etag"]),
        get("GET", "9"),
        get("HEAD", "9"),
        get("GET", &Digest::of(b"nothing").to_string()),
        put(&config.to_string()),
        step("PUT", "/v2/a/manifests/3").with(&kind).body("{"),
        // The spec wants them in order; this docker-registry lists them in any.
        step("GET", "/v2/a/tags/list").but(&["json"]),
        step("GET", "/v2/nowhere/tags/list"),
        step("GET", "/v2/_catalog"),
        step("DELETE", format!("/v2/a/manifests/{by_digest}")),
        get("GET", &by_digest),
        get("GET", "1"),
        step("DELETE", format!("/v2/a/manifests/{by_digest}")),
        step("DELETE", format!("/v2/a/blobs/{config}")),
        step("HEAD", format!("/v2/a/blobs/{config}")),
        step("DELETE", format!("/v2/a/blobs/{config}")),
    ]);
}

#[test]
fn mistakes_are_answered_alike() {
    const OWN: &[&str] = &["status", "code"];
    compare(&[
        // docker-registry's router knows no such name or digest, and says 404 without the spec's form, or 500.
        step("GET", "/v2/A/tags/list").but(OWN),
        step("POST", "/v2/A/blobs/uploads/").but(OWN),
        step("GET", "/v2/a/blobs/sha256:zz"),
        step("GET", "/v2/a/manifests/sha256:zz").but(OWN),
        step("GET", "/v2/a/what").but(&["code"]),
        step("GET", "/v2/a/blobs/uploads/none").but(OWN),
        step("POST", "/v2/a/tags/list").but(&["code"]),
    ]);
}
