//! `cargo xtask bench layer0`: what Layer0 costs. Its initramfs beside those of initramfs-tools and dracut, and the floor: a
//! static init that only loads its modules and does DHCP; the same kernel, the same QEMU, interleaved. Then its own kernel
//! beside Debian's, the time that build-image takes, and what agent and PID 1 hold and do when nothing happens.

mod boot;
mod builds;
mod idle;
mod images;
mod peers;
mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tests::artifacts::workspace_root;
use tests::{prerequisites, wait};

use super::figures::Samples;
use super::options::Options;
use crate::build_image::target_dir;
use boot::{Boots, Seen};
use builds::Builds;
use idle::Idle;
use images::{Contestant, Images};
use peers::Peers;

/// The bench's name in its figures.
const NAME: &str = "layer0";

/// What Layer0 costs: sizes, boot times and memory beside initramfs-tools, dracut and the floor; builds; idle
///
/// The peers are built by Debian's own packages in a system made by mmdebstrap, kept under target/bench; every machine is
/// watched by the same probe. Needs root; what is missing is installed on Debian. CPU seconds are QEMU's, and steadier than
/// times where a machine is emulated.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// How often each boots
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// Leave out what is built and timed: build-image, and sizes of other flavours
    #[arg(long)]
    without_builds: bool,
    /// The size of the hw flavour, too, whose kernel is compiled for half an hour when it is not in the cache
    #[arg(long)]
    hw: bool,
    /// Leave out the two minutes in which an idle node is watched
    #[arg(long)]
    without_idle: bool,
    /// Use this boot server instead of building one, for the idle node
    #[arg(long, value_name = "FILE")]
    server: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

/// What was measured.
#[derive(Debug, Default)]
struct Measured {
    /// The boots of each, in the order of [`Contestant::ALL`].
    boots: Vec<(Contestant, Boots)>,
    /// Names with versions.
    names: Vec<(Contestant, String)>,
    builds: Builds,
    idle: Option<Idle>,
}

impl Measured {
    fn boots(&self, of: Contestant) -> Option<&Boots> {
        self.boots.iter().find(|(who, _)| *who == of).map(|(_, boots)| boots)
    }

    fn name(&self, of: Contestant) -> &str {
        let found = self.names.iter().find(|(who, _)| *who == of);
        found.map_or(of.name(), |(_, name)| name)
    }
}

/// Runs the bench.
///
/// # Errors
/// What is missing or failed. A missed goal is none.
pub(crate) fn run(args: &Args) -> Result<()> {
    wait::handle_signals()?;
    ensure!(nix::unistd::geteuid().is_root(), "this bench needs root: it makes other systems");
    prerequisites::ensure(prerequisites::BENCH_LAYER0)?;
    let root = workspace_root();
    let agent = args.options.agent(&root)?;
    let dir = target_dir(&root).join("bench/layer0");
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let mut measured = Measured::default();
    let images = Images::new(&dir, &agent)?;
    let peers = match args.options.without_peers {
        true => None,
        false => Some(Peers::ensure(&dir, &images.kernel)?),
    };
    if !args.without_builds {
        builds::measure(&dir, &agent, args.hw, &mut measured.builds)?;
    }
    for contestant in Contestant::ALL {
        let file = match (contestant.is_peer(), &peers) {
            (true, None) => continue,
            (true, Some(peers)) => {
                let built = peers.build(contestant)?;
                measured.builds.peers.push((contestant, built.took));
                measured.names.push((contestant, built.name));
                images.take(contestant, &built.file)?
            }
            (false, _) => images.make(contestant)?,
        };
        measured.builds.sizes.push((contestant.name().to_owned(), file.size));
        measured.boots.push((contestant, Boots::new(file)));
    }
    boot_all(args, &mut measured)?;
    if !args.without_idle {
        measured.idle = Some(idle::measure(&dir, &images, args.server.as_deref())?);
    }
    let figures = report::figures(&measured);
    super::print(&report::text(&agent, &measured, &figures)?, &figures, args.options.json);
    Ok(())
}

/// Every contestant once a round, so that a busy minute of this machine is everybody's.
fn boot_all(args: &Args, measured: &mut Measured) -> Result<()> {
    for round in 1..=args.rounds {
        for (contestant, boots) in &mut measured.boots {
            eprintln!("boot: round {round} of {}, {}", args.rounds, contestant.name());
            let Seen { init, address, agent, used_kib } = boot::once(*contestant, &boots.image)?;
            boots.init_to_address_s.0.push((address.at - init.at).as_secs_f64());
            boots.init_to_address_cpu_s.0.push(address.cpu_s - init.cpu_s);
            boots.start_to_address_s.0.push(address.at.as_secs_f64());
            boots.start_to_address_cpu_s.0.push(address.cpu_s);
            boots.used_mib.0.push(used_kib / 1024.0);
            if let Some(agent) = agent {
                boots.start_to_agent_cpu_s.0.push(agent.cpu_s);
                boots.start_to_agent_s.0.push(agent.at.as_secs_f64());
            }
            wait::check()?;
        }
    }
    Ok(())
}

/// One sample.
fn one(value: f64) -> Samples {
    Samples(vec![value])
}

/// Bytes as MiB.
#[expect(clippy::cast_precision_loss, reason = "sizes of files lie far below 2^52")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The size of a file.
fn size(file: &Path) -> Result<u64> {
    Ok(std::fs::metadata(file).with_context(|| file.display().to_string())?.len())
}
