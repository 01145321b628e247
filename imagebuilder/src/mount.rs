//! Mount forms: an image's layers as one read-only file system, made by mkfs.erofs(1) or mksquashfs(1) with everything
//! fixed that they would take from the machine: the same layers give the same bytes. Needs no root.
//!
//! ```text
//! layers --flatten--> one tar --tar(1)--> a directory --mkfs.erofs | mksquashfs--> the file system
//!                                 (in a user namespace unless root)
//! ```
//! (mkfs.erofs 1.5 reads no tar, and mksquashfs 4.5 dates the root of what it reads from one by its own clock.)
//! Not here: mounting, which is the node's, and how such a form stands in an index ([`protocol::oci::mount`]).

mod flatten;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::str::FromStr;

use protocol::ids::Name;
use protocol::oci::mount::{MountEntry, MountForm};
use protocol::oci::{self, Descriptor, MEDIA_MANIFEST};
use serde::{Deserialize, Serialize};

use self::flatten::Flat;
use crate::blob::BlobDir;
use crate::description::EPOCH_VARIABLE;

/// Identifies the file system itself; what it holds is identified by its digest.
const UUID: &str = "00000000-0000-0000-0000-000000000000";
/// Later than any file: mkfs.erofs cuts times at SOURCE_DATE_EPOCH, and these are the layers' own already.
const NO_CUT: &str = "9999999999";
/// Lines of a tool's own words that an error repeats.
const LAST_WORDS: usize = 5;
/// Unpacks the tar on stdin to $1 and runs the rest, which makes a file system of it; leaves nothing of $1 that only a user
/// namespace's root could remove.
const SCRIPT: &str = "set -e; tree=$1; shift; trap 'rm -rf \"$tree\"' EXIT; \
    tar --extract --preserve-permissions --same-owner --numeric-owner --delay-directory-restore \
    --xattrs --xattrs-include='*' --directory \"$tree\" --file -; \"$@\"";

/// How an image is made into a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountKind {
    /// EROFS, lz4hc: read fastest of those that are compressed.
    Erofs,
    /// EROFS without compression.
    ErofsPlain,
    /// squashfs, zstd: the fewest bytes.
    Squashfs,
}

/// A text that is no [`MountKind`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a mount form; expected erofs, erofs-plain or squashfs")]
pub struct InvalidMountKind {
    text: String,
}

impl FromStr for MountKind {
    type Err = InvalidMountKind;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "erofs" => Ok(Self::Erofs),
            "erofs-plain" => Ok(Self::ErofsPlain),
            "squashfs" => Ok(Self::Squashfs),
            _ => Err(InvalidMountKind { text: text.to_owned() }),
        }
    }
}

impl MountKind {
    /// The file system. An image has at most one of each.
    #[must_use]
    pub fn form(self) -> MountForm {
        match self {
            Self::Erofs | Self::ErofsPlain => MountForm::Erofs,
            Self::Squashfs => MountForm::Squashfs,
        }
    }
}

/// Why no mount form was made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A tool is not there.
    #[error("{program} cannot be run; install it: apt-get install {package}")]
    Missing {
        /// The tool.
        program: &'static str,
        /// Debian's package that has it.
        package: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error("{program} failed: {words}")]
    Failed {
        /// The tool.
        program: &'static str,
        /// Its last words.
        words: String,
    },
    /// The layers cannot be read as one tree.
    #[error("its layers cannot be put together")]
    Layers(#[source] io::Error),
    /// A file cannot be read or written.
    #[error("cannot keep the {form}")]
    Io {
        /// Which file system.
        form: MountForm,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A document cannot be written as JSON.
    #[error("cannot write JSON")]
    Json(#[from] serde_json::Error),
    /// The image's manifest cannot be read.
    #[error("its manifest")]
    Manifest(#[source] oci::OciError),
}

/// Makes the mount forms of an image whose blobs are in `blobs`; returns their entries of the index. `image` is the image's
/// own entry.
pub(crate) fn entries(
    kinds: &[MountKind],
    name: &Name,
    image: &Descriptor,
    epoch: u64,
    blobs: &BlobDir,
) -> Result<Vec<Descriptor>, MountError> {
    let Some(platform) = image.platform.as_ref().filter(|_| !kinds.is_empty()) else {
        return Ok(Vec::new());
    };
    let manifest = std::fs::read(blobs.path(&image.digest)).map_err(MountError::Layers)?;
    let manifest = oci::parse_manifest(&manifest).map_err(MountError::Manifest)?;
    let layers = manifest.layers.iter().map(|layer| blobs.path(&layer.digest)).collect();
    let flat = Flat::of(layers).map_err(MountError::Layers)?;
    let mut entries = Vec::new();
    for kind in kinds {
        let form = kind.form();
        let io = |source| MountError::Io { form, source };
        let scratch = tempfile::tempdir().map_err(io)?;
        let out = scratch.path().join("filesystem");
        make(*kind, &flat, epoch, &out)?;
        let mut blob = blobs.writer().map_err(io)?;
        io::copy(&mut File::open(&out).map_err(io)?, &mut blob).map_err(io)?;
        let (digest, size) = blob.finish().map_err(io)?;
        let blob = Descriptor { digest, size, ..Descriptor::of(form.media_type(), b"") };
        let annotations =
            MountEntry::annotations(name, form, &platform.architecture, &image.digest);
        let manifest = MountEntry::new_manifest(blob, annotations.clone());
        let mut entry = blobs.put(MEDIA_MANIFEST, &serde_json::to_vec(&manifest)?).map_err(io)?;
        entry.annotations = annotations;
        entries.push(entry);
    }
    Ok(entries)
}

/// A tool with its options, for the directory `tree`.
fn tool(kind: MountKind, epoch: u64, tree: &Path, out: &Path) -> (&'static str, Vec<OsString>) {
    let (tree, out) = (tree.as_os_str().to_owned(), out.as_os_str().to_owned());
    // squashfs holds 32 bits of seconds.
    let epoch = u32::try_from(epoch).unwrap_or(u32::MAX).to_string();
    // Of the inodes of EROFS only whole ones hold times.
    let erofs = ["-d0", "-U", UUID, "-Eforce-inode-extended"];
    let (program, options, paths): (_, Vec<&str>, _) = match kind {
        MountKind::ErofsPlain => ("mkfs.erofs", erofs.to_vec(), [out, tree]),
        MountKind::Erofs => {
            ("mkfs.erofs", [&erofs[..], &["-zlz4hc,12", "-C65536"]].concat(), [out, tree])
        }
        MountKind::Squashfs => {
            let quiet = ["-noappend", "-no-progress", "-quiet"];
            let fixed = ["-reproducible", "-no-exports", "-xattrs", "-mkfs-time", &epoch];
            let zstd = ["-comp", "zstd", "-Xcompression-level", "15", "-b", "131072"];
            ("mksquashfs", [&quiet[..], &fixed, &zstd].concat(), [tree, out])
        }
    };
    let options = options.into_iter().map(OsString::from);
    let args = match kind.form() {
        MountForm::Erofs => options.chain(paths).collect(),
        MountForm::Squashfs => paths.into_iter().chain(options).collect(),
    };
    (program, args)
}

/// Makes the file system `out`.
fn make(kind: MountKind, flat: &Flat, epoch: u64, out: &Path) -> Result<(), MountError> {
    let tree =
        tempfile::tempdir().map_err(|source| MountError::Io { form: kind.form(), source })?;
    let (program, args) = tool(kind, epoch, tree.path(), out);
    let package = match kind.form() {
        MountForm::Erofs => "erofs-utils",
        MountForm::Squashfs => "squashfs-tools",
    };
    let mut there = Command::new(program);
    there.arg("--help").stdout(Stdio::null()).stderr(Stdio::null());
    there.status().map_err(|source| MountError::Missing { program, package, source })?;
    let mut command = Command::new("env");
    if !rustix::process::geteuid().is_root() {
        // Owners that only root can give: in a namespace where we are root, with the ids of /etc/subuid.
        command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--map-auto", "--"]);
    }
    command.args(["sh", "-c", SCRIPT, "sh"]).arg(tree.path()).arg(program).args(args);
    match kind.form() {
        MountForm::Erofs => command.env(EPOCH_VARIABLE, NO_CUT),
        // It takes the variable or the option, not both.
        MountForm::Squashfs => command.env_remove(EPOCH_VARIABLE),
    };
    feed(command, program, |input| flat.write(input))
}

/// Runs a command with the tar on its stdin.
fn feed(
    mut command: Command,
    program: &'static str,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), MountError> {
    command.env("LC_ALL", "C").env("TZ", "UTC");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let failed = |error: io::Error| MountError::Failed { program, words: error.to_string() };
    let mut child = command.spawn().map_err(failed)?;
    let (input, errors) = (child.stdin.take(), child.stderr.take());
    let (written, words) = std::thread::scope(|scope| {
        let words = scope.spawn(move || errors.map(io::read_to_string));
        let written = input.map_or(Ok(()), |input| {
            let mut input = io::BufWriter::with_capacity(1 << 20, input);
            write(&mut input).and_then(|()| input.flush())
        });
        (written, words.join().ok().flatten().and_then(Result::ok).unwrap_or_default())
    });
    let status = child.wait().map_err(failed)?;
    if !status.success() {
        let last: Vec<&str> = words.lines().rev().take(LAST_WORDS).collect();
        let words = last.into_iter().rev().collect::<Vec<_>>().join("; ");
        let words = if words.is_empty() { status.to_string() } else { words };
        return Err(MountError::Failed { program, words });
    }
    written.map_err(MountError::Layers)
}

#[cfg(test)]
mod tests;
