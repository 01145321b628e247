//! The agent, built static by cargo (`children::static_build`), and where cargo put it.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail, ensure};

use crate::children::static_build;

/// Name of the binary in package `agent`.
const BINARY: &str = "layercake-agent";
/// Name of the example in package `agent` that starts containers.
const STARTER: &str = "start";

/// Builds the agent with profile `agent` and returns its file. What cargo says goes to stderr.
///
/// # Errors
/// It does not compile, or cargo cannot be started.
pub(crate) fn build(root: &Path) -> anyhow::Result<PathBuf> {
    build_one(root, "--bin", BINARY, None)
}

/// The same from nothing, with cargo's files in this directory.
///
/// # Errors
/// As [`build`].
pub(crate) fn build_anew(root: &Path, target: &Path) -> anyhow::Result<PathBuf> {
    build_one(root, "--bin", BINARY, Some(target))
}

/// Builds the program that starts containers for the roll bench as the agent does, and returns its file.
///
/// # Errors
/// As [`build`].
pub(crate) fn starter(root: &Path) -> anyhow::Result<PathBuf> {
    build_one(root, "--example", STARTER, None)
}

fn build_one(
    root: &Path,
    kind: &str,
    name: &str,
    target: Option<&Path>,
) -> anyhow::Result<PathBuf> {
    let mut command = static_build("agent");
    if let Some(target) = target {
        command.env("CARGO_TARGET_DIR", target);
    }
    command.current_dir(root).args([kind, name]);
    command.arg("--message-format=json-render-diagnostics");
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().context("cannot start cargo")?;
    ensure!(output.status.success(), "the agent does not build ({})", output.status);
    let messages = String::from_utf8_lossy(&output.stdout);
    match messages.lines().rev().find_map(|line| executable(line, name)) {
        Some(path) => Ok(path),
        None => bail!("cargo built the agent but did not say where it is"),
    }
}

/// The file a message of cargo's says this program is in.
fn executable(line: &str, name: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let is_it = message.pointer("/target/name")?.as_str()? == name;
    let path = message.get("executable")?.as_str()?;
    is_it.then(|| path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_message_about_the_agent_names_its_file() {
        let line = |name: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"name":"{name}"}},"executable":{executable}}}"#
            )
        };
        assert_eq!(executable(&line(BINARY, r#""/t/x""#), BINARY), Some("/t/x".into()));
        assert_eq!(executable(&line("serde", "null"), BINARY), None);
        assert_eq!(executable(&line("other", r#""/t/x""#), BINARY), None);
        assert_eq!(executable("no JSON", BINARY), None);
    }
}
