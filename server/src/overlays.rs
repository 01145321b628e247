//! Archives that nodes get beside the initramfs: the site's keys and configuration, a rescue shell. Which node gets which, in
//! which order, under which names. Pure; the files are read when they are fetched.
//!
//! The kernel unpacks them one after the other over the initramfs (`Documentation/driver-api/early-userspace`), those of all
//! nodes first, then the node's own: the last one wins.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use protocol::ids::NodeId;

use crate::config::Config;

/// Longest name, in bytes: it stands on the kernel's command line.
const MAX_NAME: usize = 48;

/// An archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// Its file name: the last part of its URL, and what `initrd=` calls it.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
}

/// The archives of all nodes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overlays {
    common: Vec<Overlay>,
    own: BTreeMap<NodeId, Vec<Overlay>>,
}

/// What is wrong with an entry of the config: section, which of several, and a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// `boot` or `node`.
    pub section: &'static str,
    /// Which `[[node]]`, from 0.
    pub nth: usize,
    /// What is wrong.
    pub text: String,
}

impl Overlays {
    /// What the config says.
    #[must_use]
    pub fn of_config(config: &Config) -> Self {
        let list = |paths: &[PathBuf]| paths.iter().map(|path| overlay(path)).collect();
        let own = config.nodes.iter().filter(|node| !node.overlays.is_empty());
        Self {
            common: list(&config.boot.overlays),
            own: own.map(|node| (node.id.clone(), list(&node.overlays))).collect(),
        }
    }

    /// What this node gets, in the order in which its kernel unpacks it.
    pub fn of_node(&self, node: &NodeId) -> impl Iterator<Item = &Overlay> {
        self.common.iter().chain(self.own.get(node).into_iter().flatten())
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Overlay> {
        self.common.iter().chain(self.own.values().flatten())
    }

    /// The file of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Path> {
        self.all().find(|overlay| overlay.name == name).map(|overlay| overlay.path.as_path())
    }
}

/// What is wrong with the config's overlays. Names go into URLs, scripts and command lines: they are plain, and each stands for
/// one file.
#[must_use]
pub fn problems(config: &Config) -> Vec<Wrong> {
    let mut known: BTreeMap<String, &Path> = BTreeMap::new();
    let mut wrong = Vec::new();
    let common = config.boot.overlays.iter().map(|path| ("boot", 0, path));
    let nodes = config.nodes.iter().enumerate();
    let own = nodes.flat_map(|(nth, node)| node.overlays.iter().map(move |it| ("node", nth, it)));
    for (section, nth, path) in common.chain(own) {
        let name = overlay(path).name;
        let text = if let Err(why) = check_name(&name) {
            Some(format!("{}: {why}", path.display()))
        } else {
            let other = known.insert(name.clone(), path).filter(|other| *other != path.as_path());
            other.map(|other| {
                format!("{} and {} have the same name", other.display(), path.display())
            })
        };
        wrong.extend(text.map(|text| Wrong { section, nth, text }));
    }
    wrong
}

fn overlay(path: &Path) -> Overlay {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Overlay { name, path: path.to_owned() }
}

fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(plain) {
        let expected = "letters, digits, `.`, `-` and `_`";
        return Err(format!("its file name must be 1 to {MAX_NAME} of {expected}"));
    }
    if matches!(name, "vmlinuz" | "initramfs.img") {
        return Err("that is the name of a file of Layer0 itself".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(boot: &str, nodes: &[&str]) -> Config {
        let mut text = format!(
            "[server]\nurl = \"http://s:1\"\ndata_dir = \"d\"\nlayer0_dir = \"l\"\n\
             [boot]\noverlays = [{boot}]\n"
        );
        for (nth, own) in nodes.iter().enumerate() {
            let mac = format!("52:54:00:00:00:0{nth}");
            text += &format!("[[node]]\nid = \"n{nth}\"\nmac = \"{mac}\"\noverlays = [{own}]\n");
        }
        toml::from_str(&text).expect("config")
    }

    #[test]
    fn a_node_gets_what_all_get_and_then_its_own() {
        let config = config(r#""a/site.cpio.zst""#, &[r#""b/n0.cpio""#, ""]);
        assert_eq!(problems(&config), []);
        let overlays = Overlays::of_config(&config);
        let names = |node: &str| {
            let node = node.parse().expect("id");
            overlays.of_node(&node).map(|it| it.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(names("n0"), ["site.cpio.zst", "n0.cpio"]);
        assert_eq!(names("n1"), ["site.cpio.zst"]);
        assert_eq!(names("stranger"), ["site.cpio.zst"]);
        assert_eq!(overlays.find("n0.cpio"), Some(Path::new("b/n0.cpio")));
        assert_eq!(overlays.find("../n0.cpio"), None);
    }

    #[track_caller]
    fn wrong(boot: &str, nodes: &[&str], section: &str, expected: &str) {
        let found = problems(&config(boot, nodes));
        let [only] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!(only.section, section);
        assert!(only.text.contains(expected), "{}", only.text);
    }

    #[test]
    fn odd_names_and_two_files_of_one_name_are_refused() {
        wrong(r#""si te""#, &[], "boot", "1 to 48 of letters");
        wrong(r#""x/""#, &[r#""..""#], "node", "1 to 48 of letters");
        wrong(r#""dir/initramfs.img""#, &[], "boot", "Layer0 itself");
        wrong(r#""a/x""#, &[r#""b/x""#], "node", "a/x and b/x have the same name");
        assert_eq!(problems(&config("\"a/x\"", &["\"a/x\""])), [], "the same file twice");
    }
}
