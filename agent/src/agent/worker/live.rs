//! A set as its worker holds it: its content, its mounts, its instances. Does nothing by itself.

use std::path::PathBuf;
use std::time::Duration;

use protocol::ids::{Digest, Name};
use protocol::imageset::{Container, DEFAULT_WATCH_S};
use protocol::node::{ContainerState, DesiredSet, RollReport};

use super::uptime;
use crate::agent::readiness::Readiness;
use crate::agent::set::{ContainerRecord, Deployment};
use crate::containers::{Handle, HeldSockets};
use crate::paths::RunDirs;
use crate::pull::PulledSet;

/// A container of a set on this node.
#[derive(Debug)]
pub(in crate::agent) struct Member {
    /// Its description.
    pub container: Container,
    /// Its mounted root's directory.
    pub mount: PathBuf,
    /// Its running or created instance; None between an end and the next start.
    pub handle: Option<Handle>,
    /// The instance that ended while no agent looked: its directory tells how until the next start.
    pub leftover: Option<String>,
    /// How often it was started again.
    pub restarts: u32,
    /// Its held sockets: kept here while it is started again, so that no connection is lost.
    pub sockets: HeldSockets,
}

impl Member {
    /// A member that nothing runs of.
    #[must_use]
    pub(in crate::agent) fn new(container: Container, mount: PathBuf) -> Self {
        Self {
            container,
            mount,
            handle: None,
            leftover: None,
            restarts: 0,
            sockets: HeldSockets::default(),
        }
    }
}

/// Where the root of a container is mounted: a set's version and its successor stand side by side.
#[must_use]
pub(in crate::agent) fn mount_dir(
    dirs: &RunDirs,
    set: &Name,
    container: &Name,
    digest: &Digest,
) -> PathBuf {
    let digest: String = digest.hex().chars().take(12).collect();
    dirs.mounts().join(format!("{set}.{container}.{digest}"))
}

/// A set with its mounts and containers.
#[derive(Debug)]
pub(in crate::agent) struct Live {
    /// What it was asked for as.
    pub set: DesiredSet,
    /// Its content.
    pub pulled: PulledSet,
    /// Its containers.
    pub members: Vec<Member>,
    /// When all of it stood at the exec barrier.
    pub staged: Duration,
    /// Whether it ran here before and was kept.
    pub kept: bool,
}

impl Live {
    /// A set that nothing is mounted or created of.
    #[must_use]
    pub(in crate::agent) fn new(set: DesiredSet, pulled: PulledSet) -> Self {
        Self { set, pulled, members: Vec::new(), staged: uptime(), kept: false }
    }

    /// Every socket that is held for it.
    pub(super) fn sockets(&self) -> HeldSockets {
        self.members.iter().map(|member| &member.sockets).collect()
    }

    /// Has its members begin with these held sockets, of which each takes its own.
    pub(super) fn inherit(&mut self, sockets: &HeldSockets) {
        for member in &mut self.members {
            member.sockets = sockets.clone();
        }
    }

    /// Lets go of its held sockets; the paths of those that its successor does not have are removed.
    pub(super) fn let_go(&mut self, successor: &HeldSockets) {
        for member in &mut self.members {
            std::mem::take(&mut member.sockets).retire(successor);
        }
    }

    /// The descriptions of its containers.
    pub(super) fn containers(&self) -> Vec<Container> {
        self.members.iter().map(|member| member.container.clone()).collect()
    }
}

/// A record of a member that was just started.
#[must_use]
pub(in crate::agent) fn record(
    member: &Member,
    instance: &str,
    pid: Option<u32>,
) -> ContainerRecord {
    ContainerRecord {
        name: member.container.name.clone(),
        instance: instance.to_owned(),
        restart: member.container.restart,
        state: if pid.is_some() { ContainerState::Running } else { ContainerState::Created },
        pid,
        restarts: member.restarts,
        exit: None,
        started: uptime(),
        restart_at: None,
        failures: 0,
        readiness: Readiness::of(&member.container),
        replaced_at_ns: None,
        notes: member.handle.as_ref().map(|handle| handle.notes().to_vec()).unwrap_or_default(),
    }
}

/// What runs, as the state machine knows it.
#[must_use]
pub(in crate::agent) fn deployment(
    live: &Live,
    containers: Vec<ContainerRecord>,
    last_roll: Option<RollReport>,
) -> Deployment {
    let watch_s = live.pulled.set.watch_s.unwrap_or(DEFAULT_WATCH_S);
    Deployment {
        set: live.set.clone(),
        digest: live.pulled.digest,
        mode: live.pulled.set.mode,
        watch: Duration::from_secs(watch_s.into()),
        containers,
        last_roll,
    }
}
