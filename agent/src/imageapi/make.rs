//! How the engine makes attachments and mounts: children first, each by its driver, and nothing left when a part fails.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use protocol::ids::Digest;
use protocol::reference::Reference;

use super::drivers::{self, block, iscsi, layered, plain, rbd};
use super::engine::Engine;
use super::error::ApiError;
use super::needs::Needs;
use super::table::{Device, Item, Mounted, Object, Refusal, Sort};
use super::types::{Attach, AttachKind, Base, Format, Mount, MountKind, MountOverlay, MountUri};
use crate::agent::chain;
use crate::pull::Progress;
use crate::pull::image::{Content, PulledFile, PulledOne};
use crate::store::Pin;

/// What was fetched for one request.
#[derive(Debug, Default)]
pub(super) struct Fetched {
    images: BTreeMap<String, PulledOne>,
    files: BTreeMap<String, PulledFile>,
}

impl Engine {
    /// Makes an attachment for its creator.
    ///
    /// # Errors
    /// What its driver says; nothing of it is left then.
    pub(super) fn attach(&self, spec: Attach) -> Result<Attach, ApiError> {
        let fetched = self.fetch(&Needs::of_attach(&spec)?)?;
        let _turn = self.turn();
        let id = self.made(self.make_attach(spec, true, &fetched))?;
        self.present().table.attach(id).ok_or_else(|| ApiError::not_found(id))
    }

    /// Makes a mount for its creator.
    ///
    /// # Errors
    /// As [`Engine::attach`].
    pub(super) fn mount(&self, spec: Mount) -> Result<Mount, ApiError> {
        let fetched = self.fetch(&Needs::of_mount(&spec)?)?;
        let _turn = self.turn();
        let id = self.made(self.make_mount(spec, true, &fetched))?;
        self.present().table.mount(id).ok_or_else(|| ApiError::not_found(id))
    }

    /// What was begun for something that then failed is held by nobody.
    pub(super) fn made(&self, result: Result<i64, ApiError>) -> Result<i64, ApiError> {
        if result.is_err() {
            self.collect();
        }
        result
    }

    /// Fetches what a request needs of registries and servers, outside of any turn.
    pub(super) fn fetch(&self, needs: &Needs) -> Result<Fetched, ApiError> {
        let never = AtomicBool::new(false);
        let mut fetched = Fetched::default();
        for reference in &needs.images {
            let parsed: Reference =
                reference.parse().map_err(|error| ApiError::invalid(format!("{error}")))?;
            let image = self.puller.pull_image(&parsed, &Progress::default(), &never);
            let image = image
                .map_err(|error| ApiError::failed(format!("{reference}: {}", chain(&error))))?;
            fetched.images.insert(reference.clone(), image);
        }
        for (uri, digest) in &needs.files {
            let lower = uri.to_ascii_lowercase();
            if !lower.starts_with("http://") && !lower.starts_with("https://") {
                return Err(ApiError::invalid(format!("`{uri}` is neither http:// nor https://")));
            }
            let parsed: Digest =
                digest.parse().map_err(|error| ApiError::invalid(format!("{error}")))?;
            let file = self.puller.pull_file(uri, &parsed, &never);
            let file = file.map_err(|error| ApiError::failed(chain(&error)))?;
            fetched.files.insert(digest.clone(), file);
        }
        Ok(fetched)
    }

    /// The attachment that a definition names or describes.
    fn resolve_attach(&self, spec: Attach, fetched: &Fetched) -> Result<i64, ApiError> {
        match spec.id {
            0 => self.make_attach(spec, false, fetched),
            id if self.present().table.has(Sort::Attach, id) => Ok(id),
            id => Err(Refusal::Absent(Sort::Attach, id).into()),
        }
    }

    /// The mount that a definition names or describes.
    pub(super) fn resolve_mount(&self, spec: Mount, fetched: &Fetched) -> Result<i64, ApiError> {
        match spec.id {
            0 => self.make_mount(spec, false, fetched),
            id if self.present().table.has(Sort::Mount, id) => Ok(id),
            id => Err(Refusal::Absent(Sort::Mount, id).into()),
        }
    }

    /// Where a mount can be seen.
    pub(super) fn mountpoint(&self, id: i64) -> Result<PathBuf, ApiError> {
        match self.present().table.get(id).map(|object| &object.item) {
            Some(Item::Mount { mounted, .. }) => Ok(mounted.mountpoint.clone()),
            _ => Err(Refusal::Absent(Sort::Mount, id).into()),
        }
    }

    /// What a path is relative to: the node's root, or a mount, which is then held.
    fn base(
        &self,
        base: Option<Base>,
        mount: Option<Box<Mount>>,
        fetched: &Fetched,
    ) -> Result<(PathBuf, Vec<i64>), ApiError> {
        match (base, mount) {
            (Some(Base::Mount), Some(mount)) => {
                let id = self.resolve_mount(*mount, fetched)?;
                Ok((self.mountpoint(id)?, vec![id]))
            }
            (Some(Base::Mount), None) => Err(ApiError::invalid("base `mount` without a mount")),
            _ => Ok((PathBuf::from("/"), Vec::new())),
        }
    }

    fn make_attach(&self, mut spec: Attach, own: bool, fetched: &Fetched) -> Result<i64, ApiError> {
        let kind = spec.kind.ok_or_else(|| ApiError::internal("an attachment needs a kind"))?;
        if spec.id != 0 {
            return Err(ApiError::internal("the number of a new attachment is not for you to say"));
        }
        let missing =
            || ApiError::invalid(format!("kind {kind:?} without its block").to_lowercase());
        let id = self.present().table.number();
        let mut children = Vec::new();
        let (device_file, device) = match kind {
            AttachKind::Local => block::local(spec.local.as_ref().ok_or_else(missing)?)?,
            AttachKind::Loopback => {
                let loopback = spec.loopback.as_mut().ok_or_else(missing)?;
                let base;
                (base, children) = self.base(loopback.base, loopback.mount.take(), fetched)?;
                let label = format!("{}{id}", self.label);
                block::loopback(loopback, &base, &label, &self.modules)?
            }
            AttachKind::Rbd => {
                let block = spec.rbd.as_mut().ok_or_else(missing)?;
                let mapped = rbd::map(block, &self.modules)?;
                if let Some(options) = &mut block.options {
                    options.secret.clear();
                }
                if let Device::Rbd(number) = mapped.1 {
                    block.device_id = number.into();
                }
                mapped
            }
            AttachKind::Iscsi => {
                let block = spec.iscsi.as_ref().ok_or_else(missing)?;
                iscsi::attach(block, id, &self.modules)?
            }
        };
        spec.device_file = device_file;
        let object = Object { own, children, item: Item::Attach { spec, device } };
        self.change(|present| present.table.insert(id, object));
        Ok(id)
    }

    fn make_mount(&self, mut spec: Mount, own: bool, fetched: &Fetched) -> Result<i64, ApiError> {
        if spec.kind.is_none() {
            return Err(ApiError::no_driver("a mount needs a kind"));
        }
        if spec.id != 0 {
            return Err(ApiError::internal("the number of a new mount is not for you to say"));
        }
        let id = self.present().table.number();
        let dir = self.dirs.mounts().join(id.to_string());
        match self.mount_kind(id, &mut spec, &dir, fetched) {
            Ok((children, mounted, pin)) => {
                spec.mountpoint = mounted.mountpoint.display().to_string();
                let item = Item::Mount { spec, mounted: Box::new(mounted) };
                self.change(|present| {
                    present.table.insert(id, Object { own, children, item });
                    present.pins.extend(pin.map(|pin| (id, pin)));
                });
                Ok(id)
            }
            Err(error) => {
                drivers::sweep(&dir);
                Err(error)
            }
        }
    }

    /// Mounts by kind; returns what the mount holds, how to take it away, and what of the store it needs.
    fn mount_kind(
        &self,
        id: i64,
        spec: &mut Mount,
        dir: &Path,
        fetched: &Fetched,
    ) -> Result<Made, ApiError> {
        let missing = |kind: &str| ApiError::invalid(format!("kind {kind} without its block"));
        match spec.kind {
            Some(MountKind::Attach) => {
                let block = spec.attach.as_mut().ok_or_else(|| missing("attach"))?;
                let attach = block.attach.take().ok_or_else(|| missing("attach"))?;
                let child = self.resolve_attach(*attach, fetched)?;
                let device = match self.present().table.get(child).map(|object| &object.item) {
                    Some(Item::Attach { spec, .. }) => spec.device_file.clone(),
                    _ => return Err(Refusal::Absent(Sort::Attach, child).into()),
                };
                Ok((vec![child], plain::attach(block, &device, dir, &self.modules)?, None))
            }
            Some(MountKind::Bind) => {
                let block = spec.bind.as_mut().ok_or_else(|| missing("bind"))?;
                let (base, children) = self.base(block.base, block.mount.take(), fetched)?;
                Ok((children, plain::bind(block, &base, dir)?, None))
            }
            Some(MountKind::Nfs) => {
                let block = spec.nfs.as_ref().ok_or_else(|| missing("nfs"))?;
                Ok((Vec::new(), plain::nfs(block, dir, &self.modules)?, None))
            }
            Some(MountKind::Overlay) => {
                let block = spec.overlay.as_mut().ok_or_else(|| missing("overlay"))?;
                self.mount_overlay(block, dir, fetched)
            }
            Some(MountKind::Oci) => {
                let block = spec.oci.as_mut().ok_or_else(|| missing("oci"))?;
                let image = fetched.images.get(&block.image).ok_or_else(unfetched)?;
                block.digest = image.digest.to_string();
                self.modules.need(&["overlay"]);
                let (mounted, pin) = layered::oci(block, image, dir)?;
                Ok((Vec::new(), mounted, Some(pin)))
            }
            Some(MountKind::Uri) => {
                let block = spec.uri.as_ref().ok_or_else(|| missing("uri"))?;
                self.mount_uri(id, block, dir, fetched)
            }
            None => Err(ApiError::no_driver("a mount needs a kind")),
        }
    }

    fn mount_overlay(
        &self,
        block: &mut MountOverlay,
        dir: &Path,
        fetched: &Fetched,
    ) -> Result<Made, ApiError> {
        let (mut children, mut roots) = (Vec::new(), Vec::new());
        for lower in block.lower.take().unwrap_or_default() {
            let child = self.resolve_mount(lower, fetched)?;
            roots.push(self.mountpoint(child)?);
            children.push(child);
        }
        self.modules.need(&["overlay"]);
        let mounted = layered::overlay(block, &roots, dir)?;
        if let Some((upper, work)) = layered::upper_and_work(&mounted) {
            block.upperdir = upper.display().to_string();
            block.workdir = work.display().to_string();
        }
        Ok((children, mounted, None))
    }

    fn mount_uri(
        &self,
        id: i64,
        block: &MountUri,
        dir: &Path,
        fetched: &Fetched,
    ) -> Result<Made, ApiError> {
        let file = fetched.files.get(&block.digest).ok_or_else(unfetched)?;
        check_format(block, file)?;
        match file.content {
            Content::Erofs => self.modules.need(&["loop", "erofs"]),
            Content::Squashfs => self.modules.need(&["loop", "squashfs"]),
            Content::Tar | Content::Cpio => self.modules.need(&["overlay"]),
        }
        let label = format!("{}{id}", self.label);
        let (mut mounted, pin) = layered::uri(block, file, dir, &label)?;
        mounted.digest = block.digest.parse().ok();
        Ok((Vec::new(), mounted, Some(pin)))
    }
}

/// What a mount holds, how to take it away, and what of the store it needs.
type Made = (Vec<i64>, Mounted, Option<Arc<Pin>>);

fn unfetched() -> ApiError {
    ApiError::internal("it was not fetched")
}

/// Whether a file is what its request says.
fn check_format(block: &super::types::MountUri, file: &PulledFile) -> Result<(), ApiError> {
    let fits = match (block.format, file.content) {
        (None, _) => true,
        (Some(Format::Erofs), content) => content == Content::Erofs,
        (Some(Format::Squashfs), content) => content == Content::Squashfs,
        // Once it lies in the store, an archive is an archive.
        (Some(Format::Tar | Format::Cpio), content) => {
            matches!(content, Content::Tar | Content::Cpio)
        }
    };
    match fits {
        true => Ok(()),
        false => Err(ApiError::invalid(format!("{} is of another format", block.uri))),
    }
}
