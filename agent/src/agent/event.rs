//! Everything that can happen to the agent: one closed enum, one loop that takes it.

use std::fmt;

use protocol::ids::Name;
use protocol::node::{Desired, ExitStatus, ObservedClock};

use super::layer0::Layer0Event;
use super::readiness::Word;
use super::set::{CutOverFailure, Deployment, Started};
use crate::network::NetworkEvent;
use crate::pull::PulledSet;

/// What happens to the agent.
#[derive(Debug)]
pub enum Event {
    /// The network changed.
    Network(NetworkEvent),
    /// The server wants this.
    Desired(Box<Desired>),
    /// The server answered.
    ServerReachable,
    /// The server did not answer; why.
    ServerUnreachable(String),
    /// A pull ended.
    Pulled(Name, Result<Box<PulledSet>, String>),
    /// A set stands at its exec barriers, or not.
    Staged(Name, Result<(), String>),
    /// Whether the node may be disturbed, asked for this set; else why not.
    Busy(Name, Option<String>),
    /// What the cut-over of a set waits for.
    Progress(Name, String),
    /// A cut-over ended, or a going back.
    CutOver(Name, Result<Box<Deployment>, Box<CutOverFailure>>),
    /// A container was started again, or not.
    Restarted {
        /// The set.
        set: Name,
        /// The container.
        container: Name,
        /// The new instance, or why not.
        result: Result<Started, String>,
    },
    /// A set was stopped.
    Stopped(Name),
    /// A container ended by itself.
    Ended {
        /// The instance.
        instance: String,
        /// How.
        exit: ExitStatus,
    },
    /// Something is said of a container's readiness or health.
    Word {
        /// The instance.
        instance: String,
        /// What.
        word: Word,
        /// When, nanoseconds of CLOCK_BOOTTIME.
        at_ns: u64,
    },
    /// The hardware was looked at.
    Hardware,
    /// Something came of changing Layer0.
    Layer0(Layer0Event),
    /// The clock was compared, or could not be.
    Clock(ObservedClock),
    /// PID 1, or a user, asks the agent to end.
    Terminate,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(event) => write!(f, "network: {event:?}"),
            Self::Desired(desired) => write!(f, "desired document {}", desired.version),
            Self::ServerReachable => f.write_str("server reachable"),
            Self::ServerUnreachable(why) => write!(f, "server unreachable: {why}"),
            Self::Pulled(name, Ok(pulled)) => write!(f, "{name}: pulled {}", pulled.digest),
            Self::Pulled(name, Err(why)) => write!(f, "{name}: not pulled: {why}"),
            Self::Staged(name, Ok(())) => write!(f, "{name}: staged"),
            Self::Staged(name, Err(why)) => write!(f, "{name}: not staged: {why}"),
            Self::Busy(name, None) => write!(f, "{name}: the node is free"),
            Self::Busy(name, Some(why)) => write!(f, "{name}: the node is busy: {why}"),
            Self::Progress(name, what) => write!(f, "{name}: {what}"),
            Self::CutOver(name, Ok(deployment)) => write!(f, "{name}: runs {}", deployment.digest),
            Self::CutOver(name, Err(failure)) => {
                write!(f, "{name}: not cut over: {}", failure.reason)
            }
            Self::Restarted { set, container, result: Ok(started) } => {
                write!(f, "{set}.{container}: started again, pid {}", started.pid)
            }
            Self::Restarted { set, container, result: Err(why) } => {
                write!(f, "{set}.{container}: not started again: {why}")
            }
            Self::Stopped(name) => write!(f, "{name}: stopped"),
            Self::Ended { instance, exit } => write!(f, "{instance} ended: {exit:?}"),
            Self::Word { instance, word, .. } => write!(f, "{instance}: {word:?}"),
            Self::Hardware => f.write_str("hardware"),
            Self::Clock(clock) => write!(f, "clock: {clock:?}"),
            Self::Layer0(event) => write!(f, "layer0: {event:?}"),
            Self::Terminate => f.write_str("asked to end"),
        }
    }
}
