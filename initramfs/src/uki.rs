//! A unified kernel image: one EFI program that holds kernel, initramfs, command line and what they are (UAPI Group
//! Specification "Unified Kernel Image"). Pure.
//!
//! The program in front is systemd's stub, `linuxx64.efi.stub`; it hands the parts to the kernel. Under Secure Boot it takes no
//! other command line than the one in the image.

use crate::pe::{self, PeError};

/// What goes into an image.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// systemd's stub.
    pub stub: &'a [u8],
    /// The kernel, a bzImage.
    pub kernel: &'a [u8],
    /// Its release, `uname -r`.
    pub release: &'a str,
    /// The initramfs, compressed or not.
    pub initramfs: &'a [u8],
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Text in the form of os-release(5): boot menus show its PRETTY_NAME.
    pub os_release: &'a str,
}

/// Why there is no unified kernel image.
#[derive(Debug, thiserror::Error)]
pub enum UkiError {
    /// The stub cannot be added to.
    #[error("the stub cannot be used")]
    Stub(#[from] PeError),
    /// A command line that the stub would cut or mangle.
    #[error("the command line has a control character in it; it is one line of text")]
    CommandLine,
}

/// Puts an image together. The kernel is the last section, so that it may grow into what follows when it is loaded.
///
/// # Errors
/// The stub is no EFI program, is signed or full, or the command line is not one line.
pub fn assemble(parts: &Parts<'_>) -> Result<Vec<u8>, UkiError> {
    if parts.command_line.chars().any(char::is_control) {
        return Err(UkiError::CommandLine);
    }
    // A zero ends the text: without it old stubs read on into the padding.
    let command_line = [parts.command_line.as_bytes(), b"\0"].concat();
    Ok(pe::append(
        parts.stub,
        &[
            (".osrel", parts.os_release.as_bytes()),
            (".cmdline", &command_line),
            (".uname", parts.release.as_bytes()),
            (".initrd", parts.initramfs),
            (".linux", parts.kernel),
        ],
    )?)
}

/// What an image says of itself in os-release(5)'s form.
#[must_use]
pub fn os_release(version: &str, kernel: &str) -> String {
    // Versions and releases are words of letters, digits and `._+~-`: nothing that os-release would have to quote.
    format!(
        "ID=layercake\nNAME=\"Layercake\"\nPRETTY_NAME=\"Layercake Layer0 {version} ({kernel})\"\nVERSION_ID={version}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts<'a>(stub: &'a [u8], command_line: &'a str) -> Parts<'a> {
        let os_release = "ID=layercake\n";
        let (kernel, initramfs) = (b"kernel".as_slice(), b"initramfs".as_slice());
        Parts { stub, kernel, release: "6.12.1", initramfs, command_line, os_release }
    }

    #[test]
    fn every_part_is_in_its_section_and_the_kernel_last() {
        let stub = pe::fake();
        let image = assemble(&parts(&stub, "console=ttyS0")).unwrap();
        let sections = pe::sections(&image).unwrap();
        let contents = |name: &str| {
            let section = sections.iter().find(|it| it.name == name).unwrap();
            section.contents(&image).unwrap().to_vec()
        };
        assert_eq!(contents(".cmdline"), b"console=ttyS0\0");
        assert_eq!(contents(".uname"), b"6.12.1");
        assert_eq!(contents(".initrd"), b"initramfs");
        assert_eq!(contents(".linux"), b"kernel");
        assert_eq!(sections.last().unwrap().name, ".linux");
    }

    #[test]
    fn a_command_line_of_two_lines_is_refused() {
        let stub = pe::fake();
        assert!(matches!(assemble(&parts(&stub, "a\nb")), Err(UkiError::CommandLine)));
        assert!(matches!(assemble(&parts(b"x", "a")), Err(UkiError::Stub(_))));
    }
}
