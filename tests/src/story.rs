//! The words in which the cases are told: a boot server, nodes that are switched on, and waiting for what they report.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use protocol::ids::Name;
use protocol::node::{Observed, ObservedSet, SetState};

use crate::lab::Lab;
use crate::qemu::{Machine, MachineSpec};
use crate::server_peer::{Server, ServerSpec};
use crate::{prerequisites, wait};

/// How long a node may take to boot and run an ImageSet: emulated, on a loaded machine.
pub const BOOT: Duration = Duration::from_secs(240);
/// How long anything may take that a running node does.
pub const ACT: Duration = Duration::from_secs(90);
/// How long one question to a service may take.
const QUESTION: Duration = Duration::from_secs(5);

/// A boot server and the nodes that were switched on.
#[derive(Debug)]
pub struct Story<'l> {
    /// The boot server.
    pub server: Server,
    lab: &'l Lab,
    machines: BTreeMap<u8, Machine>,
}

impl<'l> Story<'l> {
    /// Begins with a server and no node.
    ///
    /// # Errors
    /// When the server does not start.
    pub fn begin(lab: &'l Lab, spec: &ServerSpec) -> Result<Self> {
        Ok(Self { server: Server::start(lab, spec)?, lab, machines: BTreeMap::new() })
    }

    /// Pushes an ImageSet to the server's own registry.
    ///
    /// # Errors
    /// When that fails.
    pub fn push(&self, imageset: &Path) -> Result<()> {
        self.server.push(self.lab, imageset)
    }

    /// Pushes an ImageSet to another registry.
    ///
    /// # Errors
    /// When that fails.
    pub fn push_to(&self, imageset: &Path, base: &str) -> Result<()> {
        let file = imageset.to_string_lossy();
        let args = ["imageset", "push", &*file, "--to", base];
        self.server.layercake(self.lab, &args).map(drop)
    }

    /// Wants this version, `NAME:VERSION`, on every node.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn roll_all(&self, imageset: &str) -> Result<()> {
        self.server.client.start_roll(&["all"], imageset).map(drop)
    }

    /// Switches a node on, which boots from the network.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn switch_on(&mut self, number: u8) -> Result<()> {
        let machine = Machine::start(self.lab, &MachineSpec::netboot(number))?;
        self.machines.insert(number, machine);
        Ok(())
    }

    /// The machine of a node that was switched on.
    ///
    /// # Errors
    /// When it was not.
    pub fn machine(&mut self, number: u8) -> Result<&mut Machine> {
        self.machines
            .get_mut(&number)
            .with_context(|| format!("node {number} was never switched on"))
    }

    /// Waits until what a node reports is as wanted. `what` finishes the sentence "waited 90 s for node 1 …".
    ///
    /// # Errors
    /// When it does not come in time, with the last report; or when server or machine end.
    pub fn wait<T>(
        &mut self,
        number: u8,
        what: &str,
        within: Duration,
        wanted: impl Fn(&Observed) -> Option<T>,
    ) -> Result<T> {
        let id = self.machine(number)?.id.clone();
        let mut last = None;
        let found = wait::until(&format!("node {number} {what}"), within, || {
            self.server.check_alive()?;
            self.machine(number)?.check_alive()?;
            last = self.server.client.node(&id)?.and_then(|record| record.observed);
            wait::pause(Duration::from_millis(100))?;
            Ok(last.as_ref().and_then(&wanted))
        });
        let console = self.machine(number)?.console.situation();
        found.with_context(|| format!("it last reported {last:#?}\n{console}"))
    }

    /// Waits until a node runs this version, and gives its report and the set's.
    ///
    /// # Errors
    /// As [`Story::wait`], and when the set fails.
    pub fn wait_running(
        &mut self,
        number: u8,
        name: &str,
        version: &str,
    ) -> Result<(Observed, ObservedSet)> {
        let what = format!("to run {name}:{version}");
        let name: Name = name.parse()?;
        let seen = self.wait(number, &what, BOOT, |observed| {
            let set = observed.imagesets.iter().find(|set| set.name == name)?;
            let here = set.version.as_str() == version;
            let ended = matches!(set.state, SetState::Current | SetState::Failed);
            (here && ended).then(|| (observed.clone(), set.clone()))
        })?;
        if seen.1.state == SetState::Failed {
            bail!("node {number} failed {what}: {:?}", seen.1.reason);
        }
        Ok(seen)
    }

    /// What the service on a node answers; it may take a moment to listen.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn answer(&mut self, number: u8) -> Result<String> {
        let url = format!("http://{}:8080/", self.machine(number)?.address);
        let client = self.server.client.clone();
        wait::until(&format!("{url} to answer"), ACT, || {
            self.machine(number)?.check_alive()?;
            Ok(client.get_text(&url, QUESTION).ok())
        })
    }

    /// Whether the service on a node answers now.
    ///
    /// # Errors
    /// When the node was never switched on.
    pub fn answers(&mut self, number: u8) -> Result<bool> {
        let url = format!("http://{}:8080/", self.machine(number)?.address);
        Ok(self.server.client.get_text(&url, QUESTION).is_ok())
    }
}

/// Writes an ImageSet whose one image is busybox, in `dir`, and gives its description's file. `head` is for the top of the file
/// (`mode`, `init`), `containers` for what comes after the image.
///
/// # Errors
/// When busybox is not there or something cannot be written.
pub fn busybox_set(dir: &Path, name: &str, head: &str, containers: &str) -> Result<PathBuf> {
    let busybox = prerequisites::find_program("busybox")
        .context("busybox is missing (package busybox-static)")?;
    let dir = dir.join(name);
    let root = dir.join("rootfs");
    let file = dir.join("imageset.toml");
    let write = || -> std::io::Result<()> {
        for below in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
            fs::create_dir_all(root.join(below))?;
        }
        fs::copy(busybox, root.join("bin/busybox"))?;
        for applet in ["sh", "sleep", "mount", "cat"] {
            symlink("busybox", root.join("bin").join(applet))?;
        }
        let image = "[[image]]\nname = \"busybox\"\nsource = \"dir:rootfs\"\n";
        let text = format!("name = \"{name}\"\nversion = \"1\"\n{head}\n{image}\n{containers}");
        fs::write(&file, text)
    };
    write().with_context(|| format!("cannot write the ImageSet in {}", dir.display()))?;
    Ok(file)
}
