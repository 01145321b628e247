//! One repository of an OCI registry, read only (OCI distribution spec 1.1): manifests by digest or tag, blobs as
//! streams from any byte on, anonymous bearer tokens where the registry wants them.
//!
//! Checks what an answer claims (status, range, manifest digest); the blobs' digests are checked by who reads them.

mod challenge;

use std::io::Read;
use std::sync::Mutex;
use std::time::Duration;

use protocol::ids::Digest;
use protocol::oci::{
    MAX_MANIFEST_BYTES, MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST, MEDIA_INDEX, MEDIA_MANIFEST,
};
use protocol::reference::{Reference, Scheme};

use crate::transport::{Response, Transport, TransportError};
use challenge::Challenge;

/// Longest token request.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest token that is accepted, in bytes.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// Why a registry's answer is of no use.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The request failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The content is not what its digest says.
    #[error("{url}: the content's digest is {found}, expected {expected}")]
    Digest {
        /// What was asked for.
        url: String,
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// The registry wants credentials, or its challenge cannot be followed.
    #[error("{url} needs a login: {reason}")]
    Login {
        /// What was asked for.
        url: String,
        /// Why it cannot be done anonymously.
        reason: String,
    },
}

impl RegistryError {
    /// Whether trying again may help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Transport(error) => error.is_transient(),
            Self::Digest { .. } => true,
            Self::Login { .. } => false,
        }
    }
}

/// A blob's body.
pub struct Blob {
    /// Byte of the blob that the body begins with: what was asked for, or 0 if the registry has no ranges.
    pub start: u64,
    /// Size of the whole blob in bytes, where the registry says it.
    pub size: Option<u64>,
    /// The bytes.
    pub body: Box<dyn Read + Send>,
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob(from {} of {:?})", self.start, self.size)
    }
}

/// A repository that is read from. Shared by threads.
#[derive(Debug)]
pub struct Registry {
    transport: Transport,
    base: String,
    scheme: Scheme,
    token: Mutex<Option<String>>,
}

impl Registry {
    /// The repository that a reference points into.
    #[must_use]
    pub fn new(transport: Transport, reference: &Reference) -> Self {
        Self {
            transport,
            base: reference.api_base(),
            scheme: reference.scheme,
            token: Mutex::new(None),
        }
    }

    /// URL of a manifest, by digest or tag.
    #[must_use]
    pub fn manifest_url(&self, key: &str) -> String {
        format!("{}/manifests/{key}", self.base)
    }

    /// URL of a blob.
    #[must_use]
    pub fn blob_url(&self, digest: &Digest) -> String {
        format!("{}/blobs/{digest}", self.base)
    }

    /// A manifest or index by its digest, checked against it. At most [`MAX_MANIFEST_BYTES`] are read.
    ///
    /// # Errors
    /// If the request fails or the content has another digest.
    pub fn manifest(&self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        let url = self.manifest_url(&digest.to_string());
        let bytes = self.fetch_manifest(&url)?;
        check(&url, bytes, digest)
    }

    /// The digest and bytes of what a tag points to now.
    ///
    /// # Errors
    /// If the request fails.
    pub fn resolve(&self, tag: &str) -> Result<(Digest, Vec<u8>), RegistryError> {
        let bytes = self.fetch_manifest(&self.manifest_url(tag))?;
        Ok((Digest::of(&bytes), bytes))
    }

    /// A small blob (a config), checked against its digest.
    ///
    /// # Errors
    /// If the request fails, the blob is larger than [`MAX_MANIFEST_BYTES`] or has another digest.
    pub fn small_blob(&self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        let url = self.blob_url(digest);
        let response = self.get(&url, &[])?.expect(&[200])?;
        check(&url, response.into_bytes(MAX_MANIFEST_BYTES as u64)?, digest)
    }

    /// A blob as a stream, from byte `start` on if the registry supports ranges.
    ///
    /// # Errors
    /// If the request fails or the answer is another range.
    pub fn blob(&self, digest: &Digest, start: u64) -> Result<Blob, RegistryError> {
        let url = self.blob_url(digest);
        if start == 0 {
            let response = self.get(&url, &[])?.expect(&[200])?;
            let size = response.content_length();
            return Ok(Blob { start: 0, size, body: response.into_reader() });
        }
        let range = format!("bytes={start}-");
        let response = self.get(&url, &[("range", &range)])?.expect(&[200, 206])?;
        if response.status() == 200 {
            let size = response.content_length();
            return Ok(Blob { start: 0, size, body: response.into_reader() });
        }
        let header = response.header("content-range").unwrap_or_default();
        match content_range(header) {
            Some((first, size)) if first == start => {
                Ok(Blob { start, size, body: response.into_reader() })
            }
            _ => Err(response.wrong(format!("asked for `{range}`, got `{header}`")).into()),
        }
    }

    fn fetch_manifest(&self, url: &str) -> Result<Vec<u8>, RegistryError> {
        let accept =
            [MEDIA_INDEX, MEDIA_MANIFEST, MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST].join(", ");
        let response = self.get(url, &[("accept", &accept)])?.expect(&[200])?;
        Ok(response.into_bytes(MAX_MANIFEST_BYTES as u64)?)
    }

    /// GET, with the token where there is one, and once more with a new token when the registry asks for it.
    fn get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Response, RegistryError> {
        let token = self.lock_token().clone();
        let response = self.send(url, headers, token.as_deref())?;
        if response.status() != 401 {
            return Ok(response);
        }
        let failed = |reason: String| RegistryError::Login { url: url.to_owned(), reason };
        let challenge = response.header("www-authenticate").unwrap_or_default();
        let challenge = Challenge::parse(challenge).map_err(|reason| failed(reason.to_owned()))?;
        if self.scheme == Scheme::Https && !challenge.realm.starts_with("https://") {
            return Err(failed("it asks for a token over plain HTTP".to_owned()));
        }
        let reply: serde_json::Value = self
            .transport
            .get_json(&challenge.url(), TOKEN_TIMEOUT)?
            .ok_or_else(|| failed("the token server sent nothing".to_owned()))?;
        let token = reply.get("token").or_else(|| reply.get("access_token"));
        let token = token.and_then(|token| token.as_str()).unwrap_or_default().to_owned();
        if token.is_empty()
            || token.len() > MAX_TOKEN_BYTES
            || !token.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(failed("the token server sent no token".to_owned()));
        }
        *self.lock_token() = Some(token.clone());
        let response = self.send(url, headers, Some(&token))?;
        match response.status() {
            401 | 403 => Err(failed(format!("status {} with a token", response.status()))),
            _ => Ok(response),
        }
    }

    fn send(
        &self,
        url: &str,
        headers: &[(&str, &str)],
        token: Option<&str>,
    ) -> Result<Response, TransportError> {
        let Some(token) = token else { return self.transport.get(url, headers) };
        let bearer = format!("Bearer {token}");
        let mut headers = headers.to_vec();
        headers.push(("authorization", &bearer));
        self.transport.get(url, &headers)
    }

    fn lock_token(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.token.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn check(url: &str, bytes: Vec<u8>, expected: &Digest) -> Result<Vec<u8>, RegistryError> {
    let found = Digest::of(&bytes);
    if found == *expected {
        return Ok(bytes);
    }
    Err(RegistryError::Digest { url: url.to_owned(), expected: *expected, found })
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
