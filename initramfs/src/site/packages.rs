//! Programs and libraries out of Debian's packages, fetched by apt as any user and kept in the cache; with them there, the
//! network is not touched unless an update is asked for.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use protocol::ids::Digest;
use serde::{Deserialize, Serialize};

use super::{Config, rescue};
use crate::Notice;
use crate::kernel::apt::{Apt, AptError, Package};
use crate::kernel::deb::{self, Body, DebError};
use crate::kernel::lock;

/// Form of what the cache holds. Another form is another directory.
const CACHE_FORM: &str = "packages-v1";
/// Directories whose files are taken.
const PLACES: [&str; 4] = ["bin/", "sbin/", "lib/", "lib64/"];
/// Largest file that is taken, and all of a package's, in bytes.
const MAX_BYTES: u64 = 64 << 20;

/// Why a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PackagesError {
    /// apt does not have it.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// It could not be unpacked.
    #[error(transparent)]
    Deb(#[from] DebError),
    /// The cache could not be used.
    #[error("cannot use {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No package that it depends on has these libraries.
    #[error("package {package} needs {}, which no package has that it depends on", missing.join(", "))]
    Missing {
        /// The package.
        package: String,
        /// The libraries.
        missing: Vec<String>,
    },
}

/// What the cache knows of a package it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    name: String,
    version: String,
    digest: Digest,
}

/// The programs and libraries of packages, by file name.
#[derive(Debug, Default)]
pub struct Files {
    /// The packages, `NAME VERSION`.
    pub names: Vec<String>,
    files: BTreeMap<String, Vec<u8>>,
    links: BTreeMap<String, String>,
}

impl Files {
    /// The contents of a file, through links.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let mut name = name;
        for _ in 0..8 {
            match self.links.get(name) {
                Some(target) => name = target,
                None => break,
            }
        }
        self.files.get(name).map(Vec::as_slice)
    }

    /// The contents of all files.
    pub fn contents(&self) -> impl Iterator<Item = &[u8]> {
        self.files.values().map(Vec::as_slice)
    }

    /// Takes in a file, as a package or a test has it.
    pub fn add(&mut self, name: &str, bytes: Vec<u8>) {
        self.files.insert(name.to_owned(), bytes);
    }

    fn unpack(&mut self, package: &Path) -> Result<(), DebError> {
        let mut budget = MAX_BYTES;
        let too_much = || io::Error::new(io::ErrorKind::InvalidData, "it unpacks to too much");
        deb::each(package, |path, size, body| {
            let Some(name) = taken(path) else { return Ok(()) };
            match body {
                Body::File(bytes) => {
                    budget = budget.checked_sub(size).ok_or_else(too_much)?;
                    let mut contents = Vec::new();
                    bytes.take(size).read_to_end(&mut contents)?;
                    self.files.insert(name, contents);
                }
                Body::Link(target) => {
                    let target = target.file_name().and_then(|target| target.to_str());
                    self.links.extend(target.map(|target| (name, target.to_owned())));
                }
                Body::Other => {}
            }
            Ok(())
        })
    }
}

/// The name of a file that is taken out of a package.
fn taken(path: &Path) -> Option<String> {
    let text = path.to_str()?.trim_start_matches("./");
    let text = text.strip_prefix("usr/").unwrap_or(text);
    // Libraries' modules lie deeper, and are not asked for by anybody here.
    let deep = text.split('/').count() > 3;
    let wanted = !deep && PLACES.iter().any(|place| text.starts_with(place));
    wanted.then(|| path.file_name()?.to_str().map(str::to_owned)).flatten()
}

/// The files of a package, and of as many that it depends on as its libraries come from; none of these with 0.
///
/// # Errors
/// apt does not have them, they cannot be unpacked, or the cache cannot be used.
pub fn get(
    package: &str,
    libraries: usize,
    config: &Config,
    notice: Notice<'_>,
) -> Result<Files, PackagesError> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source| PackagesError::Io { path, source }
    };
    let _lock = lock(&config.cache).map_err(fail(&config.cache))?;
    let dir = config.cache.join(CACHE_FORM);
    fs::create_dir_all(&dir).map_err(fail(&dir))?;
    let list = dir.join(format!("{package}.json"));
    if !config.update
        && let Some(files) = kept(&dir, &list)
    {
        return Ok(files);
    }
    let mut apt = Apt::new(&config.cache.join("apt"))?;
    notice("fetching the package lists");
    apt.update()?;
    let (mut files, mut records) = (Files::default(), Vec::new());
    let mut names = vec![package.to_owned()];
    let mut at = 0;
    while let Some(name) = names.get(at).filter(|_| at <= libraries).cloned() {
        at += 1;
        let found = apt.find(&[name])?;
        let path = fetch(&apt, &found, &dir, notice)?;
        files.unpack(&path)?;
        files.names.push(format!("{} {}", found.name, found.version));
        for depended in depended(&found.depends) {
            if !names.contains(&depended) {
                names.push(depended);
            }
        }
        let Package { name, version, digest, .. } = found;
        records.push(Record { name, version, digest });
        if libraries > 0 && rescue::missing(&files).is_empty() {
            break;
        }
    }
    let missing = rescue::missing(&files);
    if libraries > 0 && !missing.is_empty() {
        return Err(PackagesError::Missing { package: package.to_owned(), missing });
    }
    let text = serde_json::to_vec(&records).map_err(|error| fail(&list)(error.into()))?;
    fs::write(&list, text).map_err(fail(&list))?;
    Ok(files)
}

fn kept(dir: &Path, list: &Path) -> Option<Files> {
    let records: Vec<Record> = serde_json::from_slice(&fs::read(list).ok()?).ok()?;
    let mut files = Files::default();
    for record in records {
        files.unpack(&place(dir, &record.digest)).ok()?;
        files.names.push(format!("{} {}", record.name, record.version));
    }
    Some(files)
}

fn place(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join(format!("{}.deb", digest.hex()))
}

fn fetch(
    apt: &Apt,
    package: &Package,
    dir: &Path,
    notice: Notice<'_>,
) -> Result<PathBuf, PackagesError> {
    let path = place(dir, &package.digest);
    let fail = |source| PackagesError::Io { path: dir.to_owned(), source };
    if fs::read(&path).is_ok_and(|bytes| Digest::of(&bytes) == package.digest) {
        return Ok(path);
    }
    let work = tempfile::tempdir_in(dir).map_err(fail)?;
    let file = apt.download(package, work.path(), notice)?;
    fs::rename(file, &path).map_err(fail)?;
    Ok(path)
}

/// The packages of a `Depends` field (deb-control(5)), the first of alternatives.
fn depended(field: &str) -> Vec<String> {
    let first = |item: &str| {
        let name = item.split('|').next()?.split_whitespace().next()?;
        Some(name.split(':').next()?.to_owned())
    };
    field.split(',').filter_map(first).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_libraries_are_taken_and_nothing_else() {
        for (path, expected) in [
            ("./bin/busybox", Some("busybox")),
            ("./usr/sbin/dropbear", Some("dropbear")),
            ("./usr/lib/x86_64-linux-gnu/libz.so.1", Some("libz.so.1")),
            ("./lib64/ld-linux-x86-64.so.2", Some("ld-linux-x86-64.so.2")),
            ("./usr/lib/x86_64-linux-gnu/gconv/KOI8-R.so", None),
            ("./usr/share/doc/x", None),
        ] {
            assert_eq!(taken(Path::new(path)).as_deref(), expected, "{path}");
        }
    }

    #[test]
    fn links_lead_to_files_and_not_in_circles() {
        let mut files = Files::default();
        files.add("libz.so.1.2", b"z".to_vec());
        for (from, to) in [("libz.so.1", "libz.so.1.2"), ("a", "b"), ("b", "a")] {
            files.links.insert(from.to_owned(), to.to_owned());
        }
        assert_eq!(files.get("libz.so.1"), Some(b"z".as_slice()));
        assert_eq!((files.get("a"), files.get("c")), (None, None));
    }

    #[test]
    fn the_first_of_alternatives_is_depended_on() {
        let field = "libc6 (>= 2.34), zlib1g:any, a | b (= 1)";
        assert_eq!(depended(field), ["libc6", "zlib1g", "a"]);
        assert!(depended("").is_empty());
    }
}
