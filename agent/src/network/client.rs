//! The DHCP client's state machine (RFC 2131 section 4.4): events and the time in, actions out. No sockets, no clock.
//!
//! ```text
//!            carrier          OFFER             ACK
//!  Stopped ----------> Selecting -----> Requesting -----> Bound --T1--> Renewing --T2--> Rebinding
//!     ^   carrier lost     ^  ^   NAK, silence   |         ^ |             | ACK            | ACK
//!     +--------------------+  +------------------+         | +-------------+----------------+
//!                          ^                               |    carrier lost and back
//!                          |     NAK, lease over           +<--> Verifying
//!                          +---- from every state with a lease
//! ```
//!
//! A lease outlives a lost carrier until it ends; when the carrier is back it is verified by a REQUEST, as the cable
//! may lead elsewhere now.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use dhcproto::v4::MessageType;

use super::lease::Kept;
use super::message::{Answer, Grant, Outgoing, Times};

/// Longest time between two DISCOVERs (RFC 2131 section 4.1).
const MAX_INTERVAL: Duration = Duration::from_secs(64);
/// REQUESTs that go out for one offer, or to verify one lease, before giving up on it.
const MAX_REQUESTS: u32 = 4;
/// Shortest time between two renewals of one lease. RFC 2131 says a minute; leases of seconds exist.
const MIN_RENEW_INTERVAL: Duration = Duration::from_secs(1);
/// Unanswered messages before it is said aloud.
const PATIENCE: u32 = 3;
/// Longest pause after refusals one after the other, in seconds.
const MAX_NAK_PAUSE_S: u32 = 10;

/// What happens to the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The link can carry packets.
    CarrierUp,
    /// It cannot any more.
    CarrierLost,
    /// A server said something, in this transaction.
    Heard(u32, Answer),
    /// The time of [`Client::deadline`] has come.
    Timer,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send to everyone, from `ciaddr`.
    Broadcast(Outgoing),
    /// Send to one server, from `ciaddr`.
    Unicast(Ipv4Addr, Outgoing),
    /// Set the interface up like this (again: it may be the same as before).
    Configure(Grant),
    /// Take the address from the interface.
    Deconfigure(Grant),
    /// Say what is waited for.
    Say(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Lease {
    grant: Grant,
    server: Ipv4Addr,
    renew_at: Instant,
    rebind_at: Instant,
    ends_at: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Stopped,
    Selecting,
    Requesting { server: Ipv4Addr, address: Ipv4Addr },
    Bound(Lease),
    Renewing(Lease),
    Rebinding(Lease),
    Verifying(Lease),
}

/// One interface's client.
#[derive(Debug)]
pub struct Client {
    state: State,
    prefer: Option<Ipv4Addr>,
    random: u64,
    xid: u32,
    began: Instant,
    sent: u32,
    refusals: u32,
    deadline: Option<Instant>,
}

impl Client {
    /// A client that waits for a carrier. `prefer` is the address to ask for: the one that the interface has from an
    /// earlier life of the agent. `seed` must be unpredictable.
    #[must_use]
    pub fn new(prefer: Option<Ipv4Addr>, seed: u64, now: Instant) -> Self {
        Self {
            state: State::Stopped,
            prefer,
            random: seed | 1,
            xid: 0,
            began: now,
            sent: 0,
            refusals: 0,
            deadline: None,
        }
    }

    /// Goes on with the lease of an earlier process, and says what to set up. It is good until the server says otherwise: with
    /// the carrier it is verified.
    pub fn resume(&mut self, kept: Kept, now: Instant) -> Vec<Action> {
        match now.checked_sub(kept.age) {
            Some(then) => self.bind(kept.server, kept.grant, kept.times, then),
            // A clock that is younger than the lease.
            None => Vec::new(),
        }
    }

    /// When [`Event::Timer`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether broadcasts may be heard now, so that the packet socket must be open.
    #[must_use]
    pub fn listens_to_broadcasts(&self) -> bool {
        !matches!(self.state, State::Stopped | State::Bound(_))
    }

    /// The address that renewals are answered to, while one is under way.
    #[must_use]
    pub fn renewing(&self) -> Option<Ipv4Addr> {
        match &self.state {
            State::Renewing(lease) | State::Rebinding(lease) => Some(lease.grant.address),
            _ => None,
        }
    }

    /// Takes an event.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::CarrierUp => self.carrier_up(now),
            Event::CarrierLost => {
                if matches!(self.state, State::Selecting | State::Requesting { .. }) {
                    self.state = State::Stopped;
                    self.deadline = None;
                }
                Vec::new()
            }
            Event::Heard(xid, answer) if xid == self.xid => self.heard(answer, now),
            Event::Heard(..) => Vec::new(),
            Event::Timer => self.timer(now),
        }
    }

    fn carrier_up(&mut self, now: Instant) -> Vec<Action> {
        match self.state.clone() {
            State::Stopped => self.select(now),
            State::Bound(lease) | State::Renewing(lease) | State::Rebinding(lease) => {
                self.begin(State::Verifying(lease), now);
                self.transmit(now)
            }
            State::Selecting | State::Requesting { .. } | State::Verifying(_) => Vec::new(),
        }
    }

    /// Enters a state with a new transaction.
    fn begin(&mut self, state: State, now: Instant) {
        self.state = state;
        self.sent = 0;
        self.began = now;
        let [a, b, c, d, ..] = self.next_random().to_be_bytes();
        self.xid = u32::from_be_bytes([a, b, c, d]);
    }

    fn select(&mut self, now: Instant) -> Vec<Action> {
        self.begin(State::Selecting, now);
        self.transmit(now)
    }

    /// xorshift64: only jitter and transaction numbers hang on it.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// 1, 2, 4 ... 64 seconds, give or take a second, or a quarter when short.
    fn interval(&mut self) -> Duration {
        let doublings = self.sent.saturating_sub(1).min(6);
        let base = Duration::from_secs(1 << doublings).min(MAX_INTERVAL);
        let spread = (base / 4).min(Duration::from_secs(1));
        let share = u32::try_from(self.next_random() >> 32).unwrap_or(0);
        base - spread + (spread * 2).mul_f64(f64::from(share) / f64::from(u32::MAX))
    }

    /// Sends what the state sends, and sets the timer.
    fn transmit(&mut self, now: Instant) -> Vec<Action> {
        let mut message = Outgoing {
            kind: MessageType::Request,
            xid: self.xid,
            elapsed: now.saturating_duration_since(self.began),
            ciaddr: Ipv4Addr::UNSPECIFIED,
            requested: None,
            server: None,
        };
        self.sent = self.sent.saturating_add(1);
        let interval = self.interval();
        let (action, until) = match &self.state {
            State::Stopped | State::Bound(_) => return Vec::new(),
            State::Selecting => {
                message.kind = MessageType::Discover;
                message.requested = self.prefer;
                (Action::Broadcast(message), now + interval)
            }
            State::Requesting { server, address } => {
                message.requested = Some(*address);
                message.server = Some(*server);
                (Action::Broadcast(message), now + interval)
            }
            State::Verifying(lease) => {
                message.requested = Some(lease.grant.address);
                (Action::Broadcast(message), (now + interval).min(lease.ends_at))
            }
            State::Renewing(lease) => {
                message.ciaddr = lease.grant.address;
                let until = retry(now, lease.rebind_at);
                (Action::Unicast(lease.server, message), until)
            }
            State::Rebinding(lease) => {
                message.ciaddr = lease.grant.address;
                (Action::Broadcast(message), retry(now, lease.ends_at))
            }
        };
        self.deadline = Some(until);
        vec![action]
    }

    fn timer(&mut self, now: Instant) -> Vec<Action> {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        match self.state.clone() {
            State::Stopped => Vec::new(),
            State::Selecting => {
                let mut actions = self.complaint("DHCP", now);
                actions.extend(self.transmit(now));
                actions
            }
            State::Requesting { server, .. } if self.sent >= MAX_REQUESTS => {
                let mut actions = vec![Action::Say(format!(
                    "DHCP: {server} made an offer and then did not answer {MAX_REQUESTS} REQUESTs"
                ))];
                actions.extend(self.select(now));
                actions
            }
            State::Requesting { .. } => self.transmit(now),
            State::Bound(lease)
            | State::Renewing(lease)
            | State::Rebinding(lease)
            | State::Verifying(lease)
                if now >= lease.ends_at =>
            {
                let mut actions = vec![
                    Action::Deconfigure(lease.grant.clone()),
                    Action::Say(format!("DHCP: the lease of {} has ended", lease.grant.address)),
                ];
                actions.extend(self.select(now));
                actions
            }
            // Nobody objects and nobody agrees: the lease is still ours (RFC 2131 section 3.2).
            State::Verifying(lease) if self.sent >= MAX_REQUESTS => {
                self.deadline = Some(lease.renew_at.max(now));
                self.state = State::Bound(lease);
                self.sent = 0;
                Vec::new()
            }
            State::Verifying(_) => self.transmit(now),
            State::Bound(lease) if now < lease.rebind_at => {
                self.begin(State::Renewing(lease), now);
                self.transmit(now)
            }
            State::Renewing(lease) if now < lease.rebind_at => {
                let mut actions = self.complaint("a renewal by DHCP", now);
                actions.extend(self.transmit(now));
                actions
            }
            State::Bound(lease) | State::Renewing(lease) => {
                self.begin(State::Rebinding(lease), now);
                self.transmit(now)
            }
            State::Rebinding(_) => {
                let mut actions = self.complaint("a renewal by any DHCP server", now);
                actions.extend(self.transmit(now));
                actions
            }
        }
    }

    fn complaint(&self, what: &str, now: Instant) -> Vec<Action> {
        if self.sent < PATIENCE {
            return Vec::new();
        }
        let seconds = now.saturating_duration_since(self.began).as_secs();
        vec![Action::Say(format!("waiting for {what}, no answer for {seconds} s"))]
    }

    fn heard(&mut self, answer: Answer, now: Instant) -> Vec<Action> {
        match (self.state.clone(), answer) {
            (State::Selecting, Answer::Offer { server, address }) => {
                // The transaction goes on (RFC 2131 section 4.4.1), the counting begins anew.
                self.state = State::Requesting { server, address };
                self.sent = 0;
                self.transmit(now)
            }
            (
                State::Requesting { server: chosen, address },
                Answer::Ack { server, grant, times },
            ) if server == chosen && grant.address == address => {
                self.bind(server, grant, times, now)
            }
            (
                State::Renewing(lease) | State::Rebinding(lease) | State::Verifying(lease),
                Answer::Ack { server, grant, times },
            ) if grant.address == lease.grant.address => self.bind(server, grant, times, now),
            (State::Requesting { server: chosen, .. }, Answer::Nak { server, reason })
                if server.is_none_or(|server| server == chosen) =>
            {
                self.refused(None, &reason, now)
            }
            (State::Renewing(lease), Answer::Nak { server, reason })
                if server.is_none_or(|server| server == lease.server) =>
            {
                self.refused(Some(lease), &reason, now)
            }
            (State::Rebinding(lease) | State::Verifying(lease), Answer::Nak { reason, .. }) => {
                self.refused(Some(lease), &reason, now)
            }
            _ => Vec::new(),
        }
    }

    fn bind(&mut self, server: Ipv4Addr, grant: Grant, times: Times, now: Instant) -> Vec<Action> {
        // Counted from the moment that the request went out, which is earlier than the server's (section 4.4.1); our
        // retransmissions make that imprecise, so from the answer.
        let lease = Lease {
            grant: grant.clone(),
            server,
            renew_at: now + times.renew,
            rebind_at: now + times.rebind,
            ends_at: now + times.lease,
        };
        self.deadline = Some(lease.renew_at);
        self.prefer = Some(grant.address);
        self.state = State::Bound(lease);
        self.refusals = 0;
        self.sent = 0;
        vec![Action::Configure(grant)]
    }

    fn refused(&mut self, lease: Option<Lease>, reason: &str, now: Instant) -> Vec<Action> {
        let mut actions: Vec<Action> =
            lease.map(|lease| Action::Deconfigure(lease.grant)).into_iter().collect();
        actions.push(Action::Say(format!("DHCP: refused by the server: {reason}")));
        self.prefer = None;
        self.refusals = self.refusals.saturating_add(1);
        // The first refusal is normal after a move; a server that goes on must not be flooded.
        if self.refusals == 1 {
            actions.extend(self.select(now));
        } else {
            self.begin(State::Selecting, now);
            let pause = self.refusals.min(MAX_NAK_PAUSE_S);
            self.deadline = Some(now + Duration::from_secs(u64::from(pause)));
        }
        actions
    }
}

/// Half of the time that is left, and not too soon (RFC 2131 section 4.4.5).
fn retry(now: Instant, limit: Instant) -> Instant {
    let left = limit.saturating_duration_since(now);
    now + (left / 2).max(MIN_RENEW_INTERVAL).min(left.max(Duration::from_millis(1)))
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
