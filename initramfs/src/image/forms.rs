//! The forms an image comes in beside kernel and initramfs. Pure but for the tools that some of them need.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::kernel::Kernel;
use crate::uki::{self, Parts, UkiError};

/// systemd's stub where Debian's package puts it.
pub const STUB: &str = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub";

/// A form of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Form {
    /// `vmlinuz` and `initramfs.img`, for PXE and HTTP boot. Always there.
    Split,
    /// `layer0.efi`: one EFI program with both and the command line (a unified kernel image).
    Uki,
}

/// What a unified kernel image is made of besides kernel and initramfs.
#[derive(Debug, Clone, Default)]
pub struct EfiOptions {
    /// The kernel's command line.
    pub command_line: String,
    /// systemd's stub; [`STUB`] when absent.
    pub stub: Option<PathBuf>,
    /// Key and certificate (PEM) that sign it for Secure Boot.
    pub signer: Option<Signer>,
}

/// A key for Secure Boot.
#[derive(Debug, Clone)]
pub struct Signer {
    /// Private key, PEM.
    pub key: PathBuf,
    /// Its certificate, PEM.
    pub certificate: PathBuf,
}

/// Why a form could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// A file or program could not be used.
    #[error("cannot use {path}{hint}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What installs it, after a colon; empty if nothing.
        hint: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The parts do not make an image.
    #[error("cannot make layer0.efi")]
    Uki(#[from] UkiError),
    /// sbsign refused.
    #[error("sbsign failed: {0}")]
    Sign(String),
}

fn io_error(path: &Path, hint: &'static str) -> impl FnOnce(io::Error) -> FormError {
    let path = path.to_owned();
    move |source| FormError::Io { path, hint, source }
}

/// The unified kernel image, signed where a key is given.
///
/// # Errors
/// The stub is not there, the parts do not fit, or the key does not sign.
pub fn efi(
    kernel: &Kernel,
    initramfs: &[u8],
    version: &str,
    options: &EfiOptions,
) -> Result<Vec<u8>, FormError> {
    let path = options.stub.as_deref().unwrap_or(Path::new(STUB));
    let hint = ": apt-get install -y --no-install-recommends systemd-boot-efi, or give --stub FILE";
    let stub = fs::read(path).map_err(io_error(path, hint))?;
    let image = uki::assemble(&Parts {
        stub: &stub,
        kernel: &kernel.image,
        release: &kernel.release,
        initramfs,
        command_line: &options.command_line,
        os_release: &uki::os_release(version, &kernel.release),
    })?;
    match &options.signer {
        Some(signer) => sign(image, signer),
        None => Ok(image),
    }
}

/// Signs an EFI program with sbsign(1).
fn sign(image: Vec<u8>, signer: &Signer) -> Result<Vec<u8>, FormError> {
    let hint = ": apt-get install -y --no-install-recommends sbsigntool";
    let dir = tempfile::tempdir().map_err(io_error(&std::env::temp_dir(), ""))?;
    let (plain, signed) = (dir.path().join("plain.efi"), dir.path().join("signed.efi"));
    fs::write(&plain, image).map_err(io_error(&plain, ""))?;
    let mut command = Command::new("sbsign");
    command.arg("--key").arg(&signer.key).arg("--cert").arg(&signer.certificate);
    let output = command.arg("--output").arg(&signed).arg(&plain).output();
    let output = output.map_err(io_error("sbsign".as_ref(), hint))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(FormError::Sign(said.trim().replace('\n', "; ")));
    }
    fs::read(&signed).map_err(io_error(&signed, ""))
}
