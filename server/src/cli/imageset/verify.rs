//! `layercake imageset verify`: whether an ImageSet in a registry is signed by one of these keys.

use std::path::PathBuf;

use anyhow::bail;
use imagebuilder::sign::{self, Checked, Verified, key};
use protocol::signature::PublicKey;
use serde_json::{Value, json};

use super::registry::{RegistryArgs, wait};
use crate::cli::output::{Output, table};
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The set: a reference, or NAME:VERSION in the server's registry.
    reference: String,
    /// A public key, PEM; repeatable: one good signature by any of them is enough.
    #[arg(long, value_name = "FILE", required = true)]
    key: Vec<PathBuf>,
    /// Look at the index's signature alone, as a node does, not at those of the manifests in it.
    #[arg(long)]
    index_only: bool,
    #[command(flatten)]
    registries: RegistryArgs,
}

pub(crate) fn run(args: &Args, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    let keys = args.key.iter().map(|path| key::read_public(path));
    let keys: Vec<PublicKey> = keys.collect::<Result<_, _>>()?;
    let reference = args.registries.reference(&args.reference, server)?;
    let whole = !args.index_only;
    let verified = wait(sign::verify(&reference, &keys, whole, &args.registries.options()?))?;
    output.result(&value(&verified), || text(&verified))?;
    if !verified.is_good() {
        let bad = verified.checked.iter().filter(|checked| checked.verdict.is_err()).count();
        bail!("{}: {bad} of {} not signed", verified.reference, verified.checked.len());
    }
    Ok(())
}

fn value(verified: &Verified) -> Value {
    let one = |checked: &Checked| match &checked.verdict {
        Ok(key) => json!({
            "digest": checked.digest, "signed": true, "key": key.name(),
            "fingerprint": key.fingerprint(),
        }),
        Err(error) => json!({ "digest": checked.digest, "signed": false, "reason": chain(error) }),
    };
    let checked: Vec<Value> = verified.checked.iter().map(one).collect();
    json!({ "reference": verified.reference, "signed": verified.is_good(), "checked": checked })
}

fn text(verified: &Verified) -> String {
    let row = |checked: &Checked| {
        let verdict = match &checked.verdict {
            Ok(key) => format!("signed by {key}"),
            Err(error) => chain(error),
        };
        vec![checked.digest.to_string(), verdict]
    };
    let rows: Vec<Vec<String>> = verified.checked.iter().map(row).collect();
    format!("{}\n{}", verified.reference, table(&["DIGEST", "VERDICT"], &rows))
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
