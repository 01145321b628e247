//! The peers of the roll bench: podman stops one version and runs the next; runc and crun start a container from a bundle.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests::lab::{ADDRESS, Lab};
use tests::prerequisites::find_program;
use tests::wait;

use super::client::ask;

/// Where podman's container serves.
const PORT: u16 = 18_093;
/// How long a container may take until it answers.
const START: Duration = Duration::from_secs(60);

/// podman with its storage and state on a tmpfs, in the form that works on the build machines: runc, and limits that it need
/// not raise.
#[derive(Debug)]
pub(super) struct Podman<'l> {
    lab: &'l Lab,
    place: PathBuf,
    image: &'static str,
    rolls: u32,
}

impl<'l> Podman<'l> {
    /// Fetches both versions of this set from the lab's registry and runs the first.
    ///
    /// # Errors
    /// When one of the steps fails.
    pub(super) fn start(lab: &'l Lab, image: &'static str) -> Result<Self> {
        let place = lab.dir().join("podman");
        fs::create_dir_all(&place)?;
        let text = place.to_str().context("a path that is not UTF-8")?;
        lab.namespace().run("mount", &["-t", "tmpfs", "-o", "mode=755", "bench", text])?;
        let podman = Self { lab, place, image, rolls: 0 };
        for version in ["1", "2"] {
            podman.run(&["pull", "--quiet", "--tls-verify=false", &podman.reference(version)])?;
        }
        podman.run_version("1")?;
        wait::until("podman's container to answer", START, || {
            Ok(lab.entrance().inside(|| ask(Self::address()))?.ok())
        })?;
        Ok(podman)
    }

    /// Where it serves.
    pub(super) fn address() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], PORT))
    }

    /// Its version and its runtime's.
    ///
    /// # Errors
    /// When it does not say.
    pub(super) fn versions(&self) -> Result<String> {
        let podman = self.lab.namespace().run("podman", &["--version"])?;
        let runc = self.lab.namespace().run("runc", &["--version"])?;
        let last = |text: &str| {
            text.lines().next().and_then(|line| line.rsplit(' ').next()).map(str::to_owned)
        };
        let (podman, runc) = (last(&podman).unwrap_or_default(), last(&runc).unwrap_or_default());
        Ok(format!("podman {podman} stop + run (runc {runc})"))
    }

    fn reference(&self, version: &str) -> String {
        format!("{ADDRESS}:8080/{}:{version}-hello", self.image)
    }

    fn name(&self) -> String {
        format!("bench{}", self.rolls)
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let at = |name: &str| self.place.join(name).display().to_string();
        let (root, run, temporary) = (at("root"), at("run"), at("tmp"));
        let tmpdir = format!("TMPDIR={}", self.place.display());
        let options = [
            &tmpdir,
            "podman",
            "--root",
            &root,
            "--runroot",
            &run,
            "--tmpdir",
            &temporary,
            "--storage-driver",
            "overlay",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "none",
            "--runtime",
            "runc",
        ];
        self.lab.namespace().run("env", &[&options[..], args].concat())
    }

    fn run_version(&self, version: &str) -> Result<()> {
        let port = format!("PORT={PORT}");
        let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"];
        let (name, reference) = (self.name(), self.reference(version));
        let run = ["run", "--detach", "--name", &name, "--network", "host", "--env", &port];
        self.run(&[&run[..], &limits, &[&reference]].concat()).map(drop)
    }

    /// Stops what runs, then runs this version.
    ///
    /// # Errors
    /// When either fails.
    pub(super) fn roll(&mut self, version: &str) -> Result<()> {
        let old = self.name();
        self.rolls += 1;
        self.run(&["stop", &old])?;
        self.run_version(version)?;
        wait::until("podman's container to answer", START, || {
            let answer = self.lab.entrance().inside(|| ask(Self::address()))?;
            Ok(answer.ok().filter(|text| text.contains(&format!("\"version\":\"{version}\""))))
        })?;
        // Not a part of the roll.
        self.run(&["rm", &old]).map(drop)
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        drop(self.run(&["rm", "--all", "--force", "--time", "0"]));
    }
}

/// A low-level runtime that starts containers from a bundle.
#[derive(Debug, Clone, Copy)]
pub(super) struct Runtime {
    /// Its program.
    pub(super) name: &'static str,
    /// What it needs before its command on the build machines.
    options: &'static [&'static str],
}

/// The runtimes, in the forms that work on the build machines too.
pub(super) const RUNTIMES: [Runtime; 2] = [
    Runtime { name: "runc", options: &[] },
    Runtime { name: "crun", options: &["--cgroup-manager=cgroupfs"] },
];

impl Runtime {
    /// Its version.
    ///
    /// # Errors
    /// When it does not say.
    pub(super) fn version(self, lab: &Lab) -> Result<String> {
        let said = lab.namespace().run(self.name, &["--version"])?;
        Ok(said.lines().next().unwrap_or(self.name).replace(" version", ""))
    }

    /// Starts a container of the bundle, with what it notes of it below `state`; it is removed again. The time until the runtime says that its program runs.
    ///
    /// # Errors
    /// When it does not start.
    pub(super) fn start(
        self,
        lab: &Lab,
        state: &Path,
        bundle: &Path,
        number: usize,
    ) -> Result<Duration> {
        let id = format!("lcbench{}-{number}", std::process::id());
        let bundle = bundle.to_str().context("a path that is not UTF-8")?;
        let (run, root) = (["run", "--detach", "--bundle", bundle, &id], state.join(self.name));
        let root = root.to_str().context("a path that is not UTF-8")?;
        let program =
            find_program(self.name).with_context(|| format!("{} is missing", self.name))?;
        let before = [&["--root", root][..], self.options].concat();
        let mut command = std::process::Command::new(program);
        command.args(&before).args(run);
        // The container has its standard descriptors from here: a pipe would be read for as long as it lives.
        let nowhere = || std::process::Stdio::null();
        command.stdin(nowhere()).stdout(nowhere()).stderr(nowhere());
        let begun = Instant::now();
        let status = lab.namespace().spawn(command)?.wait()?;
        let took = begun.elapsed();
        lab.namespace().run(self.name, &[&before[..], &["delete", "--force", &id]].concat())?;
        anyhow::ensure!(status.success(), "{} run ended with {status}", self.name);
        Ok(took)
    }
}

/// A bundle of busybox that sleeps, for the runtimes and for ours: `DIR/config.json` as `runc spec` writes it, `DIR/rootfs`.
///
/// # Errors
/// When it cannot be made.
pub(super) fn make_bundle(lab: &Lab, dir: &Path) -> Result<PathBuf> {
    let busybox = find_program("busybox").context("busybox is missing (package busybox-static)")?;
    fs::create_dir_all(dir.join("rootfs/bin")).context("the bundle")?;
    fs::copy(busybox, dir.join("rootfs/bin/busybox")).context("the bundle's busybox")?;
    symlink("busybox", dir.join("rootfs/bin/sleep")).context("the bundle's sleep")?;
    let config = dir.join("config.json");
    lab.namespace().run("runc", &["spec", "--bundle", &dir.display().to_string()])?;
    let text = fs::read_to_string(&config).context("the bundle's config")?;
    let mut value: Value = serde_json::from_str(&text).context("the bundle's config")?;
    value["process"]["terminal"] = json!(false);
    value["process"]["args"] = json!(["/bin/busybox", "sleep", "1000"]);
    value["root"]["readonly"] = json!(false);
    // As ours: the node's own network.
    if let Some(namespaces) = value["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|it| it["type"] != "network");
    }
    fs::write(&config, serde_json::to_vec(&value)?).context("the bundle's config")?;
    Ok(dir.join("rootfs"))
}
