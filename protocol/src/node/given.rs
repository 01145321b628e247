//! Parts of the node documents that containers bring: files given to them, and what they use.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids::Name;

/// The bytes of a file: base64 in JSON. They may be a secret, so `Debug` does not show them.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct FileContent(pub Vec<u8>);

impl fmt::Debug for FileContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

impl Serialize for FileContent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for FileContent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        // The text is not named: it may be a secret.
        let bytes = STANDARD.decode(text.as_bytes());
        bytes.map(Self).map_err(|_| serde::de::Error::custom("a file's content is not base64"))
    }
}

/// A file that the server gives a node for its containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenFile {
    /// The name by which descriptions ask for it.
    pub name: Name,
    /// What is in it.
    pub content: FileContent,
}

/// What a container uses of its node (cgroup v2). A figure is absent where its controller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of memory (`memory.current`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Processor time since its start, in microseconds (`cpu.stat`, usage_usec).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_us: Option<u64>,
    /// Processes and threads (`pids.current`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    /// Bytes read from devices since its start (`io.stat`, rbytes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_read_bytes: Option<u64>,
    /// Bytes written to devices since its start (`io.stat`, wbytes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_write_bytes: Option<u64>,
    /// How often the kernel killed for lack of memory in it (`memory.events`, oom_kill).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_kills: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_file_travels_as_base64_and_is_not_shown() {
        let file: GivenFile =
            serde_json::from_str(r#"{"name":"key","content":"czNjcmV0"}"#).expect("json");
        assert_eq!(file.content.0, b"s3cret");
        assert!(!format!("{file:?}").contains("s3cret"));
        assert!(serde_json::to_string(&file).expect("json").contains("czNjcmV0"));
        let error = serde_json::from_str::<GivenFile>(r#"{"name":"key","content":"s3cret!"}"#)
            .expect_err("no base64");
        assert!(!error.to_string().contains("s3cret"), "{error}");
    }
}
