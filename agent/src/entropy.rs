//! Waiting for the kernel's random numbers before anything makes keys of them: a machine without RDRAND or virtio-rng may need
//! seconds for its first (random(4)). Nothing is stirred in; the kernel takes what hardware it finds.

use std::fs::File;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Longest wait. Whoever needs keys after that waits in the kernel.
const BOUND: Duration = Duration::from_secs(60);

/// Whether getrandom(2) would answer at once.
#[must_use]
pub fn is_ready() -> bool {
    let mut byte = [0; 1];
    !matches!(getrandom(&mut byte, GetRandomFlags::NONBLOCK), Err(Errno::AGAIN))
}

/// Waits until there are random numbers, for a minute at most; `told` hears why, when there is a wait at all.
///
/// # Errors
/// That there are none after that time: one sentence.
pub fn wait(told: impl FnOnce(&str)) -> Result<(), String> {
    if is_ready() {
        return Ok(());
    }
    told(
        "waiting for the kernel's random numbers: this machine has no source of them that is known",
    );
    let begun = Instant::now();
    // Becomes readable when the kernel is ready (random(4)).
    let random = File::open("/dev/random").map_err(|error| format!("/dev/random: {error}"))?;
    while !is_ready() {
        let left = BOUND.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(format!("no random numbers within {} s", BOUND.as_secs()));
        }
        let left = Timespec { tv_sec: 1, tv_nsec: 0 };
        match rustix::event::poll(&mut [PollFd::new(&random, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(format!("/dev/random: {error}")),
        }
    }
    log::info!("random numbers came after {} ms", begun.elapsed().as_millis());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_has_random_numbers_does_not_wait() {
        assert!(is_ready());
        assert_eq!(wait(|_| panic!("waits")), Ok(()));
    }
}
