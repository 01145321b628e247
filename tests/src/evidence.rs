//! What is kept when a case fails: every log and the packet capture, in `target/evidence/CASE/`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::artifacts::workspace_root;

/// Endings of the files that are evidence.
const KEPT: [&str; 3] = ["log", "pcap", "toml"];

/// The directory of a case's evidence.
#[must_use]
pub fn dir(case: &str) -> PathBuf {
    workspace_root().join("target/evidence").join(case)
}

/// Removes what an earlier run left.
///
/// # Errors
/// When it cannot be removed.
pub fn clear(case: &str) -> Result<()> {
    let dir = dir(case);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Copies the evidence out of a lab's directory, and says where to.
///
/// # Errors
/// When it cannot be read or written.
pub fn keep(lab: &Path, case: &str) -> Result<PathBuf> {
    let to = dir(case);
    copy(lab, &to, "").with_context(|| format!("cannot keep evidence in {}", to.display()))?;
    Ok(to)
}

/// Copies the files of a directory and of those below it, whose names become part of the files'.
fn copy(from: &Path, to: &Path, prefix: &str) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy(&entry.path(), to, &format!("{prefix}{name}-"))?;
        } else if kind.is_file() && KEPT.iter().any(|ending| name.ends_with(&format!(".{ending}")))
        {
            fs::copy(entry.path(), to.join(format!("{prefix}{name}")))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_of_all_machines_are_kept_side_by_side_and_disks_are_not() {
        let (from, to) = (tempfile::tempdir().expect("from"), tempfile::tempdir().expect("to"));
        fs::create_dir(from.path().join("node1")).expect("mkdir");
        for name in ["server.log", "node1/serial.log", "node1/disk.raw", "lab.pcap"] {
            fs::write(from.path().join(name), name).expect("write");
        }
        copy(from.path(), to.path(), "").expect("copy");
        let mut kept: Vec<_> = fs::read_dir(to.path())
            .expect("read")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("name"))
            .collect();
        kept.sort();
        assert_eq!(kept, ["lab.pcap", "node1-serial.log", "server.log"]);
    }
}
