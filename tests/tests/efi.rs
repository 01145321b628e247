//! Layer0 under UEFI firmware: as one EFI program from a disk, under Secure Boot, which takes it only when it is signed, and as kernel
//! and initramfs from the network, with the firmware's own drivers.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;
use tests::artifacts::{Artifacts, example};
use tests::lab::case;
use tests::prerequisites::{CASES, EFI_CASES};
use tests::qemu::ovmf::TEST_CERTIFICATE;
use tests::qemu::{Boot, FirmwareProtocol, MachineSpec, Ovmf, mac};
use tests::server_peer::{CONSOLE, ServerSpec};
use tests::story::{ACT, BOOT, Story};

/// OVMF's own memory and two copies of the image on top of the node's.
const MEMORY_MB: u32 = 1024;

fn machine(number: u8, firmware: Ovmf, signed: bool) -> Result<MachineSpec> {
    let boot = Boot::Efi { program: Artifacts::efi(signed)?, firmware };
    Ok(MachineSpec { memory_mb: MEMORY_MB, boot, ..MachineSpec::netboot(number) })
}

#[test]
fn secure_boot_starts_the_signed_image_which_runs_its_imageset_and_refuses_the_unsigned_one()
-> Result<()> {
    let needs = [CASES, EFI_CASES].concat();
    case("efi-secure", &needs, |lab| {
        let sbverify = Command::new("sbverify")
            .args(["--cert", TEST_CERTIFICATE])
            .arg(Artifacts::efi(true)?)
            .output()?;
        ensure!(sbverify.status.success(), "{}", String::from_utf8_lossy(&sbverify.stderr));
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 2))?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        story.switch_on_with(&machine(1, Ovmf::Secure, true)?)?;
        story.switch_on_with(&machine(2, Ovmf::Secure, false)?)?;
        story.machine(2)?.console.wait_for("Access Denied", BOOT)?;
        story.wait_running(1, "hello", "1")?;
        ensure!(story.hello(1)? == "1");
        Ok(())
    })
}

#[test]
fn an_unsigned_image_starts_where_the_firmware_asks_for_no_signature() -> Result<()> {
    let needs = [CASES, EFI_CASES].concat();
    case("efi-open", &needs, |lab| {
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 1))?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        story.switch_on_with(&machine(1, Ovmf::Open, false)?)?;
        story.wait_running(1, "hello", "1").map(drop)
    })
}

#[test]
fn uefi_firmware_netboots_by_pxe_and_by_http_and_keeps_what_a_dying_kernel_said() -> Result<()> {
    let needs = [CASES, EFI_CASES].concat();
    case("efi-netboot", &needs, |lab| {
        let mut server = ServerSpec::new(Artifacts::find()?, 2);
        server.cmdline = format!("{CONSOLE} panic=1 unknown_nmi_panic=1");
        let mut story = Story::begin(lab, &server)?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        for (number, protocol) in [(1, FirmwareProtocol::Pxe), (2, FirmwareProtocol::Http)] {
            let boot = Boot::EfiNetwork(protocol);
            let spec = MachineSpec { memory_mb: MEMORY_MB, boot, ..MachineSpec::netboot(number) };
            story.switch_on_with(&spec)?;
        }
        for number in [1, 2] {
            story.wait_running(number, "hello", "1")?;
            // The kernel's own word for who started it.
            story.machine(number)?.console.wait_for("efi: EFI v2", ACT)?;
            ensure!(story.hello(number)? == "1");
        }
        // Firmware that finds nothing by one protocol goes on to the other.
        let log = std::fs::read_to_string(story.server.log())?;
        for (number, kind) in [(1, "(Efi)"), (2, "(HttpEfi)")] {
            let asked: BTreeSet<&str> = log
                .lines()
                .filter(|line| line.contains(&mac(number).to_string()) && line.contains("offered"))
                .filter_map(|line| line.split_whitespace().last())
                .collect();
            ensure!(
                asked == BTreeSet::from([kind, "(Ipxe)", "(None)"]),
                "node {number}: {asked:?}"
            );
        }
        ensure!(log.contains("name=\"ipxe.efi\" bytes="), "not by TFTP");
        // An interrupt that nobody expects: the kernel panics, and the firmware's variables are all that survives.
        story.machine(2)?.qmp()?.execute("inject-nmi", &json!({}))?;
        let crash = story.wait(2, "to report its crash", BOOT, |it| it.last_crash.clone())?;
        ensure!(crash.contains("NMI"), "{crash}");
        Ok(())
    })
}
