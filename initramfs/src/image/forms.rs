//! The forms an image comes in beside kernel and initramfs. Pure but for the tools that some of them need.
//!
//! | form | file | what makes it |
//! |---|---|---|
//! | [`Form::Uki`] | `layer0.efi` | systemd's stub, with sections added |
//! | [`Form::Efi`] | `layer0-kernel.efi` | the kernel's own linker: [`source::relink`] |
//! | [`Form::Iso`] | `layer0.iso` | `iso` |
//! | [`Form::Usb`] | `layer0-usb.img` | `usb` |
//! | [`Form::Bundle`] | `layer0-bundle.tar` | `super::bundle` |

mod iso;
mod sign;
mod usb;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::BuildError;
use super::output::{Key, Made, Shop};
use crate::Notice;
use crate::disk::fat::FatError;
use crate::kernel::Kernel;
use crate::kernel::source::{self, SourceError};
use crate::uki::{self, Parts, UkiError};

pub use sign::Signer;

/// systemd's stub where Debian's package puts it.
pub const STUB: &str = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub";

/// A form of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Form {
    /// `vmlinuz` and `initramfs.img`, for PXE and HTTP boot. Always there.
    Split,
    /// `layer0.efi`: one EFI program with both and the command line (a unified kernel image).
    Uki,
    /// `layer0-kernel.efi`: one kernel with initramfs and command line inside, which is an EFI program and a BIOS kernel at once (the
    /// unikernel form). Of kernels of ours alone.
    Efi,
    /// `layer0.iso`: a CD that BIOS and UEFI boot, and that does as well when it is written to a disk.
    Iso,
    /// `layer0-usb.img`: a disk with a GUID partition table that BIOS and UEFI boot.
    Usb,
    /// `layer0-bundle.tar`: every file, with their checksums and a bill of materials.
    Bundle,
}

impl Form {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Split, Self::Uki, Self::Efi, Self::Iso, Self::Usb, Self::Bundle];

    /// Its word on the command line and in the manifest.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::Uki => "uki",
            Self::Efi => "efi",
            Self::Iso => "iso",
            Self::Usb => "usb",
            Self::Bundle => "bundle",
        }
    }

    /// The form of this word.
    #[must_use]
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|form| form.word() == word)
    }

    /// Its file beside kernel and initramfs.
    #[must_use]
    pub fn file(self) -> Option<&'static str> {
        match self {
            Self::Split => None,
            Self::Uki => Some("layer0.efi"),
            Self::Efi => Some("layer0-kernel.efi"),
            Self::Iso => Some("layer0.iso"),
            Self::Usb => Some("layer0-usb.img"),
            Self::Bundle => Some("layer0-bundle.tar"),
        }
    }
}

/// What the forms are made with besides kernel and initramfs.
#[derive(Debug, Clone, Default)]
pub struct FormOptions {
    /// The kernel's command line.
    pub command_line: String,
    /// systemd's stub; [`STUB`] when absent.
    pub stub: Option<PathBuf>,
    /// Key and certificate (PEM) that sign EFI programs for Secure Boot.
    pub signer: Option<Signer>,
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
    /// The initramfs cannot be linked into a kernel that somebody else has built.
    #[error(
        "the form efi is linked from a kernel of ours, and {0} is not one: give --flavour virt or --flavour hw"
    )]
    NotOurs(String),
    /// The kernel does not link.
    #[error("cannot make layer0-kernel.efi")]
    Link(#[from] Box<SourceError>),
    /// A file system of the form cannot be written.
    #[error("cannot make the file system of {form}")]
    Fat {
        /// The form's file.
        form: &'static str,
        /// Why.
        #[source]
        source: FatError,
    },
    /// The command line cannot be given to the boot loader of disks and CDs.
    #[error("the command line cannot be given to isolinux and syslinux: {0}")]
    CommandLine(&'static str),
    /// A program refused.
    #[error("{program} failed: {said}")]
    Failed {
        /// Which.
        program: String,
        /// Its last words.
        said: String,
    },
}

/// The error for a file or program, with what installs it.
fn io_error(path: &Path, hint: &'static str) -> impl Fn(io::Error) -> FormError {
    let path = path.to_owned();
    move |source| FormError::Io { path: path.clone(), hint, source }
}

/// Runs a program to its end; its output.
fn run(command: &mut Command, hint: &'static str) -> Result<Output, FormError> {
    let program = command.get_program().to_owned();
    let output = command.output().map_err(io_error(program.as_ref(), hint))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = said.get(said.len().saturating_sub(8)..).unwrap_or_default();
    let program = program.to_string_lossy().into_owned();
    Err(FormError::Failed { program, said: last.join("; ") })
}

/// What forms are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ingredients<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: &'a [u8],
    /// The same before compression: one cpio, or several.
    pub(super) plain: &'a [u8],
    /// Where the kernel was built, if it is one of ours.
    pub(super) built: Option<&'a Path>,
    pub(super) version: &'a str,
    /// Seconds since 1970 that go where a form wants a date.
    pub(super) time: u32,
    pub(super) options: &'a FormOptions,
}

/// Makes these forms, but for the bundle, in the order of the enumeration. Programs that are signed hold the same bytes in all of them.
pub(super) fn make(
    forms: &BTreeSet<Form>,
    from: &Ingredients<'_>,
    shop: &Shop,
    notice: Notice<'_>,
) -> Result<Vec<Made>, BuildError> {
    let mut program: Option<Vec<u8>> = None;
    let mut made = Vec::new();
    for form in forms {
        let Some(name) = form.file() else { continue };
        // Made once, and not at all where nothing changed.
        let mut uki = || -> Result<Vec<u8>, BuildError> {
            if program.is_none() {
                program = Some(efi(from)?);
            }
            Ok(program.clone().unwrap_or_default())
        };
        made.push(match form {
            Form::Split | Form::Bundle => continue,
            Form::Uki => shop.file(name, &efi_key(Key::new(name), from), uki)?,
            Form::Efi => {
                shop.file(name, &linked_key(Key::new(name), from), || linked(from, notice))?
            }
            Form::Iso => {
                let key = iso::tools(efi_key(Key::new(name), from));
                shop.file(name, &key, || Ok(iso::make(from, &uki()?)?))?
            }
            Form::Usb => {
                let key = usb::tools(efi_key(Key::new(name), from));
                shop.file(name, &key, || Ok(usb::make(from, &uki()?)?))?
            }
        });
    }
    Ok(made)
}

fn stub(options: &FormOptions) -> &Path {
    options.stub.as_deref().unwrap_or(Path::new(STUB))
}

/// Everything that a unified kernel image depends on.
fn efi_key(key: Key, from: &Ingredients<'_>) -> Key {
    let Ingredients { kernel, initramfs, version, time, options, .. } = from;
    let words = format!("{version}\n{}\n{time}\n{}", kernel.release, options.command_line);
    let key = key
        .with("words", words.as_bytes())
        .with("kernel", &kernel.image)
        .with("initramfs", initramfs)
        .with_file("stub", stub(options));
    match &options.signer {
        Some(signer) => signer.key(key),
        None => key,
    }
}

/// The unified kernel image, signed where a key is given.
fn efi(from: &Ingredients<'_>) -> Result<Vec<u8>, BuildError> {
    let Ingredients { kernel, initramfs, version, time, options, .. } = from;
    let path = stub(options);
    let hint = ": apt-get install -y --no-install-recommends systemd-boot-efi, or give --stub FILE";
    let stub = fs::read(path).map_err(io_error(path, hint))?;
    let image = uki::assemble(&Parts {
        stub: &stub,
        kernel: &kernel.image,
        release: &kernel.release,
        initramfs,
        command_line: &options.command_line,
        os_release: &uki::os_release(version, &kernel.release),
    })
    .map_err(FormError::from)?;
    Ok(match &options.signer {
        Some(signer) => signer.sign(image, *time)?,
        None => image,
    })
}

/// Everything that a kernel with its initramfs inside depends on.
fn linked_key(key: Key, from: &Ingredients<'_>) -> Key {
    let built = from.built.map(|dir| dir.display().to_string()).unwrap_or_default();
    let words = format!("{built}\n{}\n{}", from.time, from.options.command_line);
    let key = key.with("words", words.as_bytes()).with("kernel", &from.kernel.image);
    let key = key.with("initramfs", from.plain);
    match &from.options.signer {
        Some(signer) => signer.key(key),
        None => key,
    }
}

/// A kernel with initramfs and command line inside, signed where a key is given. The archive in it is not compressed by itself: the kernel
/// is, as a whole.
fn linked(from: &Ingredients<'_>, notice: Notice<'_>) -> Result<Vec<u8>, BuildError> {
    let Ingredients { kernel, plain, built, time, options, .. } = from;
    let not_ours = || FormError::NotOurs(format!("{} ({})", kernel.release, kernel.flavour));
    let built = built.ok_or_else(not_ours)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let image = source::relink(built, plain, &options.command_line, jobs, notice)
        .map_err(|error| FormError::Link(Box::new(error)))?;
    Ok(match &options.signer {
        Some(signer) => signer.sign(image, *time)?,
        None => image,
    })
}

/// The configuration that syslinux and isolinux have in common. They have no quoting: a line is a value to its end.
fn boot_menu(command_line: &str, kernel: &str, initramfs: &str) -> Result<String, FormError> {
    /// Longest command line that the kernel takes on x86, with its NUL (arch/x86/include/asm/setup.h).
    const MOST: usize = 2047;
    if command_line.chars().any(char::is_control) {
        return Err(FormError::CommandLine(
            "it has a control character in it; it is one line of text",
        ));
    }
    if command_line.len() > MOST {
        return Err(FormError::CommandLine("it is longer than 2047 bytes"));
    }
    Ok(format!(
        "SERIAL 0 115200\nDEFAULT layer0\nPROMPT 0\nLABEL layer0\n  KERNEL {kernel}\n  INITRD {initramfs}\n  APPEND {command_line}\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_has_a_word_and_a_file_of_its_own() {
        let files: BTreeSet<_> = Form::ALL.iter().map(|form| form.file()).collect();
        assert_eq!(files.len(), Form::ALL.len());
        assert!(Form::ALL.iter().all(|form| Form::of(form.word()) == Some(*form)));
        assert_eq!(Form::of("floppy"), None);
    }

    #[test]
    fn a_boot_menu_is_one_entry_and_its_command_line_one_line() {
        let menu = boot_menu("console=ttyS0 panic=10", "/VMLINUZ", "/INITRD.IMG").unwrap();
        assert!(
            menu.ends_with("  INITRD /INITRD.IMG\n  APPEND console=ttyS0 panic=10\n"),
            "{menu}"
        );
        for wrong in ["a\nLABEL x", &"x".repeat(2048)] {
            assert!(boot_menu(wrong, "K", "I").is_err());
        }
    }

    #[test]
    fn a_program_that_fails_or_is_not_there_is_named() {
        let error = run(Command::new("sh").args(["-c", "echo no space >&2; exit 1"]), "");
        assert_eq!(error.unwrap_err().to_string(), "sh failed: no space");
        let error = run(&mut Command::new("/nowhere/xorriso"), ": install it").unwrap_err();
        assert_eq!(error.to_string(), "cannot use /nowhere/xorriso: install it");
    }
}
