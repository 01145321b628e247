//! Debian's docker-registry (distribution 2.8) in the lab: the registry that is not ours.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::{ADDRESS, Lab};
use crate::process::Process;
use crate::{prerequisites, wait};

/// Its port in the lab.
pub const PORT: u16 = 5000;
/// How long it may take to answer.
const START: Duration = Duration::from_secs(20);

/// A running registry. Dropped it is killed, and keeps what was pushed for the next one in the same lab.
#[derive(Debug)]
pub struct Registry {
    process: Process,
    data: PathBuf,
}

impl Registry {
    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(lab: &Lab) -> Result<Self> {
        let program = prerequisites::find_program("docker-registry")
            .context("docker-registry is missing (package docker-registry)")?;
        let data = lab.dir().join("registry");
        let config = lab.dir().join("registry.yml");
        std::fs::write(&config, render(&data.display().to_string()))
            .with_context(|| format!("cannot write {}", config.display()))?;
        let args = ["serve".into(), config.into_os_string()];
        let log = lab.dir().join("registry.log");
        let mut process = Process::start(lab.namespace(), &program, args, &log)?;
        let client = lab.client();
        let url = format!("http://{ADDRESS}:{PORT}/v2/");
        wait::until("docker-registry to answer", START, || {
            process.check_alive()?;
            Ok(client.get_text(&url, Duration::from_secs(2)).ok())
        })?;
        Ok(Self { process, data })
    }

    /// What a reference to something in it begins with.
    #[must_use]
    pub fn base() -> String {
        format!("http://{ADDRESS}:{PORT}")
    }

    /// The file of a blob, so that a case can spoil it.
    #[must_use]
    pub fn blob_file(&self, hex: &str) -> PathBuf {
        let first = hex.get(..2).unwrap_or(hex);
        self.data.join(format!("docker/registry/v2/blobs/sha256/{first}/{hex}/data"))
    }

    /// Stops it.
    ///
    /// # Errors
    /// When it cannot be stopped.
    pub fn stop(mut self) -> Result<()> {
        self.process.stop()
    }
}

fn render(data: &str) -> String {
    format!(
        "version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: {{rootdirectory: {data:?}}}\n  \
         delete: {{enabled: true}}\nhttp:\n  addr: {ADDRESS}:{PORT}\n"
    )
}
