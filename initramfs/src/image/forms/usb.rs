//! `layer0-usb.img`: a disk with one EFI system partition. UEFI firmware starts the unified kernel image in it; BIOS firmware
//! starts syslinux's boot code, which loads kernel and initramfs from the same file system.
//!
//! ```text
//! sector 0       gptmbr.bin and the protective record      BIOS: finds the partition marked to boot, and starts
//! 1 MiB          FAT32: boot sector and ldlinux.sys        syslinux, which reads SYSLINUX.CFG
//!                       EFI/BOOT/BOOTX64.EFI               UEFI
//!                       VMLINUZ INITRD.IMG                 BIOS
//! ```

use std::fs;
use std::path::Path;
use std::process::Command;

use super::super::output::Key;
use super::{Form, FormError, Ingredients, boot_menu, io_error, run};
use crate::disk::{fat, gpt};

/// syslinux's program, which runs mtools and needs no rights.
const SYSLINUX: &str = "/usr/bin/syslinux";
/// Its boot code for disks with a GUID partition table.
const BOOT_CODE: &str = "/usr/lib/syslinux/mbr/gptmbr.bin";
/// What brings them.
const HINT: &str = ": apt-get install -y --no-install-recommends syslinux syslinux-common mtools";
/// Room for what syslinux puts into the volume (`ldlinux.sys` and `ldlinux.c32` of 6.04: 180 kB), in bytes.
const SPARE: usize = 1 << 20;
/// The time that mtools gives files: 1980-01-01, the first day that FAT knows, in seconds since 1970.
const TIME: &str = "315532800";

/// The programs that the disk is made with, for its key.
pub(super) fn tools(key: Key) -> Key {
    key.with_file("syslinux", SYSLINUX.as_ref()).with_file("boot code", BOOT_CODE.as_ref())
}

/// Makes the disk; `program` is the unified kernel image.
pub(super) fn make(from: &Ingredients<'_>, program: &[u8]) -> Result<Vec<u8>, FormError> {
    let menu = boot_menu(&from.options.command_line, "/VMLINUZ", "/INITRD.IMG")?;
    let form = Form::Usb.file().unwrap_or_default();
    let volume = fat::volume(&fat::Volume {
        form: fat::Form::Fat32,
        label: "LAYER0",
        files: &[
            ("EFI/BOOT/BOOTX64.EFI", program),
            ("INITRD.IMG", from.initramfs),
            ("SYSLINUX.CFG", menu.as_bytes()),
            ("VMLINUZ", &from.kernel.image),
        ],
        spare: SPARE,
        hidden: u32::try_from(gpt::START).unwrap_or(u32::MAX),
    })
    .map_err(|source| FormError::Fat { form, source })?;
    let code = fs::read(BOOT_CODE).map_err(io_error(Path::new(BOOT_CODE), HINT))?;
    Ok(gpt::disk("Layer0", &install(volume)?, Some(&code)))
}

/// Lets syslinux write itself into the volume.
fn install(volume: Vec<u8>) -> Result<Vec<u8>, FormError> {
    let dir = tempfile::tempdir().map_err(io_error(&std::env::temp_dir(), ""))?;
    let path = dir.path().join("volume");
    fs::write(&path, volume).map_err(io_error(&path, ""))?;
    let mut command = Command::new(SYSLINUX);
    // mtools writes times: fixed ones, in a zone that is the same everywhere.
    command.env("SOURCE_DATE_EPOCH", TIME).env("TZ", "UTC").env_remove("MTOOLSRC");
    run(command.arg("--install").arg(&path), HINT)?;
    fs::read(&path).map_err(io_error(&path, ""))
}
