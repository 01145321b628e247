//! `cargo xtask bench push`: an ImageSet from an OCI layout to an empty registry, by us and by `skopeo copy --all`. CPU
//! seconds of the client are compared; the registry does not count.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tests::artifacts::workspace_root;
use tests::{prerequisites, wait};

use super::figures::{Figure, Way, figures_table, ways_table};
use super::image::{Image, REGISTRY, Variant};
use super::measure::Bench;
use super::{peers, pull};

/// The bench's name in its figures.
const NAME: &str = "push";
/// The most that we may cost, beside skopeo.
const GOAL: f64 = 1.1;

/// From an OCI layout to a registry: layercake imageset copy beside skopeo copy --all
///
/// The image of `bench pull` as an ImageSet in an OCI layout, pushed to Debian's docker-registry, which is empty and on tmpfs.
/// Needs root.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// How often each is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Print the figures as JSON, one a line; the table goes to stderr
    #[arg(long)]
    json: bool,
    /// Measure this `layercake` instead of building one
    #[arg(long, value_name = "FILE")]
    layercake: Option<PathBuf>,
}

/// Runs the bench.
///
/// # Errors
/// What is missing or failed. A missed goal is none.
pub(crate) fn run(args: &Args) -> Result<()> {
    wait::handle_signals()?;
    ensure!(nix::unistd::geteuid().is_root(), "this bench needs root: it mounts a tmpfs");
    prerequisites::ensure(prerequisites::BENCH_PULL)?;
    let cache = workspace_root().join("target/bench");
    let image = Image::ensure(&cache)?;
    let bench = Bench::new(&cache)?;
    let layercake = super::layercake(args.layercake.as_deref())?;
    let layout = image.set_layout(&layercake)?;
    let place = cache.join("tmpfs");
    std::fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
    let skopeo = bench.run("dpkg-query", &["-W", "-f", "${Version}", "skopeo"])?;
    let mut ours =
        Way { name: format!("layercake {}", env!("CARGO_PKG_VERSION")), ..Way::default() };
    let mut theirs = Way { name: format!("skopeo copy --all (skopeo {skopeo})"), ..Way::default() };
    let name = Variant::Six.name();
    let layout = layout.to_str().context("a path that is not UTF-8")?;
    let (from, to) = (format!("oci:{layout}:1"), format!("docker://{REGISTRY}/{name}:1"));
    let target = format!("http://{REGISTRY}/{name}");
    for round in 1..=args.rounds {
        eprintln!("round {round} of {}", args.rounds);
        let words = ["imageset", "copy", layout, &target];
        push(&bench, &place, &mut ours, &layercake, &words)?;
        let words = ["copy", "--all", "--quiet", "--dest-tls-verify=false", &from, &to];
        push(&bench, &place, &mut theirs, Path::new("skopeo"), &words)?;
    }
    let mut figures = Vec::new();
    for (what, ours, of_peer, goal) in [
        ("CPU, beside skopeo copy", &ours.cpu_s, &theirs.cpu_s, Some(GOAL)),
        ("wall, beside skopeo copy", &ours.wall_s, &theirs.wall_s, Some(GOAL)),
    ] {
        figures.extend(Figure::beside(NAME, what, (ours, of_peer), &theirs.name, "s", goal));
    }
    let text = format!(
        "{}.\nMedian (min-max) of the client; the registry does not count.\n\n{}\n{}",
        image.describe()?,
        ways_table(&[&ours, &theirs]),
        figures_table(&figures)
    );
    super::print(&text, &figures, args.json);
    Ok(())
}

/// One push to a registry that is empty and goes again.
fn push(bench: &Bench, place: &Path, way: &mut Way, program: &Path, words: &[&str]) -> Result<()> {
    bench.fresh_tmpfs(place)?;
    let mut registry = peers::start_registry(bench, &place.join("registry"))?;
    pull::add(way, bench.measure(&peers::argv(&[program], words))?);
    registry.stop()?;
    wait::check()
}
