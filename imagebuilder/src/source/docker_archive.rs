//! An image out of what `docker save` and `podman save` write: a tar with `manifest.json`, a config and layer tars.
//!
//! The layers are read in the order of the manifest from their places in the archive; nothing is unpacked.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use protocol::oci::{self, ImageConfig, MAX_LAYERS, MAX_MANIFEST_BYTES};
use serde::Deserialize;
use tar::{Archive, EntryType};

use super::{Content, SourceError, io_error, wrong};
use crate::blob::BlobDir;
use crate::description::ImageSource;
use crate::layer::{self, Layer, LayerWriter};

/// Most entries of an archive that are looked at.
const MAX_ENTRIES: usize = 10_000;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    layers: Vec<String>,
}

enum Place {
    At { start: u64, size: u64 },
    Link(PathBuf),
}

struct Saves<'a> {
    path: &'a Path,
    file: File,
    places: BTreeMap<PathBuf, Place>,
}

pub(super) fn content(
    path: &Path,
    image: &ImageSource,
    blobs: &BlobDir,
) -> Result<Content, SourceError> {
    let mut archive = open(path)?;
    let saved = archive.document("manifest.json")?;
    let saved: Vec<Saved> = serde_json::from_slice(&saved)
        .map_err(|error| wrong(path, format!("manifest.json is malformed: {error}")))?;
    let [saved] = saved.as_slice() else {
        return Err(wrong(path, format!("{} images, expected one", saved.len())));
    };
    let config = archive.document(&saved.config)?;
    let config: ImageConfig = oci::parse_image_config(&config)
        .map_err(|source| SourceError::Document { path: path.to_owned(), source })?;
    if config.architecture != image.architecture() {
        let (found, expected) = (&config.architecture, image.architecture());
        return Err(wrong(path, format!("the image is for {found}, expected {expected}")));
    }
    if saved.layers.len() != config.rootfs.diff_ids.len() || saved.layers.len() > MAX_LAYERS {
        let (layers, ids) = (saved.layers.len(), config.rootfs.diff_ids.len());
        return Err(wrong(path, format!("{layers} layers in manifest.json, {ids} in the config")));
    }
    let mut layers = Vec::new();
    for (name, expected) in saved.layers.iter().zip(&config.rootfs.diff_ids) {
        let layer = archive.layer(name, image, blobs)?;
        if layer.diff_id != *expected {
            let found = layer.diff_id;
            return Err(wrong(path, format!("layer `{name}` is {found}, expected {expected}")));
        }
        layers.push(layer);
    }
    Ok(Content { layers, config: Some(config), original: None })
}

fn open(path: &Path) -> Result<Saves<'_>, SourceError> {
    let source = File::open(path).map_err(io_error("cannot read", path))?;
    let mut plain = layer::decompressed(&source).map_err(io_error("cannot decompress", path))?;
    // A plain copy, so that entries can be read in any order.
    let mut file = tempfile::tempfile().map_err(io_error("cannot make a copy of", path))?;
    io::copy(&mut plain, &mut file).map_err(io_error("cannot copy", path))?;
    drop(plain);
    file.seek(SeekFrom::Start(0)).map_err(io_error("cannot read", path))?;
    let mut places = BTreeMap::new();
    let mut archive = Archive::new(BufReader::new(&file));
    let broken = |error: io::Error| wrong(path, format!("not a whole tar: {error}"));
    for entry in archive.entries().map_err(broken)?.take(MAX_ENTRIES) {
        let entry = entry.map_err(broken)?;
        let name = plain_path(&entry.path().map_err(broken)?);
        let place = match entry.header().entry_type() {
            EntryType::Regular => {
                Place::At { start: entry.raw_file_position(), size: entry.size() }
            }
            EntryType::Symlink | EntryType::Link => {
                let Some(target) = entry.link_name().map_err(broken)? else { continue };
                let hard = entry.header().entry_type() == EntryType::Link;
                let parent = name.parent().filter(|_| !hard).unwrap_or(Path::new(""));
                Place::Link(plain_path(&parent.join(target)))
            }
            _ => continue,
        };
        places.insert(name, place);
    }
    drop(archive);
    Ok(Saves { path, file, places })
}

/// The path without `.`, a leading `/` and `..`; only ever a key of the table of places.
fn plain_path(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => plain.push(part),
            Component::ParentDir => {
                plain.pop();
            }
            _ => {}
        }
    }
    plain
}

impl Saves<'_> {
    fn open_entry(&mut self, name: &str) -> Result<io::Take<&File>, SourceError> {
        let missing = || wrong(self.path, format!("it has no `{name}`"));
        let mut place = self.places.get(&plain_path(Path::new(name))).ok_or_else(missing)?;
        if let Place::Link(target) = place {
            place = self.places.get(target).ok_or_else(missing)?;
        }
        let Place::At { start, size } = *place else {
            return Err(wrong(self.path, format!("`{name}` is a link to a link")));
        };
        (&self.file).seek(SeekFrom::Start(start)).map_err(io_error("cannot read", self.path))?;
        Ok((&self.file).take(size))
    }

    fn document(&mut self, name: &str) -> Result<Vec<u8>, SourceError> {
        let path = self.path;
        let mut bytes = Vec::new();
        self.open_entry(name)?
            .take(MAX_MANIFEST_BYTES as u64)
            .read_to_end(&mut bytes)
            .map_err(io_error("cannot read", path))?;
        Ok(bytes)
    }

    fn layer(
        &mut self,
        name: &str,
        image: &ImageSource,
        blobs: &BlobDir,
    ) -> Result<Layer, SourceError> {
        let path = self.path;
        let entry = self.open_entry(name)?;
        let mut writer = LayerWriter::new(blobs, image.compression, image.compression_level)
            .map_err(io_error("cannot start a layer of", path))?;
        layer::copy_checked(path, entry, &mut writer)?;
        writer.finish().map_err(io_error("cannot finish a layer of", path))
    }
}
