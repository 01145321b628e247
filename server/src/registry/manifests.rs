//! The requests for manifests and indexes: GET, HEAD, PUT and DELETE, by tag or digest.

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::ids::Digest;
use protocol::oci::MAX_MANIFEST_BYTES;

use super::answer::{Code, Refusal};
use super::blobs::{matches, not_modified};
use super::document::{self, Needs};
use super::handlers::{DIGEST_HEADER, blocking};
use super::route::Key;
use super::store::RegistryStore;

/// Says that the registry has put a manifest on the list of its subject's referrers.
const SUBJECT_HEADER: &str = "oci-subject";

fn unknown() -> Refusal {
    Refusal::new(Code::ManifestUnknown, "the repository has no such manifest")
}

/// GET and HEAD; axum leaves the body out for HEAD.
pub(super) async fn get(
    store: RegistryStore,
    repository: String,
    key: Key,
    headers: &HeaderMap,
    head: bool,
) -> Result<Response, Refusal> {
    let found = blocking(move || {
        let digest = match &key {
            Key::Digest(digest) => Some(*digest),
            Key::Tag(tag) => store.resolve_tag(&repository, tag)?,
        };
        let Some(digest) = digest else { return Ok(None) };
        if head {
            store.refresh(&repository, &digest)?;
        }
        Ok(store.typed_manifest(&repository, &digest)?.map(|found| (digest, found)))
    });
    let (digest, (media_type, bytes)) = found.await?.ok_or_else(unknown)?;
    let etag = format!("\"{digest}\"");
    if matches(headers, &etag) {
        return Ok(not_modified(&digest));
    }
    let headers = [
        (header::CONTENT_TYPE.as_str(), media_type),
        (header::CONTENT_LENGTH.as_str(), bytes.len().to_string()),
        (header::ETAG.as_str(), etag),
        (DIGEST_HEADER, digest.to_string()),
    ];
    Ok((headers, bytes).into_response())
}

/// PUT under a tag or its digest.
pub(super) async fn put(
    store: RegistryStore,
    repository: String,
    key: Key,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let bytes = to_bytes(body, MAX_MANIFEST_BYTES).await.map_err(|error| {
        let limit = format!("the manifest is cut off or larger than {MAX_MANIFEST_BYTES} bytes");
        Refusal::new(Code::TooLarge, format!("{limit}: {error}"))
    })?;
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let document = document::read(&bytes, content_type)?;
    let found = document.descriptor.digest;
    let tag = match key {
        Key::Tag(tag) => Some(tag),
        Key::Digest(expected) if expected == found => None,
        Key::Digest(expected) => {
            let reason = format!("the manifest is {found}, not {expected}");
            return Err(Refusal::new(Code::DigestInvalid, reason));
        }
    };
    let subject = document.subject;
    let location = format!("/v2/{repository}/manifests/{found}");
    let missing =
        blocking(move || store.put_manifest(&repository, &document, &bytes, tag.as_deref()));
    match missing.await? {
        None => Ok(stored(location, &found, subject.as_ref())),
        Some(Needs::Blob(digest) | Needs::Manifest(digest)) => {
            let reason = format!("the repository does not have {digest}, which the manifest names");
            Err(Refusal::new(Code::ManifestBlobUnknown, reason))
        }
    }
}

fn stored(location: String, digest: &Digest, subject: Option<&Digest>) -> Response {
    let headers = [(header::LOCATION.as_str(), location), (DIGEST_HEADER, digest.to_string())];
    let mut response = (StatusCode::CREATED, headers).into_response();
    if let Some(Ok(subject)) = subject.map(|subject| HeaderValue::try_from(subject.to_string())) {
        response.headers_mut().insert(SUBJECT_HEADER, subject);
    }
    response
}

/// DELETE: of a tag alone, or of a manifest with all its tags.
pub(super) async fn delete(
    store: RegistryStore,
    repository: String,
    key: Key,
) -> Result<Response, Refusal> {
    let removed = blocking(move || match &key {
        Key::Tag(tag) => store.delete_tag(&repository, tag),
        Key::Digest(digest) => store.delete_manifest(&repository, digest),
    });
    if removed.await? { Ok(StatusCode::ACCEPTED.into_response()) } else { Err(unknown()) }
}
