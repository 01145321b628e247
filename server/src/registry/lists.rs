//! The requests for lists: tags, referrers, the catalog; all in pages (`n`, `last`, `Link`).

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use protocol::ids::Digest;
use protocol::oci::{MAX_MANIFEST_BYTES, MEDIA_INDEX};
use serde_json::json;

use super::answer::{Code, Refusal};
use super::handlers::blocking;
use super::route;
use super::store::RegistryStore;

/// Most names in one answer.
const MAX_PAGE: usize = 1000;
/// A list of referrers ends its page before it becomes larger than this, in bytes: it is an index, and clients take
/// none that is larger than a manifest may be.
const MAX_INDEX_BYTES: usize = MAX_MANIFEST_BYTES - 4096;

/// The tags of a repository.
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
    let body = axum::Json(json!({ "name": name, "tags": tags })).into_response();
    Ok(linked(body, &format!("/v2/{name}/tags/list"), &tags, more, ""))
}

/// The names of all repositories.
pub(super) async fn catalog(store: RegistryStore, query: &str) -> Result<Response, Refusal> {
    let (names, more) = page(blocking(move || store.repositories()).await?, query);
    let body = axum::Json(json!({ "repositories": names })).into_response();
    Ok(linked(body, "/v2/_catalog", &names, more, ""))
}

/// The manifests about a manifest, as an index. Nothing known of it is an empty list: a 404 would tell clients that
/// there is no such API, and make them keep lists of their own under tags.
pub(super) async fn referrers(
    store: RegistryStore,
    repository: String,
    subject: Digest,
    query: &str,
) -> Result<Response, Refusal> {
    let wanted = route::query(query, "artifactType");
    let (n, last) = asked(query);
    let (path, kind) = (format!("/v2/{repository}/referrers/{subject}"), wanted.clone());
    let work = move || {
        let (mut found, mut bytes, mut more) = (Vec::new(), 0, false);
        for digest in store.referrers(&repository, &subject)? {
            if digest.to_string() <= last {
                continue;
            }
            let Some(descriptor) = store.referrer(&repository, &subject, &digest)? else {
                continue;
            };
            if wanted.is_some() && descriptor.artifact_type != wanted {
                continue;
            }
            bytes += serde_json::to_vec(&descriptor).map_or(0, |text| text.len() + 1);
            // One at least, or the list would never end.
            if found.len() >= n || (bytes > MAX_INDEX_BYTES && !found.is_empty()) {
                more = n > 0;
                break;
            }
            found.push(descriptor);
        }
        Ok((found, more))
    };
    let (found, more) = blocking(work).await?;
    let names: Vec<String> = found.iter().map(|found| found.digest.to_string()).collect();
    let body = json!({ "schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": found });
    let mut response = axum::Json(body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_INDEX));
    let filter = match &kind {
        Some(kind) => {
            let applied = HeaderName::from_static("oci-filters-applied");
            headers.insert(applied, HeaderValue::from_static("artifactType"));
            format!("&artifactType={}", route::encode(kind))
        }
        None => String::new(),
    };
    Ok(linked(response, &path, &names, more.then_some(n), &filter))
}

/// What a query asks for: so many names, after this one.
fn asked(query: &str) -> (usize, String) {
    let n: Option<usize> = route::query(query, "n").and_then(|n| n.parse().ok());
    (n.unwrap_or(MAX_PAGE).min(MAX_PAGE), route::query(query, "last").unwrap_or_default())
}

/// The part of sorted names that is asked for; the number is set when there are more.
fn page(names: Vec<String>, query: &str) -> (Vec<String>, Option<usize>) {
    let (n, last) = asked(query);
    let mut rest: Vec<String> = names.into_iter().filter(|name| *name > last).collect();
    let more = rest.len() > n && n > 0;
    rest.truncate(n);
    (rest, more.then_some(n))
}

/// Adds the way to the next page.
fn linked(
    mut response: Response,
    path: &str,
    names: &[String],
    more: Option<usize>,
    filter: &str,
) -> Response {
    if let (Some(n), Some(last)) = (more, names.last()) {
        let last = route::encode(last);
        if let Ok(link) = format!("<{path}?n={n}&last={last}{filter}>; rel=\"next\"").parse() {
            response.headers_mut().insert(header::LINK, link);
        }
    }
    response
}
