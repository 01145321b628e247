//! `/v1/nodes/{id}/channels`: an operator asks for one, and both ends come with a WebSocket upgrade (RFC 6455).
//!
//! The tokens, one for each end and each good once, are what keeps a web page of another origin and other nodes out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use protocol::channel::{ChannelBody, ChannelCreated, ChannelId};
use protocol::ids::NodeId;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::sendfile::Conn;
use super::{ApiError, App, Body, Shared, node_id};
use crate::channels::relay::{self, Socket, websocket_config};
use crate::channels::{DeskError, Place, Random, ResolveError, resolve};
use crate::clock::now_ms;

/// When an idle operator's connection is first probed, and how often then (tcp(7)): one that stopped reading still answers.
const PROBE_AFTER: Duration = Duration::from_secs(15);

impl From<DeskError> for ApiError {
    fn from(error: DeskError) -> Self {
        let (status, code) = match &error {
            DeskError::NotListening { .. } => (StatusCode::CONFLICT, "not_listening"),
            DeskError::Crowded(_) => (StatusCode::TOO_MANY_REQUESTS, "too_many_channels"),
            DeskError::NoChannel(_) => (StatusCode::NOT_FOUND, "no_channel"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<ResolveError> for ApiError {
    fn from(error: ResolveError) -> Self {
        let (status, code) = match &error {
            ResolveError::Unknown { .. } => (StatusCode::NOT_FOUND, "container_not_found"),
            ResolveError::Missing { .. } | ResolveError::Ambiguous { .. } => {
                (StatusCode::CONFLICT, "ambiguous_container")
            }
            ResolveError::NotReported(_) => (StatusCode::CONFLICT, "not_reported"),
        };
        Self::new(status, code, error.to_string())
    }
}

pub(super) async fn ask(
    State(app): Shared,
    id: Path<String>,
    Body(body): Body<ChannelBody>,
) -> Result<(StatusCode, Json<ChannelCreated>), ApiError> {
    let node = node_id(&id)?;
    let record = app.inventory.get(&node)?;
    if let Some(problem) = body.wish.problem() {
        return Err(ApiError::bad_request(problem));
    }
    let path = resolve(&node, record.observed.as_ref(), body.container.as_ref(), &body.wish)?;
    let random = Random::draw().map_err(|error| ApiError::internal(error.to_string()))?;
    let made = app.channels.ask(&node, path, body.wish, &random, Instant::now())?;
    Ok((StatusCode::CREATED, Json(made)))
}

pub(super) async fn operator(
    State(app): Shared,
    Path((node, id)): Path<(String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    let node = node_id(&Path(node))?;
    let id = channel_id(&id)?;
    let (upgrade, answer) = handshake(request.headers(), request.extensions())?;
    let token = bearer(request.headers());
    let place = app.channels.operator_came(&node, &id, token, Instant::now())?;
    tokio::spawn(async move {
        match upgraded(upgrade, true).await {
            Ok(socket) => converse(&app, &node, place, socket).await,
            Err(error) => tracing::debug!(%node, channel = %id, "operator's upgrade: {error}"),
        }
    });
    Ok(answer)
}

pub(super) async fn node(
    State(app): Shared,
    Path((node, id)): Path<(String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    let node = node_id(&Path(node))?;
    let id = channel_id(&id)?;
    let (upgrade, answer) = handshake(request.headers(), request.extensions())?;
    let hand_over = app.channels.node_came(&node, &id, bearer(request.headers()))?;
    tokio::spawn(async move {
        match upgraded(upgrade, false).await {
            // An operator that has left meanwhile: the connection is closed.
            Ok(socket) => drop(hand_over.send(socket)),
            Err(error) => tracing::debug!(%node, channel = %id, "node's upgrade: {error}"),
        }
    });
    Ok(answer)
}

async fn converse(app: &Arc<App>, node: &NodeId, mut place: Place<Socket>, mut socket: Socket) {
    let request = place.request();
    let container = request.container.as_ref().map(ToString::to_string).unwrap_or_default();
    let kind = match &request.wish {
        protocol::channel::ChannelWish::Exec(wish) => {
            format!("exec {}", wish.argv.first().map_or("", String::as_str))
        }
        wish => format!("{wish:?}"),
    };
    let id = request.id.clone();
    tracing::info!(%node, channel = %id, container, kind, "channel opened");
    let ending = relay::run(&mut socket, &mut place, app.shutdown.clone()).await;
    drop(place);
    tracing::info!(%node, channel = %id, "channel ended: {ending}");
    let now = now_ms();
    let seen = app.inventory.get(node).map_or("never".to_owned(), |record| {
        format!("{} s ago", now.saturating_sub(record.last_seen_ms) / 1000)
    });
    relay::farewell(socket, ending.for_operator(node.as_str(), &seen), &ending).await;
}

fn channel_id(text: &str) -> Result<ChannelId, ApiError> {
    text.parse().map_err(|error: protocol::ids::InvalidId| ApiError::bad_request(error.to_string()))
}

fn bearer(headers: &HeaderMap) -> &str {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    value.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default()
}

/// The server's part of RFC 6455, section 4.2.
fn handshake(
    headers: &HeaderMap,
    extensions: &axum::http::Extensions,
) -> Result<(OnUpgrade, Response), ApiError> {
    let says = |name, word: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        value.split(',').any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    let asked = says(header::CONNECTION, "upgrade") && says(header::UPGRADE, "websocket");
    let (Some(key), true, true) = (key, asked, says(header::SEC_WEBSOCKET_VERSION, "13")) else {
        let text = "this address takes WebSocket upgrades (RFC 6455, version 13) only";
        return Err(ApiError::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", text));
    };
    let upgrade = extensions.get::<OnUpgrade>().cloned();
    let upgrade = upgrade.ok_or_else(|| ApiError::internal("this connection has no upgrade"))?;
    let headers = [
        (header::CONNECTION, "Upgrade".to_owned()),
        (header::UPGRADE, "websocket".to_owned()),
        (header::SEC_WEBSOCKET_ACCEPT, derive_accept_key(key.as_bytes())),
    ];
    Ok((upgrade, (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()))
}

/// The connection itself, once the answer is out.
async fn upgraded(upgrade: OnUpgrade, patient: bool) -> Result<Socket, String> {
    let upgraded: Upgraded = upgrade.await.map_err(|error| super::error_chain(&error))?;
    let parts = upgraded.downcast::<TokioIo<Conn>>().map_err(|_| "no TCP connection")?;
    let stream = parts.io.into_inner().into_stream();
    tune(&stream, patient).map_err(|error| error.to_string())?;
    let (read, config) = (parts.read_buf.to_vec(), websocket_config());
    Ok(Socket::from_partially_read(stream, read, Role::Server, Some(config)).await)
}

/// An operator may stop reading for as long as it likes (a pager, Ctrl-S) while its machine answers probes; a node may not.
fn tune(stream: &TcpStream, patient: bool) -> std::io::Result<()> {
    let socket = SockRef::from(stream);
    if patient {
        socket.set_tcp_user_timeout(None)?;
    }
    let probes = TcpKeepalive::new().with_time(PROBE_AFTER).with_interval(PROBE_AFTER / 3);
    socket.set_tcp_keepalive(&probes.with_retries(4))
}
