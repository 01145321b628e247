//! The registry table at work: what Layer0 brought along, what the server said last, and a client for each set of CA
//! certificates. Shared by the agent's loop, which changes it, and the pulls, which look it up when they begin.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::reference::Reference;
use protocol::registries::{MAX_TABLE_BYTES, RegistryEntry, RegistryTable};

use super::endpoint::Place;
use super::{Registry, RegistryError};
use crate::transport::Transport;

/// What is known of registries now. Cloning gives another handle to the same.
#[derive(Debug, Clone)]
pub struct Registries {
    transport: Transport,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Of Layer0.
    own: RegistryTable,
    /// Both, the server's before Layer0's.
    table: RegistryTable,
    /// Clients that were made: each keeps its connections.
    clients: Vec<(Vec<String>, Transport)>,
}

impl Registries {
    /// Knows nothing beyond what a reference says; `transport` trusts the site's CA certificates.
    #[must_use]
    pub fn new(transport: Transport) -> Self {
        Self { transport, shared: Arc::default() }
    }

    /// The client for what is no registry: it trusts the site's CA certificates.
    #[must_use]
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Takes Layer0's table from a file; a file that is not there is an empty one.
    ///
    /// # Errors
    /// One sentence that names the file, and nothing secret in it. What was known before stays.
    pub fn read_file(&self, path: &Path) -> Result<(), String> {
        let named = |problem: &dyn std::fmt::Display| format!("{}: {problem}", path.display());
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened.map_err(|error| named(&error))?,
        };
        let most = u64::try_from(MAX_TABLE_BYTES).unwrap_or(u64::MAX).saturating_add(1);
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes).map_err(|error| named(&error))?;
        let own = RegistryTable::parse(&bytes).map_err(|error| named(&error))?;
        let mut shared = self.lock();
        shared.table.clone_from(&own);
        shared.own = own;
        Ok(())
    }

    /// Takes what the server says, in place of what it said before. Entries that are wrong are left out and named in the
    /// sentences that come back. Pulls that began before go on as they began.
    #[must_use]
    pub fn set_desired(&self, entries: &[RegistryEntry]) -> Vec<String> {
        let (mut good, mut problems) = (RegistryTable::default(), Vec::new());
        for entry in entries {
            let wrong = RegistryTable { registries: vec![entry.clone()] }.problems();
            match wrong.is_empty() {
                true => good = good.overridden_by(std::slice::from_ref(entry)),
                false => problems.extend(wrong),
            }
        }
        let mut shared = self.lock();
        shared.table = shared.own.overridden_by(&good.registries);
        let table = shared.table.clone();
        // A client that no entry needs any more goes with its connections.
        shared.clients.retain(|(ca, _)| table.registries.iter().any(|entry| entry.ca == *ca));
        problems
    }

    /// The repository that a reference points into, with its mirrors.
    ///
    /// # Errors
    /// If the CA certificates of the registry itself cannot be used. A mirror's are warned of, and it is left out.
    pub fn open(&self, reference: &Reference) -> Result<Registry, RegistryError> {
        let endpoints = self.lock().table.endpoints(reference);
        let (mut mirrors, mut origin) = (Vec::new(), None);
        for endpoint in endpoints {
            let host = &endpoint.reference.registry;
            match self.client(host, &endpoint.ca) {
                Ok(client) if endpoint.is_mirror => mirrors.push(Place::new(client, &endpoint)),
                Ok(client) => origin = Some(Place::new(client, &endpoint)),
                Err(error) if endpoint.is_mirror => {
                    log::warn!("mirror {host}: {}", crate::agent::chain(&error));
                }
                Err(error) => return Err(error),
            }
        }
        // The last endpoint is always the registry itself.
        Ok(match origin {
            Some(origin) => Registry::of(mirrors, origin),
            None => Registry::new(self.transport.clone(), reference),
        })
    }

    fn client(&self, host: &str, ca: &[String]) -> Result<Transport, RegistryError> {
        if ca.is_empty() {
            return Ok(self.transport.clone());
        }
        let mut shared = self.lock();
        if let Some((_, client)) = shared.clients.iter().find(|(known, _)| known == ca) {
            return Ok(client.clone());
        }
        let name = format!("the CA certificates of registry {host}");
        let client = self.transport.trusting(&name, ca)?;
        shared.clients.push((ca.to_vec(), client.clone()));
        Ok(client)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
