//! What the environment tells a program of its held sockets (sd_listen_fds(3)), and of where to say that it is ready
//! (sd_notify(3)) and how often that it lives (sd_watchdog_enabled(3)). Pure.

use crate::containers::Spec;

/// Name in the container's /dev of the socket at which its program speaks of itself.
pub(super) const INBOX_NAME: &str = "layercake-notify";

/// Adds to the environment of a program that runs as process `pid` of the container; what it said of these things before
/// is replaced where the container has them.
pub(super) fn tell(env: &mut Vec<String>, spec: &Spec, pid: u32) {
    let mut set = |key: &str, value: String| {
        env.retain(|entry| entry.split_once('=').is_none_or(|(known, _)| known != key));
        env.push(format!("{key}={value}"));
    };
    if !spec.sockets.is_empty() {
        let names: Vec<&str> = spec.sockets.iter().map(|socket| socket.name.as_str()).collect();
        set("LISTEN_FDS", spec.sockets.len().to_string());
        set("LISTEN_FDNAMES", names.join(":"));
        set("LISTEN_PID", pid.to_string());
    }
    if spec.notify {
        set("NOTIFY_SOCKET", format!("/dev/{INBOX_NAME}"));
        if let Some(ms) = spec.watchdog_ms {
            set("WATCHDOG_USEC", (u64::from(ms) * 1000).to_string());
            set("WATCHDOG_PID", pid.to_string());
        }
    }
}
