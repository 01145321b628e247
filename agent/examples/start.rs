//! Starts a container from a root that is there already, again and again, and says how long each start took: for
//! `cargo xtask bench roll`, beside runc and crun. Not for anything else.
//!
//! `start PROGRAM RUN_DIR ROOT COUNT`, PROGRAM being the agent; one number a line, microseconds from the call until the
//! container's program was executed and the caller knows it.

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::containers::{HeldSockets, Keeping, NodeFacts, Place, Spec, create_with};
use agent::paths::RunDirs;
use protocol::ids::{Digest, Name};
use protocol::imageset::{Container, Restart};
use protocol::oci::RunConfig;

/// SIGKILL.
const KILL: i32 = 9;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let mut next = || args.next().ok_or("usage: start PROGRAM RUN_DIR ROOT COUNT");
    let (program, run_dir, root) = (PathBuf::from(next()?), next()?, PathBuf::from(next()?));
    let count: u32 = next()?.to_str().ok_or("COUNT")?.parse()?;
    let dirs = RunDirs::new(run_dir);
    let name: Name = "start".parse()?;
    for number in 0..count {
        let container = Container {
            command: vec!["/bin/busybox".to_owned(), "sleep".to_owned(), "1000".to_owned()],
            restart: Restart::Never,
            ..Container::new(name.clone(), name.clone())
        };
        let place = Place {
            id: format!("start.{}.{number}", std::process::id()),
            set: name.clone(),
            set_digest: Digest::of(b"start"),
            root: root.clone(),
            hostname: "node".to_owned(),
            log_dir: dirs.log(),
            restarts: 0,
            version: None,
            keeping: Keeping { memory: dirs.persistent(), disk: None },
            facts: NodeFacts::default(),
        };
        let before = Instant::now();
        let spec = Spec::plan(place, &container, &RunConfig::default())?;
        let on_end = Arc::new(|_: &str, _| ());
        let handle = create_with(&program, &dirs, &spec, &HeldSockets::default(), on_end)?;
        handle.release()?;
        let took = before.elapsed();
        writeln!(std::io::stdout(), "{}", took.as_micros())?;
        handle.stop_with(KILL, Duration::ZERO)?;
        handle.remove()?;
    }
    Ok(())
}
