//! The agent: one loop over one closed set of events, and nothing else changes its state.
//!
//! ```text
//! network ─┐                                   ┌─▶ set workers (mount, create, release, stop)
//! server ──┼─▶ Event ─▶ loop ─▶ SetMachine ────┼─▶ pulls (one thread a set)
//! workers ─┘            │       (decides)      └─▶ PID 1 (power, pivot)
//!                       └─▶ report ─▶ outbox ─▶ server
//! ```
//!
//! It holds nothing a container needs: it may die, or be replaced, at any moment. What a new agent must know stands in
//! `state/` and in the containers' own directories.

mod adopt;
mod backoff;
mod busy;
mod console;
mod event;
mod faults;
mod given;
mod layer0;
mod notes;
mod pulls;
mod readiness;
mod report;
mod screen;
mod server_link;
mod set;
mod start;
mod steps;
mod usage;
mod vital;
mod worker;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use protocol::ids::{Name, NodeId};
use protocol::node::{Desired, DesiredSet, ObservedClock, Phase, PhaseMark, PowerAction};

use self::console::Console;
use self::event::Event;
use self::notes::{Notes, NotesFile};
use self::pulls::Pulls;
use self::report::Facts;
use self::server_link::{Outbox, ServerLink};
use self::set::{Commitment, SetEvent, SetMachine};
use self::usage::Usages;
use self::vital::Vital;
use self::worker::{Job, Surroundings, Worker, uptime};
use crate::channel::Channels;
use crate::init::control::{Control, Request};
use crate::network::NetworkEvent;
use crate::time::Clock;

pub use self::start::run;

/// Longest that the loop sleeps without an event: progress of a pull is reported at this pace.
const PROGRESS_PACE: Duration = Duration::from_millis(500);
/// How often memory is looked at while a set is kept staged that is given up when it is short.
const PRESSURE_PACE: Duration = Duration::from_secs(10);
/// Available memory below which it is short.
const SHORT_OF_MEMORY: u64 = 32 << 20;
/// What the sets get to stop in when the node goes down; PID 1 waits a little longer.
const STOP_PATIENCE: Duration = Duration::from_secs(9);

/// The way into the agent's loop.
#[derive(Debug, Clone)]
pub struct Sender(mpsc::Sender<Event>);

impl Sender {
    /// Sends an event. When the loop has ended there is nobody to tell, and nothing left to do.
    pub fn send(&self, event: Event) {
        if self.0.send(event).is_err() {
            log::debug!("an event came after the agent's loop ended");
        }
    }
}

/// An error with its causes, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// A set on this node: what decides, and what does.
#[derive(Debug)]
struct SetSlot {
    machine: SetMachine,
    worker: mpsc::Sender<Job>,
    /// When the target under way was decided on.
    decided: Duration,
    /// What was pulled and is not staged yet.
    pulled: Option<Box<crate::pull::PulledSet>>,
}

/// The agent's state.
#[derive(Debug)]
struct Agent {
    facts: Facts,
    notes: Notes,
    notes_file: NotesFile,
    around: Surroundings,
    pulls: Pulls,
    outbox: Outbox,
    sets: BTreeMap<Name, SetSlot>,
    /// The program that says whether the node is busy.
    busy_program: PathBuf,
    /// When memory was last looked at.
    looked: Duration,
    /// How to reach the server, until the link is started.
    link: Option<start::LinkPlan>,
    /// The link is started.
    reports: bool,
    network_waiting: Option<String>,
    server_waiting: Option<String>,
    clock_keeper: Option<Clock>,
    clock: Option<ObservedClock>,
    /// Standing when a power request was obeyed.
    power_done: bool,
    standalone: bool,
    status: String,
    screen: Console,
    /// The boot servers, as the screen has them.
    servers: String,
    usage: Usages,
    /// Absent outside of Layer0.
    layer0: Option<layer0::act::Layer0>,
    vital: Vital,
}

impl Agent {
    /// Takes events until asked to end.
    fn run(&mut self, inbox: &mpsc::Receiver<Event>) {
        if let Some(Err(error)) = self.around.init.as_ref().map(|init| init.call(&Request::Steady))
        {
            log::debug!("steady: {}", chain(&error));
        }
        loop {
            // What has come already belongs to the same picture: only the last of it is told.
            for event in inbox.try_iter() {
                match event {
                    Event::Terminate => return self.terminate(),
                    event => self.take(event),
                }
            }
            // Looked at first: what has changed until the report is in it.
            let writing = self.pulls.puller().cache().is_busy();
            self.publish();
            self.vital.loop_waits();
            let event = match self.patience(writing) {
                Some(patience) => inbox.recv_timeout(patience),
                None => inbox.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            };
            self.vital.loop_turns();
            match event {
                Ok(Event::Terminate) => return self.terminate(),
                Ok(event) => self.take(event),
                Err(mpsc::RecvTimeoutError::Timeout) => self.tick(),
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// How long the loop may sleep; None: until the next event.
    fn patience(&self, writing: bool) -> Option<Duration> {
        let now = uptime();
        let layer0 = self.layer0.as_ref().and_then(|layer0| layer0.machine.deadline());
        let sets = self.sets.values().filter_map(|slot| slot.machine.deadline());
        let deadline = sets.chain(layer0).min();
        let pulling = (self.pulls.any() || writing).then_some(PROGRESS_PACE);
        let keeps = self.sets.values().any(|slot| slot.machine.keeps());
        let looking = keeps.then_some((self.looked + PRESSURE_PACE).saturating_sub(now));
        // Nobody else gives signs of life until there are reports.
        let alone = (!self.reports).then_some(vital::PACE);
        let due = deadline.into_iter().chain(self.screen.deadline());
        let due = due.map(|at| at.saturating_sub(now));
        due.chain(pulling).chain(looking).chain(alone).min()
    }

    fn take(&mut self, event: Event) {
        log::debug!("{event}");
        match event {
            Event::Network(event) => self.network(event),
            Event::Desired(desired) => self.desired(*desired),
            Event::ServerReachable => {
                self.server_waiting = None;
                self.mark(Phase::Agent);
            }
            Event::ServerUnreachable(why) => {
                self.server_waiting = Some(report::with_clock(why, self.clock.as_ref()));
            }
            Event::Clock(state) => self.clock = Some(state),
            Event::Pulled(name, result) => self.pulled(&name, result),
            Event::Staged(name, result) => {
                if result.is_ok() {
                    self.mark(Phase::Staged);
                }
                self.step(&name, SetEvent::Staged(result));
            }
            Event::Busy(name, why) => self.step(&name, SetEvent::Busy(why)),
            Event::Layer0(event) => self.with_layer0(|it| it.handle(event, uptime())),
            Event::Progress(name, what) => self.step(&name, SetEvent::Progress(what)),
            Event::CutOver(name, result) => self.cut_over(&name, result),
            Event::Restarted { set, container, result } => {
                self.step(&set, SetEvent::Restarted { container, result });
            }
            Event::Stopped(name) => {
                self.step(&name, SetEvent::Stopped);
                self.collect_garbage();
            }
            Event::Ended { instance, exit } => {
                self.tell_all(|| SetEvent::Ended { instance: instance.clone(), exit: exit.clone() })
            }
            Event::Word { instance, word, at_ns } => self.tell_all(|| SetEvent::Word {
                instance: instance.clone(),
                word: word.clone(),
                at_ns,
            }),
            // What it says goes with the next report, which is written now.
            Event::Hardware | Event::Terminate => {}
        }
    }

    fn network(&mut self, event: NetworkEvent) {
        match event {
            NetworkEvent::Configured { link, mac, addresses, ntp, .. } => {
                self.network_waiting = None;
                let text: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                log::info!("{link}: {}", text.join(", "));
                self.facts.link(&link, mac, addresses);
                self.tell_facts();
                self.look_after_clock(ntp);
                self.connect(mac);
            }
            NetworkEvent::Waiting(why) => {
                if self.facts.links.iter().all(|link| link.addresses.is_empty()) {
                    self.network_waiting = Some(why);
                }
            }
            NetworkEvent::LinkWaits { link, mac, why } => {
                self.facts.link_waits(&link, mac, why);
                self.tell_facts();
            }
            NetworkEvent::Lost { link, .. } => {
                log::warn!("{link}: address lost");
                self.facts.lost(&link);
            }
            NetworkEvent::Gone(link) => self.facts.gone(&link),
            NetworkEvent::LinkUp { link, .. } => {
                if self.facts.links.iter().all(|link| link.addresses.is_empty()) {
                    self.network_waiting = Some(format!("{link}: no address yet"));
                }
            }
        }
    }

    /// Lets these servers, or else the boot server, say what time it is. A standalone agent leaves its host's clock alone.
    fn look_after_clock(&mut self, servers: Vec<std::net::IpAddr>) {
        if let Some(keeper) = &self.clock_keeper {
            return keeper.set_servers(servers);
        }
        let Some(plan) = self.link.as_ref().filter(|_| !self.standalone) else { return };
        let events = self.around.events.clone();
        let told = move |state| events.send(Event::Clock(state));
        match Clock::start(servers, plan.servers.clone(), plan.transport.clone(), told) {
            Ok(keeper) => self.clock_keeper = Some(keeper),
            Err(error) => log::error!("no thread for the clock: {error}"),
        }
    }

    /// Starts what needed an address: the link to the server, or the set of the command line.
    fn connect(&mut self, mac: protocol::ids::Mac) {
        let Some(plan) = self.link.take() else { return };
        let node = plan.node.unwrap_or_else(|| NodeId::from_mac(mac));
        self.facts.node = Some(node.clone());
        self.around.hostname = node.to_string();
        self.tell_facts();
        if let Some(reference) = plan.imageset {
            self.desired(start::desired_of_reference(&node, reference));
        }
        if plan.servers.is_empty() {
            return;
        }
        self.server_waiting = Some("boot server: no answer yet".to_owned());
        let (dirs, layer0) = (self.around.dirs.clone(), !self.standalone);
        let channels = Channels::new(plan.transport.clone(), node.clone(), dirs, layer0);
        let link = ServerLink { servers: plan.servers, node, transport: plan.transport };
        let (poller, events) = (link.clone(), self.around.events.clone());
        let (outbox, reports, vital) =
            (self.outbox.clone(), self.outbox.clone(), self.vital.clone());
        start::thread("desired", move || {
            poller.poll_desired(&events, &channels, &reports, &vital);
        });
        start::thread("observed", move || link.write_observed(&outbox));
        self.reports = true;
    }

    fn desired(&mut self, desired: Desired) {
        for problem in self.pulls.puller().registries().set_desired(&desired.registries) {
            log::warn!("desired document {}: {problem}", desired.version);
        }
        let wanted: BTreeMap<Name, DesiredSet> =
            desired.imagesets.iter().map(|set| (set.name.clone(), set.clone())).collect();
        for name in wanted.keys() {
            self.slot(name, None);
        }
        let names: Vec<Name> = self.sets.keys().cloned().collect();
        let busy = self.notes.desired.as_ref().and_then(|before| before.busy.clone());
        let busy_changed = busy != desired.busy;
        self.remember_files(Some(&desired));
        // They may be secrets: the notes are a file.
        self.notes.desired = Some(Desired { files: Vec::new(), ..desired.clone() });
        self.notes_file.save(&self.notes);
        for name in names {
            self.step(&name, SetEvent::Want(wanted.get(&name).cloned()));
        }
        if busy_changed {
            self.tell_all(|| SetEvent::BusyChanged);
            self.with_layer0(layer0::Machine::ask_again);
        }
        self.with_layer0(|it| it.want(desired.layer0));
        if let Some(power) = desired.power
            && power.boot_id == self.notes.boot_id
            && !self.power_done
        {
            self.power_done = self.power(power.action);
        }
    }

    /// Asks for power-off or reboot; false when it was refused and is worth asking again.
    fn power(&self, action: PowerAction) -> bool {
        let request = match action {
            PowerAction::Off => Request::PowerOff,
            PowerAction::Reboot => Request::Reboot,
        };
        log::info!("{action:?} requested by the boot server");
        match &self.around.init {
            Some(init) if !self.pivoted() => {
                if let Err(error) = init.call(&request) {
                    log::error!("{action:?}: {}", chain(&error));
                    return false;
                }
            }
            Some(_) => start::power_without_init(action),
            None => log::warn!("{action:?}: not this agent's machine to switch (--standalone)"),
        }
        true
    }

    /// Whether an image's init is PID 1.
    fn pivoted(&self) -> bool {
        self.notes.commitments.values().any(|it| it.mode == protocol::imageset::Mode::Pivot)
    }

    /// Makes sure that there is a slot for the set.
    fn slot(&mut self, name: &Name, adopted: Option<adopt::AdoptedSet>) {
        if self.sets.contains_key(name) {
            return;
        }
        let (machine, running, kept) = match adopted {
            Some(adopted) => (adopted.machine, Some(adopted.running), adopted.kept),
            None => (SetMachine::new(name.clone()), None, None),
        };
        match Worker::start(name.clone(), self.around.clone(), running, kept) {
            Ok(worker) => {
                let slot = SetSlot { machine, worker, decided: uptime(), pulled: None };
                self.sets.insert(name.clone(), slot);
            }
            Err(error) => log::error!("{name}: no thread for it: {error}"),
        }
    }

    fn collect_garbage(&self) {
        let kept = |it: &Commitment| it.kept.as_ref().map(|kept| kept.digest);
        let commitments = self.notes.commitments.values();
        let keep = commitments.flat_map(|it| [Some(it.digest), kept(it)]).flatten().collect();
        self.pulls.collect_garbage(keep);
    }

    /// Tells every set: the one that it is about knows it.
    fn tell_all(&mut self, event: impl Fn() -> SetEvent) {
        for name in self.sets.keys().cloned().collect::<Vec<_>>() {
            self.step(&name, event());
        }
    }

    fn tick(&mut self) {
        let now = uptime();
        if now.saturating_sub(self.looked) >= PRESSURE_PACE {
            self.looked = now;
            let keeps = self.sets.values().any(|slot| slot.machine.keeps());
            if keeps && worker::available_memory().is_some_and(|bytes| bytes < SHORT_OF_MEMORY) {
                log::warn!("memory is short: what is kept staged is given up");
                self.tell_all(|| SetEvent::Pressure);
            }
        }
        self.tell_all(|| SetEvent::Tick);
        self.with_layer0(|it| it.tick(now));
    }

    fn mark(&mut self, phase: Phase) {
        if self.notes.timeline.iter().any(|mark| mark.phase == phase) {
            return;
        }
        let uptime_ms = u64::try_from(uptime().as_millis()).unwrap_or(u64::MAX);
        self.notes.timeline.push(PhaseMark { phase, uptime_ms });
        self.notes_file.save(&self.notes);
    }

    /// What the node waits for, the nearest cause first.
    fn waiting(&self) -> Option<String> {
        let sets = || self.sets.values().find_map(|slot| slot.machine.waiting());
        let layer0 = || self.layer0.as_ref().and_then(|layer0| layer0.machine.waiting());
        let network = self.network_waiting.clone();
        let network = network.map(|why| match self.outbox.missing_firmware() {
            Some(files) => format!("{why} (firmware is missing: {files})"),
            None => why,
        });
        let link = network.or_else(|| self.server_waiting.clone());
        link.or_else(sets).or_else(layer0)
    }

    /// Tells the server and the console how things stand, where that has changed.
    fn publish(&mut self) {
        let waiting = self.waiting();
        let sets: Vec<_> = self
            .sets
            .iter()
            .filter_map(|(name, slot)| slot.machine.observed(self.pulls.progress(name)))
            .collect();
        let status = report::status_line(&self.facts, &sets, waiting.as_deref());
        if status != self.status {
            crate::logging::status(&status);
            self.status = status;
        }
        let lines = screen::lines(&screen::View {
            facts: &self.facts,
            server: (&self.servers, self.server_waiting.as_deref()),
            sets: &sets,
            waiting: waiting.as_deref(),
            event: &crate::logging::last_event(),
        });
        self.screen.show(lines, uptime());
        if let Some(mut observed) = self.facts.observed(&self.notes, sets, waiting) {
            observed.clock.clone_from(&self.clock);
            observed.cache = self.pulls.puller().cache().status();
            observed.layer0 = self.layer0.as_ref().map(|layer0| layer0.machine.observed());
            let machines = self.sets.iter().map(|(name, slot)| (name, &slot.machine));
            if let Some(observed) = self.usage.complete(observed, machines) {
                self.outbox.put(observed);
            }
        }
    }

    /// Stops every set in Layer0, where the machine goes down with the agent; leaves them running elsewhere.
    fn terminate(&mut self) {
        if self.standalone {
            log::info!("asked to end; containers go on and a new agent will find them");
            return;
        }
        let (done, stopped) = mpsc::channel();
        for (name, slot) in &self.sets {
            send(&slot.worker, name, Job::Terminate(done.clone()));
        }
        drop(done);
        let until = Instant::now() + STOP_PATIENCE;
        for _ in 0..self.sets.len() {
            let left = until.saturating_duration_since(Instant::now());
            if stopped.recv_timeout(left).is_err() {
                log::warn!("not every container stopped within {} s", STOP_PATIENCE.as_secs());
                return;
            }
        }
        log::info!("every container has stopped");
    }
}

fn send(worker: &mpsc::Sender<Job>, name: &Name, job: Job) {
    if worker.send(job).is_err() {
        log::error!("{name}: its worker has ended");
    }
}

/// The way to PID 1, shared by the workers.
type Init = Option<Arc<Control>>;
