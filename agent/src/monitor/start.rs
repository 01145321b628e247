//! Starts the container's first process: pipes, control group, and a clone3(2) into its namespaces.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use protocol::imageset::Propagation;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountPropagationFlags, OpenTreeFlags, open_tree};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::pty::OpenptFlags;
use rustix::time::ClockId;

use super::network;
use crate::containers::cgroup::Cgroup;
use crate::containers::{NOTIFY_FILE, SPEC_FILE, Spec, View, idmap};
use crate::sys::process::{
    CONTAINER_NAMESPACES, Spawned, USER_NAMESPACE, mount_setattr, spawn, unshare_time,
};

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
    /// Its console, when its program is systemd.
    pub console: Option<Console>,
    /// Its control group, where there is one.
    pub cgroup: Option<Cgroup>,
}

/// The terminal that is a container's /dev/console.
#[derive(Debug)]
pub(super) struct Console {
    /// What is written there is read here.
    pub ours: OwnedFd,
    /// Held so that the terminal does not hang up while nobody in the container has it open.
    theirs: OwnedFd,
}

/// Names the step that failed.
fn step(name: &'static str) -> impl Fn(io::Error) -> String {
    move |e| format!("{name}: {e}")
}

/// Starts it. What could not be had is added to `notes`.
///
/// # Errors
/// One sentence that names the step.
pub(super) fn start(
    dir: &Path,
    spec: &Spec,
    sockets: &[OwnedFd],
    files: OwnedFd,
    notes: &mut Vec<String>,
) -> Result<Started, String> {
    let view = &spec.view;
    let (cgroup, missing) = Cgroup::create(&spec.id, view)?;
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
    let nowhere = File::open("/dev/null").map_err(step("/dev/null"))?;
    let spec_file = File::open(dir.join(SPEC_FILE)).map_err(step("open its spec"))?;
    let console = match view.systemd {
        true => Some(console(view.id_base.unwrap_or(0)).map_err(step("its console"))?),
        false => None,
    };
    prepare_propagation(view)?;
    if view.namespaces.time {
        own_clocks().map_err(step("time namespace"))?;
    }

    // From here on nothing may return before the network namespace is the node's again.
    let outside = network::enter(view).map_err(|e| format!("network: {e}"))?;
    let mode = if group_dir.is_some() { c"cgroup" } else { c"no-cgroup" };
    let count = CString::new(sockets.len().to_string()).unwrap_or_default();
    let inbox = spec.notify.then(|| bare_mount(&dir.join(NOTIFY_FILE))).transpose();
    let inbox = inbox.map_err(step("its notify socket"))?;
    // The held sockets stand where the program will look for them.
    let mut fds = vec![nowhere.as_fd(), log_out.as_fd(), log_out.as_fd()];
    fds.extend(sockets.iter().map(AsFd::as_fd));
    fds.extend([barrier_in.as_fd(), status_out.as_fd(), spec_file.as_fd(), files.as_fd()]);
    fds.push(console.as_ref().map_or(nowhere.as_fd(), |console| console.theirs.as_fd()));
    fds.push(inbox.as_ref().map_or(nowhere.as_fd(), AsFd::as_fd));
    let spawned =
        spawn_mapped(&program, &[mode, &count], view, group_dir.as_ref(), fds, &spec.root);
    if let Some(outside) = outside {
        outside.leave(&spec.id, view).map_err(|e| format!("network: {e}"))?;
    }
    let spawned = spawned?;
    if let (Some(base), Some(group)) = (view.id_base, &cgroup) {
        group.delegate(base).map_err(step("give its control group to its root"))?;
    }
    Ok(Started {
        pid: spawned.pid,
        pidfd: spawned.pidfd,
        barrier: Some(barrier),
        status: Some(status),
        log: Some(log),
        console,
        cgroup,
    })
}

/// Clones container-init; with a user namespace its maps are written before it goes on, and it gets its root as a
/// descriptor, because the node's directories are closed to it.
fn spawn_mapped(
    program: &OwnedFd,
    words: &[&CStr],
    view: &View,
    group: Option<&OwnedFd>,
    fds: Vec<BorrowedFd<'_>>,
    root: &Path,
) -> Result<Spawned, String> {
    let args = [&[c"layercake-agent", c"container-init"], words].concat();
    let group = group.map(AsFd::as_fd);
    let Some(base) = view.id_base else {
        return spawn(program.as_fd(), &args, CONTAINER_NAMESPACES, group, None, &fds)
            .map_err(step("clone3"));
    };
    let tree = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let root = open_tree(CWD, root, tree).map_err(|e| step("open its root")(e.into()))?;
    let kept = view.persistent.iter().map(|it| kept_mount(&it.source, base));
    let kept = kept.collect::<Result<Vec<_>, _>>()?;
    let more = std::iter::once(&root).chain(&kept).map(AsFd::as_fd);
    let fds: Vec<BorrowedFd<'_>> = fds.into_iter().chain(more).collect();
    let (gate_in, gate) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| step("gate")(e.into()))?;
    let namespaces = CONTAINER_NAMESPACES | USER_NAMESPACE;
    let spawned = spawn(program.as_fd(), &args, namespaces, group, Some(gate_in.as_fd()), &fds)
        .map_err(step("clone3 with a user namespace"))?;
    // When a step fails the gate closes, and the child ends.
    idmap::write_maps(spawned.pid, base).map_err(step("write its user id maps"))?;
    rustix::io::write(&gate, b"x").map_err(|e| step("gate")(e.into()))?;
    Ok(spawned)
}

/// A detached copy of the mount at this path alone.
fn bare_mount(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, path, flags)?)
}

/// A persistent directory whose owners are seen through the container's maps.
fn kept_mount(source: &Path, base: u32) -> Result<OwnedFd, String> {
    let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let failed = |e: io::Error| format!("map the owners of {}: {e}", source.display());
    let mount = open_tree(CWD, source, tree).map_err(|e| failed(e.into()))?;
    idmap::apply(&mount, base).map_err(failed)?;
    Ok(mount)
}

/// A terminal of the node whose other end the container will find as /dev/console.
fn console(owner: u32) -> io::Result<Console> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&ours)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    let (uid, gid) = (rustix::fs::Uid::from_raw(owner), rustix::fs::Gid::from_raw(owner));
    rustix::fs::fchown(&theirs, Some(uid), Some(gid))?;
    Ok(Console { ours, theirs })
}

/// A mount can travel only where its source is a mount of its own that shares.
fn prepare_propagation(view: &View) -> Result<(), String> {
    for bind in view.mounts.iter().filter(|it| it.propagation != Propagation::Private) {
        match rustix::mount::mount_change(bind.source.as_str(), MountPropagationFlags::SHARED) {
            Err(Errno::NOENT) if bind.optional => {}
            result => result.map_err(|e| {
                let source = &bind.source;
                format!("propagation of {source}: it must be a mount point of the node: {e}")
            })?,
        }
    }
    Ok(())
}

/// The container's clocks begin at 0 (time_namespaces(7)): the node's are taken off.
fn own_clocks() -> io::Result<()> {
    unshare_time()?;
    let clocks = [("monotonic", ClockId::Monotonic), ("boottime", ClockId::Boottime)];
    let offsets = clocks.map(|(name, clock)| {
        let now = rustix::time::clock_gettime(clock);
        format!("{name} {} {}\n", -now.tv_sec - 1, (1_000_000_000 - now.tv_nsec).min(999_999_999))
    });
    std::fs::write("/proc/self/timens_offsets", offsets.concat())
}

/// This very program through a read-only mount of its own, so that nothing in a container can write to it through
/// `/proc/PID/exe` (CVE-2019-5736).
pub(crate) fn own_program() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let program = open_tree(CWD, "/proc/self/exe", flags)?;
    mount_setattr(&program, u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), false)?;
    Ok(program)
}
