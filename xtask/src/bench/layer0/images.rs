//! What boots: an initramfs of each contestant, with the probe in a second archive behind it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use initramfs::archive;
use initramfs::compress::Compression;
use initramfs::kernel::{self, Kernel, Source};
use initramfs::modules::wanted::{self, Lists};
use initramfs::modules::{Catalogue, files};
use initramfs::tree::Tree;

use super::size;
use crate::build_image::{self, Flavour, Format, root, target_dir};
use crate::children::{STATIC_TARGET, run, static_build};

/// The modules that the floor loads, with what they need: without them a QEMU node has no network.
const FLOOR_MODULES: [&str; 2] = ["virtio_pci", "virtio_net"];

/// Of the forms that carry one.
const COMMAND_LINE: &str = "console=tty0 console=ttyS0,115200 panic=10";

/// Who boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Contestant {
    /// Modules and DHCP, nothing else.
    Floor,
    /// The same with the kernel of our own, which has no modules.
    OwnFloor,
    /// Layer0 with Debian's cloud kernel.
    Ours,
    /// Layer0 with the kernel of our own.
    OwnKernel,
    /// initramfs-tools, MODULES=netboot.
    InitramfsTools,
    /// dracut with its network module.
    Dracut,
}

impl Contestant {
    pub(super) const ALL: [Self; 6] = [
        Self::Floor,
        Self::Ours,
        Self::OwnFloor,
        Self::OwnKernel,
        Self::InitramfsTools,
        Self::Dracut,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::OwnFloor => "floor, own kernel (virt)",
            Self::Ours => "layer0, cloud kernel",
            Self::OwnKernel => "layer0, own kernel (virt)",
            Self::InitramfsTools => "initramfs-tools, netboot",
            Self::Dracut => "dracut, network",
        }
    }

    /// Whether others made it.
    pub(super) fn is_peer(self) -> bool {
        matches!(self, Self::InitramfsTools | Self::Dracut)
    }

    /// Whether it is Layer0.
    pub(super) fn has_agent(self) -> bool {
        matches!(self, Self::Ours | Self::OwnKernel)
    }

    /// What it must be told on the kernel command line so that it asks for an address.
    pub(super) fn arguments(self) -> &'static str {
        match self {
            Self::Floor | Self::OwnFloor | Self::Ours | Self::OwnKernel => "",
            Self::InitramfsTools => "boot=nfs root=/dev/nfs nfsroot=10.9.0.1:/nowhere ip=dhcp",
            Self::Dracut => "rd.neednet=1 ip=dhcp root=/dev/nowhere",
        }
    }
}

/// Something that boots.
#[derive(Debug, Clone)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    /// With the probe behind it.
    pub(super) initramfs: PathBuf,
    /// Size of the initramfs without the probe, in bytes.
    pub(super) size: u64,
}

/// Makes images.
#[derive(Debug)]
pub(super) struct Images {
    dir: PathBuf,
    agent: PathBuf,
    /// Debian's cloud kernel.
    pub(super) kernel: Kernel,
    vmlinuz: PathBuf,
    probe: Vec<u8>,
    floor: PathBuf,
}

impl Images {
    /// Builds the programs that run in the machines, and gets the kernel.
    ///
    /// # Errors
    /// What does not build or cannot be had.
    pub(super) fn new(dir: &Path, agent: &Path) -> Result<Self> {
        eprintln!("building the floor and the probe");
        let mut build = static_build("guest");
        build.stdout(std::io::stderr());
        run(&mut build)?;
        let bin = |name: &str| target_dir(&root()).join(STATIC_TARGET).join("agent").join(name);
        let cache = target_dir(&root()).join("layer0-cache");
        let packages = lists()?.packages("cloud");
        let source =
            Source::Package { flavour: "cloud".to_owned(), packages, version: None, update: false };
        let kernel = kernel::get(&source, &cache, &|text| eprintln!("kernel: {text}"))?;
        let vmlinuz = dir.join("vmlinuz-cloud");
        write(&vmlinuz, &kernel.image)?;
        let mut tree = Tree::new();
        tree.file("probe", 0o755, read(&bin("probe"))?)?;
        let probe = archive::write(&tree, 0)?;
        let (dir, agent, floor) = (dir.to_owned(), agent.to_owned(), bin("floor"));
        Ok(Self { dir, agent, kernel, vmlinuz, probe, floor })
    }

    /// An image of ours.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn make(&self, contestant: Contestant) -> Result<Image> {
        let flavour = match contestant {
            Contestant::OwnKernel => Flavour::Virt,
            Contestant::Ours => Flavour::Cloud,
            Contestant::OwnFloor => {
                let kernel = self.build(Flavour::Virt)?.join("vmlinuz");
                let floor = self.floor("own-floor.cpio.zst", &[])?;
                return Ok(Image { kernel, ..self.take(contestant, &floor)? });
            }
            _ => {
                let modules = load_order(&self.kernel.catalogue);
                return self.take(contestant, &self.floor("floor.cpio.zst", &modules)?);
            }
        };
        let out = self.build(flavour)?;
        let mut image = self.take(contestant, &out.join("initramfs.img"))?;
        image.kernel = out.join("vmlinuz");
        Ok(image)
    }

    /// Layer0 with the agent under test, and where it is.
    ///
    /// # Errors
    /// When it cannot be built.
    pub(super) fn build(&self, flavour: Flavour) -> Result<PathBuf> {
        build_layer0(&self.dir, &self.agent, flavour, None)
    }

    /// An initramfs, with the probe behind it.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub(super) fn take(&self, contestant: Contestant, initramfs: &Path) -> Result<Image> {
        let to = self.dir.join(format!("{contestant:?}.img"));
        self.with_probe(initramfs, &to)?;
        Ok(Image { kernel: self.vmlinuz.clone(), initramfs: to, size: size(initramfs)? })
    }

    /// Puts the probe behind an initramfs, at a multiple of four bytes, where the kernel looks for another archive
    /// (Documentation/driver-api/early-userspace/buffer-format.rst).
    pub(super) fn with_probe(&self, initramfs: &Path, to: &Path) -> Result<()> {
        let mut bytes = read(initramfs)?;
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(&self.probe);
        write(to, &bytes)
    }

    fn floor(&self, name: &str, modules: &[String]) -> Result<PathBuf> {
        let mut tree = Tree::new();
        tree.directory("dev", 0o755)?;
        tree.char_device("dev/console", 0o600, (5, 1))?;
        tree.file("init", 0o755, read(&self.floor)?)?;
        tree.directory("modules", 0o755)?;
        for (place, path) in modules.iter().enumerate() {
            let bytes = files::read(&self.kernel.modules_dir.join(path))?;
            let name = Path::new(files::plain_path(path)).file_name().unwrap_or_default();
            tree.file(&format!("modules/{place:02}-{}", name.display()), 0o644, bytes)?;
        }
        let to = self.dir.join(name);
        write(&to, &Compression::default().compress(archive::write(&tree, 0)?)?)?;
        Ok(to)
    }
}

/// Builds Layer0 with this agent below `dir`, in a form beside kernel and initramfs, and gives its directory.
///
/// # Errors
/// When it cannot be built.
pub(super) fn build_layer0(
    dir: &Path,
    agent: &Path,
    flavour: Flavour,
    format: Option<Format>,
) -> Result<PathBuf> {
    let out = dir.join(format!("{flavour:?}").to_lowercase());
    let args = build_image::Args {
        flavour,
        agent: Some(agent.to_owned()),
        out: Some(out.clone()),
        format: format.into_iter().collect(),
        // Which clap would have filled in.
        cmdline: COMMAND_LINE.to_owned(),
        ..build_image::Args::default()
    };
    build_image::build(&args)?;
    Ok(out)
}

fn lists() -> Result<Lists> {
    let path = root().join("kernel-config/modules.toml");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    wanted::parse(&text).with_context(|| path.display().to_string())
}

/// Files of the floor's modules, each after what it needs.
fn load_order(catalogue: &Catalogue) -> Vec<String> {
    fn visit(name: &str, catalogue: &Catalogue, seen: &mut BTreeSet<String>, to: &mut Vec<String>) {
        // What is no file is built in.
        let Some(module) = catalogue.get(name).filter(|_| seen.insert(name.to_owned())) else {
            return;
        };
        for needed in &module.depends {
            visit(needed, catalogue, seen, to);
        }
        to.push(module.file.clone());
    }
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in FLOOR_MODULES {
        visit(name, catalogue, &mut seen, &mut order);
    }
    order
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests_of_order {
    use initramfs::modules::Module;

    use super::*;

    #[test]
    fn a_module_is_loaded_after_what_it_needs_and_once() {
        let module = |name: &str, depends: &[&str]| Module {
            name: name.to_owned(),
            file: name.to_owned(),
            depends: depends.iter().map(|it| (*it).to_owned()).collect(),
            ..Module::default()
        };
        let modules = vec![
            module("virtio_net", &["net_failover", "virtio"]),
            module("virtio_pci", &["virtio", "built_in"]),
            module("net_failover", &[]),
            module("virtio", &[]),
            module("other", &[]),
        ];
        let catalogue = Catalogue::new(modules, "", b"");
        assert_eq!(load_order(&catalogue), ["virtio", "virtio_pci", "net_failover", "virtio_net"]);
    }
}
