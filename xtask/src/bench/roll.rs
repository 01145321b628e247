//! `cargo xtask bench roll`: how long a service is away when it is replaced, handed over, killed; what a restart of the agent
//! costs; how long a container takes to start. The agent runs on this machine without Layer0, the boot server beside it.

mod client;
mod ours;
mod peers;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::artifacts::{Artifacts, workspace_root};
use tests::lab::Lab;
use tests::{prerequisites, wait};

use super::figures::{Figure, Samples, figures_table};
use super::options::Options;
use crate::{agent_build, builds};
use client::{Client, Seen};
use ours::{Ours, Set};
use peers::{Podman, RUNTIMES, Runtime};

/// The bench's name in its figures.
const NAME: &str = "roll";
/// What a roll by replacement may take of podman's stop and run, and at most, milliseconds.
const REPLACE_RATIO: f64 = 0.1;
const REPLACE_MS: f64 = 20.0;
/// The least number of requests that handovers must not cost one of.
const REQUESTS: usize = 20_000;
/// What a killed container may be away, milliseconds.
const KILLED_MS: f64 = 100.0;
/// What a new agent may take to adopt what runs, milliseconds.
const ADOPT_MS: f64 = 1000.0;
/// Most rounds of a measurement that must wait long between two.
const MOST_KILLS: u16 = 10;
/// How long is looked after a change for a gap that it made.
const SETTLE: Duration = Duration::from_millis(150);

/// Replaced at each roll: it ends at once when it is asked to.
const REPLACED: Set = Set { name: "bench-replace", port: 18_091, strategy: "replace" };
/// Handed over at each roll: it drains.
const HANDED: Set = Set { name: "bench-handover", port: 18_092, strategy: "handover" };

/// How long a service is away: replaced beside podman's stop and run, handed over, killed; and how long starts take
///
/// The agent as it is shipped, standalone on this machine, with the boot server in a private network namespace; the hello
/// example is what is rolled. A client asks once a millisecond; a gap is the longest time from one answer to the next. Needs
/// root; what is missing is installed on Debian.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// How often each is measured
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    #[command(flatten)]
    options: Options,
    /// Start containers by this program instead of building it (example `start` of package agent)
    #[arg(long, value_name = "FILE")]
    starter: Option<PathBuf>,
    /// Use this boot server instead of building one
    #[arg(long, value_name = "FILE")]
    server: Option<PathBuf>,
}

/// What was measured, milliseconds unless said otherwise.
#[derive(Debug, Default)]
struct Measured {
    replace_gap: Samples,
    replace_own: Samples,
    podman_gap: Samples,
    podman: String,
    handover: Seen,
    handover_gap: Samples,
    killed_gap: Samples,
    adopt: Samples,
    /// Requests that failed while agents were killed and started.
    adopt_failed: usize,
    start: Samples,
    runtimes: Vec<(String, Samples)>,
}

/// Runs the bench.
///
/// # Errors
/// What is missing or failed. A missed goal is none.
pub(crate) fn run(args: &Args) -> Result<()> {
    wait::handle_signals()?;
    ensure!(nix::unistd::geteuid().is_root(), "this bench needs root: it runs containers");
    prerequisites::ensure(prerequisites::BENCH_ROLL)?;
    let root = workspace_root();
    let agent = args.options.agent(&root)?;
    let bin = match &args.server {
        Some(server) => server.canonicalize().with_context(|| server.display().to_string())?,
        None => builds::server(false)?,
    };
    builds::hello()?;
    let starter = match &args.starter {
        Some(starter) => starter.canonicalize().with_context(|| starter.display().to_string())?,
        None => agent_build::starter(&root)?,
    };
    let artifacts =
        Artifacts { bin, layer0: root.join("out/layer0"), examples: root.join("target/examples") };
    let lab = Lab::new()?;
    // The lab's own view of /sys has no control groups in it; the host's, which lies below, has those that runc wants.
    lab.namespace().run("umount", &["/sys"])?;
    allow_crun(&lab)?;
    let mut measured = Measured::default();
    rolls(args, &lab, &artifacts, &agent, &mut measured)?;
    starts(args, &lab, &agent, &starter, &mut measured)?;
    let figures = figures(&measured);
    let text = report(&agent, &measured, &figures)?;
    if args.options.json {
        eprint!("{text}");
        for figure in &figures {
            println!("{}", figure.json());
        }
    } else {
        print!("{text}");
    }
    Ok(())
}

/// crun refuses a hybrid hierarchy with a controller in its second version: the one that the build machines have there is
/// taken into the first for as long as the lab lives. Elsewhere there is nothing to do.
fn allow_crun(lab: &Lab) -> Result<()> {
    let script = "[ -e /sys/fs/cgroup/cgroup.controllers ] || { mkdir -p /sys/fs/cgroup/hugetlb && \
                  mount -t cgroup -o hugetlb none /sys/fs/cgroup/hugetlb; }";
    lab.namespace().run("sh", &["-c", script]).map(drop)
}

/// Everything that needs the agent: replaced, handed over, killed, adopted.
fn rolls(
    args: &Args,
    lab: &Lab,
    artifacts: &Artifacts,
    agent: &Path,
    measured: &mut Measured,
) -> Result<()> {
    let mut ours = Ours::start(lab, artifacts, agent)?;
    for set in [REPLACED, HANDED] {
        ours.introduce(set, &artifacts.hello())?;
    }
    let mut podman = match args.options.without_peers {
        true => None,
        false => Some(Podman::start(lab, REPLACED.name)?),
    };
    if let Some(podman) = &podman {
        measured.podman = podman.versions()?;
    }
    let entrance = lab.entrance();
    let client = Client::start(entrance.clone(), REPLACED.address())?;
    let of_podman = Client::start(entrance.clone(), Podman::address())?;
    for round in 1..=args.rounds {
        eprintln!("replace: round {round} of {}", args.rounds);
        let version = version(round);
        wait::pause(SETTLE)?;
        let begun = Instant::now();
        let set = ours.roll(REPLACED, version)?;
        wait::pause(SETTLE)?;
        measured.replace_gap.0.push(ms(client.since(begun).gap));
        let own = set.last_roll.and_then(|roll| roll.blackout_us).context("no blackout")?;
        measured.replace_own.0.push(ms(Duration::from_micros(own)));
        if let Some(podman) = &mut podman {
            let begun = Instant::now();
            podman.roll(version)?;
            wait::pause(SETTLE)?;
            measured.podman_gap.0.push(ms(of_podman.since(begun).gap));
        }
    }
    of_podman.end()?;
    drop(podman);
    killed(args, &ours, &client, measured)?;
    adopted(args, &mut ours, &client, measured)?;
    client.end()?;
    handed_over(args, lab, &ours, measured)
}

/// Versions change from 1 to 2 and back.
fn version(round: u16) -> &'static str {
    if round.is_multiple_of(2) { "1" } else { "2" }
}

fn handed_over(args: &Args, lab: &Lab, ours: &Ours<'_>, measured: &mut Measured) -> Result<()> {
    let client = Client::start(lab.entrance(), HANDED.address())?;
    let start = Instant::now();
    for round in 1..=args.rounds {
        eprintln!("handover: round {round} of {}", args.rounds);
        let begun = Instant::now();
        ours.roll(HANDED, version(round))?;
        wait::pause(SETTLE)?;
        measured.handover_gap.0.push(ms(client.since(begun).gap));
    }
    while client.since(start).requests < REQUESTS {
        wait::pause(SETTLE)?;
    }
    measured.handover = client.since(start);
    client.end()
}

fn killed(args: &Args, ours: &Ours<'_>, client: &Client, measured: &mut Measured) -> Result<()> {
    let rounds = args.rounds.min(MOST_KILLS);
    for round in 1..=rounds {
        eprintln!("kill -9 of the container: round {round} of {rounds}");
        // A program that ends again and again is given a growing pause: not what is measured here.
        wait::pause(ours::GOOD_RUN)?;
        let (begun, pid) = ours.kill_container(REPLACED)?;
        ours.wait_for_another(REPLACED, pid)?;
        wait::pause(SETTLE)?;
        measured.killed_gap.0.push(ms(client.since(begun).gap));
    }
    Ok(())
}

fn adopted(
    args: &Args,
    ours: &mut Ours<'_>,
    client: &Client,
    measured: &mut Measured,
) -> Result<()> {
    let start = Instant::now();
    for round in 1..=args.rounds {
        eprintln!("kill -9 of the agent: round {round} of {}", args.rounds);
        measured.adopt.0.push(ms(ours.restart_agent(REPLACED)?));
        wait::pause(SETTLE)?;
    }
    measured.adopt_failed = client.since(start).failed;
    Ok(())
}

/// Starts from a root that is there: ours in turn with the runtimes.
fn starts(
    args: &Args,
    lab: &Lab,
    agent: &Path,
    starter: &Path,
    measured: &mut Measured,
) -> Result<()> {
    let bundle = lab.dir().join("bundle");
    std::fs::create_dir_all(&bundle).context("the bundle")?;
    let rootfs = peers::make_bundle(lab, &bundle)?;
    let runtimes: &[Runtime] = if args.options.without_peers { &[] } else { &RUNTIMES };
    for runtime in runtimes {
        measured.runtimes.push((runtime.version(lab)?, Samples::default()));
    }
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not UTF-8");
    // What each notes of its containers lies in memory, as it does on a node.
    let state = lab.dir().join("state");
    std::fs::create_dir_all(&state).context("the place for states")?;
    let place = text(&state)?;
    lab.namespace().run("mount", &["-t", "tmpfs", "-o", "mode=755", "bench", &place])?;
    let run_dir = text(&state.join("ours"))?;
    for round in 1..=args.rounds {
        eprintln!("start: round {round} of {}", args.rounds);
        // Of two in one process the second: the agent that starts containers has been there for long.
        let said = lab
            .namespace()
            .run(&text(starter)?, &[&text(agent)?, &run_dir, &text(&rootfs)?, "2"])?;
        let us: f64 = said.lines().last().context("no figure")?.parse()?;
        measured.start.0.push(us / 1000.0);
        for (runtime, (_, samples)) in runtimes.iter().zip(&mut measured.runtimes) {
            samples.0.push(ms(runtime.start(lab, &state, &bundle, round.into())?));
        }
    }
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn figures(measured: &Measured) -> Vec<Figure> {
    let mut figures = Vec::new();
    let gaps = (&measured.replace_gap, &measured.podman_gap);
    let what = "replace: client's gap, beside podman's";
    figures.extend(Figure::beside(NAME, what, gaps, &measured.podman, "ms", Some(REPLACE_RATIO)));
    let mut below = |what: &str, samples: &Samples, unit, limit| {
        figures.extend(Figure::below(NAME, what, samples, unit, limit));
    };
    below("replace: client's gap, the worst", &measured.replace_gap, "ms", REPLACE_MS);
    below("replace: the agent's own figure, the worst", &measured.replace_own, "ms", REPLACE_MS);
    let count = |count: usize| Samples(vec![f64::from(u32::try_from(count).unwrap_or(u32::MAX))]);
    let what = format!("handover: failed of {} requests", measured.handover.requests);
    below(&what, &count(measured.handover.failed), "requests", 1.0);
    below(
        "kill -9 of the container: client's gap, the worst",
        &measured.killed_gap,
        "ms",
        KILLED_MS,
    );
    below("kill -9 of the agent: adopted after, the worst", &measured.adopt, "ms", ADOPT_MS);
    let what = "kill -9 of the agent: failed requests";
    below(what, &count(measured.adopt_failed), "requests", 1.0);
    for (name, samples) in &measured.runtimes {
        let what = format!("start of a container, beside {name}");
        let pair = (&measured.start, samples);
        figures.extend(Figure::beside(NAME, &what, pair, name, "ms", Some(1.0)));
    }
    figures
}

fn report(agent: &Path, measured: &Measured, figures: &[Figure]) -> Result<String> {
    let size = std::fs::metadata(agent).with_context(|| agent.display().to_string())?.len();
    let mut rows = vec![
        ("replace, client's gap", &measured.replace_gap),
        ("replace, the agent's own figure", &measured.replace_own),
        ("handover, client's gap", &measured.handover_gap),
        ("kill -9 of the container, client's gap", &measured.killed_gap),
        ("kill -9 of the agent, adopted after", &measured.adopt),
        ("start of a container", &measured.start),
        (measured.podman.as_str(), &measured.podman_gap),
    ];
    rows.extend(measured.runtimes.iter().map(|(name, samples)| (name.as_str(), samples)));
    Ok(format!(
        "Agent of {size} bytes, standalone. Median (min-max), milliseconds.\n\n{}\n{}",
        super::figures::samples_table(&rows),
        figures_table(figures)
    ))
}

#[cfg(test)]
mod tests_of_figures {
    use super::*;

    #[test]
    fn every_goal_of_a_roll_is_judged_once() {
        let one = |value| Samples(vec![value]);
        let measured = Measured {
            replace_gap: one(6.0),
            replace_own: one(3.0),
            podman_gap: one(500.0),
            podman: "podman".to_owned(),
            handover: Seen { requests: 20_000, failed: 1, gap: Duration::ZERO },
            killed_gap: one(120.0),
            adopt: one(200.0),
            start: one(10.0),
            runtimes: vec![("runc 1".to_owned(), one(40.0)), ("crun 1".to_owned(), one(9.0))],
            ..Measured::default()
        };
        let judged: Vec<Option<bool>> = figures(&measured).iter().map(|it| it.met).collect();
        let expected = [true, true, true, false, false, true, true, true, false];
        assert_eq!(judged, expected.map(Some));
    }
}
