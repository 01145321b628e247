//! Pieces of a cut-over: the same asked of every container at once, how long nothing ran.

use std::thread;

use protocol::ids::Name;

use crate::containers::Handle;

/// Stack of a thread that asks one monitor for one thing.
const HANDLE_STACK: usize = 128 << 10;

/// Does the same with every handle at once, and returns what came of it. Where there is no thread to be had, one after the
/// other.
pub(super) fn all_at_once<T: Send>(
    handles: Vec<(Name, Handle)>,
    work: impl Fn(&Handle) -> T + Sync,
) -> Vec<(Name, Handle, T)> {
    let work = &work;
    thread::scope(|scope| {
        let start = |(name, handle): (Name, Handle)| {
            let theirs = handle.clone();
            let builder = thread::Builder::new().stack_size(HANDLE_STACK);
            let thread = builder.spawn_scoped(scope, move || work(&theirs)).ok();
            (name, handle, thread)
        };
        let started: Vec<_> = handles.into_iter().map(start).collect();
        let end =
            |(name, handle, thread): (Name, Handle, Option<thread::ScopedJoinHandle<'_, T>>)| {
                let result = thread.and_then(|thread| thread.join().ok());
                let result = result.unwrap_or_else(|| work(&handle));
                (name, handle, result)
            };
        started.into_iter().map(end).collect()
    })
}

/// The longest time from a container's end to the exec of its successor, in microseconds.
pub(super) fn blackout_us(ends: &[(Name, u64)], starts: &[(Name, u64)]) -> Option<u64> {
    let gap = |(name, start): &(Name, u64)| {
        let (_, end) = ends.iter().find(|(ended, _)| ended == name)?;
        Some(start.saturating_sub(*end) / 1000)
    };
    starts.iter().filter_map(gap).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blackout_is_the_longest_gap_of_containers_that_were_there_before() {
        let at = |name: &str, ns| (name.parse::<Name>().expect("name"), ns);
        let ends = [at("a", 1_000_000), at("b", 2_000_000)];
        assert_eq!(
            blackout_us(&ends, &[at("a", 4_000_000), at("b", 3_000_000), at("c", 9)]),
            Some(3000)
        );
        assert_eq!(blackout_us(&[], &[at("a", 1)]), None);
    }
}
