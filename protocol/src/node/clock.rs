//! What a node says of its clock.

use serde::{Deserialize, Serialize};

/// How a node's clock was set, and how it was the last time somebody was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedClock {
    /// Who says what time it is: the address of a time server, or the URL of a boot server. None until one has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// How far the clock was behind (positive) or ahead when it was last compared, in microseconds; corrected since.
    #[serde(default)]
    pub offset_us: i64,
    /// When that was, seconds since 1970; 0 when it never was.
    #[serde(default)]
    pub at: u64,
    /// Why nobody could be asked the last time: one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}
