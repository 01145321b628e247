//! The words in which the cases are told: a boot server, nodes that are switched on, and waiting for what they report.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use protocol::ids::Name;
use protocol::node::{Observed, ObservedSet, SetState};

use crate::artifacts::{Artifacts, workspace_root};
use crate::lab::{Lab, SERVER_URL};
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

    /// Pushes an ImageSet whose images come as this file system too.
    ///
    /// # Errors
    /// When that fails.
    pub fn push_mounted(&self, imageset: &Path, form: &str) -> Result<()> {
        let file = imageset.to_string_lossy();
        let args = ["imageset", "push", &*file, "--mount", form];
        self.server.layercake(self.lab, &args).map(drop)
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

    /// Copies an ImageSet that was built into an OCI layout to the server's own registry, under this name.
    ///
    /// # Errors
    /// When that fails.
    pub fn push_layout(&self, layout: &Path, name: &str) -> Result<()> {
        let (from, to) = (layout.to_string_lossy(), format!("{SERVER_URL}/{name}"));
        self.server.layercake(self.lab, &["imageset", "copy", &*from, &to]).map(drop)
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
        self.switch_on_as(&MachineSpec::netboot(number))
    }

    /// Switches a node on that is made like this, in the place of one of its number that is off.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn switch_on_as(&mut self, spec: &MachineSpec) -> Result<()> {
        // Its console and its cable are free only then.
        drop(self.machines.remove(&spec.number));
        let machine = Machine::start(self.lab, spec)?;
        self.machines.insert(spec.number, machine);
        Ok(())
    }

    /// Switches a node on, which boots as `spec` says.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn switch_on_with(&mut self, spec: &MachineSpec) -> Result<()> {
        let machine = Machine::start(self.lab, spec)?;
        self.machines.insert(spec.number, machine);
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
    /// As [`Story::wait`].
    pub fn wait_running(
        &mut self,
        number: u8,
        name: &str,
        version: &str,
    ) -> Result<(Observed, ObservedSet)> {
        let what = format!("to run {name}:{version}");
        let name: Name = name.parse()?;
        // A set that failed is tried again: only the end of the wait ends that.
        self.wait(number, &what, BOOT, |observed| {
            let set = observed.imagesets.iter().find(|set| set.name == name)?;
            let current = set.version.as_str() == version && set.state == SetState::Current;
            current.then(|| (observed.clone(), set.clone()))
        })
    }

    /// The version that the `hello` service on a node says it is; it may take a moment to listen.
    ///
    /// # Errors
    /// When it does not answer in time, or with something else.
    pub fn hello(&mut self, number: u8) -> Result<String> {
        let url = format!("http://{}:8080/", self.machine(number)?.address);
        let client = self.server.client.clone();
        let answer = wait::until(&format!("{url} to answer"), ACT, || {
            self.machine(number)?.check_alive()?;
            Ok(client.get_text(&url, QUESTION).ok())
        })?;
        hello_version(&answer)
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

/// The version in an answer of the `hello` service, `{"name":"hello","version":"1","pid":1}`.
///
/// # Errors
/// When it is another answer.
pub fn hello_version(answer: &str) -> Result<String> {
    let value: serde_json::Value =
        serde_json::from_str(answer).with_context(|| format!("no answer of hello: {answer}"))?;
    let version = value.get("version").and_then(serde_json::Value::as_str);
    Ok(version.with_context(|| format!("no answer of hello: {answer}"))?.to_owned())
}

/// Makes the root filesystem that `examples/pivot` stands on: busybox, its links and the directories.
///
/// # Errors
/// When busybox is not there or something cannot be written.
pub fn make_pivot_base(root: &Path) -> Result<()> {
    let busybox = prerequisites::find_program("busybox")
        .context("busybox is missing (package busybox-static)")?;
    let write = || -> std::io::Result<()> {
        if root.exists() {
            fs::remove_dir_all(root)?;
        }
        for below in ["bin", "sbin", "proc", "sys", "dev", "run", "tmp", "root"] {
            fs::create_dir_all(root.join(below))?;
        }
        fs::copy(busybox, root.join("bin/busybox"))?;
        for name in ["sh", "grep", "mount", "sleep", "reboot", "poweroff", "ls", "cat", "ps"] {
            symlink("busybox", root.join("bin").join(name))?;
        }
        symlink("../bin/busybox", root.join("sbin/init"))
    };
    write().with_context(|| format!("cannot make {}", root.display()))
}

/// Writes an ImageSet in `dir` that runs the program of `examples/hello` and is not started again when it ends, and gives its
/// description's file.
///
/// # Errors
/// When something cannot be written.
pub fn mortal_hello(dir: &Path, artifacts: &Artifacts) -> Result<PathBuf> {
    let rootfs = workspace_root().join("examples/hello/v1/rootfs");
    let sources =
        [format!("binary:{}", artifacts.hello().display()), format!("dir:{}", rootfs.display())];
    let file = dir.join("imageset.toml");
    let text = format!(
        "name = \"mortal\"\nversion = \"1\"\n\n\
         [[image]]\nname = \"hello\"\nsource = {sources:?}\nentrypoint = [\"/hello\"]\n\n\
         [[container]]\nname = \"hello\"\nimage = \"hello\"\nrestart = \"never\"\n"
    );
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}
