//! Private keys: ECDSA P-256 as PKCS#8 in PEM (RFC 5958, RFC 7468), readable by their owner alone, and the public half
//! beside them. Keys are plain text: who can read the file can sign.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use protocol::signature::{MAX_KEY_BYTES, PublicKey};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};

const BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const END: &str = "-----END PRIVATE KEY-----";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum SigningKeyError {
    /// A file cannot be read or written.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file does not hold a private key that can sign.
    #[error("{} is not a private key for signatures: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// A public key cannot be read.
    #[error(transparent)]
    Public(#[from] protocol::signature::KeyError),
    /// The system gives no random numbers.
    #[error("the system has no random numbers for a key or signature")]
    Random,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SigningKeyError {
    let path = path.to_owned();
    move |source| SigningKeyError::Io { what, path, source }
}

/// A key that signs.
pub struct SigningKey {
    pair: EcdsaKeyPair,
    public: PublicKey,
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningKey({})", self.public)
    }
}

/// A pair of key files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFiles {
    /// The private key, mode 0600.
    pub private: PathBuf,
    /// The public key.
    pub public: PathBuf,
    /// The key in the latter.
    pub key: PublicKey,
}

/// Makes a new key pair: the private half in `PREFIX.key`, the public one in `PREFIX.pem`. Files that are there are not
/// written over.
///
/// # Errors
/// If one of the files exists or cannot be written; nothing is left behind then.
pub fn generate(prefix: &Path) -> Result<KeyFiles, SigningKeyError> {
    let with = |suffix: &str| {
        let mut name = prefix.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let (private, public) = (with(".key"), with(".pem"));
    let (random, algorithm) = (SystemRandom::new(), &ECDSA_P256_SHA256_ASN1_SIGNING);
    let der = EcdsaKeyPair::generate_pkcs8(algorithm, &random);
    let der = der.map_err(|_| SigningKeyError::Random)?;
    let base64 = STANDARD.encode(der.as_ref());
    let mut pem = format!("{BEGIN}\n");
    let mut rest = base64.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(64.min(rest.len()));
        pem.push_str(line);
        pem.push('\n');
        rest = more;
    }
    pem.push_str(END);
    pem.push('\n');
    let key = SigningKey::from_pem(&private, &pem)?;
    let name = file_name(&public);
    let key = PublicKey::from_point(&name, key.pair.public_key().as_ref())?;
    create(&private, 0o600, pem.as_bytes())?;
    if let Err(error) = create(&public, 0o644, key.to_pem().as_bytes()) {
        fs::remove_file(&private).map_err(failed("remove", &private))?;
        return Err(error);
    }
    Ok(KeyFiles { private, public, key })
}

fn create(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), SigningKeyError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let mut file = file.map_err(failed("create", path))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        fs::remove_file(path).map_err(failed("remove", path))?;
    }
    written.map_err(failed("write", path))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Reads the public key in a PEM file. It is called by the file's name.
///
/// # Errors
/// If the file cannot be read or holds something else.
pub fn read_public(path: &Path) -> Result<PublicKey, SigningKeyError> {
    Ok(PublicKey::from_pem(&file_name(path), &read(path)?)?)
}

fn read(path: &Path) -> Result<String, SigningKeyError> {
    use std::io::Read;
    let mut text = String::new();
    let file = File::open(path).map_err(failed("read", path))?;
    let most = u64::try_from(MAX_KEY_BYTES).unwrap_or(u64::MAX);
    file.take(most + 1).read_to_string(&mut text).map_err(failed("read", path))?;
    Ok(text)
}

impl SigningKey {
    /// Reads a private key file: PKCS#8 in PEM, as `generate` and `openssl genpkey` write it.
    ///
    /// # Errors
    /// If the file cannot be read or holds something else.
    pub fn read(path: &Path) -> Result<Self, SigningKeyError> {
        Self::from_pem(path, &read(path)?)
    }

    fn from_pem(path: &Path, text: &str) -> Result<Self, SigningKeyError> {
        let wrong = |reason| SigningKeyError::Content { path: path.to_owned(), reason };
        for (mark, reason) in [
            (
                "BEGIN ENCRYPTED",
                "it is encrypted (cosign's keys are); make one with `layercake imageset keygen`",
            ),
            (
                "BEGIN EC PRIVATE KEY",
                "it is in SEC 1 form; convert it with `openssl pkcs8 -topk8 -nocrypt`",
            ),
            ("BEGIN PUBLIC KEY", "it is a public key"),
        ] {
            if text.contains(mark) {
                return Err(wrong(reason));
            }
        }
        let body = text.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END));
        let (body, _) = body.ok_or_else(|| wrong("it has no PEM block `PRIVATE KEY`"))?;
        let body: String = body.split_ascii_whitespace().collect();
        let der = STANDARD.decode(body).map_err(|_| wrong("its PEM block is not base64"))?;
        let (random, algorithm) = (SystemRandom::new(), &ECDSA_P256_SHA256_ASN1_SIGNING);
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, &der, &random);
        let pair = pair.map_err(|_| wrong("it is no ECDSA P-256 key with its public half"))?;
        let public = PublicKey::from_point(&file_name(path), pair.public_key().as_ref())?;
        Ok(Self { pair, public })
    }

    /// The public half, called by the private key's file name.
    #[must_use]
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// The signature over these bytes: ECDSA with SHA-256, in DER.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>, SigningKeyError> {
        let signature = self.pair.sign(&SystemRandom::new(), bytes);
        Ok(signature.map_err(|_| SigningKeyError::Random)?.as_ref().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    #[track_caller]
    fn openssl(args: &[&str]) -> Vec<u8> {
        let output = Command::new("openssl").args(args).output();
        let output = output.expect("openssl (apt-get install openssl)");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    #[test]
    fn a_new_pair_is_private_is_not_written_over_and_openssl_agrees_on_its_public_half() {
        let dir = tempfile::tempdir().expect("dir");
        let files = generate(&dir.path().join("site.v1")).expect("generate");
        assert!(files.private.ends_with("site.v1.key") && files.public.ends_with("site.v1.pem"));
        let mode = |path: &Path| fs::metadata(path).expect("file").permissions().mode() & 0o7777;
        assert_eq!(mode(&files.private), 0o600);
        let private = files.private.to_string_lossy().into_owned();
        let public = openssl(&["pkey", "-in", &private, "-pubout"]);
        assert_eq!(public, fs::read(&files.public).expect("public"));
        assert_eq!(read_public(&files.public).expect("public"), files.key);
        let before = fs::read(&files.private).expect("private");
        let error = generate(&dir.path().join("site.v1")).expect_err("exists").to_string();
        assert!(error.contains("cannot create") && error.contains("site.v1.key"), "{error}");
        assert_eq!(fs::read(&files.private).expect("private"), before);
        fs::remove_file(&files.private).expect("remove");
        generate(&dir.path().join("site.v1")).expect_err("the public half exists");
        assert!(!files.private.exists(), "half a pair is left behind");
    }

    #[test]
    fn openssl_verifies_what_we_sign_and_we_verify_what_openssl_signs() {
        let dir = tempfile::tempdir().expect("dir");
        let files = generate(&dir.path().join("k")).expect("generate");
        let key = SigningKey::read(&files.private).expect("read");
        let (data, signature) = (dir.path().join("data"), dir.path().join("signature"));
        fs::write(&data, b"payload").expect("data");
        fs::write(&signature, key.sign(b"payload").expect("sign")).expect("signature");
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let (data, signature) = (text(&data), text(&signature));
        let verify =
            ["dgst", "-sha256", "-verify", &text(&files.public), "-signature", &signature, &data];
        openssl(&verify);
        openssl(&["dgst", "-sha256", "-sign", &text(&files.private), "-out", &signature, &data]);
        let theirs = fs::read(&signature).expect("signature");
        assert!(files.key.verifies(b"payload", &theirs));
        assert!(!files.key.verifies(b"payloaD", &theirs));
    }

    #[test]
    fn openssl_s_keys_are_read_and_other_kinds_are_refused_with_the_reason() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("k.key");
        let file = path.to_string_lossy().into_owned();
        let p256 = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];
        openssl(&[&["genpkey", "-out", &file], &p256[..]].concat());
        SigningKey::read(&path).expect("openssl's");
        let sec1 = openssl(&["pkey", "-in", &file, "-traditional"]);
        let public = openssl(&["pkey", "-in", &file, "-pubout"]);
        let p384 = openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]);
        let ed25519 = openssl(&["genpkey", "-algorithm", "ED25519"]);
        let locked = openssl(&["pkcs8", "-topk8", "-in", &file, "-passout", "pass:secret"]);
        for (content, reason) in [
            (sec1, "SEC 1 form"),
            (public, "it is a public key"),
            (p384, "no ECDSA P-256 key"),
            (ed25519, "no ECDSA P-256 key"),
            (locked, "it is encrypted"),
            (b"nothing".to_vec(), "no PEM block"),
            (format!("{BEGIN}\n??\n{END}\n").into_bytes(), "not base64"),
        ] {
            fs::write(&path, content).expect("write");
            let error = SigningKey::read(&path).expect_err(reason).to_string();
            assert!(error.contains(reason) && error.contains("k.key"), "{error}");
        }
    }
}
