//! Values of an ImageSet description that people write in more than one way: sizes, processor counts, resource limits.
//!
//! Each is read from a number or a text and written back in one form. Nothing here knows what the value is for.

use std::fmt;
use std::str::FromStr;

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes. Read from a number or from `64MiB` or `512k`: digits and one unit, where `K`, `M`, `G`,
/// `T` (with or without `iB`, any case) count in powers of 1024. Written as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

/// A text that is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size such as 67108864 or 64MiB")]
pub struct ParseSizeError(String);

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseSizeError(text.chars().take(40).collect());
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(split);
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(wrong()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.iter().find(|(shift, _)| self.0 > 0 && self.0.is_multiple_of(1 << shift)) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_any(NumberOrText {
                expected: "a size such as 67108864 or 64MiB",
                text: |text| text.parse::<Self>().map(|size| size.0).ok(),
            })
            .map(Self)
    }
}

/// Processors' worth of time, in thousandths. Read from and written as a number of processors: `1.5`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpus {
    /// Thousandths of a processor, at least 1.
    pub milli: u32,
}

impl Serialize for Cpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.milli) / 1000.0)
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let cpus = f64::deserialize(deserializer)?;
        if !(0.001..=65_536.0).contains(&cpus) {
            return Err(D::Error::custom(format!(
                "{cpus} is not a number of processors from 0.001 to 65536"
            )));
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "in range, checked above"
        )]
        let milli = (cpus * 1000.0).round() as u32;
        Ok(Self { milli })
    }
}

/// One bound of a resource limit (setrlimit(2)): a number, or `"unlimited"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound(pub Option<u64>);

impl Serialize for Bound {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(number) => serializer.serialize_u64(number),
            None => serializer.serialize_str("unlimited"),
        }
    }
}

impl<'de> Deserialize<'de> for Bound {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = deserializer.deserialize_any(NumberOrText {
            expected: "a number or \"unlimited\"",
            text: |text| match text {
                "unlimited" => Some(u64::MAX),
                text => text.parse::<ByteSize>().ok().map(|size| size.0),
            },
        })?;
        Ok(Self((number != u64::MAX).then_some(number)))
    }
}

/// A resource limit: one bound for both, or soft and hard apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number, \"unlimited\", or { soft = …, hard = … }")]
pub enum Ulimit {
    /// Soft and hard alike.
    Both(Bound),
    /// Apart.
    Apart {
        /// What a process starts with.
        soft: Bound,
        /// How far it may raise that.
        hard: Bound,
    },
}

impl Ulimit {
    /// Soft and hard bound.
    #[must_use]
    pub const fn bounds(self) -> (Bound, Bound) {
        match self {
            Self::Both(bound) => (bound, bound),
            Self::Apart { soft, hard } => (soft, hard),
        }
    }
}

/// Permission bits. Read from and written as octal text: `"0640"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl Serialize for FileMode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:04o}", self.0))
    }
}

impl<'de> Deserialize<'de> for FileMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        match u32::from_str_radix(&text, 8) {
            Ok(mode) if mode <= 0o7777 && text.len() <= 5 => Ok(Self(mode)),
            _ => Err(D::Error::custom(format!("`{text}` is not an octal mode such as \"0640\""))),
        }
    }
}

struct NumberOrText {
    expected: &'static str,
    text: fn(&str) -> Option<u64>,
}

impl Visitor<'_> for NumberOrText {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<u64, E> {
        Ok(value)
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<u64, E> {
        u64::try_from(value).map_err(|_| E::custom(format!("{value} is not {}", self.expected)))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<u64, E> {
        (self.text)(value).ok_or_else(|| E::custom(format!("`{value}` is not {}", self.expected)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64MiB", 64 << 20),
            ("64m", 64 << 20),
            ("2 GiB", 2 << 30),
            ("1k", 1024),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in
            ["", "MiB", "-1", "1.5G", "1PiB", "99999999999999999999", "18014398509481984k", "1 0"]
        {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(ByteSize(64 << 20).to_string(), "64MiB");
        assert_eq!(ByteSize(1000).to_string(), "1000");
    }

    #[test]
    fn values_are_read_from_either_form_and_written_in_one() {
        let json = |text: &str| serde_json::from_str::<Ulimit>(text).expect(text);
        assert_eq!(json("5"), Ulimit::Both(Bound(Some(5))));
        assert_eq!(json("\"unlimited\"").bounds(), (Bound(None), Bound(None)));
        assert_eq!(
            json("{\"soft\":1,\"hard\":\"2k\"}").bounds(),
            (Bound(Some(1)), Bound(Some(2048)))
        );
        assert_eq!(serde_json::to_string(&json("\"unlimited\"")).expect("json"), "\"unlimited\"");
        assert_eq!(serde_json::from_str::<Cpus>("1.5").expect("cpus").milli, 1500);
        assert_eq!(serde_json::to_string(&Cpus { milli: 250 }).expect("json"), "0.25");
        assert!(serde_json::from_str::<Cpus>("0").is_err());
        assert_eq!(serde_json::from_str::<FileMode>("\"0640\"").expect("mode").0, 0o640);
        assert!(serde_json::from_str::<FileMode>("\"0x1\"").is_err());
        assert_eq!(serde_json::to_string(&FileMode(0o755)).expect("json"), "\"0755\"");
    }
}
