//! The requests that begin, continue and end uploads, and the way from a route and method to its handler.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use protocol::ids::Digest;
use tokio::sync::OwnedMutexGuard;

use super::answer::{Code, Refusal};
use super::route::{self, Route};
use super::store::{RegistryStore, io_error};
use super::uploads::Upload;
use super::{RegistryError, content};

/// Bytes of an upload that are gathered before they are written.
const BUFFER: usize = 1 << 20;
/// How long a request waits for the one before it to let go of the same upload.
const UPLOAD_WAIT: Duration = Duration::from_secs(10);

/// The header that carries a digest in answers.
pub(super) const DIGEST_HEADER: &str = "docker-content-digest";
const UPLOAD_ID_HEADER: &str = "docker-upload-uuid";

/// Answers one request.
pub(super) async fn handle(State(store): State<RegistryStore>, request: Request) -> Response {
    let mut response = match dispatch(store, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(),
    };
    let version = HeaderValue::from_static("registry/2.0");
    response.headers_mut().insert("docker-distribution-api-version", version);
    response
}

async fn dispatch(store: RegistryStore, request: Request) -> Result<Response, Refusal> {
    let route = route::parse(request.uri().path())?;
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or("");
    match (route, parts.method) {
        (Route::Base, Method::GET | Method::HEAD) => {
            Ok(axum::Json(serde_json::json!({})).into_response())
        }
        (Route::Catalog, Method::GET) => content::catalog(store, query).await,
        (Route::Tags { repository }, Method::GET) => content::tags(store, repository, query).await,
        (Route::Manifest { repository, key }, Method::GET | Method::HEAD) => {
            content::get_manifest(store, repository, key).await
        }
        (Route::Manifest { repository, key }, Method::PUT) => {
            content::put_manifest(store, repository, key, &parts.headers, body).await
        }
        (Route::Blob { repository, digest }, Method::GET) => {
            content::get_blob(store, repository, digest, &parts.headers, true).await
        }
        (Route::Blob { repository, digest }, Method::HEAD) => {
            content::get_blob(store, repository, digest, &parts.headers, false).await
        }
        (Route::Uploads { repository }, Method::POST) => {
            begin(store, repository, query, body).await
        }
        (Route::Upload { repository, id }, Method::GET) => status(&store, &repository, &id).await,
        (Route::Upload { repository, id }, Method::PATCH) => {
            append(&store, &repository, &id, &parts.headers, body).await
        }
        (Route::Upload { repository, id }, Method::PUT) => {
            finish(store, repository, id, query, body).await
        }
        (Route::Upload { repository, id }, Method::DELETE) => {
            lock(&store, &repository, &id).await?;
            store.uploads.forget(&id);
            Ok(StatusCode::NO_CONTENT.into_response())
        }
        (_, method) => {
            Err(Refusal::new(Code::Unsupported, format!("{method} is not possible here")))
        }
    }
}

/// Runs what blocks on a thread that may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|_| Refusal::new(Code::Internal, "the request was cut off"))??)
}

async fn begin(
    store: RegistryStore,
    repository: String,
    query: &str,
    body: Body,
) -> Result<Response, Refusal> {
    if let Some(digest) = route::query(query, "mount") {
        let digest = route::parse_digest(&digest)?;
        let from = route::query(query, "from").filter(|from| route::is_repository(from));
        if let Some(from) = from
            && mount(store.clone(), repository.clone(), from, digest).await?
        {
            return Ok(created(&repository, &digest));
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
        return finish(store, repository, id, query, body).await;
    }
    Ok(accepted(StatusCode::ACCEPTED, &repository, &id, 0))
}

async fn mount(
    store: RegistryStore,
    repository: String,
    from: String,
    digest: Digest,
) -> Result<bool, Refusal> {
    blocking(move || {
        let there = store.blob_size(&from, &digest)?.is_some();
        if there {
            store.link_blob(&repository, &digest)?;
        }
        Ok(there)
    })
    .await
}

async fn lock(
    store: &RegistryStore,
    repository: &str,
    id: &str,
) -> Result<OwnedMutexGuard<Upload>, Refusal> {
    let unknown = || Refusal::new(Code::BlobUploadUnknown, "there is no such upload");
    let upload = store.uploads.get(id).ok_or_else(unknown)?;
    let upload = tokio::time::timeout(UPLOAD_WAIT, upload.lock_owned()).await.map_err(|_| {
        Refusal::new(Code::BlobUploadInvalid, "another request is writing to this upload")
    })?;
    if upload.repository != repository || store.uploads.get(id).is_none() {
        return Err(unknown());
    }
    Ok(upload)
}

async fn status(store: &RegistryStore, repository: &str, id: &str) -> Result<Response, Refusal> {
    let upload = lock(store, repository, id).await?;
    Ok(accepted(StatusCode::NO_CONTENT, repository, id, upload.size))
}

async fn append(
    store: &RegistryStore,
    repository: &str,
    id: &str,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let upload = lock(store, repository, id).await?;
    let start = headers
        .get(header::CONTENT_RANGE)
        .and_then(|range| range.to_str().ok())
        .and_then(route::chunk_start);
    if start.is_some_and(|start| start != upload.size) {
        return Ok(accepted(StatusCode::RANGE_NOT_SATISFIABLE, repository, id, upload.size));
    }
    let upload = receive(upload, body).await?;
    Ok(accepted(StatusCode::ACCEPTED, repository, id, upload.size))
}

/// Writes a body to an upload, a buffer at a time.
async fn receive(
    mut upload: OwnedMutexGuard<Upload>,
    body: Body,
) -> Result<OwnedMutexGuard<Upload>, Refusal> {
    if body.is_end_stream() {
        return Ok(upload);
    }
    let mut stream = body.into_data_stream();
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        let more = stream.next().await.transpose();
        let ended = !matches!(more, Ok(Some(_)));
        if let Ok(Some(bytes)) = &more {
            buffer.extend_from_slice(bytes);
        }
        if buffer.len() >= BUFFER || (ended && !buffer.is_empty()) {
            (upload, buffer) = blocking(move || {
                let written = upload.append(&buffer);
                written.map_err(io_error("cannot write to", &upload.path))?;
                buffer.clear();
                Ok((upload, buffer))
            })
            .await?;
        }
        if let Err(error) = more {
            let reason = format!("the body broke off: {error}");
            return Err(Refusal::new(Code::BlobUploadInvalid, reason));
        }
        if ended {
            return Ok(upload);
        }
    }
}

async fn finish(
    store: RegistryStore,
    repository: String,
    id: String,
    query: &str,
    body: Body,
) -> Result<Response, Refusal> {
    let upload = lock(&store, &repository, &id).await?;
    let expected = route::query(query, "digest")
        .ok_or_else(|| Refusal::new(Code::DigestInvalid, "the query has no digest"))?;
    let expected = route::parse_digest(&expected)?;
    let upload = receive(upload, body).await?;
    let found = upload.digest();
    store.uploads.forget(&id);
    if found != expected {
        let reason = format!("the content is {found}, not {expected}");
        return Err(Refusal::new(Code::DigestInvalid, reason));
    }
    let answer = created(&repository, &expected);
    blocking(move || store.take_in(&repository, &expected, &upload.file, &upload.path)).await?;
    Ok(answer)
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
