//! The node's one HTTP client, for the boot server and for registries: HTTP/1.1, TLS by rustls with ring, CA
//! certificates from one directory.
//!
//! Not a policy: retrying, digests and tokens are the callers' work. Proxies of the environment are not used.

#[cfg(test)]
mod tls;
pub mod websocket;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::tls::{PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};

/// Longest time to resolve a name, connect and shake hands.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time without one byte, in headers and bodies. A body as a whole has no limit.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(15);
/// Largest JSON document that is read, in bytes.
pub const MAX_JSON_BYTES: u64 = 4 << 20;
/// How much of an error's body is shown, in bytes.
const ERROR_BODY_BYTES: u64 = 300;
/// Largest CA file that is read, in bytes.
const MAX_CA_BYTES: u64 = 1 << 20;

/// Why a request failed. Each names method and URL.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The CA directory or a file in it could not be read.
    #[error("cannot read CA certificates from {}", path.display())]
    CaFile {
        /// The directory or file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A file in the CA directory holds no usable certificate.
    #[error("{} is no PEM certificate: {reason}", path.display())]
    CaContent {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// HTTPS without anything to trust.
    #[error("{method} {url}: no CA certificate is installed, so https cannot be trusted")]
    NoCa {
        /// The method.
        method: &'static str,
        /// The URL.
        url: String,
    },
    /// No answer came: name, connection, TLS, timeout, protocol.
    #[error("{method} {url} failed")]
    Request {
        /// The method.
        method: &'static str,
        /// The URL.
        url: String,
        /// The client's words.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The answer's status is not the expected one.
    #[error("{method} {url}: status {status}: {body}")]
    Status {
        /// The method.
        method: &'static str,
        /// The URL.
        url: String,
        /// The HTTP status.
        status: u16,
        /// How its body begins, on one line.
        body: String,
    },
    /// The body broke off or stalled.
    #[error("{method} {url}: the body broke off")]
    Body {
        /// The method.
        method: &'static str,
        /// The URL.
        url: String,
        /// The client's words.
        #[source]
        source: std::io::Error,
    },
    /// The body is larger than it may be.
    #[error("{method} {url}: the body is larger than {limit} bytes")]
    TooLarge {
        /// The method.
        method: &'static str,
        /// The URL.
        url: String,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A body is not the JSON that was expected, or could not be written as JSON.
    #[error("{method} {url}: malformed JSON")]
    Json {
        /// The method.
        method: &'static str,
        /// The URL.
        url: String,
        /// The parser's words.
        #[source]
        source: serde_json::Error,
    },
    /// The answer contradicts the request: a shifted range, a malformed header.
    #[error("{method} {url}: {reason}")]
    Protocol {
        /// The method.
        method: &'static str,
        /// The URL.
        url: String,
        /// What is wrong.
        reason: String,
    },
}

impl TransportError {
    /// Whether trying again may help: broken connections, stalls, and the statuses 408, 429 and 5xx.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Body { .. } => true,
            Self::Request { source, .. } => !matches!(
                **source,
                ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::TooManyRedirects
            ),
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }
}

/// How long the transport waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// To connect: [`CONNECT_TIMEOUT`].
    pub connect: Duration,
    /// Without one byte: [`STALL_TIMEOUT`].
    pub stall: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: CONNECT_TIMEOUT, stall: STALL_TIMEOUT }
    }
}

/// The client. Cloning shares its connections.
#[derive(Debug, Clone)]
pub struct Transport {
    agent: ureq::Agent,
    trusts: usize,
    timeouts: Timeouts,
    /// For WebSockets.
    tls: Arc<rustls::ClientConfig>,
}

/// An answer whose body is still to be read.
pub struct Response {
    method: &'static str,
    url: String,
    inner: ureq::http::Response<ureq::Body>,
}

impl std::fmt::Debug for Response {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Response({} {}: {})", self.method, self.url, self.status())
    }
}

impl Response {
    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.inner.status().as_u16()
    }

    /// A header's value, if it is there and is text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.inner.headers().get(name)?.to_str().ok()
    }

    /// Every value of a header that is text, in their order.
    #[must_use]
    pub fn headers(&self, name: &str) -> Vec<&str> {
        let values = self.inner.headers().get_all(name).iter();
        values.filter_map(|value| value.to_str().ok()).collect()
    }

    /// The body's declared length, if it has one, in bytes.
    #[must_use]
    pub fn content_length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }

    /// The answer, if its status is one of these.
    ///
    /// # Errors
    /// [`TransportError::Status`] with the beginning of the body.
    pub fn expect(self, statuses: &[u16]) -> Result<Self, TransportError> {
        if statuses.contains(&self.status()) {
            return Ok(self);
        }
        let (method, url, status) = (self.method, self.url.clone(), self.status());
        let mut body = Vec::new();
        // What cannot be read of an error's body is not shown; the status is the error.
        let _ = self.into_reader().take(ERROR_BODY_BYTES).read_to_end(&mut body);
        let body = String::from_utf8_lossy(&body);
        let body = body.split_whitespace().collect::<Vec<_>>().join(" ");
        Err(TransportError::Status { method, url, status, body })
    }

    /// The body as a stream, without a limit.
    #[must_use]
    pub fn into_reader(self) -> Box<dyn Read + Send> {
        Box::new(self.inner.into_body().into_with_config().limit(u64::MAX).reader())
    }

    /// The whole body.
    ///
    /// # Errors
    /// If it breaks off or is longer than `limit` bytes.
    pub fn into_bytes(self, limit: u64) -> Result<Vec<u8>, TransportError> {
        let (method, url) = (self.method, self.url.clone());
        let mut bytes = Vec::new();
        match self.into_reader().take(limit.saturating_add(1)).read_to_end(&mut bytes) {
            Err(source) => Err(TransportError::Body { method, url, source }),
            Ok(read) if read as u64 > limit => Err(TransportError::TooLarge { method, url, limit }),
            Ok(_) => Ok(bytes),
        }
    }

    /// An error about this answer.
    #[must_use]
    pub fn wrong(&self, reason: String) -> TransportError {
        TransportError::Protocol { method: self.method, url: self.url.clone(), reason }
    }
}

impl Transport {
    /// A client that trusts every certificate in the `*.pem` and `*.crt` files of this directory. Without the directory
    /// or without files in it, only plain HTTP works.
    ///
    /// # Errors
    /// If the directory or a file cannot be read, or a file holds no certificate.
    pub fn new(ca_dir: &Path) -> Result<Self, TransportError> {
        Self::with_timeouts(ca_dir, Timeouts::default())
    }

    /// The same with other timeouts.
    ///
    /// # Errors
    /// As [`Transport::new`].
    pub fn with_timeouts(ca_dir: &Path, timeouts: Timeouts) -> Result<Self, TransportError> {
        Self::build(read_ca_dir(ca_dir)?, timeouts)
    }

    /// A client that trusts the certificates in these PEM texts and no others; `name` says in errors whose they are.
    ///
    /// # Errors
    /// If a text holds no certificate.
    pub fn trusting(&self, name: &str, ca: &[String]) -> Result<Self, TransportError> {
        let mut roots = Vec::new();
        for pem in ca {
            read_pem(Path::new(name), pem.as_bytes(), &mut roots)?;
        }
        Self::build(roots, self.timeouts)
    }

    fn build(
        roots: Vec<ureq::tls::Certificate<'static>>,
        timeouts: Timeouts,
    ) -> Result<Self, TransportError> {
        let trusts = roots.len();
        let sockets = Arc::new(tls_of_websockets(&roots)?);
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .root_certs(RootCerts::Specific(Arc::new(roots)))
            .build();
        let config = ureq::Agent::config_builder()
            .tls_config(tls)
            .proxy(None)
            .http_status_as_error(false)
            .user_agent(concat!("layercake-agent/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(timeouts.connect))
            .timeout_recv_response(Some(timeouts.stall))
            .timeout_per_read(Some(timeouts.stall))
            .timeout_per_write(Some(timeouts.stall))
            .build();
        Ok(Self { agent: config.new_agent(), trusts, timeouts, tls: sockets })
    }

    /// Sends a GET request with these headers and returns the answer, whatever its status. Redirects are followed.
    ///
    /// # Errors
    /// If no answer came.
    pub fn get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Response, TransportError> {
        self.ask("GET", url, headers)
    }

    /// As [`Transport::get`], without the body: a HEAD request.
    ///
    /// # Errors
    /// If no answer came.
    pub fn head(&self, url: &str, headers: &[(&str, &str)]) -> Result<Response, TransportError> {
        self.ask("HEAD", url, headers)
    }

    fn ask(
        &self,
        method: &'static str,
        url: &str,
        headers: &[(&str, &str)],
    ) -> Result<Response, TransportError> {
        self.check_scheme(method, url)?;
        let mut request = if method == "HEAD" { self.agent.head(url) } else { self.agent.get(url) };
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        answer(method, url, request.call())
    }

    /// Sends a form (`application/x-www-form-urlencoded`, encoded already) and returns the answer, whatever its status.
    ///
    /// # Errors
    /// If no answer came.
    pub fn post_form(&self, url: &str, form: &str) -> Result<Response, TransportError> {
        const METHOD: &str = "POST";
        self.check_scheme(METHOD, url)?;
        let request = self.agent.post(url);
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        answer(METHOD, url, request.send(form.as_bytes()))
    }

    /// Gets a JSON document; `None` on 204. `timeout` is for the whole request and may be as long as a long poll needs.
    ///
    /// # Errors
    /// If there is no answer in time, its status is neither 200 nor 204, or it is not the JSON expected.
    pub fn get_json<T: DeserializeOwned>(
        &self,
        url: &str,
        timeout: Duration,
    ) -> Result<Option<T>, TransportError> {
        const METHOD: &str = "GET";
        self.check_scheme(METHOD, url)?;
        let request = self.agent.get(url).header("accept", "application/json");
        let config = request.config().timeout_global(Some(timeout));
        let config = config.timeout_recv_response(Some(timeout)).timeout_per_read(Some(timeout));
        let response = answer(METHOD, url, config.build().call())?.expect(&[200, 204])?;
        if response.status() == 204 {
            return Ok(None);
        }
        let bytes = response.into_bytes(MAX_JSON_BYTES)?;
        let parsed = serde_json::from_slice(&bytes);
        let failed = |source| TransportError::Json { method: METHOD, url: url.to_owned(), source };
        parsed.map(Some).map_err(failed)
    }

    /// Puts a JSON document. `timeout` is for the whole request.
    ///
    /// # Errors
    /// If there is no answer in time or its status is not 200, 201, 202 or 204.
    pub fn put_json<T: Serialize>(
        &self,
        url: &str,
        body: &T,
        timeout: Duration,
    ) -> Result<(), TransportError> {
        const METHOD: &str = "PUT";
        self.check_scheme(METHOD, url)?;
        let failed = |source| TransportError::Json { method: METHOD, url: url.to_owned(), source };
        let bytes = serde_json::to_vec(body).map_err(failed)?;
        let request = self.agent.put(url).header("content-type", "application/json");
        let request = request.config().timeout_global(Some(timeout)).build();
        answer(METHOD, url, request.send(&bytes[..]))?.expect(&[200, 201, 202, 204])?;
        Ok(())
    }

    fn check_scheme(&self, method: &'static str, url: &str) -> Result<(), TransportError> {
        let https = url.get(..8).is_some_and(|start| start.eq_ignore_ascii_case("https://"));
        match https && self.trusts == 0 {
            true => Err(TransportError::NoCa { method, url: url.to_owned() }),
            false => Ok(()),
        }
    }
}

fn answer(
    method: &'static str,
    url: &str,
    result: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
) -> Result<Response, TransportError> {
    let url = url.to_owned();
    match result {
        Ok(inner) => Ok(Response { method, url, inner }),
        Err(source) => Err(TransportError::Request { method, url, source: Box::new(source) }),
    }
}

/// TLS as ureq does it, for what ureq does not do.
fn tls_of_websockets(
    roots: &[ureq::tls::Certificate<'_>],
) -> Result<rustls::ClientConfig, TransportError> {
    let mut store = rustls::RootCertStore::empty();
    // What cannot be used as a root is of no use to ureq either; it says so when it is needed.
    store.add_parsable_certificates(roots.iter().map(|root| root.der().to_vec().into()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TransportError::Protocol {
            method: "GET",
            url: "wss:".to_owned(),
            reason: error.to_string(),
        })?;
    Ok(builder.with_root_certificates(store).with_no_client_auth())
}

fn read_ca_dir(dir: &Path) -> Result<Vec<ureq::tls::Certificate<'static>>, TransportError> {
    let failed = |source| TransportError::CaFile { path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|ext| ext == "pem" || ext == "crt") {
            files.push(path);
        }
    }
    files.sort();
    let mut certificates = Vec::new();
    for path in files {
        let failed = |source| TransportError::CaFile { path: path.clone(), source };
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&path).map_err(failed)?;
        file.take(MAX_CA_BYTES).read_to_end(&mut bytes).map_err(failed)?;
        read_pem(&path, &bytes, &mut certificates)?;
    }
    Ok(certificates)
}

/// Adds the certificates of a PEM text; `path` names it in errors.
fn read_pem(
    path: &Path,
    bytes: &[u8],
    certificates: &mut Vec<ureq::tls::Certificate<'static>>,
) -> Result<(), TransportError> {
    let wrong = |reason| TransportError::CaContent { path: path.to_owned(), reason };
    let before = certificates.len();
    for item in parse_pem(bytes) {
        let item = item.map_err(|error: ureq::Error| wrong(error.to_string()))?;
        if let PemItem::Certificate(certificate) = item {
            certificates.push(certificate);
        }
    }
    match certificates.len() == before {
        true => Err(wrong("it holds none".to_owned())),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pull::fake::{Answer, Fake};

    fn transport() -> Transport {
        Transport::new(Path::new("/nonexistent/ca")).expect("transport")
    }

    #[test]
    fn https_without_any_ca_is_a_clear_error() {
        let error = transport().get("https://127.0.0.1:1/x", &[]).expect_err("no CA");
        assert!(error.to_string().contains("GET https://127.0.0.1:1/x: no CA certificate"));
        assert!(!error.is_transient());
    }

    #[test]
    fn a_ca_file_without_certificate_is_named() {
        let dir = tempfile::tempdir().expect("directory");
        std::fs::write(dir.path().join("site.pem"), "not a certificate").expect("file");
        std::fs::write(dir.path().join("README"), "ignored").expect("file");
        let error = Transport::new(dir.path()).expect_err("no certificate").to_string();
        assert!(error.contains("site.pem is no PEM certificate"), "{error}");
    }

    #[test]
    fn json_comes_and_goes_and_204_is_nothing() {
        let fake = Fake::start();
        fake.add("/json", Answer::ok(br#"{"a":1}"#.to_vec()));
        fake.add("/none", Answer { status: 204, ..Answer::ok(Vec::new()) });
        fake.add("/bad", Answer::ok(b"{".to_vec()));
        let get = |path: &str| {
            let url = format!("{}{path}", fake.url());
            transport().get_json::<serde_json::Value>(&url, Duration::from_secs(5))
        };
        assert_eq!(get("/json").expect("json"), Some(serde_json::json!({"a": 1})));
        assert_eq!(get("/none").expect("none"), None);
        assert!(matches!(get("/bad"), Err(TransportError::Json { .. })));
        let url = format!("{}/json", fake.url());
        transport().put_json(&url, &1, Duration::from_secs(5)).expect("put");
    }

    #[test]
    fn an_error_names_method_url_status_and_the_body_s_beginning() {
        let fake = Fake::start();
        let body = format!("{{\"error\":\n \"{}\"}}", "no such thing ".repeat(100));
        fake.add("/x", Answer { status: 418, ..Answer::ok(body.into_bytes()) });
        let url = format!("{}/x", fake.url());
        let error = transport().get_json::<()>(&url, Duration::from_secs(5)).expect_err("418");
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("GET {url}: status 418: {{\"error\": \"no such")),
            "{text}"
        );
        assert!(text.len() < 400 && !text.contains('\n'));
    }

    #[test]
    fn a_json_document_without_end_is_cut_off() {
        let fake = Fake::start();
        let limit = usize::try_from(MAX_JSON_BYTES).expect("small");
        fake.add("/large", Answer::ok(vec![b' '; limit + 1]));
        let url = format!("{}/large", fake.url());
        let error = transport().get_json::<()>(&url, Duration::from_secs(20)).expect_err("large");
        assert!(matches!(error, TransportError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn a_closed_port_is_transient() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("port").local_addr();
        let url = format!("http://{}/", port.expect("address"));
        let error = transport().get(&url, &[]).expect_err("closed");
        assert!(error.is_transient() && error.to_string().contains(&url), "{error}");
    }
}
