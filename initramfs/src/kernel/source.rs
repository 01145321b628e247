//! A kernel built from the distribution's source: fetched by apt, configured from fragments, compiled as any user, kept by the
//! hash of everything that went into it. A second build with the same inputs is a look into the cache.
//!
//! ```text
//! CACHE/source-VERSION/            the source, unpacked once for all flavours
//! CACHE/objects-FLAVOUR/           make's own files, so that a change of one symbol compiles little
//! CACHE/built-FLAVOUR-KEY/         vmlinuz, config, modules/, modules.json, record.json: what `kernel::get` reads
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use protocol::ids::Digest;

use super::apt::{Apt, AptError, Package};
use super::fragments::{self, Wish};
use super::kconfig::{self, Symbol};
use super::{Record, bzimage, read_json, write_json};
use crate::Notice;
use crate::modules::files::{self, FilesError};

/// Form of what the cache holds; part of the key.
const FORM: &str = "1";
/// Time between two lines about how far the compiler is.
const PROGRESS: Duration = Duration::from_secs(10);
/// Lines of make's last words that an error quotes.
const LAST_LINES: usize = 8;
/// Programs the build runs, with Debian's packages that have them.
const TOOLS: [(&str, &str); 9] = [
    ("make", "make"),
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl"),
    ("xz", "xz-utils"),
    ("dpkg-deb", "dpkg"),
];
/// A header that objtool is compiled with, and its package.
const HEADER: (&str, &str) = ("/usr/include/gelf.h", "libelf-dev");

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

/// Builds a kernel, or finds it in the cache. Two builds with one cache wait for each other.
///
/// # Errors
/// A tool is missing, the source cannot be had, a symbol is lost, or make fails.
pub fn build(recipe: &Recipe, cache: &Path, notice: Notice<'_>) -> Result<Built, SourceError> {
    let start = Instant::now();
    check_tools()?;
    let _lock = super::lock(cache).map_err(io_error(cache))?;
    super::sweep(cache).map_err(io_error(cache))?;
    let package = source_package(recipe, cache, notice)?;
    let key = key(recipe, &package, &compiler()?);
    let dir = cache.join(format!("built-{}-{key}", recipe.flavour));
    if dir.join("record.json").exists() {
        return Ok(Built { dir, key, cached: true, took: start.elapsed() });
    }
    notice(&format!("kernel {} {key}: not in the cache", recipe.flavour));
    let source = unpacked(&package, cache, notice)?;
    let make = Make { source, objects: cache.join(format!("objects-{}", recipe.flavour)), recipe };
    let config = make.configure(notice)?;
    make.compile(&config, notice)?;
    let work = tempfile::Builder::new()
        .prefix(super::UNPACKING)
        .tempdir_in(cache)
        .map_err(io_error(cache))?;
    let kernel = work.path().join("kernel");
    make.collect(&config, &kernel, package)?;
    fs::rename(&kernel, &dir).map_err(io_error(&dir))?;
    Ok(Built { dir, key, cached: false, took: start.elapsed() })
}

fn check_tools() -> Result<(), SourceError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = |name: &str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    let tools = TOOLS.iter().filter(|(name, _)| !there(name));
    let header = Some(&HEADER).filter(|(path, _)| !Path::new(path).exists());
    let missing: Vec<_> = tools.chain(header).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let join = |pick: fn(&(&'static str, &'static str)) -> &'static str, with| {
        missing.iter().map(|it| pick(it)).collect::<Vec<_>>().join(with)
    };
    Err(SourceError::Tools { missing: join(|it| it.0, ", "), packages: join(|it| it.1, " ") })
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
    if !recipe.update
        && let Ok(record) = read_json::<Record>(&path)
        && recipe.packages.contains(&record.package)
    {
        let Record { package: name, version, digest, .. } = record;
        return Ok(Package { name, version, digest, size: 0, depends: String::new() });
    }
    let package = fetch(recipe, cache, notice)?;
    let record = Record {
        package: package.name.clone(),
        version: package.version.clone(),
        digest: package.digest,
        release: String::new(),
    };
    write_json(&path, &record)
        .map_err(|error| SourceError::Io { path, source: io::Error::other(error) })?;
    Ok(package)
}

fn fetch(recipe: &Recipe, cache: &Path, notice: Notice<'_>) -> Result<Package, SourceError> {
    let mut apt = Apt::new(&cache.join("apt"))?;
    notice("fetching the package lists");
    apt.update()?;
    let package = apt.find(&recipe.packages)?;
    let dir = source_dir(cache, &package);
    if dir.exists() {
        return Ok(package);
    }
    let work = tempfile::Builder::new()
        .prefix(super::UNPACKING)
        .tempdir_in(cache)
        .map_err(io_error(cache))?;
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
    Ok(package)
}

fn source_dir(cache: &Path, package: &Package) -> PathBuf {
    cache.join(format!("source-{}", package.version.replace(['/', ':'], "_")))
}

/// The unpacked source of this package. A cache whose record is there but whose source was taken away is filled again.
fn unpacked(package: &Package, cache: &Path, notice: Notice<'_>) -> Result<PathBuf, SourceError> {
    let dir = source_dir(cache, package);
    if !dir.exists() {
        let recipe = Recipe {
            flavour: String::new(),
            wishes: BTreeMap::new(),
            packages: vec![package.name.clone()],
            required: Vec::new(),
            jobs: 1,
            update: true,
        };
        fetch(&recipe, cache, notice)?;
    }
    Ok(dir)
}

/// Runs a program to its end.
fn run(command: &mut Command) -> Result<(), SourceError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.env("LC_ALL", "C").output().map_err(io_error(name.as_ref()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(SourceError::Failed { command: name, said: last_lines(said.lines()) })
}

fn last_lines<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let lines: Vec<_> = lines.map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default().join("; ")
}

/// make, out of tree.
struct Make<'a> {
    source: PathBuf,
    objects: PathBuf,
    recipe: &'a Recipe,
}

impl Make<'_> {
    /// The same inputs give the same kernel: no dates, users, hosts or paths of this machine.
    fn command(&self) -> Command {
        let mut command = Command::new("make");
        command.arg("-C").arg(&self.source).arg(format!("O={}", self.objects.display()));
        command.arg(format!("-j{}", self.recipe.jobs.max(1)));
        command.arg(format!("LOCALVERSION=-layercake-{}", self.recipe.flavour));
        command.arg(format!("KCFLAGS=-ffile-prefix-map={}=.", self.source.display()));
        for (name, value) in [
            ("LC_ALL", "C"),
            ("KBUILD_BUILD_TIMESTAMP", "1970-01-01 00:00:00 UTC"),
            ("KBUILD_BUILD_USER", "layercake"),
            ("KBUILD_BUILD_HOST", "layercake"),
            ("KBUILD_BUILD_VERSION", "1"),
        ] {
            command.env(name, value);
        }
        // Those of cargo's own jobserver would be taken for ours.
        command.env_remove("MAKEFLAGS").env_remove("MFLAGS").env_remove("CARGO_MAKEFLAGS");
        command
    }

    /// Makes `.config` and checks that every wish came true. Returns its text.
    fn configure(&self, notice: Notice<'_>) -> Result<String, SourceError> {
        let fail = io_error(&self.objects);
        fs::create_dir_all(&self.objects).map_err(&fail)?;
        let wishes = self.objects.join("wishes.config");
        fs::write(&wishes, fragments::render(&self.recipe.wishes)).map_err(&fail)?;
        let mut command = self.command();
        command.arg("allnoconfig").env("KCONFIG_ALLCONFIG", &wishes);
        self.watch(command, "allnoconfig", notice)?;
        let path = self.objects.join(".config");
        let config = fs::read_to_string(&path).map_err(io_error(&path))?;
        let lost = fragments::lost(&self.recipe.wishes, &config);
        let required = kconfig::check(&config, &self.recipe.required);
        let lost: Vec<_> = lost
            .iter()
            .map(ToString::to_string)
            .chain(required.iter().map(ToString::to_string))
            .collect();
        if lost.is_empty() {
            return Ok(config);
        }
        Err(SourceError::Lost { flavour: self.recipe.flavour.clone(), lost: lost.join("; ") })
    }

    fn compile(&self, config: &str, notice: Notice<'_>) -> Result<(), SourceError> {
        let mut command = self.command();
        command.arg("bzImage");
        if has_modules(config) {
            command.arg("modules");
        }
        self.watch(command, "the kernel", notice)
    }

    /// Runs make and tells how far it is.
    fn watch(
        &self,
        mut command: Command,
        what: &str,
        notice: Notice<'_>,
    ) -> Result<(), SourceError> {
        let log = self.objects.join("make.log");
        let errors = File::create(&log).map_err(io_error(&log))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .map_err(io_error("make".as_ref()))?;
        let (start, mut told, mut files) = (Instant::now(), Instant::now(), 0_u32);
        for line in BufReader::new(child.stdout.take().into_iter().next().ok_or_else(|| {
            SourceError::Failed { command: "make".to_owned(), said: "it has no output".to_owned() }
        })?)
        .lines()
        {
            let Ok(line) = line else { continue };
            let mut words = line.split_whitespace();
            let (verb, path) = (words.next().unwrap_or_default(), words.last().unwrap_or_default());
            if matches!(verb, "CC" | "AS" | "HOSTCC" | "CC_M") || line.contains(" [M] ") {
                files += 1;
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                notice(&format!(
                    "{files} files compiled in {} s, now {path}",
                    start.elapsed().as_secs()
                ));
            }
        }
        let status = child.wait().map_err(io_error("make".as_ref()))?;
        if status.success() {
            return Ok(());
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        Err(SourceError::Failed {
            command: format!("make of {what}"),
            said: last_lines(said.lines()),
        })
    }

    /// Puts what the cache keeps into `into`.
    fn collect(&self, config: &str, into: &Path, package: Package) -> Result<(), SourceError> {
        let modules = into.join("modules");
        fs::create_dir_all(&modules).map_err(io_error(&modules))?;
        let image = self.objects.join("arch/x86/boot/bzImage");
        let bytes = fs::read(&image).map_err(io_error(&image))?;
        let release =
            bzimage::release(&bytes).ok_or_else(|| SourceError::NotKernel(image.clone()))?;
        let write =
            |name: &str, bytes: &[u8]| fs::write(into.join(name), bytes).map_err(io_error(into));
        write("vmlinuz", &bytes)?;
        write("config", config.as_bytes())?;
        if has_modules(config) {
            let stage = into.join("stage");
            let mut command = self.command();
            command.arg("modules_install").arg(format!("INSTALL_MOD_PATH={}", stage.display()));
            run(command.args(["INSTALL_MOD_STRIP=1", "DEPMOD=true"]))?;
            let from = stage.join("lib/modules").join(&release);
            fs::remove_dir(&modules)
                .and_then(|()| fs::rename(&from, &modules))
                .map_err(io_error(&from))?;
            fs::remove_dir_all(&stage).map_err(io_error(&stage))?;
            for link in ["build", "source"] {
                let _ = fs::remove_file(modules.join(link));
            }
        } else {
            for name in ["modules.builtin", "modules.builtin.modinfo"] {
                let from = self.objects.join(name);
                fs::copy(&from, modules.join(name)).map_err(io_error(&from))?;
            }
        }
        let described = files::describe(&modules)?;
        let Package { name, version, digest, .. } = package;
        let record = Record { package: name, version, digest, release };
        let json = |path: PathBuf, result: Result<(), super::KernelError>| {
            result.map_err(|error| SourceError::Io { path, source: io::Error::other(error) })
        };
        json(into.join("modules.json"), write_json(&into.join("modules.json"), &described))?;
        json(into.join("record.json"), write_json(&into.join("record.json"), &record))
    }
}

fn has_modules(config: &str) -> bool {
    config.lines().any(|line| line == "CONFIG_MODULES=y")
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

    #[test]
    fn a_failing_program_is_quoted() {
        let error = run(Command::new("sh").args(["-c", "echo no space >&2; exit 1"])).unwrap_err();
        assert_eq!(error.to_string(), "sh failed: no space");
    }
}
