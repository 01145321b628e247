//! The engine: makes objects with all they need, keeps them on disk, and takes them away when nobody holds them any more.
//!
//! One request at a time makes or takes away (`turn`); reading waits for none of them. What has to be fetched is fetched before
//! its turn, and a container's stop is waited for outside of it. On disk:
//! ```text
//! <run>/imageapi/objects.json   the table, replaced by a rename after every change
//!                mounts/ID/     what a mount consists of
//!                containers/    as of crate::containers
//!                log/           c<ID>.log
//! ```
//! A crash between an act and its note leaves a mount, a loop device or a container that no note knows: the next agent takes
//! them away. Containers themselves are started and stopped in [`super::containers`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::ids::Digest;
use protocol::reference::Reference;
use serde::{Deserialize, Serialize};

use super::drivers::{self, Modules, block, layered, plain, rbd};
use super::error::ApiError;
use super::table::{Device, Item, Mounted, Object, Refusal, Sort, Table};
use super::types::{Attach, AttachKind, Base, Mount, MountBind, MountKind};
use crate::agent::chain;
use crate::containers::{Handle, read_json, write_json};
use crate::paths::RunDirs;
use crate::pull::image::{Content, PulledFile, PulledOne};
use crate::pull::{Progress, Puller};
use crate::store::Pin;

/// The table's file.
const OBJECTS: &str = "objects.json";
/// Most objects that one request makes.
const MAX_OBJECTS: usize = 64;
/// What the labels of our loop devices begin with.
const LABEL: &str = "layercake-";

/// What is kept on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// Of which boot: nothing of an earlier one is there any more.
    boot_id: String,
    table: Table,
}

/// What changes.
#[derive(Debug, Default)]
pub(super) struct Present {
    pub(super) table: Table,
    /// Containers whose monitor lives or lived under this agent.
    pub(super) handles: BTreeMap<i64, Handle>,
    /// What of the store the mounts need.
    pins: BTreeMap<i64, Arc<Pin>>,
}

/// The engine. One for a run directory.
#[derive(Debug)]
pub struct Engine {
    pub(super) dirs: RunDirs,
    pub(super) hostname: String,
    boot_id: String,
    label: String,
    puller: Puller,
    modules: Modules,
    present: Mutex<Present>,
    turn: Mutex<()>,
}

/// What was fetched for one request.
#[derive(Debug, Default)]
pub(super) struct Fetched {
    images: BTreeMap<String, PulledOne>,
    files: BTreeMap<String, PulledFile>,
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Absent(..) => Self::not_found(refusal),
            _ => Self::busy(refusal),
        }
    }
}

impl Engine {
    /// An engine with what an earlier agent of this boot left, below `<run>/imageapi`. Starts and stops nothing but what was
    /// under way.
    #[must_use]
    pub fn open(run: &RunDirs, hostname: String, puller: Puller, standalone: bool) -> Arc<Self> {
        let dirs = RunDirs::new(run.root().join("imageapi"));
        let boot_id = crate::identity::read().boot_id.to_string();
        let path = Digest::of(dirs.root().as_os_str().as_encoded_bytes()).hex();
        let own: String = path.chars().take(16).collect();
        let table = match read_json::<Kept>(&dirs.root().join(OBJECTS)) {
            Ok(kept) if kept.boot_id == boot_id => kept.table,
            Ok(_) => Table::default(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Table::default(),
            Err(error) => {
                log::error!("imageapi: {OBJECTS}: {error}; what it knew is taken away");
                Table::default()
            }
        };
        let engine = Arc::new(Self {
            dirs,
            hostname,
            boot_id,
            label: format!("{LABEL}{own}-"),
            puller,
            modules: Modules::new(standalone),
            present: Mutex::new(Present { table, ..Present::default() }),
            turn: Mutex::new(()),
        });
        engine.adopt();
        engine
    }

    pub(super) fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else makes or takes away.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the table and keeps it.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Present) -> T) -> T {
        let mut present = self.present();
        let result = change(&mut present);
        let kept =
            Kept { boot_id: self.boot_id.clone(), table: std::mem::take(&mut present.table) };
        let path = self.dirs.root().join(OBJECTS);
        if let Err(error) = write_json(&path, &kept) {
            log::error!("imageapi: {} is not written: {error}", path.display());
        }
        present.table = kept.table;
        result
    }

    /// Takes over what an earlier agent left, and takes away what no note knows.
    fn adopt(self: &Arc<Self>) {
        if let Err(error) = std::fs::create_dir_all(self.dirs.mounts()) {
            log::error!("imageapi: {}: {error}", self.dirs.mounts().display());
        }
        self.adopt_containers();
        let mut loops = Vec::new();
        let mut present = self.present();
        let mut pins = BTreeMap::new();
        for (id, object) in present.table.iter() {
            match &object.item {
                Item::Attach { device: Device::Loop(number), .. } => loops.push(*number),
                Item::Mount { mounted, .. } => {
                    loops.extend(mounted.device);
                    if let Some(digest) = mounted.digest {
                        match self.pin_again(mounted, &digest) {
                            Some(pin) => drop(pins.insert(id, pin)),
                            None => {
                                log::warn!("imageapi: mount {id}: {digest} is not in the store")
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        present.pins = pins;
        for entry in std::fs::read_dir(self.dirs.mounts()).into_iter().flatten().flatten() {
            let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if !id.is_some_and(|id| present.table.has(Sort::Mount, id)) {
                drivers::sweep(&entry.path());
            }
        }
        drop(present);
        block::sweep(&self.label, &loops);
        self.collect();
    }

    fn pin_again(&self, mounted: &Mounted, digest: &Digest) -> Option<Arc<Pin>> {
        match mounted.config {
            Some(_) => self.puller.reopen_image(digest).map(|image| image.pin()),
            None => self.puller.reopen_file(digest).map(|file| file.pin()),
        }
    }

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
                return Err(ApiError::no_driver("this agent has no iSCSI initiator"));
            }
        };
        spec.device_file = device_file;
        let object = Object { own, children, item: Item::Attach { spec, device } };
        self.change(|present| present.table.insert(id, object));
        Ok(id)
    }

    fn make_mount(&self, spec: Mount, own: bool, fetched: &Fetched) -> Result<i64, ApiError> {
        if spec.kind.is_none() {
            return Err(ApiError::no_driver("a mount needs a kind"));
        }
        if spec.id != 0 {
            return Err(ApiError::internal("the number of a new mount is not for you to say"));
        }
        let id = self.present().table.number();
        let dir = self.dirs.mounts().join(id.to_string());
        let mut spec = spec;
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
    ) -> Result<(Vec<i64>, Mounted, Option<Arc<Pin>>), ApiError> {
        let kind = spec.kind;
        let missing = || {
            let kind = kind.map(|kind| format!("{kind:?}").to_lowercase()).unwrap_or_default();
            ApiError::invalid(format!("kind {kind} without its block"))
        };
        let gone = || ApiError::internal("it was not fetched");
        match kind {
            Some(MountKind::Attach) => {
                let block = spec.attach.as_mut().ok_or_else(missing)?;
                let attach = block.attach.take().ok_or_else(missing)?;
                let child = self.resolve_attach(*attach, fetched)?;
                let device = match self.present().table.get(child).map(|object| &object.item) {
                    Some(Item::Attach { spec, .. }) => spec.device_file.clone(),
                    _ => return Err(Refusal::Absent(Sort::Attach, child).into()),
                };
                Ok((vec![child], plain::attach(block, &device, dir, &self.modules)?, None))
            }
            Some(MountKind::Bind) => {
                let block: &mut MountBind = spec.bind.as_mut().ok_or_else(missing)?;
                let (base, children) = self.base(block.base, block.mount.take(), fetched)?;
                Ok((children, plain::bind(block, &base, dir)?, None))
            }
            Some(MountKind::Nfs) => {
                let block = spec.nfs.as_ref().ok_or_else(missing)?;
                Ok((Vec::new(), plain::nfs(block, dir, &self.modules)?, None))
            }
            Some(MountKind::Overlay) => {
                let block = spec.overlay.as_mut().ok_or_else(missing)?;
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
            Some(MountKind::Oci) => {
                let block = spec.oci.as_mut().ok_or_else(missing)?;
                let image = fetched.images.get(&block.image).ok_or_else(gone)?;
                block.digest = image.digest.to_string();
                self.modules.need(&["overlay"]);
                let (mounted, pin) = layered::oci(block, image, dir)?;
                Ok((Vec::new(), mounted, Some(pin)))
            }
            Some(MountKind::Uri) => {
                let block = spec.uri.as_ref().ok_or_else(missing)?;
                let file = fetched.files.get(&block.digest).ok_or_else(gone)?;
                check_format(block, file)?;
                match file.content {
                    Content::Erofs => self.modules.need(&["loop", "erofs"]),
                    Content::Squashfs => self.modules.need(&["loop", "squashfs"]),
                    Content::Tar | Content::Cpio => self.modules.need(&["overlay"]),
                }
                let (mut mounted, pin) =
                    layered::uri(block, file, dir, &format!("{}{id}", self.label))?;
                mounted.digest = block.digest.parse().ok();
                Ok((Vec::new(), mounted, Some(pin)))
            }
            None => Err(missing()),
        }
    }

    /// Takes an object away at its creator's word, and then what nobody holds any more.
    ///
    /// # Errors
    /// 404; 409 when somebody holds or uses it; what the driver says.
    pub(super) fn remove(&self, sort: Sort, id: i64, force: bool) -> Result<(), ApiError> {
        let _turn = self.turn();
        self.present().table.may_remove(sort, id, force)?;
        self.take_down(id)?;
        self.forget(id);
        self.collect();
        Ok(())
    }

    /// Forgets an object that is gone.
    pub(super) fn forget(&self, id: i64) {
        self.change(|present| {
            present.table.remove(id);
            present.handles.remove(&id);
            present.pins.remove(&id)
        });
    }

    /// Whether something that nobody holds could not be taken away yet.
    pub(super) fn has_garbage(&self) -> bool {
        self.present().table.garbage(&[]).is_some()
    }

    /// Takes away what nobody holds, in the caller's turn. What the system still uses is tried again later.
    pub(super) fn collect(&self) {
        let mut failed = Vec::new();
        loop {
            let next = self.present().table.garbage(&failed);
            let Some(id) = next else { return };
            match self.take_down(id) {
                Ok(()) => self.forget(id),
                Err(error) => {
                    log::info!("imageapi: {id} is to go, later: {error}");
                    failed.push(id);
                }
            }
        }
    }

    /// Unmounts or detaches.
    fn take_down(&self, id: i64) -> Result<(), ApiError> {
        let Some(object) = self.present().table.get(id).cloned() else { return Ok(()) };
        match &object.item {
            Item::Attach { spec, device } => match device {
                Device::Local => Ok(()),
                Device::Loop(number) => {
                    block::check_unused(Path::new(&format!("/dev/loop{number}")))?;
                    block::clear(*number)
                }
                Device::Rbd(number) => {
                    let options = spec.rbd.as_ref().and_then(|rbd| rbd.options.as_ref());
                    rbd::unmap(*number, options.is_some_and(|options| options.force))
                }
            },
            Item::Mount { mounted, .. } => {
                drivers::unmount(mounted, &self.dirs.mounts().join(id.to_string()))
            }
            Item::Container { running, .. } => self.remove_instance(id, running),
        }
    }
}

/// Whether a file is what its request says.
fn check_format(block: &super::types::MountUri, file: &PulledFile) -> Result<(), ApiError> {
    use super::types::Format;
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

/// What a request needs of registries and servers.
#[derive(Debug, Default)]
pub(super) struct Needs {
    images: Vec<String>,
    files: Vec<(String, String)>,
    objects: usize,
}

impl Needs {
    fn of_attach(spec: &Attach) -> Result<Self, ApiError> {
        let mut needs = Self::default();
        needs.attach(spec)?;
        Ok(needs)
    }

    /// Of a mount and all that is described in it.
    pub(super) fn of_mount(spec: &Mount) -> Result<Self, ApiError> {
        let mut needs = Self::default();
        needs.mount(spec)?;
        Ok(needs)
    }

    fn count(&mut self) -> Result<(), ApiError> {
        self.objects += 1;
        match self.objects > MAX_OBJECTS {
            true => Err(ApiError::invalid(format!("more than {MAX_OBJECTS} objects at once"))),
            false => Ok(()),
        }
    }

    fn attach(&mut self, spec: &Attach) -> Result<(), ApiError> {
        self.count()?;
        let mount = spec.loopback.as_ref().and_then(|loopback| loopback.mount.as_ref());
        mount.map_or(Ok(()), |mount| self.mount(mount))
    }

    fn mount(&mut self, spec: &Mount) -> Result<(), ApiError> {
        self.count()?;
        if spec.id != 0 {
            return Ok(());
        }
        match spec.kind {
            Some(MountKind::Oci) => {
                self.images.extend(spec.oci.as_ref().map(|oci| oci.image.clone()));
            }
            Some(MountKind::Uri) => {
                let file = spec.uri.as_ref().map(|uri| (uri.uri.clone(), uri.digest.clone()));
                self.files.extend(file);
            }
            Some(MountKind::Attach) => {
                if let Some(attach) = spec.attach.as_ref().and_then(|it| it.attach.as_ref()) {
                    self.attach(attach)?;
                }
            }
            Some(MountKind::Bind) => {
                if let Some(mount) = spec.bind.as_ref().and_then(|it| it.mount.as_ref()) {
                    self.mount(mount)?;
                }
            }
            Some(MountKind::Overlay) => {
                let lower = spec.overlay.as_ref().and_then(|it| it.lower.as_ref());
                for mount in lower.into_iter().flatten() {
                    self.mount(mount)?;
                }
            }
            Some(MountKind::Nfs) | None => {}
        }
        Ok(())
    }
}
