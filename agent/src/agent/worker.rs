//! The hands of one ImageSet: a thread that mounts, creates, releases and stops its containers, one job after another.
//!
//! What to do is decided by [`super::set`]; this only does it and says how it went.

mod cut;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use protocol::ids::{Digest, Name};
use protocol::imageset::{Container, Mode};
use protocol::node::{ContainerState, DesiredSet, ExitStatus, RollReport};
use rustix::time::{ClockId, clock_gettime};

use self::cut::{all_at_once, blackout_us};
use super::Sender;
use super::event::Event;
use super::set::{ContainerRecord, CutOverFailure, Deployment, exit_text};
use crate::containers::{self, Handle, NodeFacts, OnEnd, Place, Spec, keep};
use crate::init::control::Control;
use crate::mounts;
use crate::paths::RunDirs;
use crate::pull::PulledSet;

mod keeping;
mod pivot;
mod restart;

/// A job for the worker of a set.
#[derive(Debug)]
pub(super) enum Job {
    /// Mount every image and bring every container to its exec barrier.
    Stage(DesiredSet, Box<PulledSet>),
    /// Throw away what was staged.
    Discard,
    /// Stop the old, release the new.
    CutOver {
        /// When the decision for this version was taken, on CLOCK_BOOTTIME.
        decided: Duration,
    },
    /// Start a container again.
    Restart(Name, u32),
    /// What runs is known under another name now.
    Rename(DesiredSet),
    /// Stop everything.
    Stop,
    /// Stop everything and tell when it is done; the worker ends.
    Terminate(mpsc::Sender<()>),
}

/// A container of a set on this node.
#[derive(Debug)]
pub(super) struct Member {
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
}

impl Member {
    /// A member that nothing runs of.
    #[must_use]
    pub(super) fn new(container: Container, mount: PathBuf) -> Self {
        Self { container, mount, handle: None, leftover: None, restarts: 0 }
    }
}

/// Where the root of a container is mounted: a set's version and its successor stand side by side.
#[must_use]
pub(super) fn mount_dir(dirs: &RunDirs, set: &Name, container: &Name, digest: &Digest) -> PathBuf {
    let digest: String = digest.hex().chars().take(12).collect();
    dirs.mounts().join(format!("{set}.{container}.{digest}"))
}

/// A set with its mounts and containers.
#[derive(Debug)]
pub(super) struct Live {
    /// What it was asked for as.
    pub set: DesiredSet,
    /// Its content.
    pub pulled: PulledSet,
    /// Its containers.
    pub members: Vec<Member>,
    /// When all of it stood at the exec barrier.
    pub staged: Duration,
}

/// An instance that was stopped.
struct Stopped {
    name: Name,
    handle: Handle,
    /// None when its monitor does not say.
    ended_at_ns: Option<u64>,
}

/// What every worker needs of the agent.
#[derive(Debug, Clone)]
pub(super) struct Surroundings {
    /// Where things lie.
    pub dirs: RunDirs,
    /// The way back to the agent's loop.
    pub events: Sender,
    /// The way to PID 1; None when there is none of ours.
    pub init: Option<Arc<Control>>,
    /// The node's host name.
    pub hostname: String,
    /// What templates may say of the node, and the files the server gave it.
    pub facts: Arc<Mutex<NodeFacts>>,
}

/// The worker.
#[derive(Debug)]
pub(super) struct Worker {
    name: Name,
    around: Surroundings,
    incoming: Option<Live>,
    running: Option<Live>,
}

/// Time since the kernel started, suspend included (CLOCK_BOOTTIME).
#[must_use]
pub(super) fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

impl Worker {
    /// Starts the thread; `running` is what an earlier agent left behind. Jobs go into the returned channel.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn start(
        name: Name,
        around: Surroundings,
        running: Option<Live>,
    ) -> std::io::Result<mpsc::Sender<Job>> {
        let (jobs, inbox) = mpsc::channel();
        let mut worker = Self { name: name.clone(), around, incoming: None, running };
        thread::Builder::new().name(format!("set-{name}")).stack_size(256 << 10).spawn(
            move || {
                for job in inbox {
                    if !worker.work(job) {
                        break;
                    }
                }
            },
        )?;
        Ok(jobs)
    }

    fn work(&mut self, job: Job) -> bool {
        let name = self.name.clone();
        match job {
            Job::Stage(set, pulled) => {
                let result = self.stage(set, *pulled);
                self.around.events.send(Event::Staged(name, result));
            }
            Job::Discard => {
                if let Some(live) = self.incoming.take() {
                    self.take_down(live);
                }
            }
            Job::CutOver { decided } => {
                let result = self.cut_over(decided);
                self.around.events.send(Event::CutOver(name, result));
            }
            Job::Restart(container, restarts) => {
                let result = self.restart(&container, restarts);
                self.around.events.send(Event::Restarted { set: name, container, result });
            }
            Job::Rename(set) => {
                if let Some(live) = &mut self.running {
                    live.set = set;
                }
            }
            Job::Stop => {
                self.stop_all();
                self.around.events.send(Event::Stopped(name));
            }
            Job::Terminate(done) => {
                self.stop_all();
                let _ = done.send(());
                return false;
            }
        }
        true
    }

    /// A pivoted root stays: it is the machine's, and its mount is not ours to take away.
    fn stop_all(&mut self) {
        let running = self.running.take_if(|live| live.pulled.set.mode == Mode::Contain);
        for live in [self.incoming.take(), running].into_iter().flatten() {
            self.take_down(live);
        }
    }

    /// Mounts and creates; what was begun is undone when something fails.
    fn stage(&mut self, set: DesiredSet, pulled: PulledSet) -> Result<(), String> {
        if let Some(old) = self.incoming.take() {
            self.take_down(old);
        }
        let mut live = Live { set, pulled, members: Vec::new(), staged: uptime() };
        let result = match live.pulled.set.mode {
            Mode::Contain => self.stage_containers(&mut live),
            Mode::Pivot => self.stage_pivot(&mut live),
        };
        live.staged = uptime();
        match result {
            Ok(()) => {
                self.incoming = Some(live);
                Ok(())
            }
            Err(reason) => {
                self.take_down(live);
                Err(reason)
            }
        }
    }

    fn stage_containers(&self, live: &mut Live) -> Result<(), String> {
        for container in live.pulled.set.containers.clone() {
            let mount = self.mount(&live.pulled, &container.name, &container.image)?;
            live.members.push(Member::new(container, mount));
            let index = live.members.len().saturating_sub(1);
            let handle = self.create(live, index)?;
            if let Some(member) = live.members.get_mut(index) {
                member.handle = Some(handle);
            }
        }
        Ok(())
    }

    /// Mounts the image of a container and returns the directory that holds the mount.
    fn mount(&self, pulled: &PulledSet, container: &Name, image: &Name) -> Result<PathBuf, String> {
        let image =
            pulled.images.get(image).ok_or_else(|| format!("image {image} was not pulled"))?;
        let dir = mount_dir(&self.around.dirs, &self.name, container, &pulled.digest);
        mounts::unmount_overlay(&dir).map_err(|error| super::chain(&error))?;
        let own_users = |it: &Container| it.name == *container && it.namespaces.user;
        if pulled.set.containers.iter().any(own_users) {
            let base = containers::view::id_base(&self.name, container);
            containers::idmap::mount_overlay(&image.layers, &dir, base)?;
            return Ok(dir);
        }
        mounts::mount_overlay(&image.layers, &dir).map_err(|error| super::chain(&error))?;
        Ok(dir)
    }

    /// Creates an instance of a member, held at its exec barrier.
    fn create(&self, live: &Live, index: usize) -> Result<Handle, String> {
        let member = live.members.get(index).ok_or("no such member")?;
        let image = live.pulled.images.get(&member.container.image);
        let config = &image
            .ok_or_else(|| format!("image {} was not pulled", member.container.image))?
            .config;
        let short = |name: &Name| name.as_str().chars().take(20).collect::<String>();
        let place = Place {
            id: format!(
                "{}.{}.{:x}",
                short(&self.name),
                short(&member.container.name),
                uptime().as_micros()
            ),
            set: self.name.clone(),
            set_digest: live.pulled.digest,
            root: member.mount.join("root"),
            hostname: self.around.hostname.clone(),
            log_dir: self.around.dirs.log().join(self.name.as_str()),
            restarts: member.restarts,
            version: Some(live.set.version.clone()),
            keeping: self.keeping(),
            facts: self.around.facts.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        };
        let spec =
            Spec::plan(place, &member.container, config).map_err(|error| super::chain(&error))?;
        keep::prepare(&spec)?;
        self.hand_identity_on(&spec);
        containers::create(&self.around.dirs, &spec, on_end(&self.around.events)).map_err(|error| {
            format!("container {}: {}", member.container.name, super::chain(&error))
        })
    }

    fn cut_over(&mut self, decided: Duration) -> Result<Box<Deployment>, Box<CutOverFailure>> {
        let Some(mut live) = self.incoming.take() else {
            return Err(Box::new(CutOverFailure {
                reason: "nothing is staged".to_owned(),
                running: None,
            }));
        };
        if live.pulled.set.mode == Mode::Pivot {
            return self.pivot(live, decided);
        }
        let mut old = self.running.take();
        // From here to the release nothing is done but what the new containers wait for.
        let stopped = old.as_mut().map_or(Vec::new(), |old| self.stop_members(old));
        let released = self.release(&mut live);
        let ends: Vec<(Name, u64)> =
            stopped.iter().filter_map(|it| Some((it.name.clone(), it.ended_at_ns?))).collect();
        self.remove(stopped);
        match released {
            Ok(records) => {
                let starts: Vec<(Name, u64)> =
                    records.iter().map(|(record, at)| (record.name.clone(), *at)).collect();
                let report = RollReport {
                    from: old.as_ref().map(|old| old.pulled.digest),
                    to: live.pulled.digest,
                    bytes: live.pulled.bytes,
                    staging_ms: millis(live.staged.saturating_sub(decided)),
                    blackout_us: blackout_us(&ends, &starts),
                };
                if let Some(old) = old {
                    self.take_down(old);
                }
                let containers = records.into_iter().map(|(record, _)| record).collect();
                let deployment = deployment(&live, containers, Some(report));
                self.running = Some(live);
                Ok(Box::new(deployment))
            }
            Err(reason) => {
                self.take_down(live);
                let running = old.map(|old| self.restore(old));
                Err(Box::new(CutOverFailure { reason, running }))
            }
        }
    }

    /// Starts the old set again after the new one could not be. What does not start now is tried again like any container.
    fn restore(&mut self, mut old: Live) -> Deployment {
        let mut containers = Vec::new();
        for index in 0..old.members.len() {
            let started = self.start_member(&mut old, index);
            let Some(member) = old.members.get(index) else { continue };
            containers.push(match started {
                Ok((instance, pid)) => record(member, &instance, Some(pid)),
                Err(reason) => {
                    log::error!("{}.{}: going back: {reason}", self.name, member.container.name);
                    let exit = ExitStatus { code: None, signal: None, error: Some(reason) };
                    let state = ContainerState::Dead;
                    let restart_at = Some(uptime());
                    ContainerRecord {
                        state,
                        exit: Some(exit),
                        restart_at,
                        ..record(member, "", None)
                    }
                }
            });
        }
        let deployment = deployment(&old, containers, None);
        self.running = Some(old);
        deployment
    }

    /// Stops every running instance, all at once, and returns as soon as all are dead: the instances that ended, which
    /// are still to be removed, and when (nanoseconds, the containers' clock).
    fn stop_members(&self, live: &mut Live) -> Vec<Stopped> {
        live.members.iter_mut().for_each(|member| self.forget_leftover(member));
        let handles = live.members.iter_mut().filter_map(|member| {
            member.handle.take().map(|handle| (member.container.name.clone(), handle))
        });
        let stopped = all_at_once(handles.collect(), |handle: &Handle| handle.stop());
        let mut ended = Vec::new();
        for (name, handle, record) in stopped {
            if let Err(error) = &record {
                log::error!("{}.{name}: not stopped: {}", self.name, super::chain(error));
            }
            let ended_at_ns = record.ok().map(|record| record.ended_at_ns);
            ended.push(Stopped { name, handle, ended_at_ns });
        }
        ended
    }

    /// Takes away what stopped instances leave.
    fn remove(&self, stopped: Vec<Stopped>) {
        for Stopped { name, handle, .. } in stopped {
            if let Err(error) = handle.remove() {
                log::warn!("{}.{name}: {}", self.name, super::chain(&error));
            }
        }
    }

    /// Opens every exec barrier, all at once; returns a record of each container with the time of its exec (nanoseconds).
    fn release(&self, live: &mut Live) -> Result<Vec<(ContainerRecord, u64)>, String> {
        let handles = live.members.iter().filter_map(|member| {
            member.handle.clone().map(|handle| (member.container.name.clone(), handle))
        });
        let mut records = Vec::new();
        for (name, handle, released) in all_at_once(handles.collect(), Handle::release) {
            let released =
                released.map_err(|error| format!("container {name}: {}", super::chain(&error)))?;
            let member = live.members.iter().find(|member| member.container.name == name);
            let Some(member) = member else { continue };
            let record = record(member, handle.spec().id.as_str(), Some(released.pid));
            records.push((record, released.exec_at_ns));
        }
        Ok(records)
    }

    /// Takes the directory of an instance away that ended while no agent looked.
    fn forget_leftover(&self, member: &mut Member) {
        if let Some(id) = member.leftover.take()
            && let Err(error) = containers::remove(&self.around.dirs, &id)
        {
            log::warn!("{id}: {}", super::chain(&error));
        }
    }

    /// Stops and removes everything of a set; what goes wrong is logged, the rest is done all the same.
    fn take_down(&self, mut live: Live) {
        let stopped = self.stop_members(&mut live);
        self.remove(stopped);
        for member in &live.members {
            self.keep_identity(member);
            if let Err(error) = mounts::unmount_overlay(&member.mount) {
                log::warn!("{}: {}", self.name, super::chain(&error));
            }
        }
    }
}

/// What is called when a container ends. An end that nobody asked for is said on the console.
#[must_use]
pub(super) fn on_end(events: &Sender) -> OnEnd {
    let events = events.clone();
    Arc::new(move |instance: &str, record| {
        if !record.asked {
            log::warn!("container {instance} ended: {}", exit_text(&record.status));
        }
        events.send(Event::Ended { instance: instance.to_owned(), exit: record.status });
    })
}

/// A record of a member that was just started.
#[must_use]
pub(super) fn record(member: &Member, instance: &str, pid: Option<u32>) -> ContainerRecord {
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
        notes: member.handle.as_ref().map(|handle| handle.notes().to_vec()).unwrap_or_default(),
    }
}

/// What runs, as the state machine knows it.
#[must_use]
pub(super) fn deployment(
    live: &Live,
    containers: Vec<ContainerRecord>,
    last_roll: Option<RollReport>,
) -> Deployment {
    Deployment {
        set: live.set.clone(),
        digest: live.pulled.digest,
        mode: live.pulled.set.mode,
        containers,
        last_roll,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blackout_is_the_longest_gap_of_containers_that_were_there_before() {
        let at = |name: &str, ns| (name.parse::<Name>().expect("name"), ns);
        let ends = [at("a", 1_000_000), at("b", 2_000_000)];
        assert_eq!(
            blackout_us(&ends, &[at("a", 4_000_000), at("b", 3_000_000), at("c", 9)]),
            Some(3000)
        );
        assert_eq!(blackout_us(&[], &[at("a", 1)]), None);
    }
}
