//! Control groups of containers: `layercake/ID` in the cgroup v2 hierarchy, wherever it is mounted.
//!
//! On a machine without a writable cgroup v2 (cgroup v1, a container) everything here is absent and said so by a note;
//! nothing fails because of it.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protocol::imageset::ByteSize;
use protocol::node::Usage;

use super::view::View;

/// The directory below the hierarchy's root that holds containers.
const PARENT: &str = "layercake";
/// The group that monitors move into, so that they are not in the agent's.
const MONITORS: &str = "layercake-monitors";
/// Most processes in one container that does not say otherwise: a fork bomb stays its own.
const PIDS_MAX: u32 = 4096;
/// Controllers that are handed down for their figures alone.
const ACCOUNTING: [&str; 4] = ["cpu", "io", "memory", "pids"];
/// What a sentence about a limit that could not be set begins with.
const UNAVAILABLE: &str = "limits_unavailable: ";
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
    /// Makes the group of a container and sets its limits. The second part is what could not be had, one sentence each.
    ///
    /// # Errors
    /// With `limits.required`, the first limit that cannot be set, as a sentence.
    pub fn create(id: &str, view: &View) -> Result<(Option<Self>, Vec<String>), String> {
        let (group, notes) = match Self::try_create(id, &settings(view)) {
            Ok((group, notes)) => (Some(group), notes),
            Err(error) => (None, vec![format!("{UNAVAILABLE}{error}")]),
        };
        match notes.first().filter(|_| view.limits.required) {
            None => Ok((group, notes)),
            Some(note) => {
                if let Some(group) = &group {
                    // Nothing has run in it: what stays of it is an empty directory.
                    drop(group.remove());
                }
                Err(format!("a limit that is required cannot be set: {note}"))
            }
        }
    }

    fn try_create(id: &str, settings: &[Setting]) -> io::Result<(Self, Vec<String>)> {
        let root = root()?;
        let parent = root.join(PARENT);
        make(&parent)?;
        let mut notes = Vec::new();
        let offered = fs::read_to_string(root.join("cgroup.controllers"))?;
        let mut wanted: Vec<&str> = ACCOUNTING.to_vec();
        wanted.extend(settings.iter().map(Setting::controller));
        wanted.sort_unstable();
        wanted.dedup();
        for controller in wanted {
            if !offered.split_whitespace().any(|word| word == controller) {
                if settings.iter().any(|it| it.controller() == controller) {
                    notes.push(format!("{UNAVAILABLE}cgroup v2 has no {controller} controller"));
                }
                continue;
            }
            for directory in [&root, &parent] {
                if let Err(error) = hand_down(directory, controller) {
                    notes.push(format!("{UNAVAILABLE}{controller}: {error}"));
                }
            }
        }
        let group = Self { path: parent.join(id) };
        make(&group.path)?;
        for setting in settings {
            let file = group.path.join(&setting.file);
            // Without its controller a file is not there, which is noted above.
            if file.exists()
                && let Err(error) = fs::write(&file, &setting.value)
            {
                let (file, value) = (&setting.file, &setting.value);
                notes.push(format!("{UNAVAILABLE}{file} = {value}: {error}"));
            } else if !file.exists() && notes.is_empty() && setting.asked {
                notes.push(format!("{UNAVAILABLE}this kernel has no {}", setting.file));
            }
        }
        Ok((group, notes))
    }

    /// What the container uses of the node now. Absent figures are of controllers that are not there.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let read = |file: &str| fs::read_to_string(self.path.join(file)).ok();
        let number = |file: &str| read(file)?.trim().parse().ok();
        let io = read("io.stat");
        Usage {
            memory_bytes: number("memory.current"),
            cpu_us: read("cpu.stat").and_then(|text| flat(&text, "usage_usec")),
            pids: number("pids.current"),
            io_read_bytes: io.as_deref().map(|text| nested_sum(text, "rbytes=")),
            io_write_bytes: io.as_deref().map(|text| nested_sum(text, "wbytes=")),
            oom_kills: read("memory.events").and_then(|text| flat(&text, "oom_kill")),
        }
    }

    /// Lets the first user of a user namespace make groups below this one (cgroups(7), delegation).
    ///
    /// # Errors
    /// The kernel's error of chown(2).
    pub fn delegate(&self, uid: u32) -> io::Result<()> {
        std::os::unix::fs::chown(&self.path, Some(uid), Some(uid))?;
        for file in ["cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            std::os::unix::fs::chown(self.path.join(file), Some(uid), Some(uid))?;
        }
        Ok(())
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

/// Whether a controller is handed down already is cheaper to read than to write.
fn hand_down(directory: &Path, controller: &str) -> io::Result<()> {
    let file = directory.join("cgroup.subtree_control");
    let there = fs::read_to_string(&file)?;
    if there.split_whitespace().any(|word| word == controller) {
        return Ok(());
    }
    fs::write(&file, format!("+{controller}"))
}

/// One file of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    file: String,
    value: String,
    /// Whether the description asked for it, rather than the node for itself.
    asked: bool,
}

impl Setting {
    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

/// The files that a view's limits mean, in the order in which they are written (cgroup-v2.rst).
fn settings(view: &View) -> Vec<Setting> {
    let limits = &view.limits;
    let mut all = Vec::new();
    let mut set = |file: &str, value: Option<String>| {
        if let Some(value) = value {
            all.push(Setting { file: file.to_owned(), value, asked: true });
        }
    };
    set("memory.high", limits.memory_high.map(|size| size.0.to_string()));
    set("memory.max", limits.memory.map(|size| size.0.to_string()));
    set("memory.swap.max", limits.swap.map(|size| size.0.to_string()));
    set("cpu.weight", limits.cpu_weight.map(|weight| weight.to_string()));
    set("cpu.max", limits.cpus.map(|cpus| cpu_max(cpus.milli)));
    set("cpuset.cpus", limits.cpuset.clone());
    set("io.weight", limits.io_weight.map(|weight| weight.to_string()));
    set("pids.max", limits.pids.map(|pids| pids.to_string()));
    for (page, size) in &view.hugepages {
        let page = page.parse::<ByteSize>().map(|page| page.to_string().replace("iB", "B"));
        if let Ok(page) = page {
            set(&format!("hugetlb.{page}.max"), Some(size.0.to_string()));
        }
    }
    let mut own = |file: &str, value: String| {
        all.push(Setting { file: file.to_owned(), value, asked: false });
    };
    if limits.pids.is_none() && !view.privileged {
        own("pids.max", PIDS_MAX.to_string());
    }
    own("memory.oom.group", "1".to_owned());
    all
}

/// Quota and period in microseconds. The kernel takes no quota under a millisecond: the period grows then, up to a second.
fn cpu_max(milli: u32) -> String {
    let period: u64 = if milli < 10 { 1_000_000 } else { 100_000 };
    format!("{} {period}", u64::from(milli) * period / 1000)
}

/// A number of a file of `key value` lines.
fn flat(text: &str, key: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(name, _)| *name == key)?.1.trim().parse().ok()
}

/// The sum of one `key=number` over every line.
fn nested_sum(text: &str, key: &str) -> u64 {
    let numbers = text.split_whitespace().filter_map(|word| word.strip_prefix(key)?.parse().ok());
    numbers.fold(0_u64, u64::saturating_add)
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

/// Makes a group that everybody may look into: the root user of a container with users of its own is one of them, and its
/// control group is found through the groups above it.
fn make(path: &Path) -> io::Result<()> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(named(error)),
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(named),
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

    #[test]
    fn limits_become_files_of_the_group() {
        let json = serde_json::json!({
            "limits": {"memory": "64MiB", "memory_high": 1000, "swap": 0, "cpus": 1.5, "cpu_weight": 50,
                "cpuset": "0-1", "pids": 7, "io_weight": 20},
            "hugepages": {"2MiB": "64MiB", "1GiB": "1GiB"},
        });
        let view: View = serde_json::from_value(json).expect("view");
        let files: Vec<String> =
            settings(&view).iter().map(|it| format!("{}={}", it.file, it.value)).collect();
        let expected = [
            "memory.high=1000",
            "memory.max=67108864",
            "memory.swap.max=0",
            "cpu.weight=50",
            "cpu.max=150000 100000",
            "cpuset.cpus=0-1",
            "io.weight=20",
            "pids.max=7",
            "hugetlb.1GB.max=1073741824",
            "hugetlb.2MB.max=67108864",
            "memory.oom.group=1",
        ];
        assert_eq!(files, expected);
        let files: Vec<String> = settings(&View::default()).into_iter().map(|it| it.file).collect();
        assert_eq!(files, ["pids.max", "memory.oom.group"]);
        assert_eq!((cpu_max(1).as_str(), cpu_max(250).as_str()), ("1000 1000000", "25000 100000"));
    }

    #[test]
    fn figures_are_read_out_of_the_kernels_files() {
        assert_eq!(flat("usage_usec 12\nuser_usec 5\n", "usage_usec"), Some(12));
        assert_eq!(flat("nr 12\n", "usage_usec"), None);
        let io = "8:0 rbytes=10 wbytes=1 rios=1\n8:16 rbytes=5 wbytes=x\n";
        assert_eq!((nested_sum(io, "rbytes="), nested_sum(io, "wbytes=")), (15, 1));
    }
}
