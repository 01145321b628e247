//! The dependency graph is a rule: which crate of ours may know which, and what none may know.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use serde_json::Value;

/// Which of our crates each may depend on (DESIGN: "and no others").
const EDGES: [(&str, &[&str]); 9] = [
    ("agent", &["protocol"]),
    ("guest", &[]),
    ("hello", &[]),
    ("imagebuilder", &["protocol"]),
    ("initramfs", &["protocol"]),
    ("protocol", &[]),
    ("server", &["imagebuilder", "protocol"]),
    ("tests", &["protocol"]),
    ("xtask", &["initramfs", "protocol", "tests"]),
];

/// Crates that no build of ours may hold, with the reason.
const FORBIDDEN: [(&str, &str); 3] = [
    ("aws-lc-sys", "ring is the one TLS provider"),
    ("openssl-sys", "ring is the one TLS provider"),
    ("native-tls", "ring is the one TLS provider"),
];

/// Crates that the pure crate may not depend on.
const IMPURE: [&str; 5] = ["tokio", "rustix", "nix", "ureq", "rustls"];

fn packages(metadata: &Value) -> anyhow::Result<&Vec<Value>> {
    metadata["packages"].as_array().context("cargo metadata: no packages")
}

fn members(metadata: &Value) -> anyhow::Result<BTreeMap<&str, BTreeSet<&str>>> {
    let ids: BTreeSet<&str> = metadata["workspace_members"]
        .as_array()
        .context("cargo metadata: no workspace_members")?
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let mut members = BTreeMap::new();
    for package in packages(metadata)? {
        if !package["id"].as_str().is_some_and(|id| ids.contains(id)) {
            continue;
        }
        let name = package["name"].as_str().context("a package without name")?;
        let dependencies =
            package["dependencies"].as_array().context("a package without dependencies")?;
        members.insert(name, dependencies.iter().filter_map(|it| it["name"].as_str()).collect());
    }
    Ok(members)
}

/// Every edge that should not be there.
///
/// # Errors
/// If the metadata is not what cargo writes.
pub(crate) fn problems(metadata: &Value) -> anyhow::Result<Vec<String>> {
    let mut problems = Vec::new();
    let members = members(metadata)?;
    for (member, dependencies) in &members {
        let Some((_, allowed)) = EDGES.iter().find(|(name, _)| name == member) else {
            problems.push(format!(
                "crate `{member}` is not in the list of crates (xtask/src/tidy/edges.rs)"
            ));
            continue;
        };
        for dependency in
            dependencies.iter().filter(|it| members.contains_key(*it) && !allowed.contains(it))
        {
            problems.push(format!("crate `{member}` must not depend on `{dependency}`"));
        }
        if *member == "protocol" {
            for impure in IMPURE.iter().filter(|it| dependencies.contains(**it)) {
                problems
                    .push(format!("crate `protocol` is pure and must not depend on `{impure}`"));
            }
        }
    }
    for package in packages(metadata)? {
        for (name, reason) in FORBIDDEN.iter().filter(|(name, _)| package["name"] == **name) {
            problems.push(format!("`{name}` is in the dependency tree: {reason}"));
        }
    }
    Ok(problems)
}

/// Every member that ARCHITECTURE.md has no heading for.
///
/// # Errors
/// If the metadata is not what cargo writes.
pub(crate) fn undescribed(metadata: &Value, architecture: &str) -> anyhow::Result<Vec<String>> {
    let described = |member: &str| {
        architecture
            .lines()
            .any(|line| line.starts_with('#') && line.contains(&format!("`{member}`")))
    };
    let missing = members(metadata)?.into_keys().filter(|member| !described(member));
    Ok(missing.map(|member| format!("ARCHITECTURE.md: no heading for crate `{member}`")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(dependency: &str) -> Value {
        serde_json::json!({
            "workspace_members": ["a 1", "s 1"],
            "packages": [
                { "id": "a 1", "name": "agent", "dependencies": [{ "name": dependency }] },
                { "id": "s 1", "name": "server", "dependencies": [] },
                { "id": "x 1", "name": if dependency == "x" { "openssl-sys" } else { "y" }, "dependencies": [] },
            ],
        })
    }

    #[test]
    fn a_forbidden_edge_and_a_forbidden_crate_are_named() {
        assert_eq!(problems(&metadata("protocol")).expect("metadata"), Vec::<String>::new());
        assert_eq!(
            problems(&metadata("server")).expect("metadata"),
            ["crate `agent` must not depend on `server`"]
        );
        assert!(problems(&metadata("x")).expect("metadata")[0].contains("openssl-sys"));
    }

    #[test]
    fn a_crate_without_heading_is_named() {
        let missing = undescribed(&metadata("protocol"), "### `agent`\n").expect("metadata");
        assert_eq!(missing, ["ARCHITECTURE.md: no heading for crate `server`"]);
    }
}
