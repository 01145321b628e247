//! The part of the agent's loop that lets a set's state machine take events and does what it asks for. It decides nothing.

use protocol::ids::Name;
use protocol::node::Phase;

use super::event::Event;
use super::set::{self, Commitment, Content, SetAction, SetEvent};
use super::worker::{Job, uptime};
use super::{Agent, backoff, busy, faults, send, start};

impl Agent {
    /// Lets the machine of a set take an event, writes down where it stands, and does what it asks for: a crash at any moment
    /// finds on disk what is about to be.
    pub(super) fn step(&mut self, name: &Name, event: SetEvent) {
        let Some(slot) = self.sets.get_mut(name) else { return };
        let actions = slot.machine.handle(event, uptime(), backoff::jitter());
        let note = slot.machine.note();
        self.note(name, note);
        for action in actions {
            log::debug!("{name}: {action:?}");
            self.act(name, action);
        }
        if self.sets.get(name).is_some_and(|slot| slot.machine.is_spent()) {
            self.sets.remove(name);
        }
    }

    pub(super) fn note(&mut self, name: &Name, note: Option<Commitment>) {
        if self.notes.commitments.get(name) == note.as_ref() {
            return;
        }
        let step = note.as_ref().map_or("kept-dropped", Commitment::step);
        match note {
            Some(note) => drop(self.notes.commitments.insert(name.clone(), note)),
            None => drop(self.notes.commitments.remove(name)),
        }
        self.notes_file.save(&self.notes);
        faults::reach(step);
    }

    pub(super) fn act(&mut self, name: &Name, action: SetAction) {
        let Some(slot) = self.sets.get_mut(name) else { return };
        match action {
            SetAction::Pull(set) => {
                slot.decided = uptime();
                log::info!("{name}: pulling {}", set.reference);
                self.pulls.start(name, set.reference, &self.around.events);
                self.mark(Phase::Pulling);
            }
            SetAction::CancelPull => self.pulls.cancel(name),
            SetAction::Stage(set) => match slot.pulled.take() {
                Some(pulled) => send(&slot.worker, name, Job::Stage(set, pulled)),
                None => self
                    .around
                    .events
                    .send(Event::Staged(name.clone(), Err("nothing was pulled".to_owned()))),
            },
            SetAction::StageKept(set) => {
                slot.decided = uptime();
                log::info!("{name}: version {} is kept here", set.version);
                send(&slot.worker, name, Job::StageKept(set));
            }
            SetAction::Discard => send(&slot.worker, name, Job::Discard),
            SetAction::AskBusy => {
                let name = name.clone();
                self.ask_busy(move |why| Event::Busy(name, why));
            }
            SetAction::CutOver(_) => {
                let decided = slot.decided;
                send(&slot.worker, name, Job::CutOver { decided });
            }
            SetAction::GoBack(reason) => {
                log::error!("{name}: going back: {reason}");
                send(&slot.worker, name, Job::GoBack(reason));
            }
            SetAction::DropKept => send(&slot.worker, name, Job::DropKept),
            SetAction::Restart { container, restarts } => {
                log::warn!("{name}.{container}: starting it again ({restarts})");
                send(&slot.worker, name, Job::Restart(container, restarts));
            }
            SetAction::Rename(set) => {
                log::info!("{name}: version {} is what runs already", set.version);
                send(&slot.worker, name, Job::Rename(set));
            }
            SetAction::Stop => send(&slot.worker, name, Job::Stop),
        }
    }

    /// Finds out whether the node may be disturbed: what the operator says, then what a program of the site says.
    pub(super) fn ask_busy(&self, answer: impl FnOnce(Option<String>) -> Event + Send + 'static) {
        let said = self.notes.desired.as_ref().and_then(|desired| desired.busy.clone());
        let events = self.around.events.clone();
        if said.is_some() || !self.busy_program.exists() {
            return events.send(answer(said));
        }
        let program = self.busy_program.clone();
        start::thread("busy", move || events.send(answer(busy::ask(&program))));
    }

    pub(super) fn pulled(
        &mut self,
        name: &Name,
        result: Result<Box<crate::pull::PulledSet>, String>,
    ) {
        self.pulls.ended(name);
        if let Err(why) = &result {
            log::warn!("{name}: {why}");
        }
        let outcome = match (result, self.sets.get_mut(name)) {
            (Ok(pulled), Some(slot)) => {
                let content = content(&pulled);
                slot.pulled = Some(pulled);
                Ok(content)
            }
            (Ok(pulled), None) => Ok(content(&pulled)),
            (Err(why), _) => Err(why),
        };
        faults::reach("pulled");
        self.step(name, SetEvent::Pulled(outcome));
        // Staging has taken it. What is still here is no longer wanted.
        if let Some(slot) = self.sets.get_mut(name) {
            slot.pulled = None;
        }
    }

    pub(super) fn cut_over(
        &mut self,
        name: &Name,
        result: Result<Box<set::Deployment>, Box<set::CutOverFailure>>,
    ) {
        match &result {
            Ok(deployment) => {
                self.mark(Phase::Running);
                let (version, digest) = (&deployment.set.version, deployment.digest.short());
                log::info!("{name}: runs version {version} ({digest})");
            }
            Err(failure) => log::error!("{name}: {}", failure.reason),
        }
        self.step(name, SetEvent::CutOver(result));
        self.collect_garbage();
    }
}

fn content(pulled: &crate::pull::PulledSet) -> Content {
    Content { digest: pulled.digest, mode: pulled.set.mode, bytes: pulled.bytes }
}
