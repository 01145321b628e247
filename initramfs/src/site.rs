//! The site's archive beside the image: keys, certificates, registries, network, a rescue shell, ssh. The kernel unpacks it over
//! the initramfs, so that the image stays the same for everybody. `assemble` is pure; `build` reads and writes around it.
//! The same inputs give the same bytes.

pub mod packages;
pub mod rescue;

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use protocol::ids::Digest;
use protocol::network::Network;
use serde::Serialize;

use crate::Notice;
use crate::archive::{self, ArchiveError};
use crate::compress::Compression;
use crate::overlay::{self, OverlayError};
use crate::registries::{self, RegistriesError};
use crate::tree::{Kind, Tree, TreeError};
use packages::PackagesError;
use rescue::RescueError;

/// Keys that may log in by ssh.
const AUTHORIZED: &str = "etc/layercake/authorized_keys";
/// The network's configuration.
const NETWORK: &str = "etc/layercake/network.toml";
/// The key that ssh shows, where nodes do not make their own.
const HOST_KEY: &str = "etc/layercake/ssh_host_key";
/// Most bytes of a file of keys or of configuration.
const MAX_TEXT: usize = 1 << 20;

/// When a node takes ssh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ssh {
    /// While there is a rescue shell.
    Rescue,
    /// Always.
    Always,
}

/// What goes in.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Files of public keys, each line of which may log in.
    pub authorized_keys: Vec<PathBuf>,
    /// Files of CA certificates.
    pub ca: Vec<PathBuf>,
    /// Files of public keys; with any, nodes run only ImageSets that one of them signed.
    pub imageset_keys: Vec<PathBuf>,
    /// What nodes know of registries, TOML (`[[registries]]`).
    pub registries: Option<PathBuf>,
    /// The network's configuration, TOML.
    pub network: Option<PathBuf>,
    /// Whether busybox and what makes a rescue shell of it goes in.
    pub rescue_shell: bool,
    /// Whether ssh goes in, and when it is started.
    pub ssh: Option<Ssh>,
    /// The host key of ssh, where nodes are not to make their own.
    pub ssh_host_key: Option<PathBuf>,
    /// Directories merged over the rest, in this order.
    pub dirs: Vec<PathBuf>,
    /// Look for newer packages although there are some in the cache.
    pub update: bool,
    /// Time of last change of every entry, in seconds since 1970 (`SOURCE_DATE_EPOCH`).
    pub mtime: u32,
    /// Where downloads are kept. Two builds with one cache wait for each other.
    pub cache: PathBuf,
    /// The archive; compressed, unless its name ends with `.cpio`.
    pub out: PathBuf,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The archive.
    pub out: PathBuf,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Size of the archive before compression, in bytes.
    pub plain_size: u64,
    /// Whether there is something in it that not everybody should read.
    pub secret: bool,
    /// The packages that programs came from, `NAME VERSION`.
    pub packages: Vec<String>,
    /// What is in it, directories left out: path and size in bytes; links have 0.
    pub files: Vec<(String, u64)>,
}

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// Nothing was asked for.
    #[error("nothing was given that could go into the overlay")]
    Empty,
    /// A file could not be read or written.
    #[error("cannot use {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Wrong {
        /// Which.
        path: PathBuf,
        /// What is wrong; nothing of what is in it.
        reason: String,
    },
    /// ssh without anybody who could use it.
    #[error("ssh without a key that may log in: give --authorized-key FILE")]
    NobodyIn,
    /// A package could not be had.
    #[error(transparent)]
    Packages(#[from] PackagesError),
    /// Shell or ssh could not be put together.
    #[error(transparent)]
    Rescue(#[from] RescueError),
    /// What the operator adds could not be added.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The registry table cannot be used.
    #[error(transparent)]
    Registries(#[from] RegistriesError),
    /// Something does not fit into the tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The archive could not be written.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

/// Builds the archive; it is replaced by a rename.
///
/// # Errors
/// Something cannot be read or is not what it should be; nothing is replaced then.
pub fn build(config: &Config, notice: Notice<'_>) -> Result<Report, SiteError> {
    let mut tree = Tree::new();
    let mut packages = Vec::new();
    if config.rescue_shell {
        let store = packages::get("busybox-static", 0, config, notice)?;
        rescue::add_shell(&mut tree, &store)?;
        packages.extend(store.names);
    }
    if let Some(when) = config.ssh {
        if config.authorized_keys.is_empty() {
            return Err(SiteError::NobodyIn);
        }
        let store = packages::get("dropbear-bin", rescue::MAX_LIBRARIES, config, notice)?;
        rescue::add_ssh(&mut tree, &store, when)?;
        packages.extend(store.names);
    }
    add_site(&mut tree, config)?;
    for dir in &config.dirs {
        overlay::merge(&mut tree, dir)?;
    }
    if tree.iter().all(|(_, node)| node.kind == Kind::Directory) {
        return Err(SiteError::Empty);
    }
    let plain = archive::write(&tree, config.mtime)?;
    let plain_size = size(&plain);
    let is_plain = config.out.extension().is_some_and(|extension| extension == "cpio");
    let how = if is_plain { Compression::None } else { Compression::SMALL };
    let bytes = how.compress(plain).map_err(ArchiveError::Write)?;
    let secret = is_secret(&tree);
    replace(&config.out, &bytes, if secret { 0o600 } else { 0o644 })?;
    let files = tree.iter().filter(|(_, node)| node.kind != Kind::Directory);
    let files = files.map(|(path, node)| match &node.kind {
        Kind::File(contents) => (path.to_owned(), size(contents)),
        _ => (path.to_owned(), 0),
    });
    Ok(Report {
        out: config.out.clone(),
        digest: Digest::of(&bytes),
        size: size(&bytes),
        plain_size,
        secret,
        packages,
        files: files.collect(),
    })
}

/// What is the site's own: keys, certificates, tables.
fn add_site(tree: &mut Tree, config: &Config) -> Result<(), SiteError> {
    let mut authorized = String::new();
    for path in &config.authorized_keys {
        let keys = authorized_keys(&read(path)?);
        let wrong = |reason| SiteError::Wrong { path: path.clone(), reason };
        authorized.push_str(&keys.map_err(wrong)?);
    }
    if !authorized.is_empty() {
        tree.file(AUTHORIZED, 0o600, authorized.into_bytes())?;
    }
    for path in &config.ca {
        overlay::add_ca(tree, path)?;
    }
    for path in &config.imageset_keys {
        overlay::add_imageset_key(tree, path)?;
    }
    if let Some(path) = &config.registries {
        registries::add(tree, path)?;
    }
    if let Some(path) = &config.network {
        let text = read(path)?;
        let (_, problems) = Network::parse_file(&text);
        if !problems.is_empty() {
            let reason = problems.join("; ");
            return Err(SiteError::Wrong { path: path.clone(), reason });
        }
        tree.file(NETWORK, 0o644, text.into_bytes())?;
    }
    if let Some(path) = &config.ssh_host_key {
        let bytes =
            fs::read(path).map_err(|source| SiteError::Io { path: path.clone(), source })?;
        tree.file(HOST_KEY, 0o600, bytes)?;
    }
    Ok(())
}

fn is_secret(tree: &Tree) -> bool {
    [HOST_KEY, "etc/layercake/registries.json"].iter().any(|path| tree.get(path).is_some())
}

/// The lines of an authorized_keys file (sshd(8)) that are keys, checked as far as a slip would keep everybody out.
///
/// # Errors
/// A line is no public key, or there is none.
pub fn authorized_keys(text: &str) -> Result<String, String> {
    let mut keys = String::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line.contains("PRIVATE KEY") {
            return Err("it holds a private key, and every node would get it".to_owned());
        }
        let known = |word: &str| {
            let kind = word.trim_start_matches("sk-");
            kind.starts_with("ssh-") || kind.starts_with("ecdsa-sha2-")
        };
        let mut words = line.split_whitespace().skip_while(|word| !known(word)).skip(1);
        // All begin with the length of the type's name, which is less than 64 KiB.
        if !words.next().is_some_and(|key| key.starts_with("AAAA") && key.len() >= 44) {
            return Err(format!("line {} is no public key (TYPE BASE64 COMMENT)", index + 1));
        }
        keys.push_str(line);
        keys.push('\n');
    }
    if keys.is_empty() { Err("there is no key in it".to_owned()) } else { Ok(keys) }
}

fn read(path: &Path) -> Result<String, SiteError> {
    let bytes = fs::read(path).map_err(|source| SiteError::Io { path: path.to_owned(), source })?;
    let wrong =
        |reason: &str| SiteError::Wrong { path: path.to_owned(), reason: reason.to_owned() };
    if bytes.len() > MAX_TEXT {
        return Err(wrong("it is larger than 1 MiB"));
    }
    String::from_utf8(bytes).map_err(|_| wrong("it is not text"))
}

fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), SiteError> {
    let fail = |source| SiteError::Io { path: path.to_owned(), source };
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(fail)?;
    let file = tempfile::NamedTempFile::new_in(dir).map_err(fail)?;
    fs::write(file.path(), bytes).map_err(fail)?;
    fs::set_permissions(file.path(), Permissions::from_mode(mode)).map_err(fail)?;
    file.persist(path).map_err(|error| fail(error.error))?;
    Ok(())
}

fn size(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Reads a file of keys, whatever bytes it holds.
pub fn fuzz_authorized_keys(bytes: &[u8]) {
    let _ = authorized_keys(&String::from_utf8_lossy(bytes));
}

#[cfg(test)]
mod tests;
