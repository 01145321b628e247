//! Connects to the server's side of a channel: TCP, TLS where the URL says so, WebSocket.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use protocol::api::ErrorBody;
use rustls_platform_verifier::ConfigVerifierExt as _;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderValue, Uri, header};

use crate::channels::relay::websocket_config;

/// How long connecting may take, TLS and the upgrade with it.
const WITHIN: Duration = Duration::from_secs(15);
/// When an idle connection is first probed (tcp(7)).
const PROBE_AFTER: Duration = Duration::from_secs(15);

/// Plain TCP, or TLS over it.
pub(super) trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// The WebSocket.
pub(super) type Socket = WebSocketStream<Box<dyn Connection>>;

pub(super) async fn connect(url: &str, token: &str) -> anyhow::Result<Socket> {
    match tokio::time::timeout(WITHIN, open(url, token)).await {
        Ok(socket) => socket,
        Err(_) => bail!("{url} does not answer"),
    }
}

async fn open(url: &str, token: &str) -> anyhow::Result<Socket> {
    // http becomes ws and https wss (RFC 6455, section 3).
    let uri = url.replacen("http", "ws", 1).parse::<Uri>();
    let uri = uri.with_context(|| format!("{url} is no URL"))?;
    let tls = uri.scheme_str() == Some("wss");
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let host = host.to_owned();
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let stream = TcpStream::connect((host.as_str(), port)).await;
    let stream = stream.with_context(|| format!("{url} cannot be reached"))?;
    stream.set_nodelay(true)?;
    let probes = TcpKeepalive::new().with_time(PROBE_AFTER).with_interval(PROBE_AFTER / 3);
    SockRef::from(&stream).set_tcp_keepalive(&probes.with_retries(4))?;
    let stream: Box<dyn Connection> = match tls {
        false => Box::new(stream),
        true => {
            let config = rustls::ClientConfig::with_platform_verifier()?;
            let name = rustls::pki_types::ServerName::try_from(host)?;
            let connected = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
            Box::new(connected.with_context(|| format!("{url} cannot be trusted"))?)
        }
    };
    let mut request = uri.into_client_request()?;
    let bearer = HeaderValue::from_str(&format!("Bearer {token}"))?;
    request.headers_mut().insert(header::AUTHORIZATION, bearer);
    let config = Some(websocket_config());
    match tokio_tungstenite::client_async_with_config(request, stream, config).await {
        Ok((socket, _)) => Ok(socket),
        Err(Error::Http(answer)) => {
            let body = answer.body().as_deref().unwrap_or_default();
            match serde_json::from_slice::<ErrorBody>(body) {
                Ok(body) => Err(anyhow!("{}", body.error.message)),
                Err(_) => Err(anyhow!("{url} answered {}", answer.status())),
            }
        }
        Err(error) => Err(anyhow!(error).context(format!("{url} does not become a WebSocket"))),
    }
}
