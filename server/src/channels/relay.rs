//! Passes frames between an operator's WebSocket and a node's, and says why it ended.
//!
//! One frame in each direction is in hand at a time; how much may be under way is what the two ends grant each other
//! ([`protocol::channel::frame`]). Nothing of the frames is changed.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use protocol::channel::frame::{Frame, MAX_FRAME};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{NODE_WITHIN, Place};

/// A connection that has become a WebSocket.
pub type Socket = WebSocketStream<TcpStream>;

/// How often a node is asked for a sign of life.
const PING_EVERY: Duration = Duration::from_secs(10);
/// How long a node may be silent: it answers pings at once, whatever its command does.
const NODE_SILENCE: Duration = Duration::from_secs(30);
/// How long the last words to either side may take.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long an operator may take to receive what is on its way when all went well: a window over a slow line.
const LAST_WINDOW: Duration = Duration::from_secs(60);
/// Most frames an operator may send before the node is there: sizes of its terminal, its first input.
const MAX_EARLY: usize = 64;

/// Bounds of a WebSocket on the server.
#[must_use]
pub fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(16 << 10)
        .write_buffer_size(0)
        .max_write_buffer_size(4 * MAX_FRAME)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME))
}

/// Why a channel ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ending {
    /// As it should: its last frame has passed.
    #[error("done")]
    Done,
    /// The operator has left.
    #[error("the operator has left")]
    OperatorLeft,
    /// The operator sent what it must not.
    #[error("the operator's command sent something wrong: {0}")]
    OperatorWrong(String),
    /// The node did not connect.
    #[error("did not connect within {} s", NODE_WITHIN.as_secs())]
    NodeNeverCame,
    /// The node has closed the connection, or it broke.
    #[error("disconnected before the end: {0}")]
    NodeLeft(String),
    /// The node answers no ping.
    #[error("has been silent for {} s", NODE_SILENCE.as_secs())]
    NodeSilent,
    /// The node sent what it must not.
    #[error("sent something wrong: {0}")]
    NodeWrong(String),
    /// The server is stopping.
    #[error("the boot server is stopping")]
    Stopping,
}

impl Ending {
    /// What the operator is told, where there is something to tell. `seen` is when the node was last heard of, in words.
    #[must_use]
    pub fn for_operator(&self, node: &str, seen: &str) -> Option<String> {
        match self {
            Self::Done | Self::OperatorLeft => None,
            Self::OperatorWrong(_) | Self::Stopping => Some(self.to_string()),
            Self::NodeNeverCame | Self::NodeLeft(_) | Self::NodeSilent | Self::NodeWrong(_) => {
                Some(format!("node {node} {self}; last seen {seen}"))
            }
        }
    }
}

/// Waits for the node and passes frames until one side ends. The node's side is closed on return; the operator's is open.
pub async fn run(
    operator: &mut Socket,
    place: &mut Place<Socket>,
    stopping: watch::Receiver<bool>,
) -> Ending {
    let mut stopping = stopping;
    let mut early = Vec::new();
    let waiting = tokio::time::timeout(NODE_WITHIN, async {
        loop {
            tokio::select! {
                biased;
                node = place.connection() => return node.map_err(|_| Ending::NodeNeverCame),
                message = operator.next() => match binary(message) {
                    Ok(Some(_)) if early.len() >= MAX_EARLY => {
                        return Err(Ending::OperatorWrong("too much too early".to_owned()));
                    }
                    Ok(Some(frame)) => early.push(frame),
                    Ok(None) => {}
                    Err(_) => return Err(Ending::OperatorLeft),
                },
            }
        }
    });
    let waited = tokio::select! {
        waited = waiting => waited.unwrap_or(Err(Ending::NodeNeverCame)),
        _ = stopping.wait_for(|stop| *stop) => Err(Ending::Stopping),
    };
    let mut node = match waited {
        Ok(node) => node,
        Err(ending) => return ending,
    };
    let ending = tokio::select! {
        ending = pass(operator, &mut node, early) => ending,
        _ = stopping.wait_for(|stop| *stop) => Ending::Stopping,
    };
    // A node that does not take the farewell has noticed already.
    let _ = tokio::time::timeout(FAREWELL, node.close(None)).await;
    ending
}

/// Says a last word to the operator and closes.
pub async fn farewell(mut operator: Socket, words: Option<String>, ending: &Ending) {
    let patience = if *ending == Ending::Done { LAST_WINDOW } else { FAREWELL };
    let said = async {
        if let Some(words) = words {
            operator.send(Message::binary(Frame::Failure(words.into()).render())).await?;
        }
        operator.close(None).await?;
        // Its answer to that, so that what was sent before is not reset away.
        while let Some(Ok(_)) = operator.next().await {}
        Ok::<(), Error>(())
    };
    // An operator that has left has no use for it.
    let _ = tokio::time::timeout(patience, said).await;
}

type Bytes = tokio_tungstenite::tungstenite::Bytes;

/// The frame of a message, none for pings and the like. An error is the end.
fn binary(message: Option<Result<Message, Error>>) -> Result<Option<Bytes>, String> {
    match message {
        Some(Ok(Message::Binary(bytes))) => Ok(Some(bytes)),
        Some(Ok(Message::Close(_))) | None => Err("it closed the connection".to_owned()),
        Some(Ok(_)) => Ok(None),
        Some(Err(error)) => Err(error.to_string()),
    }
}

async fn pass(operator: &mut Socket, node: &mut Socket, early: Vec<Bytes>) -> Ending {
    let (mut to_operator, mut from_operator) = operator.split();
    let (mut to_node, mut from_node) = node.split();
    let down = async {
        let mut early = early.into_iter();
        let mut ping = tokio::time::interval(PING_EVERY);
        loop {
            let next = early.next().map(Message::Binary);
            let message = tokio::select! {
                biased;
                Some(message) = std::future::ready(next) => message,
                _ = ping.tick() => Message::Ping(Bytes::new()),
                message = from_operator.next() => match binary(message) {
                    Ok(Some(frame)) => match Frame::parse(&frame) {
                        Ok(_) => Message::Binary(frame),
                        Err(error) => return Ending::OperatorWrong(error.to_string()),
                    },
                    Ok(None) => continue,
                    Err(_) => return Ending::OperatorLeft,
                },
            };
            if let Err(error) = to_node.send(message).await {
                // What it said last may still be unread.
                tracing::debug!("channel: node: {error}");
                return std::future::pending().await;
            }
        }
    };
    let up = async {
        loop {
            let Ok(message) = tokio::time::timeout(NODE_SILENCE, from_node.next()).await else {
                return Ending::NodeSilent;
            };
            let frame = match binary(message) {
                Ok(Some(frame)) => frame,
                Ok(None) => continue,
                Err(why) => return Ending::NodeLeft(why),
            };
            let last = match Frame::parse(&frame) {
                Ok(parsed) => parsed.is_last(),
                Err(error) => return Ending::NodeWrong(error.to_string()),
            };
            if to_operator.send(Message::Binary(frame)).await.is_err() {
                return Ending::OperatorLeft;
            }
            if last {
                return Ending::Done;
            }
        }
    };
    tokio::select! {
        ending = down => ending,
        ending = up => ending,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_is_told_what_happened_to_the_node_and_when_it_was_seen() {
        let table = [
            (Ending::NodeNeverCame, Some("node n1 did not connect within 20 s; last seen 3 s ago")),
            (Ending::NodeSilent, Some("node n1 has been silent for 30 s; last seen 3 s ago")),
            (Ending::Stopping, Some("the boot server is stopping")),
            (Ending::Done, None),
            (Ending::OperatorLeft, None),
        ];
        for (ending, expected) in table {
            assert_eq!(ending.for_operator("n1", "3 s ago").as_deref(), expected);
        }
    }
}
