//! Options of `cargo xtask build-image` for kernels that are not ours, their drivers and firmware.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args as ClapArgs;
use initramfs::image::hardware::{FirmwareSource, Hardware};
use initramfs::kernel::Source;
use protocol::facts;
use protocol::layer0::Manifest;

/// Which kernel, drivers and firmware.
#[derive(Debug, Clone, Default, ClapArgs)]
pub(crate) struct HardwareArgs {
    /// Of Debian's kernels, the one whose version begins so: 6.1 is the oldest that is tested
    #[arg(long, value_name = "VERSION", conflicts_with_all = ["kernel", "kernel_package", "kernel_installed"])]
    kernel_version: Option<String>,
    /// Use the kernel in this package file, .deb or .rpm (repeatable, where modules come in packages of their own)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "flavour", "kernel_installed"])]
    kernel_package: Vec<PathBuf>,
    /// Use a kernel that is installed (/boot/vmlinuz-RELEASE): this one, or else the running one, or else the only one
    #[arg(long, value_name = "RELEASE", num_args = 0..=1, conflicts_with_all = ["kernel", "flavour"])]
    kernel_installed: Option<Option<String>>,
    /// Where it is installed
    #[arg(long, value_name = "DIR", default_value = "/", requires = "kernel_installed")]
    root: PathBuf,
    /// Put in all modules the kernel has
    #[arg(long, conflicts_with = "facts")]
    modules_all: bool,
    /// Put in only the drivers that these machines need: what `layercake node facts all --json` printed (repeatable).
    /// Fails when one of them would lose a NIC or a disk
    #[arg(long = "for", value_name = "FACTS")]
    facts: Vec<PathBuf>,
    /// Put in the firmware that the modules ask for, from here (repeatable, the first that has a file): a directory such as
    /// /lib/firmware, a .deb file, or the name of a Debian package
    #[arg(long, value_name = "DIR|FILE|PACKAGE")]
    firmware: Vec<String>,
}

impl HardwareArgs {
    /// Whether another kernel than a flavour's is asked for.
    pub(crate) fn has_kernel(&self) -> bool {
        !self.kernel_package.is_empty() || self.kernel_installed.is_some()
    }

    /// Where the kernel comes from, if it is not ours.
    pub(super) fn source(&self, flavour: &str, packages: Vec<String>, update: bool) -> Source {
        if let Some(release) = &self.kernel_installed {
            let own = self.root == Path::new("/");
            let running = fs::read_to_string("/proc/sys/kernel/osrelease").ok().filter(|_| own);
            let running = running.map(|release| release.trim().to_owned());
            return Source::Installed {
                root: self.root.clone(),
                release: release.clone(),
                running,
            };
        }
        if !self.kernel_package.is_empty() {
            return Source::PackageFiles(self.kernel_package.clone());
        }
        let (flavour, version) = (flavour.to_owned(), self.kernel_version.clone());
        Source::Package { flavour, packages, version, update }
    }

    /// What drivers and firmware are chosen by.
    ///
    /// # Errors
    /// A file of facts cannot be read.
    pub(super) fn read(&self, update: bool) -> anyhow::Result<Hardware> {
        let mut nodes = Vec::new();
        for file in &self.facts {
            let context = || format!("cannot use the facts in {}", file.display());
            let text = fs::read_to_string(file).with_context(context)?;
            nodes.extend(facts::parse(&text).with_context(context)?);
        }
        anyhow::ensure!(self.facts.is_empty() || !nodes.is_empty(), "the facts are of no node");
        Ok(Hardware {
            all_modules: self.modules_all,
            nodes: (!self.facts.is_empty()).then_some(nodes),
            firmware: self.firmware.iter().map(|text| firmware_source(text)).collect(),
            update,
        })
    }
}

fn firmware_source(text: &str) -> FirmwareSource {
    let path = PathBuf::from(text);
    if path.is_dir() || (text.contains('/') && !text.ends_with(".deb")) {
        FirmwareSource::Dir(path)
    } else if text.ends_with(".deb") {
        FirmwareSource::Deb(path)
    } else {
        FirmwareSource::Package(text.to_owned())
    }
}

/// What the kernel lacks, and which module asks for which firmware.
pub(super) fn table(manifest: &Manifest) -> String {
    let mut text = String::new();
    for lack in &manifest.lacks {
        text.push_str(&format!("lacks          {lack}\n"));
    }
    for file in &manifest.firmware {
        let size = file.size.map_or("missing".to_owned(), |size| size.to_string());
        let modules = file.modules.join(", ");
        text.push_str(&format!("{:<14} {size:>11}  {} (for {modules})\n", "firmware", file.file));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_comes_from_directories_files_and_packages() {
        let package = FirmwareSource::Package("firmware-bnx2x".to_owned());
        assert_eq!(firmware_source("firmware-bnx2x"), package);
        assert_eq!(firmware_source("/no/such/dir"), FirmwareSource::Dir("/no/such/dir".into()));
        assert_eq!(firmware_source("fw.deb"), FirmwareSource::Deb("fw.deb".into()));
        assert_eq!(firmware_source("/"), FirmwareSource::Dir("/".into()));
    }
}
