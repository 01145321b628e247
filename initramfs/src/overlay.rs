//! What the operator adds to an image: whole directories, CA certificates, and keys that ImageSets must be signed by. Reads the disk; decides nothing else.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use protocol::signature::{KeyError, PublicKey};

use crate::tree::{Tree, TreeError};

/// Where CA certificates lie in the image.
const CA_DIR: &str = "etc/layercake/ca";
/// Where the public keys lie that an ImageSet must be signed by.
const KEYS_DIR: &str = "etc/layercake/keys";
/// Deepest directory of an overlay.
const MAX_DEPTH: usize = 64;
/// Largest certificate file, in bytes: whole public bundles have 250 kB.
const MAX_PEM: usize = 4 << 20;

/// Why something could not be added.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A file or directory could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is of a kind that an image does not take.
    #[error("{path} cannot go into an image: {reason}")]
    Odd {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// It is not a public key that signatures can be verified by.
    #[error("{path} cannot be a key for ImageSets")]
    Key {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// It does not fit to what is in the image already.
    #[error("{path} cannot go into the image")]
    Tree {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: TreeError,
    },
}

/// Merges a directory's tree over what is there. Modes and links stay as they are, owners become root.
///
/// # Errors
/// Something cannot be read, is a device, socket or pipe, or is a file where the image has a directory.
pub fn merge(tree: &mut Tree, dir: &Path) -> Result<(), OverlayError> {
    walk(tree, dir, "", 0)
}

fn walk(tree: &mut Tree, dir: &Path, below: &str, depth: usize) -> Result<(), OverlayError> {
    let read_fail = |path: &Path| {
        let path = path.to_owned();
        move |source| OverlayError::Read { path, source }
    };
    if depth > MAX_DEPTH {
        return Err(OverlayError::Odd { path: dir.to_owned(), reason: "it is too deep" });
    }
    for entry in fs::read_dir(dir).map_err(read_fail(dir))? {
        let path = entry.map_err(read_fail(dir))?.path();
        let odd = |reason| OverlayError::Odd { path: path.clone(), reason };
        let tree_fail = |source| OverlayError::Tree { path: path.clone(), source };
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| odd("its name is not UTF-8"))?;
        let place = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
        let about = fs::symlink_metadata(&path).map_err(read_fail(&path))?;
        let (kind, mode) = (about.file_type(), about.permissions().mode());
        if kind.is_dir() {
            tree.directory(&place, mode).map_err(tree_fail)?;
            walk(tree, &path, &place, depth + 1)?;
        } else if kind.is_file() {
            let contents = fs::read(&path).map_err(read_fail(&path))?;
            tree.file(&place, mode, contents).map_err(tree_fail)?;
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).map_err(read_fail(&path))?;
            let target = target.to_str().ok_or_else(|| odd("its link target is not UTF-8"))?;
            tree.symlink(&place, target).map_err(tree_fail)?;
        } else {
            return Err(odd("it is a device, a socket or a pipe"));
        }
    }
    Ok(())
}

/// Adds a file of CA certificates, which the agent will trust, as `/etc/layercake/ca/STEM.pem`.
///
/// # Errors
/// It cannot be read, holds no certificate in PEM form, holds a private key, or another file has that name.
pub fn add_ca(tree: &mut Tree, path: &Path) -> Result<(), OverlayError> {
    let odd = |reason| OverlayError::Odd { path: path.to_owned(), reason };
    let read = |source| OverlayError::Read { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(read)?;
    check_pem(&bytes).map_err(odd)?;
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let place = format!("{CA_DIR}/{}.pem", stem.ok_or_else(|| odd("its name is not UTF-8"))?);
    if tree.get(&place).is_some() {
        return Err(odd("another --ca file has the same name"));
    }
    let fail = |source| OverlayError::Tree { path: path.to_owned(), source };
    tree.file(&place, 0o644, bytes).map_err(fail)
}

/// Adds a public key, by which every ImageSet must then be signed, as `/etc/layercake/keys/STEM.pem`.
///
/// # Errors
/// It cannot be read, is not one ECDSA P-256 public key in PEM form, or another file has that name.
pub fn add_imageset_key(tree: &mut Tree, path: &Path) -> Result<(), OverlayError> {
    let odd = |reason| OverlayError::Odd { path: path.to_owned(), reason };
    let read = |source| OverlayError::Read { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(read)?;
    let text = std::str::from_utf8(&bytes).map_err(|_| odd("it is not PEM text"))?;
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let stem = stem.ok_or_else(|| odd("its name is not UTF-8"))?;
    let name = format!("{stem}.pem");
    let key = PublicKey::from_pem(&name, text);
    key.map_err(|source| OverlayError::Key { path: path.to_owned(), source })?;
    let place = format!("{KEYS_DIR}/{name}");
    if tree.get(&place).is_some() {
        return Err(odd("another --imageset-key file has the same name"));
    }
    let fail = |source| OverlayError::Tree { path: path.to_owned(), source };
    tree.file(&place, 0o644, bytes).map_err(fail)
}

/// Whether these are certificates and nothing secret (RFC 7468). What is in a certificate is not looked at.
fn check_pem(bytes: &[u8]) -> Result<(), &'static str> {
    if bytes.len() > MAX_PEM {
        return Err("it is larger than 4 MiB");
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not PEM text")?;
    let (mut inside, mut found, mut length) = (false, false, 0);
    for line in text.lines().map(str::trim) {
        if line.starts_with("-----BEGIN") && line.contains("PRIVATE KEY") {
            return Err("it holds a private key, and every node would get it");
        }
        match line {
            "-----BEGIN CERTIFICATE-----" if !inside => (inside, length) = (true, 0),
            "-----END CERTIFICATE-----" if inside && length > 0 && length % 4 == 0 => {
                (inside, found) = (false, true);
            }
            "-----BEGIN CERTIFICATE-----" | "-----END CERTIFICATE-----" => {
                return Err("a certificate in it is cut");
            }
            _ if inside && !line.bytes().all(is_base64) => {
                return Err("a certificate in it is not base64");
            }
            _ => length += line.len(),
        }
    }
    match (inside, found) {
        (true, _) => Err("a certificate in it is cut"),
        (false, false) => Err("it holds no certificate in PEM form"),
        (false, true) => Ok(()),
    }
}

fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::tree::Kind;

    #[test]
    fn an_overlay_keeps_modes_and_links_and_wins() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("bin")).unwrap();
        fs::write(at("bin/busybox"), b"new").unwrap();
        fs::set_permissions(at("bin/busybox"), fs::Permissions::from_mode(0o4755)).unwrap();
        symlink("busybox", at("bin/sh")).unwrap();
        let mut tree = Tree::new();
        tree.file("bin/busybox", 0o644, b"old".to_vec()).unwrap();
        merge(&mut tree, dir.path()).unwrap();
        let node = tree.get("bin/busybox").unwrap();
        assert_eq!((&node.kind, node.mode), (&Kind::File(b"new".to_vec()), 0o4755));
        assert_eq!(tree.get("bin/sh").unwrap().kind, Kind::Symlink("busybox".to_owned()));
    }

    #[test]
    fn a_socket_and_a_file_over_a_directory_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(dir.path().join("sock")).unwrap();
        let error = merge(&mut Tree::new(), dir.path()).unwrap_err().to_string();
        assert!(error.contains("/sock cannot go into an image"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("dev"), b"").unwrap();
        let mut tree = Tree::new();
        tree.directory("dev", 0o755).unwrap();
        assert!(matches!(merge(&mut tree, dir.path()), Err(OverlayError::Tree { .. })));
        assert!(merge(&mut tree, &dir.path().join("gone")).is_err());
    }

    #[track_caller]
    fn check(pem: &str, expect: Result<(), &'static str>) {
        assert_eq!(check_pem(pem.as_bytes()), expect);
    }

    #[test]
    fn only_whole_certificates_are_taken() {
        let (begin, end) = ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----");
        check(&format!("a comment\n{begin}\nMIIB\n{end}\n{begin}\nMII=\n{end}\n"), Ok(()));
        check("", Err("it holds no certificate in PEM form"));
        check(&format!("{begin}\nMIIB\n"), Err("a certificate in it is cut"));
        check(&format!("{begin}\n{end}\n"), Err("a certificate in it is cut"));
        check(&format!("{begin}\nM!!B\n{end}\n"), Err("a certificate in it is not base64"));
        let key = "-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n";
        check(key, Err("it holds a private key, and every node would get it"));
    }

    #[test]
    fn only_public_keys_that_can_verify_are_taken_and_each_name_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("release.pub");
        let good = include_str!("../../protocol/golden/v1/signature/release.pub");
        let mut tree = Tree::new();
        for (text, reason) in [
            ("", "no whole PEM block"),
            (&good.replace("PUBLIC", "PRIVATE"), "is a private key"),
            (&good.replacen("MFkw", "MFkx", 1), "another kind than ECDSA P-256"),
        ] {
            fs::write(&path, text).unwrap();
            let error = add_imageset_key(&mut tree, &path).unwrap_err();
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.contains(reason), "{error}: {source}");
        }
        fs::write(&path, good).unwrap();
        add_imageset_key(&mut tree, &path).unwrap();
        let node = tree.get("etc/layercake/keys/release.pem").unwrap();
        assert_eq!(node.kind, Kind::File(good.into()));
        let error = add_imageset_key(&mut tree, &path).unwrap_err().to_string();
        assert!(error.contains("another --imageset-key file"), "{error}");
    }

    #[test]
    fn two_certificate_files_of_one_name_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("site.crt");
        fs::write(&path, "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n").unwrap();
        let mut tree = Tree::new();
        add_ca(&mut tree, &path).unwrap();
        assert!(tree.get("etc/layercake/ca/site.pem").is_some());
        assert!(add_ca(&mut tree, &path).is_err());
    }
}
