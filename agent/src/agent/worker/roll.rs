//! The part of a set's worker that takes the node from one version to the next, and back. In which order: [`super::order`].

use std::thread;
use std::time::Duration;

use protocol::ids::Name;
use protocol::imageset::Mode;
use protocol::node::{ContainerState, ExitStatus, RollReport};

use super::cut::{all_at_once, blackout_us};
use super::order::{self, Step};
use super::{Live, Member, Stopped, Worker, deployment, millis, record, uptime};
use crate::agent::event::Event;
use crate::agent::faults;
use crate::agent::readiness::{NotReady, Readiness};
use crate::agent::set::{ContainerRecord, CutOverFailure, Deployment, Started, exit_text};
use crate::containers::Handle;

/// Stack of a thread that waits for old instances to end.
const DRAIN_STACK: usize = 128 << 10;

/// What a cut-over has done so far.
#[derive(Default)]
struct Cut {
    /// Old instances that have ended and are still to be removed.
    stopped: Vec<Stopped>,
    /// When containers of the old version ended, nanoseconds; for those that ran on, when their successors were ready.
    ends: Vec<(Name, u64)>,
    /// When containers of the new version were executed.
    starts: Vec<(Name, u64)>,
    /// The old version's containers that run until their successors are ready.
    drained: Vec<Name>,
}

impl Worker {
    /// Takes the node from what runs to what is staged; what ran is kept with its mounts. When that fails, what ran runs again.
    pub(super) fn cut_over(
        &mut self,
        decided: Duration,
    ) -> Result<Box<Deployment>, Box<CutOverFailure>> {
        let Some(mut live) = self.incoming.take() else {
            let reason = "nothing is staged".to_owned();
            return Err(Box::new(CutOverFailure { reason, running: None, report: None }));
        };
        if live.pulled.set.mode == Mode::Pivot {
            return self.pivot(live, decided);
        }
        let mut old = self.running.take();
        let before = old.as_ref().map_or(Vec::new(), Live::containers);
        let mut cut = Cut::default();
        let mut result = Ok(());
        for step in order::cut_over(&live.containers(), &before) {
            result = self.step(&step, &mut live, old.as_mut(), &mut cut);
            if result.is_err() {
                break;
            }
        }
        faults::reach("released");
        let report = RollReport {
            blackout_us: blackout_us(&cut.blackout_ends(), &cut.starts),
            ..report(&live, old.as_ref(), decided)
        };
        let outcome = match result {
            Ok(()) => {
                let records = self.records(&live, &cut.ends);
                let deployment = deployment(&live, records, Some(report));
                if let Some(old) = &mut old {
                    old.let_go(&live.sockets());
                }
                self.keep(old);
                live.kept = false;
                self.running = Some(live);
                Ok(Box::new(deployment))
            }
            Err(reason) => {
                let running = self.return_to(old, live);
                Err(Box::new(CutOverFailure { reason, running, report: Some(report) }))
            }
        };
        self.remove(cut.stopped);
        outcome
    }

    fn step(
        &mut self,
        step: &Step,
        live: &mut Live,
        old: Option<&mut Live>,
        cut: &mut Cut,
    ) -> Result<(), String> {
        match (step, old) {
            (Step::Stop(names), Some(old)) => {
                let stopped = self.stop_these(old, names);
                faults::reach("old-stopped");
                let end = |it: &Stopped| Some((it.name.clone(), it.ended_at_ns?));
                cut.ends.extend(stopped.iter().filter_map(end));
                cut.stopped.extend(stopped);
                Ok(())
            }
            (Step::Drain(names), Some(old)) => {
                self.drain(old, names);
                let ready = |name: &Name| Some((name.clone(), self.ready_at_ns(live, name)?));
                cut.ends.extend(names.iter().filter_map(ready));
                cut.drained.extend(names.iter().cloned());
                Ok(())
            }
            (Step::Stop(_) | Step::Drain(_), None) => Ok(()),
            (Step::Release(names), _) => self.release(live, names, &mut cut.starts),
            (Step::Await(names), _) => {
                faults::reach("waiting");
                self.wait_for(live, names)
            }
        }
    }

    /// Opens these exec barriers, all at once, and notes when their programs were executed (nanoseconds).
    fn release(
        &self,
        live: &mut Live,
        names: &[Name],
        starts: &mut Vec<(Name, u64)>,
    ) -> Result<(), String> {
        let members = live.members.iter().filter(|it| names.contains(&it.container.name));
        let handles = members
            .filter_map(|it| it.handle.clone().map(|handle| (it.container.name.clone(), handle)));
        for (name, _, released) in all_at_once(handles.collect(), Handle::release) {
            let released = released
                .map_err(|error| format!("container {name}: {}", crate::agent::chain(&error)))?;
            starts.push((name.clone(), released.exec_at_ns));
            if let Some(member) = live.members.iter_mut().find(|it| it.container.name == name) {
                self.attend(member, released.exec_at_ns);
            }
        }
        Ok(())
    }

    /// Waits until these are ready and well.
    fn wait_for(&self, live: &Live, names: &[Name]) -> Result<(), String> {
        for member in live.members.iter().filter(|it| names.contains(&it.container.name)) {
            let (name, Some(handle)) = (&member.container.name, &member.handle) else { continue };
            let text = format!("waiting for container {name} to be ready");
            self.around.events.send(Event::Progress(self.name.clone(), text));
            let waited = self.around.board.wait(&handle.spec().id);
            waited.map_err(|why| match why {
                NotReady::Ended(exit) => format!("container {name} ended: {}", exit_text(&exit)),
                NotReady::Unhealthy(why) => format!("container {name} is unhealthy: {why}"),
                NotReady::Late(within) => {
                    format!("container {name} is not ready after {} s", within.as_secs_f32())
                }
            })?;
        }
        Ok(())
    }

    fn ready_at_ns(&self, live: &Live, name: &Name) -> Option<u64> {
        let member = live.members.iter().find(|it| it.container.name == *name)?;
        let id = &member.handle.as_ref()?.spec().id;
        self.around.board.readiness(id)?.ready_at_ns()
    }

    /// Asks old instances to end; a thread of its own waits for that, so that nobody else does.
    fn drain(&mut self, old: &mut Live, names: &[Name]) {
        let members = old.members.iter_mut().filter(|it| names.contains(&it.container.name));
        let handles: Vec<Handle> = members.filter_map(|member| member.handle.take()).collect();
        let around = self.around.clone();
        let work = move || {
            for handle in handles {
                around.forget(&handle.spec().id);
                for result in [handle.stop().map(drop), handle.remove()] {
                    if let Err(error) = result {
                        log::warn!("{}: {}", handle.spec().id, crate::agent::chain(&error));
                    }
                }
            }
        };
        let builder = thread::Builder::new().name("drain".to_owned()).stack_size(DRAIN_STACK);
        match builder.spawn(work) {
            Ok(thread) => self.draining.push(thread),
            Err(error) => log::error!("{}: no thread to end the old set: {error}", self.name),
        }
    }

    /// Waits until old instances that were asked to end have done so, or were killed after their time.
    pub(super) fn finish_draining(&mut self) {
        for thread in self.draining.drain(..) {
            if thread.join().is_err() {
                log::error!("{}: ending the old set failed", self.name);
            }
        }
    }

    /// Keeps a set whose processes have ended, with its mounts.
    fn keep(&mut self, old: Option<Live>) {
        let mut old = old;
        if let Some(old) = &mut old {
            let stopped = self.stop_members(old);
            self.remove(stopped);
        }
        if let Some(older) = std::mem::replace(&mut self.kept, old) {
            self.take_down(older);
        }
    }

    /// Stops what runs and starts the kept set again.
    pub(super) fn go_back(&mut self, reason: String) -> CutOverFailure {
        let old = self.kept.take();
        let running = match self.running.take() {
            Some(new) => self.return_to(old, new),
            None => None,
        };
        CutOverFailure { reason, running, report: None }
    }

    /// Ends a new version and brings the old one back: what still runs of it goes on, the rest is created first, so that held
    /// sockets pass from one to the other, and released when the new has ended. What does not start now is tried again like any
    /// container.
    pub(super) fn return_to(&mut self, old: Option<Live>, mut new: Live) -> Option<Deployment> {
        let Some(mut old) = old else {
            self.take_down(new);
            return None;
        };
        faults::reach("going-back");
        let sockets = new.sockets();
        old.members.iter_mut().filter(|it| it.handle.is_none()).for_each(|member| {
            member.sockets = [&member.sockets, &sockets].into_iter().collect();
        });
        let created: Vec<(Name, Result<(), String>)> = (0..old.members.len())
            .filter(|index| old.members.get(*index).is_some_and(|it| it.handle.is_none()))
            .collect::<Vec<_>>()
            .into_iter()
            .filter_map(|index| {
                let handle = self.create(&mut old, index);
                let member = old.members.get_mut(index)?;
                let result = handle.map(|handle| member.handle = Some(handle));
                Some((member.container.name.clone(), result))
            })
            .collect();
        let stopped = self.stop_members(&mut new);
        faults::reach("new-stopped");
        let failed = self.start_again(&mut old, created);
        self.remove(stopped);
        new.let_go(&old.sockets());
        self.take_down(new);
        let records = self.records(&old, &[]).into_iter().map(|record| {
            match failed.iter().find(|(name, _)| *name == record.name) {
                Some((_, reason)) => due(record, reason),
                None => record,
            }
        });
        let deployment = deployment(&old, records.collect(), None);
        self.running = Some(old);
        Some(deployment)
    }

    /// Releases the created ones of a set in their order; returns those that do not run, and why.
    fn start_again(
        &self,
        old: &mut Live,
        created: Vec<(Name, Result<(), String>)>,
    ) -> Vec<(Name, String)> {
        let mut failed = Vec::new();
        let mut names = Vec::new();
        for (name, result) in created {
            match result {
                Ok(()) => names.push(name),
                Err(reason) => failed.push((name, reason)),
            }
        }
        for step in order::cut_over(&old.containers(), &[]) {
            let (Step::Release(some) | Step::Await(some)) = &step else { continue };
            for name in some.iter().filter(|name| names.contains(name)) {
                let one = std::slice::from_ref(name);
                let done = match step {
                    Step::Release(_) => self.release(old, one, &mut Vec::new()),
                    _ => self.wait_for(old, one),
                };
                if let Err(reason) = done {
                    log::error!("{}.{name}: going back: {reason}", self.name);
                    if matches!(step, Step::Release(_)) {
                        failed.push((name.clone(), reason));
                    }
                }
            }
        }
        failed
    }

    /// A record of every member, with what the board knows of it.
    fn records(&self, live: &Live, ends: &[(Name, u64)]) -> Vec<ContainerRecord> {
        let one = |member: &Member| {
            let id = member.handle.as_ref().map_or("", |handle| handle.spec().id.as_str());
            let mut record = record(member, id, member.handle.as_ref().map(Handle::pid));
            if let Some(readiness) = self.around.board.readiness(id) {
                record.readiness = readiness;
            }
            let end = ends.iter().find(|(name, _)| *name == record.name);
            record.replaced_at_ns = end.map(|(_, at)| *at);
            record
        };
        live.members.iter().map(one).collect()
    }

    /// A member's program was executed: notes that on the board, and has its health watched.
    pub(super) fn attend(&self, member: &mut Member, exec_at_ns: u64) {
        let Some(handle) = &member.handle else { return };
        let readiness = Readiness::of(&member.container).begun(exec_at_ns);
        self.around.attend(handle, &member.container, readiness);
    }

    /// Lets a created member run.
    pub(super) fn begin(&self, member: &mut Member) -> Result<Started, String> {
        let handle = member.handle.clone().ok_or("it was not created")?;
        let released = handle.release().map_err(|error| crate::agent::chain(&error))?;
        self.attend(member, released.exec_at_ns);
        Ok(Started {
            instance: handle.spec().id.clone(),
            pid: released.pid,
            exec_at_ns: released.exec_at_ns,
        })
    }
}

impl Cut {
    /// When the old ones stopped serving: those that drain never did.
    fn blackout_ends(&self) -> Vec<(Name, u64)> {
        let end = |(name, at): &(Name, u64)| {
            let start = self.starts.iter().find(|(started, _)| started == name);
            let drained = self.drained.contains(name);
            (name.clone(), start.filter(|_| drained).map_or(*at, |(_, start)| *start))
        };
        self.ends.iter().map(end).collect()
    }
}

/// What a roll cost until its cut-over.
pub(super) fn report(live: &Live, old: Option<&Live>, decided: Duration) -> RollReport {
    RollReport {
        from: old.map(|old| old.pulled.digest),
        to: live.pulled.digest,
        bytes: live.pulled.bytes,
        staging_ms: millis(live.staged.saturating_sub(decided)),
        blackout_us: None,
        ready_us: None,
        outcome: None,
        reason: None,
    }
}

/// The record of a container that could not be started and is to be tried again at once.
fn due(record: ContainerRecord, reason: &str) -> ContainerRecord {
    ContainerRecord {
        state: ContainerState::Dead,
        pid: None,
        exit: Some(ExitStatus { code: None, signal: None, error: Some(reason.to_owned()) }),
        restart_at: Some(uptime()),
        ..record
    }
}
