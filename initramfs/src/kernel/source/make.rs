//! make's part of a kernel build: configure, compile, install, with progress. It knows nothing of caches and keys.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::super::{Record, bzimage, fragments};
use super::store::Objects;
use super::{Package, Recipe, SourceError, io_error};
use crate::Notice;
use crate::modules::files;

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

/// Whether everything is there that the build runs.
pub(super) fn check_tools() -> Result<(), SourceError> {
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

/// Runs a program to its end.
pub(super) fn run(command: &mut Command) -> Result<(), SourceError> {
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
pub(super) struct Make<'a> {
    pub(super) source: PathBuf,
    pub(super) objects: &'a Objects,
    pub(super) recipe: &'a Recipe,
}

impl Make<'_> {
    /// The same inputs give the same kernel: no dates, users, hosts or paths of this machine.
    fn command(&self) -> Command {
        let mut command = Command::new("make");
        command.arg("-C").arg(&self.source).arg(format!("O={}", self.objects.dir.display()));
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
    pub(super) fn configure(&self, notice: Notice<'_>) -> Result<String, SourceError> {
        let fail = io_error(&self.objects.dir);
        fs::create_dir_all(&self.objects.dir).map_err(&fail)?;
        let wishes = self.objects.dir.join("wishes.config");
        fs::write(&wishes, fragments::render(&self.recipe.wishes)).map_err(&fail)?;
        let mut command = self.command();
        command.arg("allnoconfig").env("KCONFIG_ALLCONFIG", &wishes);
        self.watch(command, "allnoconfig", notice)?;
        let path = self.objects.dir.join(".config");
        let config = fs::read_to_string(&path).map_err(io_error(&path))?;
        super::check(self.recipe, &config)?;
        Ok(config)
    }

    /// Compiles and links what changed: the kernel, and modules where it has any.
    pub(super) fn compile(&self, config: &str, notice: Notice<'_>) -> Result<(), SourceError> {
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
        let log = self.objects.dir.join("make.log");
        let errors = File::create(&log).map_err(io_error(&log))?;
        let mut child = command
            // As good as /dev/null, and nobody else touches these objects before make and all its children have ended.
            .stdin(self.objects.hold().map_err(io_error(&self.objects.dir))?)
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
    pub(super) fn collect(
        &self,
        config: &str,
        into: &Path,
        package: Package,
    ) -> Result<(), SourceError> {
        let modules = into.join("modules");
        fs::create_dir_all(&modules).map_err(io_error(&modules))?;
        let (bytes, release) = self.image()?;
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
                let from = self.objects.dir.join(name);
                fs::copy(&from, modules.join(name)).map_err(io_error(&from))?;
            }
        }
        let described = files::describe(&modules)?;
        let Package { name, version, digest, .. } = package;
        let record = Record { package: name, version, digest, release };
        super::write(&into.join("modules.json"), &described)?;
        super::write(&into.join("record.json"), &record)
    }

    /// Links the kernel only, and gives its bzImage.
    pub(super) fn link(&self, notice: Notice<'_>) -> Result<Vec<u8>, SourceError> {
        let mut command = self.command();
        command.arg("bzImage");
        self.watch(command, "the kernel", notice)?;
        self.image().map(|(bytes, _)| bytes)
    }

    /// The finished bzImage and its release.
    fn image(&self) -> Result<(Vec<u8>, String), SourceError> {
        let image = self.objects.dir.join("arch/x86/boot/bzImage");
        let bytes = fs::read(&image).map_err(io_error(&image))?;
        let release = bzimage::release(&bytes).ok_or(SourceError::NotKernel(image))?;
        Ok((bytes, release))
    }
}

fn has_modules(config: &str) -> bool {
    config.lines().any(|line| line == "CONFIG_MODULES=y")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_quoted() {
        let error = run(Command::new("sh").args(["-c", "echo no space >&2; exit 1"])).unwrap_err();
        assert_eq!(error.to_string(), "sh failed: no space");
    }
}
