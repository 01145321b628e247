//! A property test of the ImageSet state machine against a small model of a node: random wishes, successes, failures, ends,
//! health and crashes of the agent, in any order.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::tests::{deployment, set};
use super::*;

const VERSIONS: [&str; 3] = ["1", "2", "3"];

/// What happens next.
#[derive(Debug, Clone)]
enum Fate {
    Want(Option<usize>, u64),
    /// The job under way ends; well or not.
    Done(bool),
    /// A container of what runs ends.
    End(i32),
    Word(bool),
    Busy(bool),
    Pressure,
    Pass(u64),
    /// The agent is killed and a new one adopts what its notes say.
    Crash,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        2 => (proptest::option::weighted(0.9, 0..VERSIONS.len()), 0_u64..2).prop_map(|(v, r)| Fate::Want(v, r)),
        8 => proptest::bool::weighted(0.7).prop_map(Fate::Done),
        2 => (0..2_i32).prop_map(Fate::End),
        2 => any::<bool>().prop_map(Fate::Word),
        1 => any::<bool>().prop_map(Fate::Busy),
        1 => Just(Fate::Pressure),
        3 => (0_u64..20_000).prop_map(Fate::Pass),
        1 => Just(Fate::Crash),
    ]
}

/// A node as far as one set is concerned: what the worker holds, and the jobs that it was given.
struct World {
    machine: SetMachine,
    now: Duration,
    jobs: VecDeque<SetAction>,
    running: Option<DesiredSet>,
    kept: Option<DesiredSet>,
    staged: Option<(DesiredSet, bool)>,
    pulling: Option<DesiredSet>,
    wanted: Option<DesiredSet>,
    busy: bool,
    on_disk: Option<Commitment>,
    instances: u32,
}

fn deployed(set: &DesiredSet, instance: u32) -> Deployment {
    let mut deployment = deployment(set.version.as_str(), Restart::Always);
    deployment.set = set.clone();
    deployment.containers[0].instance = format!("i{instance}");
    deployment
}

impl World {
    fn new() -> Self {
        Self {
            machine: SetMachine::new("hello".parse().expect("name")),
            now: Duration::ZERO,
            jobs: VecDeque::new(),
            running: None,
            kept: None,
            staged: None,
            pulling: None,
            wanted: None,
            busy: false,
            on_disk: None,
            instances: 0,
        }
    }

    fn give(&mut self, event: SetEvent) {
        let actions = self.machine.handle(event, self.now, 0.5);
        self.on_disk = self.machine.note();
        for action in actions {
            match &action {
                SetAction::Pull(set) => {
                    assert!(self.pulling.is_none(), "one pull at a time");
                    self.pulling = Some(set.clone());
                }
                SetAction::CancelPull => assert!(self.pulling.is_some(), "nothing to cancel"),
                // What a trial may go back to is never taken down before the trial is over.
                SetAction::DropKept => assert!(
                    !matches!(
                        self.machine.work,
                        Work::Watching(_) | Work::CuttingOver(_) | Work::GoingBack(_)
                    ),
                    "the old set was dropped before the new one was committed"
                ),
                _ => {}
            }
            self.jobs.push_back(action);
        }
        if let (Some(note), Some(running)) = (&self.on_disk, &self.running) {
            // The note names what runs, or what a cut-over under way is about to make run.
            let moving = self.machine.is_leaving();
            assert!(moving || note.digest == digest(running), "{note:?} but {running:?} runs");
        }
    }

    /// Does the next job as the worker does it, well or not, and tells the machine.
    fn work(&mut self, well: bool) {
        let Some(job) = self.jobs.pop_front() else { return };
        let fail = || "it failed".to_owned();
        match job {
            SetAction::Pull(set) => {
                self.pulling = None;
                let content = Content { digest: digest(&set), mode: Mode::Contain, bytes: 1 };
                self.give(SetEvent::Pulled(if well { Ok(content) } else { Err(fail()) }));
            }
            SetAction::Stage(set) => {
                assert!(self.kept.is_none(), "three sets at once");
                assert!(self.staged.is_none(), "staged twice");
                self.staged = well.then_some((set, false));
                self.give(SetEvent::Staged(if well { Ok(()) } else { Err(fail()) }));
            }
            SetAction::StageKept(set) => {
                let kept = self.kept.take().expect("a kept set");
                assert_eq!(digest(&kept), digest(&set));
                match well {
                    true => self.staged = Some((set, true)),
                    false => self.kept = Some(kept),
                }
                self.give(SetEvent::Staged(if well { Ok(()) } else { Err(fail()) }));
            }
            SetAction::Discard => {
                let (set, kept) = self.staged.take().expect("something staged");
                if kept {
                    self.kept = Some(set);
                }
            }
            SetAction::DropKept => drop(self.kept.take()),
            SetAction::AskBusy => {
                let why = self.busy.then(|| "job".to_owned());
                self.give(SetEvent::Busy(why));
            }
            SetAction::CutOver(set) => self.cut_over(&set, well),
            SetAction::GoBack(reason) => {
                let kept = self.kept.take().expect("a kept set to go back to");
                self.running = Some(kept.clone());
                let running = Some(self.start(&kept));
                let failure = CutOverFailure { reason, running, report: None };
                self.give(SetEvent::CutOver(Err(Box::new(failure))));
            }
            SetAction::Restart { container, .. } => {
                self.instances += 1;
                let started =
                    Started { instance: format!("i{}", self.instances), pid: 1, exec_at_ns: 1 };
                let result = if well { Ok(started) } else { Err(fail()) };
                self.give(SetEvent::Restarted { container, result });
            }
            SetAction::Rename(set) => {
                assert_eq!(self.running.as_ref().map(digest), Some(digest(&set)));
                self.running = Some(set);
            }
            SetAction::Stop => {
                (self.running, self.kept, self.staged) = (None, None, None);
                self.give(SetEvent::Stopped);
            }
            SetAction::CancelPull => {}
        }
    }

    fn start(&mut self, set: &DesiredSet) -> Deployment {
        self.instances += 1;
        deployed(set, self.instances)
    }

    fn cut_over(&mut self, set: &DesiredSet, well: bool) {
        let (staged, _) = self.staged.take().expect("something staged");
        assert_eq!(&staged, set);
        let old = self.running.take();
        if well {
            self.kept = old;
            self.running = Some(staged);
            let deployment = self.start(set);
            return self.give(SetEvent::CutOver(Ok(Box::new(deployment))));
        }
        self.running.clone_from(&old);
        let running = old.map(|old| self.start(&old));
        let failure = CutOverFailure { reason: "it failed".to_owned(), running, report: None };
        self.give(SetEvent::CutOver(Err(Box::new(failure))));
    }

    /// The agent dies; what it had staged or begun goes, and what its notes name runs, whatever ran at that moment.
    fn crash(&mut self) {
        self.jobs.clear();
        (self.pulling, self.staged) = (None, None);
        let name: Name = "hello".parse().expect("name");
        match self.on_disk.clone() {
            Some(note) => {
                self.running = Some(note.set.clone());
                self.kept = note.kept.as_ref().map(|kept| kept.set.clone());
                let deployment = self.start(&note.set);
                self.machine = SetMachine::adopted(deployment, note.kept.clone(), &note, self.now);
            }
            None => {
                (self.running, self.kept) = (None, None);
                self.machine = SetMachine::new(name);
            }
        }
        self.give(SetEvent::Want(self.wanted.clone()));
    }

    fn happen(&mut self, fate: &Fate) {
        match fate {
            Fate::Want(version, roll) => {
                let set = version.map(|at| DesiredSet { roll: *roll, ..set(VERSIONS[at]) });
                self.wanted.clone_from(&set);
                self.give(SetEvent::Want(set));
            }
            Fate::Done(well) => self.work(*well),
            Fate::End(code) => {
                let exit = ExitStatus { code: Some(*code), signal: None, error: None };
                let instance = format!("i{}", self.instances);
                self.give(SetEvent::Ended { instance, exit });
            }
            Fate::Word(well) => {
                let word = if *well { Word::Healthy } else { Word::Unhealthy("no".to_owned()) };
                let instance = format!("i{}", self.instances);
                self.give(SetEvent::Word { instance, word, at_ns: 1 });
            }
            Fate::Busy(busy) => {
                self.busy = *busy;
                self.give(SetEvent::BusyChanged);
            }
            Fate::Pressure => self.give(SetEvent::Pressure),
            Fate::Pass(ms) => {
                self.now += Duration::from_millis(*ms);
                self.give(SetEvent::Tick);
            }
            Fate::Crash => self.crash(),
        }
    }

    /// All goes well from here on: the machine must come to rest at what is wanted, or at what it went back to.
    fn settle(&mut self) {
        self.busy = false;
        self.give(SetEvent::BusyChanged);
        for _ in 0..200 {
            if !self.jobs.is_empty() {
                self.work(true);
            } else if let Some(at) = self.machine.deadline() {
                self.now = self.now.max(at);
                self.give(SetEvent::Tick);
            } else {
                break;
            }
        }
        assert_eq!(self.machine.deadline(), None, "{:?}", self.machine);
        assert!(matches!(self.machine.work, Work::Idle), "{:?}", self.machine);
        let refused = self.machine.refused.as_ref().map(|it| &it.set);
        if self.wanted.is_none() || refused != self.wanted.as_ref() {
            assert_eq!(self.running.as_ref().map(digest), self.wanted.as_ref().map(digest));
        } else {
            assert!(self.running.is_some(), "went back to nothing");
        }
        assert!(self.staged.is_none() && self.pulling.is_none());
    }
}

fn digest(set: &DesiredSet) -> Digest {
    set.reference.digest.expect("pinned")
}

proptest! {
    #[test]
    fn whatever_happens_one_set_runs_the_old_one_is_there_until_the_commit_and_all_comes_to_rest(
        fates in proptest::collection::vec(fate(), 1..80)
    ) {
        let mut world = World::new();
        for fate in &fates {
            world.happen(fate);
        }
        world.settle();
    }
}
