//! When the phases of a node's latest boot were seen, on the server's clock. Pure: the time is an argument.
//!
//! ```text
//! DHCP (asking for boot) ──> script fetched ──> initramfs sent ──> first report with a new boot id ──> later phases
//!   starts a new boot          starts one if       never starts      starts one if the kernel was
//!                              none is starting    one               not booted by us; by kexec, if it says so
//! ```

use protocol::api::PhaseTime;
use protocol::node::{Phase, PhaseMark};
use serde::{Deserialize, Serialize};

/// A second DHCPDISCOVER this long after the first still belongs to the same boot: firmware repeats itself, and iPXE
/// asks again after the firmware did. Milliseconds.
pub const SAME_DHCP_MS: u64 = 120_000;

/// The phases of one boot, and which boot it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// The kernel's boot id, once the agent has reported.
    #[serde(default)]
    pub boot_id: Option<String>,
    /// The boot before, so that a late report of it is not taken for the new one.
    #[serde(default)]
    pub previous_boot_id: Option<String>,
    /// What has been seen, in the order of [`Phase`].
    pub phases: Vec<PhaseTime>,
    /// How often iPXE fetched its script since a new boot was last reported.
    #[serde(default)]
    pub attempts: u32,
}

impl Timeline {
    /// A machine's firmware or iPXE asked for an address in order to boot.
    pub fn dhcp(&mut self, now_ms: u64) {
        if let [only] = self.phases.as_slice()
            && only.phase == Phase::Dhcp
            && now_ms.saturating_sub(only.at_ms) <= SAME_DHCP_MS
        {
            return;
        }
        self.start_over();
        self.stamp(Phase::Dhcp, now_ms);
    }

    /// iPXE fetched its script. Where another server gave the address, this starts the boot.
    pub fn ipxe(&mut self, now_ms: u64) {
        if self.phases.iter().any(|time| time.phase > Phase::Ipxe) {
            self.start_over();
        }
        self.attempts = self.attempts.saturating_add(1);
        self.stamp(Phase::Ipxe, now_ms);
    }

    /// The initramfs was sent to its last byte.
    pub fn kernel(&mut self, now_ms: u64) {
        if self.phases.iter().all(|time| time.phase < Phase::Kernel) {
            self.stamp(Phase::Kernel, now_ms);
        }
    }

    /// The agent reported these phases of this boot. A boot id that is new starts a new boot, unless one that we
    /// served is just starting. `kexec`: another kernel started it; that moment is reckoned from how long it runs.
    pub fn observed(&mut self, boot_id: &str, marks: &[PhaseMark], kexec: bool, now_ms: u64) {
        if self.previous_boot_id.as_deref() == Some(boot_id) {
            return;
        }
        match &self.boot_id {
            Some(known) if known == boot_id => {}
            Some(_) => {
                self.start_over();
                self.begin(boot_id);
            }
            None => self.begin(boot_id),
        }
        if kexec {
            let runs = marks.iter().map(|mark| mark.uptime_ms).max().unwrap_or(0);
            self.stamp(Phase::Kexec, now_ms.saturating_sub(runs));
        }
        for mark in marks {
            self.stamp(mark.phase, now_ms);
        }
    }

    fn begin(&mut self, boot_id: &str) {
        self.boot_id = Some(boot_id.to_owned());
        self.attempts = 0;
    }

    fn start_over(&mut self) {
        self.phases.clear();
        if let Some(ended) = self.boot_id.take() {
            self.previous_boot_id = Some(ended);
        }
    }

    fn stamp(&mut self, phase: Phase, at_ms: u64) {
        if self.phases.iter().all(|time| time.phase != phase) {
            self.phases.push(PhaseTime { phase, at_ms });
            self.phases.sort_by_key(|time| time.phase);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    enum See {
        Dhcp,
        Ipxe,
        Kernel,
        Report(&'static str, &'static [Phase]),
        Kexec(&'static str),
    }

    #[track_caller]
    fn check(events: &[(u64, See)], expected: &str) -> Timeline {
        let mut timeline = Timeline::default();
        for (now, event) in events {
            match event {
                See::Dhcp => timeline.dhcp(*now),
                See::Ipxe => timeline.ipxe(*now),
                See::Kernel => timeline.kernel(*now),
                See::Report(boot_id, phases) => {
                    let marks: Vec<PhaseMark> = phases
                        .iter()
                        .map(|phase| PhaseMark { phase: *phase, uptime_ms: 1 })
                        .collect();
                    timeline.observed(boot_id, &marks, false, *now);
                }
                See::Kexec(boot_id) => {
                    let marks = [PhaseMark { phase: Phase::Init, uptime_ms: 3 }];
                    timeline.observed(boot_id, &marks, true, *now);
                }
            }
        }
        let text: Vec<String> = timeline
            .phases
            .iter()
            .map(|time| format!("{}@{}", time.phase.as_str(), time.at_ms))
            .collect();
        assert_eq!(text.join(" "), expected);
        timeline
    }

    use See::{Dhcp, Ipxe, Kernel, Kexec, Report};

    #[test]
    fn a_network_boot_is_stamped_phase_by_phase() {
        check(
            &[
                (1, Dhcp),
                (2, Ipxe),
                (3, Kernel),
                (4, Report("a", &[Phase::Init, Phase::Agent])),
                (5, Report("a", &[Phase::Init, Phase::Agent, Phase::Running])),
            ],
            "dhcp@1 ipxe@2 kernel@3 init@4 agent@4 running@5",
        );
    }

    #[test]
    fn repeated_requests_keep_the_first_time() {
        check(
            &[(1, Dhcp), (5, Dhcp), (6, Ipxe), (7, Ipxe), (8, Kernel), (9, Kernel)],
            "dhcp@1 ipxe@6 kernel@8",
        );
    }

    #[test]
    fn a_machine_that_asks_again_much_later_starts_a_new_boot() {
        check(&[(1, Dhcp), (SAME_DHCP_MS + 2, Dhcp)], "dhcp@120002");
    }

    #[test]
    fn a_reboot_forgets_the_boot_before() {
        let timeline = check(
            &[(1, Dhcp), (2, Ipxe), (3, Kernel), (4, Report("a", &[Phase::Running])), (50, Dhcp)],
            "dhcp@50",
        );
        assert_eq!(timeline.boot_id, None);
        assert_eq!(timeline.previous_boot_id.as_deref(), Some("a"));
    }

    #[test]
    fn a_late_report_of_the_boot_before_is_not_taken_for_the_new_one() {
        check(
            &[(1, Report("a", &[Phase::Agent])), (5, Dhcp), (6, Report("a", &[Phase::Agent]))],
            "dhcp@5",
        );
    }

    #[test]
    fn a_script_fetched_without_our_dhcp_starts_a_new_boot() {
        check(&[(1, Report("a", &[Phase::Running])), (9, Ipxe)], "ipxe@9");
    }

    #[test]
    fn a_new_boot_id_without_dhcp_starts_a_new_boot() {
        check(
            &[(1, Report("a", &[Phase::Init, Phase::Running])), (9, Report("b", &[Phase::Init]))],
            "init@9",
        );
    }

    #[test]
    fn a_kexec_starts_a_boot_without_firmware_at_the_time_its_kernel_began() {
        let timeline = check(
            &[
                (1, Dhcp),
                (2, Ipxe),
                (3, Kernel),
                (4, Report("a", &[Phase::Init])),
                (20, Kexec("b")),
            ],
            "kexec@17 init@20",
        );
        assert_eq!(timeline.previous_boot_id.as_deref(), Some("a"));
    }

    #[test]
    fn boots_that_nobody_reported_from_are_counted() {
        let mut timeline = Timeline::default();
        for now in 1..=3 {
            timeline.ipxe(now);
        }
        assert_eq!(timeline.attempts, 3);
        timeline.observed("a", &[], false, 4);
        timeline.observed("a", &[], false, 5);
        assert_eq!(timeline.attempts, 0);
        timeline.ipxe(6);
        // A late word of the boot before says nothing of this one.
        timeline.observed("a", &[], false, 7);
        assert_eq!(timeline.attempts, 1);
    }

    #[test]
    fn an_initramfs_fetched_by_hand_changes_nothing_in_a_running_node() {
        check(&[(1, Report("a", &[Phase::Init])), (2, Kernel)], "init@1");
    }
}
