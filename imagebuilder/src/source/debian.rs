//! A root filesystem of Debian packages, made by mmdebstrap: one layer, the same for the same packages and
//! SOURCE_DATE_EPOCH. It needs no root: mmdebstrap chooses user namespaces or whatever else works.
//!
//! Packages come from the image's `mirrors`; without any from this machine's apt sources where they have the suite, else
//! from where mmdebstrap takes them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{SourceError, io_error, wrong};
use crate::blob::BlobDir;
use crate::description::{EPOCH_VARIABLE, ImageSource};
use crate::layer::{self, Layer, LayerWriter};

/// Where apt's sources stand.
const APT: &str = "/etc/apt";

/// Whether a text can be a suite or a codename: `bookworm`, `trixie-backports`.
pub(super) fn is_suite(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric()) && text.bytes().all(inner)
}

/// Whether a text names a package as apt takes it: `systemd-sysv`, `libc6:arm64`, `bash=5.2*`, `dbus/bookworm`.
pub(crate) fn is_package(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"+-.:~=/*_".contains(&b);
    text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        && text.bytes().all(inner)
}

/// Whether a text is a mirror that mmdebstrap takes: a URL, a `deb` line or the path of a file.
pub(crate) fn is_mirror(text: &str) -> bool {
    let known = ["deb ", "http://", "https://", "file://", "copy://", "/"];
    !text.contains(['\n', '\0']) && known.iter().any(|begin| text.starts_with(begin))
}

pub(super) fn content(
    suite: &str,
    image: &ImageSource,
    epoch: u64,
    blobs: &BlobDir,
) -> Result<Layer, SourceError> {
    let name = PathBuf::from(format!("debian:{suite}"));
    let dir = tempfile::tempdir().map_err(io_error("cannot make a directory for", &name))?;
    let tar = dir.path().join("root.tar");
    let mut command = Command::new("mmdebstrap");
    command.args(arguments(suite, image)).arg(suite).arg(&tar).args(mirrors(suite, image));
    command.env(EPOCH_VARIABLE, epoch.to_string()).stdin(Stdio::null());
    // Its own words go where ours go; on stdout there are results.
    let output =
        command.stdout(Stdio::null()).stderr(Stdio::piped()).output().map_err(|error| {
            wrong(
                &name,
                format!("mmdebstrap cannot be run: {error}; install the package mmdebstrap"),
            )
        })?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let last: Vec<&str> = words.lines().rev().take(5).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        return Err(wrong(&name, format!("mmdebstrap failed: {}", last.join("; "))));
    }
    let mut layer = LayerWriter::new(blobs, image.compression, image.compression_level)
        .map_err(io_error("cannot start the layer of", &name))?;
    let file = File::open(&tar).map_err(io_error("cannot read", &tar))?;
    layer::copy_checked(&name, file, &mut layer)?;
    layer.finish().map_err(io_error("cannot finish the layer of", &name))
}

fn arguments(suite: &str, image: &ImageSource) -> Vec<String> {
    let variant = image.variant.as_deref().unwrap_or("minbase");
    let mut arguments = vec![
        "--quiet".to_owned(),
        "--format=tar".to_owned(),
        format!("--variant={variant}"),
        format!("--architectures={}", image.architecture()),
    ];
    // mmdebstrap leaves the names of the machine that it runs on: a node brings its own.
    for file in ["hostname", "resolv.conf"] {
        arguments.push(format!("--extract-hook=rm -f \"$1/etc/{file}\""));
    }
    // mmdebstrap parts them by commas or blanks, neither of which a name has.
    for package in &image.packages {
        arguments.push(format!("--include={package}"));
    }
    debug_assert!(is_suite(suite));
    arguments
}

fn mirrors(suite: &str, image: &ImageSource) -> Vec<OsString> {
    if !image.mirrors.is_empty() {
        return image.mirrors.iter().map(OsString::from).collect();
    }
    let mut files = vec![Path::new(APT).join("sources.list")];
    if let Ok(more) = fs::read_dir(Path::new(APT).join("sources.list.d")) {
        files.extend(more.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let known = files.into_iter().filter(|file| {
        let name = file.extension().is_some_and(|end| end == "list" || end == "sources");
        name && fs::read_to_string(file).is_ok_and(|text| has_suite(&text, suite))
    });
    known.map(PathBuf::into_os_string).collect()
}

/// Whether apt's sources, in either form, have this very suite.
fn has_suite(text: &str, suite: &str) -> bool {
    text.lines().map(str::trim).any(|line| {
        let line_form = line.starts_with("deb ");
        let deb822 = line.to_ascii_lowercase().starts_with("suites:");
        (line_form || deb822) && line.split_ascii_whitespace().any(|word| word == suite)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_options_and_lists() {
        for good in ["systemd-sysv", "g++", "libc6:amd64", "bash=5.2*", "0ad", "a/b"] {
            assert!(is_package(good), "{good}");
        }
        for bad in ["", "-x", "--include", "a,b", "a b", "A", "a;b", "?essential"] {
            assert!(!is_package(bad), "{bad}");
        }
        assert!(is_suite("bookworm") && is_suite("trixie-backports"));
        assert!(!is_suite("") && !is_suite("-x") && !is_suite("a b") && !is_suite("../a"));
        assert!(is_mirror("http://deb.debian.org/debian") && is_mirror("/etc/apt/sources.list"));
        assert!(!is_mirror("--variant=x") && !is_mirror("deb x\ny") && !is_mirror("-"));
    }

    #[test]
    fn apts_sources_are_used_where_they_have_the_suite() {
        let deb822 = "Types: deb\nURIs: http://m/debian\nSuites: bookworm bookworm-updates\n";
        let lines =
            "# deb http://m/debian trixie main\ndeb [arch=amd64] http://m/debian sid main\n";
        for (text, suite, expected) in [
            (deb822, "bookworm", true),
            (deb822, "bookworm-updates", true),
            (deb822, "book", false),
            (deb822, "deb", false),
            (lines, "sid", true),
            (lines, "trixie", false),
        ] {
            assert_eq!(has_suite(text, suite), expected, "{suite}");
        }
    }
}
