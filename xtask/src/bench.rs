//! `cargo xtask bench NAME`: we and the peers measured in one run, interleaved; medians with their ranges. One file a
//! bench; what they share lies beside them.

mod figures;
mod image;
mod measure;
mod peers;
mod pull;
mod roll;

use clap::Subcommand;

/// The benches.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Registry to unpacked image: the agent beside podman, skopeo and umoci, containerd, and curl | igzip | tar
    Pull(pull::Args),
    /// How long a service is away: replaced beside podman's stop and run, handed over, killed; and how long starts take
    Roll(roll::Args),
}

/// Runs a bench.
///
/// # Errors
/// What is missing and the command that installs it, or what failed; a goal that is missed is no error.
pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Pull(args) => pull::run(args),
        Bench::Roll(args) => roll::run(args),
    }
}
