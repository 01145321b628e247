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
//! them away. How things are made stands in `make`, how containers are started and stopped in `containers`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::ids::Digest;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::drivers::{self, Modules, block, iscsi, rbd};
use super::error::ApiError;
use super::table::{Device, Item, Mounted, Refusal, Sort, Table};
use crate::containers::{Handle, read_json, write_json};
use crate::paths::RunDirs;
use crate::pull::Puller;
use crate::store::Pin;

/// The table's file.
const OBJECTS: &str = "objects.json";
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
    pub(super) pins: BTreeMap<i64, Arc<Pin>>,
}

/// The engine. One for a run directory.
#[derive(Debug)]
pub struct Engine {
    pub(super) dirs: RunDirs,
    pub(super) hostname: String,
    boot_id: String,
    /// What the labels of our loop devices begin with.
    pub(super) label: String,
    pub(super) puller: Puller,
    pub(super) modules: Modules,
    present: Mutex<Present>,
    turn: Mutex<()>,
    /// The table has changed: there may be something to collect.
    changed: Notify,
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
            changed: Notify::new(),
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
        self.changed.notify_one();
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

    /// Waits for the next change of the table; one that nobody has waited for counts.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
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
                Device::Iscsi(session) => iscsi::detach(*session),
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
