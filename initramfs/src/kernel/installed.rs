//! Kernels that are installed on a machine: `/boot/vmlinuz-RELEASE` with its modules, below any root.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// An installed kernel's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The bzImage.
    pub image: PathBuf,
    /// Its `lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// Its configuration, where it is there.
    pub config: Option<PathBuf>,
}

/// Why no installed kernel can be used.
#[derive(Debug, thiserror::Error)]
pub enum InstalledError {
    /// There is none.
    #[error(
        "no kernel is installed below {root}: neither boot/vmlinuz-RELEASE nor lib/modules/RELEASE/vmlinuz"
    )]
    Nothing {
        /// The root directory.
        root: PathBuf,
    },
    /// There are several and none of them runs.
    #[error("several kernels are installed below {root}, name one of them: {}", .releases.join(", "))]
    Several {
        /// The root directory.
        root: PathBuf,
        /// What is there.
        releases: Vec<String>,
    },
    /// That one is not there.
    #[error("kernel {release} is not installed below {root}; there are: {}", .releases.join(", "))]
    Unknown {
        /// What was asked for.
        release: String,
        /// The root directory.
        root: PathBuf,
        /// What is there.
        releases: Vec<String>,
    },
    /// It has no modules.
    #[error("kernel {release} has no directory {modules}")]
    NoModules {
        /// The kernel.
        release: String,
        /// Where they should be.
        modules: PathBuf,
    },
    /// The image is only for root to read, as Ubuntu has it, or a directory is.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Finds a kernel below `root`: this release, or else the `running` one, or else the only one.
///
/// # Errors
/// There is none, not that one, several, or it has no modules.
pub fn find(
    root: &Path,
    release: Option<&str>,
    running: Option<&str>,
) -> Result<Installed, InstalledError> {
    let releases = releases(root)?;
    let has = |wanted: &str| releases.iter().any(|release| release == wanted);
    let root = root.to_owned();
    let release = match (release, running) {
        (Some(release), _) if has(release) => release.to_owned(),
        (Some(release), _) => {
            let release = release.to_owned();
            return Err(InstalledError::Unknown { release, root, releases });
        }
        (None, Some(running)) if has(running) => running.to_owned(),
        (None, _) => match releases.as_slice() {
            [] => return Err(InstalledError::Nothing { root }),
            [one] => one.clone(),
            _ => return Err(InstalledError::Several { root, releases }),
        },
    };
    let first = |places: [String; 3]| {
        places.into_iter().map(|place| root.join(place)).find(|path| path.exists())
    };
    let beside = |name: &str| {
        let place = |usr| format!("{usr}lib/modules/{release}/{name}");
        first([format!("boot/{name}-{release}"), place(""), place("usr/")])
    };
    let image = beside("vmlinuz").ok_or_else(|| InstalledError::Nothing { root: root.clone() })?;
    let modules = ["lib/modules", "usr/lib/modules"].map(|dir| root.join(dir).join(&release));
    let [merged, _] = &modules;
    let merged = merged.clone();
    let modules = modules.into_iter().find(|dir| dir.is_dir());
    let modules =
        modules.ok_or(InstalledError::NoModules { release: release.clone(), modules: merged })?;
    Ok(Installed { image, modules, config: beside("config") })
}

/// Releases with a kernel image, sorted.
fn releases(root: &Path) -> Result<Vec<String>, InstalledError> {
    let mut found = Vec::new();
    for name in names(&root.join("boot"))? {
        found.extend(name.strip_prefix("vmlinuz-").map(str::to_owned));
    }
    for dir in ["lib/modules", "usr/lib/modules"] {
        for name in names(&root.join(dir))? {
            if root.join(dir).join(&name).join("vmlinuz").exists() {
                found.push(name);
            }
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

fn names(dir: &Path) -> Result<Vec<String>, InstalledError> {
    let fail = |source| InstalledError::Read { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    let name = |entry: io::Result<fs::DirEntry>| {
        entry.map(|entry| entry.file_name().to_string_lossy().into_owned())
    };
    entries.map(name).collect::<Result<_, _>>().map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"x").unwrap();
        }
        dir
    }

    #[test]
    fn the_named_one_is_found_where_debian_and_where_fedora_have_it() {
        let debian = root(&["boot/vmlinuz-1", "boot/config-1", "lib/modules/1/a.ko"]);
        let found = find(debian.path(), Some("1"), None).unwrap();
        assert_eq!(found.image, debian.path().join("boot/vmlinuz-1"));
        assert_eq!(found.config, Some(debian.path().join("boot/config-1")));
        let fedora = root(&["usr/lib/modules/2/vmlinuz", "usr/lib/modules/2/config"]);
        let found = find(fedora.path(), None, Some("9")).unwrap();
        assert_eq!(found.modules, fedora.path().join("usr/lib/modules/2"));
        assert_eq!(found.config, Some(fedora.path().join("usr/lib/modules/2/config")));
    }

    #[test]
    fn of_several_the_running_one_is_taken_or_one_must_be_named() {
        let files =
            ["boot/vmlinuz-1", "lib/modules/1/a.ko", "boot/vmlinuz-2", "lib/modules/2/a.ko"];
        let root = root(&files);
        let image = |running| find(root.path(), None, running).map(|found| found.image);
        assert_eq!(image(Some("2")).unwrap(), root.path().join("boot/vmlinuz-2"));
        let error = image(Some("3")).unwrap_err().to_string();
        assert!(error.ends_with("name one of them: 1, 2"), "{error}");
        let error = find(root.path(), Some("3"), None).unwrap_err().to_string();
        assert!(error.ends_with("there are: 1, 2"), "{error}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let empty = root(&[]);
        let error = find(empty.path(), None, None).unwrap_err().to_string();
        assert!(error.starts_with("no kernel is installed below"), "{error}");
        let bare = root(&["boot/vmlinuz-1"]);
        let error = find(bare.path(), None, None).unwrap_err().to_string();
        assert!(error.ends_with("lib/modules/1"), "{error}");
    }
}
