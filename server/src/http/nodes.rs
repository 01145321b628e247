//! `/v1/nodes`: the inventory, the long poll for what is wanted, the reports of what is.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use protocol::api::{BusyBody, MAX_LONG_POLL_S, NodeRecord, PowerBody};
use protocol::facts::NodeFacts;
use protocol::node::Observed;
use protocol::why::Why;
use serde::Deserialize;
use tokio::time::Instant;

use super::{ApiError, Body, Shared, node_id, query};
use crate::clock::now_ms;
use crate::desired::is_news;

/// Most characters of the reason why a node is busy.
const MAX_REASON: usize = 200;

#[derive(Debug, Deserialize)]
pub(super) struct Poll {
    #[serde(default)]
    after: Option<u64>,
    #[serde(default)]
    wait: u64,
    /// Tag of the registry table and the files that the node has; absent from agents that know of none.
    #[serde(default)]
    registries: Option<String>,
}

pub(super) async fn list(State(app): Shared) -> Json<Vec<NodeRecord>> {
    Json(app.inventory.list())
}

pub(super) async fn show(
    State(app): Shared,
    id: Path<String>,
) -> Result<Json<NodeRecord>, ApiError> {
    Ok(Json(app.inventory.get(&node_id(&id)?)?))
}

pub(super) async fn why(State(app): Shared, id: Path<String>) -> Result<Json<Why>, ApiError> {
    Ok(Json(crate::why::why(&app.inventory.get(&node_id(&id)?)?, now_ms())))
}

/// What its hardware is; `null` where its agent has not said yet.
pub(super) async fn hardware(
    State(app): Shared,
    id: Path<String>,
) -> Result<Json<Option<NodeFacts>>, ApiError> {
    let node = node_id(&id)?;
    let hardware = app.inventory.hardware(&node)?;
    Ok(Json(hardware.map(|hardware| NodeFacts { node, hardware })))
}

pub(super) async fn desired(
    State(app): Shared,
    id: Path<String>,
    poll: Result<Query<Poll>, QueryRejection>,
) -> Result<Response, ApiError> {
    let id = node_id(&id)?;
    let poll = query(poll)?;
    let deadline = Instant::now() + Duration::from_secs(poll.wait.min(MAX_LONG_POLL_S));
    // Subscribed before it is read, so that no change falls between the two.
    let mut news = app.inventory.subscribe(&id, now_ms())?;
    let mut channels = app.channels.poll(&id);
    let mut files = app.files.subscribe();
    let mut shutdown = app.shutdown.clone();
    loop {
        let mut desired = app.inventory.desired(&id)?;
        desired.channels = channels.requests(std::time::Instant::now());
        let is_new = is_news(&desired, poll.after) || !desired.channels.is_empty();
        if is_new || app.files.is_news(&app.registries, &id, poll.registries.as_deref()) {
            super::layer0::add_archives(&app, &mut desired).await?;
            return Ok(Json(app.files.tell(&app.registries, desired)).into_response());
        }
        tokio::select! {
            changed = news.changed() => if changed.is_err() { break },
            () = channels.news() => {}
            () = files.next() => {}
            () = tokio::time::sleep_until(deadline) => break,
            _ = shutdown.wait_for(|stop| *stop) => break,
        }
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn observed(
    State(app): Shared,
    id: Path<String>,
    Body(report): Body<Observed>,
) -> Result<StatusCode, ApiError> {
    app.inventory.observed(&node_id(&id)?, report, now_ms())?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn power(
    State(app): Shared,
    id: Path<String>,
    Body(body): Body<PowerBody>,
) -> Result<StatusCode, ApiError> {
    let id = node_id(&id)?;
    tracing::info!(node = %id, action = ?body.action, "power");
    let inventory = Arc::clone(&app.inventory);
    // A task of its own: a caller who hangs up must not leave the change half done.
    let work = tokio::spawn(async move { inventory.power(&id, body.action).await });
    work.await.map_err(|error| ApiError::internal(error.to_string()))??;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn busy(
    State(app): Shared,
    id: Path<String>,
    Body(body): Body<BusyBody>,
) -> Result<StatusCode, ApiError> {
    let id = node_id(&id)?;
    let text = |why: String| why.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect();
    let busy = body.busy.map(text);
    tracing::info!(node = %id, busy = busy.as_deref().unwrap_or("no"), "busy");
    let inventory = Arc::clone(&app.inventory);
    // A task of its own: a caller who hangs up must not leave the change half done.
    let work = tokio::spawn(async move { inventory.busy(&id, busy).await });
    work.await.map_err(|error| ApiError::internal(error.to_string()))??;
    Ok(StatusCode::NO_CONTENT)
}
