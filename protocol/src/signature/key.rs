//! Public keys: ECDSA P-256 as SPKI in PEM (RFC 5480, RFC 7468), one a file. Private keys are the imagebuilder's.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};

use crate::ids::Digest;

/// Largest key file that is read, in bytes; one has 178.
pub const MAX_KEY_BYTES: usize = 64 << 10;
/// The DER of every P-256 SPKI up to the point: SEQUENCE { SEQUENCE { ecPublicKey, prime256v1 }, BIT STRING, 0 unused bits }.
const SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// Bytes of an uncompressed point: 0x04, X, Y (SEC 1, 2.3.3).
const POINT_BYTES: usize = 65;
const BEGIN: &str = "-----BEGIN PUBLIC KEY-----";
const END: &str = "-----END PUBLIC KEY-----";

/// Why a text is not a key that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} is not a public key for signatures: {reason}")]
pub struct KeyError {
    /// The file.
    pub name: String,
    /// What is wrong.
    pub reason: &'static str,
}

/// A public key that may vouch. Shown as its name and the beginning of its fingerprint.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: String,
    point: [u8; POINT_BYTES],
}

impl PublicKey {
    /// Reads a PEM file with one public key in it. `name` is only for messages. Whether the point lies on the curve is
    /// not looked at: a key of another point verifies nothing.
    ///
    /// # Errors
    /// If the text is something else, a private key above all.
    pub fn from_pem(name: &str, text: &str) -> Result<Self, KeyError> {
        let wrong = |reason| KeyError { name: name.to_owned(), reason };
        if text.len() > MAX_KEY_BYTES {
            return Err(wrong("it is larger than 64 KiB"));
        }
        if text.contains("PRIVATE KEY-----") {
            return Err(wrong("it is a private key, which belongs to nobody but the signer"));
        }
        let mut lines = text.lines().map(str::trim).skip_while(|line| *line != BEGIN).skip(1);
        let mut body = String::new();
        loop {
            match lines.next() {
                Some(END) => break,
                Some(line) => body.push_str(line),
                None => return Err(wrong("it has no whole PEM block `PUBLIC KEY`")),
            }
        }
        if lines.any(|line| line.starts_with("-----BEGIN")) {
            return Err(wrong("it holds more than one PEM block; give each key its own file"));
        }
        let der = STANDARD.decode(body).map_err(|_| wrong("its PEM block is not base64"))?;
        let point = der.strip_prefix(&SPKI_PREFIX[..]);
        let point = point.ok_or_else(|| wrong("it is of another kind than ECDSA P-256"))?;
        Self::from_point(name, point)
    }

    /// A key by its uncompressed point, 65 bytes.
    ///
    /// # Errors
    /// If it has another form.
    pub fn from_point(name: &str, point: &[u8]) -> Result<Self, KeyError> {
        match <[u8; POINT_BYTES]>::try_from(point) {
            Ok(point) if point.first() == Some(&4) => Ok(Self { name: name.to_owned(), point }),
            _ => Err(KeyError { name: name.to_owned(), reason: "its point is malformed" }),
        }
    }

    /// The key as PEM, which every OpenSSL and cosign reads.
    #[must_use]
    pub fn to_pem(&self) -> String {
        let base64 = STANDARD.encode(self.der());
        // RFC 7468: 64 characters a line. 91 bytes are 124 characters.
        let (first, second) = base64.split_at(64.min(base64.len()));
        format!("{BEGIN}\n{first}\n{second}\n{END}\n")
    }

    /// The key as SPKI in DER.
    #[must_use]
    pub fn der(&self) -> Vec<u8> {
        [&SPKI_PREFIX[..], &self.point].concat()
    }

    /// What the key was called when it was read: its file's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// SHA-256 of the key as DER: what `openssl pkey -pubin -outform DER | sha256sum` prints.
    #[must_use]
    pub fn fingerprint(&self) -> Digest {
        Digest::of(&self.der())
    }

    /// Whether this DER signature over these bytes was made by this key.
    #[must_use]
    pub fn verifies(&self, bytes: &[u8], der: &[u8]) -> bool {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.point[..]).verify(bytes, der).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.fingerprint().short())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}
