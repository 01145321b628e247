//! Which accelerator QEMU gets. A `/dev/kvm` that opens can still hang a guest: KVM is used only where a trial boot
//! of a 512-byte program has proved that guests run.

use std::fs::File;
use std::io::Write;
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{prerequisites, process, wait};

/// QEMU's program.
pub const QEMU: &str = "qemu-system-x86_64";
/// Names the accelerator where probing is not wanted: `kvm` or `tcg`.
pub const ENV_ACCELERATOR: &str = "LAYERCAKE_ACCEL";
/// How long a trial boot may take. With KVM it is a fraction of a second.
const TRIAL: Duration = Duration::from_secs(2);
/// Size of the trial's disk: SeaBIOS finds no disk in one of 512 bytes.
const DISK_BYTES: u64 = 1 << 20;
/// What the trial writes to QEMU's exit port.
const PROOF: u8 = 0x10;

/// How QEMU runs a machine's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// On the processor.
    Kvm,
    /// Translated.
    Tcg,
}

impl Accelerator {
    /// QEMU's arguments for it.
    #[must_use]
    pub fn args(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg", "-cpu", "max"],
        }
    }

    /// Its name, as QEMU has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The best one that works here. Found out once in the life of the process.
pub fn best() -> Accelerator {
    static BEST: OnceLock<Accelerator> = OnceLock::new();
    *BEST.get_or_init(|| match std::env::var(ENV_ACCELERATOR).as_deref() {
        Ok("kvm") => Accelerator::Kvm,
        Ok("tcg") => Accelerator::Tcg,
        _ if File::options().read(true).write(true).open("/dev/kvm").is_err() => Accelerator::Tcg,
        _ if matches!(trial(Accelerator::Kvm, TRIAL), Ok(true)) => Accelerator::Kvm,
        _ => Accelerator::Tcg,
    })
}

/// A boot sector that writes [`PROOF`] to QEMU's exit port and halts.
fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    // mov al, PROOF; out 0xf4, al; hlt; jmp back to hlt
    sector[..7].copy_from_slice(&[0xb0, PROOF, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// Whether a guest runs with this accelerator.
fn trial(accelerator: Accelerator, within: Duration) -> Result<bool> {
    let mut disk = tempfile::NamedTempFile::new().context("cannot make a temporary file")?;
    disk.write_all(&boot_sector()).context("cannot write a temporary file")?;
    disk.as_file().set_len(DISK_BYTES).context("cannot size a temporary file")?;
    let qemu = prerequisites::find_program(QEMU).with_context(|| format!("{QEMU} is missing"))?;
    let drive = format!("format=raw,readonly=on,if=none,id=d0,file={}", disk.path().display());
    let mut child = process::mortal(&qemu)?
        .args(["-machine", "q35,graphics=off", "-nodefaults", "-display", "none", "-no-reboot"])
        .args(accelerator.args())
        .args(["-m", "16", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .args(["-drive", &drive, "-device", "virtio-blk-pci,drive=d0,bootindex=0"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {QEMU}"))?;
    let ended = wait::until("the trial boot", within, || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill().context("cannot kill the trial boot")?;
        child.wait().context("cannot wait for the trial boot")?;
    }
    // QEMU exits with (value << 1) | 1.
    Ok(ended.is_ok_and(|status| status.code() == Some((i32::from(PROOF) << 1) | 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trial_boot_proves_that_an_emulated_guest_runs() {
        assert!(trial(Accelerator::Tcg, Duration::from_secs(60)).expect("trial"));
    }

    #[test]
    fn a_trial_that_has_no_time_proves_nothing() {
        assert!(!trial(Accelerator::Tcg, Duration::ZERO).expect("trial"));
    }
}
