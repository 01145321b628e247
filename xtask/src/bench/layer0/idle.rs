//! A node that has nothing to do: connected to its server, without an ImageSet. What agent and PID 1 hold, and how often they
//! give up the processor in a minute.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tests::artifacts::{Artifacts, workspace_root};
use tests::lab::{Lab, SERVER_URL};
use tests::server_peer::{Server, ServerSpec};

use super::boot::{self, COMMAND_LINE, PROBE, Watch};
use super::images::{Contestant, Images};
use crate::builds;

/// After the address: until everything of the start is over.
const SETTLE_S: u64 = 30;
/// How long the node is watched.
pub(super) const SPAN_S: u64 = 60;
/// How long all of that may take, on a guest's clock.
const WITHIN: Duration = Duration::from_secs(400);

/// One process of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Idle {
    /// PID 1.
    pub(super) init: Process,
    /// The agent.
    pub(super) agent: Process,
}

/// What one holds and does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Process {
    /// Pss_Anon + Pss_Shmem, KiB.
    pub(super) kib: u32,
    /// Voluntary context switches of all its threads in the span.
    pub(super) switches: u32,
}

/// Boots the node with a kernel of our own and watches it.
///
/// # Errors
/// When it does not boot.
pub(super) fn measure(_dir: &Path, images: &Images, server: Option<&Path>) -> Result<Idle> {
    let root = workspace_root();
    let bin = match server {
        Some(server) => server.canonicalize().with_context(|| server.display().to_string())?,
        None => builds::server(false)?,
    };
    let image = images.make(Contestant::OwnKernel)?;
    let layer0 = image.kernel.parent().context("a kernel without a directory")?.to_owned();
    let artifacts = Artifacts { bin, layer0, examples: root.join("target/examples") };
    // A router that speaks every three seconds, as a lab's does, is something that happens.
    let lab = Lab::quiet()?;
    let _server = Server::start(&lab, &ServerSpec::new(artifacts, 1))?;
    eprintln!("idle: watching a node for {SPAN_S} s");
    let append = format!(
        "{COMMAND_LINE} layercake.server={SERVER_URL} layercake.node=n1 probe.watch={SETTLE_S},{SPAN_S}"
    );
    let machine = boot::start(&lab, &image, &append)?;
    let mut lines = Vec::new();
    Watch::new(&machine).until(&machine, "idle figures", WITHIN, |line, _| {
        lines.push(line.to_owned());
        line.contains("layercake-probe: watched")
    })?;
    let processes = lines.iter().filter_map(|line| process(line));
    let mut idle = Idle::default();
    for (pid, process) in processes {
        match pid {
            1 => idle.init = process,
            // The agent is all children of PID 1 that are not the probe: it has no other.
            _ => {
                idle.agent.kib += process.kib;
                idle.agent.switches += process.switches;
            }
        }
    }
    Ok(idle)
}

/// `layercake-probe: idle PID NAME anon N shmem N switches N`.
fn process(line: &str) -> Option<(u32, Process)> {
    let (_, said) = line.split_once(PROBE)?;
    let words: Vec<&str> = said.split_whitespace().collect();
    let ["idle", pid, _, "anon", anon, "shmem", shmem, "switches", switches] = words[..] else {
        return None;
    };
    let kib = anon.parse::<u32>().ok()?.checked_add(shmem.parse().ok()?)?;
    Some((pid.parse().ok()?, Process { kib, switches: switches.parse().ok()? }))
}

#[cfg(test)]
mod tests_of_lines {
    use super::*;

    #[test]
    fn a_process_is_read_from_the_probes_line() {
        let line = "layercake-probe: idle 77 layercake-agent anon 900 shmem 24 switches 8";
        assert_eq!(process(line), Some((77, Process { kib: 924, switches: 8 })));
        assert_eq!(process("layercake-probe: watched"), None);
    }
}
