//! Values of the config with an invariant: each has one validating constructor, and serde goes through it.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use protocol::reference::Reference;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// Why a text is not the value it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {what}: expected {expected}")]
pub struct InvalidValue {
    what: &'static str,
    text: String,
    expected: &'static str,
}

/// `http://HOST[:PORT][/PREFIX]`, or the same with `https://`, without a slash at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl(String);

impl BaseUrl {
    /// The URL as text, without a slash at its end.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a path follows the host.
    #[must_use]
    pub fn has_path(&self) -> bool {
        self.after_scheme().contains('/')
    }

    /// The host, where it is an IPv4 address.
    #[must_use]
    pub fn ipv4_host(&self) -> Option<Ipv4Addr> {
        self.after_scheme().split([':', '/']).next()?.parse().ok()
    }

    fn after_scheme(&self) -> &str {
        self.0.split_once("://").map_or("", |(_, rest)| rest)
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for BaseUrl {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let invalid = || InvalidValue {
            what: "URL",
            text: text.chars().take(120).collect(),
            expected: "http://HOST[:PORT] or https://HOST[:PORT]",
        };
        let base = text.trim_end_matches('/');
        let scheme = base.starts_with("http://") || base.starts_with("https://");
        // Repositories are made from it, so it must hold as the beginning of a reference.
        let probe = format!("{base}/probe").parse::<Reference>();
        match probe {
            Ok(probe) if scheme && probe.tag.is_none() && probe.digest.is_none() => {
                Ok(Self(base.to_owned()))
            }
            _ => Err(invalid()),
        }
    }
}

impl<'de> Deserialize<'de> for BaseUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// An IPv4 subnet, `10.9.0.0/24`: the first address and a prefix length from 1 to 30.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    network: Ipv4Addr,
    prefix_len: u8,
}

impl Subnet {
    /// Its first address.
    #[must_use]
    pub fn network(self) -> Ipv4Addr {
        self.network
    }

    /// Length of its prefix in bits.
    #[must_use]
    pub fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    /// Whether an address can belong to a machine of this subnet: neither its first nor its last.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        let host = u32::from(address) & !mask(self.prefix_len);
        u32::from(address) & mask(self.prefix_len) == u32::from(self.network)
            && host != 0
            && host != !mask(self.prefix_len)
    }
}

fn mask(prefix_len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix_len.min(32))).unwrap_or(0)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix_len)
    }
}

impl FromStr for Subnet {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let invalid = || InvalidValue {
            what: "subnet",
            text: text.chars().take(80).collect(),
            expected: "its first address and its prefix length from 1 to 30, such as 10.9.0.0/24",
        };
        let (network, prefix_len) = text.split_once('/').ok_or_else(invalid)?;
        let network: Ipv4Addr = network.parse().map_err(|_| invalid())?;
        let prefix_len: u8 = prefix_len.parse().map_err(|_| invalid())?;
        let good = (1..=30).contains(&prefix_len) && u32::from(network) & !mask(prefix_len) == 0;
        if good { Ok(Self { network, prefix_len }) } else { Err(invalid()) }
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls_are_taken_and_refused() {
        for (text, path, host) in [
            ("http://10.9.0.1:8080/", false, Some(Ipv4Addr::new(10, 9, 0, 1))),
            ("https://boot.example", false, None),
            ("http://r:5000/a/b", true, None),
        ] {
            let url: BaseUrl = text.parse().expect(text);
            assert_eq!((url.has_path(), url.ipv4_host()), (path, host), "{text}");
            assert!(!url.as_str().ends_with('/'));
        }
        for text in ["", "host", "ftp://h", "http://", "http://h:0", "http://h/a:1", "http://h /"] {
            assert!(text.parse::<BaseUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_subnet_holds_its_hosts_only() {
        let subnet: Subnet = "10.9.0.0/24".parse().expect("subnet");
        for (last, holds) in [(0, false), (1, true), (254, true), (255, false)] {
            assert_eq!(subnet.contains(Ipv4Addr::new(10, 9, 0, last)), holds, "{last}");
        }
        assert!(!subnet.contains(Ipv4Addr::new(10, 9, 1, 5)));
        for text in ["10.9.0.0", "10.9.0.0/0", "10.9.0.0/31", "10.9.0.1/24", "x/24"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }
}
