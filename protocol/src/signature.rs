//! Signatures of ImageSets and images in cosign's key layout: ECDSA P-256 over a small JSON payload, kept as a layer of a
//! manifest under the tag `sha256-HEX.sig` beside what is signed.
//!
//! ```text
//! REPOSITORY:sha256-HEX.sig   manifest; each layer is one signature
//!   layers[n]                 simplesigning payload blob: names the digest HEX and the repository
//!     annotation              dev.cosignproject.cosign/signature = base64(DER(ECDSA-P256-SHA256(payload bytes)))
//! ```
//! Pure: who calls brings the bytes. A payload is verified as the bytes that came and never written anew; what it says is
//! looked at only after a signature over it was good. The manifest itself is not signed and is believed nothing but where
//! the payloads are. Certificates, transparency logs and sigstore bundles are neither read nor written.
//!
//! Two checks are stricter than cosign's own: the payload's type, and the repository in `docker-reference`, so that what was
//! signed as `staging/app` is not taken as `prod/app`. The registry's host in it is not compared: a set that is copied to
//! a mirror keeps its signatures.

mod key;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::ids::Digest;
use crate::oci::{Descriptor, MEDIA_CONFIG, MEDIA_MANIFEST, Manifest};
use crate::reference::Reference;

pub use key::{KeyError, MAX_KEY_BYTES, PublicKey};

/// Media type of a payload (cosign, `SIGNATURE_SPEC.md`).
pub const MEDIA_PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// Annotation of a layer: the signature over its payload, in base64.
pub const ANNOTATION_SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// `critical.type` of every payload.
pub const PAYLOAD_TYPE: &str = "cosign container image signature";
/// Most signatures of one thing.
pub const MAX_SIGNATURES: usize = 8;
/// Largest payload that is read, in bytes; ours have about 250.
pub const MAX_PAYLOAD_BYTES: usize = 64 << 10;
/// Largest signature manifest that is read, in bytes: eight signatures with certificate and log entry of cosign's.
pub const MAX_SIGNATURE_MANIFEST_BYTES: usize = 512 << 10;
/// Longest signature in base64: 72 bytes of DER are 96 characters.
const MAX_SIGNATURE_CHARS: usize = 128;

/// The tag that signatures of this digest lie under, in the same repository.
#[must_use]
pub fn signature_tag(digest: &Digest) -> String {
    format!("sha256-{}.sig", digest.hex())
}

/// What is signed: a manifest or index, and the repository that it is meant for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Digest of the manifest or index.
    pub digest: Digest,
    /// Path of the repository, without the registry's host.
    pub repository: String,
}

/// A signature as its manifest has it: not verified yet, and its payload not read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// Digest of the payload.
    pub payload: Digest,
    /// Size of the payload in bytes, at most [`MAX_PAYLOAD_BYTES`].
    pub size: u64,
    /// The ECDSA signature, in DER.
    der: Vec<u8>,
}

/// Which keys may vouch for what is run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Policy {
    /// No key is installed: everything is taken, signed or not.
    #[default]
    Unsigned,
    /// One good signature by any of these keys is needed.
    Signed(Vec<PublicKey>),
    /// Keys were meant to be installed but cannot be read: nothing is taken. The text says why.
    Unusable(String),
}

/// Why a signature manifest cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is larger than what is read.
    #[error("{0} bytes, at most {MAX_SIGNATURE_MANIFEST_BYTES}")]
    TooLarge(usize),
    /// It is not the JSON it should be.
    #[error("malformed")]
    Malformed(#[source] serde_json::Error),
    /// It has more signatures than are read.
    #[error("{0} layers, at most {MAX_SIGNATURES}")]
    TooMany(usize),
    /// It is another document.
    #[error("{0}")]
    Wrong(String),
}

/// Why something is not taken as signed.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// There are no signatures.
    #[error("{} is not signed; a signature by {asked} is asked for", subject.digest)]
    Unsigned {
        /// What should be signed.
        subject: Subject,
        /// The keys that were asked.
        asked: String,
    },
    /// The signature manifest cannot be read.
    #[error("the signatures of {} cannot be read; a signature by {asked} is asked for", subject.digest)]
    Manifest {
        /// What should be signed.
        subject: Subject,
        /// The keys that were asked.
        asked: String,
        /// What is wrong.
        #[source]
        source: ManifestError,
    },
    /// None of the signatures is good.
    #[error("{} has no good signature: {reasons}; a signature by {asked} is asked for", subject.digest)]
    Refused {
        /// What should be signed.
        subject: Subject,
        /// The keys that were asked.
        asked: String,
        /// What is wrong with each signature.
        reasons: String,
    },
    /// The installed keys cannot be used, so nothing can be verified.
    #[error("signatures cannot be verified: {reason}")]
    Unusable {
        /// What is wrong with the keys.
        reason: String,
    },
}

/// What a payload says (containers/image, `containers-signature.5`, with cosign's type).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Payload {
    critical: Critical,
    /// Claims of the signer's own; not looked at.
    #[serde(default)]
    optional: Value,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Critical {
    identity: Identity,
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Identity {
    docker_reference: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    docker_manifest_digest: Digest,
}

impl Subject {
    /// What a reference with this digest points to.
    #[must_use]
    pub fn of(reference: &Reference, digest: Digest) -> Self {
        Self { digest, repository: reference.repository.clone() }
    }
}

/// The bytes that are signed for a manifest or index of this digest in the reference's repository. The same arguments give
/// the same bytes.
#[must_use]
pub fn payload(reference: &Reference, digest: &Digest) -> Vec<u8> {
    let place = format!("{}/{}", reference.registry, reference.repository);
    // cosign's order of keys, which is alphabetical.
    let payload = json!({
        "critical": {
            "identity": { "docker-reference": place },
            "image": { "docker-manifest-digest": digest },
            "type": PAYLOAD_TYPE,
        },
        "optional": null,
    });
    payload.to_string().into_bytes()
}

/// A signature manifest and the blobs that must be in the registry before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltManifest {
    /// The manifest, to be tagged [`signature_tag`].
    pub manifest: Vec<u8>,
    /// Its config blob.
    pub config: Vec<u8>,
}

/// Adds a signature to a signature manifest, or begins one. The signatures of others stay as they are, every annotation
/// of theirs included.
///
/// # Errors
/// If the manifest that is there is not a signature manifest, or is full.
pub fn add_signature(
    existing: Option<&[u8]>,
    payload: &[u8],
    der: &[u8],
) -> Result<BuiltManifest, ManifestError> {
    let mut layers = match existing {
        None => Vec::new(),
        Some(bytes) => {
            let count = parse_layers(bytes)?.len();
            if count >= MAX_SIGNATURES {
                return Err(ManifestError::TooMany(count + 1));
            }
            let whole: Value = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
            whole.get("layers").and_then(Value::as_array).cloned().unwrap_or_default()
        }
    };
    layers.push(json!({
        "annotations": { ANNOTATION_SIGNATURE: STANDARD.encode(der) },
        "digest": Digest::of(payload),
        "mediaType": MEDIA_PAYLOAD,
        "size": payload.len(),
    }));
    let diff_ids: Vec<&Value> = layers.iter().filter_map(|layer| layer.get("digest")).collect();
    // What cosign writes: an image config of no platform whose layers are the payloads.
    let config = json!({
        "architecture": "", "config": {}, "os": "",
        "rootfs": { "diff_ids": diff_ids, "type": "layers" },
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "config": Descriptor::of(MEDIA_CONFIG, &config),
        "layers": layers,
        "mediaType": MEDIA_MANIFEST,
        "schemaVersion": 2,
    });
    Ok(BuiltManifest { manifest: manifest.to_string().into_bytes(), config })
}

fn parse_layers(bytes: &[u8]) -> Result<Vec<Descriptor>, ManifestError> {
    if bytes.len() > MAX_SIGNATURE_MANIFEST_BYTES {
        return Err(ManifestError::TooLarge(bytes.len()));
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
    let wrong = |what: String| Err(ManifestError::Wrong(what));
    if manifest.schema_version != 2 {
        return wrong(format!("schemaVersion is {}, expected 2", manifest.schema_version));
    }
    if manifest.media_type.as_deref() != Some(MEDIA_MANIFEST) {
        let found = manifest.media_type.as_deref().unwrap_or("none");
        return wrong(format!("mediaType is {found}, expected {MEDIA_MANIFEST}"));
    }
    if manifest.config.media_type != MEDIA_CONFIG {
        let found = manifest.config.media_type;
        return wrong(format!("the config is {found}, expected {MEDIA_CONFIG}"));
    }
    if manifest.layers.len() > MAX_SIGNATURES {
        return Err(ManifestError::TooMany(manifest.layers.len()));
    }
    if let Some(layer) = manifest.layers.iter().find(|layer| layer.media_type != MEDIA_PAYLOAD) {
        return wrong(format!("a layer is {}, expected {MEDIA_PAYLOAD}", layer.media_type));
    }
    Ok(manifest.layers)
}

/// Reads a signature manifest. Layers whose signature has not the form of one are left out, for another signer's mistake
/// does not spoil a good one.
///
/// # Errors
/// If the bytes are too large, malformed or another document, or there are more than [`MAX_SIGNATURES`].
pub fn parse_signatures(bytes: &[u8]) -> Result<Vec<Signature>, ManifestError> {
    let read = |layer: Descriptor| {
        let text = layer.annotations.get(ANNOTATION_SIGNATURE)?;
        if text.len() > MAX_SIGNATURE_CHARS || layer.size > MAX_PAYLOAD_BYTES as u64 {
            return None;
        }
        let der = STANDARD.decode(text).ok()?;
        Some(Signature { payload: layer.digest, size: layer.size, der })
    };
    Ok(parse_layers(bytes)?.into_iter().filter_map(read).collect())
}

impl Signature {
    /// Verifies this signature over a payload, and what the payload says, and returns the key that made it.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn verify<'k>(
        &self,
        payload: &[u8],
        subject: &Subject,
        keys: &'k [PublicKey],
    ) -> Result<&'k PublicKey, String> {
        if payload.len() > MAX_PAYLOAD_BYTES || payload.len() as u64 != self.size {
            return Err(format!("its payload has {} bytes, not {}", payload.len(), self.size));
        }
        let found = Digest::of(payload);
        if found != self.payload {
            return Err(format!("its payload's digest is {found}, not {}", self.payload));
        }
        let key = keys.iter().find(|key| key.verifies(payload, &self.der));
        let key = key.ok_or_else(|| "it was made by none of the keys".to_owned())?;
        let wrong = |what: String| Err(format!("it was made by {key}, but {what}"));
        let said: Payload = match serde_json::from_slice(payload) {
            Ok(said) => said,
            Err(error) => return wrong(format!("its payload is malformed: {error}")),
        };
        let Critical { identity, image, kind } = said.critical;
        if kind != PAYLOAD_TYPE {
            return wrong(format!("its type is `{}`", shown(&kind)));
        }
        if image.docker_manifest_digest != subject.digest {
            return wrong(format!("for {}", image.docker_manifest_digest));
        }
        match repository_of(&identity.docker_reference) {
            Some(repository) if repository == subject.repository => Ok(key),
            _ => {
                let found = shown(&identity.docker_reference);
                wrong(format!("for `{found}`, not for the repository `{}`", subject.repository))
            }
        }
    }
}

/// The repository in `HOST/REPOSITORY[:TAG][@DIGEST]`.
fn repository_of(reference: &str) -> Option<&str> {
    let (_host, path) = reference.split_once('/')?;
    let path = path.split_once('@').map_or(path, |(path, _)| path);
    let path = path.split_once(':').map_or(path, |(path, _)| path);
    (!path.is_empty()).then_some(path)
}

/// A text of somebody else's, short enough for a message.
fn shown(text: &str) -> String {
    text.chars().take(200).flat_map(char::escape_debug).collect()
}

impl Policy {
    /// Whether signatures are looked at at all.
    #[must_use]
    pub fn asks_for_signatures(&self) -> bool {
        *self != Self::Unsigned
    }

    /// Verifies something by its signature manifest and the payloads that could be had, by digest. Returns the key that
    /// vouches for it; none where none is asked for.
    ///
    /// # Errors
    /// Why it must not be used; the message names the keys that were asked.
    pub fn verify(
        &self,
        subject: &Subject,
        manifest: Option<&[u8]>,
        payloads: &BTreeMap<Digest, Vec<u8>>,
    ) -> Result<Option<&PublicKey>, SignatureError> {
        let keys = match self {
            Self::Unsigned => return Ok(None),
            Self::Unusable(reason) => {
                return Err(SignatureError::Unusable { reason: reason.clone() });
            }
            Self::Signed(keys) => keys,
        };
        let (asked, subject) = (asked(keys), subject.clone());
        let Some(manifest) = manifest else {
            return Err(SignatureError::Unsigned { subject, asked });
        };
        let signatures = match parse_signatures(manifest) {
            Ok(signatures) if signatures.is_empty() => {
                return Err(SignatureError::Unsigned { subject, asked });
            }
            Ok(signatures) => signatures,
            Err(source) => return Err(SignatureError::Manifest { subject, asked, source }),
        };
        let mut reasons = Vec::new();
        for (signature, number) in signatures.iter().zip(1_u32..) {
            let verified = match payloads.get(&signature.payload) {
                Some(payload) => signature.verify(payload, &subject, keys),
                None => Err("its payload is not there".to_owned()),
            };
            match verified {
                Ok(key) => return Ok(Some(key)),
                Err(reason) => reasons.push(format!("signature {number}: {reason}")),
            }
        }
        Err(SignatureError::Refused { subject, asked, reasons: reasons.join("; ") })
    }
}

/// The keys that are asked, for a message.
fn asked(keys: &[PublicKey]) -> String {
    match keys {
        [key] => format!("key {key}"),
        keys => {
            let names: Vec<String> = keys.iter().map(ToString::to_string).collect();
            format!("one of the keys {}", names.join(", "))
        }
    }
}

/// Feeds hostile bytes to every parser of this module.
pub fn fuzz_signature(bytes: &[u8]) {
    let _ = parse_signatures(bytes);
    let _ = add_signature(Some(bytes), b"payload", b"der");
    let _ = serde_json::from_slice::<Payload>(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = PublicKey::from_pem("fuzz.pem", text);
        let _ = repository_of(text);
    }
}
