//! `layercake imageset diff`: what changed between two versions.

use std::fmt::Write;

use imagebuilder::diff::{self, Change, Diff, EntryDiff, ImageDiff};

use super::registry::{RegistryArgs, wait};
use crate::cli::output::{Output, bytes};
use crate::config::values::BaseUrl;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The older set: a reference, NAME:VERSION in the server's registry, or a layout (DIR, oci:DIR:VERSION).
    before: String,
    /// The newer set, likewise.
    after: String,
    #[command(flatten)]
    registries: RegistryArgs,
}

pub(super) fn run(args: &Args, server: &BaseUrl, output: Output) -> anyhow::Result<()> {
    let before = args.registries.place(&args.before, server)?;
    let after = args.registries.place(&args.after, server)?;
    let seen = wait(diff::diff(&before, &after, &args.registries.options()?))?;
    output.result(&seen, || text(&seen))
}

fn text(seen: &Diff) -> String {
    let (from, to) = (&seen.from, &seen.to);
    let mut text = format!(
        "{}:{} {}\n{}:{} {}\n",
        from.name, from.version, from.digest, to.name, to.version, to.digest
    );
    if seen.description_changed {
        text.push_str("the description differs\n");
    }
    let _ = write!(text, "{} to fetch", bytes(seen.bytes_to_fetch));
    for (form, size) in &seen.mount_bytes_to_fetch {
        let _ = write!(text, ", or {} of {form}", bytes(*size));
    }
    text.push('\n');
    for image in &seen.images {
        text.push_str(&image_text(image));
    }
    text
}

fn image_text(image: &ImageDiff) -> String {
    let change = match image.change {
        Change::Added => "added",
        Change::Removed => "removed",
        Change::Changed => "changed",
        Change::Same => "same",
    };
    let mut text = format!("\nimage {} {}: {change}", image.name, image.platform);
    if image.config_changed {
        text.push_str(", config changed");
    }
    let (added, removed) = (image.layers_added.len(), image.layers_removed.len());
    let _ =
        writeln!(text, "; layers: {} kept, {added} added, {removed} removed", image.layers_kept);
    for entry in &image.entries {
        text.push_str(&entry_text(entry));
    }
    let count = |change| image.entries.iter().filter(|entry| entry.change == change).count();
    if !image.entries.is_empty() {
        let _ = writeln!(
            text,
            "  {} added, {} removed, {} changed",
            count(Change::Added),
            count(Change::Removed),
            count(Change::Changed)
        );
    }
    text
}

fn entry_text(entry: &EntryDiff) -> String {
    let size = |size: Option<u64>| bytes(size.unwrap_or_default());
    let (mark, sizes) = match entry.change {
        Change::Added => ('+', size(entry.after)),
        Change::Removed => ('-', size(entry.before)),
        Change::Changed | Change::Same => {
            ('~', format!("{} -> {}", size(entry.before), size(entry.after)))
        }
    };
    format!("  {mark} {}  {sizes}\n", entry.path)
}
