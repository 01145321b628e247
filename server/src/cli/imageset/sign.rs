//! `layercake imageset sign`: a signature for an ImageSet in a registry, and for every manifest in it.

use std::path::PathBuf;

use imagebuilder::sign::{self, key::SigningKey};
use serde_json::json;

use super::registry::{RegistryArgs, wait};
use crate::cli::output::{self, Output};
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The set: a reference, or NAME:VERSION in the server's registry.
    reference: String,
    /// The private key: ECDSA P-256, PKCS#8 in PEM, as `imageset keygen` and `openssl genpkey` write it.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    #[command(flatten)]
    registries: RegistryArgs,
}

pub(crate) fn run(args: &Args, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    let key = SigningKey::read(&args.key)?;
    let reference = args.registries.reference(&args.reference, server)?;
    output::say(&format!("signing {reference}"));
    let signed = wait(sign::sign(&reference, &key, &args.registries.options()?))?;
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
