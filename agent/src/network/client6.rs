//! The DHCPv6 client's state machine (RFC 8415 section 18.2): events and the time in, actions out. No sockets, no clock.
//!
//! ```text
//!          router: M          Advertise            Reply
//!  Idle --------------> Soliciting -----> Requesting -----> Bound --T1--> Renewing --T2--> Rebinding
//!    \                     |  ^     Reply (rapid commit)     ^ |            | Reply           |
//!     \ router: O          +---------------------------------+ +------------+-----------------+
//!      +--> Informing --> Informed             carrier back: Confirming    valid lifetime over: Soliciting
//! ```
//!
//! Two liberties for the sake of the boot: the first Solicit goes out at once, not after up to a second, and the first
//! server that has an address is taken, without waiting for others.
//! Nothing is released: the address is to outlive the agent, which may be replaced at any moment.

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use super::message6::{Answer, Kind, Lease, Outgoing};

/// How retransmissions go (section 15): the first interval, the longest, and after how many messages it is enough.
#[derive(Debug, Clone, Copy)]
struct Pace {
    first: Duration,
    longest: Duration,
    count: u32,
}

const fn pace(first: u64, longest: u64, count: u32) -> Pace {
    Pace { first: Duration::from_secs(first), longest: Duration::from_secs(longest), count }
}

/// Section 7.6, but for the longest pause between two Solicits, an hour there: a node that waits for its network should
/// not sleep over its return for longer than two minutes (RFC 3315's value).
const SOLICIT: Pace = pace(1, 120, u32::MAX);
const REQUEST: Pace = pace(1, 30, 10);
const CONFIRM: Pace = pace(1, 4, 4);
const RENEW: Pace = pace(10, 600, u32::MAX);
const DECLINE: Pace = pace(1, 4, 4);
const INFORMATION: Pace = pace(1, 120, u32::MAX);
/// The same for leases of less than half a minute.
const SHORTEST: Duration = Duration::from_millis(500);
/// Unanswered messages before it is said aloud.
const PATIENCE: u32 = 3;
/// A server that knows nothing of the lease any more (section 21.13, `NoBinding`).
const NO_BINDING: u16 = 3;

/// What happens to the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A router says what is to be had by DHCPv6.
    Offered {
        /// Addresses.
        managed: bool,
        /// Other things.
        other: bool,
    },
    /// The link can carry packets again.
    CarrierBack,
    /// The kernel found the address in use by somebody else.
    Duplicate(Ipv6Addr),
    /// A server said something.
    Heard(Answer),
    /// The time of [`Client::deadline`] has come.
    Timer,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send to all servers.
    Send(Outgoing),
    /// Set this address (again: for longer).
    Configure(Lease),
    /// Take this address away.
    Deconfigure(Ipv6Addr),
    /// These are the name servers and search domains.
    Names(Vec<Ipv6Addr>, Vec<String>),
    /// Say what is waited for.
    Say(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    lease: Lease,
    server: Vec<u8>,
    /// None: for ever.
    renew_at: Option<Instant>,
    rebind_at: Option<Instant>,
    ends_at: Option<Instant>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Idle,
    Informing,
    Informed,
    Soliciting,
    Requesting(Vec<u8>, Ipv6Addr),
    Bound(Held),
    Renewing(Held),
    Rebinding(Held),
    Confirming(Held),
    Declining(Vec<u8>, Ipv6Addr),
}

/// One interface's client.
#[derive(Debug)]
pub struct Client {
    state: State,
    random: u64,
    xid: u32,
    began: Instant,
    interval: Duration,
    sent: u32,
    deadline: Option<Instant>,
}

impl Client {
    /// A client that waits for a router's word. `seed` must be unpredictable.
    #[must_use]
    pub fn new(seed: u64, now: Instant) -> Self {
        Self {
            state: State::Idle,
            random: seed | 1,
            xid: 0,
            began: now,
            interval: Duration::ZERO,
            sent: 0,
            deadline: None,
        }
    }

    /// When [`Event::Timer`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether answers may come, so that the socket must be open.
    #[must_use]
    pub fn listens(&self) -> bool {
        !matches!(self.state, State::Idle | State::Informed | State::Bound(_))
    }

    /// Takes an event.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match (event, self.state.clone()) {
            (
                Event::Offered { managed: true, .. },
                State::Idle | State::Informing | State::Informed,
            ) => self.begin(State::Soliciting, now),
            (Event::Offered { managed: false, other: true }, State::Idle) => {
                self.begin(State::Informing, now)
            }
            (Event::Offered { .. }, _) => Vec::new(),
            (
                Event::CarrierBack,
                State::Bound(held) | State::Renewing(held) | State::Rebinding(held),
            ) => self.begin(State::Confirming(held), now),
            (Event::CarrierBack, State::Informed) => self.begin(State::Informing, now),
            // Not to wait for the end of a long pause.
            (Event::CarrierBack, State::Soliciting) => self.begin(State::Soliciting, now),
            (Event::CarrierBack, _) => Vec::new(),
            (
                Event::Duplicate(address),
                State::Bound(held) | State::Renewing(held) | State::Rebinding(held),
            ) if held.lease.address == address => {
                let mut actions = vec![
                    Action::Say(format!("DHCPv6: {address} is in use by another machine")),
                    Action::Deconfigure(address),
                ];
                actions.extend(self.begin(State::Declining(held.server, address), now));
                actions
            }
            (Event::Duplicate(_), _) => Vec::new(),
            (Event::Heard(answer), _) if answer.xid == self.xid => self.heard(answer, now),
            (Event::Heard(_), _) => Vec::new(),
            (Event::Timer, _) => self.timer(now),
        }
    }

    /// Enters a state that sends, with a new transaction.
    fn begin(&mut self, state: State, now: Instant) -> Vec<Action> {
        self.state = state;
        self.sent = 0;
        self.began = now;
        // 24 bits go out and come back.
        self.xid = u32::try_from(self.next_random() >> 40).unwrap_or(0);
        self.transmit(now)
    }

    /// xorshift64: only jitter and transaction numbers hang on it.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn pace(&self) -> Pace {
        match self.state {
            State::Idle | State::Informed | State::Bound(_) | State::Soliciting => SOLICIT,
            State::Informing => INFORMATION,
            State::Requesting(..) => REQUEST,
            State::Renewing(_) | State::Rebinding(_) => RENEW,
            State::Confirming(_) => CONFIRM,
            State::Declining(..) => DECLINE,
        }
    }

    /// Sends what the state sends, and sets the timer: twice the last interval, give or take a tenth.
    fn transmit(&mut self, now: Instant) -> Vec<Action> {
        let pace = self.pace();
        let (kind, server, address, until) = match &self.state {
            State::Idle | State::Informed | State::Bound(_) => return Vec::new(),
            State::Informing => (Kind::InformationRequest, None, None, None),
            State::Soliciting => (Kind::Solicit, None, None, None),
            State::Requesting(server, address) => {
                (Kind::Request, Some(server.clone()), Some(*address), None)
            }
            State::Renewing(held) => {
                (Kind::Renew, Some(held.server.clone()), Some(held.lease.address), held.rebind_at)
            }
            State::Rebinding(held) => (Kind::Rebind, None, Some(held.lease.address), held.ends_at),
            State::Confirming(held) => {
                (Kind::Confirm, None, Some(held.lease.address), held.ends_at)
            }
            State::Declining(server, address) => {
                (Kind::Decline, Some(server.clone()), Some(*address), None)
            }
        };
        let message = Outgoing {
            kind,
            xid: self.xid,
            elapsed: now.saturating_duration_since(self.began),
            server,
            address,
        };
        let base = match self.sent {
            0 => pace.first,
            _ => (self.interval * 2).min(pace.longest),
        };
        let share = u32::try_from(self.next_random() >> 32).unwrap_or(0);
        self.interval = base.mul_f64(0.9 + 0.2 * f64::from(share) / f64::from(u32::MAX));
        self.sent = self.sent.saturating_add(1);
        let left = until.map(|until| until.saturating_duration_since(now));
        // A short lease has no time for ten seconds.
        let wait = left.map_or(self.interval, |left| self.interval.min((left / 2).max(SHORTEST)));
        self.deadline = Some(now + wait);
        vec![Action::Send(message)]
    }

    fn timer(&mut self, now: Instant) -> Vec<Action> {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        let is_over = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let is_enough = self.sent >= self.pace().count;
        match self.state.clone() {
            State::Idle | State::Informed => {
                self.deadline = None;
                Vec::new()
            }
            State::Bound(held)
            | State::Renewing(held)
            | State::Rebinding(held)
            | State::Confirming(held)
                if is_over(held.ends_at) =>
            {
                let address = held.lease.address;
                let mut actions = vec![
                    Action::Deconfigure(address),
                    Action::Say(format!("DHCPv6: the lease of {address} has ended")),
                ];
                actions.extend(self.begin(State::Soliciting, now));
                actions
            }
            State::Bound(held) | State::Renewing(held) if is_over(held.rebind_at) => {
                self.begin(State::Rebinding(held), now)
            }
            State::Bound(held) if is_over(held.renew_at) => self.begin(State::Renewing(held), now),
            State::Bound(held) => {
                self.deadline = held.renew_at;
                Vec::new()
            }
            // Nobody objects: it is still ours (section 18.2.3).
            State::Confirming(held) if is_enough => {
                self.rest(held);
                Vec::new()
            }
            State::Requesting(..) | State::Declining(..) if is_enough => {
                self.begin(State::Soliciting, now)
            }
            State::Informing | State::Soliciting => {
                let mut actions = self.complaint(now);
                actions.extend(self.transmit(now));
                actions
            }
            _ => self.transmit(now),
        }
    }

    fn complaint(&self, now: Instant) -> Vec<Action> {
        if self.sent < PATIENCE {
            return Vec::new();
        }
        let seconds = now.saturating_duration_since(self.began).as_secs();
        vec![Action::Say(format!("waiting for DHCPv6, no answer for {seconds} s"))]
    }

    fn rest(&mut self, held: Held) {
        self.deadline = held.renew_at;
        self.state = State::Bound(held);
    }

    fn heard(&mut self, answer: Answer, now: Instant) -> Vec<Action> {
        let names = |answer: &Answer| Action::Names(answer.servers.clone(), answer.domains.clone());
        match (self.state.clone(), answer.kind) {
            (State::Informing, Kind::Reply) => {
                self.state = State::Informed;
                self.deadline = None;
                vec![names(&answer)]
            }
            (State::Soliciting, Kind::Advertise) => match answer.lease {
                Some(lease) if answer.status == 0 => {
                    self.begin(State::Requesting(answer.server, lease.address), now)
                }
                _ => vec![refusal(&answer)],
            },
            (State::Soliciting, Kind::Reply) if !answer.rapid => Vec::new(),
            (State::Confirming(held), Kind::Reply) => match answer.status {
                0 => {
                    self.rest(held);
                    Vec::new()
                }
                _ => self.lost(&held, &answer, now),
            },
            (State::Renewing(held) | State::Rebinding(held), Kind::Reply) => match answer.lease {
                Some(lease) if answer.status == 0 && lease.address == held.lease.address => {
                    let names = names(&answer);
                    self.bind(lease, answer.server, now, names)
                }
                // It has lost its memory: ask it for the same address (section 18.2.10.1).
                _ if answer.status == NO_BINDING => {
                    let address = held.lease.address;
                    self.begin(State::Requesting(answer.server, address), now)
                }
                Some(_) => self.lost(&held, &answer, now),
                None => Vec::new(),
            },
            (State::Soliciting | State::Requesting(..), Kind::Reply) => match answer.lease {
                Some(lease) if answer.status == 0 => {
                    let names = names(&answer);
                    self.bind(lease, answer.server, now, names)
                }
                _ => {
                    let said = refusal(&answer);
                    // A server that goes on refusing must not be flooded: the Solicit goes out when its turn comes.
                    let _for_later = self.begin(State::Soliciting, now);
                    vec![said]
                }
            },
            (State::Declining(..), Kind::Reply) => self.begin(State::Soliciting, now),
            _ => Vec::new(),
        }
    }

    fn lost(&mut self, held: &Held, answer: &Answer, now: Instant) -> Vec<Action> {
        let mut actions = vec![Action::Deconfigure(held.lease.address), refusal(answer)];
        actions.extend(self.begin(State::Soliciting, now));
        actions
    }

    fn bind(&mut self, lease: Lease, server: Vec<u8>, now: Instant, names: Action) -> Vec<Action> {
        let after = |seconds: u32| {
            let never = seconds == u32::MAX;
            (!never).then(|| now + Duration::from_secs(u64::from(seconds)))
        };
        let held = Held {
            lease,
            server,
            renew_at: after(lease.renew),
            rebind_at: after(lease.rebind),
            ends_at: after(lease.valid),
        };
        self.rest(held);
        vec![Action::Configure(lease), names]
    }
}

fn refusal(answer: &Answer) -> Action {
    let why = match answer.status {
        0 | 2 => "the server has no address for us".to_owned(),
        4 => "the address is not right for this link".to_owned(),
        other => format!("refused by the server with status {other}"),
    };
    Action::Say(format!("DHCPv6: {why}"))
}

#[cfg(test)]
#[path = "client6_tests.rs"]
mod tests;
