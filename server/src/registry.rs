//! The embedded OCI registry: what `layercake imageset push` and every OCI tool push to and nodes pull from, under
//! `/v2/` (OCI distribution spec 1.1: "pull", "push", "content discovery" with the referrers API, "content management").
//!
//! Not here: TLS (a proxy in front brings it), rights by repository, digests other than sha256.
//!
//! ```text
//! DIR/blobs/sha256/HEX                        content, once, of all repositories; manifests too
//! DIR/uploads/ID, ID.name                     open uploads and their repositories
//! DIR/tmp/                                    small files being written; emptied at start
//! DIR/referrers-indexed                       every subject is among the referrers: older stores lack it
//! DIR/repositories/NAME/_blobs/HEX            the repository has this blob
//! DIR/repositories/NAME/_manifests/HEX        the repository has this manifest; the file holds its media type
//! DIR/repositories/NAME/_referrers/HEX/HEX    the second is about the first; the file holds the second's descriptor
//! DIR/repositories/NAME/_tags/TAG             the tag; the file holds the digest
//! ```
//! A file appears under its name only whole, checked and synced (write beside, fsync, rename, fsync the directory).
//!
//! | module | what it holds |
//! |---|---|
//! | `route`, `document`, `access` | requests, manifests and tokens, read without touching anything |
//! | `store`, `uploads` | the files |
//! | `handlers`, `push`, `blobs`, `manifests`, `lists` | the requests, each a function |
//! | `answer`, `stream` | refusals and the bytes of blobs |

use std::path::PathBuf;

use axum::Router;
use axum::routing::any;

mod access;
mod answer;
mod blobs;
mod document;
mod handlers;
mod lists;
mod manifests;
mod push;
mod regular;
mod route;
mod store;
mod stream;
mod uploads;

pub use access::{Access, InvalidTokenHash, TokenHash, fuzz_access};
pub(crate) use access::{Denied, Right};
pub use document::fuzz_manifest;
pub use regular::collect_regularly;
pub use route::fuzz_route;
pub use store::{GcReport, GcRequest, RegistryStore};
pub(crate) use uploads::random_hex;

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
