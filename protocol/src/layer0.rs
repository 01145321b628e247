//! `manifest.json` of a built Layer0: what the files are and what they were made of; and what is said of a Layer0 by its digest,
//! which is that of its manifest: where its files lie on a boot server, and the command line that a kexec into it gets.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::boot_args::MAX_COMMAND_LINE;
use crate::ids::Digest;
use crate::signature::PublicKey;

/// The kernel's file.
pub const KERNEL: &str = "vmlinuz";
/// The initramfs's file.
pub const INITRAMFS: &str = "initramfs.img";
/// The agent's file, the same as `/init` in the initramfs.
pub const AGENT: &str = "layercake-agent";
/// The manifest's file.
pub const MANIFEST: &str = "manifest.json";
/// A detached signature over the manifest's bytes: ECDSA P-256 with SHA-256, DER in base64 (`cosign sign-blob`, `openssl dgst`).
pub const SIGNATURE: &str = "manifest.json.sig";
/// What the name of a site's archive has behind it, for the file with its signature: over [`archive_statement`], in the same form.
pub const SIGNATURE_SUFFIX: &str = ".sig";
/// Largest manifest that is read, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 1 << 20;
/// Largest signature file that is read, in bytes.
pub const MAX_SIGNATURE_BYTES: u64 = 4096;
/// Largest artifact that is fetched or stored, in bytes.
pub const MAX_ARTIFACT_BYTES: u64 = 1 << 30;

/// Where a file of the Layer0 with this digest lies on a boot server: a path.
#[must_use]
pub fn path(digest: &Digest, file: &str) -> String {
    format!("/boot/layer0/{}/{file}", digest.hex())
}

/// What a [`SIGNATURE`] file holds for this signature in DER.
#[must_use]
pub fn signature_text(der: &[u8]) -> String {
    STANDARD.encode(der) + "\n"
}

/// What is signed of a site's archive: a line with its digest, as the archive itself may be large.
#[must_use]
pub fn archive_statement(digest: &Digest) -> String {
    format!("layercake overlay {digest}\n")
}

/// The first of these keys that made this signature ([`SIGNATURE`]) over these bytes: a manifest's, or an archive's statement.
#[must_use]
pub fn signer<'k>(signed: &[u8], signature: &[u8], keys: &'k [PublicKey]) -> Option<&'k PublicKey> {
    let der = STANDARD.decode(signature.trim_ascii()).ok()?;
    keys.iter().find(|key| key.verifies(signed, &der))
}

/// The command line for a kexec into the Layer0 with this digest: the present one, which says how this node reaches its network,
/// without what a boot loader put there for itself.
///
/// # Errors
/// Its length in bytes, when that is more than a kernel reads.
pub fn kexec_command_line(present: &str, digest: &Digest) -> Result<String, usize> {
    let mut quoted = false;
    let words = present.split(|c: char| {
        quoted ^= c == '"';
        c.is_whitespace() && !quoted
    });
    let stale = ["initrd=", "BOOT_IMAGE=", "layercake.layer0=", "layercake.kexec"];
    let kept = |word: &&str| !word.is_empty() && !stale.iter().any(|key| word.starts_with(key));
    let digest = format!("layercake.layer0={digest}");
    let mut words: Vec<&str> = words.filter(kept).collect();
    // What stands behind `--` is init's.
    let end = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    words.splice(end..end, ["layercake.kexec", &digest]);
    let line = words.join(" ");
    // The kernel wants room for the byte that ends it.
    if line.len() < MAX_COMMAND_LINE { Ok(line) } else { Err(line.len()) }
}

/// A file of a Layer0 build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// File name beside the manifest.
    pub name: String,
    /// Its sha256.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// Something the operator gave to a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// The option of `cargo xtask build-image` that it was given by, without the dashes: `overlay`.
    pub option: String,
    /// sha256 of what it put into the image.
    pub digest: Digest,
}

/// What a Layer0 was built from besides agent and kernel, as far as the files alone do not tell: `cargo xtask verify-image` builds the
/// same again. No path is in it, so the same inputs give the same manifest wherever they lie.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Inputs {
    /// Forms that were asked for, by their words: `uki`, `iso`.
    pub forms: Vec<String>,
    /// Kernel command line of the forms that carry one.
    pub command_line: String,
    /// How the initramfs is compressed: `zstd:18`.
    pub compression: String,
    /// Lists of modules that were added.
    pub with: Vec<String>,
    /// Time of last change of everything in it, in seconds since 1970.
    pub mtime: u32,
    /// What the operator gave, in the order in which it was added.
    pub files: Vec<Input>,
}

/// A firmware file that modules ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareFile {
    /// Its path below `/lib/firmware`, or the pattern a module has instead.
    pub file: String,
    /// The modules that ask for it.
    pub modules: Vec<String>,
    /// Its size in the image in bytes; none where it was not found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// `manifest.json`. The same inputs give the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `layer0`.
    pub name: String,
    /// Version of Layercake that built it.
    pub version: String,
    /// The kernel's release, `6.12.117+deb12-cloud-amd64`.
    pub kernel: String,
    /// Where the kernel came from: package name, version and sha256 of the package, or, for a kernel given as a file,
    /// its file name and sha256.
    pub kernel_source: String,
    /// `cloud`, `generic` or `custom`.
    pub flavour: String,
    /// Version of the agent in it.
    pub agent: String,
    /// sha256 of the agent binary.
    pub agent_digest: Digest,
    /// Modules in the initramfs, by the kernel's name, sorted.
    pub modules: Vec<String>,
    /// What this kernel lacks that Layer0 can do without, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lacks: Vec<String>,
    /// The firmware that these modules ask for, where the build was given any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub firmware: Vec<FirmwareFile>,
    /// The files: `vmlinuz`, `initramfs.img` and `layercake-agent`, and of the forms that were asked for `layer0.efi` (UKI), `layer0-kernel.efi` (the
    /// initramfs inside the kernel), `layer0.iso` and `layer0-usb.img`. The bundle holds the manifest and is not in it.
    pub artifacts: Vec<Artifact>,
    /// What else it was built from; absent in manifests of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs: Option<Inputs>,
}

/// What an update reads of a manifest; the rest may be of another version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Contents {
    /// The files.
    pub artifacts: Vec<Artifact>,
}

impl Contents {
    /// The file of this name.
    #[must_use]
    pub fn artifact(&self, name: &str) -> Option<&Artifact> {
        self.artifacts.iter().find(|artifact| artifact.name == name)
    }
}

/// Feeds bytes to the reading of manifests and command lines, as a fuzzer does: it must not panic.
pub fn fuzz_layer0(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Manifest>(bytes);
    let _ = serde_json::from_slice::<Contents>(bytes);
    let _ = kexec_command_line(&String::from_utf8_lossy(bytes), &Digest::of(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot_args::BootArgs;

    #[track_caller]
    fn check(present: &str, expected: &str) {
        let digest = Digest::of(b"b");
        let expected = expected.replace('@', &format!("layercake.kexec layercake.layer0={digest}"));
        assert_eq!(kexec_command_line(present, &digest).expect("short"), expected);
    }

    #[test]
    fn a_kexec_keeps_the_command_line_but_for_what_is_stale() {
        check("", "@");
        check("console=ttyS0  ip=dhcp\n", "console=ttyS0 ip=dhcp @");
        check("BOOT_IMAGE=/vmlinuz initrd=initramfs.img layercake.node=n1", "layercake.node=n1 @");
        check("x=\"a initrd=1 b\" quiet", "x=\"a initrd=1 b\" quiet @");
        check("quiet -- single", "quiet @ -- single");
        let digest = Digest::of(b"a");
        check(&format!("layercake.kexec quiet layercake.layer0={digest}"), "quiet @");
    }

    #[test]
    fn the_next_kernel_reads_what_it_is_and_how_it_came() {
        let digest = Digest::of(b"b");
        let line = kexec_command_line("layercake.node=n1", &digest).expect("short");
        let args = BootArgs::parse(&line);
        assert_eq!((args.layer0, args.kexec, args.problems), (Some(digest), true, vec![]));
    }

    #[test]
    fn a_command_line_that_no_kernel_reads_whole_is_refused() {
        // What is added has 105 bytes.
        let long = "x".repeat(MAX_COMMAND_LINE - 105);
        assert_eq!(kexec_command_line(&long, &Digest::of(b"b")), Err(2048));
        let fits = "x".repeat(MAX_COMMAND_LINE - 106);
        assert_eq!(kexec_command_line(&fits, &Digest::of(b"b")).map(|line| line.len()), Ok(2047));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(0_u8.., 0..300)) {
            fuzz_layer0(&bytes);
        }

        #[test]
        fn whatever_stood_there_the_digest_is_found(line in "[ -~]{0,200}") {
            // An open quote takes in what follows it, for every kernel.
            let line = line.replace(['"', '-'], "");
            let digest = Digest::of(line.as_bytes());
            let next = kexec_command_line(&line, &digest).expect("short");
            proptest::prop_assert_eq!(BootArgs::parse(&next).layer0, Some(digest));
        }
    }
}
