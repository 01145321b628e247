//! Signs what lies in a registry, and verifies it there: the index of an ImageSet and every manifest in it, in cosign's key
//! layout (see [`protocol::signature`], which holds the formats and all of the verification).
//!
//! A signature is a blob and an entry in a manifest under a tag of its own. Adding one reads that manifest and writes it
//! again with one entry more; registries have no compare-and-swap, so it is read back, and written again where somebody
//! else's write came between. Nothing that was signed is changed.
//!
//! Not here: passphrases on private keys (cosign's own key files have one), certificates, transparency logs.

pub mod key;

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::TryStreamExt;
use oci_distribution::RegistryOperation;
use protocol::ids::Digest;
use protocol::oci::{self, Index, MEDIA_DOCKER_LIST, MEDIA_INDEX, MEDIA_MANIFEST, OciError};
use protocol::reference::Reference;
use protocol::signature::{
    self, MAX_PAYLOAD_BYTES, ManifestError, Policy, PublicKey, SignatureError, Subject,
    add_signature, parse_signatures, signature_tag,
};

use crate::client::{Options, Registry, RegistryError};
use crate::resolve;
use key::SigningKey;

/// How often a signature is written again when another signer's write took it away.
const WRITES: u32 = 4;

/// Why something was not signed or verified.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The registry does not do its part.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// What is to be signed is not an index or a manifest that can be read.
    #[error("{reference}")]
    Document {
        /// What was asked for.
        reference: String,
        /// What is wrong with it.
        #[source]
        source: OciError,
    },
    /// What lies under the signature tag is not what it should be.
    #[error("{place} has what signatures cannot be added to")]
    Place {
        /// The tag.
        place: String,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// Other signers write all the time.
    #[error(
        "{place}: other signers took this signature away {WRITES} times; sign one after the other"
    )]
    Lost {
        /// The tag.
        place: String,
    },
    /// The key cannot sign.
    #[error(transparent)]
    Key(#[from] key::SigningKeyError),
}

/// What was signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// The set's or image's reference with its digest.
    pub reference: Reference,
    /// What has a new signature: the manifests, then the index.
    pub added: Vec<Digest>,
    /// What had a good one by this key before.
    pub kept: Vec<Digest>,
}

/// One verdict.
#[derive(Debug)]
pub struct Checked {
    /// The index or manifest.
    pub digest: Digest,
    /// The key that vouches for it, or why there is none.
    pub verdict: Result<PublicKey, SignatureError>,
}

/// Verdicts about an ImageSet or an image.
#[derive(Debug)]
pub struct Verified {
    /// Its reference with its digest.
    pub reference: Reference,
    /// The index's first, then the manifests' in it.
    pub checked: Vec<Checked>,
}

impl Verified {
    /// Whether all that was looked at is signed.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.checked.iter().all(|checked| checked.verdict.is_ok())
    }
}

/// Signs what the reference stands for now, and when it is an index every manifest in it, those first: once the index is
/// signed, everything is. What this key signed already is left as it is.
///
/// # Errors
/// If the registry cannot be reached or refuses, or other signers keep writing at the same time.
pub async fn sign(
    reference: &Reference,
    key: &SigningKey,
    options: &Options,
) -> Result<Signed, SignError> {
    let (digest, manifests) = parts(reference, options).await?;
    let place = Place::open(reference, options)?;
    let at = place.registry.at(&digest.to_string());
    let allow = || place.registry.client.auth(&at, &place.registry.auth, RegistryOperation::Push);
    place.registry.persistently("", allow).await?;
    let mut signed =
        Signed { reference: reference.with_digest(digest), added: Vec::new(), kept: Vec::new() };
    for digest in manifests.into_iter().chain([digest]) {
        let list =
            if place.sign(&digest, key).await? { &mut signed.added } else { &mut signed.kept };
        list.push(digest);
    }
    Ok(signed)
}

/// Verifies what the reference stands for now by these keys, and when it is an index and `whole` every manifest in it too.
/// A node looks at the index's signature alone.
///
/// # Errors
/// If the registry cannot be asked. What is unsigned or wrongly signed is a verdict, not an error.
pub async fn verify(
    reference: &Reference,
    keys: &[PublicKey],
    whole: bool,
    options: &Options,
) -> Result<Verified, SignError> {
    let (digest, manifests) = parts(reference, options).await?;
    let place = Place::open(reference, options)?;
    let policy = Policy::Signed(keys.to_vec());
    let mut checked = Vec::new();
    for digest in [digest].into_iter().chain(manifests.into_iter().filter(|_| whole)) {
        let (manifest, payloads) = place.signatures(&digest).await?;
        let subject = Subject::of(reference, digest);
        let verdict = match policy.verify(&subject, manifest.as_deref(), &payloads) {
            Ok(Some(key)) => Ok(key.clone()),
            // A policy of keys that takes something without a key does not exist.
            Ok(None) => Err(SignatureError::Unusable { reason: "no key was asked".to_owned() }),
            Err(error) => Err(error),
        };
        checked.push(Checked { digest, verdict });
    }
    Ok(Verified { reference: reference.with_digest(digest), checked })
}

/// The digest of what a reference stands for, and of every manifest in it when it is an index; each once.
async fn parts(
    reference: &Reference,
    options: &Options,
) -> Result<(Digest, Vec<Digest>), SignError> {
    let (digest, bytes) = resolve::manifest(reference, options).await?;
    let document = |source| SignError::Document { reference: reference.to_string(), source };
    let kind: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|source| document(OciError::Malformed { what: "manifest", source }))?;
    let is_index = match kind.get("mediaType").and_then(serde_json::Value::as_str) {
        Some(kind) => kind == MEDIA_INDEX || kind == MEDIA_DOCKER_LIST,
        None => kind.get("manifests").is_some(),
    };
    if !is_index {
        oci::parse_manifest(&bytes).map_err(document)?;
        return Ok((digest, Vec::new()));
    }
    let Index { manifests, .. } = oci::parse_index(&bytes).map_err(document)?;
    let mut digests: Vec<Digest> = Vec::new();
    for manifest in manifests {
        if !digests.contains(&manifest.digest) {
            digests.push(manifest.digest);
        }
    }
    Ok((digest, digests))
}

/// Where signatures lie: the repository.
struct Place<'a> {
    registry: Registry,
    reference: &'a Reference,
}

impl<'a> Place<'a> {
    fn open(reference: &'a Reference, options: &Options) -> Result<Self, RegistryError> {
        Ok(Self { registry: Registry::new(reference, options)?, reference })
    }

    /// Adds a signature, unless this key's is there. Tells whether it did.
    async fn sign(&self, digest: &Digest, key: &SigningKey) -> Result<bool, SignError> {
        let payload = signature::payload(self.reference, digest);
        let (subject, ours) = (Subject::of(self.reference, *digest), [key.public().clone()]);
        let policy = Policy::Signed(ours.to_vec());
        let place = self.reference.with_tag(&signature_tag(digest)).to_string();
        let wrong = |source| SignError::Place { place: place.clone(), source };
        let mut der = None;
        for writes in 0..=WRITES {
            let (existing, payloads) = self.signatures(digest).await?;
            if policy.verify(&subject, existing.as_deref(), &payloads).is_ok() {
                return Ok(der.is_some());
            }
            if writes == WRITES {
                break;
            }
            let signature = match &der {
                Some(signature) => signature,
                None => der.insert(key.sign(&payload)?),
            };
            let built = add_signature(existing.as_deref(), &payload, signature).map_err(wrong)?;
            self.push_blob(&payload).await?;
            self.push_blob(&built.config).await?;
            self.push_manifest(&signature_tag(digest), built.manifest).await?;
        }
        Err(SignError::Lost { place })
    }

    /// The signature manifest of a digest, if there is one, and the payloads it names. A payload that the registry lacks is
    /// left out.
    async fn signatures(
        &self,
        digest: &Digest,
    ) -> Result<(Option<Vec<u8>>, BTreeMap<Digest, Vec<u8>>), RegistryError> {
        let Registry { client, auth, .. } = &self.registry;
        let tag = signature_tag(digest);
        let (at, what) = (self.registry.at(&tag), format!("/manifests/{tag}"));
        let pull = || client.pull_manifest_raw(&at, auth, &[MEDIA_MANIFEST]);
        let manifest = match self.registry.persistently(&what, pull).await {
            Ok((bytes, _)) => bytes.to_vec(),
            Err(RegistryError::NotFound { .. }) => return Ok((None, BTreeMap::new())),
            Err(error) => return Err(error),
        };
        let mut payloads = BTreeMap::new();
        // What cannot be read is told by who verifies it.
        for signature in parse_signatures(&manifest).unwrap_or_default() {
            let digest = signature.payload;
            if payloads.contains_key(&digest) {
                continue;
            }
            match self.blob(&digest).await {
                Ok(bytes) => drop(payloads.insert(digest, bytes)),
                Err(RegistryError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok((Some(manifest), payloads))
    }

    /// A small blob; one byte more than a payload may have at most.
    async fn blob(&self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        let digest = digest.to_string();
        let (at, what) = (self.registry.at(&digest), format!("/blobs/{digest}"));
        let (at, digest) = (&at, digest.as_str());
        let pull = || async move {
            let mut stream = self.registry.client.pull_blob_stream(at, digest).await?;
            let mut bytes = Vec::new();
            while let Some(chunk) = stream.try_next().await? {
                bytes.extend_from_slice(&chunk);
                if bytes.len() > MAX_PAYLOAD_BYTES {
                    bytes.truncate(MAX_PAYLOAD_BYTES + 1);
                    break;
                }
            }
            Ok(bytes)
        };
        self.registry.persistently(&what, pull).await
    }

    async fn push_blob(&self, bytes: &[u8]) -> Result<(), RegistryError> {
        let digest = Digest::of(bytes).to_string();
        let (at, what) = (self.registry.at(&digest), format!("/blobs/{digest}"));
        let (client, digest) = (&self.registry.client, digest.as_str());
        if self.registry.persistently(&what, || client.blob_exists(&at, digest)).await? {
            return Ok(());
        }
        let bytes = Bytes::copy_from_slice(bytes);
        let push = || client.push_blob(&at, bytes.clone(), digest);
        self.registry.persistently(&what, push).await.map(drop)
    }

    async fn push_manifest(&self, tag: &str, bytes: Vec<u8>) -> Result<(), RegistryError> {
        let (at, what, bytes) =
            (self.registry.at(tag), format!("/manifests/{tag}"), Bytes::from(bytes));
        let kind = MEDIA_MANIFEST.parse().map_err(|_| RegistryError::Client {
            cause: format!("`{MEDIA_MANIFEST}` is not a media type"),
        });
        let kind = kind?;
        let push =
            || self.registry.client.push_manifest_raw(&at, bytes.clone(), Clone::clone(&kind));
        self.registry.persistently(&what, push).await.map(drop)
    }
}
