//! An image out of an OCI layout (image-layout.md): its blobs are copied as they are, each checked against its digest.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use protocol::ids::Digest;
use protocol::oci::{self, Descriptor, Index, MAX_MANIFEST_BYTES};

use super::registry::platforms;
use super::{Content, Original, SourceError, io_error, wrong};
use crate::blob::BlobDir;
use crate::layer::Layer;
use crate::place::is_index;

/// Annotation of an entry of `index.json`: its tag (annotations.md).
pub(crate) const ANNOTATION_REF_NAME: &str = "org.opencontainers.image.ref.name";

pub(super) fn content(
    path: &Path,
    tag: Option<&str>,
    architecture: &str,
    blobs: &BlobDir,
) -> Result<Content, SourceError> {
    let manifest_entry = find_manifest(path, tag, architecture)?;
    let manifest_bytes = read_blob(path, &manifest_entry)?;
    let manifest = oci::parse_manifest(&manifest_bytes)
        .map_err(|source| document(path, &manifest_entry, source))?;
    let config_bytes = read_blob(path, &manifest.config)?;
    let config = oci::parse_image_config(&config_bytes)
        .map_err(|source| document(path, &manifest.config, source))?;
    if config.architecture != architecture {
        let found = config.architecture;
        return Err(wrong(path, format!("the image is for {found}, expected {architecture}")));
    }
    let diff_ids = &config.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        let (layers, ids) = (manifest.layers.len(), diff_ids.len());
        return Err(wrong(path, format!("{layers} layers in the manifest, {ids} in the config")));
    }
    let mut layers = Vec::new();
    for (descriptor, diff_id) in manifest.layers.iter().zip(diff_ids) {
        copy_blob(path, descriptor, blobs)?;
        let mut descriptor = descriptor.clone();
        descriptor.annotations.clear();
        layers.push(Layer { descriptor, diff_id: *diff_id });
    }
    let original = Original {
        manifest: manifest_entry,
        manifest_bytes,
        config_type: manifest.config.media_type,
        config_bytes,
    };
    Ok(Content { layers, config: Some(config), original: Some(original) })
}

/// The architectures of an index, in its order; none where there is no index.
pub(super) fn architectures(path: &Path, tag: Option<&str>) -> Result<Vec<String>, SourceError> {
    let entry = find_entry(path, tag)?;
    if !is_index(&entry) {
        return Ok(Vec::new());
    }
    let bytes = read_blob(path, &entry)?;
    let index = oci::parse_index(&bytes).map_err(|source| document(path, &entry, source))?;
    let platforms = platforms(&index).filter_map(|entry| entry.platform.as_ref());
    Ok(platforms.map(|platform| platform.architecture.clone()).collect())
}

fn find_entry(path: &Path, tag: Option<&str>) -> Result<Descriptor, SourceError> {
    let index_path = path.join("index.json");
    let bytes = fs::read(&index_path).map_err(io_error("cannot read", &index_path))?;
    let index = oci::parse_index(&bytes)
        .map_err(|source| SourceError::Document { path: index_path.clone(), source })?;
    pick(&index, tag).map_err(|reason| wrong(&index_path, reason))
}

fn find_manifest(
    path: &Path,
    tag: Option<&str>,
    architecture: &str,
) -> Result<Descriptor, SourceError> {
    let entry = find_entry(path, tag)?;
    if !is_index(&entry) {
        return Ok(entry);
    }
    let bytes = read_blob(path, &entry)?;
    let index = oci::parse_index(&bytes).map_err(|source| document(path, &entry, source))?;
    let fits = |entry: &&Descriptor| {
        entry
            .platform
            .as_ref()
            .is_some_and(|found| found.os == "linux" && found.architecture == architecture)
    };
    let found = index.manifests.iter().find(fits).cloned();
    found.ok_or_else(|| {
        wrong(path, format!("index {} has no image for linux/{architecture}", entry.digest))
    })
}

fn pick(index: &Index, tag: Option<&str>) -> Result<Descriptor, String> {
    let name = |entry: &Descriptor| entry.annotations.get(ANNOTATION_REF_NAME).cloned();
    let found: Vec<&Descriptor> = index
        .manifests
        .iter()
        .filter(|entry| tag.is_none_or(|tag| name(entry).as_deref() == Some(tag)))
        .collect();
    let tags: Vec<String> = index.manifests.iter().filter_map(name).collect();
    let tags = if tags.is_empty() { "none".to_owned() } else { tags.join(", ") };
    match (found.as_slice(), tag) {
        ([one], _) => Ok((*one).clone()),
        ([], Some(tag)) => Err(format!("there is no tag `{tag}`; the tags are: {tags}")),
        ([], None) => Err("there is no image".to_owned()),
        _ => Err(format!("there are several images; choose one by oci:PATH:TAG: {tags}")),
    }
}

fn blob_path(path: &Path, digest: &Digest) -> std::path::PathBuf {
    path.join("blobs/sha256").join(digest.hex())
}

fn document(path: &Path, descriptor: &Descriptor, source: oci::OciError) -> SourceError {
    SourceError::Document { path: blob_path(path, &descriptor.digest), source }
}

/// Reads a document and checks its digest and size.
pub(crate) fn read_blob(path: &Path, descriptor: &Descriptor) -> Result<Vec<u8>, SourceError> {
    let blob = blob_path(path, &descriptor.digest);
    let file = File::open(&blob).map_err(io_error("cannot read", &blob))?;
    let mut bytes = Vec::new();
    file.take(MAX_MANIFEST_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error("cannot read", &blob))?;
    if Digest::of(&bytes) != descriptor.digest {
        let found = Digest::of(&bytes);
        return Err(wrong(&blob, format!("corrupt: its digest is {found}")));
    }
    Ok(bytes)
}

fn copy_blob(path: &Path, descriptor: &Descriptor, blobs: &BlobDir) -> Result<(), SourceError> {
    let from = blob_path(path, &descriptor.digest);
    if blobs.path(&descriptor.digest).exists() {
        return Ok(());
    }
    let mut file = File::open(&from).map_err(io_error("cannot read", &from))?;
    let mut writer = blobs.writer().map_err(io_error("cannot copy", &from))?;
    io::copy(&mut file, &mut writer).map_err(io_error("cannot copy", &from))?;
    let (found, size) = writer.finish().map_err(io_error("cannot copy", &from))?;
    if found != descriptor.digest || size != descriptor.size {
        return Err(wrong(
            &from,
            format!("corrupt: {size} bytes of digest {found}, expected {}", descriptor.size),
        ));
    }
    Ok(())
}
