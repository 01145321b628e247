//! The ImageAPI as a part of the agent: whether it is served and where, and its containers' end when the machine goes down.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::engine::Engine;
use super::server::{self, Remote};
use crate::agent::chain;
use crate::init::roles::AgentOptions;
use crate::paths::{IMAGEAPI_DIR, RunDirs};
use crate::pull::Puller;

/// The file in the ImageAPI's configuration that holds the address to listen on.
const LISTEN: &str = "listen";

/// The ImageAPI of this agent. Shared by the loop and the thread that hears signals.
#[derive(Debug, Default)]
pub struct ImageApi {
    engine: OnceLock<Arc<Engine>>,
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl ImageApi {
    /// Takes over what an earlier agent left and serves. In Layer0 always; elsewhere only when it is asked for.
    ///
    /// # Errors
    /// A sentence, when it was asked for and cannot be served. In Layer0 that is logged: a node without it is still a node.
    pub fn start(
        &self,
        options: &AgentOptions,
        hostname: &str,
        puller: &Puller,
    ) -> Result<(), String> {
        if options.standalone && !options.imageapi {
            return Ok(());
        }
        let run = RunDirs::new(&options.run_dir);
        let engine = Engine::open(&run, hostname.to_owned(), puller.clone(), options.standalone);
        let engine = self.engine.get_or_init(|| engine);
        let served = remote(options).and_then(|remote| {
            let served = server::start(Arc::clone(engine), &run, remote.as_ref());
            served.map_err(|error| chain(&error))
        });
        match served {
            Err(error) if !options.standalone => {
                log::error!("{error}");
                Ok(())
            }
            served => served,
        }
    }

    /// Stops its containers, because the machine goes down.
    pub fn stop(&self) {
        if let Some(engine) = self.engine.get() {
            engine.stop_all();
        }
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits until [`ImageApi::stop`], on another thread, is done; not longer than this.
    pub fn wait_stopped(&self, patience: Duration) {
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(stopped, patience, |stopped| !*stopped);
        let (stopped, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !*stopped {
            log::warn!("imageapi: not every container stopped in time");
        }
    }
}

/// Where to listen beside the Unix socket: as the options say, else as an overlay of the image does.
fn remote(options: &AgentOptions) -> Result<Option<Remote>, String> {
    if let Some(address) = options.imageapi_listen {
        let tls_dir = options.imageapi_tls.clone().unwrap_or_else(|| PathBuf::from(IMAGEAPI_DIR));
        return Ok(Some(Remote { address, tls_dir }));
    }
    if options.standalone {
        return Ok(None);
    }
    let path = Path::new(IMAGEAPI_DIR).join(LISTEN);
    match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("imageapi: {}: {error}", path.display())),
        Ok(text) => {
            let address: SocketAddr = text
                .trim()
                .parse()
                .map_err(|_| format!("imageapi: {}: expected ADDRESS:PORT", path.display()))?;
            Ok(Some(Remote { address, tls_dir: PathBuf::from(IMAGEAPI_DIR) }))
        }
    }
}
