//! `cargo xtask demo`: machines boot from the network into Layer0, run an ImageSet, and roll to its next version.
//! The story only; the lab it happens in is the `tests` crate's.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use protocol::ids::Name;
use protocol::node::PowerAction;
use tests::artifacts::{Artifacts, example};
use tests::lab::Lab;
use tests::probe::Probe;
use tests::qemu::{Machine, MachineSpec, accelerator};
use tests::server_peer::{Server, ServerSpec};
use tests::story::hello_version;
use tests::{evidence, lab, namespace, prerequisites, wait};

mod keep;
mod report;
mod screen;
mod stage;
mod watch;

use crate::builds;
use report::{NodeReport, Report};
use screen::Screen;

/// The folder of the example that is run.
const EXAMPLE: &str = "zero-downtime-roll";
/// The ImageSet in it.
const SET: &str = "zero-downtime";
/// Where its service listens on a node.
const PORT: u16 = 8080;
/// Name of the demo's evidence.
const EVIDENCE: &str = "demo";
/// How long a node's service may take to answer once its container runs.
const ANSWER: Duration = Duration::from_secs(30);
/// How long a node may take to switch itself off.
const OFF: Duration = Duration::from_secs(60);

/// Boots machines in a private lab, runs an ImageSet on them and rolls it.
#[derive(Debug, Clone, ClapArgs)]
pub(crate) struct Args {
    /// How many machines
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    nodes: u8,
    /// Leave it running until Ctrl-C, and say how to look around
    #[arg(long)]
    keep: bool,
    /// Print the result as one JSON object on stdout, and nothing else there: imageset, from, to, accelerator, took_ms,
    /// and nodes with node, address, phases (phase, ms since power-on), boot_id, pulled_bytes, roll_bytes, blackout_us,
    /// requests, failed, client_gap_ms, before, after
    #[arg(long)]
    json: bool,
    /// Build the server with optimisation: slower to build, nothing to see
    #[arg(long)]
    release: bool,
}

/// A machine and what has been learnt of it.
struct Node {
    machine: Machine,
    /// When its power came on, milliseconds since the Unix epoch: the server's clock is ours.
    started_ms: u64,
    report: NodeReport,
}

/// Runs the demo.
///
/// # Errors
/// What is missing, or where the demo got stuck and where the evidence is; [`wait::Interrupted`] after Ctrl-C.
pub(crate) fn run(args: &Args) -> Result<()> {
    wait::handle_signals()?;
    if !namespace::in_user_namespace() {
        prerequisites::ensure(prerequisites::DEMO)?;
        // Before minutes of building, not after.
        namespace::check_root()?;
        lab::check_network()?;
        builds::everything(args.release)?;
    }
    namespace::become_root()?;
    let artifacts = builds::artifacts(args.release)?;
    evidence::clear(EVIDENCE)?;
    let mut lab = Lab::new()?;
    let result = play(args, &lab, artifacts);
    match result {
        Err(error) if error.downcast_ref::<wait::Interrupted>().is_none() => {
            let kept = lab.keep_evidence(EVIDENCE)?;
            Err(error.context(format!("the demo got stuck; its evidence is in {}", kept.display())))
        }
        other => other,
    }
}

fn play(args: &Args, lab: &Lab, artifacts: Artifacts) -> Result<()> {
    let screen = Screen::new();
    let name: Name = SET.parse().context("the example's name")?;
    screen.say(match accelerator::best() {
        accelerator::Accelerator::Kvm => "machines run with KVM",
        accelerator::Accelerator::Tcg => {
            "machines are emulated (no KVM guest runs here): they boot slower"
        }
    });
    let mut spec = ServerSpec::new(artifacts, args.nodes);
    spec.cmdline.push_str(clock(accelerator::best()));
    let mut server = Server::start(lab, &spec)?;
    screen.say("layercake serve is up: DHCP, TFTP, HTTP boot and the image registry");
    for version in ["v1", "v2"] {
        server.push(lab, &example(EXAMPLE, version))?;
    }
    screen.say(&format!("ImageSets {SET}:1 and {SET}:2 are built and pushed to the registry"));
    server.layercake(
        lab,
        &["roll", "start", "all", "--no-wait", "--imageset", &format!("{SET}:1")],
    )?;
    let power_on = Instant::now();
    let mut nodes = switch_on(lab, args.nodes)?;
    let machines = if args.nodes == 1 { "machine is" } else { "machines are" };
    screen.say(&format!("{} {machines} switched on, with empty disks", nodes.len()));

    watch::until_running(&screen, &mut server, &mut nodes, &name)?;
    for node in &mut nodes {
        node.report.before = ask(&server, node, "1")?;
        screen.say(&format!("{} answers: {}", node.machine.id, node.report.before));
    }
    roll(&screen, &mut server, &mut nodes, &name)?;
    for node in &mut nodes {
        node.report.after = ask(&server, node, "2")?;
        screen.say(&format!("{} answers: {}", node.machine.id, node.report.after));
    }

    let report = Report {
        imageset: SET.to_owned(),
        from: "1".to_owned(),
        to: "2".to_owned(),
        accelerator: accelerator::best().name(),
        took_ms: u64::try_from(power_on.elapsed().as_millis())?,
        nodes: nodes.iter().map(|node| node.report.clone()).collect(),
    };
    if args.keep {
        show(args, &report)?;
        return keep::until_interrupted(lab, &server, &nodes, &spec.artifacts.bin);
    }
    switch_off(&screen, &server, &mut nodes)?;
    show(args, &report)
}

/// The result on stdout; for people also what may come next.
fn show(args: &Args, report: &Report) -> Result<()> {
    if args.json {
        println!("{}", serde_json::to_string_pretty(report)?);
        return Ok(());
    }
    println!("\n{}", report.table());
    let (failed, requests) = report.requests();
    println!("During the roll {failed} failed of {requests} requests.");
    println!(
        "From power-on to {SET}:2 on every node: {}.{} s.",
        report.took_ms / 1000,
        report.took_ms % 1000 / 100
    );
    if !args.keep {
        println!(
            "Next: `cargo xtask demo --keep` leaves the machines running, to look around.\n      \
             `examples/{EXAMPLE}/` is what they ran: change it and run the demo again.\n      \
             README.md says how to boot a real machine."
        );
    }
    Ok(())
}

/// What keeps an emulated machine's clock honest: a loaded host spoils the calibration of the TSC by up to six times.
fn clock(accelerator: accelerator::Accelerator) -> &'static str {
    match accelerator {
        accelerator::Accelerator::Kvm => "",
        accelerator::Accelerator::Tcg => " clocksource=hpet",
    }
}

fn switch_on(lab: &Lab, count: u8) -> Result<Vec<Node>> {
    (1..=count)
        .map(|number| {
            let spec = MachineSpec { reboots: false, ..MachineSpec::netboot(number) };
            let machine = Machine::start(lab, &spec)?;
            let report = NodeReport::new(machine.id.to_string(), machine.address.to_string());
            Ok(Node { machine, started_ms: now_ms()?, report })
        })
        .collect()
}

/// Rolls every node to version 2, with a client at each that asks all the time.
fn roll(screen: &Screen, server: &mut Server, nodes: &mut [Node], name: &Name) -> Result<()> {
    let probes: Vec<Probe> = nodes
        .iter()
        .map(|node| Probe::start(server.client.entrance().clone(), url(node)))
        .collect::<Result<_>>()?;
    let roll = server.client.start_roll(&["all"], &format!("{SET}:2"))?;
    screen.say(&format!("now every node is rolled to {SET}:2, without a reboot"));
    watch::until_rolled(screen, server, nodes, name, roll.id)?;
    for (node, probe) in nodes.iter_mut().zip(probes) {
        let gap = probe.stop()?;
        node.report.client_gap_ms = u64::try_from(gap.longest.as_millis()).ok();
        node.report.requests = Some(gap.answers + gap.failures);
        node.report.failed = Some(gap.failures);
    }
    let total = |of: fn(&NodeReport) -> Option<u64>| -> u64 {
        nodes.iter().filter_map(|node| of(&node.report)).sum()
    };
    let (failed, requests) = (total(|report| report.failed), total(|report| report.requests));
    screen.say(&format!("clients asked all the time: {failed} failed of {requests} requests"));
    Ok(())
}

/// Asks a node's service for its version.
fn ask(server: &Server, node: &mut Node, version: &str) -> Result<String> {
    let (url, id) = (url(node), node.machine.id.clone());
    let what = format!("{url} on {id} to answer with version {version}");
    let mut last = String::new();
    let answer = wait::until(&what, ANSWER, || {
        node.machine.check_alive()?;
        last = match server.client.get_text(&url, Duration::from_secs(5)) {
            Ok(text) => text.trim().to_owned(),
            Err(error) => format!("{error:#}"),
        };
        Ok(hello_version(&last).is_ok_and(|said| said == version).then(|| last.clone()))
    });
    answer.with_context(|| format!("the last answer was: {last}"))
}

fn url(node: &Node) -> String {
    format!("http://{}:{PORT}/", node.machine.address)
}

fn switch_off(screen: &Screen, server: &Server, nodes: &mut [Node]) -> Result<()> {
    for node in &*nodes {
        server.client.power(&node.machine.id, PowerAction::Off)?;
    }
    for node in &mut *nodes {
        node.machine.wait_off(OFF)?;
    }
    screen.say("every machine has switched itself off");
    Ok(())
}

fn now_ms() -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    u64::try_from(now.as_millis()).context("the clock is beyond all reason")
}
