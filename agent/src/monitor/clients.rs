//! The clients of a monitor's control socket: connections, lines in, lines out. Knows nothing of what they mean.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use super::machine::ClientId;
use crate::containers::control::{Reply, line};
use crate::containers::sockets::send_with;

/// Most connections at once; more are closed at once.
const MAX_CLIENTS: usize = 32;
/// Longest request, in bytes.
const MAX_REQUEST: usize = 4096;

/// The connections.
#[derive(Debug)]
pub(super) struct Clients {
    listener: UnixListener,
    connections: Vec<Client>,
    next: ClientId,
}

#[derive(Debug)]
struct Client {
    id: ClientId,
    stream: UnixStream,
    received: Vec<u8>,
}

/// What reading from a client brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// Nothing whole yet.
    Nothing,
    /// A line, without its end.
    Line(Vec<u8>),
    /// It is gone; the connection is closed.
    Gone,
}

impl Clients {
    /// Clients of a listening socket.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, connections: Vec::new(), next: 0 })
    }

    /// The listening socket.
    #[must_use]
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Every connection, for poll(2).
    pub(super) fn connections(&self) -> impl Iterator<Item = (ClientId, BorrowedFd<'_>)> {
        self.connections.iter().map(|client| (client.id, client.stream.as_fd()))
    }

    /// Adds a connection that was made otherwise.
    pub(super) fn add(&mut self, stream: UnixStream) {
        if self.connections.len() < MAX_CLIENTS && stream.set_nonblocking(true).is_ok() {
            self.connections.push(Client { id: self.next, stream, received: Vec::new() });
            self.next += 1;
        }
    }

    /// Takes every waiting connection.
    pub(super) fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            self.add(stream);
        }
    }

    /// Reads what a client sent.
    pub(super) fn receive(&mut self, id: ClientId) -> Received {
        let Some(client) = self.connections.iter_mut().find(|client| client.id == id) else {
            return Received::Gone;
        };
        let mut buffer = [0; 1024];
        let gone = match client.stream.read(&mut buffer) {
            Ok(0) => true,
            Ok(count) => {
                client.received.extend(buffer.iter().take(count));
                client.received.len() > MAX_REQUEST
            }
            Err(error) => {
                !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
            }
        };
        if let Some(end) = client.received.iter().position(|byte| *byte == b'\n') {
            let mut line: Vec<u8> = client.received.drain(..=end).collect();
            line.pop();
            return Received::Line(line);
        }
        if gone {
            self.close(id);
            return Received::Gone;
        }
        Received::Nothing
    }

    /// Sends a reply. A client that does not read loses its connection: the monitor waits for nobody.
    pub(super) fn send(&mut self, id: ClientId, reply: &Reply) {
        let bytes = line(reply);
        let sent = self
            .connections
            .iter_mut()
            .find(|client| client.id == id)
            .is_some_and(|client| client.stream.write_all(&bytes).is_ok());
        if !sent {
            self.close(id);
        }
    }

    /// Gives a client these sockets as its last reply.
    pub(super) fn send_sockets(&mut self, id: ClientId, sockets: &[OwnedFd]) {
        let bytes = line(&Reply::Sockets { count: sockets.len() });
        let descriptors: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
        if let Some(client) = self.connections.iter().find(|client| client.id == id) {
            // A client that is gone needs none.
            drop(send_with(&client.stream, &bytes, &descriptors));
        }
        self.close(id);
    }

    /// Closes a connection.
    pub(super) fn close(&mut self, id: ClientId) {
        self.connections.retain(|client| client.id != id);
    }
}
