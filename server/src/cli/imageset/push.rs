//! `layercake imageset push`: a description to a registry.

use std::path::PathBuf;

use anyhow::Context;
use imagebuilder::push::{self, Progress};
use serde_json::json;

use super::build::{MountArgs, build_set};
use super::registry::{RegistryArgs, bar, wait};
use crate::cli::output::{self, Output, bytes};
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Its description, imageset.toml.
    file: PathBuf,
    /// Another registry than the server's own, with a prefix for the repository where it needs one:
    /// HOST:PORT/PREFIX, or with http:// for a registry without TLS.
    #[arg(long, value_name = "URL")]
    to: Option<String>,
    #[command(flatten)]
    mount: MountArgs,
    #[command(flatten)]
    registries: RegistryArgs,
}

pub(super) fn run(args: &Args, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    let options = args.registries.options()?;
    let scratch = tempfile::tempdir().context("a temporary directory cannot be made")?;
    let built = wait(build_set(&args.file, &scratch.path().join("layout"), &args.mount, &options))?;
    let name = format!("{}:{}", built.set.name, built.set.version);
    let name = match &args.to {
        Some(prefix) => format!("{}/{name}", prefix.trim_end_matches('/')),
        None => name,
    };
    let reference = args.registries.reference(&name, server)?;
    output::say(&format!("pushing to {reference}"));
    let (bar, on_progress) = bar("pushing");
    let pushed = wait(push::push(&built, &reference, &options, on_progress));
    bar.finish_and_clear();
    let pushed = pushed?;
    let Progress { sent, skipped, .. } = pushed.progress;
    let value = json!({
        "name": built.set.name, "version": built.set.version, "digest": pushed.digest,
        "reference": pushed.reference, "bytes_sent": sent, "bytes_skipped": skipped,
    });
    let (sent, skipped) = (bytes(sent), bytes(skipped));
    output.result(&value, || format!("{}\n{sent} sent, {skipped} were there", pushed.reference))
}
