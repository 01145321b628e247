//! `/v1/imagesets`: what the embedded registry has, and the removal of what it needs no more.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use protocol::api::ImageSetRecord;

use super::{ApiError, Body, Shared};
use crate::registry::{Denied, GcReport, GcRequest, Right};
use crate::sources::{SourceError, Sources};

pub(super) async fn list(State(app): Shared) -> Result<Json<Vec<ImageSetRecord>>, ApiError> {
    Ok(Json(app.sources.list().await?))
}

/// Collects the registry's garbage now. Whoever may push may do this.
pub(super) async fn gc(
    State(app): Shared,
    headers: HeaderMap,
    Body(request): Body<GcRequest>,
) -> Result<Json<GcReport>, ApiError> {
    let store = match &app.sources {
        Sources::Embedded { store, .. } => store.clone(),
        Sources::External { url, .. } => return Err(SourceError::External(url.to_string()).into()),
    };
    let token = headers.get(header::AUTHORIZATION).and_then(|token| token.to_str().ok());
    store.access().check(Right::Push, token).map_err(|denied| match denied {
        Denied::Unknown => ApiError::new(
            StatusCode::UNAUTHORIZED,
            "token_needed",
            "a push token of the registry is needed (--token or LAYERCAKE_TOKEN)",
        ),
        Denied::PullOnly => {
            let text = "this token may pull from the registry, but not change it";
            ApiError::new(StatusCode::FORBIDDEN, "token_pulls_only", text)
        }
    })?;
    let grace = request.grace_s.map_or(app.gc_grace, Duration::from_secs);
    let pinned = app.inventory.pinned();
    let work = move || store.collect(&pinned, grace, request.dry_run);
    let report = tokio::task::spawn_blocking(work).await.map_err(SourceError::Task)?;
    Ok(Json(report.map_err(SourceError::Embedded)?))
}
