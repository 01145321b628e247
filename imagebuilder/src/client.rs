//! The client of OCI registries that `push` and `resolve` share: trust, credentials, and which errors are worth
//! another attempt.
//!
//! It speaks through `oci-client` and hides that crate's types. Plain HTTP is spoken only where the reference says
//! `http://`.

use std::collections::hash_map::RandomState;
use std::error::Error;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use oci_distribution::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_distribution::errors::{OciDistributionError, OciErrorCode};
use oci_distribution::secrets::RegistryAuth;
use oci_distribution::{Client, Reference as OciReference};
use protocol::reference::{Reference, Scheme};

/// How long a connection may take to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a registry may say nothing.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause before the second attempt; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// User name and password for HTTP Basic authentication, or for the token service that a registry names.
#[derive(Clone)]
pub struct Credentials {
    /// User name.
    pub user: String,
    /// Password or token.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// How registries are spoken to.
#[derive(Debug, Clone)]
pub struct Options {
    /// Nobody in particular when absent.
    pub credentials: Option<Credentials>,
    /// Certificates that alone are trusted, in PEM; those of the system when empty.
    pub ca_pem: Vec<Vec<u8>>,
    /// Attempts for each request before it has failed, at least 1.
    pub attempts: u32,
    /// Blobs that are sent at the same time, at least 1.
    pub parallel: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { credentials: None, ca_pem: Vec::new(), attempts: 4, parallel: 4 }
    }
}

/// Why a registry did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// There is no connection.
    #[error("registry {url} cannot be reached: {cause}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// The innermost cause.
        cause: String,
    },
    /// It wants other credentials.
    #[error("registry {url} refuses access: {cause}")]
    Unauthorized {
        /// What was asked for.
        url: String,
        /// Its words.
        cause: String,
    },
    /// It does not know the manifest.
    #[error("registry {url} does not have it")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// It answered with another error, or not in the protocol.
    #[error("registry {url}: {cause}")]
    Failed {
        /// What was asked for.
        url: String,
        /// Its words.
        cause: String,
    },
    /// What it sent is not what its digest says.
    #[error("registry {url} sent content of digest {found}")]
    Corrupt {
        /// What was asked for.
        url: String,
        /// The digest of what came.
        found: protocol::ids::Digest,
    },
    /// There is no client for it.
    #[error("no registry client: {cause}")]
    Client {
        /// Why.
        cause: String,
    },
}

/// A registry and one repository of it.
pub(crate) struct Registry {
    pub(crate) client: Client,
    pub(crate) auth: RegistryAuth,
    reference: Reference,
    attempts: u32,
}

impl Registry {
    pub(crate) fn new(reference: &Reference, options: &Options) -> Result<Self, RegistryError> {
        // A binary chooses its provider first; where none did, ring is it. Err only means that one is there.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = |certificates: &[Vec<u8>]| ClientConfig {
            protocol: match reference.scheme {
                Scheme::Http => ClientProtocol::Http,
                Scheme::Https => ClientProtocol::Https,
            },
            use_monolithic_push: true,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("layercake/", env!("CARGO_PKG_VERSION")),
            tls_certs_only: certificates
                .iter()
                .map(|pem| Certificate { encoding: CertificateEncoding::Pem, data: pem.clone() })
                .collect(),
            ..ClientConfig::default()
        };
        // oci-client 0.18 makes a default client beside the one asked for, which panics where the system has no
        // certificates at all. Asking for that one alone first turns the panic into an error.
        let cause = |error: OciDistributionError| RegistryError::Client {
            cause: format!(
                "{}; install ca-certificates or set SSL_CERT_FILE to a PEM file",
                innermost(&error)
            ),
        };
        let mut client = Client::try_from(config(&[])).map_err(cause)?;
        if !options.ca_pem.is_empty() {
            client = Client::try_from(config(&options.ca_pem)).map_err(cause)?;
        }
        let auth = match &options.credentials {
            None => RegistryAuth::Anonymous,
            Some(known) => RegistryAuth::Basic(known.user.clone(), known.password.clone()),
        };
        let attempts = options.attempts.max(1);
        Ok(Self { client, auth, reference: reference.clone(), attempts })
    }

    /// The repository's manifest under a tag or digest.
    pub(crate) fn at(&self, key: &str) -> OciReference {
        let (registry, repository) =
            (self.reference.registry.clone(), self.reference.repository.clone());
        if key.starts_with("sha256:") {
            OciReference::with_digest(registry, repository, key.to_owned())
        } else {
            OciReference::with_tag(registry, repository, key.to_owned())
        }
    }

    /// Asks until it works, the error is final, or the attempts are used up.
    pub(crate) async fn persistently<T, F>(
        &self,
        what: &str,
        mut ask: impl FnMut() -> F,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, OciDistributionError>>,
    {
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            match ask().await {
                Ok(answer) => return Ok(answer),
                Err(error) if attempt < self.attempts && is_passing(&error) => {
                    tokio::time::sleep(jitter(pause)).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    attempt += 1;
                }
                Err(error) => return Err(self.explain(what, &error)),
            }
        }
    }

    fn explain(&self, what: &str, error: &OciDistributionError) -> RegistryError {
        let url = format!("{}{what}", self.reference.api_base());
        let mut cause = innermost(error);
        // rustls's words for an answer that is no TLS.
        if url.starts_with("https://") && cause.contains("InvalidContentType") {
            "it does not speak TLS; write http:// for plain HTTP".clone_into(&mut cause);
        }
        match error {
            OciDistributionError::RequestError(request) if request.status().is_none() => {
                RegistryError::Unreachable { url, cause }
            }
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_)
            | OciDistributionError::ServerError { code: 401 | 403, .. } => {
                RegistryError::Unauthorized { url, cause }
            }
            OciDistributionError::ImageManifestNotFoundError(_)
            | OciDistributionError::ServerError { code: 404, .. } => {
                RegistryError::NotFound { url }
            }
            OciDistributionError::RegistryError { envelope, .. }
                if envelope.errors.iter().any(|error| {
                    matches!(
                        error.code,
                        OciErrorCode::ManifestUnknown
                            | OciErrorCode::NameUnknown
                            | OciErrorCode::NotFound
                    )
                }) =>
            {
                RegistryError::NotFound { url }
            }
            _ => RegistryError::Failed { url, cause },
        }
    }
}

/// Whether the same request may work a little later.
fn is_passing(error: &OciDistributionError) -> bool {
    let status = |code: u16| code == 429 || code >= 500;
    match error {
        OciDistributionError::ServerError { code, .. } => status(*code),
        OciDistributionError::RequestError(request) => {
            request.status().is_none_or(|code| status(code.as_u16())) && !request.is_builder()
        }
        OciDistributionError::RegistryError { envelope, .. } => {
            envelope.errors.iter().any(|error| matches!(error.code, OciErrorCode::Toomanyrequests))
        }
        _ => false,
    }
}

fn innermost(error: &dyn Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string().trim().to_owned()
}

/// Between half of the pause and the whole.
fn jitter(pause: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    let part = u32::try_from(random % 1_000).unwrap_or(0);
    pause / 2 + pause / 2_000 * part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_at_least_half_and_never_more_than_itself() {
        for _ in 0..1_000 {
            let pause = jitter(FIRST_PAUSE);
            assert!(pause >= FIRST_PAUSE / 2 && pause <= FIRST_PAUSE, "{pause:?}");
        }
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let server = |code| OciDistributionError::ServerError {
            code,
            url: String::new(),
            message: String::new(),
        };
        for (code, passing) in [(429, true), (500, true), (503, true), (400, false), (404, false)] {
            assert_eq!(is_passing(&server(code)), passing, "{code}");
        }
    }

    #[test]
    fn credentials_do_not_show_their_password() {
        let known = Credentials { user: "ann".to_owned(), password: "secret".to_owned() };
        let shown = format!("{known:?}");
        assert!(shown.contains("ann") && !shown.contains("secret"), "{shown}");
    }
}
