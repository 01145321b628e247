//! `cargo xtask build-image`: Layer0's kernel and initramfs, from this tree and a kernel package.

mod table;

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::{Args as ClapArgs, ValueEnum};
use initramfs::compress::Compression;
use initramfs::image::forms::{Form, FormOptions, Signer};
use initramfs::image::{self, Config, Report};
use initramfs::kernel::{Source, kconfig};
use initramfs::modules::wanted::{self, Lists};

use crate::{agent_build, crates, kernel};

mod hardware;

/// Builds Layer0: vmlinuz, initramfs.img, manifest.json, and the forms that are asked for.
#[derive(Debug, Clone, Default, ClapArgs)]
pub(crate) struct Args {
    /// Which kernel: Debian's cloud or generic one, or our own (cargo xtask kernel)
    #[arg(long, value_enum, default_value_t, conflicts_with = "kernel")]
    pub(crate) flavour: Flavour,
    /// Look for a newer kernel package although one is in the cache
    #[arg(long, conflicts_with = "kernel")]
    pub(crate) update: bool,
    /// Use this kernel (bzImage) instead of a package
    #[arg(long, value_name = "FILE", requires = "modules")]
    pub(crate) kernel: Option<PathBuf>,
    /// Its modules: a lib/modules/VERSION directory
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    /// Its configuration, to be checked for what Layer0 relies on
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) hardware: hardware::HardwareArgs,
    /// Use this agent, a static binary, instead of building it
    #[arg(long, value_name = "FILE")]
    pub(crate) agent: Option<PathBuf>,
    /// Trust the CA certificates in this PEM file (repeatable)
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Vec<PathBuf>,
    /// Run only ImageSets signed by this public key, PEM (repeatable, any of them is enough); see `layercake imageset keygen`
    #[arg(long, value_name = "FILE")]
    pub(crate) imageset_key: Vec<PathBuf>,
    /// Give nodes this registry table, TOML with `[[registries]]` as in layercake.toml: mirrors, CA certificates, credentials.
    /// Whoever can fetch the image can read it: credentials should only be able to pull
    #[arg(long, value_name = "FILE")]
    pub(crate) registries: Option<PathBuf>,
    /// Merge this directory's tree over the image, owned by root (repeatable, the last one wins)
    #[arg(long, value_name = "DIR")]
    pub(crate) overlay: Vec<PathBuf>,
    /// Put these modules in as well: an [extra.NAME] of kernel-config/modules.toml (repeatable), `storage` for network storage
    #[arg(long, value_name = "NAME")]
    pub(crate) with: Vec<String>,
    /// Put this archive behind the initramfs as it is, in every form (repeatable): a newc cpio, compressed or not. The kernel unpacks
    /// it over what is there, the last one wins
    #[arg(long, value_name = "FILE")]
    pub(crate) archive: Vec<PathBuf>,
    /// How the initramfs is compressed: zstd, xz or none, with a level as in zstd:22 or xz:9. zstd is level 18 in jobs of 3 MiB
    /// on all processors, the same bytes on every machine; zstd:19 is a hundredth smaller and takes twice as long. Modules are
    /// compressed one by one beside it (zstd:19), and stay so in the node's memory; with xz they are not: that is the smallest
    /// image, takes six times as long to unpack at every boot and the most memory
    #[arg(long, value_name = "HOW", default_value_t)]
    pub(crate) compression: Compression,
    /// Forms beside vmlinuz and initramfs.img (repeatable, or separated by commas)
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) format: Vec<Format>,
    /// Command line of the forms that carry one
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_COMMAND_LINE)]
    pub(crate) cmdline: String,
    /// systemd's EFI stub, when it is not where Debian's package systemd-boot-efi puts it
    #[arg(long, value_name = "FILE")]
    pub(crate) stub: Option<PathBuf>,
    /// Sign EFI programs for Secure Boot with this key, PEM
    #[arg(long, value_name = "FILE", requires = "secure_boot_cert")]
    pub(crate) secure_boot_key: Option<PathBuf>,
    /// Certificate of that key, PEM
    #[arg(long, value_name = "FILE", requires = "secure_boot_key")]
    pub(crate) secure_boot_cert: Option<PathBuf>,
    /// Where the files go [default: out/layer0 in this repository]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Print the manifest as JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
}

/// A kernel of Debian's, or of our own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Flavour {
    /// For virtual machines: small, starts fast.
    #[default]
    Cloud,
    /// For real machines: with their network and disk drivers.
    Generic,
    /// Our own, built from source, for virtual machines: no modules at all.
    Virt,
    /// Our own, built from source, for real machines.
    Hw,
}

/// Command line of images that carry one: where to find a server is left to DHCP or to what the operator adds.
const DEFAULT_COMMAND_LINE: &str = "console=tty0 console=ttyS0,115200 panic=10";

/// A form of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// vmlinuz and initramfs.img, for network boot (always written)
    Split,
    /// layer0.efi: kernel, initramfs and command line in one EFI program
    Uki,
    /// layer0-kernel.efi: one kernel with initramfs and command line inside, for UEFI and BIOS (--flavour virt or hw)
    Efi,
    /// layer0.iso: a CD that BIOS and UEFI boot, from a disk as well
    Iso,
    /// layer0-usb.img: a disk that BIOS and UEFI boot
    Usb,
    /// layer0-bundle.tar: every form, the manifest, checksums and a bill of materials (CycloneDX)
    Bundle,
}

impl Format {
    fn form(self) -> Form {
        match self {
            Self::Split => Form::Split,
            Self::Uki => Form::Uki,
            Self::Efi => Form::Efi,
            Self::Iso => Form::Iso,
            Self::Usb => Form::Usb,
            Self::Bundle => Form::Bundle,
        }
    }
}

/// Runs `cargo xtask build-image`.
///
/// # Errors
/// The agent does not build, or the image cannot be made of what was given.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let report = build(args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report.manifest)?);
    } else {
        print!("{}", table::render(&report, &out_dir(args)));
    }
    Ok(())
}

/// Builds the image and says on stderr what takes time. For the demo and the tests, too.
///
/// # Errors
/// The agent does not build, or the image cannot be made of what was given.
pub(crate) fn build(args: &Args) -> anyhow::Result<Report> {
    let notice = |text: &str| eprintln!("build-image: {text}");
    Ok(image::build(&config(args, &notice)?, &notice)?)
}

/// What an image is built from, the agent built and the kernel at hand.
///
/// # Errors
/// As [`build`].
pub(crate) fn config(args: &Args, notice: &dyn Fn(&str)) -> anyhow::Result<Config> {
    let root = root();
    let (agent, agent_version) = agent(args, &root, notice)?;
    let lists_path = root.join("kernel-config/modules.toml");
    let required_path = root.join("kernel-config/required.toml");
    let lists = wanted::parse(&read(&lists_path)?);
    let lists = lists.and_then(|lists| lists.with(&args.with));
    let lists = lists.with_context(|| format!("in {}", lists_path.display()))?;
    let required = kconfig::parse_required(&read(&required_path)?);
    let required = required.with_context(|| format!("in {}", required_path.display()))?;
    let required = kconfig::of_flavour(required, flavour_name(args.flavour));
    let kernel = kernel_source(args, &lists)?;
    let forms = forms(&args.format, &kernel);
    let bill = forms.contains(&Form::Bundle);
    Ok(Config {
        agent,
        agent_version,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel,
        lists,
        with: args.with.clone(),
        hardware: args.hardware.read(args.update)?,
        required,
        ca: args.ca.clone(),
        imageset_keys: args.imageset_key.clone(),
        registries: args.registries.clone(),
        overlays: args.overlay.clone(),
        archives: args.archive.clone(),
        compression: args.compression,
        mtime: source_date_epoch()?,
        forms,
        options: form_options(args),
        maker: maker(),
        crates: if bill { crates::of_the_agent(&root)? } else { Vec::new() },
        packed: target_dir(&root).join("layer0-cache"),
        cache: target_dir(&root).join("layer0-cache"),
        out: out_dir(args),
    })
}

/// The agent's file and version: the one that was given, or built now.
fn agent(args: &Args, root: &Path, notice: &dyn Fn(&str)) -> anyhow::Result<(PathBuf, String)> {
    if let Some(path) = &args.agent {
        return Ok((path.clone(), "unknown".to_owned()));
    }
    let start = Instant::now();
    notice("building the agent");
    let path = agent_build::build(root)?;
    notice(&format!("the agent is built ({:.1} s)", start.elapsed().as_secs_f64()));
    Ok((path, env!("CARGO_PKG_VERSION").to_owned()))
}

fn kernel_source(args: &Args, lists: &Lists) -> anyhow::Result<Source> {
    Ok(match (&args.kernel, &args.modules) {
        (Some(image), Some(modules)) => {
            let (image, modules, config) = (image.clone(), modules.clone(), args.config.clone());
            Source::Files { image, modules, config }
        }
        _ if matches!(args.flavour, Flavour::Virt | Flavour::Hw) && !args.hardware.has_kernel() => {
            let flavour = flavour_name(args.flavour).to_owned();
            let built = kernel::built(&flavour, &[], args.update)?;
            Source::Built { flavour, dir: built.dir }
        }
        _ => {
            let flavour = flavour_name(args.flavour);
            args.hardware.source(flavour, lists.packages(flavour), args.update)
        }
    })
}

/// The forms that were asked for; a bundle has all that there are of this kernel.
fn forms(formats: &[Format], kernel: &Source) -> BTreeSet<Form> {
    let mut forms: BTreeSet<Form> = formats.iter().map(|format| format.form()).collect();
    if forms.contains(&Form::Bundle) {
        forms.extend([Form::Uki, Form::Iso, Form::Usb]);
        forms.extend(matches!(kernel, Source::Built { .. }).then_some(Form::Efi));
    }
    forms
}

fn form_options(args: &Args) -> FormOptions {
    let signer = args.secure_boot_key.clone().zip(args.secure_boot_cert.clone());
    FormOptions {
        command_line: args.cmdline.clone(),
        stub: args.stub.clone(),
        signer: signer.map(|(key, certificate)| Signer { key, certificate }),
    }
}

/// This program, told by its size and the time it was built.
fn maker() -> String {
    let built = env::current_exe().and_then(fs::metadata);
    built.map_or_else(|_| String::new(), |it| format!("{} {:?}", it.len(), it.modified().ok()))
}

/// The repository this program was built from.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

fn out_dir(args: &Args) -> PathBuf {
    args.out.clone().unwrap_or_else(|| root().join("out/layer0"))
}

pub(crate) fn target_dir(root: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

fn flavour_name(flavour: Flavour) -> &'static str {
    match flavour {
        Flavour::Cloud => "cloud",
        Flavour::Generic => "generic",
        Flavour::Virt => "virt",
        Flavour::Hw => "hw",
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// See <https://reproducible-builds.org/specs/source-date-epoch/>; 0 where it is not set.
pub(crate) fn source_date_epoch() -> anyhow::Result<u32> {
    match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text
            .parse()
            .with_context(|| format!("SOURCE_DATE_EPOCH={text:?} is no time of 32 bits")),
        Err(env::VarError::NotPresent) => Ok(0),
        Err(error) => Err(error).context("SOURCE_DATE_EPOCH"),
    }
}
