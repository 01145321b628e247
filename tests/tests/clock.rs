//! A node's clock, set by a time server that we did not write.

use std::time::SystemTime;

use anyhow::{Result, ensure};
use tests::artifacts::Artifacts;
use tests::lab::{ADDRESS, case};
use tests::prerequisites::CASES;
use tests::qemu::MachineSpec;
use tests::server_peer::ServerSpec;
use tests::story::{BOOT, Story};
use tests::time_peer;

/// How far a node's word of the time may be from now: it was said a moment ago, and came over an emulated machine.
const NEAR_S: u64 = 60;

#[test]
fn clocks_that_are_decades_off_are_set_by_the_time_server_that_dhcp_names() -> Result<()> {
    case("clock", CASES, |lab| {
        let mut server = time_peer::start(lab)?;
        let mut spec = ServerSpec::new(Artifacts::find()?, 2);
        spec.ntp_servers = vec![ADDRESS.parse()?];
        let mut story = Story::begin(lab, &spec)?;
        for (number, rtc) in [(1, "base=2001-09-09"), (2, "base=2043-01-01")] {
            let extra = ["-rtc", rtc].map(str::to_owned).to_vec();
            story.switch_on_with(&MachineSpec { extra, ..MachineSpec::netboot(number) })?;
        }
        for number in [1, 2] {
            let clock = story.wait(number, "to know the time", BOOT, |observed| {
                observed.clock.clone().filter(|clock| clock.at != 0)
            })?;
            ensure!(clock.source.as_deref() == Some(ADDRESS), "{clock:?}");
            ensure!(clock.problem.is_none(), "{clock:?}");
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
            ensure!(now.abs_diff(clock.at) < NEAR_S, "it is {now}, the node says {clock:?}");
            // One was before its own build, which it knows, the other far in the future.
            ensure!((clock.offset_us > 0) == (number == 1), "{clock:?}");
        }
        story.machine(1)?.console.wait_for("s before this Layer0 was built: set to that", BOOT)?;
        server.check_alive()
    })
}
