//! The hardware's watchdog: fed while the machine is healthy, so that a machine that is not is reset.
//!
//! Healthy: this loop turns, and the agent's has given a sign lately, or it is being put in order still, or a person has a
//! shell for it. An agent that is silent is killed first, which costs no container; only one that stays silent costs the
//! machine.

use std::os::fd::OwnedFd;

use crate::sys::{start, watchdog as device};

/// How often PID 1 looks around, in milliseconds, where the watchdog leaves the time.
pub const PACE_MS: u64 = 30_000;
/// An agent without sign for so long, in milliseconds, hangs: four of its signs.
pub const SILENT_MS: u64 = 45_000;
/// What the agent may take to its first sign, in milliseconds.
pub const FIRST_SIGN_MS: u64 = 180_000;
/// How long there may be no healthy agent, in milliseconds, before the machine is given up.
pub const GRACE_MS: u64 = 600_000;
/// The timeout that goes with a reboot or a kexec, in seconds: the firmware's time and the boot's.
const REBOOT_S: u32 = 300;

/// The last signs of the agent's life: pure.
#[derive(Debug, Clone, Copy, Default)]
pub struct Health {
    sign_ms: u64,
    /// The start that the last sign was of.
    of: u32,
}

impl Health {
    /// The agent has given a sign; `starts` says which agent.
    pub fn sign(&mut self, starts: u32, now_ms: u64) {
        *self = Self { sign_ms: now_ms, of: starts };
    }

    /// Whether this agent, which was started then, hangs.
    #[must_use]
    pub fn hangs(&self, starts: u32, since_ms: u64, now_ms: u64) -> bool {
        let silent = if self.of == starts { SILENT_MS } else { FIRST_SIGN_MS };
        now_ms.saturating_sub(self.sign_ms.max(since_ms)) >= silent
    }

    /// Whether the machine is worth its watchdog's food.
    #[must_use]
    pub fn feeds(&self, shell: bool, now_ms: u64) -> bool {
        shell || now_ms.saturating_sub(self.sign_ms) < GRACE_MS
    }
}

/// The device, once there is one.
#[derive(Debug)]
pub struct Watchdog {
    /// None: it is not to be used.
    seconds: Option<u32>,
    device: Option<OwnedFd>,
}

impl Watchdog {
    /// A watchdog with this timeout, perhaps one that the program before this one has opened.
    #[must_use]
    pub fn new(seconds: Option<u32>, device: Option<OwnedFd>) -> Self {
        Self { seconds, device }
    }

    /// How often it wants to be fed, in milliseconds.
    #[must_use]
    pub fn pace_ms(&self) -> u64 {
        self.seconds.map_or(PACE_MS, |s| (u64::from(s) * 500).min(PACE_MS))
    }

    /// Feeds it if that is deserved; opens it where it has appeared meanwhile.
    pub fn feed(&mut self, deserved: bool) {
        let Some(seconds) = self.seconds else { return };
        if !deserved {
            log::error!("no agent and no shell: the watchdog is not fed any more");
            return;
        }
        if self.device.is_none() {
            let Some((fd, index)) = device::find() else { return };
            match device::set_timeout(&fd, seconds) {
                Ok(took) => log::info!("watchdog {index}: resets after {took} s"),
                Err(error) => log::warn!("watchdog {index}: timeout {seconds} s: {error}"),
            }
            self.device = start::keep_at(fd, super::WATCHDOG_FD).ok();
        }
        if let Some(device) = &self.device
            && let Err(error) = device::keep_alive(device)
        {
            log::warn!("watchdog: {error}");
        }
    }

    /// Lets it go: armed with a longer timeout over a reboot, disarmed otherwise (the "magic close").
    pub fn release(&mut self, armed: bool) {
        let Some(device) = &self.device else { return };
        if armed {
            // A device that cannot wait so long keeps the timeout that it has.
            device::set_timeout(device, REBOOT_S).unwrap_or_default();
            self.feed(true);
        } else if rustix::io::write(device, b"V").is_ok() {
            self.device = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_hangs_when_its_signs_stop_or_never_come() {
        let mut health = Health::default();
        assert!(!health.hangs(1, 1000, 1000 + FIRST_SIGN_MS - 1));
        assert!(health.hangs(1, 1000, 1000 + FIRST_SIGN_MS));
        health.sign(1, 200_000);
        assert!(!health.hangs(1, 1000, 200_000 + SILENT_MS - 1));
        assert!(health.hangs(1, 1000, 200_000 + SILENT_MS));
        // The next one has its time to come up again.
        assert!(!health.hangs(2, 250_000, 250_000 + FIRST_SIGN_MS - 1));
        assert!(health.hangs(2, 250_000, 250_000 + FIRST_SIGN_MS));
    }

    #[test]
    fn a_machine_without_agent_is_given_up_unless_somebody_has_a_shell() {
        let mut health = Health::default();
        assert!(health.feeds(false, GRACE_MS - 1) && !health.feeds(false, GRACE_MS));
        assert!(health.feeds(true, 9 * GRACE_MS));
        health.sign(3, GRACE_MS);
        assert!(health.feeds(false, 2 * GRACE_MS - 1));
    }

    #[test]
    fn it_is_fed_twice_in_its_time() {
        let pace = |seconds| Watchdog::new(seconds, None).pace_ms();
        assert_eq!(
            [None, Some(60), Some(600), Some(10)].map(pace),
            [30_000, 30_000, 30_000, 5_000]
        );
    }
}
