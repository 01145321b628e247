//! Mounts a container's root: an overlay of shared, unchanging layers, or of one file system that is mounted as it was
//! fetched ([`lower`]), with an upper directory of its own.
//!
//! ```text
//! DIR/upper   what the container writes
//! DIR/work    overlayfs' own
//! DIR/empty   the lower layer of an image without layers
//! DIR/root    the mounted root
//! DIR/lower   where the file system below it is mounted, if it is one
//! ```
//! Uses the new mount interface (fsopen(2), `lowerdir+` since Linux 6.5) and falls back to mount(2) where the kernel
//! lacks it. Flags such as nosuid are set by the container's own remount.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, move_mount,
};

pub mod lower;
#[cfg(test)]
pub(crate) mod testing;

pub use lower::FileSystem;

/// Longest option text of mount(2): one page, with room for the rest.
const MAX_OPTIONS: usize = 4000;
/// Most mounts that [`unmount_overlay`] expects over each other.
const MAX_STACKED: usize = 16;

/// Why a root could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A directory could not be made, read or removed.
    #[error("cannot {action} {}", path.display())]
    Directory {
        /// What was tried.
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The overlay of layers whose owners are mapped could not be mounted.
    #[error("cannot mount a root of {layers} layers with owners mapped to {base}")]
    Mapped {
        /// How many layers it has.
        layers: usize,
        /// The user id of the node that 0 of the image becomes.
        base: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The overlay could not be mounted.
    #[error("cannot mount an overlay of {layers} layers at {}", path.display())]
    Overlay {
        /// How many layers it has.
        layers: usize,
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A file system could not be mounted.
    #[error("cannot mount the {form} of {}", blob.display())]
    FileSystem {
        /// Which file system.
        form: protocol::oci::mount::MountForm,
        /// The blob that holds it.
        blob: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Something could not be unmounted.
    #[error("cannot unmount {}", path.display())]
    Unmount {
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn directory(action: &'static str, path: &Path) -> impl Fn(io::Error) -> MountError {
    move |source| MountError::Directory { action, path: path.to_owned(), source }
}

/// What an image's root is made of. Shared by all who use it, never to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageRoot {
    /// Its unpacked layers, lowest first.
    Layers(Vec<PathBuf>),
    /// The whole as one file system.
    FileSystem(FileSystem),
}

/// Mounts an overlay over the image with its writable part in `dir`, and returns the mounted root `dir/root`, as
/// [`mount_overlay`] does. A file system below it is mounted first, unless another overlay has it mounted.
///
/// # Errors
/// As [`mount_overlay`], or if the file system cannot be mounted.
pub fn mount_image(image: &ImageRoot, dir: &Path) -> Result<PathBuf, MountError> {
    mount_image_by(image, dir, |layers| mount_overlay(layers, dir))
}

/// As [`mount_image`], with an overlay of one's own: `overlay` gets the layers, lowest first.
///
/// # Errors
/// As [`mount_image`].
pub fn mount_image_by(
    image: &ImageRoot,
    dir: &Path,
    overlay: impl FnOnce(&[PathBuf]) -> Result<PathBuf, MountError>,
) -> Result<PathBuf, MountError> {
    let file_system = match image {
        ImageRoot::Layers(layers) => return overlay(layers),
        ImageRoot::FileSystem(file_system) => file_system,
    };
    fs::create_dir_all(dir).map_err(directory("make", dir))?;
    let mounted = file_system.attach(dir).and_then(|lower| overlay(&[lower]));
    if mounted.is_err()
        && let Err(error) = unmount_overlay(dir)
    {
        log::warn!("{error}");
    }
    mounted
}

/// Mounts an overlay of these layers, lowest first, with its writable part in `dir`, and returns the mounted root
/// `dir/root`. `dir` is made; it must lie on a file system that can be an upper layer (tmpfs, ext4).
///
/// # Errors
/// If a directory cannot be made or the kernel refuses the mount; nothing stays mounted then.
pub fn mount_overlay(layers: &[PathBuf], dir: &Path) -> Result<PathBuf, MountError> {
    let (upper, work, root) = (dir.join("upper"), dir.join("work"), dir.join("root"));
    let empty = dir.join("empty");
    for path in [&upper, &work, &root] {
        fs::create_dir_all(path).map_err(directory("make", path))?;
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
        .map_err(directory("set the mode of", dir))?;
    let mut lowers: Vec<&Path> = layers.iter().rev().map(PathBuf::as_path).collect();
    if lowers.is_empty() {
        fs::create_dir_all(&empty).map_err(directory("make", &empty))?;
        fs::set_permissions(&empty, fs::Permissions::from_mode(0o755))
            .map_err(directory("set the mode of", &empty))?;
        lowers.push(&empty);
    }
    // The root of an overlay has the upper directory's owner and mode: those of the image's highest layer are meant.
    if let Some(top) = lowers.first() {
        let meta = fs::metadata(top).map_err(directory("examine", top))?;
        std::os::unix::fs::chown(&upper, Some(meta.uid()), Some(meta.gid()))
            .map_err(directory("set the owner of", &upper))?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(meta.mode() & 0o7777))
            .map_err(directory("set the mode of", &upper))?;
    }
    let mounted = match mount_new(&lowers, &upper, &work, &root) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            mount_old(&lowers, &upper, &work, &root)
        }
        done => done,
    };
    match mounted {
        Ok(()) => Ok(root),
        Err(errno) => {
            Err(MountError::Overlay { layers: layers.len(), path: root, source: errno.into() })
        }
    }
}

/// Unmounts what [`mount_overlay`] or [`mount_image`] mounted and removes `dir` with all that was written, and the file
/// system below it when nobody else uses that. Nothing there is fine. A root
/// that is still in use is detached: it goes away with its last user.
///
/// # Errors
/// If the kernel refuses.
pub fn unmount_overlay(dir: &Path) -> Result<(), MountError> {
    unmount_all(&dir.join("root"))?;
    let lower = lower::used_by(dir);
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        done => done.map_err(directory("remove", dir))?,
    }
    lower.map_or(Ok(()), |lower| lower::release(&lower))
}

/// Unmounts everything that is mounted at this place; what is in use is detached.
fn unmount_all(root: &Path) -> Result<(), MountError> {
    let mut flags = UnmountFlags::NOFOLLOW;
    for _ in 0..MAX_STACKED {
        match rustix::mount::unmount(root, flags) {
            Ok(()) | Err(Errno::INTR) => {}
            Err(Errno::BUSY) => flags |= UnmountFlags::DETACH,
            // Not a mount point (any more), or not there at all.
            Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => break,
            Err(errno) => {
                return Err(MountError::Unmount { path: root.to_owned(), source: errno.into() });
            }
        }
    }
    Ok(())
}

/// Whether [`mount_overlay`] has mounted something in `dir` that is still there.
#[must_use]
pub fn is_mounted(dir: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    device(&dir.join("root")).is_some_and(|root| device(dir) != Some(root))
}

/// One `lowerdir+` a layer: neither colons nor the length of the list matter.
fn mount_new(lowers: &[&Path], upper: &Path, work: &Path, root: &Path) -> Result<(), Errno> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", "overlay")?;
    for lower in lowers {
        fsconfig_set_string(context.as_fd(), "lowerdir+", *lower)?;
    }
    fsconfig_set_string(context.as_fd(), "upperdir", upper)?;
    fsconfig_set_string(context.as_fd(), "workdir", work)?;
    fsconfig_create(context.as_fd())?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let mount = fsmount(context.as_fd(), flags, MountAttrFlags::empty())?;
    move_mount(mount.as_fd(), "", CWD, root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// The colon list of mount(2). A list that is too long for its page is written with `/proc/self/fd` names.
fn mount_old(lowers: &[&Path], upper: &Path, work: &Path, root: &Path) -> Result<(), Errno> {
    let names: Vec<Vec<u8>> = lowers.iter().map(|lower| escaped(lower)).collect();
    let mut options = old_options(&names, upper, work);
    let mut held: Vec<OwnedFd> = Vec::new();
    if options.len() > MAX_OPTIONS {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        for lower in lowers {
            held.push(rustix::fs::open(*lower, flags, Mode::empty())?);
        }
        let name = |fd: &OwnedFd| format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes();
        options = old_options(&held.iter().map(name).collect::<Vec<_>>(), upper, work);
    }
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount("overlay", root, "overlay", MountFlags::empty(), options.as_c_str())
}

fn old_options(lowers: &[Vec<u8>], upper: &Path, work: &Path) -> Vec<u8> {
    let lower = lowers.join(&b':');
    let (upper, work) = (escaped(upper), escaped(work));
    [b"lowerdir=", lower.as_slice(), b",upperdir=", &upper, b",workdir=", &work].concat()
}

/// A path as overlayfs' option parser wants it: backslash before colon, comma and backslash.
fn escaped(path: &Path) -> Vec<u8> {
    let mut out = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b':' | b',' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a test in a mount namespace of its own, on a tmpfs that goes with it.
    pub(super) fn in_namespace(test: impl FnOnce(&Path) + Send) {
        let dir = tempfile::tempdir().expect("directory");
        std::thread::scope(|scope| {
            let run = || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("unshare");
                let private = rustix::mount::MountPropagationFlags::REC
                    | rustix::mount::MountPropagationFlags::PRIVATE;
                rustix::mount::mount_change("/", private).expect("private");
                rustix::mount::mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), None)
                    .expect("tmpfs");
                test(dir.path());
            };
            scope.spawn(run).join().expect("test");
        });
    }

    fn layer(base: &Path, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let layer = base.join(name);
        fs::create_dir_all(&layer).expect("layer");
        for (file, content) in files {
            fs::write(layer.join(file), content).expect("file");
        }
        layer
    }

    #[test]
    fn layers_lie_over_each_other_and_are_never_written() {
        in_namespace(|base| {
            let low = layer(base, "low", &[("a", "low"), ("b", "low")]);
            let high = layer(base, "high:er,\\", &[("a", "high")]);
            fs::set_permissions(&high, fs::Permissions::from_mode(0o751)).expect("mode");
            for old in [false, true] {
                let dir = base.join("mounts/c1");
                let root = mount_overlay(&[low.clone(), high.clone()], &dir).expect("mount");
                if old {
                    rustix::mount::unmount(&root, UnmountFlags::empty()).expect("unmount");
                    let lowers = [high.as_path(), low.as_path()];
                    mount_old(&lowers, &dir.join("upper"), &dir.join("work"), &root).expect("old");
                }
                assert_eq!(fs::read_to_string(root.join("a")).expect("a"), "high");
                assert_eq!(fs::read_to_string(root.join("b")).expect("b"), "low");
                assert_eq!(fs::metadata(&root).expect("root").mode() & 0o7777, 0o751);
                fs::write(root.join("b"), "changed").expect("write");
                assert_eq!(fs::read_to_string(low.join("b")).expect("b"), "low");
                unmount_overlay(&dir).expect("unmount");
                assert!(!dir.exists());
                unmount_overlay(&dir).expect("nothing there is fine");
            }
        });
    }

    #[test]
    fn an_image_without_layers_is_an_empty_root() {
        in_namespace(|base| {
            let dir = base.join("mounts/c1");
            let root = mount_overlay(&[], &dir).expect("mount");
            assert_eq!(fs::read_dir(&root).expect("list").count(), 0);
            fs::write(root.join("x"), "x").expect("writable");
            unmount_overlay(&dir).expect("unmount");
        });
    }

    #[test]
    fn a_busy_root_is_detached() {
        in_namespace(|base| {
            let dir = base.join("mounts/c1");
            let low = layer(base, "low", &[("a", "low")]);
            let root = mount_overlay(&[low], &dir).expect("mount");
            let held = fs::File::open(root.join("a")).expect("open");
            assert!(is_mounted(&dir));
            unmount_overlay(&dir).expect("unmount");
            assert!(!is_mounted(&dir));
            assert!(!dir.exists());
            assert_eq!(io::read_to_string(held).expect("still readable"), "low");
        });
    }

    #[test]
    fn more_layers_than_a_page_holds_are_mounted_both_ways() {
        in_namespace(|base| {
            let long = "a-name-as-long-as-a-digest-".repeat(3);
            let layers: Vec<_> = (0..120)
                .map(|n| layer(base, &format!("{long}{n}"), &[(&format!("f{n}"), "x")]))
                .collect();
            let dir = base.join("mounts/c1");
            let root = mount_overlay(&layers, &dir).expect("mount");
            assert_eq!(fs::read_dir(&root).expect("list").count(), 120);
            rustix::mount::unmount(&root, UnmountFlags::empty()).expect("unmount");
            let lowers: Vec<_> = layers.iter().rev().map(PathBuf::as_path).collect();
            mount_old(&lowers, &dir.join("upper"), &dir.join("work"), &root).expect("old");
            assert_eq!(fs::read_dir(&root).expect("list").count(), 120);
            unmount_overlay(&dir).expect("unmount");
        });
    }

    #[test]
    fn whiteouts_of_a_layer_hide_what_lies_below() {
        in_namespace(|base| {
            let low = layer(base, "low", &[("gone", "low"), ("kept", "low")]);
            let high = layer(base, "high", &[]);
            let node = rustix::fs::FileType::CharacterDevice;
            rustix::fs::mknodat(CWD, high.join("gone"), node, Mode::empty(), 0).expect("mknod");
            let root = mount_overlay(&[low, high], &base.join("m")).expect("mount");
            assert!(!root.join("gone").exists() && root.join("kept").exists());
            unmount_overlay(&base.join("m")).expect("unmount");
        });
    }

    #[test]
    fn a_mount_that_fails_says_where() {
        let dir = tempfile::tempdir().expect("directory");
        let error = mount_overlay(&[PathBuf::from("/nonexistent/layer")], &dir.path().join("m"))
            .expect_err("no such layer");
        assert!(error.to_string().contains("/nonexistent/layer"), "{error}");
        unmount_overlay(&dir.path().join("m")).expect("clean");
    }
}
