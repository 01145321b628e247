//! The whole build: agent, kernel, modules and what the operator adds, to `vmlinuz`, `initramfs.img`, the forms that are asked for
//! and `manifest.json`. The same inputs give the same bytes.
//!
//! | module | what it does |
//! |---|---|
//! | `content` | what every image holds. Pure |
//! | `sources` | what is read, and refused |
//! | `modules` | the chosen modules, compressed one by one |
//! | `packing` | the tree as a compressed initramfs |
//! | `cache` | what was compressed before |
//! | `forms` | EFI program, CD, disk |
//! | `bundle` | all of it in one file, with checksums and a bill of materials |
//! | `output` | what is written, and what need not be made again |

pub mod bundle;
mod cache;
mod content;
pub mod forms;
pub mod hardware;
mod modules;
mod output;
mod packing;
mod sources;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protocol::ids::Digest;
use protocol::layer0::{AGENT, Input, Inputs, Manifest};

use crate::Notice;
use crate::archive::{self, ArchiveError};
use crate::compress::Compression;
use crate::elf::ElfError;
use crate::kernel::kconfig::Symbol;
use crate::kernel::{self, Kernel, KernelError, Source};
use crate::modules::files::{self, FilesError};
use crate::modules::firmware::FirmwareError;
use crate::modules::wanted::{Lists, WantedError};
use crate::modules::{ModulesError, Selection};
use crate::overlay::{self, OverlayError};
use crate::registries::{self, RegistriesError};
use crate::sbom::Crate;
use crate::tree::{Tree, TreeError};
use bundle::BundleError;
use forms::{Form, FormError, FormOptions, Ingredients};
use modules::{Ready, Stay};
use output::{Made, Shop};
use packing::Packed;

pub use content::{Parts, assemble};
pub use output::{INITRAMFS, KERNEL, MANIFEST};

/// What to build from.
#[derive(Debug, Clone)]
pub struct Config {
    /// The agent binary.
    pub agent: PathBuf,
    /// Its version, for the manifest.
    pub agent_version: String,
    /// Version of Layercake that builds, for the manifest.
    pub version: String,
    /// Where the kernel comes from.
    pub kernel: Source,
    /// The modules that are wanted.
    pub lists: Lists,
    /// Names of the lists of modules that were added to those that are always there.
    pub with: Vec<String>,
    /// What chooses among the drivers, and firmware.
    pub hardware: hardware::Hardware,
    /// The kernel symbols that are relied on.
    pub required: Vec<Symbol>,
    /// Files of CA certificates.
    pub ca: Vec<PathBuf>,
    /// Files of public keys; with any, nodes run only ImageSets that one of them signed.
    pub imageset_keys: Vec<PathBuf>,
    /// What nodes know of registries, TOML (`[[registries]]`).
    pub registries: Option<PathBuf>,
    /// Directories merged over the rest, in this order.
    pub overlays: Vec<PathBuf>,
    /// Archives put behind the initramfs as they are, in this order.
    pub archives: Vec<PathBuf>,
    /// How the initramfs is compressed in the forms that carry it beside the kernel. In the one that has it inside, the kernel is
    /// compressed as a whole.
    pub compression: Compression,
    /// Time of last change of every entry, in seconds since 1970 (`SOURCE_DATE_EPOCH`).
    pub mtime: u32,
    /// Where kernels that were downloaded are kept. Two builds with one cache wait for each other.
    pub cache: PathBuf,
    /// Where compressed archives are kept, and which inputs gave which form; `cache` for builds that may take from earlier ones.
    pub packed: PathBuf,
    /// Forms beside kernel and initramfs, which are always there.
    pub forms: BTreeSet<Form>,
    /// What the forms are made with.
    pub options: FormOptions,
    /// Names the program that builds: another one makes every form anew, for it may make them in another way.
    pub maker: String,
    /// What the agent is made of, for the bundle's bill of materials.
    pub crates: Vec<Crate>,
    /// Where the files go.
    pub out: PathBuf,
}

/// What was built.
#[derive(Debug, Clone)]
pub struct Report {
    /// What stands in `manifest.json`.
    pub manifest: Manifest,
    /// Size of the agent in bytes.
    pub agent_size: u64,
    /// Size of all modules, uncompressed, in bytes.
    pub modules_size: u64,
    /// How many of them are compressed one by one.
    pub modules_compressed: usize,
    /// Size of the initramfs before compression, in bytes, without archives that are appended.
    pub archive_size: u64,
    /// How it is compressed.
    pub compression: Compression,
    /// Optional modules and patterns that this kernel has nothing for.
    pub absent: Vec<String>,
    /// Whether all files were there already, byte for byte.
    pub unchanged: bool,
    /// How long it took.
    pub took: Duration,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The agent needs a loader or libraries that no initramfs has.
    #[error("{path} is dynamically linked ({needs}); Layer0 needs a static one")]
    Dynamic {
        /// The agent.
        path: PathBuf,
        /// The loader and libraries it asks for.
        needs: String,
    },
    /// The agent is no program for this kernel.
    #[error("{path} cannot be the agent: it is not a program for x86-64")]
    Agent {
        /// The agent.
        path: PathBuf,
        /// What is wrong, if it is no ELF file.
        #[source]
        source: Option<ElfError>,
    },
    /// The kernel lacks something Layer0 relies on.
    #[error("kernel {release} lacks what Layer0 relies on: {problems}")]
    Kconfig {
        /// The kernel.
        release: String,
        /// Every symbol that falls short, with its reason.
        problems: String,
    },
    /// An archive that is to be appended is none.
    #[error("{path} cannot be appended: {why}")]
    Appended {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The codec failed.
    #[error("cannot compress the initramfs ({how})")]
    Compress {
        /// How.
        how: Compression,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be read or written.
    #[error("cannot use {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The list of modules is wrong.
    #[error(transparent)]
    Wanted(#[from] WantedError),
    /// Machines that the image is for would lose what they cannot do without.
    #[error("kernel {release} is not for these nodes: {losses}")]
    Losses {
        /// The kernel.
        release: String,
        /// Every loss, with its node.
        losses: String,
    },
    /// The archive has no such firmware package.
    #[error(
        "the archives this machine is set up for have no package {name}{warnings} (most firmware is in Debian's non-free-firmware); --firmware takes a directory or a .deb file as well"
    )]
    FirmwarePackage {
        /// Its name.
        name: String,
        /// What fetching the lists warned of, after a colon; empty if nothing.
        warnings: String,
    },
    /// Firmware could not be read.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// Modules could not be chosen.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// A module could not be read.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// What the operator adds could not be added.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The registry table cannot be used.
    #[error(transparent)]
    Registries(#[from] RegistriesError),
    /// Something does not fit into the tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A form could not be made.
    #[error(transparent)]
    Form(#[from] FormError),
    /// The archive could not be written.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The bundle could not be made.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// Builds an image. Its files are replaced one by one, each by a rename, the manifest last.
///
/// # Errors
/// Anything that would make an image that does not boot, or that cannot be read or written; nothing is replaced then.
pub fn build(config: &Config, notice: Notice<'_>) -> Result<Report, BuildError> {
    let start = Instant::now();
    let _lock = kernel::lock(&config.cache).map_err(fail(&config.cache))?;
    let agent = sources::read_agent(&config.agent)?;
    let kernel = kernel::get(&config.kernel, &config.cache, notice)?;
    if kernel.config.is_none() {
        notice("the kernel's configuration is not known (--config FILE): not checked");
    }
    sources::check_config(&kernel, &config.required)?;
    let lacks = sources::lacks(&kernel, &config.required);
    lacks.iter().for_each(|lack| notice(&format!("kernel {}: {lack}", kernel.release)));
    let mut selection = hardware::choose(&kernel, config, notice)?;
    if !selection.absent.is_empty() {
        notice(&format!("this kernel has no {}: left out", selection.absent.join(", ")));
    }
    let compression = config.compression;
    let stay = match compression {
        // Whoever takes xz wants it small: one frame with all of them is the smallest.
        Compression::Xz(_) => Stay::All,
        _ => Stay::Below(config.lists.plain_below(&kernel.flavour)),
    };
    let Ready { files: modules, size: modules_size } =
        modules::ready(&kernel.modules_dir, &mut selection, stay, &config.packed, notice)?;
    let appended = sources::read_archives(&config.archives)?;
    let mut decoders = compression.needs();
    decoders.extend(appended.iter().filter_map(|it| it.needs.clone()));
    sources::check_config(&kernel, &decoders)?;
    let agent_size = size(&agent);
    let mut manifest = Manifest { lacks, ..manifest(config, &kernel, &selection, &agent) };
    let alone = Made::new(AGENT, agent.clone());
    let builtin = files::optional(&kernel.modules_dir.join("modules.builtin"))?;
    let parts = Parts { agent, selection: &selection, modules, builtin, about: &manifest };
    let mut tree = assemble(parts)?;
    manifest.firmware = hardware::add_firmware(&mut tree, &kernel, &selection, config, notice)?;
    let mut inputs = add_operators(&mut tree, config)?;
    content::give_way(&mut tree, &mut selection, &kernel.release)?;
    inputs.extend(appended.iter().map(|it| input("archive", &it.bytes)));
    let appended = appended.into_iter().map(|it| it.bytes).collect();
    let packed = packing::pack(tree, appended, compression, config.mtime, &config.packed, notice)?;
    let memory = config.packed.join("forms");
    let shop = Shop { out: config.out.clone(), memory, maker: config.maker.clone() };
    let mut made = make_files(config, &kernel, &packed, &shop, notice)?;
    // For nodes that take a new agent without the rest.
    made.push(alone);
    output::describe(&made, &mut manifest);
    manifest.inputs = Some(Inputs {
        forms: config.forms.iter().map(|form| form.word().to_owned()).collect(),
        command_line: config.options.command_line.clone(),
        compression: compression.to_string(),
        with: config.with.clone(),
        mtime: config.mtime,
        files: inputs,
    });
    let unchanged = finish(config, made, &manifest, &shop)?;
    Ok(Report {
        manifest,
        agent_size,
        modules_size,
        modules_compressed: selection.compressed.len(),
        archive_size: packed.size,
        compression,
        absent: selection.absent,
        unchanged,
        took: start.elapsed(),
    })
}

fn manifest(config: &Config, kernel: &Kernel, selection: &Selection, agent: &[u8]) -> Manifest {
    Manifest {
        name: "layer0".to_owned(),
        version: config.version.clone(),
        kernel: kernel.release.clone(),
        kernel_source: kernel.source.clone(),
        flavour: kernel.flavour.clone(),
        agent: config.agent_version.clone(),
        agent_digest: Digest::of(agent),
        modules: selection.modules.keys().cloned().collect(),
        lacks: Vec::new(),
        firmware: Vec::new(),
        artifacts: Vec::new(),
        inputs: None,
    }
}

/// Adds what the operator gave, and tells what it was.
fn add_operators(tree: &mut Tree, config: &Config) -> Result<Vec<Input>, BuildError> {
    let mut inputs = Vec::new();
    // Each alone first: its digest must not depend on what it is laid over.
    let mut add = |what: &str, to: &mut dyn FnMut(&mut Tree) -> Result<(), BuildError>| {
        let mut alone = Tree::new();
        to(&mut alone)?;
        inputs.push(input(what, &archive::write(&alone, 0)?));
        to(tree)
    };
    for path in &config.ca {
        add("ca", &mut |tree| Ok(overlay::add_ca(tree, path)?))?;
    }
    for path in &config.imageset_keys {
        add("imageset-key", &mut |tree| Ok(overlay::add_imageset_key(tree, path)?))?;
    }
    if let Some(path) = &config.registries {
        add("registries", &mut |tree| Ok(registries::add(tree, path)?))?;
    }
    for dir in &config.overlays {
        add("overlay", &mut |tree| Ok(overlay::merge(tree, dir)?))?;
    }
    Ok(inputs)
}

fn input(option: &str, bytes: &[u8]) -> Input {
    Input { option: option.to_owned(), digest: Digest::of(bytes) }
}

/// Kernel, initramfs and the forms that are made of them.
fn make_files(
    config: &Config,
    kernel: &Kernel,
    packed: &Packed,
    shop: &Shop,
    notice: Notice<'_>,
) -> Result<Vec<Made>, BuildError> {
    let built = match &config.kernel {
        Source::Built { dir, .. } => Some(dir.as_path()),
        _ => None,
    };
    let from = Ingredients {
        kernel,
        initramfs: &packed.bytes,
        plain: &packed.plain,
        built,
        version: &config.version,
        time: config.mtime,
        options: &config.options,
    };
    let mut made = vec![
        Made::new(output::KERNEL, kernel.image.clone()),
        Made::new(output::INITRAMFS, packed.bytes.clone()),
    ];
    made.extend(forms::make(&config.forms, &from, shop, notice)?);
    Ok(made)
}

/// Writes the files, those of the bundle too, the manifest last. Tells whether everything was there.
fn finish(
    config: &Config,
    mut made: Vec<Made>,
    manifest: &Manifest,
    shop: &Shop,
) -> Result<bool, BuildError> {
    if config.forms.contains(&Form::Bundle) {
        let bundled = bundle::make(&made, manifest, &config.crates, config.mtime, shop)?;
        made.extend(bundled);
    }
    made.push(Made::new(MANIFEST, output::manifest_text(manifest)?));
    let others: Vec<_> =
        Form::ALL.iter().filter_map(|form| form.file()).chain(bundle::BESIDE).collect();
    output::write(&config.out, &made, &others)
}

fn size(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

fn fail(path: &Path) -> impl Fn(io::Error) -> BuildError + use<> {
    let path = path.to_owned();
    move |source| BuildError::Io { path: path.clone(), source }
}
