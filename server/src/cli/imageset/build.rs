//! `layercake imageset build`: a description to an OCI layout.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use imagebuilder::build::{self, BuiltSet};
use imagebuilder::client::Options;
use imagebuilder::description::{self, SetSource};
use imagebuilder::mount::MountKind;
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
    mount: MountArgs,
    #[command(flatten)]
    registries: RegistryArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// Publish every image as this read-only file system too, which nodes mount instead of unpacking layers: squashfs
    /// (zstd: the fewest bytes), erofs (lz4hc: reads faster) or erofs-plain. May be given several times; goes before
    /// what the description says (`mount = "squashfs"` or a list, in an `[[image]]`). `none` makes none. Needs mksquashfs
    /// (package squashfs-tools) or mkfs.erofs (erofs-utils).
    #[arg(long, value_name = "FORM")]
    mount: Vec<String>,
}

impl MountArgs {
    /// Lets these go before what the description says.
    fn apply(&self, source: &mut SetSource) -> anyhow::Result<()> {
        let mut kinds: Vec<MountKind> = Vec::new();
        for text in self.mount.iter().filter(|text| *text != "none") {
            let kind: MountKind = text.parse()?;
            ensure!(
                kinds.iter().all(|known| known.form() != kind.form()),
                "--mount {text}: there can be one {} of an image",
                kind.form()
            );
            kinds.push(kind);
        }
        if !self.mount.is_empty() {
            source.images.iter_mut().for_each(|image| image.mount.clone_from(&kinds));
        }
        Ok(())
    }
}

pub(super) fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    let built = wait(build_set(&args.file, &args.out, &args.mount, &args.registries.options()?))?;
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
    mount: &MountArgs,
    options: &Options,
) -> anyhow::Result<BuiltSet> {
    let mut source = description::load(file)?;
    mount.apply(&mut source)?;
    output::say(&format!("building {}:{}", source.set.name, source.set.version));
    Ok(build::to_layout(&source, out, options).await?)
}
