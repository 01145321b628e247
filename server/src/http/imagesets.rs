//! `/v1/imagesets`: what the embedded registry has.

use axum::Json;
use axum::extract::State;
use protocol::api::ImageSetRecord;

use super::{ApiError, Shared};

pub(super) async fn list(State(app): Shared) -> Result<Json<Vec<ImageSetRecord>>, ApiError> {
    Ok(Json(app.sources.list().await?))
}
