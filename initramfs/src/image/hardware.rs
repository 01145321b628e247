//! Drivers and firmware of an image: which modules, by list, all of them, or what given machines need; and the files these ask for.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protocol::facts::NodeFacts;
use protocol::ids::Digest;
use protocol::layer0::FirmwareFile;

use super::{BuildError, Config};
use crate::Notice;
use crate::kernel::apt::{Apt, AptError};
use crate::kernel::deb::{self, Body, DebError};
use crate::kernel::{Kernel, KernelError};
use crate::modules::wanted::{Need, Pick, Wanted};
use crate::modules::{Selection, facts, firmware};
use crate::tree::Tree;

/// Most bytes of firmware that one package may hold.
const MAX_PACKAGE: u64 = 4 << 30;
/// Most names of lost devices in one error: a wrong kernel loses those of every node.
const MAX_NAMED: usize = 20;

/// What an image's modules and firmware are chosen by, beyond the lists.
#[derive(Debug, Clone, Default)]
pub struct Hardware {
    /// All modules the kernel has.
    pub all_modules: bool,
    /// Only the drivers that these machines need, beside the core.
    pub nodes: Option<Vec<NodeFacts>>,
    /// Where firmware is taken from, the first that has a file.
    pub firmware: Vec<FirmwareSource>,
    /// Look for newer firmware packages although some are in the cache.
    pub update: bool,
}

/// Where firmware is taken from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirmwareSource {
    /// A directory, laid out as `/lib/firmware`, or a whole system's tree.
    Dir(PathBuf),
    /// A Debian package's file.
    Deb(PathBuf),
    /// A package of Debian's archive.
    Package(String),
}

/// Chooses the modules.
pub(super) fn choose(
    kernel: &Kernel,
    config: &Config,
    notice: Notice<'_>,
) -> Result<Selection, BuildError> {
    let hardware = &config.hardware;
    let mut list = match &hardware.nodes {
        None => config.lists.list(&kernel.flavour)?,
        Some(_) => config.lists.core()?,
    };
    if hardware.all_modules {
        let (pick, reason) = (Pick::Path("**".to_owned()), "all were asked for".to_owned());
        list.push(Wanted { pick, need: Need::Optional, load: false, plain: false, reason });
    }
    if let Some(nodes) = &hardware.nodes {
        let choice = facts::choose(&kernel.catalogue, nodes);
        if !choice.losses.is_empty() {
            let more = choice.losses.len().saturating_sub(MAX_NAMED);
            let mut losses: Vec<_> =
                choice.losses.iter().take(MAX_NAMED).map(ToString::to_string).collect();
            losses.extend((more > 0).then(|| format!("and {more} more")));
            let (release, losses) = (kernel.release.clone(), losses.join("; "));
            return Err(BuildError::Losses { release, losses });
        }
        for device in choice.unserved {
            let text = device.to_string().replace("would lose its", "has no driver for its");
            notice(&format!("{text}: neither there nor in this kernel"));
        }
        notice(&format!("{} drivers for {} nodes", choice.wanted.len(), nodes.len()));
        list.extend(choice.wanted);
    }
    Ok(kernel.catalogue.select(&list)?)
}

/// Puts the firmware that the chosen modules ask for into the tree, and gives the report; empty where nothing was to be looked for.
pub(super) fn add_firmware(
    tree: &mut Tree,
    kernel: &Kernel,
    selection: &Selection,
    config: &Config,
    notice: Notice<'_>,
) -> Result<Vec<FirmwareFile>, BuildError> {
    let hardware = &config.hardware;
    if hardware.firmware.is_empty() {
        let files = firmware::asked(selection);
        if !files.is_empty() {
            notice(&format!(
                "modules may ask for {} firmware files, none is in the image (--firmware)",
                files.len()
            ));
        }
        return Ok(Vec::new());
    }
    let mut apt = None;
    let mut dirs = Vec::new();
    for source in &hardware.firmware {
        dirs.push(match source {
            FirmwareSource::Dir(dir) => dir.clone(),
            FirmwareSource::Deb(file) => of_file(file, &config.cache)?,
            FirmwareSource::Package(name) => of_package(name, &mut apt, config, notice)?,
        });
    }
    let reads = firmware::Reads::of(kernel.config.as_deref());
    let found = firmware::find(selection, &dirs, reads)?;
    let missing = found.report.iter().filter(|file| file.size.is_none()).count();
    let there = found.report.len() - missing;
    notice(&format!(
        "firmware: {there} of the files that modules ask for are there, {missing} not"
    ));
    for (path, bytes) in found.files {
        tree.file(&format!("{}/{path}", firmware::DIR), 0o644, bytes)?;
    }
    Ok(found.report)
}

fn of_file(file: &Path, cache: &Path) -> Result<PathBuf, BuildError> {
    let io = |source| BuildError::Io { path: file.to_owned(), source };
    let digest = Digest::of(&fs::read(file).map_err(io)?);
    let dir = cache.join(format!("firmware-{}", digest.hex()));
    if !dir.exists() {
        unpack(file, &dir, cache)?;
    }
    Ok(dir)
}

/// A package out of Debian's archive. With it in the cache, the network is not touched unless an update is asked for.
fn of_package(
    name: &str,
    apt: &mut Option<Apt>,
    config: &Config,
    notice: Notice<'_>,
) -> Result<PathBuf, BuildError> {
    let dir = config.cache.join(format!("firmware-{name}"));
    if dir.exists() && !config.hardware.update {
        return Ok(dir);
    }
    let kernel = |error: AptError| BuildError::Kernel(KernelError::Apt(error));
    if apt.is_none() {
        let mut fresh = Apt::new(&config.cache.join("apt")).map_err(kernel)?;
        notice("fetching the package lists");
        fresh.update().map_err(kernel)?;
        *apt = Some(fresh);
    }
    if let Some(apt) = apt {
        let package = apt.find(&[name.to_owned()]).map_err(|error| match error {
            AptError::Unknown { names: name, warnings } => {
                BuildError::FirmwarePackage { name, warnings }
            }
            other => kernel(other),
        })?;
        let fail = |source| BuildError::Io { path: config.cache.clone(), source };
        let work = tempfile::Builder::new().prefix("unpack-").tempdir_in(&config.cache);
        let work = work.map_err(fail)?;
        let file = apt.download(&package, work.path(), notice).map_err(kernel)?;
        unpack(&file, &dir, &config.cache)?;
    }
    Ok(dir)
}

/// Unpacks a package's firmware into `dir`, in one step.
fn unpack(file: &Path, dir: &Path, cache: &Path) -> Result<(), BuildError> {
    let fail = |source| BuildError::Io { path: cache.to_owned(), source };
    let work = tempfile::Builder::new().prefix("unpack-").tempdir_in(cache).map_err(fail)?;
    let tree = work.path().join("firmware");
    fs::create_dir(&tree).map_err(fail)?;
    let mut budget = MAX_PACKAGE;
    let mut links = Vec::new();
    let taken = deb::each(file, |path, size, body| {
        let too_large = || io::Error::new(io::ErrorKind::InvalidData, "it unpacks to too much");
        budget = budget.checked_sub(size).ok_or_else(too_large)?;
        let Some(below) = below_firmware(path) else { return Ok(()) };
        let to = tree.join(below);
        if let Some(parent) = to.parent().filter(|_| !matches!(body, Body::Other)) {
            fs::create_dir_all(parent)?;
        }
        match body {
            Body::File(bytes) => io::copy(bytes, &mut fs::File::create(&to)?).map(drop),
            Body::Link(target) => {
                links.push((target, to));
                Ok(())
            }
            Body::Other => Ok(()),
        }
    });
    taken.map_err(|error: DebError| BuildError::Kernel(KernelError::Deb(error)))?;
    // After all files and directories: nothing is written through a link. Where they lead is looked at when they are read.
    for (target, link) in links {
        std::os::unix::fs::symlink(target, link).map_err(fail)?;
    }
    if dir.exists() {
        fs::remove_dir_all(dir).map_err(fail)?;
    }
    fs::rename(&tree, dir).map_err(fail)
}

/// The path below `lib/firmware`, of what lies there.
fn below_firmware(path: &Path) -> Option<PathBuf> {
    let path = path.strip_prefix(".").unwrap_or(path);
    let path = path.strip_prefix("usr").unwrap_or(path).strip_prefix(firmware::DIR).ok()?;
    let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    (plain && !path.as_os_str().is_empty()).then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_in_lib_firmware_is_taken_of_a_package() {
        let below = |path: &str| below_firmware(Path::new(path));
        assert_eq!(below("./lib/firmware/e100/x.bin"), Some("e100/x.bin".into()));
        assert_eq!(below("./usr/lib/firmware/x"), Some("x".into()));
        for path in ["./lib/firmware/", "./usr/share/doc/x", "./lib/firmware/../../x"] {
            assert_eq!(below(path), None, "{path}");
        }
    }
}
