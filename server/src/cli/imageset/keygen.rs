//! `layercake imageset keygen`: a key pair for signatures.

use std::path::PathBuf;

use imagebuilder::sign::key;
use serde_json::json;

use crate::cli::output::Output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the pair goes: PREFIX.key, the private key, readable by its owner alone and not encrypted, and PREFIX.pem, the
    /// public key. Files that are there are not written over.
    #[arg(value_name = "PREFIX", default_value = "layercake")]
    prefix: PathBuf,
}

pub(crate) fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    let files = key::generate(&args.prefix)?;
    let fingerprint = files.key.fingerprint();
    let value = json!({
        "private": files.private, "public": files.public, "fingerprint": fingerprint,
    });
    output.result(&value, || {
        format!(
            "private key {}: keep it from everybody who may not sign\n\
             public key  {}: give it to nodes with `cargo xtask build-image --imageset-key`\n\
             fingerprint {fingerprint}",
            files.private.display(),
            files.public.display()
        )
    })
}
