//! The program itself, `layercake serve` with nothing but the registry, in a process that can be killed and measured.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Longest wait for its start.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Program {
    pub(crate) address: SocketAddr,
    child: Child,
}

impl Program {
    /// Serves with its data in this directory; `more` goes into the config.
    pub(crate) fn start(dir: &Path, more: &str) -> Self {
        // Another program may take the port between our letting go and its binding: then another port.
        (0..5).find_map(|_| Self::try_start(dir, more)).expect("layercake serve starts")
    }

    fn try_start(dir: &Path, more: &str) -> Option<Self> {
        let free = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = free.local_addr().expect("address");
        let text = format!(
            "[server]\nlisten = \"{address}\"\nurl = \"http://{address}\"\ndata_dir = \"data\"\nlayer0_dir = \".\"\n{more}"
        );
        let config = dir.join("layercake.toml");
        std::fs::write(&config, text).expect("config");
        drop(free);
        let mut child = Command::new(env!("CARGO_BIN_EXE_layercake"))
            .args(["serve", "--config"])
            .arg(&config)
            .env("RUST_LOG", "info")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("layercake");
        let log = child.stderr.take().expect("stderr");
        let (tell, told) = mpsc::channel();
        // Reads on to the end, so that the program never writes into a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                if line.contains("serving; ") {
                    let _ = tell.send(());
                }
            }
        });
        let mut program = Self { address, child };
        if told.recv_timeout(PATIENCE).is_ok() {
            return Some(program);
        }
        program.kill();
        None
    }

    /// SIGKILL, and the end of it.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The most memory that it has had, in bytes (`VmHWM` of proc_pid_status(5)).
    pub(crate) fn peak_memory(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("number") * 1024
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}
