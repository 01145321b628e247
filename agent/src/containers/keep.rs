//! What of a container outlives its instances: persistent directories, and the identity of whole systems.
//!
//! A persistent directory is made once, with what the image has at its place, under a temporary name and then renamed: it is
//! there whole or not at all. A whole system's SSH host keys and machine-id are taken out of the root that serves when its next
//! version is made, or when it is taken down, and laid into the next one's: whatever made them, and without a mount that
//! would hide the image's other files. Nothing is decided here about where things lie.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use protocol::ids::Name;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, RawDir, ResolveFlags, Stat, Timespec,
    Timestamps, Uid, XattrFlags, openat, openat2,
};
use rustix::io::Errno;

use super::Spec;
use super::view::Kept;

/// Deepest directory that is copied.
const MAX_DEPTH: usize = 64;
/// Largest extended attribute that is copied (xattr(7)).
const MAX_XATTR: usize = 64 << 10;
/// Largest file of an identity, and how many.
const MAX_IDENTITY: u64 = 64 << 10;
const MAX_IDENTITIES: usize = 32;
/// What systemd and images write where a machine-id is still to be made (machine-id(5)).
const UNINITIALIZED: &[u8] = b"uninitialized\n";

/// Makes every persistent directory of a container that is not there yet. Its root must be mounted.
///
/// # Errors
/// One sentence that names the directory.
pub fn prepare(spec: &Spec) -> Result<(), String> {
    for kept in &spec.view.persistent {
        make(spec, kept).map_err(|error| {
            format!("persistent directory {} for {}: {error}", kept.source.display(), kept.target)
        })?;
    }
    Ok(())
}

fn make(spec: &Spec, kept: &Kept) -> io::Result<()> {
    if kept.source.is_dir() {
        return Ok(());
    }
    let parent = kept.source.parent().ok_or(io::ErrorKind::InvalidInput)?;
    DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    let new = kept.source.with_extension("new");
    match fs::remove_dir_all(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    DirBuilder::new().mode(0o755).create(&new)?;
    let to = open_dir(CWD, &new, ResolveFlags::empty())?;
    let target = kept.target.trim_matches('/');
    let shift = spec.view.id_base.unwrap_or(0);
    match open_in(&spec.root, target) {
        Ok(from) => copy_dir(&from, &to, shift, 0)?,
        Err(Errno::NOENT | Errno::NOTDIR) => {}
        Err(error) => return Err(error.into()),
    }
    if let Some((uid, gid)) = kept.owner {
        rustix::fs::fchown(&to, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    if let Some(mode) = kept.mode {
        rustix::fs::fchmod(&to, Mode::from_raw_mode(mode.0))?;
    }
    fs::rename(&new, &kept.source)
}

fn open_dir(at: impl AsFd, path: &Path, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(at, path, flags, Mode::empty(), resolve)
}

/// A directory of an image, by a path that does not leave it.
fn open_in(root: &Path, path: &str) -> Result<OwnedFd, Errno> {
    let root = open_dir(CWD, root, ResolveFlags::empty())?;
    let path = if path.is_empty() { "." } else { path };
    open_dir(&root, Path::new(path), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// Copies what is in a directory, and what the directory itself is like. Sockets, pipes and devices stay behind. `shift` is
/// taken off owners: the image of a user namespace shows the node's.
fn copy_dir(from: &OwnedFd, to: &OwnedFd, shift: u32, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!("more than {MAX_DEPTH} directories deep")));
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let source = openat(from, name, flags | OFlags::DIRECTORY, Mode::empty())?;
                rustix::fs::mkdirat(to, name, Mode::from_raw_mode(0o700))?;
                let target = openat(to, name, flags | OFlags::DIRECTORY, Mode::empty())?;
                copy_dir(&source, &target, shift, depth + 1)?;
            }
            FileType::RegularFile => {
                let source = openat(from, name, flags | OFlags::NONBLOCK, Mode::empty())?;
                let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let target = openat(to, name, create, Mode::from_raw_mode(0o600))?;
                let (mut source, mut target) = (File::from(source), File::from(target));
                io::copy(&mut source, &mut target)?;
                like(source.as_fd(), target.as_fd(), &stat, shift)?;
            }
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(&link, to, name)?;
                let (uid, gid) = owner(&stat, shift);
                rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            _ => {}
        }
    }
    let stat = rustix::fs::fstat(from)?;
    like(from.as_fd(), to.as_fd(), &stat, shift)
}

fn owner(stat: &Stat, shift: u32) -> (Uid, Gid) {
    let (uid, gid) = (stat.st_uid.saturating_sub(shift), stat.st_gid.saturating_sub(shift));
    (Uid::from_raw(uid), Gid::from_raw(gid))
}

/// Gives a file another one's owner, mode, attributes and time.
fn like(from: impl AsFd, to: impl AsFd, stat: &Stat, shift: u32) -> io::Result<()> {
    let (from, to) = (from.as_fd(), to.as_fd());
    let (uid, gid) = owner(stat, shift);
    rustix::fs::fchown(to, Some(uid), Some(gid))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    let mut names = vec![0_u8; MAX_XATTR];
    let length = match rustix::fs::flistxattr(from, &mut names) {
        Err(Errno::NOTSUP) => 0,
        length => length?,
    };
    let names = names.get(..length).unwrap_or_default();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = std::ffi::CString::new(name).unwrap_or_default();
        let mut value = vec![0_u8; MAX_XATTR];
        let length = rustix::fs::fgetxattr(from, &name, &mut value)?;
        let value = value.get(..length).unwrap_or_default();
        match rustix::fs::fsetxattr(to, &name, value, XattrFlags::empty()) {
            // A label or an access list that the other file system does not know.
            Err(Errno::NOTSUP | Errno::INVAL) => {}
            result => result?,
        }
    }
    let time = Timespec { tv_sec: stat.st_mtime, tv_nsec: 0 };
    rustix::fs::futimens(to, &Timestamps { last_access: time, last_modification: time })
        .map_err(io::Error::from)
}

/// Where the identity of a container is kept.
#[must_use]
pub fn identity_dir(base: &Path, set: &Name, container: &Name) -> PathBuf {
    // No name begins with a dot: no persistent directory is called that.
    base.join(set.as_str()).join(".identity").join(container.as_str())
}

/// Keeps the SSH host keys and the machine-id of a root that serves. What cannot be kept is logged: the next version makes
/// new ones then, as without this.
pub fn remember_identity(dir: &Path, root: &Path) {
    let found = identity(root);
    if found.is_empty() {
        return;
    }
    let write = || -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        for (name, bytes, mode) in found {
            let path = dir.join(&name);
            if fs::read(&path).is_ok_and(|known| known == bytes) {
                continue;
            }
            let new = dir.join(".new");
            fs::write(&new, &bytes)?;
            rustix::fs::chmod(&new, Mode::from_raw_mode(mode))?;
            fs::rename(&new, &path)?;
        }
        Ok(())
    };
    if let Err(error) = write() {
        log::warn!("{}: {error}: the next version will have another identity", dir.display());
    }
}

/// Name, content and mode of every file that makes a system's identity.
fn identity(root: &Path) -> Vec<(String, Vec<u8>, u32)> {
    let mut found = Vec::new();
    let mut take = |dir: &OwnedFd, name: &str| {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = openat(dir, name, flags, Mode::empty()) else { return };
        let Ok(stat) = rustix::fs::fstat(&file) else { return };
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        if regular && (1..=MAX_IDENTITY).contains(&size) && found.len() < MAX_IDENTITIES {
            let mut bytes = Vec::new();
            let read = io::Read::read_to_end(&mut File::from(file), &mut bytes).is_ok();
            if read && bytes != UNINITIALIZED {
                found.push((name.to_owned(), bytes, stat.st_mode & 0o777));
            }
        }
    };
    if let Ok(etc) = open_in(root, "etc") {
        take(&etc, "machine-id");
    }
    if let Ok(ssh) = open_in(root, "etc/ssh") {
        let mut buffer = Vec::with_capacity(8 << 10);
        let mut entries = RawDir::new(&ssh, buffer.spare_capacity_mut());
        let mut names = Vec::new();
        while let Some(Ok(entry)) = entries.next() {
            names.extend(entry.file_name().to_str().map(str::to_owned));
        }
        for name in names.iter().filter(|name| is_host_key(name)) {
            take(&ssh, name);
        }
    }
    found
}

fn is_host_key(name: &str) -> bool {
    name.starts_with("ssh_host_") && (name.ends_with("_key") || name.ends_with("_key.pub"))
}

/// Lays a kept identity into a root that is new.
pub fn restore_identity(dir: &Path, root: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let into = match name.as_str() {
            "machine-id" => "etc",
            name if is_host_key(name) => "etc/ssh",
            _ => continue,
        };
        let lay = || -> io::Result<()> {
            let mode = rustix::fs::stat(entry.path())?.st_mode & 0o777;
            let bytes = fs::read(entry.path())?;
            let to = match open_in(root, into) {
                // A system without an SSH server.
                Err(Errno::NOENT) => return Ok(()),
                to => to?,
            };
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW;
            let mode = Mode::from_raw_mode(mode);
            let file = openat(&to, &name, flags | OFlags::CLOEXEC, mode)?;
            rustix::fs::fchmod(&file, mode)?;
            io::Write::write_all(&mut File::from(file), &bytes)
        };
        if let Err(error) = lay() {
            log::warn!("{}: /{into}/{name} stays the image's: {error}", root.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn spec(root: &Path, kept: Kept) -> Spec {
        let json = serde_json::json!({
            "id": "a", "set": "site", "name": "web", "set_digest": protocol::ids::Digest::of(b""), "root": root,
            "argv": ["x"], "env": [], "user": null, "workdir": "/", "hostname": "h", "profile": "system",
            "capabilities": [], "stop_signal": 15, "stop_timeout_s": 1, "log_dir": "/", "restart": "never", "restarts": 0,
        });
        let mut spec: Spec = serde_json::from_value(json).expect("spec of an older agent");
        spec.view.persistent = vec![kept];
        spec
    }

    #[test]
    fn a_new_directory_has_what_the_image_has_there_and_an_old_one_is_left_alone() {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("srv/data/deep")).expect("mkdir");
        fs::write(root.join("srv/data/deep/file"), "text").expect("write");
        fs::set_permissions(root.join("srv/data/deep/file"), fs::Permissions::from_mode(0o640))
            .expect("chmod");
        std::os::unix::fs::chown(root.join("srv/data/deep/file"), Some(7), Some(8)).expect("chown");
        symlink("/etc/passwd", root.join("srv/data/link")).expect("symlink");
        // A link in the image leads to another place of the image, not of the node.
        symlink("/srv/data", root.join("data")).expect("symlink");
        let source = dir.path().join("keep/site/data");
        let kept = Kept {
            source: source.clone(),
            target: "/data".to_owned(),
            mode: None,
            owner: Some((5, 6)),
        };
        let spec = spec(&root, kept);
        prepare(&spec).expect("prepare");
        let meta = fs::metadata(source.join("deep/file")).expect("file");
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o777), (7, 8, 0o640));
        assert_eq!(fs::read_link(source.join("link")).expect("link"), Path::new("/etc/passwd"));
        assert_eq!(fs::metadata(&source).expect("dir").uid(), 5);
        fs::write(source.join("deep/file"), "mine").expect("write");
        prepare(&spec).expect("again");
        assert_eq!(fs::read_to_string(source.join("deep/file")).expect("read"), "mine");
    }

    #[test]
    fn an_identity_goes_from_one_root_to_the_next() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        for root in [&old, &new] {
            fs::create_dir_all(root.join("etc/ssh")).expect("mkdir");
            fs::write(root.join("etc/ssh/sshd_config"), root.to_str().expect("utf-8"))
                .expect("write");
        }
        fs::write(old.join("etc/ssh/ssh_host_ed25519_key"), "secret").expect("write");
        fs::set_permissions(
            old.join("etc/ssh/ssh_host_ed25519_key"),
            fs::Permissions::from_mode(0o600),
        )
        .expect("chmod");
        symlink("/etc/shadow", old.join("etc/ssh/ssh_host_rsa_key")).expect("symlink");
        fs::write(old.join("etc/machine-id"), UNINITIALIZED).expect("write");
        let kept = dir.path().join("kept");
        remember_identity(&kept, &old);
        restore_identity(&kept, &new);
        let key = new.join("etc/ssh/ssh_host_ed25519_key");
        assert_eq!(fs::read_to_string(&key).expect("key"), "secret");
        assert_eq!(fs::metadata(&key).expect("key").mode() & 0o777, 0o600);
        assert!(!new.join("etc/ssh/ssh_host_rsa_key").exists(), "a link is not followed");
        assert!(!new.join("etc/machine-id").exists(), "not made yet is not an identity");
        let config = fs::read_to_string(new.join("etc/ssh/sshd_config")).expect("config");
        assert_eq!(config, new.to_str().expect("utf-8"), "the rest is the image's");
    }
}
