//! The ways from a registry to unpacked layers: ours, and those of the programs that people use today. Each starts with
//! nothing in an empty tmpfs and leaves every layer unpacked there.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use tests::prerequisites;
use tests::process::Process;
use tests::wait;

use super::image::{Image, REGISTRY, Variant};
use super::measure::{Bench, Usage, of_daemon};

/// How long containerd may take to answer.
const START: Duration = Duration::from_secs(30);

/// A way to do the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// `layercake-agent pull`, as shipped.
    Agent,
    Podman,
    SkopeoUmoci,
    Containerd,
    /// Every layer at once through a pipe; checks no digest.
    CurlIgzipTar,
}

impl Peer {
    /// In the order of a round.
    pub(super) const ALL: [Self; 5] =
        [Self::Agent, Self::Podman, Self::SkopeoUmoci, Self::Containerd, Self::CurlIgzipTar];

    /// What it is called, without versions.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Agent => "layercake-agent",
            Self::Podman => "podman pull",
            Self::SkopeoUmoci => "skopeo copy + umoci unpack",
            Self::Containerd => "ctr images pull",
            Self::CurlIgzipTar => "curl | igzip | tar",
        }
    }

    /// The most that our CPU seconds may be of this one's.
    pub(super) fn goal(self) -> Option<f64> {
        match self {
            Self::Agent => None,
            Self::Podman | Self::SkopeoUmoci => Some(0.18),
            Self::Containerd => Some(0.27),
            Self::CurlIgzipTar => Some(1.15),
        }
    }

    /// Debian's packages that it is made of.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Agent => &[],
            Self::Podman => &["podman"],
            Self::SkopeoUmoci => &["skopeo", "umoci"],
            Self::Containerd => &["containerd"],
            Self::CurlIgzipTar => &["curl", "isal", "tar"],
        }
    }

    /// Its name with the versions of its packages.
    pub(super) fn versions(self, bench: &Bench) -> Result<String> {
        let mut versions = Vec::new();
        for package in self.packages() {
            let said = bench.run("dpkg-query", &["-W", "-f", "${Version}", package])?;
            versions.push(format!("{package} {said}"));
        }
        Ok(match self {
            Self::Agent => format!("layercake-agent {}", env!("CARGO_PKG_VERSION")),
            _ => format!("{} ({})", self.name(), versions.join(", ")),
        })
    }
}

/// What the ways need to know.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) bench: &'a Bench,
    pub(super) image: &'a Image,
    /// Our binary.
    pub(super) agent: &'a Path,
    /// The tmpfs that everything is written to.
    pub(super) place: &'a Path,
}

impl Job<'_> {
    /// Pulls one variant of the image in one way, into an empty tmpfs, and says what it cost.
    ///
    /// # Errors
    /// When a program fails, with its words.
    pub(super) fn run(&self, peer: Peer, variant: Variant) -> Result<Usage> {
        self.bench.fresh_tmpfs(self.place)?;
        let name = variant.name();
        match peer {
            Peer::Agent => self.bench.measure(&argv(
                &[self.agent],
                &[
                    "pull",
                    "--log",
                    "warn",
                    "--run-dir",
                    &self.at("run")?,
                    &Image::reference(variant),
                ],
            )),
            Peer::Podman => self.podman(&Image::tagged(variant)),
            Peer::SkopeoUmoci => {
                let to = format!("{}:{name}", self.at("layout")?);
                let from = format!("docker://{}", Image::tagged(variant));
                let oci = format!("oci:{to}");
                let temporary = ["--tmpdir", &self.at("")?];
                let copy = [&["skopeo"][..], &temporary, &["copy", "--quiet"]].concat();
                let copied =
                    self.measure(&[&copy[..], &["--src-tls-verify=false", &from, &oci]].concat())?;
                let unpack = ["umoci", "unpack", "--image", &to, &self.at("bundle")?];
                Ok(copied.then(self.measure(&unpack)?))
            }
            Peer::Containerd => self.containerd(&Image::tagged(variant)),
            Peer::CurlIgzipTar => self.measure(&["bash", "-c", &self.pipes(variant)?]),
        }
    }

    fn measure(&self, words: &[&str]) -> Result<Usage> {
        self.bench.measure(&words.iter().map(OsString::from).collect::<Vec<_>>())
    }

    fn at(&self, name: &str) -> Result<String> {
        let path = if name.is_empty() { self.place.to_owned() } else { self.place.join(name) };
        path.into_os_string().into_string().ok().context("a path that is not UTF-8")
    }

    /// Podman with its storage, its state and its temporary files in the tmpfs, on its default driver.
    fn podman(&self, image: &str) -> Result<Usage> {
        let (root, run, temporary) = (self.at("root")?, self.at("run")?, self.at("tmp")?);
        let tmpdir = format!("TMPDIR={}", self.at("")?);
        let podman = ["env", &tmpdir, "podman", "--root", &root, "--runroot", &run, "--tmpdir"];
        let storage = [&temporary, "--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"];
        let pull = ["--events-backend", "none", "pull", "--quiet", "--tls-verify=false", image];
        self.measure(&[&podman[..], &storage, &pull].concat())
    }

    /// A containerd of its own; its daemon's share counts from where it answers.
    fn containerd(&self, image: &str) -> Result<Usage> {
        let config = self.place.join("containerd.toml");
        let socket = self.at("containerd.sock")?;
        let text = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\n  address = {socket:?}\n[ttrpc]\n  address = {:?}\n",
            self.at("root")?,
            self.at("state")?,
            self.at("ttrpc.sock")?,
        );
        // The tmpfs is the namespace's: the file comes there by a program inside.
        self.bench
            .run("sh", &["-c", &format!("cat > {} <<'END'\n{text}END\n", config.display())])?;
        let program = prerequisites::find_program("containerd").context("containerd is missing")?;
        let log = self.bench.dir.join("containerd.log");
        let args = ["--config".into(), config.into_os_string()];
        let mut daemon = Process::start(&self.bench.namespace, &program, args, &log)?;
        wait::until("containerd to answer", START, || {
            daemon.check_alive()?;
            Ok(self.bench.run("ctr", &["--address", &socket, "version"]).ok())
        })?;
        let before = of_daemon(daemon.pid())?;
        let pull = ["ctr", "--address", &socket, "images", "pull", "--plain-http", image];
        let client = self.measure(&pull)?;
        let after = of_daemon(daemon.pid())?;
        daemon.stop()?;
        Ok(Usage {
            cpu_s: client.cpu_s + after.cpu_s - before.cpu_s,
            wall_s: client.wall_s,
            peak_mib: client.peak_mib.max(after.peak_mib),
        })
    }

    /// One pipe a layer, all at once, each into a directory of its own as a layer store has it.
    fn pipes(&self, variant: Variant) -> Result<String> {
        let mut script = String::from("set -e -o pipefail; pids=\n");
        for (number, url) in self.image.blob_urls(variant).iter().enumerate() {
            let to = self.at(&format!("layer-{number}"))?;
            script.push_str(&format!(
                "mkdir '{to}'; curl -sSf '{url}' | igzip -d -c | tar -xp --numeric-owner -f - -C '{to}' & pids=\"$pids $!\"\n"
            ));
        }
        script.push_str("for pid in $pids; do wait $pid; done\n");
        Ok(script)
    }

    /// What each part of the job costs by itself, the whole image one after the other: the gap that is left.
    ///
    /// # Errors
    /// When a program fails.
    pub(super) fn floors(&self) -> Result<Vec<(&'static str, Usage)>> {
        self.bench.fresh_tmpfs(self.place)?;
        let urls = self.image.blob_urls(Variant::Six).join(" ");
        let blobs: Vec<String> =
            self.image.blobs(Variant::Six).iter().map(|path| path.display().to_string()).collect();
        let (blobs, tar) = (blobs.join(" "), self.image.plain_tar().display().to_string());
        let to = self.at("out")?;
        let scripts = [
            (
                "download only (curl)",
                format!("for u in {urls}; do curl -sSf -o /dev/null $u; done"),
            ),
            ("hash only, blobs and diff ids (sha256sum)", format!("sha256sum {blobs} {tar}")),
            (
                "inflate only (igzip)",
                format!("for b in {blobs}; do igzip -d -c < $b > /dev/null; done"),
            ),
            ("untar only (tar)", format!("mkdir {to} && tar -xp --numeric-owner -f {tar} -C {to}")),
        ];
        let mut floors = Vec::new();
        for (name, script) in scripts {
            floors.push((name, self.measure(&["bash", "-e", "-c", &script])?));
        }
        Ok(floors)
    }
}

/// A registry (Debian's docker-registry) on the namespace's loopback, its data kept from run to run.
///
/// # Errors
/// When it does not answer.
pub(super) fn start_registry(bench: &Bench, data: &Path) -> Result<Process> {
    let program = prerequisites::find_program("docker-registry")
        .context("docker-registry is missing (package docker-registry)")?;
    let config = bench.dir.join("registry.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: error, accesslog: {{disabled: false}}}}\nstorage:\n  \
         filesystem: {{rootdirectory: {:?}}}\nhttp:\n  addr: {REGISTRY}\n",
        data.display().to_string()
    );
    fs::write(&config, text).with_context(|| config.display().to_string())?;
    let log = bench.dir.join("registry.log");
    let args = ["serve".into(), config.into_os_string()];
    let mut process = Process::start(&bench.namespace, &program, args, &log)?;
    let url = format!("http://{REGISTRY}/v2/");
    wait::until("docker-registry to answer", START, || {
        process.check_alive()?;
        Ok(bench.run("curl", &["-sSf", "-o", "/dev/null", &url]).ok())
    })?;
    Ok(process)
}

pub(super) fn argv(program: &[&Path], args: &[&str]) -> Vec<OsString> {
    let program = program.iter().map(PathBuf::from).map(PathBuf::into_os_string);
    program.chain(args.iter().map(OsString::from)).collect()
}
