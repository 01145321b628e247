//! How the agent comes up: options and kernel command line, store, network, what an earlier agent left, then the loop.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::{fs, io};

use nix::sys::signal::{SigSet, Signal};
use protocol::boot_args::{BootArgs, ConsoleMode};
use protocol::ids::{Name, NodeId, Version};
use protocol::node::{Desired, DesiredSet, PowerAction};
use protocol::reference::Reference;
use protocol::signature::Policy;

use super::console::Console;
use super::event::Event;
use super::layer0::act::{Layer0, running};
use super::layer0::stage::Stager;
use super::notes::NotesFile;
use super::pulls::Pulls;
use super::readiness::{Board, Word};
use super::report::Facts;
use super::server_link::Outbox;
use super::usage::Usages;
use super::worker::Surroundings;
use super::{Agent, Init, Sender, chain};
use crate::cache::Cache;
use crate::containers::NodeFacts;
use crate::health::{Sign, Watcher};
use crate::imageapi::service::ImageApi;
use crate::init::control::Control;
use crate::init::roles::AgentOptions;
use crate::paths::{RunDirs, SSH, SSH_ALWAYS};
use crate::pull::Puller;
use crate::pull::signed::load_policy;
use crate::registry::table::Registries;
use crate::store::Store;
use crate::transport::Transport;
use crate::{hardware, identity, logging, memory, modules, network};

/// How the node will reach its server, once it has an address.
#[derive(Debug)]
pub(super) struct LinkPlan {
    pub(super) servers: Vec<String>,
    pub(super) node: Option<NodeId>,
    pub(super) imageset: Option<Reference>,
    pub(super) transport: Transport,
}

/// Runs the agent until it is asked to end.
///
/// # Errors
/// A sentence, when the agent cannot work at all: no run directory, no store, no threads.
pub fn run(options: AgentOptions) -> Result<(), String> {
    let args = boot_args(&options);
    let target = if options.standalone {
        logging::Target::Standalone
    } else {
        logging::Target::Layer0("agent")
    };
    logging::init(args.log, target);
    log::info!("agent {} starts", env!("CARGO_PKG_VERSION"));
    if !options.standalone && args.console == ConsoleMode::Status {
        // The screen follows; until then what is wrong is still said.
        logging::limit_console(log::LevelFilter::Warn);
    }
    for problem in &args.problems {
        log::warn!("{problem}");
    }
    let _held = crate::prefetch::hold(&RunDirs::new(&options.run_dir))?;
    let signals = block_signals()?;
    let (sender, inbox) = mpsc::channel();
    let events = Sender(sender);
    let terminator = events.clone();
    let imageapi = Arc::new(ImageApi::default());
    let (standalone, stopping) = (options.standalone, Arc::clone(&imageapi));
    thread("signals", move || {
        if signals.wait().is_ok() {
            terminator.send(Event::Terminate);
            if !standalone {
                stopping.stop();
            }
        }
    });
    let (plugged, hardware_news) = mpsc::channel();
    if !options.standalone {
        bring_up_machine(&args, &options, &events, plugged)?;
    }
    // Before anything makes keys; the network and the drivers, of which one may bring randomness, go on meanwhile.
    if let Err(problem) = crate::entropy::wait(logging::status) {
        log::error!("{problem}: whatever needs keys waits for them");
    }
    let mut agent = build(&options, &args, events)?;
    let (outbox, events) = (agent.outbox.clone(), agent.around.events.clone());
    let cache = agent.pulls.puller().cache().clone();
    thread("hardware", move || {
        let mut known = Vec::new();
        hardware::watch(&hardware_news, |found| {
            for it in found.firmware_missing.iter().filter(|it| !known.contains(*it)) {
                log::warn!(
                    "firmware {} is not in this image; {} asks for it",
                    it.file,
                    it.asked_by
                );
            }
            known.clone_from(&found.firmware_missing);
            outbox.put_hardware(found);
            cache.hardware_changed();
            events.send(Event::Hardware);
        });
    });
    imageapi.start(&options, &agent.around.hostname, agent.pulls.puller())?;
    agent.adopt();
    if options.standalone {
        // The host's network is there already, and not ours to touch.
        agent.connect(protocol::ids::Mac([0; 6]));
    }
    agent.run(&inbox);
    if !standalone {
        imageapi.wait_stopped(super::STOP_PATIENCE);
    }
    Ok(())
}

/// The kernel command line, with what the options say going before it.
fn boot_args(options: &AgentOptions) -> BootArgs {
    let mut args = if options.standalone {
        BootArgs::default()
    } else {
        match fs::read_to_string("/proc/cmdline") {
            Ok(line) => BootArgs::parse(&line),
            Err(error) => BootArgs {
                problems: vec![format!("/proc/cmdline: {error}")],
                ..BootArgs::default()
            },
        }
    };
    if !options.servers.is_empty() {
        args.servers.clone_from(&options.servers);
    }
    args.imageset = options.imageset.clone().or(args.imageset);
    args.node = options.node.clone().or(args.node);
    args.log = options.log.unwrap_or(args.log);
    args
}

/// Blocks what asks the agent to end, before any thread starts, so that one thread can wait for it.
fn block_signals() -> Result<SigSet, String> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    signals.thread_block().map_err(|error| format!("blocking signals: {error}"))?;
    Ok(signals)
}

/// Network and drivers of a Layer0 machine. The network comes first: it waits for links by itself, and asks for an address
/// while the other drivers are still being loaded. When this returns all of them are: the sets need the file systems.
fn bring_up_machine(
    args: &BootArgs,
    options: &AgentOptions,
    events: &Sender,
    plugged: mpsc::Sender<()>,
) -> Result<(), String> {
    let settings = network::Settings {
        etc: Path::new("/etc").to_path_buf(),
        set_hostname: true,
        node: args.node.clone().or_else(|| options.node.clone()),
        wishes: options.config.network(),
        state: RunDirs::new(&options.run_dir).state(),
    };
    let sink = events.clone();
    network::start(args, settings, move |event| sink.send(Event::Network(event)))
        .map_err(|error| chain(&error))?;
    // Without drivers there is still a console, and somebody who reads it: go on.
    let sink = move |event: &modules::uevent::Event| {
        if event.is_hardware() && plugged.send(()).is_err() {
            log::debug!("nobody looks at the hardware any more");
        }
    };
    if let Err(error) = modules::start(sink) {
        log::error!("{}", chain(&error));
    }
    if Path::new(SSH_ALWAYS).exists() {
        thread("ssh", || match Command::new(SSH).stdin(Stdio::null()).status() {
            Ok(status) if status.success() => {}
            Ok(status) => log::error!("{SSH}: {status}"),
            Err(error) => log::error!("{SSH}: {error}"),
        });
    }
    let store = args.store.map(|amount| memory::limit_store(amount, &options.run_dir));
    let zram = args.zram.map(memory::start_zram);
    for problem in [store, zram].into_iter().flatten().filter_map(Result::err) {
        log::error!("{problem}");
    }
    Ok(())
}

fn build(options: &AgentOptions, args: &BootArgs, events: Sender) -> Result<Agent, String> {
    let dirs = RunDirs::new(&options.run_dir);
    let identity = identity::read();
    let last_crash = if options.standalone { None } else { crate::last_crash::take(&dirs) };
    let notes_file = NotesFile::open(&dirs.state()).map_err(|error| {
        format!("{}: {error}; is the run directory writable?", dirs.state().display())
    })?;
    let mut notes = notes_file.load(&identity.boot_id);
    notes.starts = notes.starts.saturating_add(1);
    notes_file.save(&notes);
    let transport = transport(options)?;
    let registries = Registries::new(transport.clone());
    if let Err(problem) = registries.read_file(&options.config.registries()) {
        log::error!("{problem}; registries are spoken to without it");
    }
    let policy = load_policy(&options.config.keys());
    if let Policy::Unusable(reason) = &policy {
        log::error!("no ImageSet can be verified, so none will run: {reason}");
    }
    let stager = Stager {
        transport: transport.clone(),
        servers: args.servers.clone(),
        policy: policy.clone(),
        agents: dirs.agents(),
        turn: Mutex::default(),
    };
    let layer0 = (!options.standalone)
        .then(|| Layer0::new(running(args, &identity), notes.tried_agent.clone(), stager));
    let store = Store::open(&dirs).map_err(|error| chain(&error))?;
    let cache = cache(options, args, &dirs);
    let puller = Puller::new(store, registries).with_policy(policy).with_cache(cache);
    let puller = puller.with_mount_forms(&options.mount_forms);
    let init: Init = Control::from_env().map(Arc::new);
    let hostname = hostname();
    let facts = NodeFacts { name: hostname.clone(), ..NodeFacts::default() };
    let facts = Arc::new(Mutex::new(facts));
    let board = Arc::<Board>::default();
    let health = health_watcher(&events, &board)?;
    let around = Surroundings { dirs, events, init, hostname, facts, board, health };
    let link = LinkPlan {
        servers: args.servers.clone(),
        node: node_id(args).or_else(|| options.standalone.then(host_node_id).flatten()),
        imageset: args.imageset.clone(),
        transport: transport.clone(),
    };
    let status = !options.standalone && args.console == ConsoleMode::Status;
    let screen = Console::open(&around.dirs, status);
    let mut agent = Agent {
        facts: Facts { node: node_id(args), identity, links: Vec::new(), last_crash },
        notes,
        notes_file,
        vital: super::vital::Vital::new(around.init.clone()),
        around,
        reports: false,
        pulls: Pulls::new(puller),
        outbox: Outbox::default(),
        sets: std::collections::BTreeMap::new(),
        busy_program: options.busy.clone(),
        looked: super::worker::uptime(),
        link: Some(link),
        network_waiting: None,
        server_waiting: None,
        clock_keeper: None,
        clock: None,
        power_done: false,
        standalone: options.standalone,
        status: String::new(),
        screen,
        servers: args.servers.join(", "),
        usage: Usages::default(),
        layer0,
    };
    agent.remember_files(None);
    if args.servers.is_empty() && args.imageset.is_none() {
        let nowhere = "neither layercake.server= nor layercake.imageset= is given: nothing to do";
        agent.server_waiting = Some(nowhere.to_owned());
    }
    agent.mark(protocol::node::Phase::Init);
    Ok(agent)
}

/// What speaks to servers. A node goes on without a site's certificates that cannot be read: by plain HTTP it can still be told
/// better, and whoever looks is told what is wrong.
fn transport(options: &AgentOptions) -> Result<Transport, String> {
    let made = Transport::new(&options.config.ca());
    let made = match made {
        Err(error) if !options.standalone => {
            log::error!("{}: no certificate is trusted", chain(&error));
            Transport::new(Path::new(""))
        }
        made => made,
    };
    made.map_err(|error| chain(&error))
}

/// The cache of blobs: the directory of the options, else in Layer0 the disk with the command line's label.
fn cache(options: &AgentOptions, args: &BootArgs, dirs: &RunDirs) -> Cache {
    let cache = match (&options.cache_dir, args.cache.label()) {
        (Some(dir), _) => Cache::in_directory(dir),
        (None, Some(label)) if !options.standalone => Cache::on_disk(label, &dirs.disk()),
        _ => Cache::none(),
    };
    let warm = cache.clone();
    thread("find-cache", move || warm.warm_up());
    cache
}

/// Who asks containers how they are; what comes of it goes to those who wait, and into the loop.
fn health_watcher(events: &Sender, board: &Arc<Board>) -> Result<Watcher, String> {
    let (events, board) = (events.clone(), Arc::clone(board));
    let sink = move |instance: &str, sign: Sign, at_ns: u64| {
        let (instance, word) = (instance.to_owned(), Word::from(sign));
        board.say(&instance, &word, at_ns);
        events.send(Event::Word { instance, word, at_ns });
    };
    Watcher::start(Box::new(sink)).map_err(|error| format!("watching health: {error}"))
}

/// Who the node is, as far as the command line says: its id, or the interface it booted from, whichever of several
/// interfaces is the first to have an address.
fn node_id(args: &BootArgs) -> Option<NodeId> {
    args.node.clone().or_else(|| args.bootif.map(NodeId::from_mac))
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn host_node_id() -> Option<NodeId> {
    hostname().to_ascii_lowercase().parse().ok()
}

/// A desired document for a node without a server: this one set, named after its repository.
pub(super) fn desired_of_reference(node: &NodeId, reference: Reference) -> Desired {
    let last = reference.repository.rsplit('/').next().unwrap_or_default();
    let fallback = "imageset".parse::<Name>();
    let name = last.parse::<Name>().or(fallback);
    let version = reference
        .tag
        .as_deref()
        .unwrap_or("latest")
        .parse::<Version>()
        .or_else(|_| "latest".parse());
    let imagesets = match (name, version) {
        (Ok(name), Ok(version)) => {
            vec![DesiredSet { name, version, reference, roll: 0, force: false }]
        }
        _ => Vec::new(),
    };
    Desired { imagesets, ..Desired::empty(node.clone()) }
}

/// Starts a thread of the agent. Where the system has no thread to give, the agent says so and ends: PID 1 starts it
/// again.
pub(super) fn thread(name: &str, body: impl FnOnce() + Send + 'static) {
    let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(512 << 10);
    if let Err(error) = builder.spawn(body) {
        log::error!("thread {name}: {error}");
        std::process::abort();
    }
}

/// Power-off or reboot when PID 1 is not ours any more (pivot): sync, then the kernel.
pub(super) fn power_without_init(action: PowerAction) {
    rustix::fs::sync();
    let command = match action {
        PowerAction::Off => rustix::system::RebootCommand::PowerOff,
        PowerAction::Reboot => rustix::system::RebootCommand::Restart,
    };
    if let Err(error) = rustix::system::reboot(command) {
        log::error!("reboot(2): {}", io::Error::from(error));
    }
}

#[cfg(test)]
mod tests {
    use protocol::boot_args::LogLevel;

    use super::*;

    #[test]
    fn a_bare_reference_makes_a_set_named_after_its_repository() {
        let node: NodeId = "n1".parse().expect("id");
        let reference: Reference = "http://r:1/site/hello:2".parse().expect("reference");
        let desired = desired_of_reference(&node, reference);
        let set = desired.imagesets.first().expect("one set");
        assert_eq!((set.name.as_str(), set.version.as_str()), ("hello", "2"));
    }

    #[test]
    fn a_certificate_that_is_none_leaves_a_node_without_it_and_ends_a_program() {
        let dir = tempfile::tempdir().expect("directory");
        let options = |standalone| AgentOptions {
            standalone,
            config: crate::paths::ConfigDir::new(dir.path()),
            ..AgentOptions::default()
        };
        assert!(transport(&options(true)).is_ok(), "there is none");
        fs::create_dir(dir.path().join("ca")).expect("directory");
        fs::write(dir.path().join("ca/site.pem"), "no certificate").expect("file");
        assert!(transport(&options(false)).is_ok());
        let error = transport(&options(true)).expect_err("no certificate");
        assert!(error.contains("site.pem"), "{error}");
    }

    #[test]
    fn the_boot_interface_names_a_node_that_has_no_other_name() {
        let id = |line: &str| node_id(&BootArgs::parse(line)).map(|id| id.to_string());
        let mac: protocol::ids::Mac = "52:54:00:00:00:07".parse().expect("mac");
        let bootif = "BOOTIF=01-52-54-00-00-00-07";
        assert_eq!(id(bootif), Some(NodeId::from_mac(mac).to_string()));
        assert_eq!(id(&format!("{bootif} layercake.node=n7")).as_deref(), Some("n7"));
        assert_eq!(id("console=ttyS0"), None);
    }

    #[test]
    fn options_go_before_the_command_line() {
        let options = AgentOptions {
            standalone: true,
            servers: vec!["http://s:1".to_owned()],
            log: Some(LogLevel::Debug),
            ..AgentOptions::default()
        };
        let args = boot_args(&options);
        assert_eq!(args.servers, ["http://s:1"]);
        assert_eq!(args.log, LogLevel::Debug);
    }
}
