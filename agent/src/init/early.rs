//! What must stand before anything else runs: a root that can be pivoted, mounts, the console, cgroups, kernel settings.
//!
//! Nothing here is fatal: PID 1 that gives up is a kernel panic, one that goes on can at least say what is wrong.

use std::ffi::{CStr, CString};
use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};

use crate::network;

/// The cgroup that the agent lives in: not the root's, where an image's systemd would sweep it up after a pivot.
pub const AGENT_CGROUP: &str = "/sys/fs/cgroup/layercake-agent";
/// Where a process is put in there.
pub const AGENT_PROCS: &CStr = c"/sys/fs/cgroup/layercake-agent/cgroup.procs";
/// The cgroup controllers that containers may use, where the kernel has them.
pub const CONTROLLERS: [&str; 6] = ["cpuset", "cpu", "io", "memory", "pids", "hugetlb"];

/// One early mount.
#[derive(Debug, Clone, Copy)]
pub struct EarlyMount {
    /// Where; the directory is made if it is missing.
    pub target: &'static str,
    /// The file system's name.
    pub kind: &'static str,
    /// Options beyond the flags.
    pub data: Option<&'static CStr>,
    /// Flags of the mount.
    pub flags: MountFlags,
    /// Without it the node cannot do its work.
    pub required: bool,
}

impl fmt::Display for EarlyMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.kind, self.target)?;
        if let Some(data) = self.data {
            write!(f, " ({})", data.to_string_lossy())?;
        }
        f.write_str(if self.required { ", required" } else { ", optional" })
    }
}

const fn mount(
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    data: Option<&'static CStr>,
    required: bool,
) -> EarlyMount {
    EarlyMount { target, kind, data, flags, required }
}

const PLAIN: MountFlags = MountFlags::empty();
const NO_SUID_DEV: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const NO_ALL: MountFlags = NO_SUID_DEV.union(MountFlags::NOEXEC);
const NO_SUID_EXEC: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

/// The store's options. Large pages where files fill them take a quarter off the unpacking of layers, and no memory.
const STORE: &CStr = c"mode=0755,size=80%,nr_inodes=0,huge=within_size";

/// The mounts, in their order. Layers and container roots lie on `/run/layercake`, with their devices and setuid files,
/// so that one has no restricting flags; its limit keeps a full store from taking the rest of `/run` with it.
pub const MOUNTS: [EarlyMount; 11] = [
    mount("/proc", "proc", NO_ALL, None, true),
    mount("/sys", "sysfs", NO_ALL, None, true),
    mount("/run", "tmpfs", NO_SUID_DEV, Some(c"mode=0755,size=20%"), true),
    mount("/run/layercake", "tmpfs", PLAIN, Some(STORE), true),
    mount("/dev", "devtmpfs", MountFlags::NOSUID, Some(c"mode=0755"), true),
    mount("/dev/pts", "devpts", NO_SUID_EXEC, Some(c"mode=0620,gid=5,ptmxmode=0666"), false),
    mount("/dev/shm", "tmpfs", NO_SUID_DEV, Some(c"mode=1777"), false),
    mount("/tmp", "tmpfs", NO_SUID_DEV, Some(c"mode=1777,size=20%"), false),
    mount("/sys/fs/cgroup", "cgroup2", NO_ALL, Some(c"nsdelegate,memory_recursiveprot"), true),
    mount("/sys/kernel/security", "securityfs", NO_ALL, None, false),
    mount("/sys/fs/pstore", "pstore", NO_ALL, None, false),
];

/// How long PID 1 stands still for the network's first address. Everything waits for that: two at once would only get in each
/// other's way, where there is one processor. Whatever takes longer than this waits for hardware or for a server.
const HEAD_START: Duration = Duration::from_secs(1);

/// How many of them the network's first address needs.
const FIRST: usize = 4;

/// What comes before the first word can be said: a root that can be pivoted, the mounts, the console. As soon as what it needs
/// is there, the network's first address is asked for. Returns a sentence for each thing that failed, and whether it is grave.
#[must_use]
pub fn begin() -> Vec<(bool, String)> {
    let root = make_root_pivotable().map_err(|e| format!("pivot mode will not work: {e}"));
    let (first, rest) = MOUNTS.split_at(FIRST);
    let mut problems = mount_all(first);
    let address = network::early::start().map(|child| child.wait(HEAD_START));
    problems.extend(mount_all(rest));
    let console = attach_console().map_err(|error| format!("/dev/console: {error}"));
    let failed = [root, console, address].into_iter().filter_map(Result::err);
    problems.extend(failed.map(|text| (true, text)));
    problems
}

/// Binds `/` to a directory, moves that over `/` and makes it the root: the initramfs itself can never be pivoted out of,
/// a mount on top of it can.
///
/// # Errors
/// The step that failed.
pub fn make_root_pivotable() -> Result<(), String> {
    /// Any directory does, for a moment. This one is in every image.
    const STEP: &str = "/run";
    let fail = |what: &str, error: std::io::Error| format!("{what} {STEP}: {error}");
    rustix::mount::mount_bind("/", STEP).map_err(|e| fail("bind / to", e.into()))?;
    std::env::set_current_dir(STEP).map_err(|e| fail("chdir", e))?;
    rustix::mount::mount_move(".", "/").map_err(|e| fail("move to /:", e.into()))?;
    rustix::process::chroot(".").map_err(|e| fail("chroot", e.into()))?;
    std::env::set_current_dir("/").map_err(|e| fail("chdir / from", e))
}

/// Mounts what is not mounted yet; returns a sentence for each that failed, and whether it is required.
#[must_use]
pub fn mount_all(entries: &[EarlyMount]) -> Vec<(bool, String)> {
    // Before `/proc` is mounted, nothing is.
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let there = mount_points(&text);
    let mut problems = Vec::new();
    for entry in entries {
        if there.iter().any(|point| point == entry.target) {
            continue;
        }
        if let Err(error) = mount_one(entry) {
            problems.push((entry.required, format!("mount {entry}: {error}")));
        }
    }
    problems
}

fn mount_one(entry: &EarlyMount) -> std::io::Result<()> {
    let mut data = entry.data.map(CStr::to_owned);
    let mut is_made = false;
    loop {
        let (kind, options) = (entry.kind, data.as_deref());
        let mounted = rustix::mount::mount(kind, entry.target, kind, entry.flags, options);
        match (mounted, data) {
            (Err(rustix::io::Errno::NOENT), options) if !is_made => {
                fs::create_dir_all(entry.target)?;
                (data, is_made) = (options, true);
            }
            // The kernel does not know an option: the last are those that can be missed.
            (Err(rustix::io::Errno::INVAL), Some(options)) => data = without_last(&options),
            (done, _) => return Ok(done?),
        }
    }
}

/// Mount options without the last one; `None` where there was but one.
fn without_last(options: &CStr) -> Option<CString> {
    let bytes = options.to_bytes();
    let end = bytes.iter().rposition(|byte| *byte == b',')?;
    CString::new(bytes.get(..end)?).ok()
}

/// The mount points in the text of `/proc/self/mountinfo` (proc(5)), in its order, escapes undone.
#[must_use]
pub fn mount_points(mountinfo: &str) -> Vec<String> {
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape).collect()
}

/// `\040` and its like to the bytes they mean.
pub(super) fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\');
        let value = octal.and_then(|d| std::str::from_utf8(d).ok());
        match value.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Makes `/dev/console` the standard input, output and error.
///
/// # Errors
/// What open or dup2 say.
pub fn attach_console() -> std::io::Result<()> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let console = rustix::fs::open("/dev/console", flags, Mode::empty())?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    rustix::stdio::dup2_stderr(&console)?;
    Ok(())
}

/// The links that programs expect in `/dev` and devtmpfs does not make.
pub fn link_devices() {
    for (name, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let link = format!("/dev/{name}");
        match std::os::unix::fs::symlink(format!("/proc/self/fd{target}"), &link) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => log::debug!("{link}: {error}"),
        }
    }
}

/// Hands the cgroup controllers down and makes the agent's cgroup. A controller that the kernel lacks is left out.
pub fn prepare_cgroups() {
    for controller in CONTROLLERS {
        write_setting("/sys/fs/cgroup/cgroup.subtree_control", &format!("+{controller}"));
    }
    if let Err(error) = fs::create_dir_all(AGENT_CGROUP) {
        log::warn!("{AGENT_CGROUP}: {error}");
    }
}

/// Kernel settings of a node: reboot after a panic, Ctrl-Alt-Del to us, many open files for whoever asks.
pub fn tune_kernel() {
    if fs::read_to_string("/proc/sys/kernel/panic").is_ok_and(|text| text.trim() == "0") {
        write_setting("/proc/sys/kernel/panic", "10");
    }
    if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::CadOff) {
        log::debug!("ctrl-alt-del stays with the kernel: {error}");
    }
    // Modules that the kernel asks for on behalf of a container: this program loads them (role `-q`).
    write_setting("/proc/sys/kernel/modprobe", "/init");
    let files = Rlimit { current: Some(1024), maximum: Some(524_288) };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, files) {
        log::debug!("limit of open files: {error}");
    }
    // The initramfs builder may have been careful; a user namespace needs to walk through `/`.
    if let Err(error) = fs::set_permissions(Path::new("/"), fs::Permissions::from_mode(0o755)) {
        log::debug!("mode of /: {error}");
    }
}

fn write_setting(path: &str, value: &str) {
    if let Err(error) = fs::write(path, value) {
        log::debug!("{path}: {value}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mount_comes_after_the_one_it_lies_on_and_once() {
        for (index, entry) in MOUNTS.iter().enumerate() {
            assert!(Path::new(entry.target).is_absolute(), "{entry}");
            for later in MOUNTS.iter().skip(index + 1) {
                assert_ne!(entry.target, later.target);
                assert!(!Path::new(entry.target).starts_with(later.target), "{entry} / {later}");
            }
        }
    }

    #[test]
    fn a_mount_says_what_it_is() {
        let line = MOUNTS.iter().find(|m| m.target == "/tmp").unwrap().to_string();
        assert_eq!(line, "tmpfs on /tmp (mode=1777,size=20%), optional");
    }

    #[test]
    fn a_kernel_that_knows_not_every_option_gets_the_first_ones() {
        let fewer = |options: &CStr| without_last(options);
        assert_eq!(fewer(STORE).as_deref(), Some(c"mode=0755,size=80%,nr_inodes=0"));
        assert_eq!(fewer(c"a,b").as_deref(), Some(c"a"));
        assert_eq!(fewer(c"a"), None);
    }

    #[test]
    fn the_store_keeps_devices_and_setuid_files_usable() {
        let store = MOUNTS.iter().find(|m| m.target == crate::paths::RUN_DIR).unwrap();
        assert!(store.required && store.flags.is_empty());
    }

    #[test]
    fn mount_points_are_read_with_their_escapes() {
        let text =
            "22 1 0:21 / /proc rw - proc proc rw\n23 1 0:5 / /a\\040b\\134 rw - t t rw\nbad\n";
        assert_eq!(mount_points(text), ["/proc", "/a b\\"]);
        assert_eq!(unescape("\\04"), "\\04");
        assert_eq!(unescape("\\999x"), "\\999x");
    }
}
