//! What a new agent does with what an earlier one left: running containers are kept, ended ones are accounted for, what
//! belongs to no committed set is removed. A crash at any point of a roll thus ends in exactly one set.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use protocol::ids::Name;
use protocol::imageset::Mode;
use protocol::node::{ContainerState, ExitStatus};

use super::notes::Commitment;
use super::set::{ContainerRecord, Deployment};
use super::worker::{Live, Member, deployment, on_end, record, uptime};
use super::{Agent, chain};
use crate::containers::policy::should_restart;
use crate::containers::{self, Adopted, Handle, Spec};
use crate::mounts;
use crate::pull::PulledSet;

/// What is left of one container instance.
enum Left {
    Live(Handle),
    Ended(Box<Spec>, ExitStatus),
}

impl Left {
    fn spec(&self) -> &Spec {
        match self {
            Self::Live(handle) => handle.spec(),
            Self::Ended(spec, _) => spec,
        }
    }
}

impl Agent {
    /// Adopts what an earlier agent of this boot left behind.
    pub(super) fn adopt(&mut self) {
        let mut left = self.left_behind();
        let mut mounts = BTreeSet::new();
        for (name, commitment) in self.notes.commitments.clone() {
            let Some(pulled) = self.pulls.puller().reopen(&commitment.digest) else {
                // What cannot be described cannot be watched over either: it is stopped below and pulled anew.
                log::warn!(
                    "{name}: version {} is not in the store any more",
                    commitment.set.version
                );
                self.notes.commitments.remove(&name);
                continue;
            };
            let of_set = left.remove(&name).unwrap_or_default();
            let running = self.adopt_set(&name, &commitment, pulled, of_set);
            log::info!("{name}: version {} goes on", commitment.set.version);
            mounts.extend(running.0.members.iter().map(|member| member.mount.clone()));
            self.slot(&name, Some(running));
        }
        for of_set in left.into_values() {
            of_set.into_iter().for_each(|item| self.discard(item));
        }
        // A pivoted set's root is the machine's now; nothing of it is a member.
        if self.notes.commitments.values().all(|commitment| commitment.mode == Mode::Contain) {
            self.unmount_all_but(&mounts);
        }
        if let Some(desired) = self.notes.desired.clone() {
            self.desired(desired);
        }
        self.tick();
    }

    /// Every container instance found, by set.
    fn left_behind(&self) -> BTreeMap<Name, Vec<Left>> {
        let mut left: BTreeMap<Name, Vec<Left>> = BTreeMap::new();
        let found = containers::adopt(&self.around.dirs, &on_end(&self.around.events));
        match found {
            Ok(found) => {
                for adopted in found {
                    let item = match adopted {
                        Adopted::Live(handle) => Left::Live(handle),
                        Adopted::Ended { spec, exit } => Left::Ended(spec, exit.status),
                    };
                    left.entry(item.spec().set.clone()).or_default().push(item);
                }
            }
            Err(error) => log::error!("adopting containers: {}", chain(&error)),
        }
        left
    }

    fn adopt_set(
        &self,
        name: &Name,
        commitment: &Commitment,
        pulled: PulledSet,
        left: Vec<Left>,
    ) -> (Live, Deployment) {
        let mut live =
            Live { set: commitment.set.clone(), pulled, members: Vec::new(), staged: uptime() };
        let mut left: Vec<Left> = left
            .into_iter()
            .filter_map(|item| {
                if item.spec().set_digest == commitment.digest {
                    Some(item)
                } else {
                    self.discard(item);
                    None
                }
            })
            .collect();
        let mut records = Vec::new();
        let described = match commitment.mode {
            Mode::Contain => live.pulled.set.containers.clone(),
            Mode::Pivot => Vec::new(),
        };
        for container in described {
            let digest: String = commitment.digest.hex().chars().take(12).collect();
            let mount =
                self.around.dirs.mounts().join(format!("{name}.{}.{digest}", container.name));
            let mut member = Member { container, mount, handle: None, restarts: 0 };
            let index = left.iter().position(|item| item.spec().name == member.container.name);
            let found = index.map(|index| left.remove(index));
            let ended = found
                .as_ref()
                .and_then(|item| matches!(item, Left::Ended(..)).then(|| item.spec().id.clone()));
            records.push(take_over(&mut member, found));
            if let Some(id) = ended {
                self.forget(&id);
            }
            live.members.push(member);
        }
        left.into_iter().for_each(|item| self.discard(item));
        let deployment = deployment(&live, records, commitment.last_roll.clone());
        (live, deployment)
    }

    /// Unmounts what an earlier agent mounted for a set that did not come to run, or that was just being replaced.
    fn unmount_all_but(&self, needed: &BTreeSet<PathBuf>) {
        // No directory: nothing was ever mounted.
        let entries = std::fs::read_dir(self.around.dirs.mounts()).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()).filter(|path| !needed.contains(path)) {
            log::info!("{}: left over, unmounting it", path.display());
            if let Err(error) = mounts::unmount_overlay(&path) {
                log::warn!("{}", chain(&error));
            }
        }
    }

    /// Stops and removes an instance that belongs to no committed set.
    fn discard(&self, left: Left) {
        let id = left.spec().id.clone();
        let Left::Live(handle) = &left else { return self.forget(&id) };
        log::info!("{id}: left over, stopping it");
        for result in [handle.stop().map(drop), handle.remove()] {
            if let Err(error) = result {
                log::warn!("{id}: {}", chain(&error));
            }
        }
    }

    /// Takes an ended instance's directory away.
    fn forget(&self, id: &str) {
        if let Err(error) = containers::remove(&self.around.dirs, id) {
            log::warn!("{id}: {}", chain(&error));
        }
    }
}

/// Makes the instance the member's own, and says how it stands. What does not run is due to be started at once.
fn take_over(member: &mut Member, left: Option<Left>) -> ContainerRecord {
    match left {
        Some(Left::Live(handle)) => {
            member.restarts = handle.spec().restarts;
            let pid = match handle.release() {
                Ok(released) => Some(released.pid),
                Err(_) => (handle.state() == ContainerState::Running).then(|| handle.pid()),
            };
            let mut record = record(member, handle.spec().id.as_str(), pid);
            if pid.is_none() {
                record.restart_at = Some(uptime());
            }
            member.handle = Some(handle);
            record
        }
        Some(Left::Ended(spec, exit)) => {
            member.restarts = spec.restarts;
            let mut record = record(member, &spec.id, None);
            let again = should_restart(record.restart, &exit);
            record.state =
                if exit.code == Some(0) { ContainerState::Exited } else { ContainerState::Dead };
            record.restart_at = again.then(uptime);
            record.exit = Some(exit);
            record
        }
        None => {
            let mut record = record(member, "", None);
            record.restart_at = Some(uptime());
            record
        }
    }
}
