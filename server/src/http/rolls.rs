//! `/v1/rolls`: bringing nodes to a version.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use protocol::api::{Roll, RollRequest, UndoRequest};
use protocol::node::DesiredSet;

use super::{ApiError, Body, Shared};
use crate::sources::{InvalidWanted, Wanted};

pub(super) async fn list(State(app): Shared) -> Json<Vec<Roll>> {
    Json(app.inventory.rolls())
}

pub(super) async fn show(State(app): Shared, id: Path<String>) -> Result<Json<Roll>, ApiError> {
    let id = id.parse().map_err(|_| {
        ApiError::bad_request(format!("`{}` is not the number of a roll", id.as_str()))
    })?;
    Ok(Json(app.inventory.roll(id)?))
}

pub(super) async fn start(
    State(app): Shared,
    Body(request): Body<RollRequest>,
) -> Result<(StatusCode, Json<Roll>), ApiError> {
    let nodes = app.inventory.select(&request.nodes)?;
    let wanted = request.imageset.parse::<Wanted>();
    let wanted = wanted.map_err(|error: InvalidWanted| ApiError::bad_request(error.to_string()))?;
    let set = app.sources.resolve(&wanted).await?;
    let set = DesiredSet { force: request.force, ..set };
    tracing::info!(imageset = %set.name, version = %set.version, nodes = nodes.len(), "roll");
    let inventory = Arc::clone(&app.inventory);
    // A task of its own: a caller who hangs up must not leave the roll half started.
    let work = tokio::spawn(async move { inventory.start_roll(&nodes, set).await });
    let roll = work.await.map_err(|error| ApiError::internal(error.to_string()))??;
    Ok((StatusCode::CREATED, Json(roll)))
}

pub(super) async fn undo(
    State(app): Shared,
    Body(request): Body<UndoRequest>,
) -> Result<(StatusCode, Json<Vec<Roll>>), ApiError> {
    let all = request.nodes.iter().any(|node| node == "all");
    let nodes = match all {
        true => app.inventory.nodes_with(&request.name),
        false => app.inventory.select(&request.nodes)?,
    };
    if nodes.is_empty() {
        return Err(ApiError::not_found(format!("no node has ImageSet {}", request.name)));
    }
    tracing::info!(imageset = %request.name, nodes = nodes.len(), "undo");
    let inventory = Arc::clone(&app.inventory);
    // A task of its own: a caller who hangs up must not leave the roll half started.
    let work =
        tokio::spawn(async move { inventory.undo(&nodes, &request.name, request.force).await });
    let rolls = work.await.map_err(|error| ApiError::internal(error.to_string()))??;
    Ok((StatusCode::CREATED, Json(rolls)))
}
