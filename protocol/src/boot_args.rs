//! The kernel command line: what Layer0 reads of it, parsed and rendered side by side.
//!
//! Parsing cannot fail: what is wrong ends up in [`BootArgs::problems`] and is reported, never fatal, because a node
//! that refuses to boot for a typing slip is worse than one that says so. Quoting follows the kernel
//! (`Documentation/admin-guide/kernel-parameters.rst`): double quotes protect spaces.

mod amount;

use std::fmt;

use crate::ids::{Digest, Mac, NodeId};
use crate::network::Network;
use crate::reference::Reference;

pub use amount::{Amount, InvalidAmount};

/// Longest command line that is read, in bytes (x86 `COMMAND_LINE_SIZE`).
pub const MAX_COMMAND_LINE: usize = 2048;

/// When a shell is offered on the console (`layercake.rescue=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rescue {
    /// Never.
    Never,
    /// After the agent has failed for good. The default.
    #[default]
    OnFailure,
    /// At once, beside the agent.
    Always,
}

/// How much is logged (`layercake.log=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    /// Failures only.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what happens. The default.
    #[default]
    Info,
    /// And why.
    Debug,
}

/// After how many seconds the hardware's watchdog resets a machine whose PID 1 is silent (`layercake.watchdog=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Watchdog {
    /// After 60 s, where there is a watchdog. The default.
    #[default]
    Standard,
    /// After so many, 5 to 3600.
    Seconds(u16),
    /// Never: it is left alone.
    Off,
}

impl Watchdog {
    /// The timeout; none where it is left alone.
    #[must_use]
    pub fn seconds(self) -> Option<u32> {
        match self {
            Self::Standard => Some(60),
            Self::Seconds(seconds) => Some(seconds.into()),
            Self::Off => None,
        }
    }
}

/// What the console shows (`layercake.console=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ConsoleMode {
    /// One calm screen: who the node is, what it runs, what it waits for. The default.
    #[default]
    Status,
    /// The log, line by line.
    Log,
}

/// Which disk keeps blobs across reboots (`layercake.cache=`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CacheDisk {
    /// The one whose file system is labelled [`CACHE_LABEL`], if there is one. The default.
    #[default]
    Standard,
    /// The one with this label.
    Labelled(String),
    /// None, whatever there is.
    Off,
}

/// Label of the file system that keeps blobs where nothing else is said.
pub const CACHE_LABEL: &str = "LAYERCAKE";
/// Longest label of a file system that Linux has, in bytes (btrfs).
const MAX_LABEL: usize = 255;

impl CacheDisk {
    /// The label to look for; none where no disk is to be used.
    #[must_use]
    pub fn label(&self) -> Option<&str> {
        match self {
            Self::Standard => Some(CACHE_LABEL),
            Self::Labelled(label) => Some(label),
            Self::Off => None,
        }
    }
}

/// What the command line says to Layer0.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BootArgs {
    /// `layercake.server=`: base URLs of the boot servers, in order.
    pub servers: Vec<String>,
    /// `layercake.token=`: the one-time join token.
    pub token: Option<String>,
    /// `layercake.node=`: the node's id.
    pub node: Option<NodeId>,
    /// `layercake.imageset=`: run this without a server.
    pub imageset: Option<Reference>,
    /// `layercake.rescue=`.
    pub rescue: Rescue,
    /// `layercake.watchdog=`.
    pub watchdog: Watchdog,
    /// `layercake.log=`.
    pub log: LogLevel,
    /// `layercake.console=`.
    pub console: ConsoleMode,
    /// `layercake.cache=`.
    pub cache: CacheDisk,
    /// `layercake.store=`: how much memory what is pulled and written may fill; 80 % where it is not said.
    pub store: Option<Amount>,
    /// `layercake.zram=`: swap that is compressed and lies in memory itself; none where it is not said.
    pub zram: Option<Amount>,
    /// `layercake.layer0=`: the digest of this Layer0's manifest, said by whoever started it.
    pub layer0: Option<Digest>,
    /// `layercake.kexec`: the kernel before this one started it.
    pub kexec: bool,
    /// `BOOTIF=`: the interface that the firmware booted from.
    pub bootif: Option<Mac>,
    /// `ip=`, `vlan=`, `bond=`, `nameserver=` and `layercake.mtu=`.
    pub network: Network,
    /// What was not understood, each as a sentence for the console.
    pub problems: Vec<String>,
}

impl BootArgs {
    /// Reads a command line. Anything that is not ours is ignored; unknown `layercake.*` keys and bad values are noted
    /// in [`BootArgs::problems`].
    #[must_use]
    pub fn parse(command_line: &str) -> Self {
        let mut args = Self::default();
        for word in split_words(command_line) {
            let (key, value) = word.split_once('=').unwrap_or((&word, ""));
            if let Err(problem) = args.set(key, value) {
                args.problems.push(format!("kernel command line: {key}={value}: {problem}"));
            }
        }
        args
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "layercake.server" => {
                for url in value.split(',').filter(|url| !url.is_empty()) {
                    if !url.starts_with("http://") && !url.starts_with("https://") {
                        return Err(format!("`{url}` is not an http:// or https:// URL"));
                    }
                    self.servers.push(url.trim_end_matches('/').to_owned());
                }
            }
            "layercake.token" => self.token = Some(value.to_owned()),
            "layercake.node" => self.node = Some(value.parse().map_err(to_text)?),
            "layercake.imageset" => self.imageset = Some(value.parse().map_err(to_text)?),
            "layercake.rescue" => self.rescue = parse_rescue(value)?,
            "layercake.watchdog" => self.watchdog = parse_watchdog(value)?,
            "layercake.log" => self.log = parse_log(value)?,
            "layercake.console" => self.console = parse_console(value)?,
            "layercake.store" => self.store = Some(value.parse().map_err(to_text)?),
            "layercake.zram" if value == "off" => self.zram = None,
            "layercake.zram" => self.zram = Some(value.parse().map_err(to_text)?),
            "layercake.cache" => self.cache = parse_cache(value)?,
            "layercake.layer0" => self.layer0 = Some(value.parse().map_err(to_text)?),
            "layercake.kexec" => self.kexec = true,
            "BOOTIF" => self.bootif = Some(value.parse().map_err(to_text)?),
            _ if self.network.word(key, value)? => {}
            _ if key.starts_with("layercake.") => return Err("unknown key, ignored".to_owned()),
            _ => {}
        }
        Ok(())
    }
}

fn to_text(error: impl fmt::Display) -> String {
    error.to_string()
}

/// Splits as the kernel does: at white space outside double quotes; the quotes themselves are dropped.
fn split_words(command_line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for c in command_line.chars().take(MAX_COMMAND_LINE) {
        if c == '"' {
            quoted = !quoted;
        } else if c.is_whitespace() && !quoted {
            if !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
        } else {
            word.push(c);
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

fn parse_rescue(value: &str) -> Result<Rescue, String> {
    match value {
        "never" => Ok(Rescue::Never),
        "on-failure" => Ok(Rescue::OnFailure),
        "always" => Ok(Rescue::Always),
        _ => Err("expected never, on-failure or always".to_owned()),
    }
}

fn parse_log(value: &str) -> Result<LogLevel, String> {
    match value {
        "error" => Ok(LogLevel::Error),
        "warn" => Ok(LogLevel::Warn),
        "info" => Ok(LogLevel::Info),
        "debug" => Ok(LogLevel::Debug),
        _ => Err("expected error, warn, info or debug".to_owned()),
    }
}

fn parse_watchdog(value: &str) -> Result<Watchdog, String> {
    match (value, value.parse()) {
        ("off", _) => Ok(Watchdog::Off),
        (_, Ok(seconds @ 5..=3600)) => Ok(Watchdog::Seconds(seconds)),
        _ => Err("expected off or a number of seconds from 5 to 3600".to_owned()),
    }
}

fn parse_console(value: &str) -> Result<ConsoleMode, String> {
    match value {
        "status" => Ok(ConsoleMode::Status),
        "log" => Ok(ConsoleMode::Log),
        _ => Err("expected status or log".to_owned()),
    }
}

fn parse_cache(value: &str) -> Result<CacheDisk, String> {
    match value {
        "none" => Ok(CacheDisk::Off),
        CACHE_LABEL => Ok(CacheDisk::Standard),
        "" => Err("expected none or the label of a file system".to_owned()),
        label if label.len() > MAX_LABEL => Err(format!("longer than {MAX_LABEL} bytes")),
        label => Ok(CacheDisk::Labelled(label.to_owned())),
    }
}

impl fmt::Display for BootArgs {
    /// Renders the keys that differ from their defaults, in a fixed order, ready for a kernel command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        if !self.servers.is_empty() {
            words.push(format!("layercake.server={}", self.servers.join(",")));
        }
        if let Some(token) = &self.token {
            words.push(format!("layercake.token={token}"));
        }
        if let Some(node) = &self.node {
            words.push(format!("layercake.node={node}"));
        }
        if let Some(imageset) = &self.imageset {
            words.push(format!("layercake.imageset={imageset}"));
        }
        match self.rescue {
            Rescue::Never => words.push("layercake.rescue=never".to_owned()),
            Rescue::OnFailure => {}
            Rescue::Always => words.push("layercake.rescue=always".to_owned()),
        }
        match self.watchdog {
            Watchdog::Standard => {}
            Watchdog::Seconds(seconds) => words.push(format!("layercake.watchdog={seconds}")),
            Watchdog::Off => words.push("layercake.watchdog=off".to_owned()),
        }
        match self.log {
            LogLevel::Error => words.push("layercake.log=error".to_owned()),
            LogLevel::Warn => words.push("layercake.log=warn".to_owned()),
            LogLevel::Info => {}
            LogLevel::Debug => words.push("layercake.log=debug".to_owned()),
        }
        if self.console == ConsoleMode::Log {
            words.push("layercake.console=log".to_owned());
        }
        match &self.cache {
            CacheDisk::Standard => {}
            CacheDisk::Off => words.push("layercake.cache=none".to_owned()),
            CacheDisk::Labelled(label) => words.push(format!("layercake.cache={label}")),
        }
        words.extend(self.store.map(|amount| format!("layercake.store={amount}")));
        words.extend(self.zram.map(|amount| format!("layercake.zram={amount}")));
        if let Some(digest) = &self.layer0 {
            words.push(format!("layercake.layer0={digest}"));
        }
        if self.kexec {
            words.push("layercake.kexec".to_owned());
        }
        if let Some(mac) = self.bootif {
            words.push(format!("BOOTIF=01-{}", mac.to_string().replace(':', "-")));
        }
        self.network.words(&mut words);
        f.write_str(&words.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn round_trip(text: &str) -> BootArgs {
        let args = BootArgs::parse(text);
        assert_eq!(args.problems, Vec::<String>::new());
        assert_eq!(args.to_string(), text);
        args
    }

    #[test]
    fn the_usual_netboot_line_is_understood() {
        let args = round_trip(
            "layercake.server=http://10.9.0.1:8080 layercake.node=n1 BOOTIF=01-52-54-00-00-00-01",
        );
        assert_eq!(args.servers, ["http://10.9.0.1:8080"]);
        assert_eq!(args.node.expect("node").as_str(), "n1");
        assert_eq!(args.bootif.expect("bootif").0, [0x52, 0x54, 0, 0, 0, 1]);
    }

    #[test]
    fn a_fixed_address_round_trips() {
        let args = round_trip("ip=10.0.0.5::10.0.0.1:255.255.255.0:n5:eth0:off:10.0.0.2");
        let [interface] = args.network.interfaces.as_slice() else { panic!("{:?}", args.network) };
        assert_eq!(interface.ip.addresses, [([10, 0, 0, 5].into(), 24)]);
        assert_eq!(interface.ip.dns, [std::net::IpAddr::from([10, 0, 0, 2])]);
        round_trip("ip=:::::eth1:dhcp");
        round_trip("layercake.rescue=always layercake.log=debug layercake.console=log ip=off");
        let watchdog = |text| round_trip(text).watchdog.seconds();
        assert_eq!(watchdog("layercake.watchdog=off"), None);
        assert_eq!(watchdog("layercake.watchdog=10"), Some(10));
        assert_eq!(watchdog(""), Some(60));
        assert_eq!(round_trip("layercake.cache=none").cache.label(), None);
        assert_eq!(round_trip("layercake.cache=blobs").cache.label(), Some("blobs"));
        assert_eq!(round_trip("").cache.label(), Some("LAYERCAKE"));
    }

    #[test]
    fn foreign_words_are_ignored_and_unknown_keys_are_reported() {
        let args = BootArgs::parse(
            "quiet root=\"LABEL=a b\" layercake.colour=red layercake.rescue=maybe console=ttyS0",
        );
        assert_eq!(args.problems.len(), 2, "{:?}", args.problems);
        assert!(args.problems.iter().any(|problem| problem.contains("layercake.colour")));
        assert_eq!(args.rescue, Rescue::OnFailure);
    }

    #[test]
    fn a_bad_value_says_what_was_expected() {
        for (text, expected) in [
            ("ip=10.0.0.5::::n", "netmask"),
            ("layercake.console=loud", "status or log"),
            ("ip=10.0.0.5:::255.0.255.0", "contiguous"),
            ("layercake.server=10.9.0.1", "http://"),
            ("layercake.imageset=x", "repository"),
            ("layercake.watchdog=4", "5 to 3600"),
            ("layercake.watchdog=on", "off or"),
        ] {
            let problems = BootArgs::parse(text).problems.join(";");
            assert!(problems.contains(expected), "{text}: {problems}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_command_line_makes_the_parser_panic(text in "\\PC{0,200}") {
            let _ = BootArgs::parse(&text);
            let _ = BootArgs::parse(&format!("ip={text} BOOTIF={text} bond={text} vlan={text}"));
        }
    }
}
