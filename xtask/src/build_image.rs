//! `cargo xtask build-image`: Layer0's kernel and initramfs, from this tree and a kernel package.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::{Args as ClapArgs, ValueEnum};
use initramfs::archive::Compression;
use initramfs::image::forms::{EfiOptions, Form, Signer};
use initramfs::image::{self, Config, Report};
use initramfs::kernel::{Source, kconfig};
use initramfs::modules::wanted;

use crate::{agent_build, kernel};

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
    /// How the initramfs is compressed
    #[arg(long, value_enum, default_value_t)]
    pub(crate) compression: CompressionArg,
    /// Forms beside vmlinuz and initramfs.img (repeatable)
    #[arg(long, value_enum)]
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
    /// vmlinuz and initramfs.img (always written)
    Split,
    /// layer0.efi: kernel, initramfs and command line in one EFI program
    Uki,
}

/// How the initramfs is compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompressionArg {
    /// zstd, level 19.
    #[default]
    Zstd,
    /// Not at all.
    None,
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
        print!("{}", table(&report, &out_dir(args)));
    }
    Ok(())
}

/// Builds the image and says on stderr what takes time. For the demo and the tests, too.
///
/// # Errors
/// The agent does not build, or the image cannot be made of what was given.
pub(crate) fn build(args: &Args) -> anyhow::Result<Report> {
    let root = root();
    let notice = |text: &str| eprintln!("build-image: {text}");
    let (agent, agent_version) = match &args.agent {
        Some(path) => (path.clone(), "unknown".to_owned()),
        None => {
            let start = Instant::now();
            notice("building the agent");
            let path = agent_build::build(&root)?;
            notice(&format!("the agent is built ({:.1} s)", start.elapsed().as_secs_f64()));
            (path, env!("CARGO_PKG_VERSION").to_owned())
        }
    };
    let lists_path = root.join("kernel-config/modules.toml");
    let required_path = root.join("kernel-config/required.toml");
    let lists = wanted::parse(&read(&lists_path)?);
    let lists = lists.and_then(|lists| lists.with(&args.with));
    let lists = lists.with_context(|| format!("in {}", lists_path.display()))?;
    let required = kconfig::parse_required(&read(&required_path)?);
    let required = required.with_context(|| format!("in {}", required_path.display()))?;
    let required = kconfig::of_flavour(required, flavour_name(args.flavour));
    let kernel = match (&args.kernel, &args.modules) {
        (Some(image), Some(modules)) => {
            let (image, modules, config) = (image.clone(), modules.clone(), args.config.clone());
            Source::Files { image, modules, config }
        }
        _ if matches!(args.flavour, Flavour::Virt | Flavour::Hw) => {
            let flavour = flavour_name(args.flavour).to_owned();
            let built = kernel::built(&flavour, &[], args.update)?;
            Source::Built { flavour, dir: built.dir }
        }
        _ => {
            let flavour = flavour_name(args.flavour).to_owned();
            let packages = lists.packages(&flavour);
            Source::Package { flavour, packages, update: args.update }
        }
    };
    let config = Config {
        agent,
        agent_version,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel,
        lists,
        required,
        ca: args.ca.clone(),
        imageset_keys: args.imageset_key.clone(),
        registries: args.registries.clone(),
        overlays: args.overlay.clone(),
        compression: match args.compression {
            CompressionArg::Zstd => Compression::Zstd,
            CompressionArg::None => Compression::None,
        },
        mtime: source_date_epoch()?,
        forms: args.format.iter().map(form).collect(),
        efi: efi_options(args),
        cache: target_dir(&root).join("layer0-cache"),
        out: out_dir(args),
    };
    Ok(image::build(&config, &notice)?)
}

fn form(format: &Format) -> Form {
    match format {
        Format::Split => Form::Split,
        Format::Uki => Form::Uki,
    }
}

fn efi_options(args: &Args) -> EfiOptions {
    let signer = args.secure_boot_key.clone().zip(args.secure_boot_cert.clone());
    EfiOptions {
        command_line: args.cmdline.clone(),
        stub: args.stub.clone(),
        signer: signer.map(|(key, certificate)| Signer { key, certificate }),
    }
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
fn source_date_epoch() -> anyhow::Result<u32> {
    match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text
            .parse()
            .with_context(|| format!("SOURCE_DATE_EPOCH={text:?} is no time of 32 bits")),
        Err(env::VarError::NotPresent) => Ok(0),
        Err(error) => Err(error).context("SOURCE_DATE_EPOCH"),
    }
}

fn table(report: &Report, out: &Path) -> String {
    let manifest = &report.manifest;
    let rows = [
        ("agent", report.agent_size, format!("{}, static", manifest.agent)),
        ("modules", report.modules_size, format!("{} of them", manifest.modules.len())),
        ("archive", report.archive_size, "initramfs before compression".to_owned()),
        ("initramfs.img", report.initramfs_size, percent(report)),
        ("vmlinuz", report.kernel_size, format!("{} ({})", manifest.kernel, manifest.flavour)),
    ];
    let mut text = format!("{:<14} {:>11}\n", "", "bytes");
    let efi = manifest.artifacts.iter().find(|artifact| artifact.name == "layer0.efi");
    let efi = efi.map(|it| ("layer0.efi", it.size, "one EFI program".to_owned()));
    for (name, size, note) in rows.into_iter().chain(efi) {
        text.push_str(&format!("{name:<14} {size:>11}  {note}\n"));
    }
    let state = if report.unchanged { "unchanged" } else { "written" };
    let took = report.took.as_secs_f64();
    text.push_str(&format!("{} {state} in {took:.2} s\n", out.display()));
    text
}

fn percent(report: &Report) -> String {
    let percent = report.initramfs_size.saturating_mul(100) / report.archive_size.max(1);
    format!("{percent} % of the archive")
}
