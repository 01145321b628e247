//! What is sent to a registry (OCI distribution specification, "Push"): blobs, taken up again where they broke off, and
//! manifests.
//!
//! A blob of more than [`SMALL`] bytes goes in chunks (`PATCH`). When a connection breaks, the registry is asked how much
//! it has (`GET` of the upload) and the rest follows; a registry that has forgotten the upload gets the blob anew.

use std::io::{Seek, SeekFrom};
use std::path::Path;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use oci_distribution::RegistryOperation;
use oci_distribution::errors::OciDistributionError;
use protocol::oci::Descriptor;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, LOCATION, RANGE};
use reqwest::{Body, Response, StatusCode, Url};
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use super::authorization::checked;
use super::{CONNECT_TIMEOUT, FIRST_PAUSE, LONGEST_PAUSE, READ_TIMEOUT, is_passing, jitter};
use super::{Registry, RegistryError};
use crate::progress::Meter;

/// Largest blob that is sent in one request without an upload that could be taken up again, in bytes.
const SMALL: u64 = 1 << 20;
/// Bytes of one `PATCH`. Registries behind proxies limit the size of a request.
const CHUNK: u64 = 64 << 20;
/// Bytes that are read from a file at a time.
const READ: u64 = 256 << 10;
/// Type of a blob's bytes.
const OCTETS: &str = "application/octet-stream";

/// An upload that the registry has opened.
#[derive(Debug, Default)]
struct Upload {
    /// Where it goes on.
    location: Option<Url>,
    /// Bytes that the registry has.
    offset: u64,
}

/// The client of everything that is sent.
pub(super) fn http_client(ca_pem: &[Vec<u8>]) -> Result<reqwest::Client, reqwest::Error> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("layercake/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT);
    if !ca_pem.is_empty() {
        let mut certificates = Vec::new();
        for pem in ca_pem {
            certificates.extend(reqwest::Certificate::from_pem_bundle(pem)?);
        }
        builder = builder.tls_certs_only(certificates);
    }
    builder.build()
}

impl Registry {
    /// Whether the repository has the blob.
    pub(crate) async fn has_blob(&self, blob: &Descriptor) -> Result<bool, RegistryError> {
        let digest = blob.digest.to_string();
        let here = self.at(&digest);
        let what = format!("/blobs/{digest}");
        // Without this the client asks as nobody.
        self.client.store_auth_if_needed(here.resolve_registry(), &self.auth).await;
        self.persistently(&what, || self.client.blob_exists(&here, &digest)).await
    }

    /// Asks the registry to take the blob over from another of its repositories. If it does not, nothing has happened.
    pub(crate) async fn mount(&self, blob: &Descriptor, from: &str) -> Result<bool, RegistryError> {
        let digest = blob.digest.to_string();
        let mut url = self.url("/blobs/uploads/")?;
        url.query_pairs_mut().append_pair("mount", &digest).append_pair("from", from);
        let ask = || async {
            let answer =
                self.send(|| Ok(self.http.post(url.clone()).header(CONTENT_LENGTH, 0))).await?;
            let mounted = answer.status() == StatusCode::CREATED;
            if answer.status() == StatusCode::ACCEPTED
                && let Some(upload) = location(&answer)
            {
                // It has opened an upload instead, which nobody needs. Not all registries can forget one.
                let _ = self.send(|| Ok(self.http.delete(upload.clone()))).await;
            }
            Ok(mounted)
        };
        self.persistently(&format!("/blobs/uploads/?mount={digest}&from={from}"), ask).await
    }

    /// Sends a blob that stands in a file, and goes on where it broke off.
    pub(crate) async fn send_blob(
        &self,
        blob: &Descriptor,
        path: &Path,
        meter: &Meter,
    ) -> Result<(), RegistryError> {
        let mut upload = Upload::default();
        let (mut pause, mut attempt) = (FIRST_PAUSE, 1);
        loop {
            let before = upload.offset;
            match self.try_upload(&mut upload, blob, path, meter).await {
                Ok(()) => return Ok(()),
                Err(OciDistributionError::IoError(source)) => {
                    return Err(RegistryError::File { path: path.to_owned(), source });
                }
                Err(error) if attempt < self.attempts && is_passing(&error) => {
                    // What has come further may break as often as it likes.
                    if upload.offset > before {
                        (pause, attempt) = (FIRST_PAUSE, 1);
                    }
                    tokio::time::sleep(jitter(pause)).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    attempt += 1;
                }
                Err(error) => return Err(self.explain(&format!("/blobs/{}", blob.digest), &error)),
            }
        }
    }

    async fn try_upload(
        &self,
        upload: &mut Upload,
        blob: &Descriptor,
        path: &Path,
        meter: &Meter,
    ) -> Result<(), OciDistributionError> {
        if let Some(location) = upload.location.clone() {
            *upload = self.state_of(location).await?;
            let digest = blob.digest.to_string();
            if upload.location.is_none()
                && self.client.blob_exists(&self.at(&digest), &digest).await?
            {
                meter.set(blob.size);
                return Ok(());
            }
        }
        meter.set(upload.offset);
        if upload.location.is_none() {
            let url = self.url_of("/blobs/uploads/")?;
            let make = || Ok(self.http.post(url.clone()).header(CONTENT_LENGTH, 0));
            let answer = checked(self.send(make).await?, is(StatusCode::ACCEPTED)).await?;
            upload.location = Some(location(&answer).ok_or_else(no_location)?);
        }
        while blob.size > SMALL && upload.offset < blob.size {
            self.send_chunk(upload, blob, path, meter).await?;
        }
        let mut url = upload.location.clone().ok_or_else(no_location)?;
        url.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let rest = blob.size.saturating_sub(upload.offset);
        let offset = upload.offset;
        let make = || {
            let request = self.http.put(url.clone()).header(CONTENT_TYPE, OCTETS);
            body(request.header(CONTENT_LENGTH, rest), path, offset, rest, meter)
        };
        let answer = self.send(make).await?;
        if answer.status() == StatusCode::NOT_FOUND {
            // A registry that lost the upload meanwhile: from the start.
            *upload = Upload::default();
            return Err(forgotten(&answer));
        }
        checked(answer, is(StatusCode::CREATED)).await.map(drop)
    }

    async fn send_chunk(
        &self,
        upload: &mut Upload,
        blob: &Descriptor,
        path: &Path,
        meter: &Meter,
    ) -> Result<(), OciDistributionError> {
        let url = upload.location.clone().ok_or_else(no_location)?;
        let start = upload.offset;
        let length = CHUNK.min(blob.size - start);
        let end = start + length;
        let make = || {
            let request = self
                .http
                .patch(url.clone())
                .header(CONTENT_TYPE, OCTETS)
                .header(CONTENT_LENGTH, length)
                .header(CONTENT_RANGE, format!("{start}-{}", end - 1));
            body(request, path, start, length, meter)
        };
        let answer = self.send(make).await?;
        if matches!(answer.status(), StatusCode::NOT_FOUND | StatusCode::RANGE_NOT_SATISFIABLE) {
            *upload = Upload::default();
            return Err(forgotten(&answer));
        }
        let answer = checked(answer, is(StatusCode::ACCEPTED)).await?;
        upload.location = Some(location(&answer).unwrap_or(url));
        upload.offset = end;
        Ok(())
    }

    /// How far an upload is that was cut; none where the registry has forgotten it.
    async fn state_of(&self, url: Url) -> Result<Upload, OciDistributionError> {
        let answer = self.send(|| Ok(self.http.get(url.clone()))).await?;
        if !answer.status().is_success() {
            return Ok(Upload::default());
        }
        let range = answer.headers().get(RANGE).and_then(|range| range.to_str().ok());
        let Some(offset) = range.and_then(held) else { return Ok(Upload::default()) };
        Ok(Upload { location: Some(location(&answer).unwrap_or(url)), offset })
    }

    /// Puts a manifest under a tag or its digest.
    pub(crate) async fn put_manifest(
        &self,
        key: &str,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<(), RegistryError> {
        let what = format!("/manifests/{key}");
        let url = self.url(&what)?;
        let put = || async {
            let make = || {
                let request = self.http.put(url.clone()).header(CONTENT_TYPE, media_type);
                Ok(request.body(bytes.clone()))
            };
            checked(self.send(make).await?, is(StatusCode::CREATED)).await.map(drop)
        };
        self.persistently(&what, put).await
    }

    /// Asks who we are before anything else, so that wrong credentials are one clear error.
    pub(crate) async fn log_in(&self) -> Result<(), RegistryError> {
        let here = self.at("latest");
        let ask = || self.client.auth(&here, &self.auth, RegistryOperation::Push);
        self.persistently("", ask).await.map(drop)
    }

    fn url_of(&self, what: &str) -> Result<Url, OciDistributionError> {
        Url::parse(&self.api(what))
            .map_err(|error| OciDistributionError::UrlParseError(error.to_string()))
    }

    fn url(&self, what: &str) -> Result<Url, RegistryError> {
        self.url_of(what).map_err(|error| self.explain(what, &error))
    }
}

fn is(expected: StatusCode) -> impl Fn(&StatusCode) -> bool {
    move |status| *status == expected
}

fn no_location() -> OciDistributionError {
    OciDistributionError::RegistryNoLocationError
}

/// The registry no longer knows an upload: as passing as a broken connection.
fn forgotten(answer: &Response) -> OciDistributionError {
    OciDistributionError::ServerError {
        code: StatusCode::SERVICE_UNAVAILABLE.as_u16(),
        url: answer.url().to_string(),
        message: "the registry has forgotten the upload".to_owned(),
    }
}

/// Where the answer says that it goes on, relative to what was asked.
fn location(answer: &Response) -> Option<Url> {
    locate(answer.url(), answer.headers())
}

fn locate(asked: &Url, headers: &HeaderMap) -> Option<Url> {
    asked.join(headers.get(LOCATION)?.to_str().ok()?).ok()
}

/// Bytes that `Range: 0-END` says are there. Of `0-0`, which some registries send for nothing, nothing is believed.
fn held(range: &str) -> Option<u64> {
    let (start, end) = range.trim_start_matches("bytes=").split_once('-')?;
    match (start.parse::<u64>().ok()?, end.parse::<u64>().ok()?) {
        (0, 0) => Some(0),
        (0, end) => end.checked_add(1),
        _ => None,
    }
}

/// The request with a part of the file as its body.
fn body(
    request: reqwest::RequestBuilder,
    path: &Path,
    offset: u64,
    length: u64,
    meter: &Meter,
) -> Result<reqwest::RequestBuilder, OciDistributionError> {
    meter.set(offset);
    if length == 0 {
        return Ok(request);
    }
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let content = chunks(File::from_std(file), length, meter.clone());
    Ok(request.body(Body::wrap_stream(content)))
}

fn chunks(
    file: File,
    length: u64,
    meter: Meter,
) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static {
    stream::try_unfold((file, length), move |(mut file, left)| {
        let meter = meter.clone();
        async move {
            if left == 0 {
                return Ok(None);
            }
            let most = READ.min(left);
            let mut bytes = Vec::with_capacity(usize::try_from(most).unwrap_or_default());
            let read = (&mut file).take(most).read_to_end(&mut bytes).await? as u64;
            if read == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            meter.add(read);
            Ok(Some((Bytes::from(bytes), (file, left - read))))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_holds_is_read_from_its_range() {
        for (range, expected) in [
            ("0-1023", Some(1024)),
            ("bytes=0-9", Some(10)),
            ("0-0", Some(0)),
            ("5-9", None),
            ("0-18446744073709551615", None),
            ("0-", None),
            ("", None),
        ] {
            assert_eq!(held(range), expected, "{range}");
        }
    }

    #[test]
    fn a_location_is_relative_to_what_was_asked() {
        let asked = Url::parse("http://r:5000/v2/a/blobs/uploads/").expect("url");
        let mut headers = HeaderMap::new();
        assert_eq!(locate(&asked, &headers), None);
        for (text, expected) in [
            ("/v2/a/blobs/uploads/7?_state=x", "http://r:5000/v2/a/blobs/uploads/7?_state=x"),
            ("https://other/up", "https://other/up"),
        ] {
            headers.insert(LOCATION, text.parse().expect("value"));
            assert_eq!(locate(&asked, &headers).expect(text).as_str(), expected);
        }
    }
}
