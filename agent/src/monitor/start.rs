//! Starts the container's first process: pipes, control group, and a clone3(2) into its namespaces.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::containers::cgroup::Cgroup;
use crate::sys::process::{CONTAINER_NAMESPACES, mount_setattr, spawn};

/// Room in the log pipe: a container that writes in bursts does not wait for the disk.
const LOG_PIPE: usize = 1 << 20;

/// The monitor's ends of everything that leads to the container.
#[derive(Debug)]
pub(super) struct Started {
    /// Process id on the node.
    pub pid: u32,
    /// Names the process for good; readable at its end.
    pub pidfd: OwnedFd,
    /// A byte lets container-init pass; closing it makes it end.
    pub barrier: Option<OwnedFd>,
    /// What container-init says. Closed by its exec.
    pub status: Option<OwnedFd>,
    /// What the container writes.
    pub log: Option<OwnedFd>,
    /// Its control group, where there is one.
    pub cgroup: Option<Cgroup>,
}

/// Starts it. What could not be had is added to `notes`.
///
/// # Errors
/// One sentence that names the step.
pub(super) fn start(
    dir: &Path,
    id: &str,
    sockets: &[OwnedFd],
    notes: &mut Vec<String>,
) -> Result<Started, String> {
    let step = |name: &'static str| move |e: io::Error| format!("{name}: {e}");
    let (cgroup, missing) = Cgroup::create(id);
    notes.extend(missing);
    let group_dir = cgroup.as_ref().and_then(|group| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(group.path(), flags, Mode::empty()).ok()
    });
    let program = own_program().map_err(step("open this program read-only"))?;
    let pipe = |flags| pipe_with(PipeFlags::CLOEXEC | flags).map_err(io::Error::from);
    let (barrier_in, barrier) = pipe(PipeFlags::empty()).map_err(step("barrier pipe"))?;
    let (status, status_out) = pipe(PipeFlags::empty()).map_err(step("status pipe"))?;
    let (log, log_out) = pipe(PipeFlags::empty()).map_err(step("log pipe"))?;
    for ours in [&status, &log] {
        rustix::io::ioctl_fionbio(ours, true).map_err(|e| step("pipe")(e.into()))?;
    }
    // A smaller pipe works as well; a machine may forbid more.
    let _ = fcntl_setpipe_size(&log_out, LOG_PIPE);
    let nowhere = std::fs::File::open("/dev/null").map_err(step("/dev/null"))?;

    let path = CString::new(dir.as_os_str().as_bytes())
        .map_err(|_| "its directory has a NUL byte in its name".to_owned())?;
    let mode = if group_dir.is_some() { c"cgroup" } else { c"no-cgroup" };
    let count = CString::new(sockets.len().to_string()).unwrap_or_default();
    // The held sockets stand where the program will look for them.
    let mut descriptors = vec![nowhere.as_fd(), log_out.as_fd(), log_out.as_fd()];
    descriptors.extend(sockets.iter().map(AsFd::as_fd));
    descriptors.extend([barrier_in.as_fd(), status_out.as_fd()]);
    let spawned = spawn(
        program.as_fd(),
        &[c"layercake-agent", c"container-init", &path, mode, &count],
        CONTAINER_NAMESPACES,
        group_dir.as_ref().map(AsFd::as_fd),
        &descriptors,
    )
    .map_err(step("clone3"))?;
    Ok(Started {
        pid: spawned.pid,
        pidfd: spawned.pidfd,
        barrier: Some(barrier),
        status: Some(status),
        log: Some(log),
        cgroup,
    })
}

/// This very program through a read-only mount of its own, so that nothing in a container can write to it through
/// `/proc/PID/exe` (CVE-2019-5736).
fn own_program() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let program = open_tree(CWD, "/proc/self/exe", flags)?;
    mount_setattr(&program, u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), false)?;
    Ok(program)
}
