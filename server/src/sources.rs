//! From what an operator writes to what a node is told: `NAME:VERSION`, or a full reference, to a pinned reference.
//!
//! The embedded registry is read in its store; any other one is asked over the network.

use std::fmt;
use std::str::FromStr;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use imagebuilder::client::RegistryError;
use imagebuilder::resolve;
use protocol::api::ImageSetRecord;
use protocol::ids::{Digest, InvalidId, Name, Version};
use protocol::node::DesiredSet;
use protocol::oci::{self, OciError};
use protocol::reference::{InvalidReference, Reference};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::config::values::BaseUrl;
use crate::registries::Known;
use crate::registry::RegistryStore;

/// Most versions of an external registry that are looked at for a list.
const MAX_LISTED: usize = 2_000;
/// Manifests that are asked for at the same time.
const LOOKED_UP_AT_ONCE: usize = 8;
/// Annotation of an index: the ImageSet's name (OCI image spec, annotations.md).
const ANNOTATION_TITLE: &str = "org.opencontainers.image.title";
/// Annotation of an index: the ImageSet's version.
const ANNOTATION_VERSION: &str = "org.opencontainers.image.version";

/// `NAME:VERSION`, an ImageSet in the server's registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetName {
    /// The name, which is also the repository.
    pub name: Name,
    /// The version, which is also the tag.
    pub version: Version,
}

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// An ImageSet in the server's registry.
    Named(SetName),
    /// An ImageSet anywhere.
    At(Reference),
}

/// Why a text names no ImageSet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWanted {
    /// It has no version.
    #[error("`{0}` is not an ImageSet: expected NAME:VERSION")]
    Shape(String),
    /// Name or version is malformed.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// The reference is malformed.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
}

impl FromStr for SetName {
    type Err = InvalidWanted;

    fn from_str(text: &str) -> Result<Self, InvalidWanted> {
        let shape = || InvalidWanted::Shape(text.chars().take(120).collect());
        let (name, version) = text.split_once(':').ok_or_else(shape)?;
        Ok(Self { name: name.parse()?, version: version.parse()? })
    }
}

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.version)
    }
}

impl<'de> Deserialize<'de> for SetName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl FromStr for Wanted {
    type Err = InvalidWanted;

    /// A slash makes it a reference.
    fn from_str(text: &str) -> Result<Self, InvalidWanted> {
        if text.contains('/') {
            Ok(Self::At(text.parse()?))
        } else {
            Ok(Self::Named(text.parse()?))
        }
    }
}

/// Why an ImageSet could not be found.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The registry does not have it.
    #[error(
        "there is no ImageSet {0} in the registry; `layercake imageset list` shows what there is"
    )]
    NotFound(String),
    /// What is there is no ImageSet.
    #[error("{reference} is not an ImageSet")]
    NotAnImageSet {
        /// What was asked for.
        reference: String,
        /// What is wrong with it.
        #[source]
        source: Box<OciError>,
    },
    /// Its index says neither name nor version, and the reference does not either.
    #[error("{0} has no name and version of an ImageSet in its annotations")]
    Nameless(String),
    /// The server's URL and the ImageSet's name give no reference.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// Another registry failed.
    #[error(transparent)]
    Remote(#[from] RegistryError),
    /// The embedded registry failed.
    #[error("the embedded registry could not be read")]
    Embedded(#[source] crate::registry::RegistryError),
    /// An external registry is collected by itself.
    #[error("the ImageSets are in the registry {0}, which collects its garbage itself")]
    External(String),
    /// An external registry does not list its repositories.
    #[error(
        "the registry {registry} does not list its repositories; name one: `layercake imageset list HOST/REPOSITORY`"
    )]
    NoCatalog {
        /// Its base.
        registry: String,
        /// What it says.
        #[source]
        source: RegistryError,
    },
    /// An external registry has more than is listed.
    #[error(
        "the registry {0} has more than {MAX_LISTED} versions; name a repository: `layercake imageset list HOST/REPOSITORY`"
    )]
    TooMany(String),
    /// A task died.
    #[error("the registry's store gave no answer")]
    Task(#[from] tokio::task::JoinError),
}

/// Where `NAME:VERSION` is looked up.
#[derive(Debug, Clone)]
pub enum Sources {
    /// In the embedded registry; nodes fetch from this server.
    Embedded {
        /// Its store.
        store: RegistryStore,
        /// Base URL of this server, as nodes reach it.
        url: BaseUrl,
        /// What is known of other registries.
        known: Known,
    },
    /// In a registry of the site's own.
    External {
        /// Its base; a path is a prefix of the repositories.
        url: BaseUrl,
        /// What is known of it, and of others.
        known: Known,
    },
}

impl Sources {
    /// Finds an ImageSet and pins it.
    ///
    /// # Errors
    /// If it is not there, is no ImageSet, or the registry cannot be asked.
    pub async fn resolve(&self, wanted: &Wanted) -> Result<DesiredSet, SourceError> {
        match (self, wanted) {
            (Self::Embedded { store, url, .. }, Wanted::Named(set)) => {
                let reference = named(url, set)?;
                let (store, set) = (store.clone(), set.clone());
                let work = move || lookup(&store, set.name.as_str(), set.version.as_str());
                let found = tokio::task::spawn_blocking(work).await?;
                let (digest, bytes) =
                    found?.ok_or_else(|| SourceError::NotFound(reference_name(&reference)))?;
                describe(reference, digest, &bytes)
            }
            (Self::External { url, known }, Wanted::Named(set)) => {
                remote(named(url, set)?, known).await
            }
            (
                Self::Embedded { known, .. } | Self::External { known, .. },
                Wanted::At(reference),
            ) => remote(reference.clone(), known).await,
        }
    }

    /// Every ImageSet of the registry, by name and version.
    ///
    /// # Errors
    /// If the registry is external and cannot be asked, or does not list its repositories; or the embedded one's store cannot
    /// be read.
    pub async fn list(&self) -> Result<Vec<ImageSetRecord>, SourceError> {
        match self {
            Self::External { url, known } => list_remote(url, known).await,
            Self::Embedded { store, url, .. } => {
                let (store, url) = (store.clone(), url.clone());
                tokio::task::spawn_blocking(move || list(&store, &url)).await?
            }
        }
    }
}

fn list(store: &RegistryStore, url: &BaseUrl) -> Result<Vec<ImageSetRecord>, SourceError> {
    let mut records = Vec::new();
    for repository in store.repositories().map_err(SourceError::Embedded)? {
        let Ok(name) = repository.parse::<Name>() else { continue };
        for tag in store.tags(&repository).map_err(SourceError::Embedded)? {
            let Ok(version) = tag.parse::<Version>() else { continue };
            let Some((digest, bytes)) = lookup(store, &repository, &tag)? else { continue };
            let set = SetName { name: name.clone(), version };
            records.extend(record(url, &set, digest, &bytes)?);
        }
    }
    Ok(records)
}

fn lookup(
    store: &RegistryStore,
    repository: &str,
    tag: &str,
) -> Result<Option<(Digest, Vec<u8>)>, SourceError> {
    let digest = store.resolve_tag(repository, tag).map_err(SourceError::Embedded)?;
    let Some(digest) = digest else { return Ok(None) };
    let bytes = store.manifest(repository, &digest).map_err(SourceError::Embedded)?;
    Ok(bytes.map(|bytes| (digest, bytes)))
}

async fn remote(reference: Reference, known: &Known) -> Result<DesiredSet, SourceError> {
    let (at, options) = known.client(&reference);
    match resolve::manifest(&at, &options).await {
        Ok((digest, bytes)) => describe(reference, digest, &bytes),
        Err(RegistryError::NotFound { .. }) => Err(SourceError::NotFound(reference.to_string())),
        Err(error) => Err(error.into()),
    }
}

/// Every ImageSet below a base in an external registry. What vanishes meanwhile is left out.
async fn list_remote(url: &BaseUrl, known: &Known) -> Result<Vec<ImageSetRecord>, SourceError> {
    let base = format!("{url}/probe").parse::<Reference>()?;
    let prefix = base.repository.strip_suffix("probe").unwrap_or_default();
    let (at, options) = known.client(&base);
    let repositories = match resolve::repositories(&at, &options).await {
        Ok(repositories) => repositories,
        Err(error @ (RegistryError::Unreachable { .. } | RegistryError::Client { .. })) => {
            return Err(error.into());
        }
        Err(source) => return Err(SourceError::NoCatalog { registry: url.to_string(), source }),
    };
    let mut wanted = Vec::new();
    for repository in &repositories {
        let Some(Ok(name)) = repository.strip_prefix(prefix).map(str::parse::<Name>) else {
            continue;
        };
        let there = Reference { repository: repository.clone(), ..at.clone() };
        let tags = match resolve::tags(&there, &options).await {
            Err(RegistryError::NotFound { .. }) => continue,
            tags => tags?,
        };
        let versions = tags.iter().filter_map(|tag| tag.parse::<Version>().ok());
        wanted.extend(
            versions.map(|version| (SetName { name: name.clone(), version }, there.clone())),
        );
        if wanted.len() > MAX_LISTED {
            return Err(SourceError::TooMany(url.to_string()));
        }
    }
    let looked_up = wanted.into_iter().map(|(set, there)| {
        let options = &options;
        async move {
            let tag = set.version.to_string();
            match resolve::manifest(&there.with_tag(&tag), options).await {
                Err(RegistryError::NotFound { .. }) => Ok(None),
                Err(error) => Err(SourceError::from(error)),
                Ok((digest, bytes)) => record(url, &set, digest, &bytes),
            }
        }
    });
    let found = stream::iter(looked_up).buffered(LOOKED_UP_AT_ONCE);
    let found = found.try_filter_map(|found| async { Ok(found) });
    let mut records: Vec<ImageSetRecord> = found.try_collect().await?;
    // Not every registry has an order of its tags.
    records.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    Ok(records)
}

/// What is listed, if it is an ImageSet: tags of single images (VERSION-IMAGENAME) and foreign images are there too.
fn record(
    url: &BaseUrl,
    set: &SetName,
    digest: Digest,
    bytes: &[u8],
) -> Result<Option<ImageSetRecord>, SourceError> {
    let reference = named(url, set)?;
    let (name, version) = (set.name.clone(), set.version.clone());
    let is_set = describe(reference.clone(), digest, bytes).is_ok();
    let reference = reference.with_digest(digest);
    Ok(is_set.then_some(ImageSetRecord { name, version, reference, digest }))
}

fn named(url: &BaseUrl, set: &SetName) -> Result<Reference, InvalidReference> {
    format!("{url}/{set}").parse()
}

fn reference_name(reference: &Reference) -> String {
    format!("{}:{}", reference.repository, reference.tag.as_deref().unwrap_or(""))
}

/// Checks that the index is an ImageSet's, and reads its name and version: from its annotations, else from the
/// reference.
fn describe(reference: Reference, digest: Digest, bytes: &[u8]) -> Result<DesiredSet, SourceError> {
    let wrong = |source| SourceError::NotAnImageSet {
        reference: reference.to_string(),
        source: Box::new(source),
    };
    let index = oci::parse_index(bytes).map_err(wrong)?;
    if index.artifact_type.as_deref() != Some(oci::ARTIFACT_IMAGESET) {
        let found = index.artifact_type.as_deref().unwrap_or("none");
        let reason = format!("artifactType is {found}, expected {}", oci::ARTIFACT_IMAGESET);
        return Err(wrong(OciError::Wrong { what: "ImageSet index", reason }));
    }
    let annotation = |key: &str| index.annotations.get(key).map(String::as_str);
    let last = reference.repository.rsplit('/').next();
    let name = annotation(ANNOTATION_TITLE).or(last).and_then(|text| text.parse().ok());
    let tag = reference.tag.as_deref();
    let version = annotation(ANNOTATION_VERSION).or(tag).and_then(|text| text.parse().ok());
    match (name, version) {
        (Some(name), Some(version)) => {
            let reference = reference.with_digest(digest);
            Ok(DesiredSet { name, version, reference, roll: 0, force: false })
        }
        _ => Err(SourceError::Nameless(reference.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &[u8] = include_bytes!("../../protocol/golden/v1/index.json");

    fn reference() -> Reference {
        "http://r:1/lab/hi:9".parse().expect("reference")
    }

    #[test]
    fn what_an_operator_writes_is_a_name_or_a_reference() {
        let named = "hello:1".parse::<Wanted>().expect("named");
        assert!(matches!(named, Wanted::Named(set) if set.to_string() == "hello:1"));
        let full = "http://r:1/a/hello:1".parse::<Wanted>().expect("full");
        assert!(matches!(full, Wanted::At(_)));
        for (text, expected) in [
            ("hello", "`hello` is not an ImageSet: expected NAME:VERSION"),
            ("Hello:1", "`Hello` is not a valid name"),
            ("hello:", "`` is not a valid version"),
            ("ftp://r/a", "the scheme is neither http nor https"),
        ] {
            let error = text.parse::<Wanted>().expect_err(text).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn name_and_version_come_from_the_annotations_of_the_index() {
        let digest = Digest::of(INDEX);
        let set = describe(reference(), digest, INDEX).expect("set");
        assert_eq!((set.name.as_str(), set.version.as_str()), ("hello", "1"));
        assert_eq!(set.reference.to_string(), format!("http://r:1/lab/hi:9@{digest}"));
    }

    #[test]
    fn without_annotations_they_come_from_the_reference() {
        let mut index = oci::parse_index(INDEX).expect("index");
        index.annotations.clear();
        let bytes = serde_json::to_vec(&index).expect("json");
        let set = describe(reference(), Digest::of(&bytes), &bytes).expect("set");
        assert_eq!((set.name.as_str(), set.version.as_str()), ("hi", "9"));
    }

    #[test]
    fn an_image_is_not_an_imageset() {
        let mut index = oci::parse_index(INDEX).expect("index");
        index.artifact_type = None;
        let bytes = serde_json::to_vec(&index).expect("json");
        let error = describe(reference(), Digest::of(&bytes), &bytes).expect_err("no set");
        assert_eq!(error.to_string(), "http://r:1/lab/hi:9 is not an ImageSet");
    }
}
