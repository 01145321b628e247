//! Channels on the server's side: which are asked for, who listens, and which end belongs to which.
//!
//! An operator's end and a node's end of a channel meet at the [`Desk`]: the operator asks for a channel and connects; the request
//! then rides in the node's desired document until the node's agent connects as well, and its socket is handed to the operator's
//! task, which passes frames between the two ([`relay`]). Nothing of it is stored: a server that ends takes its channels with it.

pub mod relay;
mod resolve;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protocol::channel::{
    ChannelCreated, ChannelId, ChannelRequest, ChannelToken, ChannelWish, ContainerPath,
};
use protocol::ids::NodeId;
use tokio::sync::{oneshot, watch};

pub use resolve::{ResolveError, resolve};

/// How long a node may take to connect once the operator has.
pub const NODE_WITHIN: Duration = Duration::from_secs(20);
/// How long an operator may take to connect after asking.
const OPERATOR_WITHIN: Duration = Duration::from_secs(20);
/// How long after its last poll an agent still counts as listening: the pause between two polls, with something to spare.
const POLL_PAUSE: Duration = Duration::from_secs(5);
/// A request that was sent to a node and not answered is sent again after this.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Most channels at a time.
const MAX_CHANNELS: usize = 1024;
/// Most channels at a time of one node.
const MAX_PER_NODE: usize = 32;

/// Why a channel cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeskError {
    /// No agent of the node asks for work, so none would open the channel.
    #[error("node {node} is not listening: {}", match .silent_s {
        Some(seconds) => format!("its agent has not asked for work for {seconds} s"),
        None => "its agent has not asked for work since this server started".to_owned(),
    })]
    NotListening {
        /// The node.
        node: NodeId,
        /// Seconds since its agent's last poll ended.
        silent_s: Option<u64>,
    },
    /// There are as many channels as there may be.
    #[error("there are {0} channels already; end some of them first")]
    Crowded(usize),
    /// No such channel, or the token is not its, or that end is taken.
    #[error(
        "there is no channel {0} to take: it has ended, or was taken before, or the token is not its"
    )]
    NoChannel(ChannelId),
}

/// How far a channel has come. `T` is a connection of a node.
#[derive(Debug)]
enum Stage<T> {
    /// The operator has not connected yet.
    Asked,
    /// The node has not connected yet.
    Wanted { sent: Option<Instant>, hand_over: oneshot::Sender<T> },
    /// Both have.
    Joined,
}

#[derive(Debug)]
struct Channel<T> {
    node: NodeId,
    request: ChannelRequest,
    operator: ChannelToken,
    asked: Instant,
    stage: Stage<T>,
}

/// What is known of a node's agent as a listener.
#[derive(Debug)]
struct Listener {
    polls: usize,
    last: Option<Instant>,
    wake: watch::Sender<()>,
}

#[derive(Debug)]
struct State<T> {
    channels: BTreeMap<ChannelId, Channel<T>>,
    listeners: BTreeMap<NodeId, Listener>,
}

/// Where both ends of every channel meet.
#[derive(Debug)]
pub struct Desk<T> {
    state: Mutex<State<T>>,
}

impl<T> Default for Desk<T> {
    fn default() -> Self {
        let state = State { channels: BTreeMap::new(), listeners: BTreeMap::new() };
        Self { state: Mutex::new(state) }
    }
}

impl<T> Desk<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        // No change here is left half done by a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node's agent begins to ask what is wanted. It listens until the poll is dropped, and a moment longer.
    #[must_use]
    pub fn poll(self: &Arc<Self>, node: &NodeId) -> Poll<T> {
        let mut state = self.state();
        let listener = state.listeners.entry(node.clone()).or_insert_with(|| Listener {
            polls: 0,
            last: None,
            wake: watch::Sender::new(()),
        });
        listener.polls += 1;
        let wake = listener.wake.subscribe();
        drop(state);
        Poll { desk: Arc::clone(self), node: node.clone(), wake }
    }

    /// An operator asks for a channel; `random` names it and makes both tokens.
    ///
    /// # Errors
    /// [`DeskError::NotListening`], and [`DeskError::Crowded`].
    pub fn ask(
        &self,
        node: &NodeId,
        container: Option<ContainerPath>,
        wish: ChannelWish,
        random: &Random,
        now: Instant,
    ) -> Result<ChannelCreated, DeskError> {
        let mut state = self.state();
        state.channels.retain(|_, channel| {
            !matches!(channel.stage, Stage::Asked) || now < channel.asked + OPERATOR_WITHIN
        });
        state.check_listening(node, now)?;
        let of_node = state.channels.values().filter(|channel| channel.node == *node).count();
        if state.channels.len() >= MAX_CHANNELS || of_node >= MAX_PER_NODE {
            let all = state.channels.len();
            return Err(DeskError::Crowded(if of_node >= MAX_PER_NODE { of_node } else { all }));
        }
        let id = ChannelId::from_random(random.id);
        let operator = ChannelToken::from_random(random.operator);
        let token = ChannelToken::from_random(random.node);
        let created = ChannelCreated {
            id: id.clone(),
            token: operator.clone(),
            container: container.clone(),
        };
        let request = ChannelRequest { id: id.clone(), token, container, wish };
        let stage = Stage::Asked;
        let channel = Channel { node: node.clone(), request, operator, asked: now, stage };
        state.channels.insert(id, channel);
        Ok(created)
    }

    /// The operator of a channel has connected: the node is told, and its connection comes out of the receiver.
    ///
    /// # Errors
    /// [`DeskError::NoChannel`].
    pub fn operator_came(
        self: &Arc<Self>,
        node: &NodeId,
        id: &ChannelId,
        token: &str,
        now: Instant,
    ) -> Result<Place<T>, DeskError> {
        let mut state = self.state();
        let channel = state.channels.get_mut(id).filter(|channel| {
            channel.node == *node
                && same(channel.operator.as_str(), token)
                && matches!(channel.stage, Stage::Asked)
                && now < channel.asked + OPERATOR_WITHIN
        });
        let channel = channel.ok_or_else(|| DeskError::NoChannel(id.clone()))?;
        let (hand_over, connection) = oneshot::channel();
        channel.stage = Stage::Wanted { sent: None, hand_over };
        let request = channel.request.clone();
        if let Some(listener) = state.listeners.get(node) {
            listener.wake.send_replace(());
        }
        drop(state);
        Ok(Place { desk: Arc::clone(self), request, connection })
    }

    /// The node of a channel has connected: its connection goes into the sender.
    ///
    /// # Errors
    /// [`DeskError::NoChannel`].
    pub fn node_came(
        &self,
        node: &NodeId,
        id: &ChannelId,
        token: &str,
    ) -> Result<oneshot::Sender<T>, DeskError> {
        let mut state = self.state();
        let channel = state
            .channels
            .get_mut(id)
            .filter(|channel| channel.node == *node && same(channel.request.token.as_str(), token));
        let no_channel = || DeskError::NoChannel(id.clone());
        let channel = channel.ok_or_else(no_channel)?;
        match std::mem::replace(&mut channel.stage, Stage::Joined) {
            Stage::Wanted { hand_over, .. } => Ok(hand_over),
            before => {
                channel.stage = before;
                Err(no_channel())
            }
        }
    }
}

impl<T> State<T> {
    fn check_listening(&self, node: &NodeId, now: Instant) -> Result<(), DeskError> {
        let listener = self.listeners.get(node);
        let silent = listener.and_then(|it| it.last).map(|at| now.saturating_duration_since(at));
        let listens = listener.is_some_and(|listener| listener.polls > 0)
            || silent.is_some_and(|silent| silent < POLL_PAUSE);
        if listens {
            return Ok(());
        }
        let silent_s = silent.map(|silent| silent.as_secs());
        Err(DeskError::NotListening { node: node.clone(), silent_s })
    }
}

/// Compares without telling by its time where the difference is.
fn same(known: &str, shown: &str) -> bool {
    let differs = known.bytes().zip(shown.bytes()).fold(0, |all, (a, b)| all | (a ^ b));
    known.len() == shown.len() && differs == 0
}

/// What makes a channel unguessable.
#[derive(Clone)]
pub struct Random {
    id: [u8; 8],
    operator: [u8; 32],
    node: [u8; 32],
}

impl std::fmt::Debug for Random {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Random(…)")
    }
}

impl Random {
    /// From the kernel (getrandom(2)).
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn draw() -> std::io::Result<Self> {
        fn fill<const N: usize>() -> std::io::Result<[u8; N]> {
            let mut bytes = [0; N];
            let count = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
            if count == N { Ok(bytes) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
        }
        Ok(Self { id: fill()?, operator: fill()?, node: fill()? })
    }
}

/// An agent that asks what is wanted, as long as it asks.
#[derive(Debug)]
pub struct Poll<T> {
    desk: Arc<Desk<T>>,
    node: NodeId,
    wake: watch::Receiver<()>,
}

impl<T> Poll<T> {
    /// The requests that the node should be sent now; they then count as sent.
    #[must_use]
    pub fn requests(&self, now: Instant) -> Vec<ChannelRequest> {
        let mut state = self.desk.state();
        let mut requests = Vec::new();
        for channel in state.channels.values_mut().filter(|channel| channel.node == self.node) {
            if let Stage::Wanted { sent, .. } = &mut channel.stage
                && sent.is_none_or(|at| now >= at + AGAIN_AFTER)
            {
                *sent = Some(now);
                requests.push(channel.request.clone());
            }
        }
        requests
    }

    /// Waits for a reason to look at [`Self::requests`] again.
    pub async fn news(&mut self) {
        let waits = self.desk.state().channels.values().any(|channel| {
            channel.node == self.node && matches!(channel.stage, Stage::Wanted { .. })
        });
        let again = async {
            match waits {
                true => tokio::time::sleep(AGAIN_AFTER).await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            // The sender is kept for ever.
            _ = self.wake.changed() => {}
            () = again => {}
        }
    }
}

impl<T> Drop for Poll<T> {
    fn drop(&mut self) {
        if let Some(listener) = self.desk.state().listeners.get_mut(&self.node) {
            listener.polls = listener.polls.saturating_sub(1);
            listener.last = Some(Instant::now());
        }
    }
}

/// An operator's place at the desk. Dropped, the channel is gone, also for its node.
#[derive(Debug)]
pub struct Place<T> {
    desk: Arc<Desk<T>>,
    request: ChannelRequest,
    connection: oneshot::Receiver<T>,
}

impl<T> Place<T> {
    /// What was asked for.
    #[must_use]
    pub fn request(&self) -> &ChannelRequest {
        &self.request
    }

    /// The node's connection, once it has come.
    pub fn connection(&mut self) -> &mut oneshot::Receiver<T> {
        &mut self.connection
    }
}

impl<T> Drop for Place<T> {
    fn drop(&mut self) {
        self.desk.state().channels.remove(&self.request.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGS: ChannelWish = ChannelWish::Logs { follow: false, tail: None };

    fn node(text: &str) -> NodeId {
        text.parse().expect("node")
    }

    fn desk() -> Arc<Desk<&'static str>> {
        Arc::default()
    }

    fn ask(desk: &Desk<&'static str>, now: Instant) -> Result<ChannelCreated, DeskError> {
        let random = Random::draw().expect("random");
        desk.ask(&node("n1"), None, LOGS, &random, now)
    }

    #[test]
    fn both_ends_meet_once_and_with_their_own_tokens_only() {
        let (desk, n1, now) = (desk(), node("n1"), Instant::now());
        let poll = desk.poll(&n1);
        let made = ask(&desk, now).expect("listening");
        assert_eq!(poll.requests(now), [], "nobody waits for it yet");
        let other = desk.operator_came(&n1, &made.id, &"0".repeat(64), now);
        assert!(matches!(other, Err(DeskError::NoChannel(_))));
        let early = desk.node_came(&n1, &made.id, made.token.as_str());
        assert!(matches!(early, Err(DeskError::NoChannel(_))));
        let mut place = desk.operator_came(&n1, &made.id, made.token.as_str(), now).expect("place");
        assert!(desk.operator_came(&n1, &made.id, made.token.as_str(), now).is_err(), "twice");
        let [request] = &poll.requests(now)[..] else { panic!("one request") };
        assert_ne!(request.token, made.token);
        let token = request.token.as_str();
        assert!(desk.node_came(&node("n2"), &made.id, token).is_err(), "another node");
        desk.node_came(&n1, &made.id, token).expect("the node").send("socket").expect("place");
        assert_eq!(place.connection().try_recv(), Ok("socket"));
        assert!(desk.node_came(&n1, &made.id, token).is_err(), "a token is good once");
        assert_eq!(poll.requests(now + AGAIN_AFTER), []);
        drop(place);
        assert!(desk.state().channels.is_empty());
    }

    #[test]
    fn a_request_is_sent_again_until_the_node_comes_or_the_operator_leaves() {
        let (desk, n1, now) = (desk(), node("n1"), Instant::now());
        let poll = desk.poll(&n1);
        let made = ask(&desk, now).expect("listening");
        let place = desk.operator_came(&n1, &made.id, made.token.as_str(), now).expect("place");
        assert_eq!(poll.requests(now).len(), 1);
        assert_eq!(poll.requests(now).len(), 0);
        assert_eq!(poll.requests(now + AGAIN_AFTER).len(), 1);
        assert_eq!(desk.poll(&node("n2")).requests(now), [], "another node's");
        drop(place);
        assert_eq!(poll.requests(now + 2 * AGAIN_AFTER).len(), 0);
    }

    #[test]
    fn a_node_that_does_not_ask_for_work_is_refused_at_once() {
        let (desk, n1, now) = (desk(), node("n1"), Instant::now());
        let never = ask(&desk, now).expect_err("never seen").to_string();
        assert!(
            never.contains("n1 is not listening") && never.contains("since this server"),
            "{never}"
        );
        drop(desk.poll(&n1));
        ask(&desk, Instant::now()).expect("between two polls");
        let late = Instant::now() + Duration::from_secs(34);
        let silent = ask(&desk, late).expect_err("silent").to_string();
        assert!(silent.contains("has not asked for work for 3"), "{silent}");
    }

    #[test]
    fn an_operator_that_never_comes_leaves_nothing_behind() {
        let (desk, n1, now) = (desk(), node("n1"), Instant::now());
        let _poll = desk.poll(&n1);
        let made = ask(&desk, now).expect("listening");
        let late = now + OPERATOR_WITHIN;
        assert!(desk.operator_came(&n1, &made.id, made.token.as_str(), late).is_err());
        ask(&desk, late).expect("another");
        assert_eq!(desk.state().channels.len(), 1);
    }

    #[test]
    fn one_node_cannot_take_every_channel() {
        let (desk, now) = (desk(), Instant::now());
        let _polls = [desk.poll(&node("n1")), desk.poll(&node("n2"))];
        for _ in 0..MAX_PER_NODE {
            ask(&desk, now).expect("room");
        }
        assert_eq!(ask(&desk, now), Err(DeskError::Crowded(MAX_PER_NODE)));
        let random = Random::draw().expect("random");
        desk.ask(&node("n2"), None, LOGS, &random, now).expect("room for another node");
    }

    #[test]
    fn tokens_are_compared_as_a_whole() {
        for (known, shown, equal) in
            [("ab", "ab", true), ("ab", "ac", false), ("ab", "a", false), ("", "", true)]
        {
            assert_eq!(same(known, shown), equal, "{known} {shown}");
        }
    }
}
