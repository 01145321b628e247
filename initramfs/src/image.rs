//! The whole build: agent, kernel, modules and what the operator adds, to `vmlinuz`, `initramfs.img` and `manifest.json`.
//!
//! The tree is put together by [`assemble`], which is pure; [`build`] reads and writes around it. The same inputs give the
//! same bytes.

pub mod forms;
mod output;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use protocol::ids::Digest;
use protocol::layer0::{self, Manifest};

use crate::Notice;
use crate::archive::{self, ArchiveError, Compression};
use crate::elf::{self, ElfError};
use crate::kernel::kconfig::{self, Symbol};
use crate::kernel::{self, Kernel, KernelError, Source};
use crate::modules::files::{self, FilesError};
use crate::modules::wanted::{Lists, WantedError};
use crate::modules::{ModulesError, Selection, index};
use crate::overlay::{self, OverlayError};
use crate::registries::{self, RegistriesError};
use crate::tree::{Tree, TreeError};
use forms::{EfiOptions, Form, FormError};

/// Directories every image has, with their modes.
const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("etc/layercake", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];
/// Device nodes the kernel and the agent need before devtmpfs is mounted: path, mode, major and minor.
const DEVICES: &[(&str, u32, (u32, u32))] =
    &[("dev/console", 0o600, (5, 1)), ("dev/null", 0o666, (1, 3))];
/// What the image says of itself.
const ABOUT: &str = "etc/layercake/layer0.json";
/// Names of modules the agent loads at start.
const MODULES_LOAD: &str = "etc/layercake/modules";

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
    /// How the initramfs is compressed.
    pub compression: Compression,
    /// Time of last change of every entry, in seconds since 1970 (`SOURCE_DATE_EPOCH`).
    pub mtime: u32,
    /// Where downloads and compressed archives are kept. Two builds with one cache wait for each other.
    pub cache: PathBuf,
    /// Forms beside kernel and initramfs, which are always there.
    pub forms: BTreeSet<Form>,
    /// What the EFI forms are made with.
    pub efi: EfiOptions,
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
    /// Size of the initramfs before compression, in bytes.
    pub archive_size: u64,
    /// Size of the initramfs, in bytes.
    pub initramfs_size: u64,
    /// Size of the kernel, in bytes.
    pub kernel_size: u64,
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
}

/// Builds an image. Its files are replaced one by one, each by a rename, the manifest last.
///
/// # Errors
/// Anything that would make an image that does not boot, or that cannot be read or written; nothing is replaced then.
pub fn build(config: &Config, notice: Notice<'_>) -> Result<Report, BuildError> {
    let start = Instant::now();
    let _lock = kernel::lock(&config.cache)
        .map_err(|source| BuildError::Io { path: config.cache.clone(), source })?;
    let agent = read_agent(&config.agent)?;
    let (agent_digest, agent_alone) = (Digest::of(&agent), agent.clone());
    let kernel = kernel::get(&config.kernel, &config.cache, notice)?;
    check_config(&kernel, &config.required, notice)?;
    let selection = kernel.catalogue.select(&config.lists.list(&kernel.flavour)?)?;
    if !selection.absent.is_empty() {
        notice(&format!("this kernel has no {}: left out", selection.absent.join(", ")));
    }
    let modules = read_modules(&kernel.modules_dir, &selection)?;
    let builtin = files::optional(&kernel.modules_dir.join("modules.builtin"))?;
    let modules_size = modules.iter().map(|(_, bytes)| size(bytes)).sum();
    let agent_size = size(&agent);
    let mut manifest = Manifest {
        name: "layer0".to_owned(),
        version: config.version.clone(),
        kernel: kernel.release.clone(),
        kernel_source: kernel.source.clone(),
        flavour: kernel.flavour.clone(),
        agent: config.agent_version.clone(),
        agent_digest,
        modules: selection.modules.keys().cloned().collect(),
        artifacts: Vec::new(),
    };
    let parts = Parts { agent, selection: &selection, modules, builtin, about: &manifest };
    let mut tree = assemble(parts)?;
    for path in &config.ca {
        overlay::add_ca(&mut tree, path)?;
    }
    for path in &config.imageset_keys {
        overlay::add_imageset_key(&mut tree, path)?;
    }
    if let Some(path) = &config.registries {
        registries::add(&mut tree, path)?;
    }
    for dir in &config.overlays {
        overlay::merge(&mut tree, dir)?;
    }
    let plain = archive::write(&tree, config.mtime)?;
    drop(tree);
    let archive_size = size(&plain);
    let initramfs = output::compress(plain, config.compression, &config.cache, notice)?;
    let (kernel_size, initramfs_size) = (size(&kernel.image), size(&initramfs));
    let mut files = vec![(output::KERNEL, kernel.image.clone()), (output::INITRAMFS, initramfs)];
    // For nodes that take a new agent without the rest.
    files.push((layer0::AGENT, agent_alone));
    if config.forms.contains(&Form::Uki) {
        let initramfs = &files[1].1;
        files.push((output::EFI, forms::efi(&kernel, initramfs, &config.version, &config.efi)?));
    }
    let unchanged = output::write(&config.out, &files, &mut manifest)?;
    Ok(Report {
        manifest,
        agent_size,
        modules_size,
        archive_size,
        initramfs_size,
        kernel_size,
        absent: selection.absent,
        unchanged,
        took: start.elapsed(),
    })
}

/// What an image is put together from.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The agent, static.
    pub agent: Vec<u8>,
    /// The chosen modules.
    pub selection: &'a Selection,
    /// Their contents, uncompressed, by path below `lib/modules/VERSION`.
    pub modules: Vec<(String, Vec<u8>)>,
    /// The kernel's `modules.builtin`.
    pub builtin: Vec<u8>,
    /// What the image says of itself; its artifacts are not in it.
    pub about: &'a Manifest,
}

/// Puts the tree of an image together, without what the operator adds. Pure.
///
/// # Errors
/// A module's path cannot stand in a tree.
pub fn assemble(parts: Parts<'_>) -> Result<Tree, TreeError> {
    let mut tree = Tree::new();
    for (path, mode) in DIRECTORIES {
        tree.directory(path, *mode)?;
    }
    for (path, mode, device) in DEVICES {
        tree.char_device(path, *mode, *device)?;
    }
    let Parts { agent, selection, modules, builtin, about } = parts;
    tree.file("init", 0o755, agent)?;
    let base = format!("lib/modules/{}", about.kernel);
    for (path, bytes) in modules {
        tree.file(&format!("{base}/{path}"), 0o644, bytes)?;
    }
    for (name, text) in [
        ("modules.alias", index::alias(selection).into_bytes()),
        ("modules.builtin", builtin),
        ("modules.dep", index::dep(selection).into_bytes()),
        ("modules.softdep", index::softdep(selection).into_bytes()),
    ] {
        tree.file(&format!("{base}/{name}"), 0o644, text)?;
    }
    tree.file(MODULES_LOAD, 0o644, index::load(selection).into_bytes())?;
    tree.file(ABOUT, 0o644, about_text(about).into_bytes())?;
    Ok(tree)
}

fn about_text(about: &Manifest) -> String {
    // The agent knows its own version, and given as a file it is not known here.
    let Manifest { version, kernel, kernel_source, flavour, agent_digest, .. } = about;
    let agent_digest = agent_digest.to_string();
    let about = serde_json::json!({
        "version": version, "kernel": kernel, "kernel_source": kernel_source,
        "flavour": flavour, "agent_digest": agent_digest,
    });
    format!("{about:#}\n")
}

fn read_agent(path: &Path) -> Result<Vec<u8>, BuildError> {
    let io = |source| BuildError::Io { path: path.to_owned(), source };
    let agent = fs::read(path).map_err(io)?;
    let wrong = |source| BuildError::Agent { path: path.to_owned(), source };
    let linkage = elf::linkage(&agent).map_err(|error| wrong(Some(error)))?;
    if !linkage.is_static() {
        let interpreter = linkage.interpreter.iter().map(|name| format!("interpreter {name}"));
        let libraries = linkage.needed.iter().map(|name| format!("library {name}"));
        let needs = interpreter.chain(libraries).collect::<Vec<_>>().join(", ");
        return Err(BuildError::Dynamic { path: path.to_owned(), needs });
    }
    if linkage.x86_64 { Ok(agent) } else { Err(wrong(None)) }
}

fn check_config(
    kernel: &Kernel,
    required: &[Symbol],
    notice: Notice<'_>,
) -> Result<(), BuildError> {
    let Some(config) = &kernel.config else {
        notice("the kernel's configuration is not known (--config FILE): not checked");
        return Ok(());
    };
    let problems = kconfig::check(config, required);
    if problems.is_empty() {
        return Ok(());
    }
    let problems = problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    Err(BuildError::Kconfig { release: kernel.release.clone(), problems })
}

/// Reads the chosen modules, on as many threads as there are processors, in order of their names.
fn read_modules(dir: &Path, selection: &Selection) -> Result<Vec<(String, Vec<u8>)>, BuildError> {
    let chosen: Vec<_> = selection.modules.values().collect();
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let read = |modules: &[&crate::modules::Module]| {
        let one = |module: &&crate::modules::Module| {
            Ok((module.path.clone(), files::read(&dir.join(&module.file))?))
        };
        modules.iter().map(one).collect::<Result<Vec<_>, FilesError>>()
    };
    thread::scope(|scope| {
        let chunks = chosen.chunks(chosen.len().div_ceil(workers).max(1));
        let work: Vec<_> = chunks.map(|chunk| scope.spawn(move || read(chunk))).collect();
        let mut modules = Vec::with_capacity(chosen.len());
        for worker in work {
            let died = || BuildError::Io {
                path: dir.to_owned(),
                source: io::Error::other("a reader of its modules died"),
            };
            modules.extend(worker.join().map_err(|_| died())??);
        }
        Ok(modules)
    })
}

fn size(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
