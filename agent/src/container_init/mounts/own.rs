//! What a description asks for: directories and files of the node, memory, persistent directories, files, kernel settings.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use protocol::imageset::{Bind, Propagation, Tmpfs};
use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, Uid, openat2};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags as Attr, MoveMountFlags, move_mount};

use super::{NO_SUID_DEV, New, QUIET, Tree, attach, clone_tree, new_mount};
use crate::container_init::{Inherited, InitError, step, users};
use crate::containers::view::sysctl_path;
use crate::containers::{Spec, View};
use crate::sys::process::{mount_propagation, mount_setattr};

/// `MS_SLAVE` of mount(2).
const MS_SLAVE: u64 = 1 << 19;
/// sysfs' magic number (linux/magic.h).
const SYSFS_MAGIC: u64 = 0x6265_6572;
/// Directory on the node's side that the private memory file system covers, out of sight with all of the node's.
const HIDDEN: &str = "/dev";

/// Detached mounts by their place in the description.
pub(super) type Taken = BTreeMap<usize, OwnedFd>;

/// The bound paths whose mounts travel. To be called while this namespace's mounts still share with the node's.
pub(super) fn take_travelling(view: &View) -> Result<Taken, InitError> {
    let travels = |bind: &Bind| bind.propagation != Propagation::Private;
    take_where(view, Taken::new(), travels)
}

/// All other bound paths.
pub(super) fn take(view: &View, taken: Taken) -> Result<Taken, InitError> {
    take_where(view, taken, |bind| bind.propagation == Propagation::Private)
}

fn take_where(
    view: &View,
    mut taken: Taken,
    wanted: impl Fn(&Bind) -> bool,
) -> Result<Taken, InitError> {
    for (index, bind) in view.mounts.iter().enumerate().filter(|(_, bind)| wanted(bind)) {
        let failed = || format!("bind the node's {}", bind.source);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let source =
            match openat2(CWD, &bind.source, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
                Err(Errno::NOENT) if bind.optional => continue,
                source => source.map_err(step(failed()))?,
            };
        let mount = clone_tree(&source, "", bind.recursive).map_err(step(failed()))?;
        if bind.read_only {
            mount_setattr(&mount, Attr::MOUNT_ATTR_RDONLY.bits().into(), true).map_err(step::<
                io::Error,
            >(
                failed(),
            ))?;
        }
        if bind.propagation == Propagation::Slave {
            mount_propagation(&mount, MS_SLAVE).map_err(step::<io::Error>(failed()))?;
        }
        taken.insert(index, mount);
    }
    Ok(taken)
}

/// One thing to mount.
enum Own<'a> {
    Bind(OwnedFd),
    Tmpfs(&'a Tmpfs),
    Kept(usize),
}

impl Tree {
    /// Mounts everything, what lies higher first.
    pub(super) fn mount_own(
        &self,
        view: &View,
        mut taken: Taken,
        given: &Inherited,
    ) -> Result<(), InitError> {
        let binds = view.mounts.iter().enumerate().filter_map(|(index, bind)| {
            let target = bind.target.as_ref().unwrap_or(&bind.source);
            Some((target, Own::Bind(taken.remove(&index)?)))
        });
        let tmpfs = view.tmpfs.iter().map(|it| (&it.target, Own::Tmpfs(it)));
        let kept = view.persistent.iter().enumerate();
        let kept = kept.map(|(index, it)| (&it.target, Own::Kept(index)));
        let mut all: Vec<(&String, Own<'_>)> = binds.chain(tmpfs).chain(kept).collect();
        all.sort_by_key(|(target, _)| Path::new(target.as_str()).components().count());
        for (path, own) in all {
            let failed = || format!("mount {path}");
            let mount = match own {
                Own::Bind(mount) => mount,
                Own::Tmpfs(tmpfs) => new_tmpfs(tmpfs).map_err(step(failed()))?,
                Own::Kept(index) => kept_mount(view, index, given).map_err(step(failed()))?,
            };
            let stat = rustix::fs::fstat(&mount).map_err(step(failed()))?;
            let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let target = self.target(path, directory)?;
            attach(&mount, &target).map_err(step(failed()))?;
        }
        Ok(())
    }

    /// Where something is mounted: a directory or file inside the image, made when missing. Links are followed within the
    /// image; what they lead to must not be /proc or /sys, whose masks would be covered.
    pub(super) fn target(&self, path: &str, directory: bool) -> Result<OwnedFd, InitError> {
        let failed = || format!("make {path} in the image");
        let relative = path.trim_matches('/');
        let (above, _) = relative.rsplit_once('/').unwrap_or(("", relative));
        let mut at = String::new();
        for name in above.split('/').filter(|name| !name.is_empty()) {
            let parent = if at.is_empty() { ".".to_owned() } else { at.clone() };
            at = if at.is_empty() { name.to_owned() } else { format!("{at}/{name}") };
            self.make_missing(&parent, name, &at, true).map_err(step(failed()))?;
        }
        let parent = if above.is_empty() { "." } else { above };
        let name = relative.rsplit('/').next().unwrap_or(relative);
        self.make_missing(parent, name, relative, directory).map_err(step(failed()))?;
        let flags = if directory { OFlags::DIRECTORY } else { OFlags::empty() };
        let target = self.open(relative, flags, ResolveFlags::empty());
        let target = target.map_err(step(format!("open {path} in the image")))?;
        let kind = rustix::fs::fstatfs(&target).map_err(step(failed()))?.f_type;
        let kind = u64::try_from(kind).unwrap_or_default();
        let plain = relative.starts_with("proc/") || relative.starts_with("sys/");
        if !plain && (kind == PROC_SUPER_MAGIC as u64 || kind == SYSFS_MAGIC) {
            let problem = "leads into /proc or /sys";
            return Err(InitError::Image { path: path.to_owned(), problem });
        }
        Ok(target)
    }

    fn make_missing(
        &self,
        parent: &str,
        name: &str,
        path: &str,
        directory: bool,
    ) -> Result<(), Errno> {
        match self.open(path, OFlags::empty(), ResolveFlags::empty()) {
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(()),
        }
        let parent = self.open(parent, OFlags::DIRECTORY, ResolveFlags::empty())?;
        let mode = Mode::from_raw_mode(if directory { 0o755 } else { 0o644 });
        if directory {
            return rustix::fs::mkdirat(&parent, name, mode);
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(&parent, name, flags, mode).map(drop)
    }

    /// Puts files over the image's, each bound from a memory file system that nothing else shows. A program that replaces one
    /// by a rename gets EBUSY; one that writes to it writes to memory.
    pub(super) fn place_files(&self, spec: &Spec, given: &Inherited) -> Result<(), InitError> {
        let files = given.files()?;
        if files.is_empty() {
            return Ok(());
        }
        let owner = users::find_in(&self.root, spec.user.as_deref())?;
        let memory = [("mode", "0700"), ("size", "16m")];
        let new =
            New { at: "", kind: "tmpfs", options: &memory, attributes: QUIET, required: true };
        let memory = new_mount(&new).map_err(step("memory for files"))?;
        move_mount(&memory, "", CWD, HIDDEN, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(step("memory for files"))?;
        for (index, file) in files.into_iter().enumerate() {
            let failed = || format!("place {}", file.target);
            let name = index.to_string();
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let made = rustix::fs::openat(&memory, &name, flags, Mode::from_raw_mode(0o600))
                .map_err(step(failed()))?;
            let mut made = std::fs::File::from(made);
            made.write_all(&file.content.0).map_err(step::<io::Error>(failed()))?;
            let (uid, gid) = file.owner.unwrap_or((owner.uid, owner.gid));
            rustix::fs::fchown(&made, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .map_err(step(failed()))?;
            rustix::fs::fchmod(&made, Mode::from_raw_mode(file.mode)).map_err(step(failed()))?;
            let mount = clone_tree(&memory, &name, false).map_err(step(failed()))?;
            let target = self.target(&file.target, false)?;
            attach(&mount, &target).map_err(step(failed()))?;
        }
        Ok(())
    }

    /// Writes the kernel settings of the container's namespaces.
    pub(super) fn set_sysctls(&self, view: &View) -> Result<(), InitError> {
        for (key, value) in &view.sysctls {
            let failed = || format!("set sysctl {key} = {value}");
            let path = format!("proc/sys/{}", sysctl_path(key));
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file =
                openat2(&self.root, path, flags, Mode::empty(), resolve).map_err(step(failed()))?;
            rustix::io::write(&file, value.as_bytes()).map_err(step(failed()))?;
        }
        Ok(())
    }
}

fn new_tmpfs(tmpfs: &Tmpfs) -> Result<OwnedFd, Errno> {
    let mode = format!("{:04o}", tmpfs.mode.map_or(0o1777, |mode| mode.0));
    let size = tmpfs.size.map(|size| size.0.to_string());
    let mut options = vec![("mode", mode.as_str())];
    options.extend(size.as_deref().map(|size| ("size", size)));
    let attributes = if tmpfs.exec { NO_SUID_DEV } else { QUIET };
    new_mount(&New { at: "", kind: "tmpfs", options: &options, attributes, required: true })
}

/// A persistent directory; in a user namespace the monitor has opened it, with owners mapped.
fn kept_mount(view: &View, index: usize, given: &Inherited) -> Result<OwnedFd, Errno> {
    let mount = match given.kept.get(index) {
        Some(mount) => rustix::io::fcntl_dupfd_cloexec(mount, 3)?,
        None => {
            let kept = view.persistent.get(index).ok_or(Errno::NOENT)?;
            clone_tree(CWD, &kept.source.to_string_lossy(), false)?
        }
    };
    mount_setattr(&mount, NO_SUID_DEV.bits().into(), true)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::INVAL))?;
    Ok(mount)
}
