//! What a new agent does with what an earlier one left: running containers are kept, ended ones are accounted for, what
//! belongs to no committed set is removed. A crash at any point of a roll thus ends in exactly one set: the one that the notes
//! name. What they say is kept stays mounted, so that a set on trial can still be gone back from.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use protocol::ids::{Digest, Name};
use protocol::imageset::Mode;
use protocol::node::{ContainerState, Desired, ExitStatus};

use super::readiness::Readiness;
use super::set::{Commitment, ContainerRecord, Deployment, Kept, SetMachine};
use super::worker::{Live, Member, Surroundings, deployment, mount_dir, on_end, record, uptime};
use super::{Agent, chain};
use crate::containers::policy::should_restart;
use crate::containers::{self, Adopted, Handle, HeldSockets, Spec};
use crate::mounts;

/// How long the record of a container that has just ended may take to arrive.
const RECORD_PATIENCE: Duration = Duration::from_secs(2);

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

/// What an instance is, for the decision whether it stays.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Instance {
    container: Name,
    digest: Digest,
    lives: bool,
}

/// Which instance each container of the committed set keeps: one of that very digest, a living one before an ended one. Every
/// other instance is to go. Pure.
fn keep(committed: &Digest, containers: &[Name], left: &[Instance]) -> Vec<Option<usize>> {
    let of = |name: &Name, lives: bool| {
        left.iter()
            .position(|it| it.container == *name && it.digest == *committed && it.lives == lives)
    };
    containers.iter().map(|name| of(name, true).or_else(|| of(name, false))).collect()
}

/// A set that an earlier agent left behind.
#[derive(Debug)]
pub(super) struct AdoptedSet {
    /// What decides.
    pub machine: SetMachine,
    /// What runs.
    pub running: Live,
    /// What is kept.
    pub kept: Option<Live>,
}

impl Agent {
    /// Adopts what an earlier agent of this boot left behind.
    pub(super) fn adopt(&mut self) {
        let mut left = self.left_behind();
        let mut mounted = BTreeSet::new();
        for (name, commitment) in self.notes.commitments.clone() {
            let of_set = left.remove(&name).unwrap_or_default();
            match self.adopt_set(&name, &commitment, of_set) {
                Some(adopted) => {
                    log::info!("{name}: version {} goes on", commitment.set.version);
                    let members = [Some(&adopted.running), adopted.kept.as_ref()];
                    let members = members.into_iter().flatten().flat_map(|live| &live.members);
                    mounted.extend(members.map(|member| member.mount.clone()));
                    let note = adopted.machine.note();
                    self.slot(&name, Some(adopted));
                    self.notes.commitments.extend(note.map(|note| (name, note)));
                }
                None => drop(self.notes.commitments.remove(&name)),
            }
        }
        self.notes_file.save(&self.notes);
        for of_set in left.into_values() {
            of_set.into_iter().for_each(|item| discard(&self.around, item));
        }
        // A pivoted root lies there, too, and is nobody's to take away.
        if self.notes.commitments.values().all(|it| it.mode == Mode::Contain) {
            self.sweep_mounts(&mounted);
        }
        if let Some(desired) = self.notes.desired.clone() {
            // The notes have no files: they may be secrets.
            self.desired(Desired { files: self.given_files(), ..desired });
        }
        self.tick();
    }

    /// Unmounts the roots of sets that were staged but not committed, or committed but not taken down.
    fn sweep_mounts(&self, keep: &BTreeSet<PathBuf>) {
        let Ok(entries) = fs::read_dir(self.around.dirs.mounts()) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            if !keep.contains(&path)
                && let Err(error) = mounts::unmount_overlay(&path)
            {
                log::warn!("left over: {}", chain(&error));
            }
        }
        mounts::lower::sweep(&self.around.dirs.lowers());
    }

    /// Every container instance found, by set.
    fn left_behind(&self) -> BTreeMap<Name, Vec<Left>> {
        let mut left: BTreeMap<Name, Vec<Left>> = BTreeMap::new();
        let found = containers::adopt(&self.around.dirs, &on_end(&self.around));
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

    /// None if the set does not run, whatever the notes say; nothing of it is left then.
    fn adopt_set(
        &self,
        name: &Name,
        commitment: &Commitment,
        left: Vec<Left>,
    ) -> Option<AdoptedSet> {
        let give_up = |why: &str, left: Vec<Left>| {
            log::warn!("{name}: {why}");
            left.into_iter().for_each(|item| discard(&self.around, item));
            None
        };
        if commitment.mode == Mode::Pivot && self.around.init.is_some() {
            return give_up("the agent ended before PID 1 could pivot", left);
        }
        let Some(pulled) = self.pulls.puller().reopen(&commitment.digest) else {
            let version = &commitment.set.version;
            return give_up(&format!("version {version} is not in the store any more"), left);
        };
        let mut running = Live::new(commitment.set.clone(), pulled);
        let described = match commitment.mode {
            Mode::Contain => running.pulled.set.containers.clone(),
            Mode::Pivot => Vec::new(),
        };
        let names: Vec<Name> = described.iter().map(|it| it.name.clone()).collect();
        let instances: Vec<Instance> = left.iter().map(instance).collect();
        let kept = keep(&commitment.digest, &names, &instances);
        let mut left: Vec<Option<Left>> = left.into_iter().map(Some).collect();
        let mut found: Vec<Option<Left>> = Vec::new();
        for index in kept {
            found.push(index.and_then(|index| left.get_mut(index)).and_then(Option::take));
        }
        self.discard_others(left.into_iter().flatten().collect(), &found);
        let mut records = Vec::new();
        for (container, found) in described.into_iter().zip(found) {
            let dirs = &self.around.dirs;
            let mount = mount_dir(dirs, name, &container.name, &commitment.digest);
            let mut member = Member::new(container, mount);
            records.push(take_over(&mut member, found, &self.around));
            running.members.push(member);
        }
        let kept = commitment.kept.as_ref().and_then(|kept| self.reopen_kept(name, kept));
        let note = commitment.kept.clone().filter(|_| kept.is_some());
        let deployment: Deployment = deployment(&running, records, commitment.last_roll.clone());
        let machine = SetMachine::adopted(deployment, note, commitment, uptime());
        Some(AdoptedSet { machine, running, kept })
    }

    /// Ends what the set does not keep. Where all that it keeps runs already, the rest only drains, and nobody waits for it;
    /// otherwise it has left its ports before any barrier opens.
    fn discard_others(&self, others: Vec<Left>, found: &[Option<Left>]) {
        let runs = |left: &Option<Left>| match left {
            Some(Left::Live(handle)) => handle.state() == ContainerState::Running,
            _ => false,
        };
        if others.is_empty() || !found.iter().all(runs) {
            return others.into_iter().for_each(|item| discard(&self.around, item));
        }
        let around = self.around.clone();
        super::start::thread("drain", move || {
            others.into_iter().for_each(|item| discard(&around, item));
        });
    }

    /// The kept set with its mounts; none when they are not there any more.
    fn reopen_kept(&self, name: &Name, kept: &Kept) -> Option<Live> {
        let pulled = self.pulls.puller().reopen(&kept.digest)?;
        let mut live = Live::new(kept.set.clone(), pulled);
        for container in live.pulled.set.containers.clone() {
            let mount = mount_dir(&self.around.dirs, name, &container.name, &kept.digest);
            if !mounts::is_mounted(&mount) {
                log::warn!("{name}: version {} is not kept any more", kept.set.version);
                return None;
            }
            live.members.push(Member::new(container, mount));
        }
        Some(live)
    }
}

/// Stops and removes an instance that belongs to no committed set.
fn discard(around: &Surroundings, left: Left) {
    let id = left.spec().id.clone();
    let Left::Live(handle) = &left else {
        // It has ended: its directory goes.
        if let Err(error) = containers::remove(&around.dirs, &id) {
            log::warn!("{id}: {}", chain(&error));
        }
        return;
    };
    log::info!("{id}: left over, stopping it");
    for result in [handle.stop().map(drop), handle.remove()] {
        if let Err(error) = result {
            log::warn!("{id}: {}", chain(&error));
        }
    }
}

fn instance(left: &Left) -> Instance {
    Instance {
        container: left.spec().name.clone(),
        digest: left.spec().set_digest,
        lives: matches!(left, Left::Live(_)),
    }
}

/// Makes the instance the member's own, and says how it stands. What does not run, but should, is due to be started at once.
fn take_over(member: &mut Member, left: Option<Left>, around: &Surroundings) -> ContainerRecord {
    match left {
        Some(Left::Live(handle)) => {
            member.restarts = handle.spec().restarts;
            member.sockets = handle.sockets().unwrap_or_else(|error| {
                log::warn!("{}; its connections are lost when it ends", chain(&error));
                HeldSockets::default()
            });
            let id = handle.spec().id.clone();
            // One that runs already says so; one that was held at its barrier goes on now.
            let released = handle.release();
            let ended = released.is_err().then(|| handle.wait(RECORD_PATIENCE)).flatten();
            let pid = match (&released, &ended) {
                (Ok(released), _) => Some(released.pid),
                (Err(_), Some(_)) => None,
                (Err(error), None) => {
                    log::warn!("{id}: {}", chain(error));
                    Some(handle.pid())
                }
            };
            let readiness = released.map(|it| {
                let readiness = Readiness::of(&member.container).begun(it.exec_at_ns);
                around.attend(&handle, &member.container, readiness.clone());
                readiness
            });
            member.handle = Some(handle);
            match ended {
                Some(exit) => ended_record(member, &id, exit.status),
                None => {
                    let mut record = record(member, &id, pid);
                    record.readiness = readiness.unwrap_or(record.readiness);
                    record
                }
            }
        }
        Some(Left::Ended(spec, exit)) => {
            member.restarts = spec.restarts;
            member.leftover = Some(spec.id.clone());
            ended_record(member, &spec.id, exit)
        }
        None => {
            let mut record = record(member, "", None);
            record.restart_at = Some(uptime());
            record
        }
    }
}

/// A record of a member that has ended. Its directory stays until it is started again or stopped, so that another agent
/// finds the same.
fn ended_record(member: &Member, id: &str, exit: ExitStatus) -> ContainerRecord {
    let mut record = record(member, id, None);
    let well = exit.code == Some(0);
    record.state = if well { ContainerState::Exited } else { ContainerState::Dead };
    record.restart_at = should_restart(record.restart, &exit).then(uptime);
    record.exit = Some(exit);
    record
}

#[cfg(test)]
mod tests {
    use protocol::imageset::{Container, Restart};

    use super::*;

    fn names(text: &str) -> Vec<Name> {
        text.split(' ').map(|name| name.parse().expect("name")).collect()
    }

    /// `web:1+` is a living instance of container `web` of version 1, `web:1-` one that has ended.
    fn left(text: &str) -> Vec<Instance> {
        let one = |text: &str| {
            let (name, rest) = text.split_once(':').expect("colon");
            let (version, lives) = rest.split_at(rest.len() - 1);
            Instance {
                container: name.parse().expect("name"),
                digest: Digest::of(version.as_bytes()),
                lives: lives == "+",
            }
        };
        text.split_whitespace().map(one).collect()
    }

    #[test]
    fn each_container_keeps_one_instance_of_the_committed_digest() {
        let table: [(&str, &str, &[Option<usize>]); 7] = [
            ("an agent died with all running", "web:2+ db:2+", &[Some(0), Some(1)]),
            ("before the cut-over was committed", "web:2+ web:3+ db:3+ db:2+", &[Some(0), Some(3)]),
            (
                "after the commit, the old still there",
                "web:1+ db:1+ db:2+ web:2+",
                &[Some(3), Some(2)],
            ),
            ("going back, the new gone", "web:1+ db:1+", &[None, None]),
            ("a living one before an ended one", "web:2- web:2+ db:2-", &[Some(1), Some(2)]),
            ("a container that the set does not have", "old:2+ web:2+", &[Some(1), None]),
            ("nothing at all", "", &[None, None]),
        ];
        for (what, instances, expected) in table {
            let kept = keep(&Digest::of(b"2"), &names("web db"), &left(instances));
            assert_eq!(kept, expected, "{what}");
        }
    }

    fn member(restart: Restart) -> Member {
        let json = serde_json::json!({"name": "web", "image": "web"});
        let mut container: Container = serde_json::from_value(json).expect("container");
        container.restart = restart;
        Member::new(container, PathBuf::from("/nowhere"))
    }

    #[test]
    fn an_ended_container_is_started_again_only_if_its_policy_says_so() {
        let failed = ExitStatus { code: Some(7), signal: None, error: None };
        for (restart, again) in
            [(Restart::Always, true), (Restart::OnFailure, true), (Restart::Never, false)]
        {
            let record = ended_record(&member(restart), "hello.web.1", failed.clone());
            assert_eq!((record.state, record.pid), (ContainerState::Dead, None));
            assert_eq!(record.restart_at.is_some(), again, "{restart:?}");
            assert_eq!(record.exit.as_ref(), Some(&failed));
        }
    }

    #[test]
    fn a_container_that_nothing_is_left_of_is_started_at_once() {
        let (sender, _inbox) = std::sync::mpsc::channel();
        let around = Surroundings {
            facts: std::sync::Arc::default(),
            dirs: crate::paths::RunDirs::new("/nowhere"),
            events: crate::agent::Sender(sender),
            init: None,
            hostname: String::new(),
            board: std::sync::Arc::default(),
            health: crate::health::Watcher::start(Box::new(|_, _, _| ())).expect("thread"),
        };
        let record = take_over(&mut member(Restart::Never), None, &around);
        assert!(record.restart_at.is_some() && record.instance.is_empty());
    }
}
