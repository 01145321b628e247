//! Mutual TLS for the ImageAPI over TCP: our certificate, and the authority whose certificates clients must show.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

/// Our certificate and those between it and its authority, PEM.
pub const CERTIFICATE: &str = "cert.pem";
/// Its key, PEM.
pub const KEY: &str = "key.pem";
/// The authorities one of which must have signed a client's certificate, PEM.
pub const CLIENTS: &str = "clients.pem";

/// Why there is no TLS, and so no TCP.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or is not what it should be.
    #[error("imageapi: {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The files do not fit together.
    #[error("imageapi: certificates in {}", dir.display())]
    Together {
        /// The directory.
        dir: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
}

/// The configuration that the files of a directory make. Clients without a certificate of [`CLIENTS`] get nothing.
///
/// # Errors
/// If a file is missing or unusable.
pub fn server_config(dir: &Path) -> Result<ServerConfig, TlsError> {
    let file = |name: &str, reason: &dyn std::fmt::Display| TlsError::File {
        path: dir.join(name),
        reason: reason.to_string(),
    };
    let certificates = |name: &'static str| {
        let found = CertificateDer::pem_file_iter(dir.join(name));
        let found = found.map_err(|error| file(name, &error))?;
        let found: Result<Vec<_>, _> = found.collect();
        match found.map_err(|error| file(name, &error))? {
            none if none.is_empty() => Err(file(name, &"it holds no certificate")),
            some => Ok(some),
        }
    };
    let chain = certificates(CERTIFICATE)?;
    let key = PrivateKeyDer::from_pem_file(dir.join(KEY)).map_err(|error| file(KEY, &error))?;
    let mut clients = RootCertStore::empty();
    for certificate in certificates(CLIENTS)? {
        clients.add(certificate).map_err(|error| file(CLIENTS, &error))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(clients), Arc::clone(&provider))
            .build()
            .map_err(|error| file(CLIENTS, &error))?;
    let together = |source| TlsError::Together { dir: dir.to_owned(), source };
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(together)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(together)
}
