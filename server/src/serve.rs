//! Opens the ports and runs DHCP, TFTP and HTTP over one inventory until it is told to stop.
//!
//! Each part is a task of a runtime with a thread per core; files and the registry's store are read on its pool of
//! blocking threads.

use std::fs::{File, TryLockError};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use self::firmware::{dhcp_config, tftp_config};
use crate::boot::RenderError;
use crate::clock::now_ms;
use crate::config::Config;
use crate::dhcp::{self, DhcpError, DhcpSeen};
use crate::files::{Files, Wrong};
use crate::http::{App, error_chain, listen};
use crate::inventory::{Inventory, InventoryError};
use crate::layer0::archives::Archives;
use crate::layer0::{Layer0Error, Layer0Store};
use crate::overlays::Overlays;
use crate::registries::Known;
use crate::registry::{Access, RegistryError, RegistryStore, collect_regularly};
use crate::sources::{SetName, Sources, Wanted};
use crate::storage::StorageError;
use crate::storage::sqlite::SqliteStorage;
use crate::tftp::{self, TftpError};

mod firmware;

/// How often what was seen of nodes is written.
const FLUSH_EVERY: Duration = Duration::from_secs(2);
/// How often an ImageSet that the config assigns is looked for while it is not in the registry.
const ASSIGN_EVERY: Duration = Duration::from_secs(2);
/// How often the registry's garbage is collected.
const COLLECT_EVERY: Duration = Duration::from_secs(3600);
/// How long requests may go on after the server was told to stop.
const GRACE: Duration = Duration::from_millis(1500);

/// Why the server could not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another program has the port.
    #[error(
        "{protocol} port {} on {} is in use; stop the program that has it (`ss -lnp` shows it) or change {key} in the config",
        address.port(), address.ip()
    )]
    InUse {
        /// `TCP` or `UDP`.
        protocol: &'static str,
        /// Where.
        address: SocketAddr,
        /// The config's key.
        key: &'static str,
    },
    /// The port is for root.
    #[error(
        "{protocol} port {} on {} needs root or CAP_NET_BIND_SERVICE; run as root or change {key} in the config",
        address.port(), address.ip()
    )]
    Privileged {
        /// `TCP` or `UDP`.
        protocol: &'static str,
        /// Where.
        address: SocketAddr,
        /// The config's key.
        key: &'static str,
    },
    /// The port cannot be opened.
    #[error("{protocol} port {} on {} cannot be opened ({key} in the config)", address.port(), address.ip())]
    Bind {
        /// `TCP` or `UDP`.
        protocol: &'static str,
        /// Where.
        address: SocketAddr,
        /// The config's key.
        key: &'static str,
        /// The system's words.
        #[source]
        source: std::io::Error,
    },
    /// The data directory cannot be made or written.
    #[error("{} cannot be made or written (server.data_dir in the config)", path.display())]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: std::io::Error,
    },
    /// The inventory cannot be opened.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The inventory cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// `[[registries]]` names a file that cannot be read now, or is wrong.
    #[error("{0}")]
    Registries(String),
    /// `[[files]]` names a file that cannot be read now, or is wrong.
    #[error("{0}")]
    Files(String),
    /// The embedded registry cannot be opened.
    #[error("the embedded registry cannot be opened")]
    Registry(#[from] RegistryError),
    /// The Layer0 builds cannot be kept.
    #[error(transparent)]
    Layer0(#[from] Layer0Error),
    /// A template does not fit.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// DHCP cannot be served, or stopped.
    #[error(transparent)]
    Dhcp(#[from] DhcpError),
    /// TFTP cannot be served, or stopped.
    #[error(transparent)]
    Tftp(#[from] TftpError),
    /// Another server has the data directory.
    #[error(
        "{} is in use by another `layercake serve`; stop that or change server.data_dir in the config",
        path.display()
    )]
    DataInUse {
        /// The directory.
        path: PathBuf,
    },
    /// A part of the server panicked.
    #[error("a part of the server died")]
    Died(#[from] tokio::task::JoinError),
}

impl ServeError {
    /// What a failed bind means.
    #[must_use]
    pub fn bind(
        protocol: &'static str,
        address: SocketAddr,
        key: &'static str,
        source: std::io::Error,
    ) -> Self {
        match source.kind() {
            std::io::ErrorKind::AddrInUse => Self::InUse { protocol, address, key },
            std::io::ErrorKind::PermissionDenied => Self::Privileged { protocol, address, key },
            _ => Self::Bind { protocol, address, key, source },
        }
    }
}

/// A server whose ports are open and whose inventory is read.
#[derive(Debug)]
pub struct Server {
    config: Config,
    listener: TcpListener,
    dhcp: Option<dhcp::Server>,
    tftp: Option<tftp::Server>,
    inventory: Arc<Inventory>,
    sources: Sources,
    store: Option<RegistryStore>,
    registries: Known,
    files: Arc<Files>,
    /// Held while the server lives: a second one on the same data must not touch it.
    lock: File,
}

impl Server {
    /// Opens the ports, the inventory and the registry. Nothing is served yet.
    ///
    /// # Errors
    /// If a port is taken or for root only, or the data directory cannot be used.
    pub async fn open(config: Config) -> Result<Self, ServeError> {
        let address = config.server.listen;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| ServeError::bind("TCP", address, "server.listen", source))?;
        let dhcp = dhcp_config(&config).map(dhcp::bind).transpose()?;
        let tftp = tftp_config(&config)?.map(tftp::bind).transpose()?;
        let dir = &config.server.data_dir;
        let lock = lock(dir)?;
        let storage = SqliteStorage::open(&dir.join("inventory.db")).await?;
        let auto_register = config.server.auto_register;
        let storage = Box::new(storage);
        let inventory = Inventory::open(storage, &config.nodes, auto_register, now_ms()).await?;
        let registries = Known::load(&config.registries)
            .map_err(|problems| ServeError::Registries(problems.join("\n")))?;
        let files = Files::load(&config.files).map(Arc::new).map_err(|wrong| {
            let named = |Wrong { nth, key, text }| format!("[[files]] {}, {key}: {text}", nth + 1);
            ServeError::Files(wrong.into_iter().map(named).collect::<Vec<_>>().join("\n"))
        })?;
        let section = &config.registry;
        let (sources, store) = match &section.url {
            Some(url) => {
                let known = registries.clone();
                (Sources::External { url: url.clone(), known }, None)
            }
            None => {
                let store = RegistryStore::open_for(&dir.join("registry"), access(&config))?;
                let url = config.server.url.clone();
                let known = registries.clone();
                (Sources::Embedded { store: store.clone(), url, known }, Some(store))
            }
        };
        Ok(Self {
            config,
            listener,
            dhcp,
            tftp,
            inventory,
            sources,
            store,
            registries,
            files,
            lock,
        })
    }

    /// Where HTTP listens: the port that the system chose, where the config says 0.
    ///
    /// # Errors
    /// If the socket does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` turns true, or a part fails. What was seen of nodes is written before it returns.
    ///
    /// # Errors
    /// If a port is taken or for root only, or a part of the server fails.
    pub async fn run(self, shutdown: watch::Receiver<bool>) -> Result<(), ServeError> {
        let Self {
            config,
            listener,
            dhcp,
            tftp,
            inventory,
            sources,
            store,
            registries,
            files,
            lock,
        } = self;
        // Our own switch under the caller's: it turns when the caller's does or when a part fails.
        let (stop, stopping) = watch::channel(false);
        let mut parts = JoinSet::new();
        if let Some(dhcp) = dhcp {
            let (sender, seen) = mpsc::unbounded_channel();
            let (stopping, stopping_too) = (stopping.clone(), stopping.clone());
            parts.spawn(async move { Ok(dhcp.run(sender, stopping).await?) });
            tokio::spawn(watch_dhcp(Arc::clone(&inventory), seen));
            if let Some(section) = config.dhcp.as_ref().filter(|section| section.no_ipv6_router) {
                let (interface, stopping) = (section.interface.clone(), stopping_too);
                tokio::spawn(answer_solicitations(interface, stopping));
            }
        }
        if let Some(tftp) = tftp {
            let stopping = stopping.clone();
            parts.spawn(async move { Ok(tftp.run(stopping).await?) });
        }
        let wishes = config
            .nodes
            .iter()
            .flat_map(|node| node.imagesets.iter().map(|set| (node.id.clone(), set.clone())));
        tokio::spawn(assign(Arc::clone(&inventory), sources.clone(), wishes.collect()));
        for name in ["vmlinuz", "initramfs.img"] {
            let path = config.server.layer0_dir.join(name);
            if !path.is_file() {
                let path = path.display();
                tracing::warn!(
                    "{path} is not there yet; nodes cannot boot until it is (server.layer0_dir)"
                );
            }
        }
        let overlays = Overlays::of_config(&config);
        for overlay in overlays.all().filter(|overlay| !overlay.path.is_file()) {
            let path = overlay.path.display();
            tracing::warn!(
                "{path} is not there yet; nodes that get it cannot boot until it is (overlays)"
            );
        }
        let app = App {
            inventory: Arc::clone(&inventory),
            sources,
            registries,
            files: Arc::clone(&files),
            url: config.server.url.to_string(),
            cmdline: config.boot.cmdline.clone(),
            layer0_dir: config.server.layer0_dir.clone(),
            overlays,
            layer0: Layer0Store::open(
                config.server.data_dir.join("layer0"),
                config.server.layer0_dir.clone(),
            )?,
            archives: Archives::default(),
            layer0_access: access(&config),
            loader_dir: config.tftp.as_ref().and_then(|tftp| tftp.root.clone()),
            channels: Arc::default(),
            gc_grace: config.registry.gc_grace(),
            shutdown: stopping.clone(),
        };
        tokio::spawn(files.watch(stopping.clone()));
        if let Some(store) = &store {
            let nodes = Arc::clone(&inventory);
            let (grace, pinned) = (app.gc_grace, move || nodes.pinned());
            tokio::spawn(collect_regularly(
                store.clone(),
                COLLECT_EVERY,
                grace,
                pinned,
                stopping.clone(),
            ));
        }
        let registry = store.map(crate::registry::router).unwrap_or_default();
        let router = crate::http::router(Arc::new(app), registry);
        let http = listen::serve(listener, router, listen::Limits::default(), stopping.clone());
        parts.spawn(async move {
            http.await;
            Ok(())
        });
        let flusher = tokio::spawn(flush(Arc::clone(&inventory), stopping));
        let result = supervise(parts, shutdown, &stop).await;
        let _ = flusher.await;
        drop(lock);
        result
    }
}

/// Who may do what in the embedded registry, and bring Layer0 builds.
fn access(config: &Config) -> Access {
    let section = &config.registry;
    Access::new(section.push_tokens.clone(), section.pull_tokens.clone())
}

/// Makes the data directory and takes it for this process.
fn lock(dir: &Path) -> Result<File, ServeError> {
    let fail = |source| ServeError::DataDir { path: dir.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(fail)?;
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(dir.join("lock"))
        .map_err(fail)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ServeError::DataInUse { path: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(fail(source)),
    }
}

/// Waits for the first part that ends, or for the caller's word; then stops all of them.
async fn supervise(
    mut parts: JoinSet<Result<(), ServeError>>,
    mut shutdown: watch::Receiver<bool>,
    stop: &watch::Sender<bool>,
) -> Result<(), ServeError> {
    let first = tokio::select! {
        ended = parts.join_next() => ended,
        _ = shutdown.wait_for(|stop| *stop) => None,
    };
    stop.send_replace(true);
    let rest = async { while parts.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, rest).await.is_err() {
        tracing::warn!("requests were still going on and are cut off");
    }
    match first {
        Some(ended) => ended?,
        None => Ok(()),
    }
}

/// Spares iPXE its wait for an IPv6 router. Booting works without, so a failure stops nothing.
async fn answer_solicitations(interface: String, stopping: watch::Receiver<bool>) {
    if let Err(error) = dhcp::router::serve(&interface, stopping).await {
        tracing::warn!("iPXE will wait 16 s for an IPv6 router: {}", error_chain(&error));
    }
}

async fn watch_dhcp(inventory: Arc<Inventory>, mut seen: mpsc::UnboundedReceiver<DhcpSeen>) {
    while let Some(event) = seen.recv().await {
        match event {
            DhcpSeen::Discover { mac, uuid, boot: true, .. } => {
                inventory.dhcp_discover(mac, uuid.as_deref(), now_ms());
            }
            DhcpSeen::Discover { .. } => {}
            DhcpSeen::Leased { mac, address, .. } => {
                inventory.dhcp_leased(mac, address, now_ms());
            }
        }
    }
}

/// Gives configured nodes their ImageSets as soon as the registry has them.
async fn assign(
    inventory: Arc<Inventory>,
    sources: Sources,
    mut wishes: Vec<(protocol::ids::NodeId, SetName)>,
) {
    let mut said = false;
    while !wishes.is_empty() {
        let mut open = Vec::new();
        for (node, set) in wishes {
            let done = match sources.resolve(&Wanted::Named(set.clone())).await {
                Ok(found) => inventory.assign(&node, found).await.map_err(|e| error_chain(&e)),
                Err(error) => Err(error_chain(&error)),
            };
            match done {
                Ok(()) => {
                    tracing::info!(%node, imageset = %set, "the config's ImageSet is assigned")
                }
                Err(error) => {
                    if !said {
                        tracing::info!(%node, imageset = %set, "waiting for the ImageSet of the config: {error}");
                    }
                    open.push((node, set));
                }
            }
        }
        said = true;
        wishes = open;
        tokio::time::sleep(ASSIGN_EVERY).await;
    }
}

async fn flush(inventory: Arc<Inventory>, mut stopping: watch::Receiver<bool>) {
    loop {
        let stop = tokio::select! {
            () = tokio::time::sleep(FLUSH_EVERY) => false,
            _ = stopping.wait_for(|stop| *stop) => true,
        };
        if let Err(error) = inventory.flush().await {
            tracing::error!("{}; it is tried again", error_chain(&error));
        }
        if stop {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_directory_is_one_servers_at_a_time() {
        let dir = tempfile::tempdir().expect("dir");
        let data = dir.path().join("data");
        let first = lock(&data).expect("first");
        let error = lock(&data).expect_err("second").to_string();
        assert!(error.ends_with(
            "data is in use by another `layercake serve`; stop that or change server.data_dir in the config"
        ));
        drop(first);
        lock(&data).expect("after the first has ended");
    }
}
