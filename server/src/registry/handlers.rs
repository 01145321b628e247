//! The way from a request to the function that answers it, past the check of its token.

use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, header};
use axum::response::{IntoResponse, Response};

use super::access::{Denied, Right};
use super::answer::{Code, Refusal};
use super::route::{self, Route};
use super::store::RegistryStore;
use super::{RegistryError, blobs, lists, manifests, push};

/// The header that carries a digest in answers.
pub(super) const DIGEST_HEADER: &str = "docker-content-digest";

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
    let route = route::parse(request.uri().path());
    let (parts, body) = request.into_parts();
    // Before anything is said about the path: strangers learn nothing from refusals.
    let right = match (&route, &parts.method) {
        (Ok(Route::Base), _) => Right::Look,
        (_, &Method::GET | &Method::HEAD) => Right::Pull,
        _ => Right::Push,
    };
    check(&store, right, parts.headers.get(header::AUTHORIZATION))?;
    let query = parts.uri.query().unwrap_or("");
    let headers = &parts.headers;
    match (route?, parts.method) {
        (Route::Base, Method::GET | Method::HEAD) => {
            Ok(axum::Json(serde_json::json!({})).into_response())
        }
        (Route::Catalog, Method::GET) => lists::catalog(store, query).await,
        (Route::Tags { repository }, Method::GET) => lists::tags(store, repository, query).await,
        (Route::Referrers { repository, subject }, Method::GET) => {
            lists::referrers(store, repository, subject, query).await
        }
        (Route::Manifest { repository, key }, method @ (Method::GET | Method::HEAD)) => {
            manifests::get(store, repository, key, headers, method == Method::HEAD).await
        }
        (Route::Manifest { repository, key }, Method::PUT) => {
            manifests::put(store, repository, key, headers, body).await
        }
        (Route::Manifest { repository, key }, Method::DELETE) => {
            manifests::delete(store, repository, key).await
        }
        (Route::Blob { repository, digest }, method @ (Method::GET | Method::HEAD)) => {
            blobs::get(store, repository, digest, headers, method == Method::HEAD).await
        }
        (Route::Blob { repository, digest }, Method::DELETE) => {
            blobs::delete(store, repository, digest).await
        }
        (Route::Uploads { repository }, Method::POST) => {
            push::begin(store, repository, query, headers, body).await
        }
        (Route::Upload { repository, id }, Method::GET) => {
            push::status(&store, &repository, &id).await
        }
        (Route::Upload { repository, id }, Method::PATCH) => {
            push::append(&store, &repository, &id, headers, body).await
        }
        (Route::Upload { repository, id }, Method::PUT) => {
            push::finish(store, repository, id, query, headers, body).await
        }
        (Route::Upload { repository, id }, Method::DELETE) => {
            push::cancel(&store, &repository, &id).await
        }
        (_, method) => {
            Err(Refusal::new(Code::Unsupported, format!("{method} is not possible here")))
        }
    }
}

fn check(store: &RegistryStore, right: Right, header: Option<&HeaderValue>) -> Result<(), Refusal> {
    let header = header.and_then(|header| header.to_str().ok());
    store.access().check(right, header).map_err(|denied| match denied {
        Denied::Unknown if header.is_some() => {
            Refusal::new(Code::Unauthorized, "the registry does not know these credentials")
        }
        Denied::Unknown => Refusal::new(
            Code::Unauthorized,
            "a token is needed: as Bearer token, or as the password of any user",
        ),
        Denied::PullOnly => Refusal::new(Code::Denied, "this token may pull, but not push"),
    })
}

/// Runs what blocks on a thread that may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|_| Refusal::new(Code::Internal, "the request was cut off"))??)
}
