//! The embedded OCI registry: what `layercake imageset push` and every OCI tool push to and nodes pull from, under
//! `/v2/` (OCI distribution spec 1.1; the parts "pull", "push" and "content discovery").
//!
//! Not here: deleting content, referrers, credentials (the HTTP server in front decides who may speak), TLS.
//!
//! ```text
//! DIR/blobs/sha256/HEX                        content, once, of all repositories; manifests too
//! DIR/uploads/ID                              open uploads; emptied at start
//! DIR/repositories/NAME/_blobs/HEX            the repository has this blob
//! DIR/repositories/NAME/_manifests/HEX        the repository has this manifest; the file holds its media type
//! DIR/repositories/NAME/_tags/TAG             the tag; the file holds the digest
//! ```
//! A file appears under its name only whole, checked and synced (write beside, fsync, rename, fsync the directory).

use std::path::PathBuf;

use axum::Router;
use axum::routing::any;

mod answer;
mod content;
mod handlers;
mod route;
mod store;
mod uploads;

pub use route::fuzz_route;
pub use store::RegistryStore;

/// Why the store cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A file cannot be read or written.
    #[error("registry: {what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A file of the store does not hold what it should.
    #[error("registry: {} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A name or tag is not one (OCI distribution spec, "Pulling manifests").
    #[error("registry: `{name}` is not a repository name or tag")]
    Name {
        /// The text.
        name: String,
    },
}

/// The registry's part of the HTTP server. Merge it into the router of the whole.
pub fn router(store: RegistryStore) -> Router {
    Router::new()
        .route("/v2", any(handlers::handle))
        .route("/v2/", any(handlers::handle))
        .route("/v2/{*path}", any(handlers::handle))
        .with_state(store)
}
