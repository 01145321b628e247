//! `layercake imageset sign`: a signature for an ImageSet in a registry, and for every manifest in it.

use std::path::PathBuf;

use imagebuilder::client::Options;
use imagebuilder::sign::{self, key::SigningKey};
use serde_json::json;

use super::target::{Target, block_on};
use crate::cli::output::{self, Output};
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// The private key: ECDSA P-256, PKCS#8 in PEM, as `imageset keygen` and `openssl genpkey` write it.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
}

pub(crate) fn run(args: &Args, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    let key = SigningKey::read(&args.key)?;
    let reference = args.target.reference(server)?;
    output::say(&format!("signing {reference}"));
    let signed = block_on(sign::sign(&reference, &key, &Options::default()))??;
    let value = json!({
        "reference": signed.reference, "fingerprint": key.public().fingerprint(),
        "added": signed.added, "kept": signed.kept,
    });
    output.result(&value, || {
        let (added, kept) = (signed.added.len(), signed.kept.len());
        format!(
            "{}\n{added} signatures by {} added, {kept} were there",
            signed.reference,
            key.public()
        )
    })
}
