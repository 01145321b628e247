//! `cargo xtask bench NAME`: we and the peers measured in one run, interleaved; medians with their ranges. One file a
//! bench; what they share lies beside them.

mod figures;
mod image;
mod load;
mod measure;
mod next;
mod peers;
mod pull;
mod push;
mod registry;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;

use figures::Figure;

/// The benches.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Registry to unpacked image: the agent beside podman, skopeo and umoci, containerd, and curl | igzip | tar
    Pull(pull::Args),
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
