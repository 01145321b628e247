//! Mounts that are one mount of the kernel's: a file system on a block device, a directory seen twice, an NFS export.

use std::ffi::CString;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change,
    move_mount, open_tree,
};

use super::{Modules, make_dir, open_below};
use crate::imageapi::error::ApiError;
use crate::imageapi::table::Mounted;
use crate::imageapi::types::{MountAttach, MountBind, MountNfs};
use crate::sys::process::mount_setattr;

/// The port of NFS.
const NFS_PORT: u16 = 2049;
/// NFS where a request does not say.
const NFS_VERSION: &str = "4.2";
/// Longest option text of mount(2): one page, with room for the rest.
const MAX_OPTIONS: usize = 4000;

/// Options as in fstab(5), for mount(2).
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    data: String,
}

/// Parts flags from the file system's own options.
fn options(list: &[String]) -> Result<Options, ApiError> {
    let (mut flags, mut data) = (MountFlags::empty(), Vec::new());
    for option in list {
        let wrong = || ApiError::invalid(format!("`{}` is no mount option", option.escape_debug()));
        if option.is_empty() || option.contains([',', '\0']) {
            return Err(wrong());
        }
        let (flag, on) = match option.as_str() {
            "defaults" | "auto" | "noauto" => continue,
            "ro" => (MountFlags::RDONLY, true),
            "rw" => (MountFlags::RDONLY, false),
            "nosuid" => (MountFlags::NOSUID, true),
            "suid" => (MountFlags::NOSUID, false),
            "nodev" => (MountFlags::NODEV, true),
            "dev" => (MountFlags::NODEV, false),
            "noexec" => (MountFlags::NOEXEC, true),
            "exec" => (MountFlags::NOEXEC, false),
            "sync" => (MountFlags::SYNCHRONOUS, true),
            "async" => (MountFlags::SYNCHRONOUS, false),
            "dirsync" => (MountFlags::DIRSYNC, true),
            "noatime" => (MountFlags::NOATIME, true),
            "nodiratime" => (MountFlags::NODIRATIME, true),
            "relatime" => (MountFlags::RELATIME, true),
            "strictatime" => (MountFlags::STRICTATIME, true),
            "lazytime" => (MountFlags::LAZYTIME, true),
            "silent" => (MountFlags::SILENT, true),
            own => {
                data.push(own);
                continue;
            }
        };
        flags.set(flag, on);
    }
    let data = data.join(",");
    match data.len() > MAX_OPTIONS {
        true => Err(ApiError::invalid("the mount options are longer than the kernel takes")),
        false => Ok(Options { flags, data }),
    }
}

/// mount(2), with what its errors mean for a person.
fn mount(source: &str, dir: &Path, kind: &str, options: &Options) -> Result<(), ApiError> {
    let failed = |errno: Errno| {
        let meaning = match errno {
            Errno::NODEV => format!("this kernel has no file system `{kind}`"),
            Errno::INVAL => {
                format!("it holds no `{kind}`, or the kernel does not know one of the options")
            }
            errno => io::Error::from(errno).to_string(),
        };
        ApiError::failed(format!("mount {source}: {meaning}"))
    };
    let data = CString::new(options.data.as_str()).map_err(|_| failed(Errno::INVAL))?;
    let attempt = |flags| rustix::mount::mount(source, dir, kind, flags, data.as_c_str());
    match attempt(options.flags) {
        // The device cannot be written: as mount(8) does.
        Err(Errno::ROFS | Errno::ACCESS) => {
            attempt(options.flags | MountFlags::RDONLY).map_err(failed)
        }
        done => done.map_err(failed),
    }
}

fn one(root: PathBuf) -> Mounted {
    Mounted { mountpoint: root.clone(), layers: vec![root], ..Mounted::default() }
}

/// A file system on a block device.
pub(in crate::imageapi) fn attach(
    spec: &MountAttach,
    device: &str,
    dir: &Path,
    modules: &Modules,
) -> Result<Mounted, ApiError> {
    let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if spec.fs_type.is_empty() || !spec.fs_type.bytes().all(known) {
        return Err(ApiError::invalid("fs_type names no file system"));
    }
    let options = options(spec.mount_options.as_deref().unwrap_or_default())?;
    modules.need(&[&spec.fs_type, &format!("fs-{}", spec.fs_type)]);
    let root = dir.join("root");
    make_dir(&root)?;
    mount(device, &root, &spec.fs_type, &options)?;
    Ok(one(root))
}

/// A directory, seen in a second place.
pub(in crate::imageapi) fn bind(
    spec: &MountBind,
    base: &Path,
    dir: &Path,
) -> Result<Mounted, ApiError> {
    let failed = |errno: Errno| match errno {
        Errno::NOTDIR => ApiError::invalid(format!("{} is no directory", spec.path)),
        errno => ApiError::failed(format!("bind {}: {}", spec.path, io::Error::from(errno))),
    };
    let source = open_below(base, &spec.path, OFlags::PATH | OFlags::DIRECTORY).map_err(failed)?;
    let root = dir.join("root");
    make_dir(&root)?;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if spec.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(&source, "", flags).map_err(failed)?;
    if spec.ro {
        let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into();
        mount_setattr(&tree, read_only, spec.recursive)
            .map_err(|error| ApiError::failed(format!("bind {}: {error}", spec.path)))?;
    }
    move_mount(&tree, "", CWD, &root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed)?;
    // What is mounted below it later is not to appear at the source, nor the other way.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    if let Err(errno) = mount_change(&root, private) {
        log::debug!("imageapi: {}: {errno}", root.display());
    }
    let mut mounted = one(root);
    if spec.recursive {
        mounted.layers = below_first(&mounted.mountpoint);
    }
    Ok(mounted)
}

/// A mount and what is mounted below it, the last first.
fn below_first(root: &Path) -> Vec<PathBuf> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points = super::points_below(&mountinfo, root);
    points.reverse();
    points
}

/// An NFS export, by mount(2) alone (nfs(5), linux `fs/nfs/fs_context.c`).
pub(in crate::imageapi) fn nfs(
    spec: &MountNfs,
    dir: &Path,
    modules: &Modules,
) -> Result<Mounted, ApiError> {
    let version = if spec.version.is_empty() { NFS_VERSION } else { &spec.version };
    if !matches!(version, "4" | "4.0" | "4.1" | "4.2") {
        return Err(ApiError::invalid(format!("NFS version `{version}` is not one of 4.0 to 4.2")));
    }
    if !spec.path.starts_with('/') || spec.path.contains('\0') {
        return Err(ApiError::invalid(format!("`{}` is no absolute path", spec.path)));
    }
    let mut options = options(spec.options.as_deref().unwrap_or_default())?;
    let (server, own) = addresses(&spec.host)?;
    let mut data = format!("vers={version},addr={server},clientaddr={own}");
    if !options.data.is_empty() {
        data = format!("{data},{}", options.data);
    }
    options.data = data;
    options.flags.set(MountFlags::RDONLY, spec.ro || options.flags.contains(MountFlags::RDONLY));
    modules.need(&["nfs", "nfsv4"]);
    let root = dir.join("root");
    make_dir(&root)?;
    let host = if server.is_ipv6() { format!("[{server}]") } else { server.to_string() };
    mount(&format!("{host}:{}", spec.path), &root, "nfs", &options)?;
    Ok(one(root))
}

/// The server's address, and ours as it sees it.
fn addresses(host: &str) -> Result<(IpAddr, IpAddr), ApiError> {
    let failed = |error: io::Error| ApiError::failed(format!("NFS server {host}: {error}"));
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let server = match bare.parse::<IpAddr>() {
        Ok(address) => SocketAddr::new(address, NFS_PORT),
        Err(_) => {
            let mut found = (host, NFS_PORT).to_socket_addrs().map_err(failed)?;
            let none = || failed(io::Error::other("it has no address"));
            found.next().ok_or_else(none)?
        }
    };
    let any: SocketAddr = if server.is_ipv4() {
        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    // Nothing is sent: the kernel only looks for the way.
    let own = UdpSocket::bind(any).and_then(|socket| {
        socket.connect(server)?;
        socket.local_addr()
    });
    Ok((server.ip(), own.map_err(failed)?.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_parted_from_the_file_systems_own_options() {
        let list = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let parted = options(&list("defaults ro errors=continue nosuid data=journal")).expect("ok");
        let flags = MountFlags::RDONLY | MountFlags::NOSUID;
        assert_eq!(parted, Options { flags, data: "errors=continue,data=journal".to_owned() });
        let parted = options(&list("ro rw")).expect("ok");
        assert_eq!(parted.flags, MountFlags::empty());
        for bad in ["", "a,b", "a\0b"] {
            assert_eq!(options(&[bad.to_owned()]).map_err(|error| error.status), Err(400));
        }
        assert!(options(&["x".repeat(5000)]).is_err());
    }

    #[test]
    fn the_servers_address_and_our_own_go_together() {
        let loopback: IpAddr = "127.0.0.1".parse().expect("address");
        assert_eq!(addresses("127.0.0.1").expect("addresses"), (loopback, loopback));
    }
}
