//! What the agent is linked from, as cargo knows it: for the bill of materials of a bundle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, anyhow, ensure};
use initramfs::sbom::Crate;
use serde_json::Value;

use crate::children::{self, STATIC_TARGET};

/// The package of the agent.
const AGENT: &str = "agent";

/// Name and version.
type Id = (String, String);

/// Every crate that is linked into the agent; build scripts and procedural macros are not.
///
/// # Errors
/// cargo cannot be asked, or answers in another form.
pub(crate) fn of_the_agent(root: &Path) -> Result<Vec<Crate>> {
    // The tree has the features of the agent alone, which the metadata of the workspace has not; the metadata says who needs whom.
    let tree = [
        "tree",
        "--package",
        AGENT,
        "--edges",
        "normal,no-proc-macro",
        "--target",
        STATIC_TARGET,
        "--prefix",
        "none",
        "--format",
        "{p}",
    ];
    let metadata = ["metadata", "--format-version", "1", "--filter-platform", STATIC_TARGET];
    // Half a second each, so both at once.
    let (tree, metadata) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| ask(root, &metadata));
        (ask(root, &tree), asking.join())
    });
    let metadata = metadata.map_err(|_| anyhow!("the thread that asks cargo died"))??;
    let tree = tree?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata")?;
    let lock = root.join("Cargo.lock");
    let lock = std::fs::read_to_string(&lock)
        .with_context(|| format!("cannot read {}", lock.display()))?;
    let lock: toml::Table = lock.parse().context("in Cargo.lock")?;
    crates(&linked(&tree), &metadata, &checksums(&lock))
}

fn ask(root: &Path, args: &[&str]) -> Result<String> {
    let mut command = children::cargo();
    command.current_dir(root).args(args).args(["--locked", "--offline"]);
    let output = command.stdin(Stdio::null()).output().context("cannot start cargo")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "cargo {} failed: {}", args.join(" "), said.trim());
    String::from_utf8(output.stdout).context("cargo says what is no text")
}

/// The crates that `cargo tree --prefix none --format {p}` names: `NAME vVERSION (PATH) (*)`.
fn linked(tree: &str) -> BTreeSet<Id> {
    let one = |line: &str| {
        let mut words = line.split(' ');
        let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
        Some((name.to_owned(), version.to_owned()))
    };
    tree.lines().filter_map(one).collect()
}

fn checksums(lock: &toml::Table) -> BTreeMap<Id, String> {
    let text = |package: &toml::Value, key: &str| {
        package.get(key).and_then(toml::Value::as_str).map(str::to_owned)
    };
    let packages = lock.get("package").and_then(toml::Value::as_array);
    let one = |package: &toml::Value| {
        let id = (text(package, "name")?, text(package, "version")?);
        Some((id, text(package, "checksum")?))
    };
    packages.into_iter().flatten().filter_map(one).collect()
}

fn crates(
    linked: &BTreeSet<Id>,
    metadata: &Value,
    checksums: &BTreeMap<Id, String>,
) -> Result<Vec<Crate>> {
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let packages = metadata["packages"].as_array().context("cargo metadata names no package")?;
    let ids: BTreeMap<String, &Value> = packages.iter().map(|it| (text(it, "id"), it)).collect();
    let nodes =
        metadata["resolve"]["nodes"].as_array().context("cargo metadata resolves nothing")?;
    let name = |package: &Value| (text(package, "name"), text(package, "version"));
    let mut found = Vec::new();
    for node in nodes {
        let Some(package) = ids.get(&text(node, "id")) else { continue };
        let own = name(package);
        if !linked.contains(&own) || own.0 == AGENT {
            continue;
        }
        let depends: BTreeSet<Id> = node["deps"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|it| is_normal(it))
            .filter_map(|it| ids.get(&text(it, "pkg")).map(|package| name(package)))
            .filter(|id| linked.contains(id))
            .collect();
        found.push(Crate {
            licence: package["license"].as_str().map(str::to_owned),
            checksum: checksums.get(&own).cloned(),
            name: own.0,
            version: own.1,
            depends: depends.into_iter().collect(),
        });
    }
    ensure!(
        found.len() + 1 == linked.len(),
        "cargo metadata does not know every crate that cargo tree names"
    );
    found.sort();
    Ok(found)
}

/// Whether a dependency is one of the program, not of its tests or its build.
fn is_normal(dependency: &Value) -> bool {
    let kinds = dependency["dep_kinds"].as_array();
    kinds.into_iter().flatten().any(|kind| kind["kind"].is_null())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_has_its_crates_with_versions_licences_and_checksums() {
        let crates = of_the_agent(&crate::build_image::root()).unwrap();
        let find = |name: &str| crates.iter().find(|it| it.name == name);
        let rustix = find("rustix").unwrap();
        assert!(rustix.licence.as_ref().unwrap().contains("MIT"));
        assert_eq!(rustix.checksum.as_ref().unwrap().len(), 64);
        assert!(rustix.depends.iter().any(|(name, _)| name == "linux-raw-sys"));
        assert!(find("protocol").unwrap().checksum.is_none(), "it is our own");
        for name in ["agent", "clap", "serde_derive", "proptest", "cc"] {
            assert!(find(name).is_none(), "{name} is not linked into the agent");
        }
    }

    #[test]
    fn lines_of_a_tree_are_names_and_versions() {
        let tree = "agent v0.1.0 (/a/agent)\nserde v1.0.2\nserde v1.0.2 (*)\n\n[dev]\n";
        let names: Vec<_> = linked(tree).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["agent", "serde"]);
    }
}
