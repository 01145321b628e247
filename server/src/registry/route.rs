//! What a request is about: the path, the query and the `Content-Range` of a chunk, read without touching anything.

use protocol::ids::Digest;
use protocol::reference::Reference;

use super::answer::{Code, Refusal};

/// What a path under `/v2/` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    Base,
    Catalog,
    Tags { repository: String },
    Manifest { repository: String, key: Key },
    Blob { repository: String, digest: Digest },
    Uploads { repository: String },
    Upload { repository: String, id: String },
}

/// How a manifest is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Key {
    Tag(String),
    Digest(Digest),
}

/// Whether the text is a repository name; the grammar is [`Reference`]'s, whose components begin with a letter or
/// digit, so that no name leads out of a directory or to a file of the store's own.
pub(super) fn is_repository(text: &str) -> bool {
    format!("http://registry/{text}")
        .parse::<Reference>()
        .is_ok_and(|found| found.repository == text)
}

/// Whether the text is a tag.
pub(super) fn is_tag(text: &str) -> bool {
    format!("http://registry/a:{text}")
        .parse::<Reference>()
        .is_ok_and(|found| found.tag.as_deref() == Some(text))
}

/// Reads a path.
pub(super) fn parse(path: &str) -> Result<Route, Refusal> {
    let rest = path.strip_prefix("/v2").unwrap_or(path).trim_start_matches('/');
    if rest.is_empty() {
        return Ok(Route::Base);
    }
    if rest == "_catalog" {
        return Ok(Route::Catalog);
    }
    let parts: Vec<&str> = rest.split('/').collect();
    let name = |parts: &[&str]| {
        let repository = parts.join("/");
        if is_repository(&repository) {
            return Ok(repository);
        }
        let shown: String = repository.chars().take(80).collect();
        Err(Refusal::new(Code::NameInvalid, format!("`{shown}` is not a repository name")))
    };
    match parts.as_slice() {
        [front @ .., "tags", "list"] => Ok(Route::Tags { repository: name(front)? }),
        [front @ .., "blobs", "uploads"] | [front @ .., "blobs", "uploads", ""] => {
            Ok(Route::Uploads { repository: name(front)? })
        }
        [front @ .., "blobs", "uploads", id] => {
            let id = (*id).to_owned();
            Ok(Route::Upload { repository: name(front)?, id })
        }
        [front @ .., "blobs", digest] => {
            Ok(Route::Blob { repository: name(front)?, digest: parse_digest(digest)? })
        }
        [front @ .., "manifests", key] => {
            let key = if key.contains(':') {
                Key::Digest(parse_digest(key)?)
            } else if is_tag(key) {
                Key::Tag((*key).to_owned())
            } else {
                let shown: String = key.chars().take(80).collect();
                let reason = format!("`{shown}` is neither a tag nor a digest");
                return Err(Refusal::new(Code::ManifestInvalid, reason));
            };
            Ok(Route::Manifest { repository: name(front)?, key })
        }
        _ => Err(Refusal::new(Code::NotFound, "there is no such path".to_owned())),
    }
}

/// Reads a digest; algorithms other than sha256 are refused.
pub(super) fn parse_digest(text: &str) -> Result<Digest, Refusal> {
    text.parse().map_err(|error| Refusal::new(Code::DigestInvalid, format!("{error}")))
}

/// The value of a key of a query, with percent signs resolved.
pub(super) fn query(query: &str, key: &str) -> Option<String> {
    let value = query.split('&').find_map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (name == key).then_some(value)
    })?;
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let high = char::from(rest.next()?).to_digit(16)?;
                let low = char::from(rest.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// The first byte of a chunk by its `Content-Range: FIRST-LAST`, which has no unit here (OCI distribution spec).
pub(super) fn chunk_start(header: &str) -> Option<u64> {
    let spec = header.trim();
    let spec = spec.strip_prefix("bytes").map_or(spec, |rest| rest.trim_start_matches(['=', ' ']));
    let (first, _) = spec.split_once('-')?;
    first.parse().ok()
}

/// Reads any bytes as path, query and chunk, for fuzzing.
pub fn fuzz_route(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = parse(&text);
    let _ = query(&text, "digest");
    let _ = chunk_start(&text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read() {
        let digest = Digest::of(b"x");
        let repository = || "a/b".to_owned();
        for (path, route) in [
            ("/v2".to_owned(), Route::Base),
            ("/v2/".to_owned(), Route::Base),
            ("/v2/_catalog".to_owned(), Route::Catalog),
            ("/v2/a/b/tags/list".to_owned(), Route::Tags { repository: repository() }),
            ("/v2/a/b/blobs/uploads/".to_owned(), Route::Uploads { repository: repository() }),
            (
                "/v2/a/b/blobs/uploads/7f".to_owned(),
                Route::Upload { repository: repository(), id: "7f".to_owned() },
            ),
            (format!("/v2/a/b/blobs/{digest}"), Route::Blob { repository: repository(), digest }),
            (
                "/v2/a/b/manifests/1-x".to_owned(),
                Route::Manifest { repository: repository(), key: Key::Tag("1-x".to_owned()) },
            ),
            (
                format!("/v2/a/b/manifests/{digest}"),
                Route::Manifest { repository: repository(), key: Key::Digest(digest) },
            ),
        ] {
            assert_eq!(parse(&path).expect(&path), route);
        }
    }

    #[test]
    fn tricks_with_names_are_refused() {
        for (path, code) in [
            ("/v2/../../etc/tags/list", Code::NameInvalid),
            ("/v2/a/../b/manifests/1", Code::NameInvalid),
            ("/v2/a%2fb/manifests/1", Code::NameInvalid),
            ("/v2/_blobs/tags/list", Code::NameInvalid),
            ("/v2/a/_tags/blobs/uploads/", Code::NameInvalid),
            ("/v2/A/tags/list", Code::NameInvalid),
            ("/v2/tags/list", Code::NameInvalid),
            ("/v2/a:b/tags/list", Code::NameInvalid),
            ("/v2/a/manifests/..", Code::ManifestInvalid),
            ("/v2/a/manifests/.x", Code::ManifestInvalid),
            ("/v2/a/blobs/sha256:..", Code::DigestInvalid),
            ("/v2/a/blobs/sha512:00", Code::DigestInvalid),
            ("/v2/a", Code::NotFound),
        ] {
            assert_eq!(parse(path).expect_err(path).code, code, "{path}");
        }
    }

    #[test]
    fn the_start_of_a_chunk_is_read() {
        assert_eq!(chunk_start("5-9"), Some(5));
        assert_eq!(chunk_start("bytes 5-9"), Some(5));
        assert_eq!(chunk_start("x"), None);
    }

    #[test]
    fn queries_are_decoded() {
        assert_eq!(query("n=3&digest=sha256%3Aab", "digest").as_deref(), Some("sha256:ab"));
        assert_eq!(query("n=3", "digest"), None);
        assert_eq!(query("digest=%f", "digest"), None);
    }

    proptest::proptest! {
        #[test]
        fn no_request_line_makes_the_reader_panic(bytes: Vec<u8>, text in "/v2/[a-z%./:_-]{0,60}") {
            fuzz_route(&bytes);
            fuzz_route(text.as_bytes());
        }
    }
}
