//! WebSockets to the boot server (RFC 6455), over the transport's own TCP and TLS: connected in blocking steps with time-outs,
//! then non-blocking, for a poll loop of the caller's.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use tungstenite::client::IntoClientRequest;
use tungstenite::handshake::HandshakeError;
use tungstenite::http::{HeaderValue, Uri, header};
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Error, WebSocket};

use super::{CONNECT_TIMEOUT, STALL_TIMEOUT, Transport, TransportError};

/// Sent bytes that the server does not take for so long break the connection (`TCP_USER_TIMEOUT`, tcp(7)), in milliseconds.
const UNREAD_MS: u32 = 60_000;

/// A connection: plain, or TLS over it.
#[derive(Debug)]
pub enum Stream {
    /// `http://`
    Plain(TcpStream),
    /// `https://`
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => tls.get_ref(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Tls(tls) => tls.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Tls(tls) => tls.flush(),
        }
    }
}

const METHOD: &str = "GET";

impl Transport {
    /// Opens a WebSocket at this `http://` or `https://` URL, with a bearer token. It is non-blocking on return.
    ///
    /// # Errors
    /// If the server cannot be reached or trusted, or does not answer with the upgrade; [`TransportError::Status`] then.
    pub fn websocket(
        &self,
        url: &str,
        token: &str,
        config: WebSocketConfig,
    ) -> Result<WebSocket<Stream>, TransportError> {
        self.check_scheme(METHOD, url)?;
        let wrong = |reason: String| TransportError::Protocol {
            method: METHOD,
            url: url.to_owned(),
            reason,
        };
        // http becomes ws and https wss (RFC 6455, section 3).
        let uri = url.replacen("http", "ws", 1).parse::<Uri>();
        let uri = uri.map_err(|error| wrong(format!("not a URL: {error}")))?;
        let tls = uri.scheme_str() == Some("wss");
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let socket = connect(host, uri.port_u16().unwrap_or(if tls { 443 } else { 80 }))
            .map_err(|error| wrong(error.to_string()))?;
        let stream = match tls {
            false => Stream::Plain(socket),
            true => {
                let name = ServerName::try_from(host.to_owned());
                let name = name.map_err(|error| wrong(error.to_string()))?;
                let session = ClientConnection::new(Arc::clone(&self.tls), name);
                let session = session.map_err(|error| wrong(error.to_string()))?;
                Stream::Tls(Box::new(StreamOwned::new(session, socket)))
            }
        };
        let mut request =
            uri.into_client_request().map_err(|error| wrong(format!("not a URL: {error}")))?;
        let bearer = HeaderValue::from_str(&format!("Bearer {token}"));
        let bearer = bearer.map_err(|_| wrong("the token is no header's value".to_owned()))?;
        request.headers_mut().insert(header::AUTHORIZATION, bearer);
        let shaken = tungstenite::client::client_with_config(request, stream, Some(config));
        let (socket, _) = shaken.map_err(|error| match error {
            HandshakeError::Interrupted(_) => wrong("no answer in time".to_owned()),
            HandshakeError::Failure(Error::Http(answer)) => {
                let body = answer.body().as_deref().unwrap_or_default();
                let body = String::from_utf8_lossy(body.get(..300).unwrap_or(body)).into_owned();
                let status = answer.status().as_u16();
                TransportError::Status { method: METHOD, url: url.to_owned(), status, body }
            }
            HandshakeError::Failure(error) => wrong(error.to_string()),
        })?;
        settle(socket.get_ref().socket()).map_err(|error| wrong(error.to_string()))?;
        Ok(socket)
    }
}

/// The first of the host's addresses that answers, within [`CONNECT_TIMEOUT`] for all of them.
fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let until = Instant::now() + CONNECT_TIMEOUT;
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    for address in (host, port).to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, left) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                socket.set_read_timeout(Some(STALL_TIMEOUT))?;
                socket.set_write_timeout(Some(STALL_TIMEOUT))?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn settle(socket: &TcpStream) -> io::Result<()> {
    setsockopt(socket, sockopt::TcpUserTimeout, &UNREAD_MS)?;
    socket.set_nonblocking(true)
}
