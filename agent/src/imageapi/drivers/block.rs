//! Block devices that need no server: those that are there already, and files by way of loop(4).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Modules, open_below};
use crate::imageapi::error::ApiError;
use crate::imageapi::table::Device;
use crate::imageapi::types::{AttachLocal, AttachLoopback};
use crate::sys::loop_device::{self, Setup};

/// A block device that is there already.
pub(in crate::imageapi) fn local(spec: &AttachLocal) -> Result<(String, Device), ApiError> {
    let path = Path::new(&spec.path);
    if !path.is_absolute() {
        return Err(ApiError::invalid(format!("`{}` is no absolute path", spec.path)));
    }
    let metadata = fs::metadata(path);
    let metadata = metadata.map_err(|error| ApiError::failed(format!("{}: {error}", spec.path)))?;
    match metadata.file_type().is_block_device() {
        true => Ok((spec.path.clone(), Device::Local)),
        false => Err(ApiError::invalid(format!("{} is no block device", spec.path))),
    }
}

/// A file as a block device, read-only where it cannot be written. `label` says whose the device is.
pub(in crate::imageapi) fn loopback(
    spec: &AttachLoopback,
    base: &Path,
    label: &str,
    modules: &Modules,
) -> Result<(String, Device), ApiError> {
    modules.need(&["loop"]);
    let failed = |error: io::Error| ApiError::failed(format!("{}: {error}", spec.path));
    let (file, read_only) = match open_below(base, &spec.path, OFlags::RDWR) {
        Ok(file) => (file, false),
        Err(Errno::ROFS | Errno::ACCESS | Errno::TXTBSY) => {
            let file = open_below(base, &spec.path, OFlags::RDONLY);
            (file.map_err(|errno| failed(errno.into()))?, true)
        }
        Err(Errno::ISDIR) => {
            return Err(ApiError::invalid(format!("{} is a directory", spec.path)));
        }
        Err(errno) => return Err(failed(errno.into())),
    };
    let partition = u32::try_from(spec.partition)
        .map_err(|_| ApiError::invalid(format!("there is no partition {}", spec.partition)))?;
    let partitions = spec.read_partitions || partition > 0;
    let file = File::from(file);
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err(ApiError::invalid(format!("{} is no regular file", spec.path)));
    }
    let setup = Setup { read_only, partitions, label };
    let number = loop_device::set_up(&file, &setup)
        .map_err(|error| ApiError::failed(format!("loop device for {}: {error}", spec.path)))?;
    let device = Device::Loop(number);
    if partition == 0 {
        return Ok((format!("/dev/loop{number}"), device));
    }
    let node = format!("/dev/loop{number}p{partition}");
    if Path::new(&node).exists() {
        return Ok((node, device));
    }
    clear(number)?;
    Err(ApiError::failed(format!("{} has no partition {partition}", spec.path)))
}

/// Makes a loop device of a file system image in the store; nobody may write to it.
pub(super) fn of_image(file: &Path, label: &str) -> Result<u32, ApiError> {
    let failed = |error: io::Error| ApiError::failed(format!("{}: {error}", file.display()));
    let opened = File::open(file).map_err(failed)?;
    let setup = Setup { read_only: true, partitions: false, label };
    loop_device::set_up(&opened, &setup).map_err(failed)
}

/// Takes the file away from a loop device. One that has none any more is fine.
pub(in crate::imageapi) fn clear(number: u32) -> Result<(), ApiError> {
    match loop_device::clear(number) {
        Err(error) if error.raw_os_error() != Some(Errno::NXIO.raw_os_error()) => {
            Err(ApiError::failed(format!("detach /dev/loop{number}: {error}")))
        }
        _ => Ok(()),
    }
}

/// Clears every loop device with one of our labels, `PREFIX` and a number, whose number is not among these: what an agent that
/// was killed in the middle left.
pub(in crate::imageapi) fn sweep(prefix: &str, keep: &[u32]) {
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
        let Some(number) = number else { continue };
        if keep.contains(&number) || !entry.path().join("loop").exists() {
            continue;
        }
        let ours = loop_device::label(number).is_ok_and(|label| label.starts_with(prefix));
        if ours && let Err(error) = clear(number) {
            log::warn!("imageapi: {error}");
        }
    }
}

/// Whether nobody has the device mounted or else for himself (open(2), O_EXCL on a block device).
///
/// # Errors
/// [`ApiError::busy`].
pub(in crate::imageapi) fn check_unused(device: &Path) -> Result<(), ApiError> {
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    match rustix::fs::open(device, flags, rustix::fs::Mode::empty()) {
        Err(Errno::BUSY) => Err(ApiError::busy(format!("{} is in use", device.display()))),
        _ => Ok(()),
    }
}
