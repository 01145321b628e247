//! The registry table: what a node, or the boot server, must know of registries beyond a reference. Mirrors, plain HTTP, CA
//! certificates and credentials, for one `HOST[:PORT]` each and for all others (`*`).
//!
//! It reaches a node in two ways: as `/etc/layercake/registries.json` in Layer0, and in the desired document, whose entries
//! go before those of the file, host by host. It is never on the kernel command line. Secrets show in no `Debug`, error or
//! log: [`Secret`] sees to that. Pure: files that an operator names are read by who calls [`RegistrySource::load`].

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};

use crate::reference::{Reference, Scheme};

/// The host of the entry that counts for every registry without one of its own.
pub const DEFAULT_HOST: &str = "*";
/// Most entries of a table.
pub const MAX_REGISTRIES: usize = 64;
/// Most mirrors of an entry.
pub const MAX_MIRRORS: usize = 8;
/// Most bytes of an entry's CA certificates, PEM.
pub const MAX_CA_BYTES: usize = 256 << 10;
/// Longest user name, password or token, in bytes.
pub const MAX_SECRET_BYTES: usize = 16 << 10;
/// Largest table as JSON, in bytes.
pub const MAX_TABLE_BYTES: usize = 4 << 20;

/// A text that is shown nowhere. It is written as it is by serde: what it is written to must be kept as carefully.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// This text, as a secret.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one request that needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    /// Errors of other types do not quote the value, as serde's own do.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        const WRONG: &str = "a secret must be a text in quotes";
        impl Visitor<'_> for Text {
            type Value = Secret;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text in quotes")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Secret, E> {
                Ok(Secret(text.to_owned()))
            }
            fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<Secret, E> {
                Err(E::custom(WRONG))
            }
            fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<Secret, E> {
                Err(E::custom(WRONG))
            }
            fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<Secret, E> {
                Err(E::custom(WRONG))
            }
            fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<Secret, E> {
                Err(E::custom(WRONG))
            }
        }
        deserializer.deserialize_any(Text)
    }
}

/// What is known of one registry, or of all that have no entry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RegistryEntry {
    /// `HOST[:PORT]` as references have it, or [`DEFAULT_HOST`].
    pub host: String,
    /// `[http://|https://]HOST[:PORT][/PREFIX]` each, asked in this order before the registry itself. What is known of a
    /// mirror's own host counts for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<String>,
    /// Plain HTTP is spoken to it although the reference does not begin with `http://`, and credentials may travel so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain_http: bool,
    /// CA certificates, PEM, that alone are trusted there; the site's own when there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ca: Vec<String>,
    /// User name; `password` comes with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// Its password, for HTTP Basic or for the token server that the registry names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<Secret>,
    /// A bearer token that is shown as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Secret>,
    /// An OAuth 2 refresh token, which the token server exchanges (distribution's token authentication).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity_token: Option<Secret>,
}

/// Who we are to a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// User name and password.
    Basic {
        /// User name.
        username: String,
        /// Password.
        password: Secret,
    },
    /// A bearer token.
    Token(Secret),
    /// A refresh token for the token server.
    Identity(Secret),
}

impl Credentials {
    /// The value of an `Authorization` header (RFC 7617, RFC 6750); none for a refresh token, which only the token server is
    /// shown.
    #[must_use]
    pub fn authorization(&self) -> Option<Secret> {
        match self {
            Self::Basic { username, password } => {
                let pair = format!("{username}:{}", password.reveal());
                Some(Secret(format!("Basic {}", STANDARD.encode(pair))))
            }
            Self::Token(token) => Some(Secret(format!("Bearer {}", token.reveal()))),
            Self::Identity(_) => None,
        }
    }
}

/// Why a table cannot be used. Says nothing that stands in it but hosts and mirrors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// It is not the JSON of a table.
    #[error("not a registry table: malformed JSON at line {line}, column {column}")]
    Malformed {
        /// Where, from 1.
        line: usize,
        /// Where, from 1.
        column: usize,
    },
    /// It is too large.
    #[error("the registry table has {0} bytes, more than {MAX_TABLE_BYTES}")]
    TooLarge(usize),
    /// Entries are wrong: one sentence each.
    #[error("{}", .0.join("; "))]
    Wrong(Vec<String>),
}

/// The table, as `/etc/layercake/registries.json` has it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RegistryTable {
    /// The entries, one a host.
    #[serde(default)]
    pub registries: Vec<RegistryEntry>,
}

/// A place where a repository can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Repository and scheme; tag and digest are those of the reference.
    pub reference: Reference,
    /// CA certificates, PEM, that alone are trusted there; the site's own when there are none.
    pub ca: Vec<String>,
    /// Who we are there; nobody over plain HTTP unless the table allows that.
    pub credentials: Option<Credentials>,
    /// Whether it is a mirror and may be given up.
    pub is_mirror: bool,
}

impl Endpoint {
    /// The registry of a reference, of which nothing else is known.
    #[must_use]
    pub fn of(reference: &Reference) -> Self {
        let (ca, credentials) = (Vec::new(), None);
        Self { reference: reference.clone(), ca, credentials, is_mirror: false }
    }
}

impl RegistryTable {
    /// Reads a table and checks every entry.
    ///
    /// # Errors
    /// If it is malformed, too large or an entry is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, TableError> {
        if bytes.len() > MAX_TABLE_BYTES {
            return Err(TableError::TooLarge(bytes.len()));
        }
        // serde's words may quote a value.
        let table: Self = serde_json::from_slice(bytes).map_err(|error| TableError::Malformed {
            line: error.line(),
            column: error.column(),
        })?;
        let problems = table.problems();
        if problems.is_empty() { Ok(table) } else { Err(TableError::Wrong(problems)) }
    }

    /// Everything that is wrong with it, each as one sentence that names the host. Empty when good.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> =
            self.registries.iter().flat_map(RegistryEntry::problems).collect();
        if self.registries.len() > MAX_REGISTRIES {
            problems.push(format!("more than {MAX_REGISTRIES} registries are described"));
        }
        for (index, entry) in self.registries.iter().enumerate() {
            if self.registries.iter().take(index).any(|other| other.host == entry.host) {
                problems.push(format!("registry {} is described twice", entry.host));
            }
        }
        problems
    }

    /// This table with the entries of another one in place of its own of the same hosts.
    #[must_use]
    pub fn overridden_by(&self, over: &[RegistryEntry]) -> Self {
        let kept = self.registries.iter();
        let kept = kept.filter(|entry| over.iter().all(|other| other.host != entry.host));
        Self { registries: kept.chain(over).cloned().collect() }
    }

    /// What is known of a registry: its own entry, else the default one.
    #[must_use]
    pub fn find(&self, host: &str) -> Option<&RegistryEntry> {
        let named = |name: &str| self.registries.iter().find(|entry| entry.host == name);
        named(host).or_else(|| named(DEFAULT_HOST))
    }

    /// Where a reference's repository can be read: the mirrors in their order, then the registry itself.
    #[must_use]
    pub fn endpoints(&self, reference: &Reference) -> Vec<Endpoint> {
        let mirrors = self.find(&reference.registry).map_or(&[][..], |entry| &entry.mirrors);
        let mut endpoints = Vec::new();
        for mirror in mirrors {
            let Some(place) = mirror_of(mirror, &reference.repository) else { continue };
            let place = Reference { tag: reference.tag.clone(), digest: reference.digest, ..place };
            endpoints.push(self.endpoint(place, true));
        }
        endpoints.push(self.endpoint(reference.clone(), false));
        endpoints
    }

    fn endpoint(&self, reference: Reference, is_mirror: bool) -> Endpoint {
        let entry = self.find(&reference.registry);
        let plain = entry.is_some_and(|entry| entry.plain_http);
        let scheme = if plain { Scheme::Http } else { reference.scheme };
        // A password for a registry with TLS is not told to whoever answers without.
        let trusted = plain || scheme == Scheme::Https;
        let known = entry.filter(|_| trusted).and_then(RegistryEntry::credentials);
        let ca = entry.map(|entry| entry.ca.clone()).unwrap_or_default();
        Endpoint { reference: Reference { scheme, ..reference }, ca, credentials: known, is_mirror }
    }
}

/// A repository as a mirror has it.
fn mirror_of(mirror: &str, repository: &str) -> Option<Reference> {
    format!("{}/{repository}", mirror.trim_end_matches('/')).parse().ok()
}

impl RegistryEntry {
    /// Who we are there.
    #[must_use]
    pub fn credentials(&self) -> Option<Credentials> {
        match (&self.username, &self.password, &self.token, &self.identity_token) {
            (Some(username), Some(password), ..) => {
                let (username, password) = (username.clone(), password.clone());
                Some(Credentials::Basic { username, password })
            }
            (_, _, Some(token), _) => Some(Credentials::Token(token.clone())),
            (_, _, _, Some(token)) => Some(Credentials::Identity(token.clone())),
            _ => None,
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let host: String = self.host.chars().take(120).collect();
        let mut say = |text: String| problems.push(format!("registry {host}: {text}"));
        let probe = format!("{}/probe", self.host).parse::<Reference>();
        let is_host = probe.is_ok_and(|probe| probe.registry == self.host);
        if self.host != DEFAULT_HOST && !is_host {
            say("the host is not HOST[:PORT]".to_owned());
        }
        if self.mirrors.len() > MAX_MIRRORS {
            say(format!("more than {MAX_MIRRORS} mirrors"));
        }
        for mirror in &self.mirrors {
            let good = mirror_of(mirror, "probe")
                .is_some_and(|place| place.tag.is_none() && place.digest.is_none());
            if !good {
                let mirror: String = mirror.chars().take(120).collect();
                say(format!("mirror `{mirror}` is not [http://]HOST[:PORT][/PREFIX]"));
            }
        }
        if self.ca.iter().map(String::len).sum::<usize>() > MAX_CA_BYTES {
            say(format!("more than {MAX_CA_BYTES} bytes of CA certificates"));
        }
        if self.ca.iter().any(|pem| !pem.contains("-----BEGIN CERTIFICATE-----")) {
            say("a CA certificate is not PEM".to_owned());
        }
        if self.ca.iter().any(|pem| pem.contains("PRIVATE KEY-----")) {
            say("a private key stands among the CA certificates".to_owned());
        }
        let basic = self.username.is_some() || self.password.is_some();
        if self.username.is_some() != self.password.is_some() {
            say("username and password come together".to_owned());
        }
        let kinds = [basic, self.token.is_some(), self.identity_token.is_some()];
        if kinds.iter().filter(|there| **there).count() > 1 {
            say("more than one of password, token and identity_token".to_owned());
        }
        if self.host == DEFAULT_HOST && kinds.contains(&true) {
            say("credentials for all registries would be told to any of them".to_owned());
        }
        if self.username.as_ref().is_some_and(|name| name.is_empty() || name.contains(':')) {
            say("the username is empty or has a colon in it".to_owned());
        }
        let secrets = [&self.password, &self.token, &self.identity_token].into_iter().flatten();
        let texts = secrets.map(Secret::reveal).chain(self.username.as_deref());
        if texts
            .clone()
            .any(|text| text.len() > MAX_SECRET_BYTES || text.contains(char::is_control))
        {
            say("a credential is too long or has a control character in it".to_owned());
        }
        let tokens = [&self.token, &self.identity_token].into_iter().flatten();
        if tokens
            .map(Secret::reveal)
            .any(|it| it.is_empty() || !it.bytes().all(|b| b.is_ascii_graphic()))
        {
            say("a token is empty or has other characters than a header can carry".to_owned());
        }
        problems
    }
}

/// An entry as an operator writes it, in `layercake.toml` and for `build-image --registries`: certificates and secrets may
/// stand in files of their own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistrySource {
    /// As [`RegistryEntry::host`].
    pub host: String,
    /// As [`RegistryEntry::mirrors`].
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// As [`RegistryEntry::plain_http`].
    #[serde(default)]
    pub plain_http: bool,
    /// Files of CA certificates, PEM.
    #[serde(default)]
    pub ca: Vec<String>,
    /// User name.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
    /// A file whose first line is the password.
    pub password_file: Option<String>,
    /// A bearer token.
    pub token: Option<Secret>,
    /// A file whose first line is the bearer token.
    pub token_file: Option<String>,
    /// An OAuth 2 refresh token.
    pub identity_token: Option<Secret>,
    /// Whether nodes are told; the server itself uses it in any case.
    #[serde(default = "yes")]
    pub nodes: bool,
}

fn yes() -> bool {
    true
}

impl RegistrySource {
    /// The entry, with what stands in files read by `read`, which gives a file's text or says why it cannot.
    ///
    /// # Errors
    /// One sentence that names the host.
    pub fn load(
        &self,
        read: &mut dyn FnMut(&str) -> Result<String, String>,
    ) -> Result<RegistryEntry, String> {
        let mut text = |path: &str| {
            read(path).map_err(|error| format!("registry {}: {path}: {error}", self.host))
        };
        let ca = self.ca.iter().map(|path| text(path)).collect::<Result<Vec<_>, _>>()?;
        let mut secret = |given: &Option<Secret>, file: &Option<String>| match (given, file) {
            (Some(_), Some(path)) => {
                Err(format!("registry {}: a secret is given, and {path} too", self.host))
            }
            (_, Some(path)) => {
                let text = text(path)?;
                Ok(Some(Secret::new(text.lines().next().unwrap_or_default())))
            }
            (given, None) => Ok(given.clone()),
        };
        let entry = RegistryEntry {
            password: secret(&self.password, &self.password_file)?,
            token: secret(&self.token, &self.token_file)?,
            identity_token: self.identity_token.clone(),
            host: self.host.clone(),
            mirrors: self.mirrors.clone(),
            plain_http: self.plain_http,
            ca,
            username: self.username.clone(),
        };
        let problems = entry.problems();
        if problems.is_empty() { Ok(entry) } else { Err(problems.join("; ")) }
    }
}

/// Reads any bytes as a table, for fuzzing.
pub fn fuzz_registries(bytes: &[u8]) {
    if let Ok(table) = RegistryTable::parse(bytes)
        && let Ok(reference) = "r.example/a/b:1".parse()
    {
        let _ = table.endpoints(&reference);
    }
}

#[cfg(test)]
mod tests;
