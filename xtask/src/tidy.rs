//! `cargo xtask tidy`: the house rules that neither rustc nor clippy knows. Every problem is told, not only the first.

mod edges;
mod files;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

use crate::children::cargo;

/// Runs every check on the checkout at `root`.
///
/// # Errors
/// If a rule is broken (all of them are printed), or a check could not be made.
pub(crate) fn run(root: &Path) -> anyhow::Result<()> {
    let mut problems = Vec::new();
    let mut init = Vec::new();
    for path in tracked_files(root)? {
        let full = root.join(&path);
        if path.ends_with(".rs") && full.exists() {
            let text = std::fs::read_to_string(&full).with_context(|| path.clone())?;
            problems.extend(files::problems(&path, &text));
            if path.starts_with("agent/src/init") {
                init.push((path, text));
            }
        }
    }
    problems.extend(files::resident(init.iter().map(|(path, text)| (&**path, &**text))));
    let metadata = metadata(root)?;
    problems.extend(edges::problems(&metadata)?);
    let architecture =
        std::fs::read_to_string(root.join("ARCHITECTURE.md")).context("ARCHITECTURE.md")?;
    problems.extend(edges::undescribed(&metadata, &architecture)?);
    let changelog = std::fs::read_to_string(root.join("CHANGELOG.md")).context("CHANGELOG.md")?;
    if !changelog.contains("\n## [Unreleased]\n") {
        problems.push("CHANGELOG.md: no section `## [Unreleased]` (keepachangelog.com)".to_owned());
    }
    for problem in &problems {
        eprintln!("{problem}");
    }
    ensure!(problems.is_empty(), "tidy: {} problems", problems.len());
    eprintln!("tidy: every rule holds");
    Ok(())
}

/// What git tracks, and what it does not know yet and does not ignore.
fn tracked_files(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("git ls-files (install git: apt-get install git)")?;
    ensure!(
        output.status.success(),
        "git ls-files: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let mut files: Vec<String> =
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

fn metadata(root: &Path) -> anyhow::Result<serde_json::Value> {
    let output = cargo()
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    serde_json::from_slice(&output.stdout).context("cargo metadata: not JSON")
}
