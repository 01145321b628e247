//! The requests for blobs: GET, HEAD and DELETE.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::ids::Digest;

use super::answer::{Code, Refusal};
use super::handlers::{DIGEST_HEADER, blocking};
use super::store::{RegistryStore, if_there, io_error};
use super::stream;
use crate::http::file::{Part, parse_range};
use crate::http::sendfile::FilePart;

fn unknown(digest: &Digest) -> Refusal {
    Refusal::new(Code::BlobUnknown, format!("the repository has no blob {digest}"))
}

/// GET and HEAD of a blob, whole or one range of it.
pub(super) async fn get(
    store: RegistryStore,
    repository: String,
    digest: Digest,
    headers: &HeaderMap,
    head: bool,
) -> Result<Response, Refusal> {
    let found = blocking(move || {
        if head {
            store.refresh(&repository, &digest)?;
        }
        let Some(size) = store.blob_size(&repository, &digest)? else { return Ok(None) };
        if head {
            return Ok(Some((size, None)));
        }
        let path = store.blob_path(&digest);
        // A collection may have taken it away in between.
        let file = if_there(File::open(&path)).map_err(io_error("cannot read", &path))?;
        Ok(file.map(|file| (size, Some(file))))
    });
    let (size, file) = found.await?.ok_or_else(|| unknown(&digest))?;
    let etag = format!("\"{digest}\"");
    if matches(headers, &etag) {
        return Ok(not_modified(&digest));
    }
    let same = headers.get(header::IF_RANGE).is_none_or(|tag| tag.as_bytes() == etag.as_bytes());
    let asked = headers.get(header::RANGE).filter(|_| same).and_then(|range| range.to_str().ok());
    let (first, length, status) = match parse_range(asked, size) {
        Part::Whole => (0, size, StatusCode::OK),
        Part::Range(first, last) => (first, last - first + 1, StatusCode::PARTIAL_CONTENT),
        Part::Outside => {
            let range = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, range).into_response());
        }
    };
    let unreadable = |_| Refusal::new(Code::Internal, "the blob cannot be read");
    let (body, part) = match file {
        Some(mut file) => {
            file.seek(SeekFrom::Start(first)).map_err(unreadable)?;
            let same = Arc::new(file.try_clone().map_err(unreadable)?);
            (stream::body(file, length), Some(FilePart { file: same, first, length }))
        }
        None => (Body::empty(), None),
    };
    let mut response = (
        status,
        [
            (header::CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
            (header::CONTENT_LENGTH.as_str(), length.to_string()),
            (header::ACCEPT_RANGES.as_str(), "bytes".to_owned()),
            (header::ETAG.as_str(), etag),
            (DIGEST_HEADER, digest.to_string()),
        ],
        body,
    )
        .into_response();
    if let Some(part) = part {
        response.extensions_mut().insert(part);
    }
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {first}-{}/{size}", first + length - 1);
        if let Ok(range) = range.parse() {
            response.headers_mut().insert(header::CONTENT_RANGE, range);
        }
    }
    Ok(response)
}

/// DELETE of a blob from one repository.
pub(super) async fn delete(
    store: RegistryStore,
    repository: String,
    digest: Digest,
) -> Result<Response, Refusal> {
    if blocking(move || store.delete_blob(&repository, &digest)).await? {
        return Ok(StatusCode::ACCEPTED.into_response());
    }
    Err(unknown(&digest))
}

/// The client has it.
pub(super) fn not_modified(digest: &Digest) -> Response {
    let headers =
        [(header::ETAG.as_str(), format!("\"{digest}\"")), (DIGEST_HEADER, digest.to_string())];
    (StatusCode::NOT_MODIFIED, headers).into_response()
}

/// Whether the client says that it has this already (RFC 9110, 13.1.2).
pub(super) fn matches(headers: &HeaderMap, etag: &str) -> bool {
    let Some(tags) = headers.get(header::IF_NONE_MATCH).and_then(|tags| tags.to_str().ok()) else {
        return false;
    };
    tags.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag || tag.trim() == "*")
}
