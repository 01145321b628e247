//! Somebody with a key at a machine's ssh, from inside the lab. openssh's client; the machine's own key is taken as it comes,
//! because every boot makes a new one.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::lab::Lab;
use crate::prerequisites::find_program;
use crate::process;
use crate::server_peer::run;

/// Seconds that a connection may take to come about.
const CONNECT: &str = "ConnectTimeout=10";

/// A key and the machine that it is tried at.
#[derive(Debug, Clone)]
pub struct Ssh<'l> {
    lab: &'l Lab,
    key: PathBuf,
    address: Ipv4Addr,
}

impl<'l> Ssh<'l> {
    /// The holder of this private key, who wants to be root of the machine at this address.
    #[must_use]
    pub fn new(lab: &'l Lab, key: &Path, address: Ipv4Addr) -> Self {
        Self { lab, key: key.to_owned(), address }
    }

    /// Runs a command of the machine's shell, and gives what it said.
    ///
    /// # Errors
    /// When the machine lets nobody in by this key, or the command fails; with what was said.
    pub fn run(&self, command: &str) -> Result<String> {
        let ssh = find_program("ssh").context("ssh is missing (package openssh-client)")?;
        let mut child = process::mortal(&ssh)?;
        child.args(["-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]);
        child.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        child.args(["-o", "LogLevel=ERROR", "-o", CONNECT, "-i"]).arg(&self.key);
        child.arg(format!("root@{}", self.address)).arg(command);
        run(self.lab, child, &format!("ssh {} `{command}`", self.address))
    }
}
