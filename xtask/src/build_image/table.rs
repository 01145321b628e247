//! The table that `cargo xtask build-image` prints: what is in the image, and each form with its size.

use std::path::Path;

use initramfs::image::forms::Form;
use initramfs::image::{INITRAMFS, KERNEL, Report};

use super::hardware;

/// The table, with a last line that says where the files are and how long it took.
pub(super) fn render(report: &Report, out: &Path) -> String {
    let manifest = &report.manifest;
    let mut text = format!("{:<18} {:>11}\n", "", "bytes");
    let mut row = |name: &str, size: u64, note: &str| {
        text.push_str(&format!("{name:<18} {size:>11}  {note}\n"));
    };
    row("agent", report.agent_size, &format!("{}, static", manifest.agent));
    let modules = (manifest.modules.len(), report.modules_compressed);
    let modules = format!("{} of them, {} compressed one by one", modules.0, modules.1);
    row("modules", report.modules_size, &modules);
    row("archive", report.archive_size, "what the initramfs unpacks to");
    for artifact in &manifest.artifacts {
        let note = match artifact.name.as_str() {
            KERNEL => format!("{} ({})", manifest.kernel, manifest.flavour),
            INITRAMFS => compressed(report, artifact.size),
            name => note(name).to_owned(),
        };
        row(&artifact.name, artifact.size, &note);
    }
    let bundle = Form::Bundle.file().map(|name| out.join(name));
    if let Some(size) =
        bundle.filter(|_| asked_for_a_bundle(report)).and_then(|path| path.metadata().ok())
    {
        row(
            Form::Bundle.file().unwrap_or_default(),
            size.len(),
            "all of it, checksums, bill of materials",
        );
    }
    text.push_str(&hardware::table(manifest));
    let state = if report.unchanged { "unchanged" } else { "written" };
    let took = report.took.as_secs_f64();
    text.push_str(&format!("{} {state} in {took:.2} s\n", out.display()));
    text
}

fn asked_for_a_bundle(report: &Report) -> bool {
    let inputs = report.manifest.inputs.as_ref();
    inputs.is_some_and(|inputs| inputs.forms.iter().any(|form| form == Form::Bundle.word()))
}

fn note(name: &str) -> &'static str {
    let form = Form::ALL.into_iter().find(|form| form.file() == Some(name));
    match form {
        Some(Form::Uki) => "one EFI program",
        Some(Form::Efi) => "one kernel with all inside",
        Some(Form::Iso) => "a CD for BIOS and UEFI",
        Some(Form::Usb) => "a disk for BIOS and UEFI",
        _ => "",
    }
}

fn compressed(report: &Report, size: u64) -> String {
    let percent = size.saturating_mul(100) / report.archive_size.max(1);
    format!("{percent} % of the archive, {}", report.compression)
}
