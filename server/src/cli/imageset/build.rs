//! `layercake imageset build`: a description to an OCI layout.

use std::path::{Path, PathBuf};

use imagebuilder::build::{self, BuiltSet};
use imagebuilder::client::Options;
use imagebuilder::description;
use serde_json::json;

use super::registry::{RegistryArgs, wait};
use crate::cli::output::{self, Output};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Its description, imageset.toml.
    file: PathBuf,
    /// Directory of the layout; made when it is not there, added to when it is.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    registries: RegistryArgs,
}

pub(super) fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    let built = wait(build_set(&args.file, &args.out, &args.registries.options()?))?;
    let (set, digest) = (&built.set, built.index.digest);
    let value = json!({
        "name": set.name, "version": set.version, "digest": digest, "layout": args.out,
    });
    output.result(&value, || {
        format!("{}:{} {digest} in {}", set.name, set.version, args.out.display())
    })
}

pub(super) async fn build_set(
    file: &Path,
    out: &Path,
    options: &Options,
) -> anyhow::Result<BuiltSet> {
    let source = description::load(file)?;
    output::say(&format!("building {}:{}", source.set.name, source.set.version));
    Ok(build::to_layout(&source, out, options).await?)
}
