//! When an ended container is started again, and after what pause. Pure.

use std::time::Duration;

use protocol::imageset::Restart;
use protocol::node::ExitStatus;

/// The pause before the first restart: a service that served well until now is hardly missed.
pub const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// The longest pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A program that ran this long has earned a fresh start of the count.
pub const GOOD_RUN: Duration = Duration::from_secs(10);

/// The pause before a restart, when the program was started again `failures` times in a row without a good run.
#[must_use]
pub fn backoff(failures: u32) -> Duration {
    FIRST_PAUSE
        .checked_mul(1_u32 << failures.min(16))
        .map_or(LONGEST_PAUSE, |pause| pause.min(LONGEST_PAUSE))
}

/// The failures in a row that count for the next [`backoff`], given those before and how long the program ran.
#[must_use]
pub fn failures_after(failures: u32, ran: Duration) -> u32 {
    if ran >= GOOD_RUN { 0 } else { failures.saturating_add(1) }
}

/// Whether a container that ended so, without being asked to, is started again.
#[must_use]
pub fn should_restart(policy: Restart, status: &ExitStatus) -> bool {
    match policy {
        Restart::Always => true,
        Restart::OnFailure => status.code != Some(0),
        Restart::Never => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_from_a_hundredth_of_a_second_to_thirty_seconds() {
        let table = [
            (0, 10),
            (1, 20),
            (2, 40),
            (11, 20_480),
            (12, 30_000),
            (40, 30_000),
            (u32::MAX, 30_000),
        ];
        for (failures, expected) in table {
            assert_eq!(backoff(failures), Duration::from_millis(expected), "{failures}");
        }
    }

    #[test]
    fn a_good_run_clears_the_count() {
        assert_eq!(failures_after(7, Duration::from_secs(9)), 8);
        assert_eq!(failures_after(7, Duration::from_secs(10)), 0);
        assert_eq!(failures_after(u32::MAX, Duration::ZERO), u32::MAX);
    }

    #[test]
    fn each_policy_decides_by_the_way_it_ended() {
        let good = ExitStatus { code: Some(0), signal: None, error: None };
        let bad = ExitStatus { code: Some(3), signal: None, error: None };
        let killed = ExitStatus { code: None, signal: Some(9), error: None };
        for status in [&good, &bad, &killed] {
            assert!(should_restart(Restart::Always, status));
            assert!(!should_restart(Restart::Never, status));
        }
        assert!(!should_restart(Restart::OnFailure, &good));
        assert!(should_restart(Restart::OnFailure, &bad));
        assert!(should_restart(Restart::OnFailure, &killed));
    }
}
