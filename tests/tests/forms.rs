//! Layer0 from disks, CDs and as a kernel with all inside, each under BIOS and under UEFI firmware with Secure Boot, up to an ImageSet
//! that runs. The images are signed with the key that the firmware trusts.

use std::process::Command;

use anyhow::{Result, ensure};
use tests::artifacts::{Artifacts, example};
use tests::lab::case;
use tests::prerequisites::{CASES, EFI_CASES, FORM_CASES};
use tests::qemu::ovmf::TEST_CERTIFICATE;
use tests::qemu::{Boot, MachineSpec, Medium, Ovmf};
use tests::server_peer::ServerSpec;
use tests::story::{BOOT, Story};
use tests::wait;

/// OVMF's own memory and two copies of the image on top of the node's.
const MEMORY_MB: u32 = 1024;

/// Boots two machines from a form, the first one with BIOS, the second one with this UEFI firmware, and asks both for
/// what they run.
fn boots_everywhere(name: &str, form: &str, medium: Medium, uefi: Ovmf) -> Result<()> {
    let needs = [CASES, EFI_CASES, FORM_CASES].concat();
    case(name, &needs, |lab| {
        let image = Artifacts::form(form)?;
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 2))?;
        story.push(&example("hello", "v1"))?;
        for (number, firmware) in [(1, None), (2, Some(uefi))] {
            let boot = Boot::Medium { image: image.clone(), medium, firmware };
            let spec = MachineSpec { memory_mb: MEMORY_MB, boot, ..MachineSpec::netboot(number) };
            story.switch_on_with(&spec)?;
        }
        (1..=2).try_for_each(|number| runs_hello(&mut story, number))
    })
}

fn runs_hello(story: &mut Story<'_>, number: u8) -> Result<()> {
    wait::until(&format!("machine {number} to run hello"), BOOT, || {
        story.machine(number)?.check_alive()?;
        Ok(story.answers(number)?.then_some(()))
    })?;
    ensure!(story.hello(number)? == "1");
    Ok(())
}

#[test]
fn the_disk_image_boots_from_a_usb_stick_under_bios_and_secure_boot() -> Result<()> {
    boots_everywhere("form-usb", "layer0-usb.img", Medium::Stick, Ovmf::Secure)
}

#[test]
fn the_cd_image_boots_from_a_cd_under_bios_and_secure_boot() -> Result<()> {
    boots_everywhere("form-cd", "layer0.iso", Medium::Cd, Ovmf::Secure)
}

#[test]
fn the_cd_image_written_to_a_disk_boots_under_bios_and_uefi() -> Result<()> {
    boots_everywhere("form-cd-on-disk", "layer0.iso", Medium::Disk, Ovmf::Open)
}

#[test]
fn the_kernel_with_all_inside_boots_under_bios_and_signed_under_secure_boot() -> Result<()> {
    let needs = [CASES, EFI_CASES].concat();
    case("form-efi", &needs, |lab| {
        let sbverify = Command::new("sbverify")
            .args(["--cert", TEST_CERTIFICATE])
            .arg(Artifacts::kernel_form(true)?)
            .output()?;
        ensure!(sbverify.status.success(), "{}", String::from_utf8_lossy(&sbverify.stderr));
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 2))?;
        story.push(&example("hello", "v1"))?;
        let bios = Boot::Kernel { image: Artifacts::kernel_form(false)? };
        let program = Artifacts::kernel_form(true)?;
        let uefi = Boot::Efi { program, firmware: Ovmf::Secure };
        for (number, boot) in [(1, bios), (2, uefi)] {
            let spec = MachineSpec { memory_mb: MEMORY_MB, boot, ..MachineSpec::netboot(number) };
            story.switch_on_with(&spec)?;
        }
        (1..=2).try_for_each(|number| runs_hello(&mut story, number))
    })
}
