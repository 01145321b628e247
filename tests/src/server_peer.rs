//! `layercake serve` in the lab, and the operator's commands run against it.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::artifacts::Artifacts;
use crate::client::Client;
use crate::lab::{ADDRESS, BRIDGE, Lab, SERVER_URL, SUBNET};
use crate::process::{self, Process};
use crate::qemu::{address, mac, node_id};
use crate::{prerequisites, wait};

/// How long the server may take to answer: it opens its database and reads Layer0 first.
const START: Duration = Duration::from_secs(30);
/// How long an operator's command may take: a push of a large set on a loaded machine.
const COMMAND: Duration = Duration::from_secs(120);
/// What the nodes' kernels are told beyond what the server says.
pub const CONSOLE: &str = "console=ttyS0,115200n8 layercake.console=log";

/// How the server is set up.
#[derive(Debug, Clone)]
pub struct ServerSpec {
    /// What it serves to nodes, and its own binary.
    pub artifacts: Artifacts,
    /// How many nodes it knows from the start, numbered from 1.
    pub nodes: u8,
    /// What they run until an operator says otherwise, `NAME:VERSION` each.
    pub imagesets: Vec<String>,
    /// Base URL of the registry in place of the embedded one.
    pub registry: Option<String>,
    /// More kernel arguments for every node.
    pub cmdline: String,
    /// Archives that every node gets beside the initramfs.
    pub overlays: Vec<PathBuf>,
    /// Time servers that it names by DHCP.
    pub ntp_servers: Vec<Ipv4Addr>,
    /// Base URL that nodes know it by, in place of [`SERVER_URL`]; it listens on all addresses then, IPv6 too.
    pub url: Option<String>,
}

impl ServerSpec {
    /// A server for this many nodes, with its embedded registry.
    #[must_use]
    pub fn new(artifacts: Artifacts, nodes: u8) -> Self {
        Self {
            artifacts,
            nodes,
            imagesets: Vec::new(),
            registry: None,
            cmdline: CONSOLE.to_owned(),
            overlays: Vec::new(),
            ntp_servers: Vec::new(),
            url: None,
        }
    }

    /// The config file. Every value is of our own making and needs no more than Rust's quoting.
    fn render(&self, data: &Path, ipxe: Option<&Path>) -> Result<String> {
        let url = self.url.as_deref().unwrap_or(SERVER_URL);
        let own = format!("{ADDRESS}:8080");
        let listen = self.url.as_ref().map_or(own.as_str(), |_| "[::]:8080");
        let mut text = format!(
            "[server]\nlisten = {listen:?}\nurl = {url:?}\ndata_dir = {data:?}\nlayer0_dir = {:?}\n\n\
             [dhcp]\naddress = \"{ADDRESS}\"\ninterface = \"{BRIDGE}\"\nsubnet = \"{SUBNET}\"\nrange = [\"10.9.0.200\", \"10.9.0.250\"]\nntp_servers = {:?}\n\n\
             [tftp]\nlisten = \"{ADDRESS}:69\"\n",
            self.artifacts.layer0,
            self.ntp_servers.iter().map(Ipv4Addr::to_string).collect::<Vec<_>>()
        );
        if let Some(ipxe) = ipxe {
            writeln!(text, "root = {ipxe:?}")?;
        }
        writeln!(text, "\n[boot]\ncmdline = {:?}", self.cmdline)?;
        writeln!(text, "overlays = {:?}", self.overlays)?;
        if let Some(registry) = &self.registry {
            writeln!(text, "\n[registry]\nurl = {registry:?}")?;
        }
        for number in 1..=self.nodes {
            let (id, mac, address) = (node_id(number)?, mac(number), address(number));
            writeln!(
                text,
                "\n[[node]]\nid = \"{id}\"\nmac = \"{mac}\"\naddress = \"{address}\"\nimagesets = {:?}",
                self.imagesets
            )?;
        }
        Ok(text)
    }
}

/// A running server. Dropped it is killed.
#[derive(Debug)]
pub struct Server {
    /// A client of it.
    pub client: Client,
    process: Process,
    bin: PathBuf,
}

impl Server {
    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(lab: &Lab, spec: &ServerSpec) -> Result<Self> {
        let config = lab.dir().join("layercake.toml");
        let text = spec.render(&lab.dir().join("server"), prerequisites::ipxe_dir().as_deref())?;
        std::fs::write(&config, text)
            .with_context(|| format!("cannot write {}", config.display()))?;
        let args = [OsStr::new("serve"), OsStr::new("--config"), config.as_os_str()];
        let log = lab.dir().join("server.log");
        let mut process = Process::start(lab.namespace(), &spec.artifacts.bin, args, &log)?;
        let client = lab.client();
        wait::until("layercake serve to answer", START, || {
            process.check_alive()?;
            Ok(client.answers().then_some(()))
        })?;
        Ok(Self { client, process, bin: spec.artifacts.bin.clone() })
    }

    /// Kills it, as a power cut would.
    ///
    /// # Errors
    /// When that fails.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> &Path {
        self.process.log()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Fails when it has ended, with its last words.
    ///
    /// # Errors
    /// That it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        self.process.check_alive()
    }

    /// Runs an operator's command, `layercake ARGS`, against it, and gives its standard output.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn layercake<S: AsRef<OsStr>>(&self, lab: &Lab, args: &[S]) -> Result<String> {
        layercake(lab, &self.bin, args)
    }

    /// Pushes the ImageSet described in this file into the embedded registry.
    ///
    /// # Errors
    /// When it cannot be built or pushed.
    pub fn push(&self, lab: &Lab, imageset: &Path) -> Result<()> {
        let args = [OsStr::new("imageset"), OsStr::new("push"), imageset.as_os_str()];
        self.layercake(lab, &args).map(drop)
    }
}

/// Runs an operator's command, `layercake ARGS`, inside the lab, and gives its standard output.
///
/// # Errors
/// When it fails, with what it said.
pub fn layercake<S: AsRef<OsStr>>(lab: &Lab, bin: &Path, args: &[S]) -> Result<String> {
    let shown: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
    let shown = format!("layercake {}", shown.join(" "));
    let mut command = process::mortal(bin)?;
    command.args(args);
    command.env("LAYERCAKE_SERVER", SERVER_URL);
    process::without_proxies(&mut command);
    run(lab, command, &shown)
}

/// Runs a command inside the lab, and gives its standard output. `shown` names it in errors.
///
/// # Errors
/// When it fails, with what it said.
pub fn run(lab: &Lab, mut command: Command, shown: &str) -> Result<String> {
    // Files, not pipes: nobody needs to read while it runs.
    let (out, err) = (lab.dir().join("command.out"), lab.dir().join("command.log"));
    let create = |path: &Path| {
        std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))
    };
    command.stdin(Stdio::null()).stdout(create(&out)?).stderr(create(&err)?);
    let mut child = lab.namespace().spawn(command)?;
    let ended = wait::until(shown, COMMAND, || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill().with_context(|| format!("cannot kill `{shown}`"))?;
        child.wait().with_context(|| format!("cannot wait for `{shown}`"))?;
    }
    let status = ended?;
    if !status.success() {
        let said = std::fs::read(&err).unwrap_or_default();
        bail!("`{shown}` failed: {status}: {}", String::from_utf8_lossy(&said).trim());
    }
    std::fs::read_to_string(&out).with_context(|| format!("`{shown}` wrote no text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_names_every_node_with_its_address() {
        let artifacts =
            Artifacts { bin: "/b/layercake".into(), layer0: "/l0".into(), examples: "/e".into() };
        let mut spec = ServerSpec::new(artifacts, 2);
        spec.imagesets = vec!["hello:1".to_owned()];
        spec.registry = Some("http://10.9.0.1:5000".to_owned());
        let text = spec.render(Path::new("/data"), Some(Path::new("/ipxe"))).expect("render");
        let expected = "\n[boot]\ncmdline = \"console=ttyS0,115200n8 layercake.console=log\"\noverlays = []\n\n[registry]\nurl = \"http://10.9.0.1:5000\"\n\n\
                        [[node]]\nid = \"n1\"\nmac = \"52:54:00:00:00:01\"\naddress = \"10.9.0.101\"\nimagesets = [\"hello:1\"]\n\n\
                        [[node]]\nid = \"n2\"\nmac = \"52:54:00:00:00:02\"\naddress = \"10.9.0.102\"\nimagesets = [\"hello:1\"]\n";
        assert!(text.starts_with("[server]\nlisten = \"10.9.0.1:8080\"\n"), "{text}");
        assert!(text.ends_with(expected), "{text}");
    }
}
