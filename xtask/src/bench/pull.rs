//! `cargo xtask bench pull`: from a registry on loopback to unpacked layers on tmpfs. CPU seconds are compared (client
//! and its daemon; the registry does not count), wall time and memory stand beside them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tests::artifacts::workspace_root;
use tests::{prerequisites, wait};

use super::figures::{Figure, Samples, Way, figures_table, ways_table};
use super::image::{Image, Variant};
use super::measure::{Bench, Usage};
use super::next::{self, Next};
use super::options::Options;
use super::peers::{self, Job, Peer};
use crate::builds;

/// The bench's name in its figures.
const NAME: &str = "pull";
/// The most memory a pull may hold, MiB, whatever the image's size.
const PEAK_MIB: f64 = 24.0;
/// The most that one large layer may cost, beside the same in six.
const ONE_LAYER: f64 = 1.3;

/// From a registry to unpacked layers: the agent beside podman, skopeo and umoci, containerd, and curl | igzip | tar
///
/// A Debian system image in gzip layers, made once below target/bench, served by Debian's docker-registry on the loopback
/// of a private network namespace, unpacked to tmpfs. Needs root; what is missing is installed on Debian.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// How often each is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    #[command(flatten)]
    options: Options,
}

/// What was measured: each way with the image in six layers, ours with one layer, and the parts by themselves.
#[derive(Debug, Default)]
struct Measured {
    ways: Vec<(Peer, Way)>,
    one_layer: Way,
    floors: Vec<Way>,
    next: Next,
}

/// Runs the bench.
///
/// # Errors
/// What is missing or failed. A missed goal is none.
pub(crate) fn run(args: &Args) -> Result<()> {
    wait::handle_signals()?;
    ensure!(nix::unistd::geteuid().is_root(), "this bench needs root: its peers unpack as root");
    prerequisites::ensure(prerequisites::BENCH_PULL)?;
    let root = workspace_root();
    let agent = args.options.agent(&root)?;
    let cache = root.join("target/bench");
    let image = Image::ensure(&cache)?;
    let bench = Bench::new(&cache)?;
    let data = image.registry_dir();
    std::fs::create_dir_all(&data).with_context(|| data.display().to_string())?;
    let _registry = peers::start_registry(&bench, &data)?;
    image.push(&bench, || builds::server(false), &data)?;
    next::push(&bench, &image, || builds::server(false))?;
    let place = cache.join("tmpfs");
    std::fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
    let mut measured =
        measure(args, &Job { bench: &bench, image: &image, agent: &agent, place: &place })?;
    let figures = figures(&measured);
    let text = report(&image, &agent, &mut measured, &figures)?;
    super::print(&text, &figures, args.options.json);
    Ok(())
}

fn measure(args: &Args, job: &Job<'_>) -> Result<Measured> {
    let mut measured = Measured::default();
    for peer in
        Peer::ALL.into_iter().filter(|peer| *peer == Peer::Agent || !args.options.without_peers)
    {
        let name = peer.versions(job.bench)?;
        measured.ways.push((peer, Way { name, ..Way::default() }));
    }
    measured.one_layer.name = "layercake-agent, one layer".to_owned();
    for round in 1..=args.rounds {
        eprintln!("round {round} of {}", args.rounds);
        for (peer, way) in &mut measured.ways {
            add(way, job.run(*peer, Variant::Six)?);
            wait::check()?;
        }
        add(&mut measured.one_layer, job.run(Peer::Agent, Variant::One)?);
        measured.next.round(job)?;
        for (number, (name, usage)) in job.floors()?.into_iter().enumerate() {
            if measured.floors.len() <= number {
                measured.floors.push(Way { name: format!("floor: {name}"), ..Way::default() });
            }
            let way = measured.floors.get_mut(number).context("a floor")?;
            add(way, usage);
        }
        wait::check()?;
    }
    Ok(measured)
}

pub(super) fn add(way: &mut Way, usage: Usage) {
    way.cpu_s.0.push(usage.cpu_s);
    way.wall_s.0.push(usage.wall_s);
    way.peak_mib.0.push(usage.peak_mib);
}

fn figures(measured: &Measured) -> Vec<Figure> {
    let ours = measured.ways.iter().find(|(peer, _)| *peer == Peer::Agent).map(|(_, way)| way);
    let Some(ours) = ours else { return Vec::new() };
    let mut figures = Vec::new();
    let mut compare = |what: &str, pair: (&Samples, &Samples), peer: &Way, goal: Option<f64>| {
        figures.extend(Figure::beside(NAME, what, pair, &peer.name, "s", goal));
    };
    for (peer, way) in measured.ways.iter().filter(|(peer, _)| *peer != Peer::Agent) {
        let cpu = format!("CPU, beside {}", peer.name());
        compare(&cpu, (&ours.cpu_s, &way.cpu_s), way, peer.goal());
        let wall = format!("wall, beside {}", peer.name());
        compare(&wall, (&ours.wall_s, &way.wall_s), way, None);
    }
    let one = &measured.one_layer;
    compare("CPU, one layer beside six", (&one.cpu_s, &ours.cpu_s), ours, Some(ONE_LAYER));
    compare("wall, one layer beside six", (&one.wall_s, &ours.wall_s), ours, None);
    for floor in &measured.floors {
        compare(&format!("CPU, beside {}", floor.name), (&ours.cpu_s, &floor.cpu_s), floor, None);
    }
    for (what, way) in [("peak memory, six layers", ours), ("peak memory, one layer", one)] {
        figures.extend(Figure::below(NAME, what, &way.peak_mib, "MiB", PEAK_MIB));
    }
    figures.extend(measured.next.figures(NAME));
    figures
}

fn report(
    image: &Image,
    agent: &Path,
    measured: &mut Measured,
    figures: &[Figure],
) -> Result<String> {
    let size = std::fs::metadata(agent).with_context(|| agent.display().to_string())?.len();
    let mut ways: Vec<&Way> = measured.ways.iter().map(|(_, way)| way).collect();
    ways.push(&measured.one_layer);
    ways.extend(measured.next.ways());
    ways.extend(&measured.floors);
    Ok(format!(
        "{}.\nAgent of {size} bytes. Median (min-max) of client and daemon; the registry does not count.\n\n{}\n{}",
        image.describe()?,
        ways_table(&ways),
        figures_table(figures)
    ))
}

#[cfg(test)]
mod tests_of_figures {
    use super::*;

    fn way(name: &str, cpu_s: f64, peak_mib: f64) -> Way {
        let one = |value| Samples(vec![value]);
        Way { name: name.into(), cpu_s: one(cpu_s), wall_s: one(1.0), peak_mib: one(peak_mib) }
    }

    #[test]
    fn every_goal_of_a_pull_is_judged_once() {
        let mut measured = Measured { one_layer: way("one", 1.3, 30.0), ..Measured::default() };
        for peer in Peer::ALL {
            let cpu = if peer == Peer::Agent { 1.0 } else { 10.0 };
            measured.ways.push((peer, way(peer.name(), cpu, 10.0)));
        }
        let judged: Vec<(String, bool)> = figures(&measured)
            .into_iter()
            .filter_map(|figure| Some((figure.figure, figure.met?)))
            .collect();
        let judged: Vec<(&str, bool)> = judged.iter().map(|(what, met)| (&**what, *met)).collect();
        assert_eq!(
            judged,
            [
                ("CPU, beside podman pull", true),
                ("CPU, beside skopeo copy + umoci unpack", true),
                ("CPU, beside ctr images pull", true),
                ("CPU, beside curl | igzip | tar", true),
                ("CPU, one layer beside six", true),
                ("peak memory, six layers", true),
                ("peak memory, one layer", false),
            ]
        );
    }
}
