//! The commands' HTTP client: errors name the URL, and what to do about it.

use std::time::Duration;

use anyhow::{Context, anyhow};
use protocol::api::ErrorBody;
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::tls::{RootCerts, TlsConfig};

use crate::config::values::BaseUrl;

/// How long the server may take to answer: none of the commands' requests is a long poll.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection may take to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer that is read, in bytes: a list of all nodes of a large site.
const MAX_ANSWER_BYTES: u64 = 256 << 20;

/// A client of one server.
#[derive(Debug)]
pub(super) struct Client {
    agent: ureq::Agent,
    base: String,
}

impl Client {
    pub(super) fn new(server: &BaseUrl) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            // The system's CAs, or those of SSL_CERT_FILE, as when an ImageSet is pushed.
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .build()
            .new_agent();
        Self { agent, base: server.to_string() }
    }

    pub(super) fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let url = format!("{}{path}", self.base);
        let answer = self.agent.get(&url).call();
        parse(&url, &self.read(&url, answer)?)
    }

    pub(super) fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        let (url, bytes) = self.send(path, body)?;
        parse(&url, &bytes)
    }

    /// Posts what may take as long as it takes, with a token where there is one.
    pub(super) fn post_long<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        token: Option<&str>,
    ) -> anyhow::Result<T> {
        let url = format!("{}{path}", self.base);
        let body = serde_json::to_vec(body)?;
        let mut request = self.agent.post(&url).content_type("application/json");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.config().timeout_global(None).build();
        parse(&url, &self.read(&url, request.send(&body))?)
    }

    /// Sends bytes, for as long as it takes, with a token where there is one.
    pub(super) fn upload<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        bytes: &[u8],
        token: Option<&str>,
    ) -> anyhow::Result<T> {
        let (url, bytes) = self.send_bytes(method, path, bytes, token)?;
        parse(&url, &bytes)
    }

    /// The same, where the answer has no body.
    pub(super) fn upload_only(
        &self,
        method: &str,
        path: &str,
        bytes: &[u8],
        token: Option<&str>,
    ) -> anyhow::Result<()> {
        self.send_bytes(method, path, bytes, token).map(drop)
    }

    /// Deletes, with a token where there is one.
    pub(super) fn delete(&self, path: &str, token: Option<&str>) -> anyhow::Result<()> {
        self.send_bytes("DELETE", path, &[], token).map(drop)
    }

    fn send_bytes(
        &self,
        method: &str,
        path: &str,
        bytes: &[u8],
        token: Option<&str>,
    ) -> anyhow::Result<(String, Vec<u8>)> {
        let url = format!("{}{path}", self.base);
        let mut request = ureq::http::Request::builder().method(method).uri(&url);
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let answer = match bytes.is_empty() {
            true => self.agent.run(self.unhurried(request.body(())?)),
            false => self.agent.run(self.unhurried(request.body(bytes)?)),
        };
        let bytes = self.read(&url, answer)?;
        Ok((url, bytes))
    }

    /// A request that may take as long as it takes.
    fn unhurried<B: ureq::AsSendBody>(
        &self,
        request: ureq::http::Request<B>,
    ) -> ureq::http::Request<B> {
        self.agent.configure_request(request).timeout_global(None).build()
    }

    /// Posts what is answered without a body.
    pub(super) fn post_only(&self, path: &str, body: &impl Serialize) -> anyhow::Result<()> {
        self.send(path, body).map(drop)
    }

    fn send(&self, path: &str, body: &impl Serialize) -> anyhow::Result<(String, Vec<u8>)> {
        let url = format!("{}{path}", self.base);
        let body = serde_json::to_vec(body)?;
        let request = self.agent.post(&url).content_type("application/json");
        let bytes = self.read(&url, request.send(&body))?;
        Ok((url, bytes))
    }

    fn read(
        &self,
        url: &str,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> anyhow::Result<Vec<u8>> {
        let mut answer = answer.map_err(|error| {
            anyhow!(
                "{url} cannot be reached: {error}; is `layercake serve` running, and is --server \
                 (or LAYERCAKE_SERVER) right?"
            )
        })?;
        let status = answer.status();
        let bytes = answer
            .body_mut()
            .with_config()
            .limit(MAX_ANSWER_BYTES)
            .read_to_vec()
            .with_context(|| format!("{url}: the answer broke off"))?;
        if status.is_success() {
            return Ok(bytes);
        }
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => Err(anyhow!("{}", body.error.message)),
            Err(_) => Err(anyhow!("{url} answered {status}; is it a Layercake server?")),
        }
    }
}

fn parse<T: DeserializeOwned>(url: &str, bytes: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(bytes)
        .with_context(|| format!("{url} answered what this command does not understand"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreachable_server_is_named_with_what_to_do() {
        // Bound and closed again: nobody listens there.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        drop(listener);
        let base = format!("http://{address}").parse().expect("url");
        let error = Client::new(&base).get::<Vec<u8>>("/v1/nodes").expect_err("nobody").to_string();
        let expected = format!("http://{address}/v1/nodes cannot be reached: ");
        assert!(error.starts_with(&expected), "{error}");
        assert!(error.contains("is `layercake serve` running"), "{error}");
    }

    #[test]
    fn https_to_a_server_without_tls_is_an_error_that_names_the_url() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n")
                .expect("say");
        });
        let base = format!("https://{address}").parse().expect("url");
        let error = Client::new(&base).get::<Vec<u8>>("/v1/nodes").expect_err("no TLS").to_string();
        assert!(error.starts_with(&format!("https://{address}/v1/nodes cannot be ")), "{error}");
        server.join().expect("server");
    }
}
