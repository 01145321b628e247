//! `/v1/layer0` and `/boot/layer0`: Layer0 builds, who may bring them, and bringing nodes to them.

use std::sync::Arc;

use axum::Json;
use axum::body::Body as Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use futures_util::StreamExt;
use protocol::api::{Layer0Node, Layer0Record, Layer0Request, Layer0Upload};
use protocol::ids::{Digest, Name};
use protocol::layer0::{MAX_MANIFEST_BYTES, MAX_SIGNATURE_BYTES, SIGNATURE};
use protocol::node::{Desired, Layer0How};
use serde::Deserialize;

use super::boot::MaybeMachine;
use super::{ApiError, App, Body, Shared, file, query};
use crate::clock::now_ms;
use crate::inventory::Layer0Wish;
use crate::layer0::Layer0Error;
use crate::registry::{Access, Denied, Right};

impl From<Layer0Error> for ApiError {
    fn from(error: Layer0Error) -> Self {
        use Layer0Error as E;
        let (status, code) = match &error {
            E::Unknown(_) => (StatusCode::NOT_FOUND, "layer0_not_found"),
            E::Ambiguous(_) => (StatusCode::BAD_REQUEST, "layer0_ambiguous"),
            E::Incomplete { .. } | E::Wrong { .. } => (StatusCode::BAD_REQUEST, "layer0_wrong"),
            E::Needed { .. } => (StatusCode::CONFLICT, "layer0_needed"),
            E::Io { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "layer0_disk"),
        };
        Self::new(status, code, super::error_chain(&error))
    }
}

/// Runs what reads and writes files where it may.
pub(super) async fn blocking<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&App) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let app = Arc::clone(app);
    let done = tokio::task::spawn_blocking(move || work(&app)).await;
    done.map_err(|error| ApiError::internal(error.to_string()))
}

/// The build that machines boot whom nobody asked for another; imported if it is new.
pub(super) async fn default_build(app: &Arc<App>) -> Result<Option<Digest>, ApiError> {
    blocking(app, |app| app.layer0.default_build(|| app.inventory.layer0_pinned())).await
}

/// Names the site's archives in a document that sends its node to another Layer0: netboot gives it the same ones.
pub(super) async fn add_archives(app: &Arc<App>, desired: &mut Desired) -> Result<(), ApiError> {
    let node = desired.node.clone();
    if let Some(layer0) = desired.layer0.as_mut().filter(|layer0| layer0.boot_id.is_some()) {
        let named = move |app: &App| app.archives.of(app.overlays.of_node(&node));
        layer0.archives = blocking(app, named).await?;
    }
    Ok(())
}

fn digest(hex: &str) -> Result<Digest, ApiError> {
    let text = format!("sha256:{}", hex.strip_prefix("sha256:").unwrap_or(hex));
    text.parse().map_err(|_| ApiError::bad_request("the digest of a Layer0 has 64 digits"))
}

/// Whoever may push to the registry may bring and remove builds.
fn may_push(access: &Access, headers: &HeaderMap) -> Result<(), ApiError> {
    let token = headers.get(header::AUTHORIZATION).and_then(|token| token.to_str().ok());
    access.check(Right::Push, token).map_err(|denied| match denied {
        Denied::Unknown => ApiError::new(
            StatusCode::UNAUTHORIZED,
            "token_needed",
            "a push token of the registry is needed (--token or LAYERCAKE_TOKEN)",
        ),
        Denied::PullOnly => {
            let text = "this token may pull from the registry, but not change what nodes boot";
            ApiError::new(StatusCode::FORBIDDEN, "token_pulls_only", text)
        }
    })
}

/// A file of a build; the initramfs tells the timeline.
pub(super) async fn serve(
    State(app): Shared,
    Path((hex, name)): Path<(String, String)>,
    machine: Result<Query<MaybeMachine>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let machine = query(machine)?;
    let digest = digest(&hex)?;
    let Some(path) = app.layer0.file(&digest, &name) else {
        return Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "no_file",
            format!("Layer0 {digest} has no file `{name}` here"),
        ));
    };
    let last = name == protocol::layer0::INITRAMFS;
    let sent = move || {
        if let Some(mac) = machine.mac().filter(|_| last) {
            tracing::info!(%mac, "kernel and initramfs are sent");
            app.inventory.initramfs_sent(mac, now_ms());
        }
    };
    file::answer(&path, &headers, sent).await
}

pub(super) async fn list(State(app): Shared) -> Result<Json<Vec<Layer0Record>>, ApiError> {
    default_build(&app).await?;
    Ok(Json(blocking(&app, |app| app.layer0.list()).await?))
}

#[derive(Debug, Deserialize)]
pub(super) struct Called {
    #[serde(default)]
    name: Option<Name>,
}

/// The manifest of a build that is being uploaded.
pub(super) async fn begin(
    State(app): Shared,
    called: Result<Query<Called>, QueryRejection>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Layer0Upload>, ApiError> {
    may_push(&app.layer0_access, &headers)?;
    let name = query(called)?.name;
    let manifest = read(body, MAX_MANIFEST_BYTES).await?;
    let begun = blocking(&app, move |app| app.layer0.begin(&manifest, name.as_ref())).await?;
    Ok(Json(begun?))
}

/// A file of it.
pub(super) async fn receive(
    State(app): Shared,
    Path((hex, name)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    may_push(&app.layer0_access, &headers)?;
    let digest = digest(&hex)?;
    if name == SIGNATURE {
        let signature = read(body, MAX_SIGNATURE_BYTES).await?;
        blocking(&app, move |app| app.layer0.sign(&digest, &signature)).await??;
        return Ok(StatusCode::NO_CONTENT);
    }
    let mut incoming = blocking(&app, move |app| app.layer0.receive(&digest, &name)).await??;
    let mut body = body.into_data_stream();
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|error| ApiError::bad_request(error.to_string()))?;
        incoming.write(&chunk)?;
    }
    blocking(&app, move |app| app.layer0.received(&digest, incoming)).await??;
    Ok(StatusCode::NO_CONTENT)
}

async fn read(body: Bytes, limit: u64) -> Result<Vec<u8>, ApiError> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let bytes = axum::body::to_bytes(body, limit).await;
    bytes.map(|bytes| bytes.to_vec()).map_err(|_| {
        let text = format!("the body broke off, or is larger than {limit} bytes");
        ApiError::bad_request(text)
    })
}

pub(super) async fn remove(
    State(app): Shared,
    Path(hex): Path<String>,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    may_push(&app.layer0_access, &headers)?;
    let digest = digest(&hex)?;
    let who = app.inventory.layer0_users(&digest);
    blocking(&app, move |app| app.layer0.remove(&digest, who)).await??;
    Ok(StatusCode::NO_CONTENT)
}

/// Brings nodes to a build.
pub(super) async fn start(
    State(app): Shared,
    Body(request): Body<Layer0Request>,
) -> Result<(StatusCode, Json<Vec<Layer0Node>>), ApiError> {
    let Layer0Request { nodes, layer0, how, again, force } = request;
    let nodes = app.inventory.select(&nodes)?;
    default_build(&app).await?;
    let build = blocking(&app, move |app| app.layer0.find(&layer0)).await??;
    let agent = (how == Layer0How::Agent).then_some(build.agent_digest);
    if agent.is_some() && !build.agent_alone {
        let text = format!(
            "{} has no {}: it was built by an older build-image, or added without it",
            build.digest,
            protocol::layer0::AGENT
        );
        return Err(ApiError::new(StatusCode::CONFLICT, "layer0_without_agent", text));
    }
    let wish = Layer0Wish { digest: build.digest, how, agent, again, force };
    tracing::info!(layer0 = %build.digest, how = how.as_str(), nodes = nodes.len(), "layer0");
    let inventory = Arc::clone(&app.inventory);
    // A task of its own: a caller who hangs up must not leave the change half done.
    let work = tokio::spawn(async move { inventory.want_layer0(&nodes, &wish).await });
    let asked = work.await.map_err(|error| ApiError::internal(error.to_string()))??;
    Ok((StatusCode::CREATED, Json(asked)))
}
