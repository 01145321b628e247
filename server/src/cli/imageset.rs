//! `layercake imageset`: builds, pushes, lists, signs and verifies ImageSets. The work is the imagebuilder's.

mod keygen;
mod sign;
mod target;
mod verify;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use imagebuilder::build::{self, BuiltSet};
use imagebuilder::client::Options;
use imagebuilder::description::{self, SetSource};
use imagebuilder::push::{self, Progress, Pushed};
use protocol::api::ImageSetRecord;
use protocol::reference::Reference;
use serde_json::json;

use super::client::Client;
use super::output::{self, Output, bytes, table};
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Build an ImageSet into an OCI layout.
    Build {
        /// Its description, imageset.toml.
        file: PathBuf,
        /// Directory of the layout; made when it is not there, added to when it is.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Build an ImageSet and push it to a registry. Only blobs that the registry does not have are sent.
    Push {
        /// Its description, imageset.toml.
        file: PathBuf,
        /// Another registry than the server's own, with a prefix for the repository where it needs one:
        /// https://HOST[:PORT][/PREFIX], or http:// for a registry without TLS.
        #[arg(long, value_name = "URL")]
        to: Option<BaseUrl>,
    },
    /// List the ImageSets of the server's registry.
    List,
    /// Make a key pair for signatures (ECDSA P-256).
    Keygen(keygen::Args),
    /// Sign an ImageSet in a registry, its index and every manifest in it, in cosign's key layout. Signatures by other keys
    /// stay; what this key signed already is left as it is. Signers should come one after the other.
    Sign(sign::Args),
    /// Verify the signatures of an ImageSet in a registry. Exit status 1 if one is missing or wrong.
    Verify(verify::Args),
}

pub(super) fn run(command: Command, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    match command {
        Command::Build { file, out } => {
            let built = build::to_layout_blocking(&load(&file)?, &out)?;
            let (set, digest) = (&built.set, built.index.digest);
            let value = json!({
                "name": set.name, "version": set.version, "digest": digest, "layout": out,
            });
            let text = || format!("{}:{} {digest} in {}", set.name, set.version, out.display());
            output.result(&value, text)
        }
        Command::Push { file, to } => {
            let scratch = tempfile::tempdir().context("a temporary directory cannot be made")?;
            let layout = scratch.path().join("layout");
            let base = to.as_ref().unwrap_or(server);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let done = runtime.block_on(async {
                tokio::select! {
                    done = build_and_push(&file, &layout, base) => done,
                    // Returning, and not the signal's own end, removes the temporary directory.
                    _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
                }
            });
            // A layer that is still being packed must not hold the end up.
            runtime.shutdown_background();
            let (built, pushed) = done?;
            let Progress { sent, skipped, .. } = pushed.progress;
            let value = json!({
                "name": built.set.name, "version": built.set.version, "digest": pushed.digest,
                "reference": pushed.reference, "bytes_sent": sent, "bytes_skipped": skipped,
            });
            let (sent, skipped) = (bytes(sent), bytes(skipped));
            let text = || format!("{}\n{sent} sent, {skipped} were there", pushed.reference);
            output.result(&value, text)
        }
        Command::Keygen(args) => keygen::run(&args, output),
        Command::Sign(args) => sign::run(&args, server, output),
        Command::Verify(args) => verify::run(&args, server, output),
        Command::List => {
            let sets: Vec<ImageSetRecord> = Client::new(server).get("/v1/imagesets")?;
            output.result(&sets, || list_text(&sets))
        }
    }
}

fn load(file: &Path) -> anyhow::Result<SetSource> {
    let source = description::load(file)?;
    output::say(&format!("building {}:{}", source.set.name, source.set.version));
    Ok(source)
}

async fn build_and_push(
    file: &Path,
    layout: &Path,
    base: &BaseUrl,
) -> anyhow::Result<(BuiltSet, Pushed)> {
    let built = build::to_layout(&load(file)?, layout).await?;
    let name = format!("{base}/{}:{}", built.set.name, built.set.version);
    let reference: Reference = name.parse()?;
    output::say(&format!("pushing to {name}"));
    let bar = output::byte_bar();
    let show = bar.clone();
    let on_progress = move |progress: Progress| {
        show.set_length(progress.total);
        show.set_position(progress.sent + progress.skipped);
    };
    let options = Options::default();
    let pushed = push::push(&built, &reference, &options, Arc::new(on_progress)).await;
    bar.finish_and_clear();
    Ok((built, pushed?))
}

fn list_text(sets: &[ImageSetRecord]) -> String {
    if sets.is_empty() {
        return "The registry has no ImageSet yet; `layercake imageset push FILE` adds one.\n"
            .to_owned();
    }
    let row = |set: &ImageSetRecord| {
        vec![set.name.to_string(), set.version.to_string(), set.digest.to_string()]
    };
    let rows: Vec<Vec<String>> = sets.iter().map(row).collect();
    table(&["NAME", "VERSION", "DIGEST"], &rows)
}
