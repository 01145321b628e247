//! What this machine is: kernel boot id, kernel release, SMBIOS UUID, time since boot.
//!
//! Reads files below `/proc` and `/sys` only; what is absent stays absent, nothing is made up.

use std::fs;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};

/// What is known of the machine without asking the network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// The kernel's boot id, a UUID in lower case; empty when `/proc` does not say.
    pub boot_id: String,
    /// The kernel's release (`uname -r`).
    pub kernel: String,
    /// The SMBIOS system UUID in lower case; absent when the firmware has none or a placeholder.
    pub uuid: Option<String>,
}

/// Reads the identity of this machine.
#[must_use]
pub fn read() -> Identity {
    let boot_id = read_line(Path::new("/proc/sys/kernel/random/boot_id")).unwrap_or_default();
    let uuid = read_line(Path::new("/sys/class/dmi/id/product_uuid"));
    Identity { boot_id, kernel: release(), uuid: uuid.and_then(|text| parse_uuid(&text)) }
}

/// The kernel's release (`uname -r`), as it names the directory below `/lib/modules`.
#[must_use]
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Milliseconds since boot, time asleep included (`CLOCK_BOOTTIME`).
#[must_use]
pub fn uptime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000)
}

fn read_line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_lowercase()).filter(|text| !text.is_empty())
}

/// A UUID in lower case, or nothing for what is not one and for the placeholders that board makers leave in.
#[must_use]
pub fn parse_uuid(text: &str) -> Option<String> {
    const LENGTHS: [usize; 5] = [8, 4, 4, 4, 12];
    let text = text.trim().to_lowercase();
    let groups: Vec<&str> = text.split('-').collect();
    let shaped = groups.len() == LENGTHS.len()
        && groups.iter().zip(LENGTHS).all(|(group, length)| {
            group.len() == length && group.bytes().all(|byte| byte.is_ascii_hexdigit())
        });
    let all = |digit: u8| text.bytes().all(|byte| byte == digit || byte == b'-');
    let placeholder = all(b'0')
        || all(b'f')
        || text == "03000200-0400-0500-0006-000700080009"
        || text == "12345678-1234-5678-90ab-cddeefaabbcc";
    (shaped && !placeholder).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholder_and_broken_uuids_are_no_identity() {
        let table = [
            ("4C4C4544-0042-3510-8053-B4C04F4D3132\n", true),
            ("00000000-0000-0000-0000-000000000000", false),
            ("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", false),
            ("03000200-0400-0500-0006-000700080009", false),
            ("4c4c4544-0042-3510-8053-b4c04f4d313", false),
            ("4c4c454400423510-8053-b4c04f4d3132", false),
            ("Not Settable", false),
            ("", false),
        ];
        for (text, expect) in table {
            assert_eq!(parse_uuid(text).is_some(), expect, "{text}");
        }
        let upper = "4C4C4544-0042-3510-8053-B4C04F4D3132";
        assert_eq!(parse_uuid(upper), Some(upper.to_lowercase()));
    }

    #[test]
    fn this_machine_has_a_boot_id_and_a_release() {
        let identity = read();
        assert_eq!(identity.boot_id.len(), 36);
        assert!(!identity.kernel.is_empty());
        assert!(uptime_ms() > 0);
    }
}
