//! The part of the agent's loop that lets Layer0's machine take events and does what it asks for. It decides nothing.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use protocol::boot_args::BootArgs;
use protocol::ids::Digest;
use protocol::node::PowerAction;
use rustix::system::RebootCommand;
use serde::Deserialize;

use super::stage::Stager;
use super::{Action, Layer0Event, Machine, Running, Tried, Way};
use crate::agent::event::Event;
use crate::agent::worker::uptime;
use crate::agent::{Agent, chain, start};
use crate::identity::Identity;
use crate::init::control::Request;

/// What the image says of itself.
const ABOUT: &str = "/etc/layercake/layer0.json";

/// Layer0 as the agent's loop holds it.
#[derive(Debug)]
pub(in crate::agent) struct Layer0 {
    pub(in crate::agent) machine: Machine,
    stager: Arc<Stager>,
}

impl Layer0 {
    pub(in crate::agent) fn new(running: Running, tried: Option<Tried>, stager: Stager) -> Self {
        Self { machine: Machine::new(running, tried), stager: Arc::new(stager) }
    }
}

#[derive(Debug, Default, Deserialize)]
struct About {
    #[serde(default)]
    version: Option<String>,
    #[serde(default)]
    agent_digest: Option<Digest>,
}

/// What runs here: the command line says which Layer0, the image which version, and the agent's path whether it is the image's.
pub(in crate::agent) fn running(args: &BootArgs, identity: &Identity) -> Running {
    let about = fs::read(ABOUT).ok();
    let about = about.and_then(|bytes| serde_json::from_slice::<About>(&bytes).ok());
    let About { version, agent_digest } = about.unwrap_or_default();
    let own = fs::read_link("/proc/self/exe").ok();
    Running {
        digest: args.layer0,
        version,
        agent: own.as_deref().and_then(digest_of_path).or(agent_digest),
        boot_id: identity.boot_id.clone(),
        kexec: args.kexec,
    }
}

/// The digest of an agent that was fetched: its file is named after it.
fn digest_of_path(path: &Path) -> Option<Digest> {
    format!("sha256:{}", path.file_name()?.to_str()?).parse().ok()
}

impl Agent {
    /// Lets the machine do something, and does what comes of it. Nothing outside of Layer0.
    pub(in crate::agent) fn with_layer0(&mut self, turn: impl FnOnce(&mut Machine) -> Vec<Action>) {
        let Some(layer0) = &mut self.layer0 else { return };
        let mut actions = turn(&mut layer0.machine);
        while !actions.is_empty() {
            let mut events = Vec::new();
            for action in actions {
                log::debug!("layer0: {action:?}");
                events.extend(self.act_on_layer0(action));
            }
            let Some(layer0) = &mut self.layer0 else { return };
            let next = events.into_iter().map(|event| layer0.machine.handle(event, uptime()));
            actions = next.flatten().collect();
        }
    }

    /// Returns what happened at once.
    fn act_on_layer0(&mut self, action: Action) -> Option<Layer0Event> {
        match action {
            Action::Stage(number, wanted) => {
                let stager = Arc::clone(&self.layer0.as_ref()?.stager);
                let events = self.around.events.clone();
                log::info!("layer0: {} is wanted", wanted.digest);
                start::thread("layer0", move || {
                    let send = |event| events.send(Event::Layer0(event));
                    let say = |text| send(Layer0Event::Progress(number, text));
                    let staged = stager.stage(&wanted, &say);
                    if let Err(failure) = &staged {
                        log::warn!("layer0: {}", failure.why);
                    }
                    send(Layer0Event::Staged(number, staged));
                });
                None
            }
            Action::Drop => {
                if let Err(error) = crate::sys::kexec::unload() {
                    log::warn!("layer0: what was loaded stays loaded: {error}");
                }
                None
            }
            Action::AskBusy => {
                self.ask_busy(|busy| Event::Layer0(Layer0Event::Busy(busy)));
                None
            }
            Action::Go(way, tried) => {
                if tried.is_some() {
                    self.notes.tried_agent = tried;
                    self.notes_file.save(&self.notes);
                }
                // The server is to hear why the node goes silent.
                self.publish();
                self.leave(&way).err().map(Layer0Event::Refused)
            }
        }
    }

    /// Asks PID 1; where an image's init is PID 1, the kernel itself.
    fn leave(&self, way: &Way) -> Result<(), String> {
        let request = match way {
            Way::Kexec => Request::Kexec,
            Way::Reboot(_) => Request::Reboot,
            Way::Agent(path) => Request::ReplaceAgent { path: path.clone() },
        };
        log::info!("layer0: asking for {request:?}");
        match &self.around.init {
            Some(init) if !self.pivoted() => init.call(&request).map_err(|error| chain(&error)),
            _ => match way {
                Way::Kexec => {
                    rustix::fs::sync();
                    rustix::system::reboot(RebootCommand::Kexec).map_err(|error| error.to_string())
                }
                Way::Reboot(_) => {
                    start::power_without_init(PowerAction::Reboot);
                    Ok(())
                }
                Way::Agent(_) => {
                    Err("the node has pivoted: its agent comes with the next boot".to_owned())
                }
            },
        }
    }
}
