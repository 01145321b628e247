//! What is taken out of kernel packages, of whatever kind: the kernel, its configuration and its modules. One kernel may be spread
//! over several packages. Bounded; nothing is written outside the directory it is given.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use crate::modules::files::plain_path;

/// Most bytes that packages may unpack to. Debian's largest kernel package has 120 MB of compressed modules.
const MAX_BYTES: u64 = 8 << 30;
/// Most entries that packages may hold.
const MAX_ENTRIES: usize = 200_000;

/// Where something of a package goes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// The kernel image of this release.
    Image(String),
    /// Its configuration.
    Config,
    /// A file below `lib/modules/VERSION`: the version, and the path below it.
    Module(String, PathBuf),
}

/// Takes what a kernel needs into a directory: `vmlinuz`, `config` and `modules/` (what is in `lib/modules/VERSION`).
#[derive(Debug)]
pub struct Contents {
    into: PathBuf,
    budget: u64,
    entries: usize,
    release: Option<String>,
    modules_of: Option<String>,
    modules: usize,
    /// Names whose contents come with a later name of the same file: cpio's hard links.
    awaited: BTreeMap<u64, Vec<PathBuf>>,
}

impl Contents {
    /// Into this directory, which is there.
    #[must_use]
    pub fn new(into: &Path) -> Self {
        Self {
            into: into.to_owned(),
            budget: MAX_BYTES,
            entries: 0,
            release: None,
            modules_of: None,
            modules: 0,
            awaited: BTreeMap::new(),
        }
    }

    /// Takes a regular file of a package, or leaves it. `link` is the number of a file with several names; all but the last of
    /// them come without contents.
    ///
    /// # Errors
    /// It cannot be written, there is too much, or there are modules of two kernels.
    pub fn file(
        &mut self,
        path: &Path,
        size: u64,
        link: Option<u64>,
        bytes: &mut dyn Read,
    ) -> io::Result<()> {
        self.count(size)?;
        let Some(place) = place(path) else { return Ok(()) };
        let to = self.target(place)?;
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        match link {
            Some(number) if size == 0 => self.awaited.entry(number).or_default().push(to),
            _ => {
                io::copy(bytes, &mut File::create(&to)?)?;
                for name in link.and_then(|it| self.awaited.remove(&it)).into_iter().flatten() {
                    fs::copy(&to, name)?;
                }
            }
        }
        Ok(())
    }

    /// Counts an entry that is of no use.
    ///
    /// # Errors
    /// There are too many, or they are too large.
    pub fn count(&mut self, size: u64) -> io::Result<()> {
        let too_large = || io::Error::new(io::ErrorKind::InvalidData, "it unpacks to too much");
        self.budget = self.budget.checked_sub(size).ok_or_else(too_large)?;
        self.entries += 1;
        if self.entries > MAX_ENTRIES { Err(too_large()) } else { Ok(()) }
    }

    fn target(&mut self, place: Place) -> io::Result<PathBuf> {
        Ok(match place {
            Place::Image(release) => {
                self.release = Some(release);
                self.into.join("vmlinuz")
            }
            Place::Config => self.into.join("config"),
            Place::Module(release, path) => {
                let before = self.modules_of.get_or_insert_with(|| release.clone());
                if *before != release {
                    let text = format!("modules of two kernels, {before} and {release}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                self.modules += usize::from(is_module(&path));
                self.into.join("modules").join(path)
            }
        })
    }

    /// The release of the kernel that was taken.
    ///
    /// # Errors
    /// What is missing, or does not belong together.
    pub fn finish(self) -> Result<String, &'static str> {
        let release = self.release.ok_or("it has no vmlinuz-VERSION")?;
        if self.modules == 0 {
            return Err(
                "it has no modules; where a distribution puts them into packages of their own, give those as well",
            );
        }
        if self.modules_of.as_ref() != Some(&release) {
            return Err("its modules are of another kernel than its vmlinuz");
        }
        Ok(release)
    }
}

fn is_module(path: &Path) -> bool {
    path.to_str().is_some_and(|path| plain_path(path).ends_with(".ko"))
}

fn place(path: &Path) -> Option<Place> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::CurDir | Component::RootDir => {}
            Component::Normal(part) => parts.push(part.to_str()?),
            _ => return None,
        }
    }
    let parts = match parts.as_slice() {
        ["usr", rest @ ..] => rest,
        all => all,
    };
    match parts {
        ["boot", file] => match file.split_once('-')? {
            ("vmlinuz", release) => Some(Place::Image(release.to_owned())),
            ("config", _) => Some(Place::Config),
            _ => None,
        },
        // Where Fedora and SUSE have them.
        ["lib", "modules", release, "vmlinuz"] => Some(Place::Image((*release).to_owned())),
        ["lib", "modules", _, "config"] => Some(Place::Config),
        ["lib", "modules", release, rest @ ..] => {
            let path: PathBuf = rest.iter().collect();
            let is_index = matches!(rest, [name] if name.starts_with("modules."));
            let place = || Place::Module((*release).to_owned(), path.clone());
            (is_index || is_module(&path)).then(place)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(entries: &[(&str, Option<u64>, &str)]) -> (tempfile::TempDir, Result<String, String>) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        let mut contents = Contents::new(&dir.path().join("out"));
        for (path, link, text) in entries {
            let size = u64::try_from(text.len()).unwrap();
            if let Err(error) = contents.file(Path::new(path), size, *link, &mut text.as_bytes()) {
                return (dir, Err(error.to_string()));
            }
        }
        let finished = contents.finish().map_err(str::to_owned);
        (dir, finished)
    }

    #[test]
    fn a_kernel_may_lie_beside_its_modules() {
        let (dir, release) = take(&[
            ("/lib/modules/6.17-x/vmlinuz", None, "kernel"),
            ("/lib/modules/6.17-x/config", None, "config"),
            ("/usr/lib/modules/6.17-x/kernel/a.ko.xz", None, "module"),
            ("/lib/modules/6.17-x/modules.builtin", None, "builtin"),
            ("/lib/modules/6.17-x/System.map", None, "map"),
        ]);
        assert_eq!(release.unwrap(), "6.17-x");
        let out = dir.path().join("out");
        assert_eq!(fs::read(out.join("vmlinuz")).unwrap(), b"kernel");
        assert_eq!(fs::read(out.join("modules/kernel/a.ko.xz")).unwrap(), b"module");
        assert!(out.join("modules/modules.builtin").exists() && out.join("config").exists());
        assert!(!out.join("modules/System.map").exists());
    }

    #[test]
    fn names_of_one_file_get_its_contents_with_the_last_of_them() {
        let (dir, release) = take(&[
            ("./boot/vmlinuz-1", None, "kernel"),
            ("./lib/modules/1/a.ko", Some(7), ""),
            ("./lib/modules/1/b.ko", Some(7), "module"),
        ]);
        release.unwrap();
        assert_eq!(fs::read(dir.path().join("out/modules/a.ko")).unwrap(), b"module");
    }

    #[test]
    fn what_does_not_belong_together_is_said() {
        let kernel = ("./boot/vmlinuz-1", None, "kernel");
        let module = |path| (path, None, "module");
        let error = |entries: &[_]| take(entries).1.unwrap_err();
        let two = [module("lib/modules/1/a.ko"), module("lib/modules/2/b.ko")];
        assert_eq!(error(&two), "modules of two kernels, 1 and 2");
        let other = [kernel, module("lib/modules/2/b.ko")];
        assert_eq!(error(&other), "its modules are of another kernel than its vmlinuz");
        assert!(error(&[kernel]).contains("packages of their own"));
        assert!(error(&[module("lib/modules/2/b.ko")]).contains("no vmlinuz"));
    }
}
