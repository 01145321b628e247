//! The lab proves itself without anything of Layercake: an emulated machine boots by its iPXE ROM from dnsmasq.

use std::time::Duration;

use anyhow::{Context, Result};
use tests::lab::{BRIDGE, case};
use tests::prerequisites::{CASES, find_program};
use tests::process::Process;
use tests::qemu::{Machine, MachineSpec};

/// A loaded machine with two cores; unloaded it takes five seconds.
const BOOT: Duration = Duration::from_secs(120);

#[test]
fn a_machine_boots_its_rom_and_runs_the_script_that_tftp_gives_it() -> Result<()> {
    case("lab-ipxe", CASES, |lab| {
        let dnsmasq = find_program("dnsmasq").context("dnsmasq is missing")?;
        let root = lab.dir().join("tftp");
        std::fs::create_dir(&root)?;
        let script = "#!ipxe\necho The cake ${net0/ip} is baked\nsleep 1\nreboot\n";
        std::fs::write(root.join("boot.ipxe"), script)?;
        let tftp = format!("--tftp-root={}", root.display());
        let interface = format!("--interface={BRIDGE}");
        let args = [
            "--keep-in-foreground",
            "--log-facility=-",
            "--conf-file=/dev/null",
            "--port=0",
            "--no-ping",
            "--user=root",
            "--leasefile-ro",
            "--enable-tftp",
            "--dhcp-range=10.9.0.50,10.9.0.60",
            "--dhcp-boot=boot.ipxe",
            &tftp,
            &interface,
        ];
        let mut server =
            Process::start(lab.namespace(), &dnsmasq, args, &lab.dir().join("dnsmasq.log"))?;
        let spec = MachineSpec { reboots: false, ..MachineSpec::netboot(1) };
        let mut machine = Machine::start(lab, &spec)?;
        machine.console.wait_for("iPXE", BOOT)?;
        let configuring = std::time::Instant::now();
        machine.console.wait_for("The cake 10.9.0.5", BOOT)?;
        // Without router advertisements iPXE waits 16 s for them.
        let waited = configuring.elapsed();
        assert!(waited < Duration::from_secs(14), "configuring took {waited:?}");
        machine.wait_off(BOOT)?;
        server.check_alive()
    })
}
