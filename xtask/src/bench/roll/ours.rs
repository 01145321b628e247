//! Our side of the roll bench: a boot server, an agent beside it on this machine, and sets of the hello example.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use protocol::ids::NodeId;
use protocol::node::{ContainerState, Observed, ObservedSet, SetState};
use tests::artifacts::{Artifacts, workspace_root};
use tests::lab::Lab;
use tests::process::Process;
use tests::qemu::node_id;
use tests::server_peer::{Server, ServerSpec};
use tests::wait;

/// How long a program must have run for its next end to count as the first.
pub(super) const GOOD_RUN: Duration = Duration::from_secs(10);
/// How long anything may take that the agent does.
const WITHIN: Duration = Duration::from_secs(60);

/// A set of the bench.
#[derive(Debug, Clone, Copy)]
pub(super) struct Set {
    /// Its name.
    pub(super) name: &'static str,
    /// Where it serves.
    pub(super) port: u16,
    /// How its next version takes its place.
    pub(super) strategy: &'static str,
}

impl Set {
    /// Where it serves, for the client.
    pub(super) fn address(self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// The description of a version.
    fn render(self, version: &str, hello: &Path) -> String {
        let Self { name, port, strategy } = self;
        let rootfs = workspace_root().join(format!("examples/hello/v{version}/rootfs"));
        let sources = [format!("binary:{}", hello.display()), format!("dir:{}", rootfs.display())];
        let sockets = match strategy {
            "handover" => format!(
                "notify = true\n[[container.sockets]]\nname = \"http\"\nlisten = \"tcp://0.0.0.0:{port}\"\n"
            ),
            _ => String::new(),
        };
        format!(
            "name = \"{name}\"\nversion = \"{version}\"\nwatch_s = 0\n\n[[image]]\nname = \"hello\"\n\
             source = {sources:?}\nentrypoint = [\"/hello\"]\n\n[[container]]\nname = \"hello\"\nimage = \"hello\"\n\
             env = {{ PORT = \"{port}\" }}\nstrategy = \"{strategy}\"\n{sockets}"
        )
    }
}

/// The server and the agent.
#[derive(Debug)]
pub(super) struct Ours<'l> {
    lab: &'l Lab,
    /// The boot server, whose registry the peers use as well.
    pub(super) server: Server,
    node: NodeId,
    program: PathBuf,
    run_dir: PathBuf,
    agent: Option<Process>,
}

impl<'l> Ours<'l> {
    /// Starts both; the agent keeps everything on a tmpfs that only the lab sees.
    ///
    /// # Errors
    /// When one of them does not start.
    pub(super) fn start(lab: &'l Lab, artifacts: &Artifacts, program: &Path) -> Result<Self> {
        let server = Server::start(lab, &ServerSpec::new(artifacts.clone(), 1))?;
        let run_dir = lab.dir().join("agent");
        fs::create_dir_all(&run_dir).context("the agent's directory")?;
        let place = run_dir.to_str().context("a path that is not UTF-8")?;
        lab.namespace().run("mount", &["-t", "tmpfs", "-o", "mode=755", "bench", place])?;
        let program = program.to_owned();
        let mut ours = Self { lab, server, node: node_id(1)?, program, run_dir, agent: None };
        ours.start_agent()?;
        Ok(ours)
    }

    /// Pushes both versions of a set and rolls the node to the first.
    ///
    /// # Errors
    /// When one is refused, or it does not run.
    pub(super) fn introduce(&self, set: Set, hello: &Path) -> Result<()> {
        for version in ["1", "2"] {
            let file = self.lab.dir().join(format!("{}-{version}.toml", set.name));
            fs::write(&file, set.render(version, hello))
                .with_context(|| file.display().to_string())?;
            self.server.push(self.lab, &file)?;
        }
        self.roll(set, "1").map(drop)
    }

    fn start_agent(&mut self) -> Result<()> {
        let (url, node) = (tests::lab::SERVER_URL, self.node.to_string());
        let run_dir = self.run_dir.to_str().context("a path that is not UTF-8")?;
        let args = ["agent", "--standalone", "--log", "info", "--run-dir", run_dir];
        let args = args.into_iter().chain(["--server", url, "--node", &node]);
        let log = self.lab.dir().join("agent.log");
        self.agent = Some(Process::start(self.lab.namespace(), &self.program, args, &log)?);
        Ok(())
    }

    /// Rolls to a version, and gives the set as it is reported when it runs.
    ///
    /// # Errors
    /// When it does not run in time.
    pub(super) fn roll(&self, set: Set, version: &str) -> Result<ObservedSet> {
        self.server.client.start_roll(&[self.node.as_str()], &format!("{}:{version}", set.name))?;
        self.wait(&format!("{}:{version} to run", set.name), |observed| {
            running(observed, set).filter(|it| it.version.as_str() == version)
        })
    }

    /// Waits until what the agent reports is as wanted.
    fn wait<T>(&self, what: &str, wanted: impl Fn(&Observed) -> Option<T>) -> Result<T> {
        let mut last = None;
        let found = wait::until(what, WITHIN, || {
            last = self.server.client.node(&self.node)?.and_then(|record| record.observed);
            Ok(last.as_ref().and_then(&wanted))
        });
        found.with_context(|| format!("the agent last reported {last:#?}"))
    }

    /// Kills a set's container, and gives the moment and its process id.
    ///
    /// # Errors
    /// When it does not run.
    pub(super) fn kill_container(&self, set: Set) -> Result<(Instant, u32)> {
        let pid = self.pid(set)?;
        let number = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
        let killed = Instant::now();
        nix::sys::signal::kill(number, nix::sys::signal::Signal::SIGKILL)?;
        Ok((killed, pid))
    }

    /// The process id of a set's container.
    ///
    /// # Errors
    /// When it does not run.
    pub(super) fn pid(&self, set: Set) -> Result<u32> {
        self.wait(&format!("{} to run", set.name), |observed| {
            running(observed, set)?.containers.first()?.pid
        })
    }

    /// Waits until the set runs as another process.
    ///
    /// # Errors
    /// When it does not.
    pub(super) fn wait_for_another(&self, set: Set, before: u32) -> Result<()> {
        self.wait(&format!("{} to be started again", set.name), |observed| {
            let pid = running(observed, set)?.containers.first()?.pid?;
            (pid != before).then_some(())
        })
    }

    /// Kills the agent and starts another; the time from its start until the server knows that it has adopted the set, which
    /// must be the same process still.
    ///
    /// # Errors
    /// When it does not adopt it.
    pub(super) fn restart_agent(&mut self, set: Set) -> Result<Duration> {
        let pid = self.pid(set)?;
        let starts = self.wait("the agent to report", |observed| Some(observed.agent_starts))?;
        self.agent.as_mut().context("no agent runs")?.kill()?;
        let before = Instant::now();
        self.start_agent()?;
        let found = self.wait("another agent to report", |observed| {
            let new = observed.agent_starts > starts;
            running(observed, set).filter(|_| new)?.containers.first()?.pid
        })?;
        let took = before.elapsed();
        ensure!(found == pid, "the container is another one: {found} instead of {pid}");
        Ok(took)
    }

    /// Kills the agent, and every container by its monitor.
    fn clear(&mut self) {
        if let Some(agent) = &mut self.agent {
            // It has ended already, then.
            drop(agent.kill());
        }
        let script = format!(
            "for lock in {}/containers/*/lock; do kill -9 $(cat $lock); done 2> /dev/null; true",
            self.run_dir.display()
        );
        drop(self.lab.namespace().run("sh", &["-c", &script]));
    }
}

impl Drop for Ours<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The set, if all of it runs.
fn running(observed: &Observed, set: Set) -> Option<ObservedSet> {
    let found = observed.imagesets.iter().find(|it| it.name.as_str() == set.name)?;
    let up = |state| state == ContainerState::Running;
    let current = found.state == SetState::Current;
    (current && found.containers.iter().all(|it| up(it.state))).then(|| found.clone())
}
