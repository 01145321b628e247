//! `layercake imageset list`: the sets of the server's registry, or of a repository anywhere.

use imagebuilder::client::Options;
use imagebuilder::resolve;
use protocol::api::ImageSetRecord;
use protocol::oci::{self, ARTIFACT_IMAGESET};
use protocol::reference::Reference;

use super::registry::{RegistryArgs, wait};
use crate::cli::client::Client;
use crate::cli::output::{Output, table};
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// A repository, HOST:PORT/REPOSITORY, whose versions are listed; the server's registry when absent.
    repository: Option<String>,
    #[command(flatten)]
    registries: RegistryArgs,
}

pub(super) fn run(args: &Args, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    let sets = match &args.repository {
        None => Client::new(server).get("/v1/imagesets")?,
        Some(repository) => {
            let reference = args.registries.reference(repository, server)?;
            wait(versions(&reference, &args.registries.options()?))?
        }
    };
    output.result(&sets, || text(&sets))
}

/// The tags of a repository that are ImageSets' versions.
async fn versions(reference: &Reference, options: &Options) -> anyhow::Result<Vec<ImageSetRecord>> {
    let mut sets = Vec::new();
    let name = reference.repository.rsplit('/').next().unwrap_or_default().parse()?;
    for tag in resolve::tags(reference, options).await? {
        let Ok(version) = tag.parse() else { continue };
        let at = reference.with_tag(&tag);
        let (digest, bytes) = resolve::manifest(&at, options).await?;
        let Ok(index) = oci::parse_index(&bytes) else { continue };
        if index.artifact_type.as_deref() == Some(ARTIFACT_IMAGESET) {
            let name = Clone::clone(&name);
            let reference = at.with_digest(digest);
            sets.push(ImageSetRecord { name, version, reference, digest });
        }
    }
    Ok(sets)
}

fn text(sets: &[ImageSetRecord]) -> String {
    if sets.is_empty() {
        return "There is no ImageSet yet; `layercake imageset push FILE` adds one.\n".to_owned();
    }
    let row = |set: &ImageSetRecord| {
        vec![set.name.to_string(), set.version.to_string(), set.digest.to_string()]
    };
    let rows: Vec<Vec<String>> = sets.iter().map(row).collect();
    table(&["NAME", "VERSION", "DIGEST"], &rows)
}
