//! The ImageAPI's containers: made, started, stopped, removed and adopted, by [`crate::containers`].
//!
//! ```text
//!                 PATCH running                     ends with 0, or was asked to
//! created, exited, dead ─────▶ running ──────────────────────────────▶ exited
//!                   │             │ PATCH exited                         ▲
//!                   │             └───────▶ stopping ────────────────────┘
//!                   └ cannot be started ▶ dead ◀ ends otherwise ─ running
//! ```
//! A created container has no process. A stopped or dead one may be started again, as a new instance on the same mount.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use protocol::ids::{Digest, Name};
use protocol::imageset::{self, NetMode, Profile, Restart};
use protocol::node::ContainerState;

use super::engine::Engine;
use super::error::ApiError;
use super::needs::Needs;
use super::route::Which;
use super::table::{Item, Object, Refusal, Running, Sort};
use super::types::{Container, State};
use crate::agent::chain;
use crate::containers::{
    self, Adopted, ExitRecord, Handle, HeldSockets, Keeping, NodeFacts, OnEnd, Place, Spec,
};

/// What systemd takes for `halt`, whatever its image says (systemd(1)).
const SYSTEMD_STOP: &str = "SIGRTMIN+3";
/// SIGKILL.
const SIGKILL: i32 = 9;
/// Stack of a thread that waits for a container to stop.
const STOP_STACK: usize = 256 << 10;

impl Engine {
    /// The number of the container that is meant.
    pub(super) fn which(&self, which: &Which) -> Result<i64, ApiError> {
        let present = self.present();
        match which {
            Which::Id(id) if present.table.has(Sort::Container, *id) => Ok(*id),
            Which::Id(id) => Err(Refusal::Absent(Sort::Container, *id).into()),
            Which::Name(name) => {
                let found = present.table.container_named(name);
                found.ok_or_else(|| ApiError::not_found(format!("container `{name}`")))
            }
        }
    }

    /// A container as it is answered.
    pub(super) fn shown(&self, id: i64) -> Result<Container, ApiError> {
        let container = self.present().table.container(id);
        container.ok_or_else(|| Refusal::Absent(Sort::Container, id).into())
    }

    /// Makes a container, and starts it if it is to run.
    ///
    /// # Errors
    /// 400 and 409 when there is none then. 500 with the reason when it was made and did not start: it is there, and dead.
    pub(super) fn create(self: &Arc<Self>, mut spec: Container) -> Result<Container, ApiError> {
        let run = match spec.state {
            None | Some(State::Created) => false,
            Some(State::Running) => true,
            Some(state) => {
                return Err(ApiError::invalid(format!("a new container cannot be {state}")));
            }
        };
        if spec.id != 0 {
            return Err(ApiError::internal("the number of a new container is not for you to say"));
        }
        words(&spec.command).map_err(ApiError::invalid)?;
        if spec.namespaces.iter().flatten().any(|namespace| namespace == "user") {
            // An overlay cannot be mounted id-mapped, only its layers can: a mount that is there already is too late.
            let what =
                "a container on a mount cannot have users of its own; one of an ImageSet can";
            return Err(ApiError::invalid(what));
        }
        let mount =
            spec.mount.take().ok_or_else(|| ApiError::invalid("a container on no mount"))?;
        self.check_name(&spec.name)?;
        let fetched = self.fetch(&Needs::of_mount(&mount)?)?;
        let id = {
            let _turn = self.turn();
            self.check_name(&spec.name)?;
            let mount = self.made(self.resolve_mount(*mount, &fetched))?;
            let id = self.present().table.number();
            let logfile = self.dirs.log().join(format!("c{id}.log"));
            spec.state = None;
            let running = Running { state: State::Created, instance: None, reason: None, logfile };
            let item = Item::Container { spec, running };
            let object = Object { own: true, children: vec![mount], item };
            self.change(|present| present.table.insert(id, object));
            id
        };
        if run {
            self.start(id)?;
        }
        self.shown(id)
    }

    fn check_name(&self, name: &str) -> Result<(), ApiError> {
        match self.present().table.container_named(name) {
            Some(other) => Err(ApiError::busy(format!("container {other} has the name `{name}`"))),
            None => Ok(()),
        }
    }

    /// Starts a container that does not run.
    ///
    /// # Errors
    /// 409 while it stops; 500 with the reason when it cannot be started, and it is dead then.
    pub(super) fn start(self: &Arc<Self>, id: i64) -> Result<(), ApiError> {
        let _turn = self.turn();
        let Some((spec, running)) = self.container(id) else {
            return Err(Refusal::Absent(Sort::Container, id).into());
        };
        match running.state {
            State::Running => return Ok(()),
            State::Stopping => return Err(Refusal::Runs(id, State::Stopping).into()),
            _ => {}
        }
        self.remove_instance(id, &running)?;
        let started = self.instance(id, &spec).and_then(|spec| self.run(id, &spec));
        started.map_err(|reason| {
            log::warn!("imageapi: container {id}: {reason}");
            self.set(id, State::Dead, Some(reason.clone()));
            ApiError::failed(format!("container {id}: {reason}"))
        })
    }

    fn container(&self, id: i64) -> Option<(Container, Running)> {
        match self.present().table.get(id).map(|object| &object.item) {
            Some(Item::Container { spec, running }) => Some((spec.clone(), running.clone())),
            _ => None,
        }
    }

    /// What the container's new instance is.
    fn instance(&self, id: i64, spec: &Container) -> Result<Spec, String> {
        let present = self.present();
        let object = present.table.get(id).ok_or("it is gone")?;
        let mount = *object.children.first().ok_or("it has no mount")?;
        let root = match present.table.get(mount).map(|object| &object.item) {
            Some(Item::Mount { mounted, .. }) => mounted.mountpoint.clone(),
            _ => return Err(format!("its mount {mount} was taken away")),
        };
        let config = present.table.config_below(mount).cloned().unwrap_or_default();
        let name: Name = format!("c{id}").parse().map_err(|error| format!("{error}"))?;
        let boottime_us = containers::boottime_ns() / 1000;
        let place = Place {
            id: format!("imageapi.{id}.{boottime_us:x}"),
            set: "imageapi".parse().map_err(|error| format!("{error}"))?,
            set_digest: Digest::of(b"imageapi"),
            root,
            hostname: self.hostname.clone(),
            log_dir: self.dirs.log(),
            restarts: 0,
            version: None,
            keeping: Keeping { memory: self.dirs.persistent(), disk: None },
            facts: NodeFacts { name: self.hostname.clone(), ..NodeFacts::default() },
        };
        let mut container = described(spec, name)?;
        if container.command.is_empty() {
            container.command = config.entrypoint.iter().chain(&config.cmd).cloned().collect();
        }
        Spec::plan(place, &container, &config).map_err(|error| chain(&error))
    }

    /// Brings an instance to its exec barrier and lets it pass.
    fn run(self: &Arc<Self>, id: i64, spec: &Spec) -> Result<(), String> {
        self.change(|present| {
            if let Some(Item::Container { running, .. }) =
                present.table.get_mut(id).map(|object| &mut object.item)
            {
                running.instance = Some(spec.id.clone());
            }
        });
        let handle = containers::create(&self.dirs, spec, &HeldSockets::default(), self.on_end());
        let handle = handle.map_err(|error| chain(&error))?;
        // It may end before this function does: what its end says comes after this.
        self.change(|present| present.handles.insert(id, handle.clone()));
        self.set(id, State::Running, None);
        if let Err(error) = handle.release() {
            let reason = chain(&error);
            // Its end has been told, or will be; what counts is why.
            drop(handle.wait(Duration::from_secs(2)));
            return Err(reason);
        }
        Ok(())
    }

    fn set(&self, id: i64, state: State, reason: Option<String>) {
        self.change(|present| {
            if let Some(Item::Container { running, .. }) =
                present.table.get_mut(id).map(|object| &mut object.item)
            {
                running.state = state;
                running.reason = reason;
            }
        });
    }

    /// Notes the end of an instance.
    fn on_end(self: &Arc<Self>) -> OnEnd {
        let engine: Weak<Self> = Arc::downgrade(self);
        Arc::new(move |instance: &str, record: ExitRecord| {
            if let Some(engine) = engine.upgrade() {
                engine.ended(instance, &record);
            }
        })
    }

    fn ended(&self, instance: &str, record: &ExitRecord) {
        let state = match record.state() {
            ContainerState::Exited => State::Exited,
            _ => State::Dead,
        };
        log::info!("imageapi: {instance}: {state} ({:?})", record.status);
        self.change(|present| {
            if let Some(running) = present.table.running_mut(instance) {
                running.state = state;
                running.reason.clone_from(&record.status.error);
            }
        });
    }

    /// Stops a container that runs, and returns when it has ended: after its own timeout it is killed. Others see it stopping
    /// meanwhile.
    ///
    /// # Errors
    /// When its monitor does not answer.
    pub(super) fn stop(&self, id: i64) -> Result<(), ApiError> {
        let stopping = self.change(|present| {
            let handle = present.handles.get(&id).cloned()?;
            match present.table.get_mut(id).map(|object| &mut object.item) {
                Some(Item::Container { running, .. }) if running.state == State::Running => {
                    running.state = State::Stopping;
                    Some(handle)
                }
                _ => None,
            }
        });
        let Some(handle) = stopping else { return Ok(()) };
        self.await_stop(&handle)
    }

    fn await_stop(&self, handle: &Handle) -> Result<(), ApiError> {
        match handle.stop() {
            Ok(_) => {
                // Unless that has been noted already, and it was started again since.
                self.change(|present| {
                    if let Some(running) = present.table.running_mut(&handle.spec().id)
                        && running.state == State::Stopping
                    {
                        running.state = State::Exited;
                    }
                });
                Ok(())
            }
            Err(error) => Err(ApiError::failed(chain(&error))),
        }
    }

    /// Removes a container, with `force` also one that runs.
    ///
    /// # Errors
    /// 409 while it runs or stops.
    pub(super) fn delete(&self, id: i64, force: bool) -> Result<Container, ApiError> {
        if force {
            self.stop(id)?;
        }
        let mut shown = self.shown(id)?;
        self.remove(Sort::Container, id, force)?;
        shown.refs = 0;
        Ok(shown)
    }

    /// Takes away what an ended instance leaves, and its log.
    pub(super) fn remove_instance(&self, id: i64, running: &Running) -> Result<(), ApiError> {
        let failed = |error: containers::ContainerError| ApiError::failed(chain(&error));
        let handle = self.present().handles.remove(&id);
        match (handle, &running.instance) {
            (Some(handle), _) => handle.remove().map_err(failed)?,
            (None, Some(instance)) => containers::remove(&self.dirs, instance).map_err(failed)?,
            (None, None) => {}
        }
        match std::fs::remove_file(&running.logfile) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!("imageapi: {}: {error}", running.logfile.display());
            }
            _ => {}
        }
        Ok(())
    }

    /// Finds the containers of an earlier agent again.
    pub(super) fn adopt_containers(self: &Arc<Self>) {
        let found = containers::adopt(&self.dirs, &self.on_end());
        let found = found.unwrap_or_else(|error| {
            log::error!("imageapi: {}", chain(&error));
            Vec::new()
        });
        let mut seen = Vec::new();
        for adopted in found {
            match adopted {
                Adopted::Live(handle) => {
                    seen.push(handle.spec().id.clone());
                    self.adopt_live(handle);
                }
                Adopted::Ended { spec, exit } => {
                    let known = self.present().table.running_mut(&spec.id).is_some();
                    if known {
                        seen.push(spec.id.clone());
                        self.ended(&spec.id, &exit);
                    } else if let Err(error) = containers::remove(&self.dirs, &spec.id) {
                        log::warn!("imageapi: {}", chain(&error));
                    }
                }
            }
        }
        let lost: Vec<i64> = {
            let present = self.present();
            let running = present.table.containers().filter(|(_, _, running)| {
                let runs = matches!(running.state, State::Running | State::Stopping);
                runs && !running.instance.as_ref().is_some_and(|it| seen.contains(it))
            });
            running.map(|(id, ..)| id).collect()
        };
        for id in lost {
            self.set(id, State::Dead, Some("it is gone".to_owned()));
        }
        self.sweep_logs();
    }

    /// Removes the logs of containers that there are no more.
    fn sweep_logs(&self) {
        let present = self.present();
        let logs: Vec<_> = present.table.containers().map(|(_, _, it)| &it.logfile).collect();
        for entry in std::fs::read_dir(self.dirs.log()).into_iter().flatten().flatten() {
            let path = entry.path();
            if !logs.contains(&&path)
                && let Err(error) = std::fs::remove_file(&path)
            {
                log::warn!("imageapi: {}: {error}", path.display());
            }
        }
    }

    fn adopt_live(self: &Arc<Self>, handle: Handle) {
        let instance = handle.spec().id.clone();
        let known = self.present().table.containers().find_map(|(id, _, running)| {
            (running.instance.as_ref() == Some(&instance)).then_some((id, running.state))
        });
        match known {
            Some((id, state @ (State::Running | State::Stopping))) => {
                self.present().handles.insert(id, handle.clone());
                // One that runs already says so; one that was held at its barrier goes on now.
                if let Err(error) = handle.release() {
                    log::warn!("imageapi: {instance}: {}", chain(&error));
                }
                if state == State::Stopping {
                    self.go_on_stopping(id, handle);
                }
            }
            _ => {
                log::info!("imageapi: {instance} is left over, stopping it");
                let stopped = handle.stop_with(SIGKILL, Duration::ZERO).map(drop);
                for result in [stopped, handle.remove()] {
                    if let Err(error) = result {
                        log::warn!("imageapi: {}", chain(&error));
                    }
                }
            }
        }
    }

    fn go_on_stopping(self: &Arc<Self>, id: i64, handle: Handle) {
        let engine = Arc::clone(self);
        let body = move || {
            if let Err(error) = engine.await_stop(&handle) {
                log::warn!("imageapi: container {id}: {error}");
            }
        };
        let builder = std::thread::Builder::new().name("imageapi-stop".to_owned());
        if let Err(error) = builder.stack_size(STOP_STACK).spawn(body) {
            log::error!("imageapi: container {id} cannot be stopped: {error}");
        }
    }

    /// Stops every container, all at once: the machine goes down.
    pub fn stop_all(&self) {
        let running: Vec<i64> = self
            .present()
            .table
            .containers()
            .filter(|(_, _, running)| running.state == State::Running)
            .map(|(id, ..)| id)
            .collect();
        std::thread::scope(|scope| {
            for id in running {
                scope.spawn(move || {
                    if let Err(error) = self.stop(id) {
                        log::warn!("imageapi: container {id}: {error}");
                    }
                });
            }
        });
    }
}

/// A container of the API in the words of an ImageSet's.
fn described(spec: &Container, name: Name) -> Result<imageset::Container, String> {
    let mut container = imageset::Container::new(name.clone(), name);
    container.command = words(&spec.command)?;
    container.restart = Restart::Never;
    if spec.systemd {
        container.systemd = true;
        container.profile = Profile::System;
        container.stop_signal = Some(SYSTEMD_STOP.to_owned());
    }
    for namespace in spec.namespaces.iter().flatten() {
        match namespace.as_str() {
            "net" => container.namespaces.net = NetMode::None,
            "time" => container.namespaces.time = true,
            // mnt, pid, ipc, uts and cgroup every container has.
            _ => {}
        }
    }
    Ok(container)
}

/// Parts a command into words at blanks; quotes hold a word together and a backslash takes the next character as it is, as in
/// a shell, and nothing else of a shell happens.
fn words(command: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = command.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (_, '\0') => return Err("the command has a NUL byte"),
            (Some('\''), '\'') | (Some('"'), '"') => quote = None,
            (Some('\''), c) => word.get_or_insert_default().push(c),
            (_, '\\') => {
                let next = chars.next().ok_or("the command ends with a backslash")?;
                word.get_or_insert_default().push(next);
            }
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err("a quote in the command is not closed");
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_parted_into_words_as_a_shell_does() {
        let table: [(&str, &[&str]); 8] = [
            ("/usr/sbin/init", &["/usr/sbin/init"]),
            ("  sleep   1 \n", &["sleep", "1"]),
            ("sh -c 'echo a b; sleep 1'", &["sh", "-c", "echo a b; sleep 1"]),
            (r#"a "b \" c" d'e'f"#, &["a", "b \" c", "def"]),
            (r"a\ b '\'", &["a b", "\\"]),
            ("a '' \"\"", &["a", "", ""]),
            ("echo $HOME *", &["echo", "$HOME", "*"]),
            ("", &[]),
        ];
        for (command, expected) in table {
            assert_eq!(words(command).expect(command), expected, "{command}");
        }
        for bad in ["'a", "\"", "a\\", "a\0"] {
            assert!(words(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn systemd_and_namespaces_become_those_of_an_imagesets_container() {
        let asked = ["net", "time", "mnt", "pid"].map(str::to_owned);
        let namespaces = Some(asked.to_vec());
        let spec = Container { systemd: true, namespaces, ..Container::default() };
        let container = described(&spec, "c1".parse().expect("name")).expect("container");
        assert_eq!(container.stop_signal.as_deref(), Some("SIGRTMIN+3"));
        assert_eq!((container.systemd, container.profile), (true, Profile::System));
        let namespaces = container.namespaces;
        assert!(namespaces.net == NetMode::None && namespaces.time);
    }
}
