//! UEFI firmware for machines: Debian's OVMF, with variables of a machine's own.

use std::path::Path;

use anyhow::{Context, Result};

/// Where Debian's package ovmf puts it.
pub const DIR: &str = "/usr/share/OVMF";
/// The key that [`Ovmf::Secure`] trusts, and its certificate (Debian's "snakeoil": the passphrase is its name).
pub const TEST_KEY: &str = "/usr/share/ovmf/PkKek-1-snakeoil.key";
/// Certificate of [`TEST_KEY`].
pub const TEST_CERTIFICATE: &str = "/usr/share/ovmf/PkKek-1-snakeoil.pem";
/// The firmware's program in a machine's directory.
const CODE: &str = "ovmf-code.fd";
/// The firmware's variables there: what it is told to boot, the keys it trusts.
const VARIABLES: &str = "ovmf-vars.fd";
/// The directory there that QEMU shows as a FAT disk.
const ESP: &str = "esp";

/// The firmware of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ovmf {
    /// Takes any program.
    Open,
    /// Secure Boot: takes only what [`TEST_KEY`] has signed.
    Secure,
}

/// What the firmware fetches its program by when it boots from the network. Of several it would try one after the other, and wait
/// a minute and a half for each that nobody answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirmwareProtocol {
    /// PXE: the file that DHCP names, by TFTP.
    Pxe,
    /// UEFI HTTP Boot: the URL that DHCP names.
    Http,
}

impl FirmwareProtocol {
    /// QEMU's arguments that leave the firmware only this one, over IPv4; and randomness, without which it has no network at all.
    pub(super) fn args(self) -> impl Iterator<Item = &'static str> {
        let pxe = match self {
            Self::Pxe => "name=opt/org.tianocore/IPv4PXESupport,string=y",
            Self::Http => "name=opt/org.tianocore/IPv4PXESupport,string=n",
        };
        let no_ipv6 = "name=opt/org.tianocore/IPv6PXESupport,string=n";
        ["-device", "virtio-rng-pci", "-fw_cfg", pxe, "-fw_cfg", no_ipv6].into_iter()
    }
}

impl Ovmf {
    /// QEMU's arguments; the files of `dir` have been placed.
    pub(super) fn args(self, dir: &Path) -> Vec<String> {
        let path = |name: &str| dir.join(name).display().to_string();
        let mut args = vec![
            "-drive".to_owned(),
            format!("if=pflash,format=raw,unit=0,readonly=on,file={}", path(CODE)),
            "-drive".to_owned(),
            format!("if=pflash,format=raw,unit=1,file={}", path(VARIABLES)),
        ];
        if self == Self::Secure {
            // The variables are behind system management mode, else the machine could enrol keys itself.
            args.extend(["-machine", "smm=on", "-global"].map(str::to_owned));
            args.push("driver=cfi.pflash01,property=secure,value=on".to_owned());
        }
        args
    }

    /// QEMU's arguments for the disk with the program that has been placed in `dir`.
    pub(super) fn disk(dir: &Path) -> [String; 4] {
        let esp = dir.join(ESP);
        [
            "-drive".to_owned(),
            format!("if=none,id=esp,format=raw,readonly=on,file=fat:{}", esp.display()),
            "-device".to_owned(),
            "virtio-blk-pci,drive=esp,bootindex=0".to_owned(),
        ]
    }

    /// Puts firmware and variables into a machine's directory. Variables that are there stay: they are its memory.
    ///
    /// # Errors
    /// That a file is not there or cannot be copied.
    pub(super) fn place(self, machine: &Path) -> Result<()> {
        let dir = Path::new(DIR);
        let (code, variables) = match self {
            Self::Open => ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
            Self::Secure => ("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.snakeoil.fd"),
        };
        copy(&dir.join(code), &machine.join(CODE))?;
        let there = machine.join(VARIABLES);
        if there.exists() { Ok(()) } else { copy(&dir.join(variables), &there) }
    }

    /// Puts a program into a machine's directory, as the first that its disk has.
    ///
    /// # Errors
    /// That it cannot be copied.
    pub(super) fn place_program(machine: &Path, program: &Path) -> Result<()> {
        let boot = machine.join(ESP).join("EFI/BOOT");
        std::fs::create_dir_all(&boot)
            .with_context(|| format!("cannot make {}", boot.display()))?;
        copy(program, &boot.join("BOOTX64.EFI"))
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
}
