//! The hands of one ImageSet: a thread that mounts, creates, releases and stops its containers, one job after another.
//!
//! What to do is decided by [`super::set`]; this only does it and says how it went. Three sets are held at most: the one that
//! runs, the one that is staged to follow it, and the one that ran before, kept with its mounts.

mod cut;
mod keeping;
mod live;
mod order;
mod pivot;
mod restart;
mod roll;
mod room;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use protocol::ids::Name;
use protocol::imageset::{Container, Mode};
use protocol::node::DesiredSet;
use rustix::time::{ClockId, clock_gettime};

use self::cut::all_at_once;
pub(super) use self::live::{Live, Member, deployment, mount_dir, record};
use super::Sender;
use super::event::Event;
use super::faults;
use super::readiness::{Board, Readiness};
use super::set::exit_text;
use crate::containers::sockets::obtain;
use crate::containers::{self, Handle, HeldSockets, NodeFacts, OnEnd, Place, Spec, keep};
use crate::health::Watcher;
use crate::init::control::Control;
use crate::mounts;
use crate::paths::RunDirs;
use crate::pull::PulledSet;

/// A job for the worker of a set.
#[derive(Debug)]
pub(super) enum Job {
    /// Mount every image and bring every container to its exec barrier.
    Stage(DesiredSet, Box<PulledSet>),
    /// Bring every container of the kept set to its exec barrier, in the mounts that it has.
    StageKept(DesiredSet),
    /// Throw away what was staged; the kept set is kept again.
    Discard,
    /// Stop the old, release the new, keep the old.
    CutOver {
        /// When the decision for this version was taken, on CLOCK_BOOTTIME.
        decided: Duration,
    },
    /// Stop what runs, start the kept set again; why.
    GoBack(String),
    /// Take down the kept set.
    DropKept,
    /// Start a container again.
    Restart(Name, u32),
    /// What runs is known under another name now.
    Rename(DesiredSet),
    /// Stop everything.
    Stop,
    /// Stop everything and tell when it is done; the worker ends.
    Terminate(mpsc::Sender<()>),
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
    /// Where it stands which containers are ready.
    pub board: Arc<Board>,
    /// Who asks containers how they are.
    pub health: Watcher,
}

impl Surroundings {
    /// A program was executed: it is on the board from now on, and whoever there is to ask is asked.
    pub(super) fn attend(&self, handle: &Handle, container: &Container, readiness: Readiness) {
        let asked = readiness.is_asked();
        self.board.begin(&handle.spec().id, readiness);
        if asked {
            self.health.watch(handle, container.health.as_ref());
        }
    }

    /// Nobody wants to know any more how this instance is.
    pub(super) fn forget(&self, instance: &str) {
        self.board.forget(instance);
        self.health.forget(instance);
    }
}

/// The worker.
#[derive(Debug)]
pub(super) struct Worker {
    name: Name,
    around: Surroundings,
    incoming: Option<Live>,
    running: Option<Live>,
    kept: Option<Live>,
    /// Old instances that were asked to end and have not yet.
    draining: Vec<JoinHandle<()>>,
}

/// Time since the kernel started, suspend included (CLOCK_BOOTTIME).
#[must_use]
pub(super) fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

impl Worker {
    /// Starts the thread; `running` and `kept` are what an earlier agent left behind. Jobs go into the returned channel.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn start(
        name: Name,
        around: Surroundings,
        running: Option<Live>,
        kept: Option<Live>,
    ) -> std::io::Result<mpsc::Sender<Job>> {
        let (jobs, inbox) = mpsc::channel();
        let draining = Vec::new();
        let mut worker =
            Self { name: name.clone(), around, incoming: None, running, kept, draining };
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
            Job::StageKept(set) => {
                let result = self.stage_kept(set);
                self.around.events.send(Event::Staged(name, result));
            }
            Job::Discard => self.discard(),
            Job::DropKept => {
                if let Some(live) = self.kept.take() {
                    self.take_down(live);
                }
            }
            Job::CutOver { decided } => {
                let result = self.cut_over(decided);
                self.around.events.send(Event::CutOver(name, result));
            }
            Job::GoBack(reason) => {
                let failure = self.go_back(reason);
                self.around.events.send(Event::CutOver(name, Err(Box::new(failure))));
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
        let all = [self.incoming.take(), running, self.kept.take()];
        for live in all.into_iter().flatten() {
            self.take_down(live);
        }
    }

    /// Mounts and creates; what was begun is undone when something fails.
    fn stage(&mut self, set: DesiredSet, pulled: PulledSet) -> Result<(), String> {
        self.discard();
        let mut live = Live::new(set, pulled);
        if let Some(old) = &self.running {
            room::check(old, &live, &self.around.dirs)?;
        }
        faults::reach("staging");
        let result = match live.pulled.set.mode {
            Mode::Contain => self.stage_containers(&mut live),
            Mode::Pivot => self.stage_pivot(&mut live),
        };
        live.staged = uptime();
        faults::reach("staged");
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

    /// Creates the containers of the kept set in the mounts that were held for it.
    fn stage_kept(&mut self, set: DesiredSet) -> Result<(), String> {
        self.discard();
        let mut live = self.kept.take().ok_or("no set is kept")?;
        live.set = set;
        live.kept = true;
        // Nothing was fetched for it this time.
        live.pulled.bytes = 0;
        live.inherit(&self.sockets_before());
        let result = self.create_missing(&mut live);
        live.staged = uptime();
        self.incoming = Some(live);
        if result.is_err() {
            self.discard();
        }
        result
    }

    /// Creates an instance of every member that has none.
    fn create_missing(&self, live: &mut Live) -> Result<(), String> {
        for index in 0..live.members.len() {
            let missing = live.members.get(index).is_some_and(|member| member.handle.is_none());
            if missing {
                let handle = self.create(live, index)?;
                if let Some(member) = live.members.get_mut(index) {
                    member.handle = Some(handle);
                }
            }
        }
        Ok(())
    }

    /// Throws away what is staged; a kept set is kept again.
    fn discard(&mut self) {
        match self.incoming.take() {
            Some(mut live) if live.kept && self.kept.is_none() => {
                let stopped = self.stop_members(&mut live);
                self.remove(stopped);
                self.kept = Some(live);
            }
            Some(live) => self.take_down(live),
            None => {}
        }
    }

    fn stage_containers(&self, live: &mut Live) -> Result<(), String> {
        for container in live.pulled.set.containers.clone() {
            let mount = self.mount(&live.pulled, &container.name, &container.image)?;
            let mut member = Member::new(container, mount);
            member.sockets = self.sockets_before();
            live.members.push(member);
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
        let mounted = if pulled.set.containers.iter().any(own_users) {
            let base = containers::view::id_base(&self.name, container);
            let mapped = |layers: &[PathBuf]| containers::idmap::mount_overlay(layers, &dir, base);
            mounts::mount_image_by(&image.root, &dir, mapped)
        } else {
            mounts::mount_image(&image.root, &dir)
        };
        mounted.map_err(|error| super::chain(&error))?;
        Ok(dir)
    }

    /// Every held socket of what runs: whichever container listens there next gets the very same.
    fn sockets_before(&self) -> HeldSockets {
        self.running.as_ref().map(Live::sockets).unwrap_or_default()
    }

    /// Creates an instance of a member, held at its exec barrier, with its held sockets. Its root is mounted again should it
    /// not be.
    fn create(&self, live: &mut Live, index: usize) -> Result<Handle, String> {
        let member = live.members.get_mut(index).ok_or("no such member")?;
        member.sockets = obtain(&member.container.sockets, &member.sockets).map_err(|error| {
            format!("container {}: {}", member.container.name, super::chain(&error))
        })?;
        let member = live.members.get(index).ok_or("no such member")?;
        if !mounts::is_mounted(&member.mount) {
            self.mount(&live.pulled, &member.container.name, &member.container.image)?;
        }
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
        let (dirs, sockets) = (&self.around.dirs, &member.sockets);
        containers::create(dirs, &spec, sockets, on_end(&self.around)).map_err(|error| {
            format!("container {}: {}", member.container.name, super::chain(&error))
        })
    }

    /// Stops every instance of a set, the last of its start order first, and returns as soon as all are dead: what is still
    /// to be removed.
    fn stop_members(&self, live: &mut Live) -> Vec<Stopped> {
        let order = order::stop(&live.containers());
        order.into_iter().flat_map(|names| self.stop_these(live, &names)).collect()
    }

    /// Stops these instances, all at once, and returns as soon as all are dead: the instances that ended, which are still to
    /// be removed, and when (nanoseconds, the containers' clock).
    fn stop_these(&self, live: &mut Live, names: &[Name]) -> Vec<Stopped> {
        let members = live.members.iter_mut().filter(|it| names.contains(&it.container.name));
        let handles = members.filter_map(|member| {
            self.forget_leftover(member);
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
            self.around.forget(&handle.spec().id);
            if let Err(error) = handle.remove() {
                log::warn!("{}.{name}: {}", self.name, super::chain(&error));
            }
        }
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
    fn take_down(&mut self, mut live: Live) {
        self.finish_draining();
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
pub(super) fn on_end(around: &Surroundings) -> OnEnd {
    let (events, board) = (around.events.clone(), Arc::clone(&around.board));
    Arc::new(move |instance: &str, record| {
        if !record.asked {
            log::warn!("container {instance} ended: {}", exit_text(&record.status));
        }
        board.ended(instance, &record.status);
        events.send(Event::Ended { instance: instance.to_owned(), exit: record.status });
    })
}

/// Bytes of memory that are available on this machine.
#[must_use]
pub(super) fn available_memory() -> Option<u64> {
    room::available(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
