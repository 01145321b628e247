//! What is read from a registry (OCI distribution specification, "Pull"): manifests, tags, and blobs, which are taken up
//! again where they broke off. Whatever is asked for by digest is checked against it.

use std::io::Write;

use futures_util::TryStreamExt;
use oci_distribution::client::{BlobResponse, SizedStream};
use oci_distribution::errors::OciDistributionError;
use oci_distribution::manifest::OciDescriptor;
use protocol::ids::Digest;
use protocol::oci::{
    Descriptor, MAX_MANIFEST_BYTES, MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST, MEDIA_INDEX,
    MEDIA_MANIFEST,
};
use serde::Deserialize;

use super::authorization::checked;
use super::{FIRST_PAUSE, LONGEST_PAUSE, Registry, RegistryError, is_passing, jitter};
use crate::blob::{BlobDir, BlobWriter};
use crate::progress::Meter;

/// Media types of manifests that are asked for.
const ACCEPTED: [&str; 4] = [MEDIA_INDEX, MEDIA_MANIFEST, MEDIA_DOCKER_LIST, MEDIA_DOCKER_MANIFEST];
/// Tags that are asked for at a time.
const PAGE: usize = 500;
/// Most tags of a repository that are listed.
const MAX_TAGS: usize = 100_000;

/// A blob that is being fetched.
struct Partial<'a> {
    writer: BlobWriter,
    have: u64,
    blobs: &'a BlobDir,
}

impl Registry {
    /// The manifest or index under a tag or digest, byte for byte, with its descriptor.
    pub(crate) async fn manifest(&self, key: &str) -> Result<(Descriptor, Vec<u8>), RegistryError> {
        let (at, what) = (self.at(key), format!("/manifests/{key}"));
        let ask = || self.client.pull_manifest_raw(&at, &self.auth, &ACCEPTED);
        let (bytes, _) = self.persistently(&what, ask).await?;
        let found = Descriptor::of(media_type(&bytes), &bytes);
        if key.parse::<Digest>().is_ok_and(|expected| expected != found.digest) {
            return Err(self.corrupt(&what, found.digest));
        }
        Ok((found, bytes.to_vec()))
    }

    /// A blob that is small enough to be held, such as a config.
    pub(crate) async fn document(&self, blob: &Descriptor) -> Result<Vec<u8>, RegistryError> {
        let what = format!("/blobs/{}", blob.digest);
        if blob.size > MAX_MANIFEST_BYTES as u64 {
            let cause = format!("{} bytes, more than a document has", blob.size);
            return Err(RegistryError::Failed { url: self.api(&what), cause });
        }
        self.log_in_to_read().await;
        let (at, wanted) = (self.at(&blob.digest.to_string()), wanted(blob));
        let ask = || async {
            let mut content = self.client.pull_blob_stream(&at, &wanted).await?.stream;
            let mut bytes = Vec::new();
            while let Some(more) = content.try_next().await? {
                bytes.extend_from_slice(&more);
                if bytes.len() as u64 > blob.size {
                    break;
                }
            }
            Ok(bytes)
        };
        let bytes = self.persistently(&what, ask).await?;
        match Digest::of(&bytes) {
            found if found == blob.digest => Ok(bytes),
            found => Err(self.corrupt(&what, found)),
        }
    }

    /// Fetches a blob into a directory of blobs, and goes on where it broke off.
    pub(crate) async fn fetch_blob(
        &self,
        blob: &Descriptor,
        blobs: &BlobDir,
        meter: &Meter,
    ) -> Result<(), RegistryError> {
        let file_error = |source| RegistryError::File { path: blobs.path(&blob.digest), source };
        self.log_in_to_read().await;
        let what = format!("/blobs/{}", blob.digest);
        let mut partial = Partial { writer: blobs.writer().map_err(file_error)?, have: 0, blobs };
        let (mut pause, mut attempt) = (FIRST_PAUSE, 1);
        loop {
            let before = partial.have;
            match self.fetch_more(&mut partial, blob, meter).await {
                Ok(()) => break,
                Err(OciDistributionError::IoError(source)) => return Err(file_error(source)),
                Err(error) if attempt < self.attempts && is_passing(&error) => {
                    if partial.have > before {
                        (pause, attempt) = (FIRST_PAUSE, 1);
                    }
                    tokio::time::sleep(jitter(pause)).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    attempt += 1;
                }
                Err(error) => return Err(self.explain(&what, &error)),
            }
        }
        let (found, _) = partial.writer.finish().map_err(file_error)?;
        if found == blob.digest {
            return Ok(());
        }
        // What nobody asked for does not stay.
        std::fs::remove_file(blobs.path(&found)).map_err(file_error)?;
        Err(self.corrupt(&what, found))
    }

    async fn fetch_more(
        &self,
        partial: &mut Partial<'_>,
        blob: &Descriptor,
        meter: &Meter,
    ) -> Result<(), OciDistributionError> {
        let (at, wanted) = (self.at(&blob.digest.to_string()), wanted(blob));
        if partial.have == blob.size {
            return Ok(());
        }
        let SizedStream { mut stream, .. } = if partial.have == 0 {
            self.client.pull_blob_stream(&at, &wanted).await?
        } else {
            match self.client.pull_blob_stream_partial(&at, &wanted, partial.have, None).await? {
                BlobResponse::Partial(rest) => rest,
                BlobResponse::Full(whole) => {
                    partial.writer = partial.blobs.writer()?;
                    partial.have = 0;
                    whole
                }
            }
        };
        meter.set(partial.have);
        while let Some(bytes) = stream.try_next().await.map_err(cut)? {
            partial.have += bytes.len() as u64;
            if partial.have > blob.size {
                let reason = format!("more than the {} bytes of {}", blob.size, blob.digest);
                return Err(OciDistributionError::SpecViolationError(reason));
            }
            partial.writer.write_all(&bytes)?;
            meter.add(bytes.len() as u64);
        }
        match partial.have == blob.size {
            true => Ok(()),
            false => Err(cut(std::io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// All tags of the repository, in the registry's order.
    pub(crate) async fn tags(&self) -> Result<Vec<String>, RegistryError> {
        let at = self.at("latest");
        let mut tags: Vec<String> = Vec::new();
        loop {
            let last = tags.last().cloned();
            let ask = || self.client.list_tags(&at, &self.auth, Some(PAGE), last.as_deref());
            let page = self.persistently("/tags/list", ask).await?.tags;
            // A registry that knows no pages sends everything again.
            let is_last = page.len() < PAGE || page.last() == last.as_ref();
            tags.extend(page.into_iter().filter(|tag| Some(tag) != last.as_ref()));
            if is_last || tags.len() > MAX_TAGS {
                return Ok(tags);
            }
        }
    }

    /// All repositories of the registry, in its order: `/v2/_catalog`, which not every registry has.
    pub(crate) async fn repositories(&self) -> Result<Vec<String>, RegistryError> {
        let mut names: Vec<String> = Vec::new();
        loop {
            let last = names.last().cloned();
            let ask = || async {
                let mut url = self.catalog_url()?;
                url.query_pairs_mut().append_pair("n", &PAGE.to_string());
                if let Some(last) = &last {
                    url.query_pairs_mut().append_pair("last", last);
                }
                let answer = self.send(|| Ok(self.http.get(url.clone()))).await?;
                let answer = checked(answer, reqwest::StatusCode::is_success).await?;
                let malformed = |error: serde_json::Error| {
                    OciDistributionError::SpecViolationError(error.to_string())
                };
                serde_json::from_slice::<Catalog>(&answer.bytes().await?).map_err(malformed)
            };
            let page = self.persistently("/_catalog", ask).await?.repositories.unwrap_or_default();
            let is_last = page.len() < PAGE || page.last() == last.as_ref();
            names.extend(page.into_iter().filter(|name| Some(name) != last.as_ref()));
            if is_last || names.len() > MAX_TAGS {
                return Ok(names);
            }
        }
    }

    fn catalog_url(&self) -> Result<reqwest::Url, OciDistributionError> {
        let url = self.api("");
        let own = url.strip_suffix(&self.reference.repository).unwrap_or(&url);
        let wrong = |_| OciDistributionError::SpecViolationError(format!("{url} is no URL"));
        format!("{own}_catalog").parse().map_err(wrong)
    }

    /// Blobs are read with the credentials that the client knows; only manifests bring theirs along.
    pub(crate) async fn log_in_to_read(&self) {
        self.client.store_auth_if_needed(self.at("latest").resolve_registry(), &self.auth).await;
    }

    fn corrupt(&self, what: &str, found: Digest) -> RegistryError {
        RegistryError::Corrupt { url: self.api(what), found }
    }
}

/// A body that ended early. The client calls that an I/O error, which here is one of files.
fn cut(error: std::io::Error) -> OciDistributionError {
    OciDistributionError::ServerError {
        code: 503,
        url: String::new(),
        message: format!("the connection broke: {error}"),
    }
}

fn wanted(blob: &Descriptor) -> OciDescriptor {
    OciDescriptor {
        digest: blob.digest.to_string(),
        media_type: blob.media_type.clone(),
        size: i64::try_from(blob.size).unwrap_or(i64::MAX),
        ..OciDescriptor::default()
    }
}

#[derive(Deserialize)]
struct Catalog {
    repositories: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Typed {
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

/// What kind of manifest this is: what it says itself, else by what it has.
fn media_type(bytes: &[u8]) -> &'static str {
    let Ok(typed) = serde_json::from_slice::<Typed>(bytes) else { return MEDIA_MANIFEST };
    let said = ACCEPTED.iter().find(|known| Some(**known) == typed.media_type.as_deref());
    let seen = if typed.manifests.is_some() { &MEDIA_INDEX } else { &MEDIA_MANIFEST };
    said.unwrap_or(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_tells_what_it_is() {
        for (text, expected) in [
            (format!(r#"{{"mediaType":"{MEDIA_DOCKER_LIST}"}}"#), MEDIA_DOCKER_LIST),
            (r#"{"schemaVersion":2,"manifests":[]}"#.to_owned(), MEDIA_INDEX),
            (r#"{"schemaVersion":2,"layers":[]}"#.to_owned(), MEDIA_MANIFEST),
            ("no json".to_owned(), MEDIA_MANIFEST),
        ] {
            assert_eq!(media_type(text.as_bytes()), expected, "{text}");
        }
    }
}
