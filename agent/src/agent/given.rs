//! Files and secrets that the server gave the node, and what templates may say of it: kept for the sets' workers.
//!
//! On a node they lie in a memory file system of their own that only root can look into, so that a new agent has them before
//! the server answers; no disk, log or note has them.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::PoisonError;

use protocol::ids::Name;
use protocol::node::{Desired, FileContent, GivenFile};
use rustix::mount::{MountFlags, mount};

use super::Agent;
use crate::containers::{read_json, write_json};

const FILE: &str = "given.json";
/// Most that the server's files may take, as mount(2) reads it.
const ROOM: &std::ffi::CStr = c"mode=0700,size=64m";

impl Agent {
    /// Takes the files of a new desired document, or without one those that an earlier agent was given.
    pub(super) fn remember_files(&mut self, desired: Option<&Desired>) {
        let dir = self.around.dirs.files();
        let files: Vec<GivenFile> = match desired {
            None => match read_json(&dir.join(FILE)) {
                Ok(files) => files,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                Err(error) => return log::warn!("{}: {error}", dir.join(FILE).display()),
            },
            Some(desired) => {
                if let Err(error) = keep(&dir, &desired.files) {
                    log::warn!(
                        "{}: {error}; a new agent will wait for the server's files",
                        dir.display()
                    );
                }
                desired.files.clone()
            }
        };
        let mut facts = self.around.facts.lock().unwrap_or_else(PoisonError::into_inner);
        facts.files = files.into_iter().map(|file| (file.name, file.content)).collect();
    }

    /// The files that the node was given.
    pub(super) fn given_files(&self) -> Vec<GivenFile> {
        let facts = self.around.facts.lock().unwrap_or_else(PoisonError::into_inner);
        let file = |(name, content): (&Name, &FileContent)| GivenFile {
            name: name.clone(),
            content: content.clone(),
        };
        facts.files.iter().map(file).collect()
    }

    /// Tells the workers who the node is now.
    pub(super) fn tell_facts(&mut self) {
        let mut facts = self.around.facts.lock().unwrap_or_else(PoisonError::into_inner);
        facts.name.clone_from(&self.around.hostname);
        let addresses = self.facts.links.iter().flat_map(|link| &link.addresses);
        facts.addresses = addresses.copied().collect();
        facts.mac = self.facts.links.first().map(|link| link.mac);
    }
}

/// Writes the files to memory; where there are none and never were, nothing is mounted.
fn keep(dir: &Path, files: &[GivenFile]) -> io::Result<()> {
    if files.is_empty() && !dir.join(FILE).exists() {
        return Ok(());
    }
    if !dir.exists() {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        if let Err(error) = mount("tmpfs", dir, "tmpfs", flags, ROOM) {
            fs::remove_dir(dir)?;
            return Err(error.into());
        }
    }
    write_json(&dir.join(FILE), &files)
}
