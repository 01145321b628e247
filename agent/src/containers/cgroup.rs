//! Control groups of containers: `layercake/ID` in the cgroup v2 hierarchy, wherever it is mounted.
//!
//! On a machine without a writable cgroup v2 (cgroup v1, a container) everything here is absent and said so by a note;
//! nothing fails because of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The directory below the hierarchy's root that holds containers.
const PARENT: &str = "layercake";
/// The group that monitors move into, so that they are not in the agent's.
const MONITORS: &str = "layercake-monitors";
/// Controllers that limits need.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];
/// Most processes in one container: a fork bomb stays its own.
const PIDS_MAX: &str = "4096";
/// How long an emptied group may take to become removable.
const REMOVE_WAIT: Duration = Duration::from_secs(2);
/// Pause between attempts to remove a group whose processes are being killed.
const REMOVE_PAUSE: Duration = Duration::from_millis(5);

/// A container's own group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

/// Where cgroup v2 is mounted, from the text of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
#[must_use]
pub fn find_v2(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next()? == "cgroup2").then_some(())?;
        before.split(' ').nth(4).map(PathBuf::from)
    })
}

fn root() -> io::Result<PathBuf> {
    find_v2(&fs::read_to_string("/proc/self/mountinfo")?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 is mounted"))
}

impl Cgroup {
    /// Makes the group of a container and sets what limits it can. The second part is what could not be had, one sentence each.
    #[must_use]
    pub fn create(id: &str) -> (Option<Self>, Vec<String>) {
        match Self::try_create(id) {
            Ok((group, notes)) => (Some(group), notes),
            Err(error) => (None, vec![format!("limits_unavailable: {error}")]),
        }
    }

    fn try_create(id: &str) -> io::Result<(Self, Vec<String>)> {
        let root = root()?;
        let parent = root.join(PARENT);
        make(&parent)?;
        let mut notes = Vec::new();
        let offered = fs::read_to_string(root.join("cgroup.controllers"))?;
        for controller in CONTROLLERS {
            if !offered.split_whitespace().any(|word| word == controller) {
                notes.push(format!("limits_unavailable: cgroup v2 has no {controller} controller"));
                continue;
            }
            for directory in [&root, &parent] {
                let file = directory.join("cgroup.subtree_control");
                if let Err(error) = fs::write(&file, format!("+{controller}")) {
                    notes.push(format!("limits_unavailable: {controller}: {error}"));
                }
            }
        }
        let group = Self { path: parent.join(id) };
        make(&group.path)?;
        for (file, value) in [("pids.max", PIDS_MAX), ("memory.oom.group", "1")] {
            let file = group.path.join(file);
            if file.exists()
                && let Err(error) = fs::write(&file, value)
            {
                notes.push(format!("limits_unavailable: {}: {error}", file.display()));
            }
        }
        Ok((group, notes))
    }

    /// The group of a container that an earlier agent made, if it is there.
    #[must_use]
    pub fn find(id: &str) -> Option<Self> {
        let path = root().ok()?.join(PARENT).join(id);
        path.is_dir().then_some(Self { path })
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Kills every process in it and below (`cgroup.kill`, Linux 5.14).
    ///
    /// # Errors
    /// The file's error.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Removes it and the groups that the container made below it. Its processes must have ended or been killed.
    ///
    /// # Errors
    /// EBUSY when processes are left after two seconds.
    pub fn remove(&self) -> io::Result<()> {
        let until = Instant::now() + REMOVE_WAIT;
        loop {
            match remove_tree(&self.path) {
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < until =>
                {
                    std::thread::sleep(REMOVE_PAUSE);
                }
                result => return result,
            }
        }
    }
}

/// Moves the calling process into the monitors' group, so that whoever kills the agent's group does not kill it.
///
/// # Errors
/// When there is no writable cgroup v2.
pub fn leave_the_agents_group() -> io::Result<()> {
    let group = root()?.join(MONITORS);
    make(&group)?;
    fs::write(group.join("cgroup.procs"), "0")
}

fn make(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        Ok(()) => Ok(()),
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_v2_hierarchy_is_found_wherever_it_is_mounted() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 24 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:5 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_v2(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        let pure = "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 none rw\n";
        assert_eq!(find_v2(pure), Some(PathBuf::from("/sys/fs/cgroup")));
        for text in
            ["", "\n", "garbage", "1 2 3 - cgroup2", "30 24 0:26 / /x rw - tmpfs cgroup2 rw"]
        {
            assert_eq!(find_v2(text), None, "{text}");
        }
    }
}
