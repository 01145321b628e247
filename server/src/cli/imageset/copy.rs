//! `layercake imageset copy` and `pull`: a set from one place to another, byte for byte.

use std::path::PathBuf;

use imagebuilder::client::Options;
use imagebuilder::place::Place;
use imagebuilder::transfer;
use serde_json::json;

use super::registry::{RegistryArgs, bar, wait};
use crate::cli::output::{self, Output, bytes};
use crate::config::values::BaseUrl;

/// Of `copy`.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The set: a reference, NAME:VERSION in the server's registry, or a layout (DIR, oci:DIR:VERSION).
    source: String,
    /// Where it goes: a reference, or a layout. The set's version is its tag; another tag is set beside it.
    destination: String,
    #[command(flatten)]
    registries: RegistryArgs,
}

/// Of `pull`.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct PullArgs {
    /// The set: a reference, or NAME:VERSION in the server's registry.
    reference: String,
    /// Directory of the layout; made when it is not there, added to when it is.
    dir: PathBuf,
    #[command(flatten)]
    registries: RegistryArgs,
}

pub(super) fn run(args: &Args, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    let from = args.registries.place(&args.source, server)?;
    let to = args.registries.place(&args.destination, server)?;
    transfer("copying", &from, &to, &args.registries.options()?, output)
}

pub(super) fn pull(args: &PullArgs, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    let from = Place::Registry(args.registries.reference(&args.reference, server)?);
    let to = Place::Layout { path: args.dir.clone(), tag: None };
    transfer("pulling", &from, &to, &args.registries.options()?, output)
}

fn transfer(
    verb: &'static str,
    from: &Place,
    to: &Place,
    options: &Options,
    output: Output,
) -> anyhow::Result<()> {
    output::say(&format!("{verb} {from} to {to}"));
    let (bar, on_progress) = bar(verb);
    let done = wait(transfer::copy(from, to, options, on_progress));
    bar.finish_and_clear();
    let done = done?;
    let (moved, there) = (done.progress.sent, done.progress.skipped);
    let value = json!({
        "name": done.set.name, "version": done.set.version, "digest": done.digest,
        "from": from.to_string(), "to": to.to_string(), "signatures": done.signatures,
        "bytes_moved": moved, "bytes_there": there,
    });
    output.result(&value, || {
        let (name, version, digest) = (&done.set.name, &done.set.version, done.digest);
        let signatures = done.signatures;
        let (moved, there) = (bytes(moved), bytes(there));
        format!(
            "{name}:{version} {digest} in {to}\n{moved} moved, {there} were there, {signatures} signatures"
        )
    })
}
