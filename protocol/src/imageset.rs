//! The ImageSet description that nodes read: the config blob of entry 0 of an ImageSet's index.
//!
//! `imageset.toml`, which people write, is this plus the sources of the images; the imagebuilder owns that form.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::{Name, Version};

mod checks;
mod runtime;
mod service;
mod signal;
mod values;

pub use checks::start_order;
pub use runtime::{
    Bind, Device, File, Limits, Namespaces, NetMode, Network, Persistent, Propagation, Seccomp,
    Storage, Tmpfs,
};
pub use service::{
    Health, Listen, MAX_SOCKETS, ParseListenError, Probe, Socket, Strategy, http_address,
};
pub use signal::signal_number;
pub use values::{Bound, ByteSize, Cpus, FileMode, ParseSizeError, Ulimit};

/// Seconds between the stop signal and SIGKILL where a container does not say otherwise.
pub const DEFAULT_STOP_TIMEOUT_S: u32 = 10;

/// Seconds that a set is watched after a cut-over where it does not say otherwise.
pub const DEFAULT_WATCH_S: u32 = 10;

/// Bytes of a container's log that a node keeps where the container does not say otherwise.
pub const DEFAULT_LOG_SIZE: u64 = 32 << 20;

/// How many they may be: a log lies in the node's memory.
pub const LOG_SIZES: std::ops::RangeInclusive<u64> = (64 << 10)..=(1 << 30);

/// Most containers in one ImageSet.
pub const MAX_CONTAINERS: usize = 64;

/// How an ImageSet takes hold of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Containers over a resident Layer0. The default.
    #[default]
    Contain,
    /// The one image becomes the node's own system; its init becomes PID 1.
    Pivot,
}

/// An image of the set. Its manifest stands in the same index under the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The name by which containers and the index speak of it.
    pub name: Name,
}

/// What happens when a container's program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// It is started again, with a growing pause. The default.
    #[default]
    Always,
    /// It is started again unless it ended with 0.
    OnFailure,
    /// It stays ended.
    Never,
}

/// What a container may do, as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// A service: nosuid, no_new_privs, few capabilities. The default.
    #[default]
    Service,
    /// A whole system such as systemd: setuid kept, the capabilities that an init needs.
    System,
}

/// A container of the set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// Its name, unique in the set.
    pub name: Name,
    /// The image it runs.
    pub image: Name,
    /// Program and arguments; the image's own Entrypoint and Cmd when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Added to the image's environment, replacing keys of the same name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// `USER[:GROUP]` by name or number; the image's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Working directory; the image's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// What happens when the program ends.
    #[serde(default)]
    pub restart: Restart,
    /// Signal that asks it to end, `SIGTERM` or `SIGRTMIN+3`; the image's own, else SIGTERM, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Seconds between that signal and SIGKILL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout_s: Option<u32>,
    /// What it may do, as a whole.
    #[serde(default)]
    pub profile: Profile,
    /// Capabilities beyond those of the profile, `CAP_NET_ADMIN`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// Capabilities of the profile that it does not get.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drop_capabilities: Vec<String>,
    /// Every capability and device of the node, no filter, nothing masked: for what manages the node itself.
    #[serde(default, skip_serializing_if = "is_false")]
    pub privileged: bool,
    /// Whether the program is systemd: /run and /tmp in memory, the control group delegated, SIGRTMIN+3 to stop.
    #[serde(default, skip_serializing_if = "is_false")]
    pub systemd: bool,
    /// Whether a tiny reaper runs as PID 1 in front of the program, which then need not be able to.
    #[serde(default, skip_serializing_if = "is_false")]
    pub init: bool,
    /// Its host name; the node's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Namespaces beyond the usual.
    #[serde(default, skip_serializing_if = "is_default")]
    pub namespaces: Namespaces,
    /// Addresses, for `namespaces.net = "private"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Directories and files of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Bind>,
    /// Directories in memory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tmpfs: Vec<Tmpfs>,
    /// Directories that outlive the instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub persistent: Vec<Persistent>,
    /// Files and secrets over the image's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<File>,
    /// Devices of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Device>,
    /// Whether its system calls are filtered.
    #[serde(default, skip_serializing_if = "is_default")]
    pub seccomp: Seccomp,
    /// What it may use of the node.
    #[serde(default, skip_serializing_if = "is_default")]
    pub limits: Limits,
    /// Resource limits by their names without RLIMIT_, `memlock` (setrlimit(2)).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ulimits: BTreeMap<String, Ulimit>,
    /// Kernel settings of its namespaces by name, `net.core.somaxconn` (sysctl(8)).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctls: BTreeMap<String, String>,
    /// Size of /dev/shm; 64 MiB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shm_size: Option<ByteSize>,
    /// How much it may use of huge pages, by page size, `"2MiB" = "64MiB"`; mounted at /dev/hugepages (largest page size first).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hugepages: BTreeMap<String, ByteSize>,
    /// Most bytes of its log that the node keeps, in two halves: [`LOG_SIZES`], 32 MiB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_size: Option<ByteSize>,
    /// Containers of the set that are ready before this one starts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<Name>,
    /// How its next version takes its place.
    #[serde(default, skip_serializing_if = "is_default")]
    pub strategy: Strategy,
    /// Listening sockets that the node holds for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sockets: Vec<Socket>,
    /// Ports of the node that it listens on by itself, so that two containers that want one are refused: `8080` (TCP).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    /// When it is healthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// Whether the program tells when it is ready, and feeds its watchdog, as sd_notify(3) has it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub notify: bool,
    /// Milliseconds between two `WATCHDOG=1`, for `notify`; none are asked for when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog_ms: Option<u32>,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Container {
    /// A container with its defaults.
    #[must_use]
    pub fn new(name: Name, image: Name) -> Self {
        Self {
            name,
            image,
            command: Vec::new(),
            env: BTreeMap::new(),
            user: None,
            workdir: None,
            restart: Restart::default(),
            stop_signal: None,
            stop_timeout_s: None,
            profile: Profile::default(),
            capabilities: Vec::new(),
            drop_capabilities: Vec::new(),
            privileged: false,
            systemd: false,
            init: false,
            hostname: None,
            namespaces: Namespaces::default(),
            network: None,
            mounts: Vec::new(),
            tmpfs: Vec::new(),
            persistent: Vec::new(),
            files: Vec::new(),
            devices: Vec::new(),
            seccomp: Seccomp::default(),
            limits: Limits::default(),
            ulimits: BTreeMap::new(),
            sysctls: BTreeMap::new(),
            shm_size: None,
            hugepages: BTreeMap::new(),
            log_size: None,
            after: Vec::new(),
            strategy: Strategy::default(),
            sockets: Vec::new(),
            ports: Vec::new(),
            health: None,
            notify: false,
            watchdog_ms: None,
        }
    }
}

/// The description of an ImageSet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSet {
    /// Its name.
    pub name: Name,
    /// Its version.
    pub version: Version,
    /// How it takes hold of a node.
    #[serde(default)]
    pub mode: Mode,
    /// Program and arguments that become PID 1 in pivot mode; `/sbin/init` when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub init: Vec<String>,
    /// Seconds after a cut-over in which the set must be ready, healthy and stay so; otherwise the node goes back to the old one.
    /// [`DEFAULT_WATCH_S`] when absent; 0: committed at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watch_s: Option<u32>,
    /// Its images.
    #[serde(rename = "image")]
    pub images: Vec<Image>,
    /// Its containers; none in pivot mode.
    #[serde(rename = "container", default, skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<Container>,
}

impl ImageSet {
    /// Everything that is wrong with the set as a whole, each as one sentence that names the place. Empty when good.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut images = BTreeSet::new();
        for image in &self.images {
            if !images.insert(&image.name) {
                problems.push(format!("image `{}` is described twice", image.name));
            }
        }
        if self.images.is_empty() {
            problems.push("there is no [[image]]".to_owned());
        }
        match self.mode {
            Mode::Contain => self.contain_problems(&images, &mut problems),
            Mode::Pivot => self.pivot_problems(&mut problems),
        }
        problems
    }

    fn contain_problems(&self, images: &BTreeSet<&Name>, problems: &mut Vec<String>) {
        if !self.init.is_empty() {
            problems.push("`init` is only for mode = \"pivot\"".to_owned());
        }
        if self.containers.is_empty() {
            problems.push("there is no [[container]]".to_owned());
        }
        if self.containers.len() > MAX_CONTAINERS {
            problems.push(format!(
                "{} containers are more than the {MAX_CONTAINERS} that a set may have",
                self.containers.len()
            ));
        }
        let mut names = BTreeSet::new();
        for container in &self.containers {
            if !names.insert(&container.name) {
                problems.push(format!("container `{}` is described twice", container.name));
            }
            if !images.contains(&container.image) {
                problems.push(format!(
                    "container `{}` wants image `{}`, which the set does not have",
                    container.name, container.image
                ));
            }
            container.own_problems(problems);
        }
        checks::common_problems(&self.containers, problems);
    }

    fn pivot_problems(&self, problems: &mut Vec<String>) {
        if self.images.len() > 1 {
            problems.push("mode = \"pivot\" takes exactly one [[image]]".to_owned());
        }
        if !self.containers.is_empty() {
            problems.push("mode = \"pivot\" takes no [[container]]".to_owned());
        }
        if self.init.first().is_some_and(|program| !program.starts_with('/')) {
            problems.push("`init` must begin with an absolute path".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = include_str!("../golden/v1/imageset.json");

    #[test]
    fn the_golden_description_is_read_and_written_unchanged() {
        let set: ImageSet = serde_json::from_str(GOLDEN).expect("golden");
        assert_eq!(set.problems(), Vec::<String>::new());
        assert_eq!(serde_json::to_string_pretty(&set).expect("render") + "\n", GOLDEN);
    }

    #[track_caller]
    fn problem(change: impl FnOnce(&mut ImageSet), expected: &str) {
        let mut set: ImageSet = serde_json::from_str(GOLDEN).expect("golden");
        change(&mut set);
        let problems = set.problems().join("; ");
        assert!(problems.contains(expected), "{problems}");
    }

    #[test]
    fn each_mistake_is_named() {
        problem(|set| set.images.clear(), "no [[image]]");
        problem(|set| set.containers.clear(), "no [[container]]");
        problem(|set| set.containers.push(set.containers[0].clone()), "described twice");
        problem(
            |set| set.containers[0].image = "other".parse().expect("name"),
            "wants image `other`",
        );
        problem(|set| set.mode = Mode::Pivot, "takes no [[container]]");
        problem(|set| set.init = vec!["/init".to_owned()], "only for mode");
        problem(
            |set| set.containers[0].stop_signal = Some("SIGNO".to_owned()),
            "stop_signal `SIGNO`",
        );
        problem(|set| set.containers[0].workdir = Some("srv".to_owned()), "absolute path");
        problem(|set| set.containers[0].capabilities = vec!["net".to_owned()], "CAP_NET_ADMIN");
    }

    #[test]
    fn unknown_keys_are_refused() {
        let text = GOLDEN.replacen("\"name\"", "\"colour\": 1, \"name\"", 1);
        let error = serde_json::from_str::<ImageSet>(&text).expect_err("unknown key").to_string();
        assert!(error.contains("colour"), "{error}");
    }
}
