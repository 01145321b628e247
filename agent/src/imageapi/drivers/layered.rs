//! Mounts with a writable part: overlays of other mounts, images of registries, archives by URL. And file system images by URL,
//! which are mounted as they are.
//!
//! ```text
//! ID/rw/           a tmpfs of limited size
//! ID/rw/overlay/   upper, work and root of the overlay (crate::mounts)
//! ID/root          a file system image, mounted by a loop device
//! ```
//! The limit is a ceiling, not a reservation: memory is taken as it is written.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::mount::{MountAttrFlags, MountFlags, OpenTreeFlags, open_tree};

use super::{block, make_dir, unmount};
use crate::agent::chain;
use crate::imageapi::error::ApiError;
use crate::imageapi::table::Mounted;
use crate::imageapi::types::{MountOci, MountOverlay, MountUri};
use crate::mounts;
use crate::pull::image::{Content, PulledFile, PulledOne};
use crate::store::Pin;
use crate::sys::process::mount_setattr;

/// Which part of the node's memory may be written to one mount where a request does not say.
const MEMORY_PART: u64 = 4;
/// Names of the directories.
const WRITABLE: &str = "rw";
const OVERLAY: &str = "overlay";

/// The overlay's own directory, if this is an overlay's root that was mounted here.
pub(super) fn overlay_of(root: &Path) -> Option<&Path> {
    let overlay = root.parent().filter(|dir| dir.ends_with(Path::new(WRITABLE).join(OVERLAY)))?;
    root.ends_with("root").then_some(overlay)
}

/// Bytes that may be written: those of the request, or a part of the memory.
fn limit(size: i64) -> Result<u64, ApiError> {
    let memory = || {
        let info = rustix::system::sysinfo();
        let unit = u64::from(info.mem_unit).max(1);
        info.totalram.saturating_mul(unit)
    };
    match u64::try_from(size) {
        Err(_) => Err(ApiError::invalid(format!("a size of {size} bytes"))),
        Ok(0) => Ok(memory() / MEMORY_PART),
        Ok(size) => Ok(size),
    }
}

/// Mounts the tmpfs and what `overlay` makes in it; undoes all of it when that fails.
fn writable(
    dir: &Path,
    size: i64,
    read_only: bool,
    overlay: impl FnOnce(&Path) -> Result<PathBuf, ApiError>,
) -> Result<Mounted, ApiError> {
    let limit = limit(size)?;
    let rw = dir.join(WRITABLE);
    make_dir(&rw)?;
    let options = std::ffi::CString::new(format!("mode=0700,size={limit}"));
    let options = options.map_err(ApiError::internal)?;
    let flags = MountFlags::NODEV | MountFlags::NOSUID;
    rustix::mount::mount("layercake", &rw, "tmpfs", flags, options.as_c_str())
        .map_err(|errno| ApiError::failed(format!("tmpfs at {}: {errno}", rw.display())))?;
    let dir_of_overlay = rw.join(OVERLAY);
    let made = overlay(&dir_of_overlay).and_then(|root| match read_only {
        true => make_read_only(&root).map(|()| root),
        false => Ok(root),
    });
    let layers = vec![dir_of_overlay.join("root"), rw];
    let mounted = Mounted { mountpoint: dir_of_overlay.join("root"), layers, ..Mounted::default() };
    match made {
        Ok(_) => Ok(mounted),
        Err(error) => {
            if let Err(error) = unmount(&mounted, dir) {
                log::warn!("imageapi: {error}");
            }
            Err(error)
        }
    }
}

fn make_read_only(root: &Path) -> Result<(), ApiError> {
    let failed = |error: std::io::Error| ApiError::failed(format!("{}: {error}", root.display()));
    let tree = open_tree(rustix::fs::CWD, root, OpenTreeFlags::OPEN_TREE_CLOEXEC);
    let tree = tree.map_err(|errno| failed(errno.into()))?;
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into();
    mount_setattr(&tree, read_only, false).map_err(failed)
}

/// An overlay over these roots, topmost first.
pub(in crate::imageapi) fn overlay(
    spec: &MountOverlay,
    lower: &[PathBuf],
    dir: &Path,
) -> Result<Mounted, ApiError> {
    let lowest_first: Vec<PathBuf> = lower.iter().rev().cloned().collect();
    if lowest_first.is_empty() {
        return Err(ApiError::invalid("overlay.lower is empty"));
    }
    writable(dir, spec.size, false, |overlay| {
        mounts::mount_overlay(&lowest_first, overlay).map_err(|error| failed(&error))
    })
}

/// What the overlay writes to: `upperdir` and `workdir`.
pub(in crate::imageapi) fn upper_and_work(mounted: &Mounted) -> Option<(PathBuf, PathBuf)> {
    let overlay = overlay_of(&mounted.mountpoint)?;
    Some((overlay.join("upper"), overlay.join("work")))
}

/// An image of a registry.
pub(in crate::imageapi) fn oci(
    spec: &MountOci,
    image: &PulledOne,
    dir: &Path,
) -> Result<(Mounted, Arc<Pin>), ApiError> {
    let mut mounted = writable(dir, spec.size, spec.ro, |overlay| {
        mounts::mount_image(&image.image.root, overlay).map_err(|error| failed(&error))
    })?;
    mounted.config = Some(image.image.config.clone());
    mounted.digest = Some(image.digest);
    Ok((mounted, image.pin()))
}

/// A file by URL. `label` says whose its loop device is.
pub(in crate::imageapi) fn uri(
    spec: &MountUri,
    file: &PulledFile,
    dir: &Path,
    label: &str,
) -> Result<(Mounted, Arc<Pin>), ApiError> {
    let kind = match file.content {
        Content::Tar | Content::Cpio => {
            let mounted = writable(dir, spec.size, spec.ro, |overlay| {
                let layer = std::slice::from_ref(&file.path);
                mounts::mount_overlay(layer, overlay).map_err(|error| failed(&error))
            })?;
            return Ok((mounted, file.pin()));
        }
        Content::Erofs => "erofs",
        Content::Squashfs => "squashfs",
    };
    let root = dir.join("root");
    make_dir(&root)?;
    let number = block::of_image(&file.path, label)?;
    let device = format!("/dev/loop{number}");
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    match rustix::mount::mount(device.as_str(), &root, kind, flags, None) {
        Ok(()) => {
            let (mountpoint, device) = (root.clone(), Some(number));
            let layers = vec![root];
            Ok((Mounted { mountpoint, layers, device, ..Mounted::default() }, file.pin()))
        }
        Err(errno) => {
            block::clear(number)?;
            Err(ApiError::failed(format!("mount the {kind} of {}: {errno}", spec.uri)))
        }
    }
}

fn failed(error: &dyn std::error::Error) -> ApiError {
    ApiError::failed(chain(error))
}
