//! `layer0.iso`: a CD for BIOS (isolinux) and UEFI (a FAT image with the unified kernel image), by xorriso. It has boot code in
//! front and a partition table besides, so that it boots as well when it is written to a disk.

use std::fs;
use std::path::Path;
use std::process::Command;

use protocol::ids::Digest;

use super::super::output::Key;
use super::{Form, FormError, Ingredients, boot_menu, io_error, run, sign};
use crate::disk::fat;

/// The program that writes CDs.
const XORRISO: &str = "/usr/bin/xorriso";
/// What BIOS firmware starts from a CD, and from a disk.
const ISOLINUX: &str = "/usr/lib/ISOLINUX/isolinux.bin";
const DISK_CODE: &str = "/usr/lib/ISOLINUX/isohdpfx.bin";
/// What isolinux needs beside it.
const MODULE: &str = "/usr/lib/syslinux/modules/bios/ldlinux.c32";
/// What brings them.
const HINT: &str = ": apt-get install -y --no-install-recommends xorriso isolinux syslinux-common";

/// The programs that the CD is made with, for its key.
pub(super) fn tools(key: Key) -> Key {
    [XORRISO, ISOLINUX, DISK_CODE, MODULE]
        .iter()
        .fold(key, |key, path| key.with_file(path, path.as_ref()))
}

/// Makes the CD; `program` is the unified kernel image.
pub(super) fn make(from: &Ingredients<'_>, program: &[u8]) -> Result<Vec<u8>, FormError> {
    let menu = boot_menu(&from.options.command_line, "/boot/vmlinuz", "/boot/initrd.img")?;
    let form = Form::Iso.file().unwrap_or_default();
    let firmware = fat::volume(&fat::Volume {
        form: fat::Form::Fat16,
        label: "LAYER0",
        files: &[("EFI/BOOT/BOOTX64.EFI", program)],
        spare: 0,
        hidden: 0,
    })
    .map_err(|source| FormError::Fat { form, source })?;
    let dir = tempfile::tempdir().map_err(io_error(&std::env::temp_dir(), ""))?;
    let tree = dir.path().join("tree");
    // isolinux looks for its own files in a few directories only.
    for name in ["boot", "isolinux"] {
        let path = tree.join(name);
        fs::create_dir_all(&path).map_err(io_error(&path, ""))?;
    }
    let read = |path: &str| fs::read(path).map_err(io_error(Path::new(path), HINT));
    for (name, bytes) in [
        ("boot/efi.img", firmware.as_slice()),
        ("boot/initrd.img", from.initramfs),
        ("isolinux/isolinux.bin", &read(ISOLINUX)?),
        ("isolinux/isolinux.cfg", menu.as_bytes()),
        ("isolinux/ldlinux.c32", &read(MODULE)?),
        ("boot/vmlinuz", &from.kernel.image),
    ] {
        let path = tree.join(name);
        fs::write(&path, bytes).map_err(io_error(&path, ""))?;
    }
    let out = dir.path().join(form);
    let contents = [firmware, from.initramfs.to_vec(), menu.into_bytes()].concat();
    run(&mut command(&tree, &out, from.time, &Digest::of(&contents)), HINT)?;
    fs::read(&out).map_err(io_error(&out, ""))
}

/// xorriso as mkisofs. Everything it would take from the clock, the files' owners or chance is said: the identity of the disk comes
/// from what is on it.
fn command(tree: &Path, out: &Path, time: u32, contents: &Digest) -> Command {
    let mut command = Command::new(XORRISO);
    // To xorriso no time at all is 0.
    let time = time.max(1);
    let (year, month, day) = sign::date(time / 86_400);
    let (hour, minute, second) = (time / 3600 % 24, time / 60 % 60, time % 60);
    let stamp = format!("{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}00");
    command.env("SOURCE_DATE_EPOCH", time.to_string()).env("TZ", "UTC").env("LC_ALL", "C");
    command.args(["-no_rc", "-as", "mkisofs", "-quiet", "-o"]).arg(out);
    command.args(["-volid", "LAYER0", "-rational-rock", "-joliet"]);
    command.arg(format!("--modification-date={stamp}")).args(["--set_all_file_dates", &stamp]);
    command.args(["--gpt_disk_guid", contents.hex().get(..32).unwrap_or_default()]);
    // BIOS.
    command.args(["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"]);
    command.args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]);
    command.args(["-isohybrid-mbr", DISK_CODE]);
    // UEFI.
    command.args(["-eltorito-alt-boot", "-e", "boot/efi.img", "-no-emul-boot"]);
    command.arg("-isohybrid-gpt-basdat").arg(tree);
    command
}
