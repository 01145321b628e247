//! What the ImageAPI's objects are made of: block devices and file systems, made and taken away. Decides nothing about who
//! needs them; that is [`super::engine`]'s.
//!
//! | module | makes |
//! |---|---|
//! | `block` | attachments: local, loopback |
//! | `iscsi` | attachments of an iSCSI target's LUNs |
//! | `rbd` | attachments of a Ceph cluster's images |
//! | `plain` | mounts that are one mount: attach, bind, nfs |
//! | `layered` | mounts with a writable part of limited size: overlay, oci, uri |

pub(super) mod block;
pub(super) mod iscsi;
pub(super) mod layered;
pub(super) mod plain;
pub(super) mod rbd;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::error::ApiError;
use super::table::Mounted;
use crate::modules::load::Loader;

/// Kernel modules that a driver needs, loaded when it does. Where modprobe does that, outside Layer0, this does nothing.
#[derive(Debug)]
pub(super) struct Modules {
    loader: Option<Mutex<Loader>>,
}

impl Modules {
    /// With `standalone` the kernel calls modprobe itself.
    pub(super) fn new(standalone: bool) -> Self {
        if standalone {
            return Self { loader: None };
        }
        match Loader::open(&crate::identity::release()) {
            Ok(loader) => Self { loader: Some(Mutex::new(loader)) },
            Err(error) => {
                log::warn!("imageapi: {}", crate::agent::chain(&error));
                Self { loader: None }
            }
        }
    }

    /// Loads these as far as they are there. Whether that was enough shows by what is done next.
    pub(super) fn need(&self, names: &[&str]) {
        let Some(loader) = &self.loader else { return };
        let mut loader = loader.lock().unwrap_or_else(PoisonError::into_inner);
        for name in names {
            if let Err(error) = loader.load(name) {
                log::debug!("imageapi: {error}");
            }
        }
    }
}

/// Opens a path of a request below a directory: links and `..` do not lead out of it.
fn open_below(base: &Path, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let dir = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(base, dir, Mode::empty())?;
    let below = path.trim_start_matches('/');
    let below = if below.is_empty() { "." } else { below };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root, below, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Makes a directory for a mount, which nobody but root enters on the way.
fn make_dir(dir: &Path) -> Result<(), ApiError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| ApiError::failed(format!("cannot make {}: {error}", dir.display())))
}

/// Unmounts what a mount consists of and removes its directories. What is gone already is fine.
///
/// # Errors
/// [`ApiError::busy`] when the system uses it; then nothing has changed, unless a part below the root alone was in use.
pub(super) fn unmount(mounted: &Mounted, dir: &Path) -> Result<(), ApiError> {
    for at in &mounted.layers {
        match rustix::mount::unmount(at, UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(Errno::BUSY) => {
                return Err(ApiError::busy(format!("{} is in use", at.display())));
            }
            Err(errno) => {
                let reason = io::Error::from(errno);
                return Err(ApiError::failed(format!("unmount {}: {reason}", at.display())));
            }
        }
        // An overlay's own directory, with what was written.
        if let Some(overlay) = layered::overlay_of(at)
            && let Err(error) = crate::mounts::unmount_overlay(overlay)
        {
            return Err(ApiError::failed(crate::agent::chain(&error)));
        }
    }
    if let Some(number) = mounted.device {
        block::clear(number)?;
    }
    // Never recursively: if something is still mounted there, it is not ours to delete.
    for path in mounted.layers.iter().map(std::path::PathBuf::as_path).chain([dir]) {
        match fs::remove_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(ApiError::failed(format!("remove {}: {error}", path.display())));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Takes away everything that is mounted below a directory, whatever it is, and the directory: what an agent that was killed
/// in the middle left.
pub(super) fn sweep(dir: &Path) {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points = points_below(&mountinfo, dir);
    points.reverse();
    for point in points {
        let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
        match rustix::mount::unmount(&point, flags) {
            Ok(()) => log::info!("imageapi: unmounted {}, which was left over", point.display()),
            Err(errno) => log::warn!("imageapi: {} is left: {errno}", point.display()),
        }
    }
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if points_below(&mountinfo, dir).is_empty()
        && let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("imageapi: {} is left: {error}", dir.display());
    }
}

/// The mount points at or below a directory, in the order they were mounted (proc_pid_mountinfo(5)).
fn points_below(mountinfo: &str, dir: &Path) -> Vec<std::path::PathBuf> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
    let points = points.map(|point| std::path::PathBuf::from(point.replace("\\040", " ")));
    points.filter(|point| point.starts_with(dir)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_at_or_below_the_directory_are_swept() {
        let line = |at: &str| format!("36 35 98:0 /x {at} rw,noatime - ext4 /dev/x rw\n");
        let text: String =
            ["/", "/run/m", "/run/m/1/rw", "/run/mm", "/run/m/a\\040b"].map(line).concat();
        let found = points_below(&text, Path::new("/run/m"));
        assert_eq!(found, ["/run/m", "/run/m/1/rw", "/run/m/a b"].map(Path::new));
    }

    #[test]
    fn paths_stay_below_their_base() {
        let dir = tempfile::tempdir().expect("directory");
        fs::create_dir(dir.path().join("inner")).expect("inner");
        std::os::unix::fs::symlink("/", dir.path().join("out")).expect("link");
        let here = rustix::fs::stat(dir.path()).expect("stat").st_ino;
        for path in ["", "/", "inner/..", "../../..", "out"] {
            let fd = open_below(dir.path(), path, OFlags::PATH).expect(path);
            assert_eq!(rustix::fs::fstat(fd).expect("stat").st_ino, here, "{path}");
        }
    }
}
