//! Takes HTTP/1.1 connections for a router, within bounds: no client holds one open by saying nothing, by saying it
//! slowly or by not reading, and all of them together cannot take every file descriptor.
//!
//! Not here: what is answered ([`super::router`]), TLS.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tower_http::timeout::RequestBodyTimeoutLayer;

use super::sendfile::{Conn, Outlet};

/// Pause after a failed accept, so that a lasting failure (no file descriptors) does not take a whole core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What one connection, and all of them, may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at a time; further ones wait in the kernel's queue. One for the long poll of every node that may
    /// register itself, and room for what else they fetch.
    pub connections: usize,
    /// Longest time until a request's head is there, also on a connection that is kept open between two requests.
    pub head: Duration,
    /// Longest pause within a request's body.
    pub body: Duration,
    /// Longest time that sent bytes stay unread by the other side (`TCP_USER_TIMEOUT`, tcp(7)).
    pub unread: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 2 * crate::inventory::MAX_AUTO_NODES,
            head: Duration::from_secs(30),
            body: Duration::from_secs(60),
            unread: Duration::from_secs(120),
        }
    }
}

/// Serves until `stopping` turns true, then lets the requests end that are being answered.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    mut stopping: watch::Receiver<bool>,
) {
    let router = router.layer(RequestBodyTimeoutLayer::new(limits.body));
    let slots = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    loop {
        let (stream, slot) = tokio::select! {
            accepted = accept(&listener, &slots) => accepted,
            Some(_) = connections.join_next() => continue,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        if let Err(error) = tune(&stream, limits) {
            // Gone already, most likely: the connection's first read will tell.
            tracing::debug!(%error, "HTTP: socket options");
        }
        connections.spawn(converse(stream, router.clone(), limits, stopping.clone(), slot));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// The next connection, as soon as there is room for one.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> (TcpStream, Option<OwnedSemaphorePermit>) {
    if slots.available_permits() == 0 {
        tracing::warn!("HTTP: all connections are taken; more wait");
    }
    // Err only if the semaphore were closed, which nobody does.
    let slot = Arc::clone(slots).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, slot),
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "HTTP: cannot accept connections; it is tried again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::ConnectionAborted | K::ConnectionRefused | K::ConnectionReset)
}

fn tune(stream: &TcpStream, limits: Limits) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_user_timeout(Some(limits.unread))
}

async fn converse(
    stream: TcpStream,
    router: Router,
    limits: Limits,
    mut stopping: watch::Receiver<bool>,
    slot: Option<OwnedSemaphorePermit>,
) {
    let outlet = Outlet::default();
    let stream = Conn::new(stream, outlet.clone());
    let router = TowerToHyperService::new(router);
    let service = service_fn(|request| {
        let (answer, outlet) = (router.call(request), outlet.clone());
        async move { answer.await.map(|response| outlet.take_over(response)) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .writev(true)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        _ = stopping.wait_for(|stop| *stop) => None,
    };
    let ended = if let Some(ended) = ended {
        ended
    } else {
        connection.as_mut().graceful_shutdown();
        connection.await
    };
    if let Err(error) = ended {
        tracing::debug!("HTTP: {}", super::error_chain(&error));
    }
    drop(slot);
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, post};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    struct Served {
        address: std::net::SocketAddr,
        stop: watch::Sender<bool>,
        task: tokio::task::JoinHandle<()>,
    }

    async fn served(limits: Limits) -> Served {
        let router = Router::new()
            .route("/", get(|| async { "hello" }))
            .route("/body", post(|body: axum::body::Bytes| async move { body.len().to_string() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let (stop, stopping) = watch::channel(false);
        let task = tokio::spawn(serve(listener, router, limits, stopping));
        Served { address, stop, task }
    }

    /// What the server says to these bytes until it closes the connection.
    async fn said_to(served: &Served, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(served.address).await.expect("connect");
        stream.write_all(bytes).await.expect("write");
        let mut text = String::new();
        let read = stream.read_to_string(&mut text);
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, read).await.expect("the server closes").expect("read");
        text
    }

    fn short() -> Limits {
        let short = Duration::from_millis(50);
        Limits { head: short, body: short, ..Limits::default() }
    }

    #[tokio::test]
    async fn a_client_that_says_nothing_or_half_a_head_is_cut_off() {
        let served = served(short()).await;
        assert_eq!(said_to(&served, b"").await, "");
        assert_eq!(said_to(&served, b"GET / HTTP/1.1\r\nHost: x\r\nX: ").await, "");
        let kept_open = said_to(&served, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(kept_open.starts_with("HTTP/1.1 200 OK") && kept_open.ends_with("hello"));
    }

    #[tokio::test]
    async fn a_body_that_stops_in_the_middle_ends_the_request() {
        let served = served(short()).await;
        let request = b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhal";
        let answer = said_to(&served, request).await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    }

    #[tokio::test]
    async fn a_connection_above_the_bound_waits_for_one_to_end() {
        let served = served(Limits { connections: 1, ..Limits::default() }).await;
        let mut first = TcpStream::connect(served.address).await.expect("connect");
        first.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("write");
        let mut buffer = [0; 8];
        first.read_exact(&mut buffer).await.expect("the first is answered");
        let mut second = TcpStream::connect(served.address).await.expect("connect");
        let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        second.write_all(request).await.expect("write");
        let early = tokio::time::timeout(Duration::from_millis(100), second.read(&mut buffer));
        assert!(early.await.is_err(), "the second is answered beside the first");
        drop(first);
        let mut text = String::new();
        second.read_to_string(&mut text).await.expect("read");
        assert!(text.ends_with("hello"), "{text}");
    }

    #[tokio::test]
    async fn stopping_closes_idle_connections_and_returns() {
        let served = served(Limits::default()).await;
        let mut idle = TcpStream::connect(served.address).await.expect("connect");
        idle.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("write");
        let mut buffer = [0; 8];
        idle.read_exact(&mut buffer).await.expect("answered");
        served.stop.send_replace(true);
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, served.task).await.expect("returns").expect("no panic");
    }
}
