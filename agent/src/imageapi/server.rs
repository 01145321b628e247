//! The ImageAPI's sockets: a Unix socket for root, and TCP with mutual TLS where a node is told to. HTTP/1.1 by hyper on one
//! thread; requests are worked on by a few others, because mounting and pulling block.
//!
//! Bounded: connections, the time a head and a body may take, and the size of a body. What is answered is decided in
//! [`super::api`].

use std::convert::Infallible;
use std::fs;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, WARNING};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

use super::api::{self, Answer};
use super::engine::Engine;
use super::error::ApiError;
use super::route::{self, MAX_BODY};
use super::tls;
use crate::paths::RunDirs;

/// The socket's name in the run directory.
pub const SOCKET: &str = "imageapi.sock";
/// Connections at a time over all sockets; further ones wait.
const MAX_CONNECTIONS: usize = 64;
/// Requests worked on at a time; further ones wait.
const MAX_REQUESTS: usize = 16;
/// Longest time until a request's head is there, also on a kept connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for a request's body, and for a TLS handshake.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause after a failed accept, so that a lasting failure does not take a whole core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often what nobody holds, but the system still used, is tried again.
const COLLECT_PACE: Duration = Duration::from_secs(2);

/// Where the ImageAPI listens beside its Unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// Address and port.
    pub address: SocketAddr,
    /// The directory with `cert.pem`, `key.pem` and `clients.pem`.
    pub tls_dir: PathBuf,
}

/// Why the ImageAPI is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket could not be made.
    #[error("imageapi: cannot listen on {place}")]
    Listen {
        /// Path or address.
        place: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// No thread or runtime.
    #[error("imageapi: cannot start its thread")]
    Thread(#[source] io::Error),
    /// Certificates or key cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

/// Serves from a thread of its own as long as the process lives. Returns when the Unix socket is there.
///
/// # Errors
/// If a socket cannot be made, or the certificates for TCP cannot be used. Nothing is served then.
pub fn start(
    engine: Arc<Engine>,
    run: &RunDirs,
    remote: Option<&Remote>,
) -> Result<(), ServeError> {
    let path = run.root().join(SOCKET);
    let unix = listen_unix(&path)
        .map_err(|source| ServeError::Listen { place: path.display().to_string(), source })?;
    let tcp = remote.map(listen_tcp).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_REQUESTS)
        .thread_name("imageapi-work")
        .build()
        .map_err(ServeError::Thread)?;
    let body = move || {
        runtime.block_on(async move {
            let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
            let collector = collect(Arc::clone(&engine));
            let unix = serve_unix(unix, Arc::clone(&engine), Arc::clone(&slots));
            let tcp = async {
                if let Some((listener, acceptor)) = tcp {
                    serve_tcp(listener, acceptor, engine, slots).await;
                }
            };
            tokio::join!(collector, unix, tcp);
        });
    };
    std::thread::Builder::new()
        .name("imageapi".to_owned())
        .spawn(body)
        .map_err(ServeError::Thread)?;
    Ok(())
}

/// A socket that only root can open from its first moment on: it appears under its name when its mode is set.
fn listen_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    fs::rename(&temporary, path)?;
    Ok(listener)
}

fn listen_tcp(remote: &Remote) -> Result<(std::net::TcpListener, TlsAcceptor), ServeError> {
    let acceptor = TlsAcceptor::from(Arc::new(tls::server_config(&remote.tls_dir)?));
    let listen = || {
        let listener = std::net::TcpListener::bind(remote.address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let place = remote.address.to_string();
    let listener = listen().map_err(|source| ServeError::Listen { place, source })?;
    log::info!("imageapi: listens on {} (mutual TLS)", remote.address);
    Ok((listener, acceptor))
}

/// What the system used when its last holder went is tried again. It sleeps until the table changes: a quiet node stays quiet.
async fn collect(engine: Arc<Engine>) {
    loop {
        while engine.has_garbage() {
            tokio::time::sleep(COLLECT_PACE).await;
            let engine = Arc::clone(&engine);
            let done = tokio::task::spawn_blocking(move || {
                let _turn = engine.turn();
                engine.collect();
            });
            if let Err(error) = done.await {
                log::error!("imageapi: {error}");
            }
        }
        engine.changed().await;
    }
}

async fn serve_unix(
    listener: std::os::unix::net::UnixListener,
    engine: Arc<Engine>,
    slots: Arc<Semaphore>,
) {
    let listener = match UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return log::error!("imageapi: {error}"),
    };
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.ok();
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(converse(stream, Arc::clone(&engine), slot))),
            Err(error) => failed_accept(&error).await,
        }
    }
}

async fn serve_tcp(
    listener: std::net::TcpListener,
    acceptor: TlsAcceptor,
    engine: Arc<Engine>,
    slots: Arc<Semaphore>,
) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return log::error!("imageapi: {error}"),
    };
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.ok();
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                failed_accept(&error).await;
                continue;
            }
        };
        let (acceptor, engine) = (acceptor.clone(), Arc::clone(&engine));
        drop(tokio::spawn(async move {
            match tokio::time::timeout(BODY_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => converse(stream, engine, slot).await,
                Ok(Err(error)) => log::warn!("imageapi: {peer}: {error}"),
                Err(_) => log::debug!("imageapi: {peer}: no TLS handshake"),
            }
        }));
    }
}

async fn failed_accept(error: &io::Error) {
    log::warn!("imageapi: accept: {error}");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

/// One connection, to its end.
async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    engine: Arc<Engine>,
    slot: Option<OwnedSemaphorePermit>,
) {
    let service = service_fn(move |request| {
        let engine = Arc::clone(&engine);
        async move { Ok::<_, Infallible>(respond(engine, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        log::debug!("imageapi: {error}");
    }
    drop(slot);
}

async fn respond(engine: Arc<Engine>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let body = match tokio::time::timeout(BODY_TIMEOUT, read_body(body)).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return response(api::refusal(&error)),
        Err(_) => return response(api::refusal(&ApiError::unreadable(&"it does not come"))),
    };
    let answered = tokio::task::spawn_blocking(move || {
        // Several lines are one list (RFC 9110, 5.3).
        let accepts = head.headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let accepts: Vec<&str> = accepts.collect();
        let accept = accepts.join(",");
        let request = route::Request {
            method: head.method.as_str(),
            path: head.uri.path(),
            query: head.uri.query().unwrap_or_default(),
            accept: (!accepts.is_empty()).then_some(accept.as_str()),
            body: &body,
        };
        let answer = api::answer(&engine, &request);
        log::debug!("imageapi: {} {}: {}", request.method, head.uri, answer.status);
        answer
    });
    match answered.await {
        Ok(answer) => response(answer),
        Err(error) => response(api::refusal(&ApiError::internal(error))),
    }
}

/// The body, as long as it is not larger than any request's.
async fn read_body(body: Incoming) -> Result<Vec<u8>, ApiError> {
    let mut body = body;
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let frame = frame.map_err(|error| ApiError::unreadable(&error))?;
        if let Ok(data) = frame.into_data() {
            if bytes.len().saturating_add(data.len()) > MAX_BODY {
                return Err(ApiError::too_large(MAX_BODY));
            }
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes)
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let Answer { status, mut body, warning } = answer;
    body.push(b'\n');
    let mut response = Response::builder()
        .status(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR))
        .header(CONTENT_TYPE, "application/json");
    if let Some(warning) = warning {
        response = response.header(WARNING, warning);
    }
    response.body(Full::from(body)).unwrap_or_default()
}
