//! The agent, built static by cargo (`children::static_build`), and where cargo put it.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail, ensure};

use crate::children::static_build;

/// Name of the binary in package `agent`.
const BINARY: &str = "layercake-agent";

/// Builds the agent with profile `agent` and returns its file. What cargo says goes to stderr.
///
/// # Errors
/// It does not compile, or cargo cannot be started.
pub(crate) fn build(root: &Path) -> anyhow::Result<PathBuf> {
    let mut command = static_build("agent");
    command.current_dir(root).args(["--quiet", "--bin", BINARY]);
    command.arg("--message-format=json-render-diagnostics");
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().context("cannot start cargo")?;
    ensure!(output.status.success(), "the agent does not build ({})", output.status);
    let messages = String::from_utf8_lossy(&output.stdout);
    match messages.lines().rev().find_map(executable) {
        Some(path) => Ok(path),
        None => bail!("cargo built the agent but did not say where it is"),
    }
}

/// The file a message of cargo's says the agent is in.
fn executable(line: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let is_agent = message.pointer("/target/name")?.as_str()? == BINARY;
    let path = message.get("executable")?.as_str()?;
    is_agent.then(|| path.into())
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
        assert_eq!(executable(&line(BINARY, r#""/t/x""#)), Some("/t/x".into()));
        assert_eq!(executable(&line("serde", "null")), None);
        assert_eq!(executable(&line("other", r#""/t/x""#)), None);
        assert_eq!(executable("no JSON"), None);
    }
}
