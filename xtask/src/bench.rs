//! `cargo xtask bench NAME`: we and the peers measured in one run, interleaved; medians with their ranges. One file a
//! bench; what they share lies beside them.

mod figures;
mod image;
mod layer0;
mod load;
mod measure;
mod mount;
mod next;
mod options;
mod peers;
mod pull;
mod push;
mod registry;
mod roll;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;

use figures::Figure;

/// The benches.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Registry to unpacked image: the agent beside podman, skopeo and umoci, containerd, and curl | igzip | tar
    Pull(pull::Args),
    /// Registry to mounted root: the image as squashfs and EROFS beside its layers and podman pull
    Mount(mount::Args),
    /// How long a service is away: replaced beside podman's stop and run, handed over, killed; and how long starts take
    Roll(roll::Args),
    /// Layer0 itself: sizes, boots and memory beside initramfs-tools, dracut and the floor; builds; idle
    Layer0(layer0::Args),
    /// OCI layout to registry: layercake imageset copy beside skopeo copy --all
    Push(push::Args),
    /// The embedded registry: serving blobs beside nginx, taking pushes beside docker-registry
    Registry(registry::Args),
}

/// Runs a bench.
///
/// # Errors
/// What is missing and the command that installs it, or what failed; a goal that is missed is no error.
pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Pull(args) => pull::run(args),
        Bench::Mount(args) => mount::run(args),
        Bench::Roll(args) => roll::run(args),
        Bench::Layer0(args) => layer0::run(args),
        Bench::Push(args) => push::run(args),
        Bench::Registry(args) => registry::run(args),
    }
}

/// The `layercake` that was named, or else one that is built as it is shipped.
fn layercake(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    match named {
        Some(file) => file.canonicalize().with_context(|| file.display().to_string()),
        None => crate::builds::server(true),
    }
}

/// The table on stdout; or the figures as JSON, one a line, and the table on stderr.
fn print(text: &str, figures: &[Figure], json: bool) {
    if !json {
        print!("{text}");
        return;
    }
    eprint!("{text}");
    for figure in figures {
        println!("{}", figure.json());
    }
}
