//! A node's clock, set by a time server that we did not write.

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use tests::artifacts::Artifacts;
use tests::lab::{ADDRESS, SUBNET, case};
use tests::prerequisites::{CASES, find_program};
use tests::process::Process;
use tests::qemu::MachineSpec;
use tests::server_peer::ServerSpec;
use tests::story::{BOOT, Story};

/// How far a node's word of the time may be from now: it was said a moment ago, and came over an emulated machine.
const NEAR_S: u64 = 60;

#[test]
fn clocks_that_are_decades_off_are_set_by_the_time_server_that_dhcp_names() -> Result<()> {
    case("clock", CASES, |lab| {
        let chronyd = find_program("chronyd").context("chronyd is missing")?;
        let config = lab.dir().join("chrony.conf");
        let pid = lab.dir().join("chrony.pid");
        // A clock that says it is right, and never touches this machine's.
        let text = format!(
            "local stratum 3\nallow {SUBNET}\nbindaddress {ADDRESS}\ncmdport 0\nbindcmdaddress /\nuser root\npidfile {}\n",
            pid.display()
        );
        std::fs::write(&config, text)?;
        let file = config.display().to_string();
        let args = ["-d", "-x", "-f", &file];
        let log = lab.dir().join("chrony.log");
        let mut server = Process::start(lab.namespace(), &chronyd, args, &log)?;
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
