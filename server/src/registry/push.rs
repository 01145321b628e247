//! The requests that begin, continue and end uploads (OCI distribution spec, "Pushing blobs").

use std::mem;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use protocol::ids::Digest;
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinHandle;

use super::RegistryError;
use super::answer::{Code, Refusal};
use super::handlers::{DIGEST_HEADER, blocking};
use super::route;
use super::store::{RegistryStore, io_error};
use super::uploads::Upload;

/// Bytes of an upload that are gathered before they are written. Two such buffers are in memory for each upload: one
/// being filled, one being hashed and written.
const BUFFER: usize = 1 << 20;
/// How long a request waits for the one before it to let go of the same upload.
const UPLOAD_WAIT: Duration = Duration::from_secs(10);

const UPLOAD_ID_HEADER: &str = "docker-upload-uuid";

type Locked = OwnedMutexGuard<Upload>;
type Writing = JoinHandle<Result<(Locked, Vec<u8>), RegistryError>>;

/// POST: a new upload, a whole blob, or a blob of another repository.
pub(super) async fn begin(
    store: RegistryStore,
    repository: String,
    query: &str,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    if let Some(digest) = route::query(query, "mount") {
        let digest = route::parse_digest(&digest)?;
        let from = route::query(query, "from").filter(|from| route::is_repository(from));
        if let Some(from) = from {
            let (store, to) = (store.clone(), repository.clone());
            if blocking(move || store.mount(&to, &from, &digest)).await? {
                return Ok(created(&repository, &digest));
            }
        }
    }
    let (here, name) = (store.clone(), repository.clone());
    let id = blocking(move || {
        let dir = here.blob_path(&Digest([0; 32]));
        here.uploads.begin(&name).map_err(io_error("cannot begin an upload beside", &dir))
    })
    .await?
    .ok_or_else(|| Refusal::new(Code::TooManyRequests, "too many uploads are open"))?;
    if route::query(query, "digest").is_some() {
        let done =
            finish(store.clone(), repository.clone(), id.clone(), query, headers, body).await;
        if done.is_err() {
            // Nobody knows its id.
            let _ = cancel(&store, &repository, &id).await;
        }
        return done;
    }
    Ok(accepted(StatusCode::ACCEPTED, &repository, &id, 0))
}

async fn lock(store: &RegistryStore, repository: &str, id: &str) -> Result<Locked, Refusal> {
    let unknown = || Refusal::new(Code::BlobUploadUnknown, "there is no such upload");
    let upload = store.uploads.get(id).ok_or_else(unknown)?;
    let upload = tokio::time::timeout(UPLOAD_WAIT, upload.lock_owned()).await.map_err(|_| {
        Refusal::new(Code::BlobUploadInvalid, "another request is writing to this upload")
    })?;
    if upload.repository != repository || upload.ended {
        return Err(unknown());
    }
    Ok(upload)
}

/// GET: how much there is.
pub(super) async fn status(
    store: &RegistryStore,
    repository: &str,
    id: &str,
) -> Result<Response, Refusal> {
    let upload = lock(store, repository, id).await?;
    Ok(accepted(StatusCode::NO_CONTENT, repository, id, upload.size))
}

/// DELETE: never mind.
pub(super) async fn cancel(
    store: &RegistryStore,
    repository: &str,
    id: &str,
) -> Result<Response, Refusal> {
    let mut upload = lock(store, repository, id).await?;
    store.uploads.end(id, &mut upload);
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// PATCH: more bytes.
pub(super) async fn append(
    store: &RegistryStore,
    repository: &str,
    id: &str,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let upload = lock(store, repository, id).await?;
    let length = match place(headers, upload.size)? {
        Place::Wrong => {
            return Ok(accepted(StatusCode::RANGE_NOT_SATISFIABLE, repository, id, upload.size));
        }
        Place::Right(length) => length,
    };
    let upload = receive(upload, body, length).await?;
    Ok(accepted(StatusCode::ACCEPTED, repository, id, upload.size))
}

/// PUT: the last bytes, and the digest of all.
pub(super) async fn finish(
    store: RegistryStore,
    repository: String,
    id: String,
    query: &str,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let upload = lock(&store, &repository, &id).await?;
    let expected = route::query(query, "digest")
        .ok_or_else(|| Refusal::new(Code::DigestInvalid, "the query has no digest"))?;
    let expected = route::parse_digest(&expected)?;
    let length = match place(headers, upload.size)? {
        Place::Wrong => {
            let status = StatusCode::RANGE_NOT_SATISFIABLE;
            return Ok(accepted(status, &repository, &id, upload.size));
        }
        Place::Right(length) => length,
    };
    let mut upload = receive(upload, body, length).await?;
    let answer = created(&repository, &expected);
    let found = blocking(move || {
        let found = upload.digest().map_err(io_error("cannot read", &upload.path))?;
        if found == expected {
            store.take_in(&repository, &expected, &upload)?;
        }
        store.uploads.end(&id, &mut upload);
        Ok(found)
    })
    .await?;
    if found != expected {
        let reason = format!("the content is {found}, not {expected}");
        return Err(Refusal::new(Code::DigestInvalid, reason));
    }
    Ok(answer)
}

/// Where a chunk belongs, as its `Content-Range` says.
enum Place {
    /// Not where the upload stands.
    Wrong,
    /// At its end; with its length, where that is known.
    Right(Option<u64>),
}

fn place(headers: &HeaderMap, size: u64) -> Result<Place, Refusal> {
    let Some(range) = headers.get(header::CONTENT_RANGE) else { return Ok(Place::Right(None)) };
    let (first, last) = range.to_str().ok().and_then(route::chunk).ok_or_else(|| {
        Refusal::new(Code::BlobUploadInvalid, "the Content-Range is not FIRST-LAST")
    })?;
    let length = (last - first).saturating_add(1);
    let told =
        headers.get(header::CONTENT_LENGTH).and_then(|told| told.to_str().ok()?.parse().ok());
    if told.is_some_and(|told: u64| told != length) {
        let reason = "Content-Range and Content-Length contradict each other";
        return Err(Refusal::new(Code::SizeInvalid, reason));
    }
    Ok(if first == size { Place::Right(Some(length)) } else { Place::Wrong })
}

/// Writes a body to an upload: one buffer is filled while the one before is hashed and written. A body that breaks off
/// leaves what has come; one of another length than announced leaves nothing.
async fn receive(upload: Locked, body: Body, length: Option<u64>) -> Result<Locked, Refusal> {
    if body.is_end_stream() && length.is_none() {
        return Ok(upload);
    }
    let start = upload.size;
    let mut stream = body.into_data_stream();
    let mut filling = Vec::with_capacity(BUFFER);
    let mut writing = write(upload, Vec::new());
    let mut came = 0_u64;
    let broken = loop {
        let more = stream.next().await;
        if let Some(Ok(bytes)) = &more {
            came += bytes.len() as u64;
            if length.is_some_and(|length| came > length) {
                break None;
            }
            filling.extend_from_slice(bytes);
        }
        if filling.len() >= BUFFER {
            let (upload, empty) = written(writing).await?;
            writing = write(upload, mem::replace(&mut filling, empty));
        }
        match more {
            Some(Ok(_)) => {}
            Some(Err(error)) => break Some(error),
            None => break None,
        }
    };
    let (upload, _) = written(writing).await?;
    let (mut upload, _) = written(write(upload, filling)).await?;
    if let Some(error) = broken {
        let reason = format!("the body broke off: {error}");
        return Err(Refusal::new(Code::BlobUploadInvalid, reason));
    }
    if length.is_some_and(|length| length != came) {
        blocking(move || upload.truncate(start).map_err(io_error("cannot shorten", &upload.path)))
            .await?;
        let reason = "the body is not as long as its Content-Range says";
        return Err(Refusal::new(Code::SizeInvalid, reason));
    }
    Ok(upload)
}

fn write(mut upload: Locked, mut bytes: Vec<u8>) -> Writing {
    tokio::task::spawn_blocking(move || {
        if !bytes.is_empty() {
            let written = upload.append(&bytes);
            written.map_err(io_error("cannot write to", &upload.path))?;
            bytes.clear();
        }
        Ok((upload, bytes))
    })
}

async fn written(writing: Writing) -> Result<(Locked, Vec<u8>), Refusal> {
    let done = writing.await;
    Ok(done.map_err(|_| Refusal::new(Code::Internal, "the request was cut off"))??)
}

fn created(repository: &str, digest: &Digest) -> Response {
    let location = format!("/v2/{repository}/blobs/{digest}");
    let headers = [(header::LOCATION.as_str(), location), (DIGEST_HEADER, digest.to_string())];
    (StatusCode::CREATED, headers).into_response()
}

fn accepted(status: StatusCode, repository: &str, id: &str, size: u64) -> Response {
    let headers = [
        (header::LOCATION.as_str(), format!("/v2/{repository}/blobs/uploads/{id}")),
        (header::RANGE.as_str(), format!("0-{}", size.saturating_sub(1))),
        (UPLOAD_ID_HEADER, id.to_owned()),
    ];
    (status, headers).into_response()
}
