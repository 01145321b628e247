//! How a container serves: held sockets, health, readiness, and how it is replaced by its next version.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::values::FileMode;
use crate::ids::Name;

/// Most held sockets of one container: they go from process to process in one message (unix(7), SCM_RIGHTS).
pub const MAX_SOCKETS: usize = 64;

/// How the next version of a container takes the place of this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// The old one is stopped, then the new one is released from its exec barrier. The default.
    #[default]
    Replace,
    /// The new one is released with the held sockets and, once it is ready, the old one is asked to end and drains.
    Handover,
    /// As handover, for containers with addresses of their own: both run until the new one is ready.
    Overlap,
}

/// Where a held socket listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A TCP listener, `tcp://0.0.0.0:8080`.
    Tcp(SocketAddr),
    /// A UDP socket, `udp://[::]:53`.
    Udp(SocketAddr),
    /// A Unix stream listener at an absolute path on the node, `unix:/run/app.sock`.
    Unix(String),
}

/// A text that says no place to listen at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a place to listen at, such as tcp://0.0.0.0:8080, udp://[::]:53 or unix:/run/app.sock"
)]
pub struct ParseListenError(String);

impl FromStr for Listen {
    type Err = ParseListenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseListenError(text.chars().take(120).collect());
        if let Some(address) = text.strip_prefix("tcp://") {
            return address.parse().map(Self::Tcp).map_err(|_| wrong());
        }
        if let Some(address) = text.strip_prefix("udp://") {
            return address.parse().map(Self::Udp).map_err(|_| wrong());
        }
        match text.strip_prefix("unix:") {
            // sun_path of unix(7) has 108 bytes, the last of them 0.
            Some(path) if super::runtime::is_target(path) && path.len() < 108 => {
                Ok(Self::Unix(path.to_owned()))
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Udp(address) => write!(f, "udp://{address}"),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

impl Serialize for Listen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A listening socket that the node holds for the container and passes to every version of it as systemd does
/// (sd_listen_fds(3): LISTEN_FDS, LISTEN_FDNAMES, from descriptor 3 on, in the order of the description).
///
/// It is made in the node's own network, whatever network the container is in: one without a network serves through these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Socket {
    /// Its name in LISTEN_FDNAMES.
    pub name: Name,
    /// Where it listens.
    pub listen: Listen,
    /// Connections that wait to be accepted; 4096 when absent (listen(2)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u32>,
    /// Permissions of a Unix socket's path; `"0666"` when absent, as systemd.socket(5) has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<FileMode>,
}

/// What is asked to find out whether a container is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// A program in the container that ends with 0.
    Exec(Vec<String>),
    /// A TCP connection to this address from the container's network is accepted, `127.0.0.1:8080`.
    Tcp(SocketAddr),
    /// `GET` of this URL (plain HTTP, a literal address) from the container's network answers 200 to 399.
    Http(String),
}

/// When a container counts as healthy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// What is asked.
    #[serde(flatten)]
    pub probe: Probe,
    /// Milliseconds after the start in which failures do not count.
    #[serde(default = "Health::default_start_period_ms")]
    pub start_period_ms: u32,
    /// Milliseconds between two questions.
    #[serde(default = "Health::default_interval_ms")]
    pub interval_ms: u32,
    /// Milliseconds after which an answer is too late.
    #[serde(default = "Health::default_timeout_ms")]
    pub timeout_ms: u32,
    /// Failures in a row that make it unhealthy.
    #[serde(default = "Health::default_retries")]
    pub retries: u32,
}

impl Health {
    const fn default_start_period_ms() -> u32 {
        10_000
    }
    const fn default_interval_ms() -> u32 {
        1_000
    }
    const fn default_timeout_ms() -> u32 {
        1_000
    }
    const fn default_retries() -> u32 {
        3
    }

    /// Everything that is wrong with it.
    pub(super) fn problems(&self, say: &mut dyn FnMut(String)) {
        match &self.probe {
            Probe::Exec(argv) if argv.first().is_none_or(String::is_empty) => {
                say("health.exec is empty".to_owned());
            }
            Probe::Http(url) if http_address(url).is_none() => {
                say(format!("health.http `{url}` is not of the form http://127.0.0.1:8080/path"));
            }
            _ => {}
        }
        for (key, value) in [
            ("interval_ms", self.interval_ms),
            ("timeout_ms", self.timeout_ms),
            ("retries", self.retries),
        ] {
            if value == 0 {
                say(format!("health.{key} must be at least 1"));
            }
        }
    }
}

/// Address and path of a probe's URL: plain HTTP to a literal address; port 80 when absent.
#[must_use]
pub fn http_address(url: &str) -> Option<(SocketAddr, &str)> {
    let rest = url.strip_prefix("http://")?;
    let slash = rest.find('/').unwrap_or(rest.len());
    let (host, path) = rest.split_at(slash);
    let path = if path.is_empty() { "/" } else { path };
    let address = host.parse().or_else(|_| host.parse().map(|ip| SocketAddr::new(ip, 80))).ok()?;
    path.bytes().all(|b| b.is_ascii_graphic()).then_some((address, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_to_listen_at_are_read_and_written_alike() {
        for text in
            ["tcp://0.0.0.0:8080", "tcp://[::1]:80", "udp://10.0.0.1:53", "unix:/run/app.sock"]
        {
            assert_eq!(text.parse::<Listen>().expect(text).to_string(), text);
        }
        for text in [
            "",
            "tcp://localhost:80",
            "tcp://1.2.3.4",
            "unix:run/app",
            "unix:/a/../b",
            "http://1.2.3.4:1",
        ] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_health_check_has_one_probe_and_defaults() {
        let health: Health =
            serde_json::from_str(r#"{"http":"http://127.0.0.1:8080/ok","retries":5}"#)
                .expect("json");
        assert_eq!(health.probe, Probe::Http("http://127.0.0.1:8080/ok".to_owned()));
        assert_eq!((health.retries, health.interval_ms), (5, 1000));
        assert!(serde_json::from_str::<Health>(r#"{"retries":5}"#).is_err());
        assert!(
            serde_json::from_str::<Health>(r#"{"http":"http://127.0.0.1/","colour":1}"#).is_err()
        );
    }

    #[test]
    fn a_probe_asks_a_literal_address() {
        assert_eq!(http_address("http://127.0.0.1"), Some((([127, 0, 0, 1], 80).into(), "/")));
        assert_eq!(http_address("http://[::1]:8080/a?b").map(|it| it.1), Some("/a?b"));
        for url in [
            "https://127.0.0.1/",
            "http://localhost/",
            "http://127.0.0.1/ x",
            "http://127.0.0.1/\r\nX: y",
        ] {
            assert_eq!(http_address(url), None, "{url}");
        }
    }
}
