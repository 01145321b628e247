//! What the benches of the agent have in common on their command lines. What is measured, and how often, stands in each.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::agent_build;

/// Options of every bench of the agent.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Options {
    /// Print the figures as JSON, one a line; the table goes to stderr
    #[arg(long)]
    pub(super) json: bool,
    /// Measure ourselves only
    #[arg(long)]
    pub(super) without_peers: bool,
    /// Measure this agent instead of building one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

impl Options {
    /// The agent to measure: the one that was given, else one built as it is shipped.
    ///
    /// # Errors
    /// It is not there, or does not build.
    pub(super) fn agent(&self, root: &Path) -> Result<PathBuf> {
        if let Some(agent) = &self.agent {
            return agent.canonicalize().with_context(|| agent.display().to_string());
        }
        eprintln!("building the agent as it is shipped");
        agent_build::build(root)
    }
}
