//! chronyd in the lab: the time server that is not ours.

use std::fs;

use anyhow::{Context, Result};

use crate::artifacts::Artifacts;
use crate::lab::{ADDRESS, Lab, SUBNET};
use crate::process::Process;

/// Starts one on the lab's address that says it is right, and never touches this machine's clock.
///
/// # Errors
/// When it is not there or cannot be started.
pub fn start(lab: &Lab) -> Result<Process> {
    let (config, pid) = (lab.dir().join("chrony.conf"), lab.dir().join("chrony.pid"));
    let text = format!(
        "local stratum 3\nallow {SUBNET}\nbindaddress {ADDRESS}\ncmdport 0\nbindcmdaddress /\nuser root\npidfile {}\n",
        pid.display()
    );
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let config = config.display().to_string();
    let log = lab.dir().join("chrony.log");
    Process::start(lab.namespace(), &Artifacts::chronyd()?, ["-d", "-x", "-f", &config], &log)
}
