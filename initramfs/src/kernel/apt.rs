//! Kernel packages by apt, as any user: with lists and caches of our own, so that nothing of the system is touched or
//! asked for. What apt prints is read by pure functions; apt itself checks the archive's signatures.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::str::FromStr;

use protocol::ids::Digest;

use crate::Notice;

/// A package in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Sum of its file.
    pub digest: Digest,
    /// Size of its file in bytes.
    pub size: u64,
    /// Its `Depends` field, empty if it has none.
    pub depends: String,
}

/// Why no package could be had.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    /// There is no apt here.
    #[error(
        "there is no {0} here: this is not a Debian system; give a kernel with --kernel FILE and --modules DIR"
    )]
    NoApt(&'static str),
    /// apt could not be started, or its directories not be made.
    #[error("cannot use {path}")]
    Io {
        /// The program or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// apt failed.
    #[error("{command} failed: {said}")]
    Failed {
        /// Program and first argument.
        command: String,
        /// The last lines it printed.
        said: String,
    },
    /// No package of these names.
    #[error(
        "the archives this machine is set up for have no package {names}{warnings}; or give a kernel with --kernel FILE and --modules DIR"
    )]
    Unknown {
        /// The names that were tried.
        names: String,
        /// What fetching the lists warned of, after a colon; empty if nothing.
        warnings: String,
    },
    /// No kernel of this version.
    #[error(
        "the archives this machine is set up for have no kernel {version} of this flavour, only {there}"
    )]
    Version {
        /// What was asked for.
        version: String,
        /// The kernel packages that are there.
        there: String,
    },
    /// apt says something of a package that cannot be used.
    #[error("package {package} cannot be used: {reason}")]
    Odd {
        /// The package.
        package: String,
        /// What is wrong.
        reason: String,
    },
}

/// apt with state of its own.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
    /// Where apt's programs are, if not where the system has them.
    programs: Option<PathBuf>,
    /// What fetching the lists warned of.
    warnings: Vec<String>,
}

impl Apt {
    /// Prepares a directory for apt's own lists and caches.
    ///
    /// # Errors
    /// The directory cannot be made or written.
    pub fn new(dir: &Path) -> Result<Self, AptError> {
        let fail = |source| AptError::Io { path: dir.to_owned(), source };
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(name)).map_err(fail)?;
        }
        let dir = fs::canonicalize(dir).map_err(fail)?;
        fs::write(dir.join("apt.conf"), configuration(&dir)).map_err(fail)?;
        Ok(Self { dir, programs: None, warnings: Vec::new() })
    }

    /// Fetches the package lists. Sources that do not answer are only an error when a package is not found.
    ///
    /// # Errors
    /// There is no apt, or it fails.
    pub fn update(&mut self) -> Result<(), AptError> {
        let output = self.run("apt-get", &["-q", "update"], &self.dir)?;
        let said = String::from_utf8_lossy(&output.stderr);
        let warning = |line: &str| line.starts_with("W:") || line.starts_with("E:");
        self.warnings = said.lines().filter(|line| warning(line)).map(str::to_owned).collect();
        Ok(())
    }

    /// Finds the newest kernel package that the first known of these metapackages depends on, of any version or of one that begins
    /// so (`6.1`).
    ///
    /// # Errors
    /// None of them is known or of that version, or it depends on no kernel package.
    pub fn resolve(
        &self,
        metapackages: &[String],
        version: Option<&str>,
    ) -> Result<Package, AptError> {
        let mut others = Vec::new();
        for name in metapackages {
            let Some(meta) = self.show(name)? else { continue };
            let Some(image) = image_dependency(&meta.depends) else {
                let reason = format!("it depends on no kernel package ({})", meta.depends);
                return Err(AptError::Odd { package: name.clone(), reason });
            };
            if version.is_some_and(|version| !is_of_version(image, version)) {
                others.push(image.to_owned());
                continue;
            }
            return self.show(image)?.ok_or_else(|| self.unknown(image));
        }
        match version.filter(|_| !others.is_empty()) {
            None => Err(self.unknown(&metapackages.join(" or "))),
            Some(version) => {
                let (version, there) = (version.to_owned(), others.join(" and "));
                Err(AptError::Version { version, there })
            }
        }
    }

    /// The first of these packages that the archive has.
    ///
    /// # Errors
    /// It has none of them.
    pub fn find(&self, names: &[String]) -> Result<Package, AptError> {
        for name in names {
            if let Some(package) = self.show(name)? {
                return Ok(package);
            }
        }
        Err(self.unknown(&names.join(" or ")))
    }

    fn unknown(&self, names: &str) -> AptError {
        let warnings: String =
            self.warnings.iter().take(2).map(|line| format!(": {}", line.trim())).collect();
        AptError::Unknown { names: names.to_owned(), warnings }
    }

    /// Downloads a package into `into` and returns its file, whose digest has been checked.
    ///
    /// # Errors
    /// apt fails, or the file is not the one the lists name.
    pub fn download(
        &self,
        package: &Package,
        into: &Path,
        notice: Notice<'_>,
    ) -> Result<PathBuf, AptError> {
        let size = match package.size {
            kilobytes @ 0..1_000_000 => format!("{} kB", kilobytes / 1000),
            megabytes => format!("{} MB", megabytes / 1_000_000),
        };
        notice(&format!("fetching {} ({size})", package.name));
        let wanted = format!("{}={}", package.name, package.version);
        self.run("apt-get", &["-q", "download", &wanted], into)?;
        let fail = |source| AptError::Io { path: into.to_owned(), source };
        for entry in fs::read_dir(into).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                let bytes = fs::read(&path).map_err(fail)?;
                if Digest::of(&bytes) != package.digest {
                    let reason = format!("its file is not {}", package.digest);
                    return Err(AptError::Odd { package: package.name.clone(), reason });
                }
                return Ok(path);
            }
        }
        let reason = "apt-get download left no file".to_owned();
        Err(AptError::Odd { package: package.name.clone(), reason })
    }

    fn show(&self, name: &str) -> Result<Option<Package>, AptError> {
        match self.run("apt-cache", &["show", "--no-all-versions", name], &self.dir) {
            Ok(output) => parse(&String::from_utf8_lossy(&output.stdout)).map_err(|reason| {
                let package = name.to_owned();
                AptError::Odd { package, reason: format!("apt-cache shows no {reason} of it") }
            }),
            // What apt-cache does for a name it does not know; anything else that fails looks the same to it.
            Err(AptError::Failed { said, .. }) if said.contains("No packages found") => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn run(&self, program: &'static str, args: &[&str], dir: &Path) -> Result<Output, AptError> {
        let path = self.programs.as_ref().map_or_else(|| program.into(), |dir| dir.join(program));
        let mut command = Command::new(path);
        command.arg("-c").arg(self.dir.join("apt.conf")).args(args).current_dir(dir);
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        let output = command.output().map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound && dir.is_dir() {
                AptError::NoApt(program)
            } else {
                AptError::Io { path: program.into(), source }
            }
        })?;
        if output.status.success() {
            return Ok(output);
        }
        let said = [output.stdout.as_slice(), b"\n", &output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let said = lines[lines.len().saturating_sub(4)..].join("; ");
        let command = format!("{program} {}", args.iter().find(|arg| **arg != "-q").unwrap_or(&""));
        Err(AptError::Failed { command, said })
    }
}

/// apt.conf(5), read after the system's own: `#clear` takes away hooks that touch the system.
fn configuration(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "Dir::State::lists \"{dir}/lists\";\n\
         Dir::Cache \"{dir}/cache\";\n\
         APT::Sandbox::User \"\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
         #clear APT::Update::Pre-Invoke;\n\
         #clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n"
    )
}

/// Reads the first stanza of `apt-cache show`; the error is the field that is missing or wrong.
fn parse(text: &str) -> Result<Option<Package>, &'static str> {
    let stanza = text.split("\n\n").next().unwrap_or_default();
    if stanza.trim().is_empty() {
        return Ok(None);
    }
    let field = |name: &'static str| {
        let fields = stanza.lines().filter_map(|line| line.split_once(':'));
        let mut fields = fields.filter(|(key, _)| *key == name);
        fields.next().map(|(_, value)| value.trim()).ok_or(name)
    };
    Ok(Some(Package {
        name: field("Package")?.to_owned(),
        version: field("Version")?.to_owned(),
        digest: Digest::from_str(&format!("sha256:{}", field("SHA256")?)).map_err(|_| "SHA256")?,
        size: field("Size")?.parse().map_err(|_| "Size")?,
        depends: field("Depends").unwrap_or_default().to_owned(),
    }))
}

/// The kernel package among the dependencies of a metapackage.
fn image_dependency(depends: &str) -> Option<&str> {
    let alternatives = depends.split([',', '|']).map(str::trim);
    alternatives
        .filter_map(|item| item.split_whitespace().next())
        .find(|name| name.starts_with("linux-image-"))
}

/// Whether a kernel package (`linux-image-6.1.0-56-amd64`) is of a version that begins so (`6.1`).
fn is_of_version(image: &str, version: &str) -> bool {
    let rest = image.strip_prefix("linux-image-").and_then(|rest| rest.strip_prefix(version));
    rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZA: &str = "Package: linux-image-6.12-cloud-amd64\nVersion: 6.12.117-1~deb12u1\n\
        Depends: linux-base (>= 4), linux-image-6.12.117+deb12-cloud-amd64 (= 6.12.117-1~deb12u1)\n\
        Description: Linux\n with: colons\nSize: 1512\n\
        SHA256: ab2bd6d92fedce96f7fb3f51a0dfefadf069a32023927150d7ddaeb3aed1464c\n\nPackage: older\n";

    #[test]
    fn a_metapackage_leads_to_its_kernel() {
        let package = parse(STANZA).unwrap().unwrap();
        assert_eq!((package.version.as_str(), package.size), ("6.12.117-1~deb12u1", 1512));
        let image = image_dependency(&package.depends);
        assert_eq!(image, Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(image_dependency("linux-base, kmod | other"), None);
    }

    #[test]
    fn a_version_is_a_beginning_and_ends_between_numbers() {
        assert!(is_of_version("linux-image-6.1.0-56-amd64", "6.1"));
        assert!(!is_of_version("linux-image-6.12.117+deb12-amd64", "6.1"));
        let show = format!("cat <<'E'\n{STANZA}E");
        let (_dir, apt) = fake(":", &show, ":");
        let error = apt.resolve(&["meta".to_owned()], Some("6.1")).unwrap_err().to_string();
        assert!(error.contains("no kernel 6.1 of this flavour, only linux-image-6.12."), "{error}");
        assert!(apt.resolve(&["meta".to_owned()], Some("6.12")).is_ok());
    }

    #[test]
    fn a_stanza_without_a_sum_names_the_field() {
        assert_eq!(parse(&STANZA.replace("SHA256", "MD5sum")), Err("SHA256"));
        assert_eq!(parse(&STANZA.replace("1512", "big")), Err("Size"));
        assert_eq!(parse("\n"), Ok(None));
    }

    /// apt played by shell scripts.
    fn fake(update: &str, show: &str, download: &str) -> (tempfile::TempDir, Apt) {
        let dir = tempfile::tempdir().unwrap();
        let get =
            format!("#!/bin/sh\ncase \"$4\" in update) {update};; download) {download};; esac\n");
        for (name, text) in [("apt-get", get), ("apt-cache", format!("#!/bin/sh\n{show}\n"))] {
            let source = dir.path().join("text");
            fs::write(&source, text).unwrap();
            // By another process: a child that a test beside this one forks would have it open for writing (ETXTBSY).
            let mut install = std::process::Command::new("install");
            install.args(["-m", "755"]).args([source, dir.path().join(name)]);
            assert!(install.status().unwrap().success());
        }
        let mut apt = Apt::new(&dir.path().join("apt")).unwrap();
        apt.programs = Some(dir.path().to_owned());
        (dir, apt)
    }

    fn package(contents: &[u8]) -> Package {
        let (name, version) = ("linux-image-x".to_owned(), "1".to_owned());
        Package { name, version, digest: Digest::of(contents), size: 4, depends: String::new() }
    }

    #[test]
    fn a_download_is_checked_against_the_sum_in_the_lists() {
        let (dir, apt) = fake(":", ":", "printf data > x.deb");
        let path = apt.download(&package(b"data"), dir.path(), &|_| ()).unwrap();
        assert_eq!(fs::read(path).unwrap(), b"data");
        let error = apt.download(&package(b"other"), dir.path(), &|_| ()).unwrap_err().to_string();
        assert!(error.contains("its file is not sha256:"), "{error}");
        let (dir, apt) = fake(":", ":", ":");
        let error = apt.download(&package(b"data"), dir.path(), &|_| ()).unwrap_err().to_string();
        assert!(error.ends_with("left no file"), "{error}");
    }

    #[test]
    fn an_unknown_package_comes_with_what_the_update_warned_of() {
        let not_found = "echo 'E: No packages found' >&2; exit 100";
        let (_dir, mut apt) = fake("echo 'W: Failed to fetch http://x' >&2", not_found, ":");
        apt.update().unwrap();
        let error = apt.resolve(&["a".to_owned(), "b".to_owned()], None).unwrap_err().to_string();
        assert!(error.contains("no package a or b: W: Failed to fetch http://x;"), "{error}");
    }

    #[test]
    fn a_failing_apt_is_quoted_and_a_missing_one_points_to_the_way_out() {
        let (dir, mut apt) = fake("echo 'E: no space left' >&2; exit 100", ":", ":");
        let error = apt.update().unwrap_err().to_string();
        assert_eq!(error, "apt-get update failed: E: no space left");
        apt.programs = Some(dir.path().join("nowhere"));
        let error = apt.update().unwrap_err().to_string();
        assert!(error.contains("not a Debian system; give a kernel with --kernel"), "{error}");
    }
}
