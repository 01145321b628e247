//! Puts entries into the file system, always below one directory descriptor: every parent is resolved by the kernel with
//! `openat2(RESOLVE_IN_ROOT | NO_MAGICLINKS | NO_XDEV)`, every last component is created, never opened, so that no
//! symlink of the archive leads out of it (openat2(2)).
//!
//! Symlinked parents are followed within this layer's root only (`lib -> usr/lib`, then `lib/x`). Directories stay
//! 0700 while their contents are written; their owner, mode and time are set at the end.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use super::archive::Entry;
use super::name::Clean;
use super::pax::Time;
use super::{DIRECTORY_COST, LayerError, MAX_DIRECTORY_BYTES, refused, text};

/// The attribute that makes a directory of an overlay's lower layer hide those below (kernel, overlayfs.rst).
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

/// Metadata of a directory, set when everything is written.
#[derive(Debug)]
struct Directory {
    path: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Time,
}

/// The directory that a layer is written to.
#[derive(Debug)]
pub(super) struct Tree {
    root: Rc<OwnedFd>,
    /// The parent of the last entry: entries of one directory come in a row.
    last: Option<(Vec<u8>, Rc<OwnedFd>)>,
    directories: Vec<Directory>,
    directory_bytes: usize,
    xattrs_skipped: u64,
    /// Bits of a mode that open(2) clears here.
    mode_cleared: Mode,
}

fn io(action: &'static str, path: &[u8]) -> impl Fn(Errno) -> LayerError {
    move |errno| LayerError::Io { action, path: text(path), source: errno.into() }
}

fn timestamps(mtime: Time) -> Timestamps {
    let mtime = Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds };
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: mtime,
    }
}

/// The bits of a mode that open(2) clears below a directory: the umask's, or any where a default ACL decides (acl(5)).
fn mode_cleared(root: &Path) -> Mode {
    let has_acl = rustix::fs::getxattr(root, c"system.posix_acl_default", &mut [0_u8; 0]).is_ok();
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    match umask.and_then(|umask| u32::from_str_radix(umask.trim(), 8).ok()) {
        Some(umask) if !has_acl => Mode::from_raw_mode(umask),
        _ => Mode::all(),
    }
}

fn resolve(root: &OwnedFd, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let beneath = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let path = if path.is_empty() { b"." } else { path };
    let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // EAGAIN: a rename ran beside the resolution, which the kernel asks to repeat.
    for _ in 0..8 {
        match rustix::fs::openat2(root, path, flags, Mode::empty(), beneath) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            done => return done,
        }
    }
    Err(Errno::AGAIN)
}

impl Tree {
    /// Opens the directory that is the layer's root.
    pub(super) fn open(root: &Path) -> Result<Self, LayerError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(root, flags, Mode::empty())
            .map_err(io("open the layer's directory", root.as_os_str().as_encoded_bytes()))?;
        Ok(Self {
            root: Rc::new(fd),
            last: None,
            directories: Vec::new(),
            directory_bytes: 0,
            xattrs_skipped: 0,
            mode_cleared: mode_cleared(root),
        })
    }

    /// Attributes left out so far.
    pub(super) fn xattrs_skipped(&self) -> u64 {
        self.xattrs_skipped
    }

    /// A directory entry: made, or kept where it exists. A whiteout of the same layer makes it opaque.
    pub(super) fn directory(&mut self, path: &Clean, entry: &Entry) -> Result<(), LayerError> {
        if !path.is_root() {
            let parent = self.parent(path)?;
            let made = rustix::fs::mkdirat(&parent, path.name(), Mode::RWXU);
            if made == Err(Errno::EXIST) {
                self.directory_over(path, &parent)?;
            } else {
                made.map_err(io("make the directory", path.bytes()))?;
            }
        }
        if !entry.xattrs.is_empty() {
            let fd = resolve(&self.root, path.bytes(), OFlags::RDONLY)
                .map_err(io("open the directory", path.bytes()))?;
            self.set_xattrs(path, entry, |name, value| {
                rustix::fs::fsetxattr(&fd, name, value, XattrFlags::empty())
            })?;
        }
        self.directory_bytes += path.bytes().len() + DIRECTORY_COST;
        if self.directory_bytes > MAX_DIRECTORY_BYTES {
            let limit = MAX_DIRECTORY_BYTES as u64;
            return Err(LayerError::Limit { what: "bytes of directory names", limit });
        }
        self.directories.push(Directory {
            path: path.bytes().to_vec(),
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
        });
        Ok(())
    }

    fn directory_over(&mut self, path: &Clean, parent: &OwnedFd) -> Result<(), LayerError> {
        let existing = rustix::fs::statat(parent, path.name(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(io("examine", path.bytes()))?;
        match FileType::from_raw_mode(existing.st_mode) {
            FileType::Directory => return Ok(()),
            kind => {
                self.replacing(path, parent, "make the directory", |parent, name| {
                    rustix::fs::mkdirat(parent, name, Mode::RWXU)
                })?;
                if kind == FileType::CharacterDevice {
                    return self.set_opaque(path.bytes());
                }
            }
        }
        Ok(())
    }

    /// Creates a file for its content to be written to, with its mode where open(2) gives it that.
    pub(super) fn create_file(
        &mut self,
        path: &Clean,
        entry: &Entry,
    ) -> Result<OwnedFd, LayerError> {
        let parent = self.parent(path)?;
        let mode = match self.has_mode_at_once(entry) {
            true => Mode::from_raw_mode(entry.mode),
            false => Mode::RUSR | Mode::WUSR,
        };
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.replacing(path, &parent, "create", |parent, name| {
            rustix::fs::openat(parent, name, flags, mode)
        })
    }

    /// Whether a file made with its mode has it: nothing clears bits of it, and nobody may run it with others' rights
    /// before it is complete.
    fn has_mode_at_once(&self, entry: &Entry) -> bool {
        let cleared = Mode::SUID | Mode::SGID | Mode::SVTX | self.mode_cleared;
        !Mode::from_raw_mode(entry.mode).intersects(cleared)
    }

    /// Sets a written file's metadata: the owner first, since that clears setuid and capabilities; the time last.
    pub(super) fn finish_file(
        &mut self,
        file: &OwnedFd,
        path: &Clean,
        entry: &Entry,
    ) -> Result<(), LayerError> {
        if (entry.uid, entry.gid) != (0, 0) {
            rustix::fs::fchown(file, owner(entry.uid), group(entry.gid))
                .map_err(io("set the owner of", path.bytes()))?;
        }
        if !self.has_mode_at_once(entry) {
            rustix::fs::fchmod(file, Mode::from_raw_mode(entry.mode))
                .map_err(io("set the mode of", path.bytes()))?;
        }
        self.set_xattrs(path, entry, |name, value| {
            rustix::fs::fsetxattr(file, name, value, XattrFlags::empty())
        })?;
        rustix::fs::futimens(file, &timestamps(entry.mtime))
            .map_err(io("set the time of", path.bytes()))
    }

    /// A symlink, whose target is stored and never looked at.
    pub(super) fn symlink(&mut self, path: &Clean, entry: &Entry) -> Result<(), LayerError> {
        if entry.link.is_empty() || entry.link.len() > super::MAX_PATH_BYTES {
            return Err(refused(&entry.path, "is a symlink with an impossible target"));
        }
        let parent = self.parent(path)?;
        self.replacing(path, &parent, "make the symlink", |parent, name| {
            rustix::fs::symlinkat(entry.link.as_slice(), parent, name)
        })?;
        self.finish_node(&parent, path, entry)
    }

    /// A named pipe.
    pub(super) fn fifo(&mut self, path: &Clean, entry: &Entry) -> Result<(), LayerError> {
        let parent = self.parent(path)?;
        self.replacing(path, &parent, "make the named pipe", |parent, name| {
            rustix::fs::mknodat(parent, name, FileType::Fifo, Mode::RUSR, 0)
        })?;
        rustix::fs::chmodat(
            &parent,
            path.name(),
            Mode::from_raw_mode(entry.mode),
            AtFlags::empty(),
        )
        .map_err(io("set the mode of", path.bytes()))?;
        self.finish_node(&parent, path, entry)
    }

    /// A hard link to a file or a symlink of this layer. False if it is one below `dev/` to a device that was skipped.
    pub(super) fn hard_link(&mut self, path: &Clean, entry: &Entry) -> Result<bool, LayerError> {
        let failed = |reason| LayerError::Link {
            path: text(&entry.path),
            target: text(&entry.link),
            reason,
        };
        let target = Clean::new(&entry.link).map_err(failed)?;
        if target.is_root() || target.bytes() == path.bytes() {
            return Err(failed("it links to the root or to itself"));
        }
        let missing = path.is_below_dev() && target.is_below_dev();
        let from = match resolve(&self.root, target.parent(), OFlags::PATH) {
            Err(Errno::NOENT) if missing => return Ok(false),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {
                return Err(failed("the target is not in this layer"));
            }
            other => other.map_err(io("open the parent of", target.bytes()))?,
        };
        match rustix::fs::statat(&from, target.name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => match FileType::from_raw_mode(found.st_mode) {
                FileType::RegularFile | FileType::Symlink => {}
                _ => return Err(failed("the target is neither a file nor a symlink")),
            },
            Err(Errno::NOENT) if missing => return Ok(false),
            Err(Errno::NOENT) => return Err(failed("the target is not in this layer")),
            Err(errno) => return Err(io("examine", target.bytes())(errno)),
        }
        let parent = self.parent(path)?;
        self.replacing(path, &parent, "make the hard link", |parent, name| {
            rustix::fs::linkat(&from, target.name(), parent, name, AtFlags::empty())
        })?;
        Ok(true)
    }

    /// A whiteout: a 0:0 character device, which overlayfs takes for "nothing here". Where this layer itself has the
    /// name already, only what lies below a directory is hidden.
    pub(super) fn whiteout(&mut self, path: &Clean, hidden: &[u8]) -> Result<(), LayerError> {
        let parent = self.parent(path)?;
        let made =
            rustix::fs::mknodat(&parent, hidden, FileType::CharacterDevice, Mode::empty(), 0);
        if made != Err(Errno::EXIST) {
            return made.map_err(io("make the whiteout", path.bytes()));
        }
        let existing = rustix::fs::statat(&parent, hidden, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(io("examine", path.bytes()))?;
        if FileType::from_raw_mode(existing.st_mode) == FileType::Directory {
            let mut directory = path.parent().to_vec();
            directory.push(b'/');
            directory.extend_from_slice(hidden);
            return self.set_opaque(&directory);
        }
        Ok(())
    }

    /// An opaque marker: its directory hides everything of its name in the layers below.
    pub(super) fn opaque(&mut self, path: &Clean) -> Result<(), LayerError> {
        self.parent(path)?;
        self.set_opaque(path.parent())
    }

    /// Sets the directories' metadata, in the order of the archive.
    pub(super) fn finish(&mut self) -> Result<(), LayerError> {
        self.last = None;
        for directory in std::mem::take(&mut self.directories) {
            let fd = match resolve(&self.root, &directory.path, OFlags::RDONLY) {
                // A later entry put something else in its place.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                other => other.map_err(io("open the directory", &directory.path))?,
            };
            if (directory.uid, directory.gid) != (0, 0) {
                rustix::fs::fchown(&fd, owner(directory.uid), group(directory.gid))
                    .map_err(io("set the owner of", &directory.path))?;
            }
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(directory.mode))
                .map_err(io("set the mode of", &directory.path))?;
            rustix::fs::futimens(&fd, &timestamps(directory.mtime))
                .map_err(io("set the time of", &directory.path))?;
        }
        Ok(())
    }

    /// Owner, attributes and time of what cannot be opened: symlinks and pipes.
    fn finish_node(
        &mut self,
        parent: &OwnedFd,
        path: &Clean,
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let name = path.name();
        if (entry.uid, entry.gid) != (0, 0) {
            let (uid, gid) = (owner(entry.uid), group(entry.gid));
            rustix::fs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(io("set the owner of", path.bytes()))?;
        }
        if !entry.xattrs.is_empty() {
            // There is no fsetxattr for a descriptor of a symlink; /proc names the parent without any resolving.
            let mut node = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
            node.extend_from_slice(name);
            self.set_xattrs(path, entry, |key, value| {
                rustix::fs::lsetxattr(node.as_slice(), key, value, XattrFlags::empty())
            })?;
        }
        let times = timestamps(entry.mtime);
        rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(io("set the time of", path.bytes()))
    }

    /// Sets `security.capability` and `user.*`; refuses what would speak to overlayfs; counts the rest as skipped.
    fn set_xattrs(
        &mut self,
        path: &Clean,
        entry: &Entry,
        set: impl Fn(&[u8], &[u8]) -> Result<(), Errno>,
    ) -> Result<(), LayerError> {
        for (name, value) in &entry.xattrs {
            let overlay = [&b"trusted.overlay."[..], b"user.overlay."];
            if overlay.iter().any(|prefix| name.starts_with(prefix)) {
                return Err(LayerError::Xattr { path: text(path.bytes()), name: text(name) });
            }
            let user = name.starts_with(b"user.");
            if !user && name != b"security.capability" {
                self.xattrs_skipped += 1;
                continue;
            }
            match set(name, value) {
                // tmpfs before Linux 6.6 has no user.*; symlinks and pipes never have.
                Err(Errno::OPNOTSUPP | Errno::PERM) if user => self.xattrs_skipped += 1,
                done => done.map_err(io("set an extended attribute of", path.bytes()))?,
            }
        }
        Ok(())
    }

    fn set_opaque(&self, directory: &[u8]) -> Result<(), LayerError> {
        resolve(&self.root, directory, OFlags::RDONLY)
            .and_then(|fd| rustix::fs::fsetxattr(&fd, OPAQUE_XATTR, b"y", XattrFlags::empty()))
            .map_err(io("make opaque", directory))
    }

    /// Creates a last component; what stands there already goes first, unless it is a directory with contents.
    fn replacing<T>(
        &mut self,
        path: &Clean,
        parent: &OwnedFd,
        action: &'static str,
        create: impl Fn(&OwnedFd, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, LayerError> {
        let name = path.name();
        match create(parent, name) {
            Err(Errno::EXIST) => {}
            done => return done.map_err(io(action, path.bytes())),
        }
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => {
                self.last = None;
                match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
                    Err(Errno::NOTEMPTY) => {
                        return Err(refused(path.bytes(), "replaces a directory with contents"));
                    }
                    done => done.map_err(io("replace", path.bytes()))?,
                }
            }
            done => done.map_err(io("replace", path.bytes()))?,
        }
        create(parent, name).map_err(io(action, path.bytes()))
    }

    /// The directory an entry goes to, resolved in the root, made where it is missing.
    fn parent(&mut self, path: &Clean) -> Result<Rc<OwnedFd>, LayerError> {
        let wanted = path.parent();
        if wanted.is_empty() {
            return Ok(Rc::clone(&self.root));
        }
        if let Some((last, fd)) = &self.last
            && last == wanted
        {
            return Ok(Rc::clone(fd));
        }
        let fd = match resolve(&self.root, wanted, OFlags::PATH) {
            Err(Errno::NOENT) => self.make_parents(wanted)?,
            other => other.map_err(|errno| parent_error(wanted, errno))?,
        };
        let fd = Rc::new(fd);
        self.last = Some((wanted.to_vec(), Rc::clone(&fd)));
        Ok(fd)
    }

    fn make_parents(&self, wanted: &[u8]) -> Result<OwnedFd, LayerError> {
        let ends = wanted.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        let mut above: Option<OwnedFd> = None;
        for end in ends.chain([wanted.len()]) {
            let path = wanted.get(..end).unwrap_or_default();
            let fd = match resolve(&self.root, path, OFlags::PATH) {
                Err(Errno::NOENT) => {
                    let parent = above.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
                    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
                    let mode = Mode::from_raw_mode(0o755);
                    // It exists after all: a symlink that leads nowhere in this layer.
                    match rustix::fs::mkdirat(parent, name, mode) {
                        Err(Errno::EXIST) => return Err(parent_error(path, Errno::NOENT)),
                        made => made.map_err(io("make the directory", path))?,
                    }
                    resolve(&self.root, path, OFlags::PATH)
                        .map_err(|errno| parent_error(path, errno))?
                }
                other => other.map_err(|errno| parent_error(path, errno))?,
            };
            above = Some(fd);
        }
        above.ok_or_else(|| refused(wanted, "has no parent"))
    }
}

fn owner(uid: u32) -> Option<Uid> {
    Some(Uid::from_raw(uid))
}

fn group(gid: u32) -> Option<Gid> {
    Some(Gid::from_raw(gid))
}

fn parent_error(path: &[u8], errno: Errno) -> LayerError {
    match errno {
        Errno::NOENT => refused(path, "is used as a directory but leads to nothing in this layer"),
        Errno::NOTDIR => refused(path, "is used as a directory but is none"),
        Errno::LOOP => refused(path, "is used as a directory but is a symlink loop"),
        Errno::XDEV => refused(path, "leads out of the layer"),
        errno => io("open the directory", path)(errno),
    }
}
