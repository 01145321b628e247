//! Layer0 as one EFI program under UEFI firmware: from a disk, and under Secure Boot, which takes it only when it is signed.

use std::process::Command;

use anyhow::{Result, ensure};
use tests::artifacts::{Artifacts, example};
use tests::lab::case;
use tests::prerequisites::{CASES, EFI_CASES};
use tests::qemu::ovmf::TEST_CERTIFICATE;
use tests::qemu::{Boot, MachineSpec, Ovmf};
use tests::server_peer::ServerSpec;
use tests::story::{BOOT, Story};

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
