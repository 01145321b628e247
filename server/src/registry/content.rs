//! The requests for what is stored: blobs, manifests, tags and the catalog, and storing a manifest.

use std::io::SeekFrom;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::ids::Digest;
use protocol::oci::{
    self, MAX_MANIFEST_BYTES, MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST, MEDIA_INDEX, MEDIA_MANIFEST,
};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use super::answer::{Code, Refusal};
use super::handlers::{DIGEST_HEADER, blocking};
use super::route::{self, Key};
use super::store::{RegistryStore, io_error};
use crate::http::file::{Part, parse_range};

/// Bytes of a blob that are read at a time.
const BUFFER: usize = 1 << 20;
/// Most names in one answer.
const MAX_PAGE: usize = 1000;

/// GET and HEAD of a blob, whole or one range of it.
pub(super) async fn get_blob(
    store: RegistryStore,
    repository: String,
    digest: Digest,
    headers: &HeaderMap,
    with_body: bool,
) -> Result<Response, Refusal> {
    let path = store.blob_path(&digest);
    let size = blocking(move || store.blob_size(&repository, &digest)).await?.ok_or_else(|| {
        Refusal::new(Code::BlobUnknown, format!("the repository has no blob {digest}"))
    })?;
    let asked = headers.get(header::RANGE).and_then(|range| range.to_str().ok());
    let (first, length, status) = match parse_range(asked, size) {
        Part::Whole => (0, size, StatusCode::OK),
        Part::Range(first, last) => (first, last - first + 1, StatusCode::PARTIAL_CONTENT),
        Part::Outside => {
            let range = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, range).into_response());
        }
    };
    let body = if with_body {
        let read = || io_error("cannot read", &path);
        let mut file = File::open(&path).await.map_err(read())?;
        file.set_max_buf_size(BUFFER);
        file.seek(SeekFrom::Start(first)).await.map_err(read())?;
        Body::from_stream(ReaderStream::with_capacity(file.take(length), BUFFER))
    } else {
        Body::empty()
    };
    let mut response = (
        status,
        [
            (header::CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
            (header::CONTENT_LENGTH.as_str(), length.to_string()),
            (header::ACCEPT_RANGES.as_str(), "bytes".to_owned()),
            (header::ETAG.as_str(), format!("\"{digest}\"")),
            (DIGEST_HEADER, digest.to_string()),
        ],
        body,
    )
        .into_response();
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {first}-{}/{size}", first + length - 1);
        if let Ok(range) = range.parse() {
            response.headers_mut().insert(header::CONTENT_RANGE, range);
        }
    }
    Ok(response)
}

/// GET and HEAD of a manifest; axum leaves the body out for HEAD.
pub(super) async fn get_manifest(
    store: RegistryStore,
    repository: String,
    key: Key,
) -> Result<Response, Refusal> {
    let found = blocking(move || {
        let digest = match &key {
            Key::Digest(digest) => Some(*digest),
            Key::Tag(tag) => store.resolve_tag(&repository, tag)?,
        };
        let Some(digest) = digest else { return Ok(None) };
        Ok(store.typed_manifest(&repository, &digest)?.map(|found| (digest, found)))
    });
    let (digest, (media_type, bytes)) = found.await?.ok_or_else(|| {
        Refusal::new(Code::ManifestUnknown, "the repository has no such manifest")
    })?;
    let headers = [
        (header::CONTENT_TYPE.as_str(), media_type),
        (header::CONTENT_LENGTH.as_str(), bytes.len().to_string()),
        (header::ETAG.as_str(), format!("\"{digest}\"")),
        (DIGEST_HEADER, digest.to_string()),
    ];
    Ok((headers, bytes).into_response())
}

/// PUT of a manifest or index under a tag or its digest.
pub(super) async fn put_manifest(
    store: RegistryStore,
    repository: String,
    key: Key,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let bytes = to_bytes(body, MAX_MANIFEST_BYTES).await.map_err(|error| {
        let limit = format!("the manifest is cut off or larger than {MAX_MANIFEST_BYTES} bytes");
        Refusal::new(Code::SizeInvalid, format!("{limit}: {error}"))
    })?;
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|media_type| media_type.to_str().ok())
        .map(|media_type| media_type.split(';').next().unwrap_or("").trim().to_owned());
    let (media_type, refers) = read_manifest(&bytes, content_type.as_deref())?;
    let found = Digest::of(&bytes);
    let tag = match key {
        Key::Tag(tag) => Some(tag),
        Key::Digest(expected) if expected == found => None,
        Key::Digest(expected) => {
            let reason = format!("the manifest is {found}, not {expected}");
            return Err(Refusal::new(Code::DigestInvalid, reason));
        }
    };
    let location = format!("/v2/{repository}/manifests/{found}");
    let missing = blocking(move || {
        for reference in refers {
            let there = match reference {
                Refers::Blob(digest) => store.blob_size(&repository, &digest)?.is_some(),
                Refers::Manifest(digest) => store.has_manifest(&repository, &digest)?,
            };
            if !there {
                return Ok(Some(reference));
            }
        }
        store.put_manifest(&repository, &media_type, &bytes, tag.as_deref())?;
        Ok(None)
    })
    .await?;
    match missing {
        None => {
            let headers =
                [(header::LOCATION.as_str(), location), (DIGEST_HEADER, found.to_string())];
            Ok((StatusCode::CREATED, headers).into_response())
        }
        Some(Refers::Blob(digest) | Refers::Manifest(digest)) => {
            let reason = format!("the repository does not have {digest}, which the manifest names");
            Err(Refusal::new(Code::ManifestBlobUnknown, reason))
        }
    }
}

/// What a manifest needs to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refers {
    Blob(Digest),
    Manifest(Digest),
}

/// Its media type and what it refers to. The Content-Type counts; the document's own `mediaType` must agree.
fn read_manifest(
    bytes: &[u8],
    content_type: Option<&str>,
) -> Result<(String, Vec<Refers>), Refusal> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: Option<String>,
    }
    let invalid = |reason: String| Refusal::new(Code::ManifestInvalid, reason);
    let typed: Typed = serde_json::from_slice(bytes)
        .map_err(|error| invalid(format!("the manifest is not JSON: {error}")))?;
    let own = typed.media_type.as_deref();
    let media_type =
        content_type.or(own).ok_or_else(|| invalid("the manifest has no media type".to_owned()))?;
    if own.is_some_and(|own| own != media_type) {
        return Err(invalid(format!("Content-Type {media_type} is not the manifest's mediaType")));
    }
    let refers = match media_type {
        MEDIA_INDEX | MEDIA_DOCKER_LIST => {
            let index = oci::parse_index(bytes).map_err(|error| invalid(full(&error)))?;
            index.manifests.iter().map(|entry| Refers::Manifest(entry.digest)).collect()
        }
        MEDIA_MANIFEST | MEDIA_DOCKER_MANIFEST => {
            let manifest = oci::parse_manifest(bytes).map_err(|error| invalid(full(&error)))?;
            let blobs = std::iter::once(&manifest.config).chain(&manifest.layers);
            blobs.map(|blob| Refers::Blob(blob.digest)).collect()
        }
        other => return Err(invalid(format!("media type `{other}` is not a manifest's"))),
    };
    Ok((media_type.to_owned(), refers))
}

fn full(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// GET of a repository's tags.
pub(super) async fn tags(
    store: RegistryStore,
    repository: String,
    query: &str,
) -> Result<Response, Refusal> {
    let name = repository.clone();
    let tags = blocking(move || {
        Ok(if store.has_repository(&repository)? { Some(store.tags(&repository)?) } else { None })
    });
    let tags = tags
        .await?
        .ok_or_else(|| Refusal::new(Code::NameUnknown, "there is no such repository"))?;
    let (tags, more) = page(tags, query);
    let body = serde_json::json!({ "name": name, "tags": tags });
    Ok(list(&format!("/v2/{name}/tags/list"), &tags, more, body))
}

/// GET of the names of all repositories.
pub(super) async fn catalog(store: RegistryStore, query: &str) -> Result<Response, Refusal> {
    let (names, more) = page(blocking(move || store.repositories()).await?, query);
    let body = serde_json::json!({ "repositories": names });
    Ok(list("/v2/_catalog", &names, more, body))
}

/// The part of sorted names that `n` and `last` ask for; the number is set when there are more.
fn page(names: Vec<String>, query: &str) -> (Vec<String>, Option<usize>) {
    let n = route::query(query, "n").and_then(|n| n.parse().ok()).unwrap_or(MAX_PAGE);
    let n: usize = MAX_PAGE.min(n);
    let last = route::query(query, "last").unwrap_or_default();
    let mut rest: Vec<String> = names.into_iter().filter(|name| *name > last).collect();
    let more = rest.len() > n && n > 0;
    rest.truncate(n);
    (rest, more.then_some(n))
}

fn list(path: &str, names: &[String], more: Option<usize>, body: serde_json::Value) -> Response {
    let mut response = axum::Json(body).into_response();
    if let (Some(n), Some(last)) = (more, names.last())
        && let Ok(link) = format!("<{path}?n={n}&last={last}>; rel=\"next\"").parse()
    {
        response.headers_mut().insert(header::LINK, link);
    }
    response
}
