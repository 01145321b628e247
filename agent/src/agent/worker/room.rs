//! Whether memory suffices for two versions of a set side by side. Estimates are from what the old one uses; a limit of the
//! description is the most that a container is counted with. What the images' layers take is checked before they are pulled.
//!
//! Where containers are replaced, the old one has ended before the new one begins: those cost a process at its barrier only.

use std::fs;
use std::path::Path;

use protocol::imageset::{Container, Strategy};

use super::Live;
use crate::containers::cgroup::Cgroup;
use crate::paths::RunDirs;

/// What a monitor and the process at its exec barrier take, with what the kernel keeps for them.
const BARRIER: u64 = 2 << 20;
/// What stays free for everything else on the node.
const RESERVE: u64 = 24 << 20;

/// Refuses a roll for which memory, or the file system of what containers write, does not suffice.
///
/// # Errors
/// A sentence with the figures.
pub(super) fn check(old: &Live, new: &Live, dirs: &RunDirs) -> Result<(), String> {
    let used = |name: &str| {
        let member = old.members.iter().find(|it| it.container.name.as_str() == name)?;
        let group = Cgroup::find(&member.handle.as_ref()?.spec().id)?;
        read_number(&group.path().join("memory.current"))
    };
    let described = &new.pulled.set.containers;
    let needed = needed(described, &old.containers(), &used);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let versions = format!("version {} beside version {}", new.set.version, old.set.version);
    if let Some(available) = available(&meminfo) {
        refuse(&versions, "memory", needed, available)?;
    }
    // A version of its own starts with nothing written; what the old one wrote stays as long as it is kept.
    let free =
        rustix::fs::statvfs(dirs.root()).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    free.map_or(Ok(()), |free| refuse(&versions, "room for what containers write", 0, free))
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// `MemAvailable` of /proc/meminfo (proc_meminfo(5)), in bytes.
pub(in crate::agent) fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes that the new version takes while the old one runs.
fn needed(new: &[Container], old: &[Container], used: &dyn Fn(&str) -> Option<u64>) -> u64 {
    let both = |it: &Container| {
        let lasts = |o: &Container| o.name == it.name && o.strategy != Strategy::Replace;
        it.strategy != Strategy::Replace && old.iter().any(lasts)
    };
    let cost = |it: &Container| {
        let used = used(it.name.as_str()).filter(|_| both(it)).unwrap_or(0);
        let limit = it.limits.memory.map_or(u64::MAX, |limit| limit.0);
        BARRIER.saturating_add(used.min(limit))
    };
    new.iter().map(cost).fold(0, u64::saturating_add)
}

fn refuse(versions: &str, what: &str, needed: u64, available: u64) -> Result<(), String> {
    let wanted = needed.saturating_add(RESERVE);
    if wanted <= available {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    Err(format!(
        "not enough {what} for {versions}: {} MiB needed ({} MiB of them to spare), {} MiB available",
        mib(wanted),
        mib(RESERVE),
        available >> 20
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers(json: serde_json::Value) -> Vec<Container> {
        serde_json::from_value(json).expect("containers")
    }

    #[test]
    fn only_what_runs_beside_its_successor_counts_and_no_more_than_its_limit() {
        let set = |strategy: &str, limit: Option<&str>| {
            containers(serde_json::json!([{"name": "web", "image": "i", "strategy": strategy,
                "limits": limit.map_or(serde_json::json!({}), |it| serde_json::json!({"memory": it}))}]))
        };
        let used = |name: &str| (name == "web").then_some(1 << 30);
        let table = [
            ("replace", "replace", None, BARRIER),
            ("handover", "handover", None, BARRIER + (1 << 30)),
            ("handover", "replace", None, BARRIER),
            ("overlap", "handover", Some("64MiB"), BARRIER + (64 << 20)),
            ("overlap", "handover", Some("2GiB"), BARRIER + (1 << 30)),
        ];
        for (new, old, limit, expected) in table {
            let found = needed(&set(new, limit), &set(old, None), &used);
            assert_eq!(found, expected, "{old} -> {new} {limit:?}");
        }
    }

    #[test]
    fn a_refusal_has_the_figures() {
        assert_eq!(refuse("v", "memory", 10, RESERVE + 10), Ok(()));
        let refusal = refuse("version 2 beside version 1", "memory", 100 << 20, 50 << 20);
        let expected = "not enough memory for version 2 beside version 1: 124 MiB needed (24 MiB of them to spare), 50 MiB available";
        assert_eq!(refusal, Err(expected.to_owned()));
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:    4 kB\n"), Some(4096));
        assert_eq!(available("nonsense"), None);
    }
}
