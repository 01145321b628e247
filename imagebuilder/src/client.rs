//! The client of OCI registries that all of this crate shares: trust, credentials, and which errors are worth another
//! attempt.
//!
//! It reads through `oci-client` and hides that crate's types. What is sent goes through requests of its own, because
//! an upload that was cut is taken up where it broke off (`upload`), and because registries that anybody may read ask
//! for credentials only then (`authorization`). Plain HTTP is spoken only where the reference says `http://`.

mod authorization;
mod fetch;
mod upload;

use std::collections::hash_map::RandomState;
use std::error::Error;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use oci_distribution::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_distribution::errors::{OciDistributionError, OciErrorCode};
use oci_distribution::secrets::RegistryAuth;
use oci_distribution::{Client, Reference as OciReference};
use protocol::reference::{Reference, Scheme};
use tokio::sync::RwLock;

use crate::credentials::{AuthFiles, CredentialsError, TOKEN_USER};

/// How long a connection may take to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a registry may say nothing.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause before the second attempt; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// User name under which a bearer token is kept; a colon is in no user's name.
const BEARER_USER: &str = ":bearer";
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

impl Credentials {
    /// A user and its password.
    #[must_use]
    pub fn new(user: &str, password: &str) -> Self {
        Self { user: user.to_owned(), password: password.to_owned() }
    }

    /// A bearer token that the registry is shown as it is.
    #[must_use]
    pub fn of_bearer(token: &str) -> Self {
        Self::new(BEARER_USER, token)
    }

    /// An identity token, in the form in which credential helpers give one.
    #[must_use]
    pub fn of_token(token: &str) -> Self {
        Self::new(TOKEN_USER, token)
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// How registries are spoken to.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who we are to every registry; when absent, what [`Options::auth_files`] say.
    pub credentials: Option<Credentials>,
    /// Where credentials are looked for; nowhere by default.
    pub auth_files: AuthFiles,
    /// Certificates that alone are trusted, in PEM; those of the system when empty.
    pub ca_pem: Vec<Vec<u8>>,
    /// Attempts for each request before it has failed, at least 1.
    pub attempts: u32,
    /// Blobs that are sent at the same time, at least 1.
    pub parallel: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            credentials: None,
            auth_files: AuthFiles::default(),
            ca_pem: Vec::new(),
            attempts: 4,
            parallel: 4,
        }
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
    /// Who we are to it cannot be found out.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// What is sent to it, or fetched, cannot be read or written here.
    #[error("cannot use {}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
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
    /// For what is sent.
    http: reqwest::Client,
    known: Option<Credentials>,
    /// Value of the `Authorization` header that the registry asked for last.
    authorization: RwLock<Option<reqwest::header::HeaderValue>>,
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
        let mut client = Client::try_from(config(&[])).map_err(&cause)?;
        if !options.ca_pem.is_empty() {
            client = Client::try_from(config(&options.ca_pem)).map_err(&cause)?;
        }
        let known = match &options.credentials {
            Some(known) => Some(known.clone()),
            None => options.auth_files.find(reference)?,
        };
        let auth = match &known {
            None => RegistryAuth::Anonymous,
            Some(known) if known.user == TOKEN_USER => {
                return Err(RegistryError::Unauthorized {
                    url: reference.api_base(),
                    cause: "the credentials are an identity token, which is not supported; log in \
                            with a user name and a password or access token"
                        .to_owned(),
                });
            }
            Some(known) if known.user == BEARER_USER => {
                RegistryAuth::Bearer(known.password.clone())
            }
            Some(known) => RegistryAuth::Basic(known.user.clone(), known.password.clone()),
        };
        let http = upload::http_client(&options.ca_pem)
            .map_err(|error| cause(OciDistributionError::RequestError(error)))?;
        Ok(Self {
            client,
            auth,
            reference: reference.clone(),
            attempts: options.attempts.max(1),
            http,
            known,
            authorization: RwLock::default(),
        })
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

    /// URL of something in the repository.
    fn api(&self, what: &str) -> String {
        let host = self.at("latest").resolve_registry().to_owned();
        format!("{}://{host}/v2/{}{what}", self.reference.scheme, self.reference.repository)
    }

    /// Where this registry is, as [`Reference::registry`] says it with its scheme.
    pub(crate) fn is_same_as(&self, other: &Reference) -> bool {
        (self.reference.scheme, &self.reference.registry) == (other.scheme, &other.registry)
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
        let status = match error {
            OciDistributionError::RequestError(request) => request.status().map(|s| s.as_u16()),
            _ => None,
        };
        match error {
            OciDistributionError::RequestError(_) if matches!(status, Some(401 | 403)) => {
                let cause = match &self.known {
                    Some(known) => format!("it does not take the password of `{}`", known.user),
                    None => "it asks for credentials, and there are none for it".to_owned(),
                };
                RegistryError::Unauthorized { url, cause }
            }
            OciDistributionError::RequestError(_) if status.is_none() => {
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
