//! Everything that can happen to the agent: one closed enum, one loop that takes it.

use std::fmt;

use protocol::ids::Name;
use protocol::node::{Desired, ExitStatus};

use super::set::{CutOverFailure, Deployment};
use crate::network::NetworkEvent;
use crate::pull::PulledSet;

/// What happens to the agent.
#[derive(Debug)]
pub enum Event {
    /// The network changed.
    Network(NetworkEvent),
    /// The server wants this.
    Desired(Desired),
    /// The server answered.
    ServerReachable,
    /// The server did not answer; why.
    ServerUnreachable(String),
    /// A pull ended.
    Pulled(Name, Result<Box<PulledSet>, String>),
    /// A set stands at its exec barriers, or not.
    Staged(Name, Result<(), String>),
    /// A cut-over ended.
    CutOver(Name, Result<Box<Deployment>, Box<CutOverFailure>>),
    /// A container was started again, or not.
    Restarted {
        /// The set.
        set: Name,
        /// The container.
        container: Name,
        /// New instance and process id, or why not.
        result: Result<(String, u32), String>,
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
            Self::CutOver(name, Ok(deployment)) => write!(f, "{name}: runs {}", deployment.digest),
            Self::CutOver(name, Err(failure)) => {
                write!(f, "{name}: not cut over: {}", failure.reason)
            }
            Self::Restarted { set, container, result: Ok((_, pid)) } => {
                write!(f, "{set}.{container}: started again, pid {pid}")
            }
            Self::Restarted { set, container, result: Err(why) } => {
                write!(f, "{set}.{container}: not started again: {why}")
            }
            Self::Stopped(name) => write!(f, "{name}: stopped"),
            Self::Ended { instance, exit } => write!(f, "{instance} ended: {exit:?}"),
            Self::Terminate => f.write_str("asked to end"),
        }
    }
}
