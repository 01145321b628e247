//! `layercake.toml`: what `layercake serve` is told. Types and checks are pure; [`load`] alone reads the file.

mod place;
pub mod values;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocol::ids::{Mac, NodeId};
use protocol::registries::RegistrySource;
use serde::Deserialize;

use self::values::{BaseUrl, Subnet};
use crate::files::{self, FileSource, Files};
use crate::overlays;
use crate::registries::Known;
use crate::registry::TokenHash;
use crate::sources::SetName;

/// The commented config that `layercake serve --init` writes.
pub const TEMPLATE: &str = include_str!("config/template.toml");

/// Why a config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not there.
    #[error("{} does not exist; `layercake serve --init {}` writes one", path.display(), path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It could not be read.
    #[error("{} could not be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: std::io::Error,
    },
    /// It is not what it should be. One line for every problem, each naming file, line and key.
    #[error("{}", problems.join("\n"))]
    Invalid {
        /// The problems.
        problems: Vec<String>,
    },
}

/// The whole config.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `[server]`.
    pub server: ServerConfig,
    /// `[dhcp]`: no DHCP server without it.
    pub dhcp: Option<DhcpSection>,
    /// `[tftp]`: no TFTP server without it.
    pub tftp: Option<TftpSection>,
    /// `[registry]`: the embedded registry, open to everybody, without it.
    #[serde(default)]
    pub registry: RegistrySection,
    /// `[boot]`.
    #[serde(default)]
    pub boot: BootSection,
    /// `[[registries]]`: credentials, certificates and mirrors of other registries, for this server and its nodes.
    #[serde(default)]
    pub registries: Vec<RegistrySource>,
    /// `[[files]]`: files and secrets that containers of nodes ask for by name.
    #[serde(default)]
    pub files: Vec<FileSource>,
    /// `[[node]]`: the nodes that have names, addresses or ImageSets before they were ever seen.
    #[serde(default, rename = "node")]
    pub nodes: Vec<NodeSection>,
}

/// `[server]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// Where HTTP listens.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Base URL by which nodes reach it; no path.
    pub url: BaseUrl,
    /// Inventory and registry are kept here. A relative path begins at the config's directory.
    pub data_dir: PathBuf,
    /// `vmlinuz` and `initramfs.img` are read from here. A relative path begins at the config's directory.
    pub layer0_dir: PathBuf,
    /// Whether unknown machines are taken into the inventory (lab mode).
    #[serde(default = "default_true")]
    pub auto_register: bool,
}

/// `[dhcp]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DhcpSection {
    /// The interface to serve.
    pub interface: String,
    /// Our own address on it; the host of `server.url` when absent.
    pub address: Option<Ipv4Addr>,
    /// The subnet, `10.9.0.0/24`.
    pub subnet: Subnet,
    /// First and last address that is given away.
    pub range: (Ipv4Addr, Ipv4Addr),
    /// Default gateway for nodes.
    pub router: Option<Ipv4Addr>,
    /// Name servers for nodes.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// Time servers for nodes.
    #[serde(default)]
    pub ntp_servers: Vec<Ipv4Addr>,
    /// Search domain for nodes.
    pub domain: Option<String>,
    /// Lease time in seconds.
    #[serde(default = "default_lease_s")]
    pub lease_s: u32,
    /// Whether machines that ask for an IPv6 router are told that there is none here: see [`crate::dhcp::router`].
    #[serde(default = "default_true")]
    pub no_ipv6_router: bool,
}

/// `[tftp]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TftpSection {
    /// Where it listens.
    #[serde(default = "default_tftp_listen")]
    pub listen: SocketAddr,
    /// Directory of iPXE binaries; only the built-in `boot.ipxe` is served without it.
    pub root: Option<PathBuf>,
}

/// `[registry]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistrySection {
    /// Base of an external registry; a path is a prefix of the repositories. The embedded one when absent.
    pub url: Option<BaseUrl>,
    /// Hashes of the tokens that may push, delete and collect; everybody may when there are none.
    #[serde(default)]
    pub push_tokens: Vec<TokenHash>,
    /// Hashes of the tokens that may pull, as those that push may; everybody may when there are none.
    #[serde(default)]
    pub pull_tokens: Vec<TokenHash>,
    /// Seconds for which what nothing refers to is kept all the same, because its push may still be going on.
    pub gc_grace_s: Option<u64>,
}

impl RegistrySection {
    /// How long what nothing refers to is kept: a day unless the config says otherwise.
    #[must_use]
    pub fn gc_grace(&self) -> Duration {
        Duration::from_secs(self.gc_grace_s.unwrap_or(24 * 3600))
    }

    fn problems(&self, problems: &mut Vec<Problem>) {
        let mut say = |key, text: &str| {
            problems.push(Problem { section: "registry", nth: 0, key, text: text.to_owned() });
        };
        if self.url.is_some() {
            let own = "an external registry has its own; this is for the embedded one, without url";
            for (key, there) in [
                ("push_tokens", !self.push_tokens.is_empty()),
                ("pull_tokens", !self.pull_tokens.is_empty()),
                ("gc_grace_s", self.gc_grace_s.is_some()),
            ] {
                if there {
                    say(key, own);
                }
            }
        }
        if !self.pull_tokens.is_empty() && self.push_tokens.is_empty() {
            say("pull_tokens", "without push_tokens everybody could push what only some may pull");
        }
    }
}

/// `[boot]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSection {
    /// More kernel arguments for every node.
    #[serde(default)]
    pub cmdline: String,
    /// Archives that every node gets beside the initramfs: see [`crate::overlays`]. A relative path begins at the config's
    /// directory.
    #[serde(default)]
    pub overlays: Vec<PathBuf>,
}

/// `[[node]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSection {
    /// Its id.
    pub id: NodeId,
    /// The interface it boots from.
    pub mac: Mac,
    /// The address that DHCP gives it.
    pub address: Option<Ipv4Addr>,
    /// What it runs until an operator says otherwise, `NAME:VERSION` each.
    #[serde(default)]
    pub imagesets: Vec<SetName>,
    /// Archives that it gets after those of `[boot]`.
    #[serde(default)]
    pub overlays: Vec<PathBuf>,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 8080))
}

fn default_tftp_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 69))
}

fn default_lease_s() -> u32 {
    3600
}

fn default_true() -> bool {
    true
}

/// A port that the server needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// `UDP` or `TCP`.
    pub protocol: &'static str,
    /// Where it listens.
    pub address: SocketAddr,
    /// What for.
    pub purpose: &'static str,
}

/// Something wrong with a value that is well-formed by itself.
struct Problem {
    section: &'static str,
    /// Which of several sections of that name, from 0.
    nth: usize,
    key: &'static str,
    text: String,
}

impl Config {
    /// Reads a config from text. `path` only names it in errors.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with every problem that was found; each names file, line and key.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let place = error.span().map(|span| place::at(text, span.start)).unwrap_or_default();
            let problems = vec![format!("{}{place}: {}", path.display(), error.message())];
            ConfigError::Invalid { problems }
        })?;
        let problems: Vec<String> =
            config.problems().iter().map(|p| p.locate(text, path)).collect();
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Invalid { problems }) }
    }

    /// The address that the DHCP server says is ours, where there is a DHCP server.
    #[must_use]
    pub fn dhcp_address(&self) -> Option<Ipv4Addr> {
        self.dhcp.as_ref()?.address.or_else(|| self.server.url.ipv4_host())
    }

    /// The ports that this config needs.
    #[must_use]
    pub fn ports(&self) -> Vec<Port> {
        let mut ports = Vec::new();
        if self.dhcp.is_some() {
            let address = SocketAddr::from(([0, 0, 0, 0], crate::dhcp::packet::SERVER_PORT));
            ports.push(Port { protocol: "UDP", address, purpose: "DHCP" });
        }
        if let Some(tftp) = &self.tftp {
            ports.push(Port { protocol: "UDP", address: tftp.listen, purpose: "TFTP" });
        }
        let purpose = "HTTP: boot files, API, registry";
        ports.push(Port { protocol: "TCP", address: self.server.listen, purpose });
        ports
    }

    fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.server.url.has_path() {
            let text = "the URL must be http://HOST[:PORT], without a path".to_owned();
            problems.push(Problem { section: "server", nth: 0, key: "url", text });
        }
        if self.boot.cmdline.chars().any(char::is_control) {
            let text = "a line break or control character in the kernel command line".to_owned();
            problems.push(Problem { section: "boot", nth: 0, key: "cmdline", text });
        }
        if let Some(dhcp) = &self.dhcp {
            self.dhcp_problems(dhcp, &mut problems);
        }
        self.registry.problems(&mut problems);
        problems.extend(files::problems(&self.files).into_iter().map(Problem::of_file));
        self.node_problems(&mut problems);
        let overlays = overlays::problems(self).into_iter();
        problems.extend(overlays.map(|wrong| {
            let overlays::Wrong { section, nth, text } = wrong;
            Problem { section, nth, key: "overlays", text }
        }));
        problems
    }

    fn dhcp_problems(&self, dhcp: &DhcpSection, problems: &mut Vec<Problem>) {
        let mut say = |key, text| problems.push(Problem { section: "dhcp", nth: 0, key, text });
        // An empty name would mean all interfaces, and DHCP on networks of others.
        let name = &dhcp.interface;
        let odd = |c: char| c == '/' || c.is_whitespace() || c.is_control();
        if !(1..=15).contains(&name.len()) || name.contains(odd) {
            let text = "is not the name of an interface: expected 1 to 15 characters, such as br0";
            say("interface", format!("`{name}` {text}"));
        }
        let subnet = dhcp.subnet;
        let (first, last) = dhcp.range;
        for address in [first, last] {
            if !subnet.contains(address) {
                say("range", format!("{address} is not in the subnet {subnet}"));
            }
        }
        if first > last {
            say("range", format!("{first} comes after {last}"));
        }
        if let Some(router) = dhcp.router.filter(|router| !subnet.contains(*router)) {
            say("router", format!("{router} is not in the subnet {subnet}"));
        }
        match self.dhcp_address() {
            None => say(
                "address",
                format!(
                    "our own IPv4 address is missing, and server.url ({}) does not tell it",
                    self.server.url
                ),
            ),
            Some(own) if (first..=last).contains(&own) => {
                say("range", format!("{own} is our own address; the range must leave it out"));
            }
            Some(own) if !subnet.contains(own) => {
                say("address", format!("our own address {own} is not in the subnet {subnet}"));
            }
            Some(_) => {}
        }
        if dhcp.lease_s < 60 {
            say("lease_s", format!("{} s is too short, at least 60", dhcp.lease_s));
        }
    }

    fn node_problems(&self, problems: &mut Vec<Problem>) {
        let (mut ids, mut macs, mut addresses) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for (nth, node) in self.nodes.iter().enumerate() {
            let mut say = |key, text| problems.push(Problem { section: "node", nth, key, text });
            if !ids.insert(&node.id) {
                say("id", format!("{} is described twice", node.id));
            }
            if !macs.insert(node.mac) {
                say("mac", format!("{} belongs to two nodes", node.mac));
            }
            let mut names = BTreeSet::new();
            for set in &node.imagesets {
                if !names.insert(&set.name) {
                    say("imagesets", format!("{} is there twice", set.name));
                }
            }
            let Some(address) = node.address else { continue };
            if !addresses.insert(address) {
                say("address", format!("{address} belongs to two nodes"));
            }
            if let Some(dhcp) = &self.dhcp
                && !dhcp.subnet.contains(address)
            {
                say("address", format!("{address} is not in the subnet {}", dhcp.subnet));
            }
        }
    }
}

impl Problem {
    fn of_file(wrong: files::Wrong) -> Self {
        let files::Wrong { nth, key, text } = wrong;
        Self { section: "files", nth, key, text }
    }

    fn locate(&self, text: &str, path: &Path) -> String {
        let line = place::line_of(text, self.section, self.nth, self.key)
            .map_or(String::new(), |line| format!(", line {line}"));
        format!("{}{line}, key {}.{}: {}", path.display(), self.section, self.key, self.text)
    }
}

/// Reads the config file. Relative paths in it begin at its directory.
///
/// # Errors
/// If the file is missing, unreadable, or wrong in any way.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            std::io::ErrorKind::NotFound => ConfigError::Missing { path },
            _ => ConfigError::Read { path, source },
        }
    })?;
    let mut config = Config::parse(&text, path)?;
    let dir = path.parent().unwrap_or(Path::new(""));
    config.server.data_dir = dir.join(&config.server.data_dir);
    config.server.layer0_dir = dir.join(&config.server.layer0_dir);
    if let Some(root) = config.tftp.as_mut().and_then(|tftp| tftp.root.as_mut()) {
        *root = dir.join(&*root);
    }
    let own = config.nodes.iter_mut().flat_map(|node| &mut node.overlays);
    for overlay in config.boot.overlays.iter_mut().chain(own) {
        *overlay = dir.join(&*overlay);
    }
    for source in &mut config.registries {
        let files = source.ca.iter_mut().chain(&mut source.password_file);
        for file in files.chain(&mut source.token_file) {
            *file = dir.join(&*file).to_string_lossy().into_owned();
        }
    }
    for path in config.files.iter_mut().filter_map(|file| file.path.as_mut()) {
        *path = dir.join(&*path);
    }
    Files::load(&config.files).map_err(|wrong| {
        let located = |wrong| Problem::of_file(wrong).locate(&text, path);
        ConfigError::Invalid { problems: wrong.into_iter().map(located).collect() }
    })?;
    let named = |problem| format!("{}, section [[registries]]: {problem}", path.display());
    Known::load(&config.registries).map_err(|problems| {
        let problems = problems.into_iter().map(named).collect();
        ConfigError::Invalid { problems }
    })?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"[server]
url = "http://10.9.0.1:8080"
data_dir = "data"
layer0_dir = "/l0"
[dhcp]
interface = "br0"
subnet = "10.9.0.0/24"
range = ["10.9.0.100", "10.9.0.199"]
[[node]]
id = "n1"
mac = "52:54:00:00:00:01"
address = "10.9.0.11"
imagesets = ["hello:1"]
"#;

    #[track_caller]
    fn check(from: &str, to: &str, expected: &str) {
        assert!(GOOD.contains(from), "`{from}` is not in the good config");
        let text = GOOD.replacen(from, to, 1);
        let error = Config::parse(&text, Path::new("l.toml")).expect_err(to);
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn a_good_config_is_read_with_its_defaults() {
        let config = Config::parse(GOOD, Path::new("l.toml")).expect("good");
        assert_eq!(config.server.listen, default_listen());
        assert!(config.server.auto_register);
        assert_eq!(config.dhcp_address(), Some(Ipv4Addr::new(10, 9, 0, 1)));
        let ports: Vec<String> =
            config.ports().iter().map(|p| format!("{} {}", p.protocol, p.address)).collect();
        assert_eq!(ports, ["UDP 0.0.0.0:67", "TCP 0.0.0.0:8080"]);
    }

    #[test]
    fn the_template_is_a_good_config_that_needs_the_three_ports() {
        let config = Config::parse(TEMPLATE, Path::new("template.toml")).expect("template");
        let ports: Vec<u16> = config.ports().iter().map(|port| port.address.port()).collect();
        assert_eq!(ports, [67, 69, 8080]);
    }

    #[test]
    fn an_unknown_key_is_named_with_file_line_and_what_was_expected() {
        check(
            "data_dir = \"data\"",
            "data_dir = \"data\"\ncolour = 1",
            "l.toml, line 4, key server.colour: unknown field `colour`, expected one of `listen`, \
             `url`, `data_dir`, `layer0_dir`, `auto_register`",
        );
    }

    #[test]
    fn a_wrong_type_names_the_key() {
        check(
            "\"data\"",
            "5",
            "l.toml, line 3, key server.data_dir: invalid type: integer `5`, expected path string",
        );
        check(
            "\"br0\"",
            "\"br0\"\nlease_s = \"long\"",
            "l.toml, line 7, key dhcp.lease_s: invalid type: string \"long\", expected u32",
        );
    }

    #[test]
    fn a_missing_key_names_its_section() {
        check(
            "url = \"http://10.9.0.1:8080\"\n",
            "",
            "l.toml, line 1, section [server]: missing field `url`",
        );
    }

    #[test]
    fn a_bad_value_says_what_was_expected() {
        check(
            "\"http://10.9.0.1:8080\"",
            "\"10.9.0.1:8080\"",
            "l.toml, line 2, key server.url: `10.9.0.1:8080` is not a URL: expected \
             http://HOST[:PORT] or https://HOST[:PORT]",
        );
        check(
            "\"10.9.0.0/24\"",
            "\"10.9.0.5/24\"",
            "l.toml, line 7, key dhcp.subnet: `10.9.0.5/24` is not a subnet: expected its first \
             address and its prefix length from 1 to 30, such as 10.9.0.0/24",
        );
        check(
            "\"hello:1\"",
            "\"hello\"",
            "l.toml, line 13, key node.imagesets: `hello` is not an ImageSet: expected NAME:VERSION",
        );
    }

    #[test]
    fn dhcp_is_never_served_on_all_interfaces_by_an_empty_name() {
        for name in ["", "a/b", "br 0", "longer-than-15-b"] {
            check(
                "\"br0\"",
                &format!("\"{name}\""),
                &format!(
                    "l.toml, line 6, key dhcp.interface: `{name}` is not the name of an \
                     interface: expected 1 to 15 characters, such as br0"
                ),
            );
        }
    }

    #[test]
    fn a_slip_in_the_syntax_names_the_line() {
        let text = GOOD.replacen("\"br0\"", "br0", 1);
        let error = Config::parse(&text, Path::new("l.toml")).expect_err("syntax").to_string();
        assert!(error.starts_with("l.toml, line 6, key dhcp.interface: "), "{error}");
    }

    #[test]
    fn values_that_contradict_each_other_are_all_named() {
        check(
            "10.9.0.100\", \"10.9.0.199",
            "10.9.0.1\", \"10.9.1.199",
            "l.toml, line 8, key dhcp.range: 10.9.1.199 is not in the subnet 10.9.0.0/24\n\
             l.toml, line 8, key dhcp.range: 10.9.0.1 is our own address; the range must leave it out",
        );
        check(
            "imagesets = [\"hello:1\"]",
            "[[node]]\nid = \"n1\"\nmac = \"52-54-00-00-00-01\"",
            "l.toml, line 14, key node.id: n1 is described twice\n\
             l.toml, line 15, key node.mac: 52:54:00:00:00:01 belongs to two nodes",
        );
    }

    #[test]
    fn tokens_stand_in_the_config_as_hashes_only() {
        let hash = TokenHash::of("secret");
        let text = format!("[registry]\npush_tokens = [\"{hash}\"]\n[[node]]");
        let config = Config::parse(&GOOD.replacen("[[node]]", &text, 1), Path::new("l.toml"));
        assert_eq!(config.expect("good").registry.push_tokens, [hash]);
        check(
            "[[node]]",
            "[registry]\npush_tokens = [\"secret\"]\n[[node]]",
            "l.toml, line 10, key registry.push_tokens: not the hash of a token: expected \
             sha256:HEX; `layercake imageset token` makes a token and its hash, and `printf %s \
             TOKEN | sha256sum` tells the hash of one that you have",
        );
        check(
            "[[node]]",
            &format!("[registry]\npull_tokens = [\"{hash}\"]\n[[node]]"),
            "l.toml, line 10, key registry.pull_tokens: without push_tokens everybody could push \
             what only some may pull",
        );
        check(
            "[[node]]",
            "[registry]\nurl = \"http://r:5000\"\ngc_grace_s = 1\n[[node]]",
            "l.toml, line 11, key registry.gc_grace_s: an external registry has its own; this is \
             for the embedded one, without url",
        );
    }

    #[test]
    fn what_is_wrong_with_files_is_named_with_line_and_key() {
        let more = |rest: &str| format!("[[files]]\nname = \"key\"\n{rest}\n[[node]]");
        check(
            "[[node]]",
            &more("content = \"x\"\nnodes = [\"N 1\"]"),
            "l.toml, line 12, key files.nodes: `N 1` is not a valid node id: expected 1 to 63 of a-z, 0-9, `.` and `-`, beginning and ending with a letter or digit",
        );
        check(
            "[[node]]",
            &more("content = 4242"),
            "l.toml, line 11, key files.content: a secret must be a text in quotes",
        );
        check(
            "[[node]]",
            &more("path = \"k\"\n[[files]]\nname = \"key\"\ncontent = \"x\""),
            "l.toml, line 13, key files.name: file `key` is there twice for the same node",
        );
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("l.toml");
        std::fs::write(&path, GOOD.replacen("[[node]]", &more("path = \"none\""), 1))
            .expect("write");
        let error = load(&path).expect_err("no file").to_string();
        let place = format!("{}, line 11, key files.path: ", path.display());
        assert!(error.starts_with(&place) && error.contains("/none: No such file"), "{error}");
    }

    #[test]
    fn a_missing_file_says_how_to_write_one() {
        let error = load(Path::new("/nonexistent/l.toml")).expect_err("missing").to_string();
        assert_eq!(
            error,
            "/nonexistent/l.toml does not exist; `layercake serve --init /nonexistent/l.toml` writes one"
        );
    }

    #[test]
    fn relative_paths_begin_at_the_directory_of_the_config() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("l.toml");
        std::fs::write(&path, GOOD).expect("write");
        let config = load(&path).expect("load");
        assert_eq!(config.server.data_dir, dir.path().join("data"));
        assert_eq!(config.server.layer0_dir, Path::new("/l0"));
    }
}
