//! `layercake-agent pull`: brings one ImageSet into a run directory and ends, before an agent runs there or where none
//! ever will. For warming a node's store, for tests and for the bench: it is the agent's own pull, nothing else.
//!
//! Also holds the rule that one process at a time works in a run directory: opening the store removes what another one
//! is writing.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::sync::atomic::AtomicBool;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::cache::Cache;
use crate::init::roles::PullOptions;
use crate::logging;
use crate::paths::RunDirs;
use crate::pull::{Progress, PulledSet, Puller};
use crate::registry::table::Registries;
use crate::store::Store;
use crate::transport::Transport;

/// The file in a run directory that is locked (flock(2)) by whoever works there.
const LOCK: &str = "lock";

/// A run directory that no other agent and no other `pull` works in while this lives.
#[derive(Debug)]
pub struct Held {
    _file: File,
}

/// Takes a run directory, making it where it is missing. The kernel gives it back when the process ends, however.
///
/// # Errors
/// A sentence: another process has it, or it cannot be made or locked.
pub fn hold(dirs: &RunDirs) -> Result<Held, String> {
    let root = dirs.root();
    let failed = |error: std::io::Error| format!("cannot lock {}: {error}", root.display());
    DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(failed)?;
    let file = File::create(root.join(LOCK)).map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Held { _file: file }),
        Err(Errno::WOULDBLOCK) => {
            Err(format!("{} is in use by another layercake-agent", root.display()))
        }
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Pulls the set, logging to stderr, and returns what came.
///
/// # Errors
/// A sentence with its causes: the run directory is in use, or the set cannot be had.
pub fn run(options: &PullOptions) -> Result<PulledSet, String> {
    logging::init(options.log, logging::Target::Standalone);
    let dirs = RunDirs::new(&options.run_dir);
    let _held = hold(&dirs)?;
    let transport = Transport::new(&options.config.ca()).map_err(|error| chain(&error))?;
    let registries = Registries::new(transport);
    registries.read_file(&options.config.registries())?;
    let store = Store::open(&dirs).map_err(|error| chain(&error))?;
    let (progress, cancel) = (Progress::default(), AtomicBool::new(false));
    let puller = Puller::new(store, registries).with_mount_forms(&options.mount_forms);
    let cache = options.cache_dir.as_deref().map_or_else(Cache::none, Cache::in_directory);
    let pulled = puller.with_cache(cache.clone()).pull_set(&options.reference, &progress, &cancel);
    cache.flush();
    pulled.map_err(|error| format!("cannot pull {}: {}", options.reference, chain(&error)))
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_directory_has_one_user_at_a_time() {
        let dir = tempfile::tempdir().expect("directory");
        let dirs = RunDirs::new(dir.path().join("run"));
        let held = hold(&dirs).expect("first");
        let refused = hold(&dirs).expect_err("second");
        assert!(refused.ends_with("is in use by another layercake-agent"), "{refused}");
        drop(held);
        hold(&dirs).expect("after the first");
    }

    #[test]
    fn a_set_that_cannot_be_had_is_named_with_the_cause() {
        let dir = tempfile::tempdir().expect("directory");
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let text = format!("http://{}/hello:1", listener.local_addr().expect("its number"));
        drop(listener);
        let reference = text.parse().expect("reference");
        let run_dir = dir.path().to_owned();
        let options = PullOptions {
            run_dir,
            config: crate::paths::ConfigDir::default(),
            cache_dir: None,
            reference,
            log: protocol::boot_args::LogLevel::Error,
            mount_forms: Vec::new(),
        };
        let error = run(&options).expect_err("no registry");
        assert!(error.starts_with(&format!("cannot pull {text}: ")), "{error}");
    }
}
