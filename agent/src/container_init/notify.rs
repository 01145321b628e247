//! What the environment tells a program of its held sockets (sd_listen_fds(3)), and of where to say that it is ready
//! (sd_notify(3)) and how often that it lives (sd_watchdog_enabled(3)). Pure.

use crate::containers::Spec;

/// Name in the container's /dev of the socket at which its program speaks of itself.
pub(super) const INBOX_NAME: &str = "layercake-notify";

/// What the environment of a program that runs as process `pid` of the container says; it replaces what the image or the set
/// says of the same.
pub(super) fn words(spec: &Spec, pid: u32) -> Vec<(&'static str, String)> {
    let mut words = Vec::new();
    if !spec.sockets.is_empty() {
        let names: Vec<&str> = spec.sockets.iter().map(|socket| socket.name.as_str()).collect();
        words.push(("LISTEN_FDS", spec.sockets.len().to_string()));
        words.push(("LISTEN_FDNAMES", names.join(":")));
        words.push(("LISTEN_PID", pid.to_string()));
    }
    if spec.notify {
        words.push(("NOTIFY_SOCKET", format!("/dev/{INBOX_NAME}")));
        if let Some(ms) = spec.watchdog_ms {
            words.push(("WATCHDOG_USEC", (u64::from(ms) * 1000).to_string()));
            words.push(("WATCHDOG_PID", pid.to_string()));
        }
    }
    words
}
