//! File systems that are mounted straight from the store (mount forms), to be the lower layer of containers' overlays.
//!
//! ```text
//! lowers/HEX/fs            the file system, mounted once however many containers use it
//! lowers/HEX/users/NAME    a link to the directory of each overlay that uses it
//! DIR/lower                in such a directory: the link back, to lowers/HEX
//! ```
//! Who uses it stands on disk alone, written before the mount and removed after the overlay: an agent that was killed
//! at any point leaves what [`sweep`] of the next one sets right. Loop devices are the kernel's to take away. Does not fetch
//! and does not verify: what is mounted was hashed by who put it into the store.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use protocol::ids::Digest;
use protocol::oci::mount::MountForm;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::{MountError, directory, unmount_all};
use crate::identity;
use crate::modules::load::Loader;
use crate::sys::loop_device::{CONTROL, LoopDevice};

/// Name of the link in an overlay's directory.
const LINK: &str = "lower";

/// A mount form's blob in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    /// What it is.
    pub form: MountForm,
    /// The blob, a file that never changes.
    pub blob: PathBuf,
    /// The directory for its mount and its users.
    pub place: PathBuf,
}

/// One thread at a time counts users and mounts or unmounts by what it found: a run directory has one agent.
static TURN: Mutex<()> = Mutex::new(());

/// Whether this kernel can mount such a file system; its module, and the loop driver's, are loaded where there are any.
///
/// # Errors
/// A sentence that says what is missing.
pub fn usable(form: MountForm) -> Result<(), String> {
    let known = || fsopen(form.as_str(), FsOpenFlags::FSOPEN_CLOEXEC).map(drop);
    let known = known().or_else(|_| {
        load(form.as_str());
        known()
    });
    known.map_err(|errno| format!("this kernel has no {form}: {}", io::Error::from(errno)))?;
    if !Path::new(CONTROL).exists() {
        load("loop");
    }
    Ok(())
}

/// Loads a module as the kernel's own helper would, which Layer0 does not have. Whether it worked shows by what comes next.
fn load(name: &str) {
    let loaded = Loader::open(&identity::release()).and_then(|mut loader| loader.load(name));
    if let Err(error) = loaded {
        log::debug!("module {name}: {error}");
    }
}

/// Mounts a blob where nobody sees it and lets it go again: whether the kernel can read it, compression and all.
///
/// # Errors
/// The kernel's answer.
pub fn try_out(form: MountForm, blob: &Path) -> Result<(), MountError> {
    open(form, blob).map(drop)
}

impl FileSystem {
    /// Mounts the file system unless it is, on behalf of the overlay in `user`, and returns its root.
    pub(super) fn attach(&self, user: &Path) -> Result<PathBuf, MountError> {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let users = self.place.join("users");
        let root = self.place.join("fs");
        for dir in [&users, &root] {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(directory("make", dir))?;
        }
        link(user, &users.join(user_name(user)))?;
        link(&self.place, &user.join(LINK))?;
        if !is_mount_point(&root) {
            let mount = open(self.form, &self.blob)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(mount.as_fd(), "", CWD, &root, flags)
                .map_err(|errno| failed(self.form, &self.blob, errno.into()))?;
        }
        Ok(root)
    }
}

/// What the overlay in `user` uses, to be given to [`release`] when that directory is gone.
pub(super) fn used_by(user: &Path) -> Option<PathBuf> {
    fs::read_link(user.join(LINK)).ok()
}

/// Counts the users of a place under `lowers/`, and unmounts and removes it when there are none left.
///
/// # Errors
/// If the kernel refuses to unmount it, or a directory cannot be read or removed.
pub(super) fn release(place: &Path) -> Result<(), MountError> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let users = place.join("users");
    let mut left = 0_usize;
    match fs::read_dir(&users) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(directory("list", &users)(error)),
        Ok(entries) => {
            for entry in entries.flatten() {
                let user = fs::read_link(entry.path()).unwrap_or_default();
                // A directory that has been used for another file system since does not count.
                if used_by(&user).is_some_and(|used| used == place) {
                    left = left.saturating_add(1);
                } else {
                    remove(fs::remove_file(entry.path()), &entry.path())?;
                }
            }
        }
    }
    if left > 0 {
        return Ok(());
    }
    let root = place.join("fs");
    unmount_all(&root)?;
    for dir in [root.as_path(), &users, place] {
        // Not recursively: what may still be mounted somewhere in it is nobody's to delete.
        remove(fs::remove_dir(dir), dir)?;
    }
    Ok(())
}

/// Sets right what an agent that was killed left: what no overlay uses any more is unmounted.
pub fn sweep(lowers: &Path) {
    let Ok(entries) = fs::read_dir(lowers) else { return };
    for entry in entries.flatten() {
        if let Err(error) = release(&entry.path()) {
            log::warn!("left over: {error}");
        }
    }
}

/// A symbolic link, whatever was there before.
fn link(to: &Path, at: &Path) -> Result<(), MountError> {
    remove(fs::remove_file(at), at)?;
    std::os::unix::fs::symlink(to, at).map_err(directory("make the link", at))
}

fn remove(removed: io::Result<()>, path: &Path) -> Result<(), MountError> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(directory("remove", path)),
    }
}

fn user_name(user: &Path) -> String {
    Digest::of(user.as_os_str().as_encoded_bytes()).hex()
}

fn is_mount_point(dir: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    dir.parent().is_some_and(|parent| device(parent) != device(dir))
}

/// A mount of the blob that is attached nowhere yet: straight from the file where the kernel can, else by a loop device.
fn open(form: MountForm, blob: &Path) -> Result<OwnedFd, MountError> {
    if form == MountForm::Erofs {
        // Since Linux 6.12, and not from every file system: tmpfs is one of those.
        match mount_of(form, blob) {
            Err(errno) => log::debug!("{}: not straight from the file: {errno}", blob.display()),
            Ok(mount) => return Ok(mount),
        }
    }
    let failed = |error| failed(form, blob, error);
    let file = File::open(blob).map_err(failed)?;
    let device = LoopDevice::attach(&file).map_err(failed)?;
    mount_of(form, device.path()).map_err(|errno| failed(errno.into()))
}

fn mount_of(form: MountForm, source: &Path) -> Result<OwnedFd, Errno> {
    let context = fsopen(form.as_str(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", source)?;
    fsconfig_set_flag(context.as_fd(), "ro")?;
    fsconfig_create(context.as_fd())?;
    // Set-user-ID programs work through the overlay, whose own flags are the container's.
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn failed(form: MountForm, blob: &Path, source: io::Error) -> MountError {
    MountError::FileSystem { form, blob: blob.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use rustix::mount::UnmountFlags;

    use super::*;
    use crate::mounts::tests::in_namespace;
    use crate::mounts::{ImageRoot, mount_image, testing, unmount_overlay};

    /// A blob of this form in a directory laid out as a run directory.
    fn stored(base: &Path, form: MountForm) -> ImageRoot {
        let bytes = testing::file_system(form, &[("form", form.as_str().as_bytes())]);
        let name = Digest::of(&bytes).hex();
        let blob = base.join("filesystems").join(&name);
        fs::create_dir_all(base.join("filesystems")).expect("directory");
        fs::write(&blob, bytes).expect("blob");
        let place = base.join("lowers").join(name);
        ImageRoot::FileSystem(FileSystem { form, blob, place })
    }

    /// Mounts of a file system below a directory.
    fn mounts(base: &Path, kind: &str) -> usize {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("mountinfo");
        let (base, kind) = (base.to_str().expect("utf-8"), format!(" - {kind} "));
        table.lines().filter(|line| line.contains(base) && line.contains(&kind)).count()
    }

    /// Loop devices whose file lies below a directory.
    fn loops(base: &Path) -> usize {
        let devices = fs::read_dir("/sys/block").expect("sysfs").flatten();
        let file = |entry: fs::DirEntry| {
            fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default()
        };
        devices.map(file).filter(|file| file.contains(base.to_str().expect("utf-8"))).count()
    }

    #[test]
    fn one_mount_is_shared_by_all_and_goes_with_the_last() {
        in_namespace(|base| {
            for form in MountForm::ALL {
                let image = stored(base, form);
                let dirs = ["a", "b"].map(|name| base.join("mounts").join(name));
                for dir in &dirs {
                    let root = mount_image(&image, dir).expect("mount");
                    let read = || fs::read_to_string(root.join("form")).expect("form");
                    assert_eq!(read(), form.as_str());
                    fs::write(root.join("form"), "changed").expect("writable");
                    assert_eq!(read(), "changed");
                }
                assert_eq!((mounts(base, form.as_str()), mounts(base, "overlay")), (1, 2));
                assert_eq!(loops(base), 1, "tmpfs has no file-backed mounts");
                unmount_overlay(&dirs[0]).expect("unmount");
                sweep(&base.join("lowers"));
                assert_eq!(mounts(base, form.as_str()), 1, "the other still uses it");
                let held = fs::File::open(dirs[1].join("root/form")).expect("open");
                unmount_overlay(&dirs[1]).expect("unmount while it is in use");
                assert_eq!((mounts(base, form.as_str()), mounts(base, "overlay")), (0, 0));
                assert_eq!(fs::read_dir(base.join("lowers")).expect("list").count(), 0);
                drop(held);
                assert_eq!(loops(base), 0);
            }
        });
    }

    #[test]
    fn what_a_killed_agent_left_half_mounted_is_swept() {
        in_namespace(|base| {
            let image = stored(base, MountForm::Squashfs);
            let (dir, lowers) = (base.join("mounts/a"), base.join("lowers"));
            // Killed after the overlay's directory was removed, before the file system was unmounted.
            let root = mount_image(&image, &dir).expect("mount");
            rustix::mount::unmount(&root, UnmountFlags::empty()).expect("unmount");
            fs::remove_dir_all(&dir).expect("remove");
            sweep(&lowers);
            assert_eq!((mounts(base, "squashfs"), loops(base)), (0, 0));
            // Killed before the mount: only the links are there.
            let ImageRoot::FileSystem(file_system) = &image else { panic!("no file system") };
            fs::create_dir_all(&dir).expect("directory");
            fs::create_dir_all(file_system.place.join("users")).expect("users");
            let user = file_system.place.join("users").join(user_name(&dir));
            std::os::unix::fs::symlink(&dir, user).expect("link");
            sweep(&lowers);
            assert!(!file_system.place.exists());
            mount_image(&image, &dir).expect("as if nothing had been");
            unmount_overlay(&dir).expect("unmount");
            assert_eq!(loops(base), 0);
        });
    }

    #[test]
    fn what_is_no_file_system_is_named_and_leaves_nothing() {
        in_namespace(|base| {
            let blob = base.join("junk");
            fs::write(&blob, [7; 8192]).expect("junk");
            for form in MountForm::ALL {
                let place = base.join("lowers/junk");
                let image = FileSystem { form, blob: blob.clone(), place: place.clone() };
                let dir = base.join("mounts/a");
                let error = mount_image(&ImageRoot::FileSystem(image), &dir).expect_err("junk");
                assert!(error.to_string().contains(&format!("{form} of ")), "{error}");
                assert!(!dir.exists() && !place.exists());
                try_out(form, &blob).expect_err("junk");
            }
            assert_eq!(loops(base), 0);
        });
    }

    #[test]
    fn an_erofs_on_a_disk_needs_no_loop_device_where_the_kernel_is_new() {
        // Beside the tests' program: a directory of a disk, unlike the others'.
        let here = std::env::current_exe().expect("program");
        let dir = tempfile::tempdir_in(here.parent().expect("directory")).expect("directory");
        in_namespace(|base| {
            let disk = base.join("disk");
            fs::create_dir(&disk).expect("directory");
            rustix::mount::mount_bind(dir.path(), &disk).expect("bind");
            let image = stored(&disk, MountForm::Erofs);
            let root = mount_image(&image, &base.join("mounts/a")).expect("mount");
            assert_eq!(fs::read_to_string(root.join("form")).expect("form"), "erofs");
            let ImageRoot::FileSystem(file_system) = &image else { panic!("no file system") };
            let straight = mount_of(MountForm::Erofs, &file_system.blob).is_ok();
            let device = loops(dir.path()) + loops(&disk);
            assert_eq!(device == 0, straight, "a loop device where the file would have done");
            unmount_overlay(&base.join("mounts/a")).expect("unmount");
            assert_eq!(loops(dir.path()) + loops(&disk), 0);
            rustix::mount::unmount(&disk, UnmountFlags::empty()).expect("unbind");
        });
    }
}
