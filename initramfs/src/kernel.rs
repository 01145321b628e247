//! The kernel of an image: out of Debian's archive or package files, kept unpacked in a cache, built from source, installed on a
//! machine, or out of files that were given.

pub mod apt;
pub mod bzimage;
pub mod contents;
pub mod deb;
pub mod fragments;
pub mod installed;
pub mod kconfig;
pub mod newc;
pub mod rpm;
pub mod source;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protocol::ids::Digest;
use serde::{Deserialize, Serialize};

use crate::Notice;
use crate::modules::files::{self, FilesError};
use crate::modules::{Catalogue, Module};
use apt::{Apt, AptError};
use contents::Contents;
use deb::DebError;
use installed::InstalledError;
use rpm::RpmError;

/// Form of what the cache holds. Another form is another directory.
const CACHE_FORM: &str = "v2";
/// How directories of the cache begin that hold kernels out of package files, and how many of them are kept.
const OF_FILES: &str = "files-";
const KEEP_OF_FILES: usize = 4;

/// How directories of the cache begin in which a package is being unpacked.
const UNPACKING: &str = "unpack-";

/// Where the kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The newest kernel package of a flavour.
    Package {
        /// `cloud` or `generic`.
        flavour: String,
        /// Metapackages that may bring it, the best first.
        packages: Vec<String>,
        /// Only a kernel whose version begins so, `6.1`.
        version: Option<String>,
        /// Look for a newer one although one is in the cache.
        update: bool,
    },
    /// Package files (`.deb`, `.rpm`) that make a kernel together.
    PackageFiles(Vec<PathBuf>),
    /// A kernel that is installed.
    Installed {
        /// The root directory of where it is installed.
        root: PathBuf,
        /// Which: this one, or else the running one, or else the only one.
        release: Option<String>,
        /// The one that runs (`uname -r`), where that is a machine's own root.
        running: Option<String>,
    },
    /// A kernel of our own that [`source::build`] has put into the cache.
    Built {
        /// `virt` or `hw`.
        flavour: String,
        /// Where it is.
        dir: PathBuf,
    },
    /// Files.
    Files {
        /// A bzImage.
        image: PathBuf,
        /// A `lib/modules/VERSION` directory.
        modules: PathBuf,
        /// Its configuration file.
        config: Option<PathBuf>,
    },
}

/// A kernel that is at hand.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// `cloud`, `generic`, `virt`, `hw` or `custom`.
    pub flavour: String,
    /// What the manifest says of where it came from.
    pub source: String,
    /// The bzImage.
    pub image: Vec<u8>,
    /// Text of its configuration, where it is known.
    pub config: Option<String>,
    /// The directory its modules' paths are below.
    pub modules_dir: PathBuf,
    /// Its modules.
    pub catalogue: Catalogue,
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No package could be had.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// The package could not be unpacked.
    #[error(transparent)]
    Deb(#[from] DebError),
    /// The package could not be unpacked.
    #[error(transparent)]
    Rpm(#[from] RpmError),
    /// No installed kernel can be used.
    #[error(transparent)]
    Installed(#[from] InstalledError),
    /// The packages make no kernel.
    #[error("{packages} cannot be the kernel: {reason}")]
    Packages {
        /// Their names.
        packages: String,
        /// What is missing or does not belong together.
        reason: &'static str,
    },
    /// The modules could not be read.
    #[error(transparent)]
    Modules(#[from] FilesError),
    /// A file could not be read or written.
    #[error("cannot use {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image is no bzImage.
    #[error("{0} is not a kernel that x86 firmware boots (bzImage)")]
    NotKernel(PathBuf),
    /// The modules are of another kernel.
    #[error("{image} is kernel {release}, but the modules in {modules} are of {found}")]
    Mismatch {
        /// The kernel image.
        image: PathBuf,
        /// What it says it is.
        release: String,
        /// The modules' directory.
        modules: PathBuf,
        /// What its name says.
        found: String,
    },
}

/// What the cache knows of a package it holds.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    package: String,
    version: String,
    digest: Digest,
    release: String,
}

/// Gets a kernel. `cache`, which no other build may use meanwhile, keeps what was downloaded and unpacked; with something in it, the network is not touched unless
/// an update is asked for.
///
/// # Errors
/// It cannot be had, or its parts do not belong together.
pub fn get(source: &Source, cache: &Path, notice: Notice<'_>) -> Result<Kernel, KernelError> {
    match source {
        Source::Package { flavour, packages, version, update } => {
            let version = version.as_deref();
            let of = version.map_or(String::new(), |version| format!("-{version}"));
            let dir = cache.join(format!("{flavour}{of}-{CACHE_FORM}"));
            if *update || !dir.join("record.json").exists() {
                fetch((packages, version), cache, &dir, notice)?;
            }
            cached(flavour, &dir)
        }
        Source::PackageFiles(files) => cached("custom", &unpack_files(files, cache, notice)?),
        Source::Installed { root, release, running } => {
            let found = installed::find(root, release.as_deref(), running.as_deref())?;
            notice(&format!("reading the modules in {}", found.modules.display()));
            given(&found.image, &found.modules, found.config.as_deref())
        }
        Source::Built { flavour, dir } => cached(flavour, dir),
        Source::Files { image, modules, config } => {
            notice(&format!("reading the modules in {}", modules.display()));
            given(image, modules, config.as_deref())
        }
    }
}

fn fetch(
    (packages, version): (&[String], Option<&str>),
    cache: &Path,
    dir: &Path,
    notice: Notice<'_>,
) -> Result<(), KernelError> {
    let fail = io_error(cache);
    fs::create_dir_all(cache).map_err(&fail)?;
    let mut apt = Apt::new(&cache.join("apt"))?;
    notice("fetching the package lists");
    apt.update()?;
    let package = apt.resolve(packages, version)?;
    let there = fs::read(dir.join("record.json")).ok();
    let there = there.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
    if there.is_some_and(|record| record.digest == package.digest) {
        notice(&format!("{} {} is the newest", package.name, package.version));
        return Ok(());
    }
    sweep(cache).map_err(&fail)?;
    let work = tempfile::Builder::new().prefix(UNPACKING).tempdir_in(cache).map_err(&fail)?;
    let file = apt.download(&package, work.path(), notice)?;
    notice(&format!("unpacking {}", package.name));
    let record = |release| {
        let apt::Package { name, version, digest, .. } = package;
        Record { package: name, version, digest, release }
    };
    unpack(&[file], (work.path(), dir), record, notice)
}

/// Unpacks what makes a kernel together, describes its modules, and puts all that into `dir` in one step.
fn unpack(
    files: &[PathBuf],
    (work, dir): (&Path, &Path),
    record: impl FnOnce(String) -> Record,
    notice: Notice<'_>,
) -> Result<(), KernelError> {
    let unpacked = work.join("kernel");
    fs::create_dir(&unpacked).map_err(io_error(work))?;
    let mut contents = Contents::new(&unpacked);
    for file in files {
        if file.extension().is_some_and(|extension| extension == "rpm") {
            rpm::unpack(file, &mut contents)?;
        } else {
            deb::unpack(file, &mut contents)?;
        }
    }
    let release = contents.finish().map_err(|reason| {
        let packages = names(files).join(", ");
        KernelError::Packages { packages, reason }
    })?;
    notice("reading what its modules say of themselves");
    let modules = files::describe(&unpacked.join("modules"))?;
    write_json(&unpacked.join("modules.json"), &modules)?;
    write_json(&unpacked.join("record.json"), &record(release))?;
    if dir.exists() {
        fs::remove_dir_all(dir).map_err(io_error(dir))?;
    }
    fs::rename(&unpacked, dir).map_err(io_error(dir))
}

/// The directory of the cache with the kernel out of these package files, unpacked now if it was not before.
fn unpack_files(
    files: &[PathBuf],
    cache: &Path,
    notice: Notice<'_>,
) -> Result<PathBuf, KernelError> {
    let fail = io_error(cache);
    let mut sums = String::new();
    for file in files {
        let bytes = fs::read(file).map_err(io_error(file))?;
        sums.push_str(&Digest::of(&bytes).to_string());
    }
    // The sum of the package, where it is but one.
    let digest = if files.len() == 1 { sums.parse().ok() } else { None };
    let digest = digest.unwrap_or_else(|| Digest::of(sums.as_bytes()));
    let dir = cache.join(format!("{OF_FILES}{}-{CACHE_FORM}", digest.hex()));
    if !dir.join("record.json").exists() {
        fs::create_dir_all(cache).map_err(&fail)?;
        sweep(cache).map_err(&fail)?;
        let work = tempfile::Builder::new().prefix(UNPACKING).tempdir_in(cache).map_err(&fail)?;
        let package = names(files).join("+");
        notice(&format!("unpacking {package}"));
        let record =
            |release: String| Record { package, version: release.clone(), digest, release };
        unpack(files, (work.path(), &dir), record, notice)?;
    }
    Ok(dir)
}

fn names(files: &[PathBuf]) -> Vec<String> {
    let name =
        |file: &PathBuf| file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into();
    files.iter().map(name).collect()
}

/// Keeps any other build from using this cache until the file is dropped.
pub(crate) fn lock(cache: &Path) -> io::Result<fs::File> {
    fs::create_dir_all(cache)?;
    let lock = fs::File::create(cache.join("lock"))?;
    lock.lock()?;
    Ok(lock)
}

/// Removes what builds that were killed have left, and the oldest kernels out of package files. The caller holds the cache's
/// lock.
fn sweep(cache: &Path) -> io::Result<()> {
    let mut of_files = Vec::new();
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(UNPACKING) {
            fs::remove_dir_all(entry.path())?;
        } else if name.starts_with(OF_FILES) {
            of_files.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    of_files.sort();
    let old = of_files.len().saturating_sub(KEEP_OF_FILES - 1);
    of_files.iter().take(old).try_for_each(|(_, dir)| fs::remove_dir_all(dir))
}

fn cached(flavour: &str, dir: &Path) -> Result<Kernel, KernelError> {
    let record: Record = read_json(&dir.join("record.json"))?;
    let (image, modules_dir) = (dir.join("vmlinuz"), dir.join("modules"));
    let modules = cached_modules(&dir.join("modules.json"), &modules_dir)?;
    let (bytes, release) = read_image(&image)?;
    if release != record.release {
        let found = record.release;
        return Err(KernelError::Mismatch { image, release, modules: modules_dir, found });
    }
    let config = files::optional(&dir.join("config"))?;
    let config = String::from_utf8_lossy(&config).into_owned();
    Ok(Kernel {
        release,
        flavour: flavour.to_owned(),
        source: format!("{} {} {}", record.package, record.version, record.digest),
        image: bytes,
        config: (!config.is_empty()).then_some(config),
        catalogue: files::catalogue(&modules_dir, modules)?,
        modules_dir,
    })
}

/// What modules say of themselves, as the cache has it. What a build wrote that did not ask for their firmware is written anew.
fn cached_modules(list: &Path, dir: &Path) -> Result<Vec<Module>, KernelError> {
    let bytes = fs::read(list).map_err(io_error(list))?;
    let modules: Vec<Module> =
        serde_json::from_slice(&bytes).map_err(|error| io_error(list)(error.into()))?;
    let key = b"\"firmware\":";
    if modules.is_empty() || bytes.windows(key.len()).any(|window| window == key) {
        return Ok(modules);
    }
    let modules = files::describe(dir)?;
    write_json(list, &modules)?;
    Ok(modules)
}

fn given(image: &Path, modules: &Path, config: Option<&Path>) -> Result<Kernel, KernelError> {
    let (bytes, release) = read_image(image)?;
    let dir = fs::canonicalize(modules).map_err(io_error(modules))?;
    // The name it was given by, or, for `.` and links, the one it really has.
    let names = [modules, &dir].map(|path| path.file_name().map(|name| name.to_string_lossy()));
    if !names.iter().flatten().any(|name| *name == release) {
        let found = names.into_iter().flatten().next().unwrap_or_default().into_owned();
        let (image, modules) = (image.to_owned(), modules.to_owned());
        return Err(KernelError::Mismatch { image, release, modules, found });
    }
    let read = |path: &Path| fs::read_to_string(path).map_err(io_error(path));
    let config = config.map(read).transpose()?;
    let catalogue = files::catalogue(&dir, files::describe(&dir)?)?;
    // The name and the sum, not the path: the same inputs give the same bytes wherever they lie.
    let name = image.file_name().unwrap_or(image.as_os_str()).to_string_lossy();
    let source = format!("{name} {}", Digest::of(&bytes));
    let flavour = "custom".to_owned();
    Ok(Kernel { release, flavour, source, image: bytes, config, modules_dir: dir, catalogue })
}

fn read_image(path: &Path) -> Result<(Vec<u8>, String), KernelError> {
    let bytes = fs::read(path).map_err(io_error(path))?;
    let release = bzimage::release(&bytes);
    let release = release.ok_or_else(|| KernelError::NotKernel(path.to_owned()))?;
    Ok((bytes, release))
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> KernelError {
    let path = path.to_owned();
    move |source| KernelError::Io { path: path.clone(), source }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, KernelError> {
    let bytes = fs::read(path).map_err(io_error(path))?;
    serde_json::from_slice(&bytes).map_err(|error| io_error(path)(error.into()))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), KernelError> {
    let bytes = serde_json::to_vec(value).map_err(|error| io_error(path)(error.into()))?;
    fs::write(path, bytes).map_err(io_error(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::fake;

    fn files(release: &str, modules: &str) -> (tempfile::TempDir, Source) {
        let dir = tempfile::tempdir().unwrap();
        let modules = dir.path().join(modules);
        fs::create_dir_all(modules.join("kernel")).unwrap();
        fs::write(modules.join("kernel/a.ko"), fake::module(&[("alias", "pci:*")])).unwrap();
        let image = dir.path().join("vmlinuz");
        fs::write(&image, bzimage::fake(&format!("{release} (x) #1"))).unwrap();
        (dir, Source::Files { image, modules, config: None })
    }

    #[test]
    fn given_files_make_a_custom_kernel() {
        let (dir, source) = files("6.12.1", "6.12.1");
        let kernel = get(&source, dir.path(), &|_| ()).unwrap();
        assert_eq!((kernel.release.as_str(), kernel.flavour.as_str()), ("6.12.1", "custom"));
        assert!(kernel.catalogue.get("a").is_some());
    }

    #[test]
    fn modules_of_another_kernel_are_refused() {
        let (dir, source) = files("6.12.1", "6.1.0");
        let error = get(&source, dir.path(), &|_| ()).unwrap_err().to_string();
        assert!(error.contains("is kernel 6.12.1") && error.ends_with("are of 6.1.0"), "{error}");
    }

    #[test]
    fn modules_may_be_given_by_a_link_of_the_right_name() {
        let (dir, source) = files("6.12.1", "elsewhere");
        let Source::Files { image, modules, config } = source else { unreachable!() };
        let link = dir.path().join("6.12.1");
        std::os::unix::fs::symlink(modules, &link).unwrap();
        let source = Source::Files { image, modules: link, config };
        assert_eq!(get(&source, dir.path(), &|_| ()).unwrap().release, "6.12.1");
    }

    #[test]
    fn a_file_that_is_no_kernel_is_named() {
        let (dir, source) = files("6.12.1", "6.12.1");
        fs::write(dir.path().join("vmlinuz"), b"text").unwrap();
        let error = get(&source, dir.path(), &|_| ()).unwrap_err().to_string();
        assert!(error.contains("vmlinuz is not a kernel"), "{error}");
    }
}
