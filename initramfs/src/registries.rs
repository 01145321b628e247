//! The registry table of an image: from the TOML that an operator writes (`[[registries]]`, as in `layercake.toml`) to
//! `/etc/layercake/registries.json`. Reads the disk; what an entry may be stands in [`protocol::registries`].

use std::fs;
use std::path::{Path, PathBuf};

use protocol::registries::{RegistrySource, RegistryTable};
use serde::Deserialize;

use crate::tree::{Tree, TreeError};

/// Where the table lies in the image.
const PLACE: &str = "etc/layercake/registries.json";

/// Why a table cannot go into an image. No message repeats a secret.
#[derive(Debug, thiserror::Error)]
pub enum RegistriesError {
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not the TOML of a table.
    #[error("{path}: {reason}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Its entries cannot be used.
    #[error("{path}: {}", problems.join("; "))]
    Wrong {
        /// Which.
        path: PathBuf,
        /// One sentence each.
        problems: Vec<String>,
    },
    /// It does not fit to what is in the image already.
    #[error("the registry table cannot go into the image")]
    Tree(#[from] TreeError),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    registries: Vec<RegistrySource>,
}

/// Adds the table of a TOML file, readable by root alone. Files that it names are relative to it and go in, too; entries
/// with `nodes = false` stay out.
///
/// # Errors
/// It cannot be read, is malformed, or an entry or a file that it names cannot be used.
pub fn add(tree: &mut Tree, path: &Path) -> Result<(), RegistriesError> {
    let text = fs::read_to_string(path)
        .map_err(|source| RegistriesError::Read { path: path.to_owned(), source })?;
    let written: Written = toml::from_str(&text).map_err(|error| RegistriesError::Malformed {
        path: path.to_owned(),
        // The whole message quotes the line, which may have a secret in it.
        reason: error.message().to_owned(),
    })?;
    let dir = path.parent().unwrap_or(Path::new(""));
    let mut read =
        |name: &str| fs::read_to_string(dir.join(name)).map_err(|error| error.to_string());
    let (mut table, mut problems) = (RegistryTable::default(), Vec::new());
    for source in written.registries.iter().filter(|source| source.nodes) {
        match source.load(&mut read) {
            Ok(entry) => table.registries.push(entry),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() {
        problems = table.problems();
    }
    if !problems.is_empty() {
        return Err(RegistriesError::Wrong { path: path.to_owned(), problems });
    }
    let json = serde_json::to_vec_pretty(&table).unwrap_or_default();
    Ok(tree.file(PLACE, 0o600, json)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Kind;

    #[test]
    fn a_table_goes_in_with_its_files_for_root_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registries.toml");
        let pem = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        fs::write(dir.path().join("ca.pem"), pem).unwrap();
        fs::write(dir.path().join("pw"), "hunter2\n").unwrap();
        let text = "[[registries]]\nhost = \"r:5000\"\nca = [\"ca.pem\"]\nusername = \"ann\"\npassword_file = \"pw\"\n\
                    [[registries]]\nhost = \"s:1\"\nnodes = false\n";
        fs::write(&path, text).unwrap();
        let mut tree = Tree::new();
        add(&mut tree, &path).unwrap();
        let node = tree.get(PLACE).unwrap();
        assert_eq!(node.mode, 0o600);
        let Kind::File(json) = &node.kind else { panic!("no file") };
        let table = RegistryTable::parse(json).unwrap();
        assert_eq!(table.registries.len(), 1);
        assert_eq!(table.registries[0].ca, [pem]);
        assert_eq!(table.registries[0].password.as_ref().unwrap().reveal(), "hunter2");
    }

    #[test]
    fn what_is_wrong_is_named_without_its_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registries.toml");
        assert!(matches!(add(&mut Tree::new(), &path), Err(RegistriesError::Read { .. })));
        for (text, reason) in [
            ("[[registries]]\nhost = \"r\"\npasswort = \"hunter2\"\n", "unknown field `passwort`"),
            ("[[registries]]\nhost = \"r\"\npassword = \"hunter2\"\n", "come together"),
            ("[[registries]]\nhost = \"r\"\nca = [\"no.pem\"]\n", "no.pem: No such file"),
            ("[[registry]]\nhost = \"r\"\n", "unknown field `registry`"),
            ("[[registries]]\nhost = \"r\"\n[[registries]]\nhost = \"r\"\n", "described twice"),
        ] {
            fs::write(&path, text).unwrap();
            let error = add(&mut Tree::new(), &path).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("registries.toml"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
