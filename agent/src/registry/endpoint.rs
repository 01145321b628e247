//! One repository at one place, the registry itself or a mirror: requests with the credentials that it asks for.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::ids::Digest;
use protocol::oci::{
    MAX_MANIFEST_BYTES, MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST, MEDIA_INDEX, MEDIA_MANIFEST,
};
use protocol::reference::Scheme;
use protocol::registries::{self, Credentials, Secret};

use super::challenge::{Challenge, TokenServer};
use super::{Blob, RegistryError, Whence, check};
use crate::transport::{Response, Transport, TransportError};

/// Longest token request without credentials.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest token that is accepted, in bytes.
const MAX_TOKEN_BYTES: usize = 16 << 10;
/// Largest answer of a token server, in bytes.
const MAX_TOKEN_ANSWER: u64 = 256 << 10;

/// A repository at one place. Shared by threads.
#[derive(Debug)]
pub(super) struct Place {
    transport: Transport,
    /// `HOST[:PORT]`, for people.
    pub(super) host: String,
    base: String,
    scheme: Scheme,
    credentials: Option<Credentials>,
    /// The `Authorization` that was taken last.
    authorization: Mutex<Option<Secret>>,
}

impl Place {
    pub(super) fn new(transport: Transport, endpoint: &registries::Endpoint) -> Self {
        // A token is shown at once: it is all there is. A password waits until it is asked for.
        let authorization = match &endpoint.credentials {
            Some(known @ Credentials::Token(_)) => known.authorization(),
            _ => None,
        };
        Self {
            transport,
            host: endpoint.reference.registry.clone(),
            base: endpoint.reference.api_base(),
            scheme: endpoint.reference.scheme,
            credentials: endpoint.credentials.clone(),
            authorization: Mutex::new(authorization),
        }
    }

    pub(super) fn manifest_url(&self, key: &str) -> String {
        format!("{}/manifests/{key}", self.base)
    }

    pub(super) fn blob_url(&self, digest: &Digest) -> String {
        format!("{}/blobs/{digest}", self.base)
    }

    /// What lies under a tag or digest now, unchecked.
    pub(super) fn manifest(&self, key: &str) -> Result<Vec<u8>, RegistryError> {
        let response = self.get(&self.manifest_url(key), &[("accept", &accept())])?;
        Ok(response.expect(&[200])?.into_bytes(MAX_MANIFEST_BYTES as u64)?)
    }

    /// The digest that the registry says lies under a tag now (OCI distribution spec 1.1, "Checking if content exists").
    pub(super) fn digest_of(&self, tag: &str) -> Result<Option<Digest>, RegistryError> {
        let response = self.request(true, &self.manifest_url(tag), &[("accept", &accept())])?;
        let response = response.expect(&[200])?;
        Ok(response.header("docker-content-digest").and_then(|digest| digest.parse().ok()))
    }

    /// A small blob, checked against its digest.
    pub(super) fn small_blob(&self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        let url = self.blob_url(digest);
        let response = self.get(&url, &[])?.expect(&[200])?;
        check(&url, response.into_bytes(MAX_MANIFEST_BYTES as u64)?, digest)
    }

    /// A blob as a stream, from byte `start` on if ranges are known here.
    pub(super) fn blob(
        &self,
        whence: Whence,
        digest: &Digest,
        start: u64,
    ) -> Result<Blob, RegistryError> {
        let url = self.blob_url(digest);
        if start == 0 {
            let response = self.get(&url, &[])?.expect(&[200])?;
            let size = response.content_length();
            return Ok(Blob { whence, start: 0, size, body: response.into_reader() });
        }
        let range = format!("bytes={start}-");
        let response = self.get(&url, &[("range", &range)])?.expect(&[200, 206])?;
        if response.status() == 200 {
            let size = response.content_length();
            return Ok(Blob { whence, start: 0, size, body: response.into_reader() });
        }
        let header = response.header("content-range").unwrap_or_default();
        match content_range(header) {
            Some((first, size)) if first == start => {
                Ok(Blob { whence, start, size, body: response.into_reader() })
            }
            _ => Err(response.wrong(format!("asked for `{range}`, got `{header}`")).into()),
        }
    }

    /// GET, with what was taken last, and once more with what is asked for.
    fn get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Response, RegistryError> {
        self.request(false, url, headers)
    }

    /// GET, or HEAD where only the `head` is wanted, with what the registry asks for to let us in.
    fn request(
        &self,
        head: bool,
        url: &str,
        headers: &[(&str, &str)],
    ) -> Result<Response, RegistryError> {
        let shown = self.lock().clone();
        let response = self.send(head, url, headers, shown.as_ref())?;
        if response.status() != 401 {
            return Ok(response);
        }
        let failed = |reason: String| RegistryError::Login { url: url.to_owned(), reason };
        let challenge = Challenge::choose(&response.headers("www-authenticate"));
        let value = match challenge.map_err(|reason| failed(reason.to_owned()))? {
            Challenge::Basic => self.password().map_err(failed)?,
            Challenge::Token(server) => self.token(&server, &failed)?,
        };
        *self.lock() = Some(value.clone());
        let response = self.send(head, url, headers, Some(&value))?;
        match (response.status(), &self.credentials) {
            (401 | 403, Some(_)) => {
                let reason = format!("it does not take the credentials for {}", self.host);
                Err(failed(reason))
            }
            (status @ (401 | 403), None) => Err(failed(format!("status {status} with a token"))),
            _ => Ok(response),
        }
    }

    /// What answers the demand for a password.
    fn password(&self) -> Result<Secret, String> {
        match &self.credentials {
            Some(known @ Credentials::Basic { .. }) => {
                known.authorization().ok_or_else(|| "there is no password".to_owned())
            }
            Some(Credentials::Token(_)) => {
                Err(format!("it does not take the token for {}", self.host))
            }
            Some(Credentials::Identity(_)) => {
                Err(format!("it asks for a password, and for {} there is a token only", self.host))
            }
            None if self.scheme == Scheme::Http => Err(format!(
                "it asks for a password; over plain HTTP one is shown only where the registry table says \
                 plain_http for {}",
                self.host
            )),
            None => Err(format!(
                "it asks for a password, and the registry table has none for {}",
                self.host
            )),
        }
    }

    /// A token from the server that the registry names.
    fn token(
        &self,
        server: &TokenServer,
        failed: &dyn Fn(String) -> RegistryError,
    ) -> Result<Secret, RegistryError> {
        if self.scheme == Scheme::Https && !server.realm.starts_with("https://") {
            return Err(failed("it asks for a token over plain HTTP".to_owned()));
        }
        let answer: Option<serde_json::Value> = match &self.credentials {
            None => self.transport.get_json(&server.url(), TOKEN_TIMEOUT)?,
            Some(Credentials::Token(_)) => {
                return Err(failed(format!("it does not take the token for {}", self.host)));
            }
            Some(known) => {
                let response = match known {
                    Credentials::Identity(refresh) => {
                        self.transport.post_form(&server.realm, &server.form(refresh.reveal()))?
                    }
                    known => {
                        self.send(false, &server.url(), &[], known.authorization().as_ref())?
                    }
                };
                let status = response.status();
                if matches!(status, 400 | 401 | 403) {
                    let reason =
                        format!("its token server does not take the credentials for {}", self.host);
                    return Err(failed(reason));
                }
                let bytes = response.expect(&[200])?.into_bytes(MAX_TOKEN_ANSWER)?;
                serde_json::from_slice(&bytes).ok()
            }
        };
        let answer = answer.ok_or_else(|| failed("the token server sent nothing".to_owned()))?;
        let token = answer.get("token").or_else(|| answer.get("access_token"));
        let token = token.and_then(|token| token.as_str()).unwrap_or_default();
        if token.is_empty()
            || token.len() > MAX_TOKEN_BYTES
            || !token.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(failed("the token server sent no token".to_owned()));
        }
        Ok(Secret::new(format!("Bearer {token}")))
    }

    fn send(
        &self,
        head: bool,
        url: &str,
        headers: &[(&str, &str)],
        authorization: Option<&Secret>,
    ) -> Result<Response, TransportError> {
        let shown = authorization.map(|value| ("authorization", value.reveal()));
        let headers: Vec<_> = headers.iter().copied().chain(shown).collect();
        match head {
            true => self.transport.head(url, &headers),
            false => self.transport.get(url, &headers),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Secret>> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The manifests that are understood.
fn accept() -> String {
    [MEDIA_INDEX, MEDIA_MANIFEST, MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST].join(", ")
}

/// First byte and whole size of `bytes FIRST-LAST/SIZE` (RFC 9110, 14.4).
fn content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, size) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let size = match size {
        "*" => None,
        size => Some(size.parse().ok()?),
    };
    (first <= last && size.is_none_or(|size| last < size)).then_some((first, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes 5-9/9", "bytes 9-5/10", "bytes */10", "5-9/10", "bytes -5/10"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
