//! The ImageSet description that nodes read: the config blob of entry 0 of an ImageSet's index.
//!
//! `imageset.toml`, which people write, is this plus the sources of the images; the imagebuilder owns that form.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::{Name, Version};

/// Seconds between the stop signal and SIGKILL where a container does not say otherwise.
pub const DEFAULT_STOP_TIMEOUT_S: u32 = 10;

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

impl Container {
    fn own_problems(&self, problems: &mut Vec<String>) {
        let mut say = |text: String| problems.push(format!("container `{}`: {text}", self.name));
        for key in self.env.keys() {
            if key.is_empty() || key.contains(['=', '\0']) {
                say(format!("env key `{key}` is not a variable name"));
            }
        }
        let nul = |text: &str| text.contains('\0');
        if self.command.iter().chain(self.env.values()).any(|text| nul(text)) {
            say("a NUL byte in command or env".to_owned());
        }
        if self.workdir.as_deref().is_some_and(|dir| !dir.starts_with('/')) {
            say("workdir must be an absolute path".to_owned());
        }
        if let Some(signal) = &self.stop_signal
            && signal_number(signal).is_none()
        {
            say(format!("stop_signal `{signal}` is not a signal such as SIGTERM or SIGRTMIN+3"));
        }
        for capability in &self.capabilities {
            let shape = capability.strip_prefix("CAP_").is_some_and(|rest| {
                !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
            });
            if !shape {
                say(format!("capability `{capability}` is not of the form CAP_NET_ADMIN"));
            }
        }
    }
}

/// The number of a signal by name (`SIGTERM`, `TERM`, `SIGRTMIN+3`) or number, as Linux on x86-64 and arm64 counts
/// (signal(7); SIGRTMIN as glibc shows it, 34).
#[must_use]
pub fn signal_number(text: &str) -> Option<i32> {
    const NAMES: [(&str, i32); 21] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("CHLD", 17),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
        ("WINCH", 28),
        ("PWR", 30),
    ];
    const RTMIN: i32 = 34;
    const RTMAX: i32 = 64;
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = text.strip_prefix("SIG").unwrap_or(text);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        let offset = if rest.is_empty() { 0 } else { rest.strip_prefix('+')?.parse().ok()? };
        return (0..=RTMAX - RTMIN).contains(&offset).then(|| RTMIN + offset);
    }
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
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

    #[test]
    fn signals_have_the_kernels_numbers() {
        for (text, number) in
            [("SIGTERM", 15), ("TERM", 15), ("SIGRTMIN+3", 37), ("9", 9), ("SIGRTMIN", 34)]
        {
            assert_eq!(signal_number(text), Some(number));
        }
        for text in ["SIGRTMIN+31", "0", "65", "SIGFOO", "", "SIGRTMIN-1"] {
            assert_eq!(signal_number(text), None, "{text}");
        }
    }
}
