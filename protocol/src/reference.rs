//! Where an image or an ImageSet lives: `[http://|https://]HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`.
//!
//! Plain HTTP is used only when the reference begins with `http://`: no guessing from "localhost" or port numbers.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids::Digest;

/// Longest accepted reference, in bytes: repository (255) + tag (128) + digest (71) + host, rounded up.
pub const MAX_REFERENCE_LEN: usize = 768;

/// How a registry is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// TLS, the default.
    Https,
    /// Plain HTTP, because the reference says so.
    Http,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Https => "https",
            Self::Http => "http",
        })
    }
}

/// A reference into an OCI registry (OCI distribution spec 1.1: name, tag and digest grammar).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// How the registry is spoken to.
    pub scheme: Scheme,
    /// `HOST[:PORT]`, never empty.
    pub registry: String,
    /// Path of the repository, `a/b/c`.
    pub repository: String,
    /// The tag, if one was written.
    pub tag: Option<String>,
    /// The digest, if one was written. A node resolves nothing without it.
    pub digest: Option<Digest>,
}

/// Why a text is not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a valid image reference: {reason}; expected [http://]HOST[:PORT]/REPOSITORY[:TAG][@sha256:HEX]"
)]
pub struct InvalidReference {
    /// The offending text, shortened to 120 characters.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Reference {
    /// The base of the registry's API: `http://HOST:PORT/v2/REPOSITORY`.
    #[must_use]
    pub fn api_base(&self) -> String {
        format!("{}://{}/v2/{}", self.scheme, self.registry, self.repository)
    }

    /// What a manifest request asks for: the digest where there is one, else the tag, else `latest`.
    #[must_use]
    pub fn manifest_key(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }

    /// The same place, pinned to this digest.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// The same repository under another tag, without digest.
    #[must_use]
    pub fn with_tag(&self, tag: &str) -> Self {
        Self { tag: Some(tag.to_owned()), digest: None, ..self.clone() }
    }
}

fn host_is_good(host: &str) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
    };
    let port_is_good = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0));
    let bracketed = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let name_is_good = match bracketed {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-')
        }
    };
    port_is_good && name_is_good
}

fn repository_is_good(repository: &str) -> bool {
    let component = |part: &str| {
        let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let inner = |b: &u8| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-')
        };
        let bytes = part.as_bytes();
        edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(inner)
    };
    repository.len() <= 255 && repository.split('/').all(component)
}

fn tag_is_good(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let invalid = |reason| InvalidReference { text: text.chars().take(120).collect(), reason };
        if text.len() > MAX_REFERENCE_LEN {
            return Err(invalid("it is too long"));
        }
        let (scheme, rest) = match text.split_once("://") {
            None => (Scheme::Https, text),
            Some(("https", rest)) => (Scheme::Https, rest),
            Some(("http", rest)) => (Scheme::Http, rest),
            Some(_) => return Err(invalid("the scheme is neither http nor https")),
        };
        let (rest, digest) = match rest.split_once('@') {
            None => (rest, None),
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|_| invalid("the digest is not sha256:HEX"))?;
                (rest, Some(digest))
            }
        };
        let (registry, path) =
            rest.split_once('/').ok_or_else(|| invalid("the repository is missing"))?;
        if !host_is_good(registry) {
            return Err(invalid("the registry's HOST[:PORT] is malformed"));
        }
        let (repository, tag) = match path.split_once(':') {
            None => (path, None),
            Some((repository, tag)) => (repository, Some(tag)),
        };
        if !repository_is_good(repository) {
            return Err(invalid("the repository is malformed"));
        }
        if !tag.is_none_or(tag_is_good) {
            return Err(invalid("the tag is malformed"));
        }
        Ok(Self {
            scheme,
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.scheme == Scheme::Http {
            f.write_str("http://")?;
        }
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reference({self})")
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, api_base: &str, key: &str) {
        let reference: Reference = text.parse().expect(text);
        assert_eq!(reference.api_base(), api_base);
        assert_eq!(reference.manifest_key(), key);
        assert_eq!(reference.to_string(), text);
    }

    #[test]
    fn references_parse_and_render() {
        check("http://10.9.0.1:8080/hello:1", "http://10.9.0.1:8080/v2/hello", "1");
        check("reg.example/a/b", "https://reg.example/v2/a/b", "latest");
        check("http://[fd00::1]:5000/a:x", "http://[fd00::1]:5000/v2/a", "x");
        let digest = Digest::of(b"x").to_string();
        check(&format!("reg.example/a:1@{digest}"), "https://reg.example/v2/a", &digest);
    }

    #[test]
    fn malformed_references_say_what_is_wrong() {
        for (text, reason) in [
            ("hello", "repository is missing"),
            ("ftp://h/a", "scheme"),
            ("h/a@sha256:12", "digest"),
            ("h:0/a", "HOST"),
            ("h/../a", "repository"),
            ("h/A", "repository"),
            ("h/a:", "tag"),
            ("h/a:b:c", "tag"),
        ] {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_parses_renders_to_the_same_reference(text in "(http://)?[a-z0-9.:\\[\\]]{1,12}/[a-z/._-]{1,12}(:[a-z0-9.]{1,5})?") {
            if let Ok(reference) = text.parse::<Reference>() {
                proptest::prop_assert_eq!(reference.to_string().parse::<Reference>().expect("again"), reference);
            }
        }
    }
}
