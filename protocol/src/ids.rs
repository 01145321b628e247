//! Identifiers with an invariant: each has one validating constructor, and serde goes through it.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

/// Why a text is not the identifier it should be. The message names the text, what was expected and an example.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a valid {what}: expected {expected}")]
pub struct InvalidId {
    /// The kind of identifier, as a user calls it.
    pub what: &'static str,
    /// The offending text, shortened to 80 characters.
    pub text: String,
    /// The accepted form in words.
    pub expected: &'static str,
}

impl InvalidId {
    fn new(what: &'static str, text: &str, expected: &'static str) -> Self {
        Self { what, text: text.chars().take(80).collect(), expected }
    }
}

macro_rules! serde_as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($type))
            }
        }
    };
}

/// An Ethernet address (IEEE 802 MAC-48), written `52:54:00:00:00:01`. Parsing also takes `-` as separator and
/// the `BOOTIF=` form with its leading hardware type `01-`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || {
            InvalidId::new("MAC address", text, "six hexadecimal bytes such as 52:54:00:00:00:01")
        };
        let mut parts: Vec<&str> = text.split([':', '-']).collect();
        if parts.len() == 7 && parts.first() == Some(&"01") {
            parts.remove(0);
        }
        let mut bytes = [0; 6];
        if parts.len() != bytes.len() {
            return Err(invalid());
        }
        for (byte, part) in bytes.iter_mut().zip(parts) {
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        Ok(Self(bytes))
    }
}

serde_as_text!(Mac);

/// A node's name in the inventory. The exact pattern accepted is `^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`, which is
/// also a valid host name (RFC 1123).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(String);

impl NodeId {
    /// The id of a node that nobody has named: derived from its boot interface, the same on agent and server.
    #[must_use]
    pub fn from_mac(mac: Mac) -> Self {
        let hex: String = mac.0.iter().map(|byte| format!("{byte:02x}")).collect();
        Self(format!("node-{hex}"))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for NodeId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-';
        let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let bytes = text.as_bytes();
        if bytes.len() <= 63
            && bytes.iter().all(|b| inner(*b))
            && edge(bytes.first())
            && edge(bytes.last())
        {
            return Ok(Self(text.to_owned()));
        }
        Err(InvalidId::new(
            "node id",
            text,
            "1 to 63 of a-z, 0-9, `.` and `-`, beginning and ending with a letter or digit",
        ))
    }
}

serde_as_text!(NodeId);

/// The name of an ImageSet, an image in it or a container. The exact pattern accepted is
/// `^[a-z0-9]+([._-][a-z0-9]+)*$`, at most 63 bytes: a valid OCI repository component.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let part_is_good = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        if text.len() <= 63 && text.split(['.', '_', '-']).all(part_is_good) {
            return Ok(Self(text.to_owned()));
        }
        Err(InvalidId::new(
            "name",
            text,
            "1 to 63 of a-z and 0-9, with single `.`, `_` or `-` between them",
        ))
    }
}

serde_as_text!(Name);

/// The version of an ImageSet. The exact pattern accepted is `^[A-Za-z0-9_][A-Za-z0-9._-]{0,62}$`, so that
/// `VERSION-IMAGENAME` is a valid OCI tag (at most 128 bytes).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(String);

impl Version {
    /// The version as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Version {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let bytes = text.as_bytes();
        let first_is_good = bytes.first().is_some_and(|b| word(*b));
        if bytes.len() <= 63
            && first_is_good
            && bytes.iter().all(|b| word(*b) || *b == b'.' || *b == b'-')
        {
            return Ok(Self(text.to_owned()));
        }
        Err(InvalidId::new(
            "version",
            text,
            "1 to 63 of A-Z, a-z, 0-9, `_`, `.` and `-`, not beginning with `.` or `-`",
        ))
    }
}

serde_as_text!(Version);

/// A sha256 content digest, written `sha256:` and 64 lower-case hexadecimal digits (OCI image spec, descriptor.md).
/// Other algorithms and upper-case digits are refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// The 64 hexadecimal digits alone, as used in file names and `.sig` tags.
    #[must_use]
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// `sha256:` and the first 12 digits: for people, never for comparing.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string().chars().take(19).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Digest {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid =
            || InvalidId::new("digest", text, "`sha256:` and 64 lower-case hexadecimal digits");
        let hex = text.strip_prefix("sha256:").ok_or_else(invalid)?;
        let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if hex.len() != 64 || !hex.bytes().all(lower_hex) {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| invalid())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| invalid())?;
        }
        Ok(Self(bytes))
    }
}

serde_as_text!(Digest);

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check<T: FromStr<Err = InvalidId> + fmt::Display>(good: &[&str], bad: &[&str]) {
        for text in good {
            assert_eq!(text.parse::<T>().expect(text).to_string(), *text);
        }
        for text in bad {
            assert!(text.parse::<T>().is_err(), "`{text}` was accepted");
        }
    }

    #[test]
    fn identifiers_accept_exactly_their_pattern() {
        check::<Mac>(
            &["52:54:00:00:00:01"],
            &["", "52:54:00:00:00", "52:54:00:00:00:0g", "+2:54:00:00:00:01"],
        );
        check::<NodeId>(&["n1", "rack1-n2.site"], &["", "-n", "N1", "n_1", "n."]);
        check::<Name>(&["hello", "my-app.v2"], &["", "a--b", "A", "a/b", "-a"]);
        check::<Version>(&["1", "2026.11-rc1", "_x"], &["", ".1", "-1", "a b", "a:b"]);
        let digest = Digest::of(b"").to_string();
        check::<Digest>(
            &[&digest],
            &["sha256:00", &digest.to_uppercase(), &digest.replace("256", "512")],
        );
    }

    #[test]
    fn the_bootif_form_of_a_mac_is_accepted() {
        assert_eq!(
            "01-52-54-00-aa-bb-0c".parse::<Mac>().expect("bootif").to_string(),
            "52:54:00:aa:bb:0c"
        );
    }

    #[test]
    fn the_digest_of_nothing_is_the_known_one() {
        assert_eq!(
            Digest::of(b"").hex(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn an_error_names_the_text_and_what_was_expected() {
        let error = "Bad Name".parse::<Name>().expect_err("space");
        assert!(error.to_string().contains("`Bad Name` is not a valid name: expected"));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,90}") {
            let _ = text.parse::<Mac>();
            let _ = text.parse::<NodeId>();
            let _ = text.parse::<Name>();
            let _ = text.parse::<Version>();
            let _ = text.parse::<Digest>();
        }
    }
}
