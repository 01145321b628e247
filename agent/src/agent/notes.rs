//! The agent's notes under `state/`: small JSON files, written whole and renamed, so that a new agent finds what the old
//! one knew. Losing them costs a report some history, never a container.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use protocol::ids::Name;
use protocol::node::{Desired, PhaseMark};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::layer0::Tried;
use super::set::Commitment;

/// The notes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Notes {
    /// The kernel's boot id they were written in. Notes of another boot say nothing of what runs.
    pub boot_id: String,
    /// The last desired document.
    #[serde(default)]
    pub desired: Option<Desired>,
    /// What each set runs.
    #[serde(default)]
    pub commitments: BTreeMap<Name, Commitment>,
    /// Phases of this boot.
    #[serde(default)]
    pub timeline: Vec<PhaseMark>,
    /// How often the agent was started in this boot.
    #[serde(default)]
    pub starts: u32,
    /// The agent that PID 1 was last asked to start in the place of the image's.
    #[serde(default)]
    pub tried_agent: Option<Tried>,
}

/// The file the notes are kept in.
#[derive(Debug, Clone)]
pub(super) struct NotesFile {
    path: PathBuf,
}

impl NotesFile {
    /// The notes in this directory, which is made if it is missing.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { path: dir.join("agent.json") })
    }

    /// The notes of this boot; empty ones when there are none, when they are of another boot, or when they are damaged,
    /// which is logged.
    #[must_use]
    pub(super) fn load(&self, boot_id: &str) -> Notes {
        let fresh = Notes { boot_id: boot_id.to_owned(), ..Notes::default() };
        match read_json::<Notes>(&self.path) {
            Ok(notes) if notes.boot_id == boot_id => notes,
            Ok(_) => fresh,
            Err(error) if error.kind() == io::ErrorKind::NotFound => fresh,
            Err(error) => {
                log::warn!("{}: {error}; starting with empty notes", self.path.display());
                fresh
            }
        }
    }

    /// Writes the notes: a temporary file, then rename. A failure is logged: the notes are an aid, not the truth.
    pub(super) fn save(&self, notes: &Notes) {
        if let Err(error) = write_json(&self.path, notes) {
            log::warn!("{}: {error}; a new agent will know less", self.path.display());
        }
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let temporary = path.with_extension("json.tmp");
    // The desired document may have a registry's password in it.
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_found_again_in_the_same_boot_only() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = NotesFile::open(&dir.path().join("state")).expect("open");
        let mut notes = file.load("boot-1");
        assert_eq!(notes, Notes { boot_id: "boot-1".to_owned(), ..Notes::default() });
        notes.starts = 3;
        file.save(&notes);
        assert_eq!(file.load("boot-1").starts, 3);
        assert_eq!(file.load("boot-2").starts, 0);
        let about = fs::metadata(dir.path().join("state/agent.json")).expect("notes");
        let mode = std::os::unix::fs::PermissionsExt::mode(&about.permissions());
        assert_eq!(mode & 0o777, 0o600, "a registry's password may stand in it");
    }

    #[test]
    fn damaged_notes_are_no_notes() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = NotesFile::open(dir.path()).expect("open");
        fs::write(dir.path().join("agent.json"), b"{").expect("write");
        assert_eq!(file.load("boot").starts, 0);
    }
}
