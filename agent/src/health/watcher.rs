//! The thread that probes every container of the node, each in its turn, and passes on what their programs say.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use protocol::imageset::Health;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::attempt::{Attempt, Place};
use super::{Machine, Remembered, Sign};
use crate::containers::{Handle, boottime_ns, read_json, write_json};

/// Most probes under way at once; further ones wait until one has ended.
const MAX_ATTEMPTS: usize = 64;
/// Longest sleep when nothing is due.
const IDLE: Duration = Duration::from_secs(3600);
/// Stack of the thread.
const STACK: usize = 256 << 10;
/// Name of the file in an instance's directory with what is [`Remembered`].
const FILE: &str = "health.json";

/// Takes the signs, each with the instance it is about and the time of it, nanoseconds of CLOCK_BOOTTIME. Called from the one
/// thread; it should only pass them on.
pub type Sink = Box<dyn Fn(&str, Sign, u64) + Send>;

/// The way to the thread, which lives as long as the process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Watcher {
    orders: mpsc::Sender<Order>,
    bell: Arc<OwnedFd>,
}

#[derive(Debug)]
enum Order {
    Watch(Box<Watched>),
    /// The program of this instance has spoken.
    Word {
        id: String,
        ready_at_ns: Option<u64>,
        text: Option<String>,
    },
    Forget(String),
}

/// An instance that is watched.
#[derive(Debug)]
struct Watched {
    id: String,
    file: PathBuf,
    /// What the last agent knew, and the new one has not heard.
    remembered: Remembered,
    ready: bool,
    text: Option<String>,
    probed: Option<Probed>,
}

#[derive(Debug)]
struct Probed {
    health: Health,
    machine: Machine,
    place: Place,
    /// The probe under way, and when its answer is too late.
    attempt: Option<(Attempt, Duration)>,
}

impl Watcher {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there is no thread or no descriptor to be had.
    pub fn start(sink: Sink) -> io::Result<Self> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (orders, inbox) = mpsc::channel();
        let thread = Thread { bell: Arc::clone(&bell), sink, watched: BTreeMap::new() };
        let builder = std::thread::Builder::new().name("health".to_owned()).stack_size(STACK);
        builder.spawn(move || thread.run(&inbox))?;
        Ok(Self { orders, bell })
    }

    /// Watches an instance whose program runs, from now until it is forgotten or watched anew.
    pub fn watch(&self, handle: &Handle, health: Option<&Health>) {
        let (spec, status) = (handle.spec(), handle.last_status());
        let file = handle.dir().join(FILE);
        let remembered: Remembered = read_json(&file).unwrap_or_default();
        let now = now();
        let started = status.exec_at_ns.map_or(now, Duration::from_nanos);
        let probed = health.map(|health| Probed {
            machine: Machine::new(health, started, &remembered, now),
            place: Place::of(spec, handle.pid()),
            health: health.clone(),
            attempt: None,
        });
        let id = spec.id.clone();
        let watched = Watched { id, file, remembered, ready: false, text: None, probed };
        self.order(Order::Watch(Box::new(watched)));
        if spec.notify {
            let this = self.clone();
            handle.on_status(Box::new(move |id, status| {
                this.order(Order::Word {
                    id: id.to_owned(),
                    ready_at_ns: status.ready_at_ns,
                    text: status.text.clone(),
                });
            }));
        }
    }

    /// Watches an instance no more.
    pub fn forget(&self, instance: &str) {
        self.order(Order::Forget(instance.to_owned()));
    }

    fn order(&self, order: Order) {
        if self.orders.send(order).is_ok() {
            // A bell that cannot ring any louder is heard all the same.
            let _ = rustix::io::write(&*self.bell, &1_u64.to_ne_bytes());
        }
    }
}

fn now() -> Duration {
    Duration::from_nanos(boottime_ns())
}

struct Thread {
    bell: Arc<OwnedFd>,
    sink: Sink,
    watched: BTreeMap<String, Watched>,
}

impl Thread {
    fn run(mut self, inbox: &mpsc::Receiver<Order>) {
        loop {
            for order in inbox.try_iter() {
                self.obey(order);
            }
            self.begin();
            if let Err(error) = self.wait() {
                log::error!("health: {error}; probing ends");
                return;
            }
            self.advance();
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Watch(watched) => {
                if let Some(sign) = watched.remembered.sign().filter(|_| watched.probed.is_some()) {
                    (self.sink)(&watched.id, sign, boottime_ns());
                }
                self.watched.insert(watched.id.clone(), *watched);
            }
            Order::Forget(id) => drop(self.watched.remove(&id)),
            Order::Word { id, ready_at_ns, text } => {
                let Some(watched) = self.watched.get_mut(&id) else { return };
                if let Some(at) = ready_at_ns.filter(|_| !watched.ready) {
                    watched.ready = true;
                    (self.sink)(&id, Sign::Ready, at);
                }
                if let Some(text) = text
                    && watched.text.as_ref() != Some(&text)
                {
                    watched.text = Some(text.clone());
                    (self.sink)(&id, Sign::Says(text), boottime_ns());
                }
            }
        }
    }

    /// Begins the probes that are due.
    fn begin(&mut self) {
        let now = now();
        let probed = self.watched.values().filter_map(|it| it.probed.as_ref());
        let busy = probed.filter(|it| it.attempt.is_some()).count();
        let idle = self
            .watched
            .values_mut()
            .filter_map(|it| it.probed.as_mut())
            .filter(|it| it.attempt.is_none() && it.machine.due() <= now);
        for probed in idle.take(MAX_ATTEMPTS.saturating_sub(busy)) {
            let timeout = Duration::from_millis(probed.health.timeout_ms.into());
            let attempt = Attempt::begin(&probed.health.probe, &probed.place);
            probed.attempt = Some((attempt, now + timeout));
        }
    }

    /// Sleeps until a probe has something to say, one is due or too late, or somebody rings.
    fn wait(&self) -> io::Result<()> {
        let attempts = || self.watched.values().filter_map(|it| it.probed.as_ref());
        let under_way = || attempts().filter_map(|it| it.attempt.as_ref());
        let full = under_way().count() >= MAX_ATTEMPTS;
        let dues = attempts().filter(|it| it.attempt.is_none() && !full).map(|it| it.machine.due());
        let next = dues.chain(under_way().map(|(_, until)| *until)).min();
        let mut fds = vec![PollFd::new(&*self.bell, PollFlags::IN)];
        let mut sleep = next.map_or(IDLE, |at| at.saturating_sub(now()).min(IDLE));
        for (attempt, _) in under_way() {
            match attempt.waits_for() {
                Some((fd, flags)) => fds.push(PollFd::from_borrowed_fd(fd, flags)),
                None => sleep = Duration::ZERO,
            }
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(sleep.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(sleep.subsec_nanos()),
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // Whether it has rung or not: what was ordered is looked for next in any case.
        let _ = rustix::io::read(self.bell.as_fd(), &mut [0; 8]);
        Ok(())
    }

    /// Lets every probe under way go on, and takes the outcomes.
    fn advance(&mut self) {
        let now = now();
        let sink = &self.sink;
        for watched in self.watched.values_mut() {
            let Some(probed) = &mut watched.probed else { continue };
            let Some((attempt, until)) = &mut probed.attempt else { continue };
            let late = || format!("no answer within {} ms", probed.health.timeout_ms);
            let outcome = match attempt.go_on() {
                Some(outcome) => outcome,
                None if *until <= now => Err(late()),
                None => continue,
            };
            probed.attempt = None;
            let Some(sign) = probed.machine.take(outcome, now) else { continue };
            // The directory goes with the instance; without the file a new agent only knows less.
            if let Some(remembered) = Remembered::of(&sign)
                && let Err(error) = write_json(&watched.file, &remembered)
            {
                log::debug!("{}: {error}", watched.file.display());
            }
            sink(&watched.id, sign, boottime_ns());
        }
    }
}
