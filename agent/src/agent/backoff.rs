//! Pauses between attempts: pure arithmetic, the randomness comes from the caller.

use std::time::Duration;

/// First ceiling of a retry's pause.
const RETRY_FIRST: Duration = Duration::from_millis(500);
/// Last ceiling of a retry's pause.
const RETRY_LAST: Duration = Duration::from_secs(30);

/// The longest pause after this many failed attempts in a row (counting from 1): 0.5 s doubling to 30 s. The pause itself
/// is this times a random number in 0..1, so that a thousand nodes do not come back at once ("full jitter").
#[must_use]
pub(super) fn retry_ceiling(attempts: u32) -> Duration {
    let doublings = attempts.saturating_sub(1).min(16);
    RETRY_FIRST.checked_mul(1 << doublings).map_or(RETRY_LAST, |pause| pause.min(RETRY_LAST))
}

/// A random number in 0.0..1.0 for jitter, from the kernel. Half where the kernel has none to give.
#[must_use]
pub(super) fn jitter() -> f64 {
    let mut bytes = [0; 4];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK) {
        Ok(4) => f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX),
        _ => 0.5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_stop_growing() {
        assert_eq!(retry_ceiling(1), Duration::from_millis(500));
        assert_eq!(retry_ceiling(3), Duration::from_secs(2));
        assert_eq!(retry_ceiling(u32::MAX), Duration::from_secs(30));
    }

    #[test]
    fn jitter_stays_in_its_range() {
        assert!((0..100).all(|_| (0.0..=1.0).contains(&jitter())));
    }
}
