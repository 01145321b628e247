//! Files of the node that stand over the image's: resolv.conf, hosts, hostname, machine-id, and the kernel's modules.

use std::io;

use protocol::imageset::Profile;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{QUIET_RO, Tree, attach, clone_tree};
use crate::container_init::{InitError, step};
use crate::containers::Spec;
use crate::sys::process::mount_setattr;

/// Files of the node that stand over the image's, read-only.
const NODE_FILES: [&str; 3] = ["resolv.conf", "hosts", "hostname"];
const SYSTEM_FILES: [&str; 1] = ["machine-id"];

impl Tree {
    /// Lays the node's files over the image's, but those that the description has something else for.
    pub(super) fn bind_node_files(&self, spec: &Spec) -> Result<(), InitError> {
        let system = spec.profile == Profile::System;
        for name in NODE_FILES.iter().chain(SYSTEM_FILES.iter().filter(|_| system)) {
            let path = format!("/etc/{name}");
            let own = spec.view.has_target(&path)
                || spec.files.iter().any(|file| file.target == path)
                || (*name == "hostname" && spec.view.own_hostname);
            if !own {
                self.bind_node_file(name)?;
            }
        }
        Ok(())
    }

    /// Lays a file of the node's /etc over the image's. What the image has there as a link is replaced by a file.
    fn bind_node_file(&self, name: &str) -> Result<(), InitError> {
        let failed = || format!("bind the node's /etc/{name}");
        let mount = match clone_tree(CWD, &format!("/etc/{name}"), false) {
            Err(Errno::NOENT) => return Ok(()),
            mount => mount.map_err(step(failed()))?,
        };
        mount_setattr(&mount, QUIET_RO.bits().into(), false)
            .map_err(step::<io::Error>(failed()))?;
        let etc = match self.open("etc", OFlags::DIRECTORY, ResolveFlags::empty()) {
            Err(Errno::NOENT) => self.real_dir("etc")?,
            etc => etc.map_err(step("open /etc in the image"))?,
        };
        let create = |flags| {
            let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            rustix::fs::openat(&etc, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        };
        match rustix::fs::statat(&etc, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => create(OFlags::WRONLY).map_err(step(failed()))?,
            stat => match FileType::from_raw_mode(stat.map_err(step(failed()))?.st_mode) {
                FileType::RegularFile => {}
                FileType::Symlink => {
                    rustix::fs::unlinkat(&etc, name, AtFlags::empty()).map_err(step(failed()))?;
                    create(OFlags::WRONLY).map_err(step(failed()))?;
                }
                _ => {
                    let problem = "must be a file";
                    return Err(InitError::Image { path: format!("/etc/{name}"), problem });
                }
            },
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let target =
            rustix::fs::openat(&etc, name, flags, Mode::empty()).map_err(step(failed()))?;
        attach(&mount, &target).map_err(step(failed()))
    }

    /// The kernel's modules belong to the kernel, which is Layer0's: a whole system may look at them.
    pub(super) fn bind_modules(&self) -> Result<(), InitError> {
        let failed = || "bind the node's /lib/modules";
        let mount = match clone_tree(CWD, "/lib/modules", true) {
            Err(Errno::NOENT) => return Ok(()),
            mount => mount.map_err(step(failed()))?,
        };
        mount_setattr(&mount, QUIET_RO.bits().into(), true).map_err(step::<io::Error>(failed()))?;
        let lib = match self.open("lib", OFlags::DIRECTORY, ResolveFlags::empty()) {
            Err(Errno::NOENT) => self.real_dir("lib")?,
            lib => lib.map_err(step("open /lib in the image"))?,
        };
        match rustix::fs::mkdirat(&lib, "modules", Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(step(failed())(error)),
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let target =
            rustix::fs::openat(&lib, "modules", flags, Mode::empty()).map_err(step(failed()))?;
        attach(&mount, &target).map_err(step(failed()))
    }
}
