//! The bundle: every file of an image in one tar, with checksums that sha256sum(1) reads and a bill of materials. The last two lie
//! beside it as well.

use std::io;

use protocol::layer0::Manifest;

use super::BuildError;
use super::forms::Form;
use super::output::{self, Key, MANIFEST, Made, Shop};
use crate::sbom::{self, Crate};

/// The bill of materials.
pub const BILL: &str = "sbom.cdx.json";
/// The checksums.
pub const SUMS: &str = "SHA256SUMS";
/// What the bundle puts beside itself.
pub const BESIDE: [&str; 2] = [BILL, SUMS];
/// The directory in the tar.
const DIRECTORY: &str = "layer0";

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The bill could not be written.
    #[error("cannot write the bill of materials")]
    Bill(#[from] serde_json::Error),
    /// The tar could not be written.
    #[error("cannot write the bundle")]
    Tar(#[from] io::Error),
}

/// Makes checksums, bill and tar of these files.
pub(super) fn make(
    made: &[Made],
    manifest: &Manifest,
    crates: &[Crate],
    time: u32,
    shop: &Shop,
) -> Result<Vec<Made>, BuildError> {
    let bill = sbom::render(manifest, crates).map_err(BundleError::from)?;
    let bill = Made::new(BILL, bill.into_bytes());
    let text = Made::new(MANIFEST, output::manifest_text(manifest)?);
    let mut files: Vec<&Made> = made.iter().chain([&bill, &text]).collect();
    files.sort_by_key(|it| it.name);
    let sums: String =
        files.iter().map(|it| format!("{}  {}\n", it.digest.hex(), it.name)).collect();
    let sums = Made::new(SUMS, sums.into_bytes());
    let name = Form::Bundle.file().unwrap_or_default();
    let key = Key::new(name).with("sums", sums.digest.hex().as_bytes());
    let key = key.with("time", &time.to_le_bytes());
    let tar = shop.file(name, &key, || {
        let mut all = Vec::new();
        for it in [&sums].into_iter().chain(files.iter().copied()) {
            all.push((it.name, it.bytes(&shop.out)?));
        }
        Ok(tar(&all, time).map_err(BundleError::from)?)
    })?;
    Ok(vec![bill, sums, tar])
}

fn tar(files: &[(&str, Vec<u8>)], time: u32) -> io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let head = |size: u64, mode: u32, kind| {
        let mut header = tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(mode);
        header.set_mtime(u64::from(time));
        header.set_entry_type(kind);
        header
    };
    let mut directory = head(0, 0o755, tar::EntryType::Directory);
    builder.append_data(&mut directory, format!("{DIRECTORY}/"), io::empty())?;
    for (name, bytes) in files {
        let mut header = head(super::size(bytes), 0o644, tar::EntryType::Regular);
        builder.append_data(&mut header, format!("{DIRECTORY}/{name}"), bytes.as_slice())?;
    }
    builder.into_inner()
}
