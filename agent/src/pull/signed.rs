//! Signatures of sets: the keys that Layer0 brings, and the check that comes before anything of a set is fetched or used
//! beyond its index. What a signature is and when it is good stands in [`protocol::signature`].
//!
//! What was verified is kept beside the set (`signatures/HEX`), so that it can be verified again without the network, by
//! the keys of then: a store that outlives a Layer0 gives only what the new one's keys vouch for.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use protocol::ids::Digest;
use protocol::reference::Reference;
use protocol::signature::{
    MAX_KEY_BYTES, Policy, PublicKey, Subject, parse_signatures, signature_tag,
};
use serde::{Deserialize, Serialize};

use super::{Pull, PullError, Puller};

/// What keeps verified signatures readable without a registry.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// The repository that the set was pulled from.
    repository: String,
    /// The signature manifest.
    manifest: String,
    /// The payloads that it names and that could be had.
    payloads: Vec<String>,
}

/// The policy that the key files of a directory make (`*.pem`, `*.pub`; one public key each). Without the directory or
/// without files in it, nothing has to be signed. Anything there that is no key makes a policy that takes nothing: a typo
/// must not switch the check off.
#[must_use]
pub fn load_policy(dir: &Path) -> Policy {
    match read_keys(dir) {
        Ok(keys) if keys.is_empty() => Policy::Unsigned,
        Ok(keys) => Policy::Signed(keys),
        Err(reason) => Policy::Unusable(reason),
    }
}

fn read_keys(dir: &Path) -> Result<Vec<PublicKey>, String> {
    let failed = |error: io::Error| format!("{}: {error}", dir.display());
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        let name = name.into_string();
        names.push(name.map_err(|name| format!("{}: {name:?} is no text", dir.display()))?);
    }
    names.sort();
    let mut keys = Vec::new();
    for name in names.iter().filter(|name| !name.starts_with('.')) {
        let path = dir.join(name);
        if !name.ends_with(".pem") && !name.ends_with(".pub") {
            return Err(format!("{} is neither *.pem nor *.pub", path.display()));
        }
        let failed = |error: io::Error| format!("{}: {error}", path.display());
        let mut text = String::new();
        let most = u64::try_from(MAX_KEY_BYTES).unwrap_or(u64::MAX);
        let file = fs::File::open(&path).map_err(failed)?;
        file.take(most.saturating_add(1)).read_to_string(&mut text).map_err(failed)?;
        let key = PublicKey::from_pem(name, &text);
        keys.push(key.map_err(|error| format!("{}: {error}", dir.display()))?);
    }
    Ok(keys)
}

impl Puller {
    /// The same puller, which takes only sets that this policy lets pass.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        Self { policy, ..self }
    }

    /// Whether a set in the store is let pass by what was kept of its signatures.
    pub(super) fn is_verified(&self, digest: &Digest, repository: Option<&str>) -> bool {
        if !self.policy.asks_for_signatures() {
            return true;
        }
        let kept = match self.store.signature(digest) {
            Ok(Some(bytes)) => serde_json::from_slice::<Kept>(&bytes).ok(),
            Ok(None) => None,
            Err(error) => {
                log::warn!("pull: {}", super::chain(&error));
                None
            }
        };
        let Some(kept) = kept else { return false };
        if repository.is_some_and(|repository| repository != kept.repository) {
            return false;
        }
        let payloads = kept.payloads.into_iter().map(String::into_bytes);
        let payloads = payloads.map(|bytes| (Digest::of(&bytes), bytes)).collect();
        let subject = Subject { digest: *digest, repository: kept.repository };
        match self.policy.verify(&subject, Some(kept.manifest.as_bytes()), &payloads) {
            Ok(_) => true,
            Err(error) => {
                log::warn!("pull: what was kept of a set's signatures: {}", super::chain(&error));
                false
            }
        }
    }
}

impl Pull<'_> {
    /// Verifies a set's index, by what was kept of its signatures or else by those in the registry.
    pub(super) fn verify(&self, reference: &Reference, digest: &Digest) -> Result<(), PullError> {
        let (store, policy) = (&self.puller.store, &self.puller.policy);
        let subject = Subject::of(reference, *digest);
        if self.puller.is_verified(digest, Some(&subject.repository)) {
            return Ok(());
        }
        let tag = signature_tag(digest);
        let manifest = match policy {
            // Says what is wrong with the keys: no signature would help.
            Policy::Unusable(_) => None,
            _ => found(self.retried(|| Ok(self.registry.resolve(&tag)?)))?,
        };
        let mut manifest = manifest.map(|(_, bytes)| bytes);
        let mut payloads = self.payloads(manifest.as_deref())?;
        let mut verdict = policy.verify(&subject, manifest.as_deref(), &payloads);
        if verdict.is_err() && manifest.is_some() && self.registry.has_mirrors() {
            // A mirror may have kept a tag that was moved since.
            let now = found(self.retried(|| Ok(self.registry.resolve_at_origin(&tag)?)))?;
            manifest = now.map(|(_, bytes)| bytes);
            payloads = self.payloads(manifest.as_deref())?;
            verdict = policy.verify(&subject, manifest.as_deref(), &payloads);
        }
        let by = verdict?;
        if let (Some(key), Some(manifest)) = (by, manifest) {
            log::info!("pull: {digest} is signed by {key}");
            // What is no text was not verified: a payload is JSON.
            let text = |bytes| String::from_utf8(bytes).ok();
            let kept = Kept {
                repository: subject.repository,
                manifest: text(manifest).unwrap_or_default(),
                payloads: payloads.into_values().filter_map(text).collect(),
            };
            let kept = serde_json::to_vec(&kept).unwrap_or_default();
            store.put_signature(digest, &kept)?;
        }
        Ok(())
    }

    /// The payloads that a signature manifest names and that can be had.
    fn payloads(&self, manifest: Option<&[u8]>) -> Result<BTreeMap<Digest, Vec<u8>>, PullError> {
        let mut payloads = BTreeMap::new();
        // A manifest that cannot be read is refused by who verifies it.
        for signature in manifest.map(parse_signatures).into_iter().flatten().flatten() {
            let digest = signature.payload;
            if payloads.contains_key(&digest) {
                continue;
            }
            let payload = self.retried(|| Ok(self.registry.small_blob(&digest)?));
            if let Some(payload) = found(payload)? {
                payloads.insert(digest, payload);
            }
        }
        Ok(payloads)
    }
}

/// What the registry has; none where it says that it has not.
fn found<T>(answer: Result<T, PullError>) -> Result<Option<T>, PullError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(PullError::Registry(error)) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}
