//! A kernel built from the distribution's source: fetched by apt, configured from fragments, compiled as any user, kept by the
//! hash of everything that went into it. A second build with the same inputs is a look into the cache.
//!
//! ```text
//! CACHE/source-VERSION/            the source, unpacked once for all flavours
//! CACHE/objects-FLAVOUR/           make's own files, so that a change of one symbol compiles little
//! CACHE/built-FLAVOUR-KEY/         vmlinuz, config, modules/, modules.json, record.json: what `kernel::get` reads; recipe.json
//! CACHE/config-FLAVOUR-KEY         a configuration that was checked and not compiled
//! CACHE/relinked-FLAVOUR-KEY       a kernel with an initramfs and a command line inside ([`relink`])
//! CACHE/NAME.lock                  who fetches the source, who uses the objects of a flavour
//! ```
//!
//! All builds of one user share one cache, whichever clone they run in: what is finished appears by a rename and is read without
//! a lock, source and objects are used by one build at a time. No key depends on a path. Where the cache is, the caller says.

mod make;
mod relink;
mod store;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use protocol::ids::Digest;
use serde::{Deserialize, Serialize};

use super::apt::{Apt, AptError, Package};
use super::fragments::{self, FragmentError, Wish};
use super::kconfig::{self, Symbol};
use super::{Record, read_json, write_json};
use crate::Notice;
use crate::modules::files::FilesError;
use make::{Make, run};
pub use relink::relink;

/// Form of what the cache holds; part of the key.
const FORM: &str = "2";

/// What to build.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Its name, `virt`.
    pub flavour: String,
    /// Every symbol that is asked for.
    pub wishes: BTreeMap<String, Wish>,
    /// Packages that may have the source, the best first.
    pub packages: Vec<String>,
    /// What Layer0 relies on.
    pub required: Vec<Symbol>,
    /// Compilers at once.
    pub jobs: usize,
    /// Look for a newer source although one is in the cache.
    pub update: bool,
}

/// A kernel in the cache.
#[derive(Debug, Clone)]
pub struct Built {
    /// Where its files are.
    pub dir: PathBuf,
    /// Hash of what went into it, 16 hexadecimal digits.
    pub key: String,
    /// Whether it was there already.
    pub cached: bool,
    /// How long this took.
    pub took: Duration,
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Programs are missing.
    #[error(
        "to build a kernel this machine lacks {missing}: apt-get install -y --no-install-recommends {packages}"
    )]
    Tools {
        /// What is missing.
        missing: String,
        /// The packages that have it.
        packages: String,
    },
    /// The source could not be had.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// A file could not be read or written.
    #[error("cannot use {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The distribution has another version by now.
    #[error(
        "{package} {version} is not in the cache and cannot be had any more: take the newer one with `cargo xtask kernel --update`"
    )]
    Gone {
        /// The package with the source.
        package: String,
        /// The version that is wanted.
        version: String,
    },
    /// A kernel in the cache does not say how it was made.
    #[error("{0} does not say how its kernel was made: remove it and build the kernel again")]
    NoRecipe(PathBuf),
    /// What a kernel in the cache was made of cannot be read.
    #[error(transparent)]
    Recipe(#[from] FragmentError),
    /// A command line that cannot be built into a kernel.
    #[error(
        "the command line cannot be built into a kernel: it must be at most {limit} characters of ASCII without `$`"
    )]
    CommandLine {
        /// Characters that fit.
        limit: usize,
    },
    /// A program failed.
    #[error("{command} failed: {said}")]
    Failed {
        /// What was run.
        command: String,
        /// Its last lines.
        said: String,
    },
    /// kconfig did not give what was asked for.
    #[error("the configuration of flavour {flavour} loses symbols: {lost}")]
    Lost {
        /// The flavour.
        flavour: String,
        /// Every symbol, with its fragment or its reason.
        lost: String,
    },
    /// The modules could not be read.
    #[error(transparent)]
    Modules(#[from] FilesError),
    /// What was built is not what was expected.
    #[error("{0} is not a kernel that x86 firmware boots (bzImage)")]
    NotKernel(PathBuf),
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> SourceError {
    let path = path.to_owned();
    move |source| SourceError::Io { path: path.clone(), source }
}

/// How a kernel in the cache was made, so that it can be linked again.
#[derive(Debug, Serialize, Deserialize)]
struct Made {
    flavour: String,
    key: String,
    wishes: String,
}

/// Builds a kernel, or finds it in the cache. Builds that share a cache wait for each other where they use the same files.
///
/// # Errors
/// A tool is missing, the source cannot be had, a symbol is lost, or make fails.
pub fn build(recipe: &Recipe, cache: &Path, notice: Notice<'_>) -> Result<Built, SourceError> {
    let start = Instant::now();
    make::check_tools()?;
    let package = source_package(recipe, cache, notice)?;
    let key = key(recipe, &package, &compiler()?);
    let name = format!("built-{}-", recipe.flavour);
    let dir = cache.join(format!("{name}{key}"));
    let kept = |key: String| -> Result<Option<Built>, SourceError> {
        if !store::used(&dir.join("record.json")) {
            return Ok(None);
        }
        let path = dir.join("config");
        let config = fs::read_to_string(&path).map_err(io_error(&path))?;
        check(recipe, &config)?;
        Ok(Some(Built { dir: dir.clone(), key, cached: true, took: start.elapsed() }))
    };
    if let Some(built) = kept(key.clone())? {
        return Ok(built);
    }
    let objects = store::Objects::take(cache, &recipe.flavour, notice)?;
    // Another build may have made it while this one waited.
    if let Some(built) = kept(key.clone())? {
        return Ok(built);
    }
    notice(&format!("kernel {} {key}: not in the cache", recipe.flavour));
    let source = unpacked(&package, cache, notice)?;
    let make = Make { source, objects: &objects, recipe };
    let config = make.configure(notice)?;
    make.compile(&config, notice)?;
    let work = objects.work()?;
    let kernel = work.path().join("kernel");
    make.collect(&config, &kernel, package)?;
    let made = Made {
        flavour: recipe.flavour.clone(),
        key: key.clone(),
        wishes: fragments::render(&recipe.wishes),
    };
    write(&kernel.join("recipe.json"), &made)?;
    fs::rename(&kernel, &dir).map_err(io_error(&dir))?;
    store::prune(cache, &name).map_err(io_error(cache))?;
    Ok(Built { dir, key, cached: false, took: start.elapsed() })
}

/// The configuration a recipe gives, made now or before, and nothing compiled: whether a flavour is whole is known in seconds.
///
/// # Errors
/// As [`build`].
pub fn configuration(
    recipe: &Recipe,
    cache: &Path,
    notice: Notice<'_>,
) -> Result<String, SourceError> {
    make::check_tools()?;
    let package = source_package(recipe, cache, notice)?;
    let key = key(recipe, &package, &compiler()?);
    let name = format!("config-{}-", recipe.flavour);
    let path = cache.join(format!("{name}{key}"));
    if store::used(&path) {
        let config = fs::read_to_string(&path).map_err(io_error(&path))?;
        return check(recipe, &config).map(|()| config);
    }
    let source = unpacked(&package, cache, notice)?;
    let objects = store::Objects::take(cache, &format!("config-{}", recipe.flavour), notice)?;
    let work = objects.work()?;
    let config = Make { source, objects: &objects, recipe }.configure(notice)?;
    let made = work.path().join("config");
    fs::write(&made, &config)
        .and_then(|()| fs::rename(&made, &path))
        .and_then(|()| fs::remove_dir_all(&objects.dir))
        .and_then(|()| store::prune(cache, &name))
        .map_err(io_error(&path))?;
    Ok(config)
}

/// Whether a finished configuration has everything that was asked for and that is required.
fn check(recipe: &Recipe, config: &str) -> Result<(), SourceError> {
    let lost = fragments::lost(&recipe.wishes, config);
    let required = kconfig::check(config, &recipe.required);
    let lost: Vec<_> = lost
        .iter()
        .map(ToString::to_string)
        .chain(required.iter().map(ToString::to_string))
        .collect();
    if lost.is_empty() {
        return Ok(());
    }
    Err(SourceError::Lost { flavour: recipe.flavour.clone(), lost: lost.join("; ") })
}

fn write(path: &Path, value: &impl Serialize) -> Result<(), SourceError> {
    let fail = |error| SourceError::Io { path: path.to_owned(), source: io::Error::other(error) };
    write_json(path, value).map_err(fail)
}

fn compiler() -> Result<String, SourceError> {
    let said = |program: &str| {
        let output =
            Command::new(program).arg("--version").output().map_err(io_error(program.as_ref()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok::<_, SourceError>(text.lines().next().unwrap_or_default().to_owned())
    };
    Ok(format!("{}\n{}", said("gcc")?, said("ld")?))
}

/// Hash of everything that decides about the result.
fn key(recipe: &Recipe, package: &Package, compiler: &str) -> String {
    let parts = [
        FORM,
        &recipe.flavour,
        &package.name,
        &package.version,
        &package.digest.to_string(),
        compiler,
        &fragments::render(&recipe.wishes),
    ];
    Digest::of(parts.join("\n").as_bytes()).hex().chars().take(16).collect()
}

/// The package with the source: the one that is in the cache, unless there is none or a newer one is asked for.
fn source_package(
    recipe: &Recipe,
    cache: &Path,
    notice: Notice<'_>,
) -> Result<Package, SourceError> {
    let path = cache.join("source.json");
    let known = || {
        let record = read_json::<Record>(&path).ok()?;
        recipe.packages.contains(&record.package).then(|| {
            let Record { package: name, version, digest, .. } = record;
            Package { name, version, digest, size: 0, depends: String::new() }
        })
    };
    if !recipe.update
        && let Some(package) = known()
    {
        return Ok(package);
    }
    let _lock = store::lock(cache, "source", notice)?;
    match known() {
        Some(package) if !recipe.update => Ok(package),
        _ => fetch(&recipe.packages, cache, notice),
    }
}

/// Fetches and unpacks the newest source, and notes which it is. The caller holds the lock of the source.
fn fetch(packages: &[String], cache: &Path, notice: Notice<'_>) -> Result<Package, SourceError> {
    let work = store::work(cache, "source")?;
    let mut apt = Apt::new(&cache.join("apt"))?;
    notice("fetching the package lists");
    apt.update()?;
    let package = apt.find(packages)?;
    let dir = source_dir(cache, &package);
    if !dir.exists() {
        let file = apt.download(&package, work.path(), notice)?;
        notice(&format!("unpacking {} {}", package.name, package.version));
        let (outer, inner) = (work.path().join("outer"), work.path().join("source"));
        fs::create_dir(&inner).map_err(io_error(&inner))?;
        run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&outer))?;
        let archive = outer.join("usr/src").join(format!("{}.tar.xz", package.name));
        run(Command::new("tar")
            .args(["--strip-components=1", "-xf"])
            .arg(&archive)
            .arg("-C")
            .arg(&inner))?;
        fs::rename(&inner, &dir).map_err(io_error(&dir))?;
    }
    let record = Record {
        package: package.name.clone(),
        version: package.version.clone(),
        digest: package.digest,
        release: String::new(),
    };
    let (noted, path) = (work.path().join("source.json"), cache.join("source.json"));
    write(&noted, &record)?;
    fs::rename(&noted, &path).map_err(io_error(&path))?;
    Ok(package)
}

fn source_dir(cache: &Path, package: &Package) -> PathBuf {
    cache.join(format!("source-{}", package.version.replace(['/', ':'], "_")))
}

/// The unpacked source of this package. A cache whose record is there but whose source was taken away is filled again.
fn unpacked(package: &Package, cache: &Path, notice: Notice<'_>) -> Result<PathBuf, SourceError> {
    let dir = source_dir(cache, package);
    if !dir.exists() {
        let _lock = store::lock(cache, "source", notice)?;
        if !dir.exists() {
            fetch(std::slice::from_ref(&package.name), cache, notice)?;
        }
    }
    if dir.exists() {
        return Ok(dir);
    }
    Err(SourceError::Gone { package: package.name.clone(), version: package.version.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(config: &str) -> Recipe {
        let wishes = fragments::merge(&[("base".to_owned(), config.to_owned())]).unwrap();
        Recipe {
            flavour: "virt".to_owned(),
            wishes,
            packages: vec!["linux-source-6.12".to_owned()],
            required: Vec::new(),
            jobs: 2,
            update: false,
        }
    }

    fn package(version: &str) -> Package {
        Package {
            name: "linux-source-6.12".to_owned(),
            version: version.to_owned(),
            digest: Digest::of(b"x"),
            size: 1,
            depends: String::new(),
        }
    }

    #[test]
    fn the_key_changes_with_every_input_and_with_nothing_else() {
        let one = key(&recipe("CONFIG_A=y"), &package("1"), "gcc 12");
        assert_eq!(one.len(), 16);
        assert_eq!(key(&recipe("# a comment\nCONFIG_A=y\n"), &package("1"), "gcc 12"), one);
        for other in [
            key(&recipe("CONFIG_A=m"), &package("1"), "gcc 12"),
            key(&recipe("CONFIG_A=y"), &package("2"), "gcc 12"),
            key(&recipe("CONFIG_A=y"), &package("1"), "gcc 13"),
        ] {
            assert_ne!(other, one);
        }
    }

    #[test]
    fn a_source_in_the_cache_is_used_without_asking_apt() {
        let cache = tempfile::tempdir().unwrap();
        let record = Record {
            package: "linux-source-6.12".to_owned(),
            version: "6.12.1-1".to_owned(),
            digest: Digest::of(b"x"),
            release: String::new(),
        };
        write_json(&cache.path().join("source.json"), &record).unwrap();
        let found = source_package(&recipe("CONFIG_A=y"), cache.path(), &|_| ()).unwrap();
        assert_eq!(found.version, "6.12.1-1");
        assert!(source_dir(cache.path(), &package("1:2/3")).ends_with("source-1_2_3"));
    }
}
