//! The HTTP routes, all in [`router`]: boot files, the API, and the embedded registry beside them.

mod boot;
mod channels;
mod error;
pub mod file;
mod imagesets;
mod layer0;
pub mod listen;
mod nodes;
mod rolls;
pub(crate) mod sendfile;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Query, Request};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use bytes::Bytes;
use protocol::ids::NodeId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tower_http::trace::TraceLayer;

pub use self::error::ApiError;
pub(crate) use self::error::chain as error_chain;
use crate::channels::Desk;
use crate::channels::relay::Socket;
use crate::files::Files;
use crate::inventory::Inventory;
use crate::layer0::Layer0Store;
use crate::layer0::archives::Archives;
use crate::overlays::Overlays;
use crate::registries::Known;
use crate::registry::Access;
use crate::sources::Sources;

/// Largest request body of the API, in bytes.
pub const MAX_BODY_BYTES: usize = 1 << 20;

/// What the handlers share.
#[derive(Debug)]
pub struct App {
    /// Nodes and rolls.
    pub inventory: Arc<Inventory>,
    /// Where ImageSets are looked up.
    pub sources: Sources,
    /// What nodes are told of registries.
    pub registries: Known,
    /// The files that nodes are given.
    pub files: Arc<Files>,
    /// Base URL of this server, as nodes reach it.
    pub url: String,
    /// More kernel arguments for every node.
    pub cmdline: String,
    /// Where `vmlinuz` and `initramfs.img` are.
    pub layer0_dir: PathBuf,
    /// The archives that nodes get beside the initramfs.
    pub overlays: Overlays,
    /// The Layer0 builds.
    pub layer0: Layer0Store,
    /// What is in the archives, for nodes that go to another Layer0.
    pub archives: Archives,
    /// Who may bring Layer0 builds: those who may push to the registry.
    pub layer0_access: Access,
    /// Where `ipxe.efi` is, for UEFI HTTP Boot: the TFTP server's directory.
    pub loader_dir: Option<PathBuf>,
    /// Where the ends of channels meet.
    pub channels: Arc<Desk<Socket>>,
    /// How long the registry keeps what nothing refers to.
    pub gc_grace: Duration,
    /// True once the server is to end: long polls end with it.
    pub shutdown: watch::Receiver<bool>,
}

/// `GET /v1/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct VersionBody {
    /// Version of this program.
    pub version: String,
    /// [`protocol::PROTOCOL_VERSION`].
    pub protocol: u32,
}

type Shared = axum::extract::State<Arc<App>>;

/// Every route of the server. `registry` is the embedded registry's router, empty where an external one is used.
pub fn router(app: Arc<App>, registry: Router) -> Router {
    let api = Router::new()
        .route("/v1/version", get(version))
        .route("/v1/nodes", get(nodes::list))
        .route("/v1/nodes/{id}", get(nodes::show))
        .route("/v1/nodes/{id}/why", get(nodes::why))
        .route("/v1/nodes/{id}/desired", get(nodes::desired))
        .route("/v1/nodes/{id}/hardware", get(nodes::hardware))
        .route("/v1/nodes/{id}/observed", put(nodes::observed))
        .route("/v1/nodes/{id}/power", post(nodes::power))
        .route("/v1/nodes/{id}/channels", post(channels::ask))
        .route("/v1/nodes/{id}/channels/{channel}/node", get(channels::node))
        .route("/v1/nodes/{id}/channels/{channel}/operator", get(channels::operator))
        .route("/v1/nodes/{id}/busy", post(nodes::busy))
        .route("/v1/layer0", get(layer0::list).post(layer0::begin))
        .route("/v1/layer0/start", post(layer0::start))
        .route("/v1/layer0/{digest}", delete(layer0::remove))
        .route("/v1/layer0/{digest}/{file}", put(layer0::receive))
        .route("/v1/imagesets", get(imagesets::list))
        .route("/v1/imagesets/gc", post(imagesets::gc))
        .route("/v1/rolls", get(rolls::list).post(rolls::start))
        .route("/v1/rolls/undo", post(rolls::undo))
        .route("/v1/rolls/{id}", get(rolls::show))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn(same_origin));
    let boot = Router::new()
        .route("/boot/ipxe", get(boot::ipxe))
        .route("/boot/vmlinuz", get(boot::vmlinuz))
        .route("/boot/initramfs.img", get(boot::initramfs))
        .route("/boot/overlays/{name}", get(boot::overlay))
        .route("/boot/layer0/{digest}/{file}", get(layer0::serve))
        .route("/boot/ipxe.efi", get(boot::loader));
    api.merge(boot)
        .with_state(app)
        .merge(registry)
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(TraceLayer::new_for_http())
}

async fn version() -> axum::Json<VersionBody> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    axum::Json(VersionBody { version, protocol: protocol::PROTOCOL_VERSION })
}

async fn no_route(request: Request) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "no_route",
        format!("no such path: {}", request.uri().path()),
    )
}

async fn no_method(request: Request) -> ApiError {
    let text = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "no_method", text)
}

/// Refuses changes that a web page of another origin makes a browser send.
async fn same_origin(request: Request, next: Next) -> Response {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if reads || is_same_origin(request.headers()) {
        return next.run(request).await;
    }
    let text = "changes are not taken from web pages of another origin";
    ApiError::new(StatusCode::FORBIDDEN, "foreign_origin", text).into_response()
}

fn is_same_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    origin.is_some_and(|(_, origin_host)| Some(origin_host) == host)
}

/// A JSON body; every way in which it can be wrong answers in the API's own form.
#[derive(Debug)]
struct Body<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes =
            Bytes::from_request(request, state).await.map_err(|rejection| {
                match rejection.status() {
                    StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(
                        StatusCode::PAYLOAD_TOO_LARGE,
                        "too_large",
                        format!("the body is larger than the {MAX_BODY_BYTES} bytes that are read"),
                    ),
                    _ => ApiError::bad_request(rejection.body_text()),
                }
            })?;
        serde_json::from_slice(&bytes)
            .map(Self)
            .map_err(|error| ApiError::bad_request(format!("the body is malformed: {error}")))
    }
}

/// A query string, likewise.
fn query<T>(
    parsed: Result<Query<T>, axum::extract::rejection::QueryRejection>,
) -> Result<T, ApiError> {
    parsed
        .map(|Query(values)| values)
        .map_err(|rejection| ApiError::bad_request(rejection.body_text()))
}

fn node_id(Path(text): &Path<String>) -> Result<NodeId, ApiError> {
    text.parse().map_err(|error: protocol::ids::InvalidId| ApiError::bad_request(error.to_string()))
}

#[cfg(test)]
mod tests;
