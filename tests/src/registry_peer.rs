//! Debian's docker-registry (distribution 2.8) in the lab: the registry that is not ours.

use std::fs;
use std::path::{Path, PathBuf};
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
        fs::write(&config, render(&data.display().to_string()))
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

    /// Spoils the largest blob in the middle, its size unchanged, and gives its digest in hexadecimal.
    ///
    /// # Errors
    /// When nothing was pushed, or the blob cannot be written.
    pub fn spoil_largest_blob(&self) -> Result<String> {
        let root = self.data.join("docker/registry/v2/blobs/sha256");
        let mut largest: Option<(u64, String, PathBuf)> = None;
        for first in read_dir(&root)? {
            for blob in read_dir(&first)? {
                let file = blob.join("data");
                let size = fs::metadata(&file).map(|data| data.len()).unwrap_or(0);
                if largest.as_ref().is_none_or(|(most, ..)| size > *most) {
                    let hex = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    largest = Some((size, hex, file));
                }
            }
        }
        let (size, hex, file) = largest.context("nothing was pushed to docker-registry")?;
        let mut bytes =
            fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let middle = bytes.get_mut(usize::try_from(size / 2)?).context("an empty blob")?;
        *middle ^= 0xff;
        fs::write(&file, bytes).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(hex)
    }

    /// Stops it.
    ///
    /// # Errors
    /// When it cannot be stopped.
    pub fn stop(mut self) -> Result<()> {
        self.process.stop()
    }
}

fn read_dir(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>();
    read().with_context(|| format!("cannot read {}", dir.display()))
}

fn render(data: &str) -> String {
    format!(
        "version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: {{rootdirectory: {data:?}}}\n  \
         delete: {{enabled: true}}\nhttp:\n  addr: {ADDRESS}:{PORT}\n"
    )
}
