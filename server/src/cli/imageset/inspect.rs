//! `layercake imageset inspect`: what a set consists of.

use std::fmt::Write;

use imagebuilder::inspect::{self, InspectedImage, Inspection};

use super::registry::{RegistryArgs, wait};
use crate::cli::output::{Output, bytes, table};
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The set: a reference, NAME:VERSION in the server's registry, or a layout (DIR, oci:DIR:VERSION).
    set: String,
    #[command(flatten)]
    registries: RegistryArgs,
}

pub(super) fn run(args: &Args, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    let place = args.registries.place(&args.set, server)?;
    let seen = wait(inspect::inspect(&place, &args.registries.options()?))?;
    output.result(&seen, || text(&seen))
}

fn text(seen: &Inspection) -> String {
    let set = &seen.set;
    let signed = match (seen.signed, seen.signatures.len()) {
        (true, count) => format!("the index is signed, {count} signature objects"),
        (false, _) => "not signed".to_owned(),
    };
    let mut text = format!(
        "{}:{}\n  place   {}\n  digest  {}\n  size    {}\n  signed  {signed}\n",
        set.name,
        set.version,
        seen.place,
        seen.digest,
        bytes(seen.bytes)
    );
    for container in &set.containers {
        let _ = writeln!(text, "  runs    {} of image {}", container.name, container.image);
    }
    for image in &seen.images {
        text.push_str(&image_text(image));
    }
    text
}

fn image_text(image: &InspectedImage) -> String {
    let mut text =
        format!("\nimage {} {}\n  digest  {}\n", image.name, image.platform, image.digest);
    if let Some(base) = &image.base {
        let _ = writeln!(text, "  from    {base}");
    }
    let argv = [&image.config.entrypoint[..], &image.config.cmd[..]].concat();
    if !argv.is_empty() {
        let _ = writeln!(text, "  runs    {}", argv.join(" "));
    }
    if let Some(user) = &image.config.user {
        let _ = writeln!(text, "  user    {user}");
    }
    let rows: Vec<Vec<String>> = image
        .layers
        .iter()
        .map(|layer| {
            let kind = layer.media_type.rsplit('.').next().unwrap_or_default();
            vec![format!("  {}", layer.digest), kind.to_owned(), bytes(layer.bytes)]
        })
        .collect();
    let mounts = image.mounts.iter().map(|mount| {
        vec![format!("  {}", mount.digest), format!("mount: {}", mount.form), bytes(mount.bytes)]
    });
    let rows = [rows, mounts.collect()].concat();
    text + &table(&["  LAYER", "TYPE", "SIZE"], &rows)
}
