//! The private network namespace. It has no name: it lives as long as a process or an open file refers to it, so that
//! nothing can be left behind, not even after `kill -9`.
//!
//! ```text
//! the process (host's network)            the namespace (its own network and mounts)
//!   main, test threads  -- spawn() ----->   keeper thread: starts every child, lives as long as the Namespace
//!                       -- inside() ---->   a thread for one closure: HTTP requests, sockets
//! ```
//!
//! Threads enter, the process never does: `cargo test` runs many cases in one process.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// Set for the process that runs in a user namespace of its own.
const ENV_IN_USERNS: &str = "LAYERCAKE_LAB_USERNS";

/// Whether this process runs in a user namespace of [`become_root`]'s making.
#[must_use]
pub fn in_user_namespace() -> bool {
    std::env::var_os(ENV_IN_USERNS).is_some()
}

/// Makes sure that [`become_root`] will work.
///
/// # Errors
/// Neither root nor user namespaces: what to do about it.
pub fn check_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let trial = unshare_user().arg("true").output();
    let output = trial.context("cannot run unshare (package util-linux)")?;
    if !output.status.success() {
        bail!(
            "this needs root or user namespaces, and has neither ({}). Run it as root, or allow user namespaces:\n  \
             sudo sysctl kernel.unprivileged_userns_clone=1     (Debian)\n  \
             sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0     (Ubuntu)\n  \
             sudo sysctl user.max_user_namespaces=10000     (elsewhere)",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Makes sure that namespaces can be made: as root there is nothing to do, as an ordinary user the program starts
/// itself again, with the same arguments, as root of a user namespace of its own; it does not return in that case.
/// To be called before any thread or child is started that matters.
///
/// # Errors
/// As [`check_root`].
pub fn become_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    if in_user_namespace() {
        bail!("unshare gave a user namespace in which we are not root");
    }
    check_root()?;
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let mut again = unshare_user();
    let error = again.arg(own).args(std::env::args_os().skip(1)).env(ENV_IN_USERNS, "1").exec();
    Err(error).context("cannot run unshare")
}

fn unshare_user() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--"]);
    command
}

type Job = Box<dyn FnOnce() + Send + 'static>;

/// A way into the namespace, to be held by whoever speaks from inside.
#[derive(Debug, Clone)]
pub struct Entrance {
    network: Arc<File>,
}

impl Entrance {
    /// Runs a closure on a thread inside the namespace. Threads that it starts are inside too. Children belong to
    /// [`Namespace::spawn`].
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn inside<R: Send>(&self, work: impl FnOnce() -> R + Send) -> Result<R> {
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                setns(&*self.network, CloneFlags::CLONE_NEWNET)
                    .context("cannot enter the lab's network namespace")?;
                Ok(work())
            });
            worker.join().map_err(|_| anyhow!("the work inside the namespace panicked"))?
        })
    }
}

/// The namespace and the thread that keeps it and starts its children.
#[derive(Debug)]
pub struct Namespace {
    entrance: Entrance,
    jobs: Option<Sender<Job>>,
    keeper: Option<JoinHandle<()>>,
}

impl Namespace {
    /// A new namespace with nothing in it but a loopback interface that is down.
    ///
    /// # Errors
    /// When the kernel grants none, with what to do about it.
    pub fn new() -> Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let (ready, entered) = channel();
        let keeper = std::thread::Builder::new()
            .name("lab-keeper".to_owned())
            .spawn(move || keep(&ready, &queue))
            .context("cannot start the lab's keeper thread")?;
        let network = entered.recv().context("the lab's keeper thread died")??;
        Ok(Self {
            entrance: Entrance { network: Arc::new(network) },
            jobs: Some(jobs),
            keeper: Some(keeper),
        })
    }

    /// A way in, to be kept by others.
    #[must_use]
    pub fn entrance(&self) -> Entrance {
        self.entrance.clone()
    }

    /// Starts a child inside. It is the keeper's child, and the keeper ends only with the namespace: so a child that
    /// asked for a signal at its parent's death (prctl(2) PR_SET_PDEATHSIG looks at the parent *thread*) lives until then.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(&self, mut command: Command) -> Result<Child> {
        let name = command.get_program().to_string_lossy().into_owned();
        let (reply, answer) = channel::<io::Result<Child>>();
        let job: Job = Box::new(move || {
            // A caller that went away has nobody left to tell.
            drop(reply.send(command.spawn()));
        });
        let jobs = self.jobs.as_ref().context("the namespace is closed")?;
        jobs.send(job).map_err(|_| anyhow!("the lab's keeper thread died"))?;
        let child = answer.recv().context("the lab's keeper thread died")?;
        child.with_context(|| format!("cannot start {name}"))
    }

    /// Runs a short program inside to its end, and gives its standard output.
    ///
    /// # Errors
    /// When it cannot be started or fails, with what it said.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(
            crate::prerequisites::find_program(program).unwrap_or_else(|| program.into()),
        );
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self
            .spawn(command)?
            .wait_with_output()
            .with_context(|| format!("cannot wait for {program}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{program} {} failed: {}: {}", args.join(" "), output.status, said.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(keeper) = self.keeper.take() {
            // A keeper that panicked is as gone as one that ended.
            drop(keeper.join());
        }
    }
}

/// The keeper's life: enter, report, work until nobody can ask any more.
fn keep(ready: &Sender<Result<File>>, queue: &Receiver<Job>) {
    let entered = enter_new();
    let failed = entered.is_err();
    if ready.send(entered).is_err() || failed {
        return;
    }
    while let Ok(job) = queue.recv() {
        job();
    }
}

fn enter_new() -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context(
        "cannot make a private network namespace (unshare(2)): run as root, or allow user namespaces \
         (sudo sysctl kernel.unprivileged_userns_clone=1)",
    )?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("cannot make the lab's mounts private")?;
    // The interfaces under /sys/class/net are those of the namespace in which it was mounted. Where the kernel forbids
    // it (a user namespace that does not see all of /sys) the host's view stays, which only hides the lab's.
    let _ = mount(Some("lab"), "/sys", Some("sysfs"), MsFlags::empty(), none);
    File::open("/proc/thread-self/ns/net").context("cannot open /proc/thread-self/ns/net")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interfaces() -> Vec<String> {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").expect("net/dev");
        let names = table.lines().skip(2).filter_map(|line| line.split_once(':'));
        names.map(|(name, _)| name.trim().to_owned()).collect()
    }

    #[test]
    fn a_new_namespace_has_only_a_loopback_and_the_caller_stays_outside() {
        let before = interfaces();
        let namespace = Namespace::new().expect("namespace");
        assert_eq!(namespace.entrance().inside(interfaces).expect("inside"), ["lo"]);
        assert_eq!(interfaces(), before);
    }

    #[test]
    fn children_run_inside_and_what_they_say_comes_back() {
        let namespace = Namespace::new().expect("namespace");
        namespace.run("ip", &["link", "add", "dummy-7", "type", "bridge"]).expect("ip link add");
        let links = namespace.run("ip", &["-o", "link"]).expect("ip link");
        assert!(links.contains("dummy-7"), "{links}");
        assert!(!interfaces().contains(&"dummy-7".to_owned()));
    }

    #[test]
    fn a_failing_child_is_an_error_with_its_own_words() {
        let namespace = Namespace::new().expect("namespace");
        let error = namespace.run("ip", &["link", "del", "nobody"]).unwrap_err().to_string();
        assert!(error.starts_with("ip link del nobody failed"), "{error}");
        assert!(error.contains("nobody"), "{error}");
    }
}
