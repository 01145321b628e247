//! Who we are to a registry: `auth.json` of the containers tools (containers-auth.json(5)), Docker's `config.json`, and
//! the credential helpers that they name (docker-credential-helpers: `docker-credential-NAME get`).
//!
//! Which entry of a file counts is decided in pure code; files and helpers are read at the end. Nothing is ever written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use protocol::reference::Reference;
use serde::Deserialize;

use crate::client::Credentials;

/// Largest credentials file, and largest answer of a helper, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// User name under which helpers give an identity token instead of a password.
pub(crate) const TOKEN_USER: &str = "<token>";
/// What a helper says when it knows nobody there.
const NOT_FOUND: &str = "credentials not found";
/// Docker's own key of its hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// Standard alphabet, with or without padding: both are found in such files.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Where credentials are looked for, in this order. Empty: nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AuthFiles {
    paths: Vec<PathBuf>,
    /// Whether the first path was named by a person, and so must be there.
    named: bool,
}

/// Why credentials cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file that was named, or that is there, cannot be read.
    #[error("cannot read credentials from {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is malformed.
    #[error("{} is not a credentials file: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never what stands in it.
        reason: String,
    },
    /// A credential helper does not work.
    #[error("credential helper docker-credential-{helper}, asked for {registry}: {reason}")]
    Helper {
        /// Its name, without the prefix.
        helper: String,
        /// What it was asked for.
        registry: String,
        /// What went wrong.
        reason: String,
    },
}

impl AuthFiles {
    /// The one file that a person named.
    #[must_use]
    pub fn named(path: PathBuf) -> Self {
        Self { paths: vec![path], named: true }
    }

    /// The places that the containers tools and Docker use: `REGISTRY_AUTH_FILE` alone where it is set; else
    /// `${XDG_RUNTIME_DIR}/containers/auth.json`, `~/.config/containers/auth.json` and `~/.docker/config.json`
    /// (`XDG_CONFIG_HOME` and `DOCKER_CONFIG` move the latter two).
    #[must_use]
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name).map(PathBuf::from))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<PathBuf>) -> Self {
        let variable = |name: &str| variable(name).filter(|value| !value.as_os_str().is_empty());
        if let Some(path) = variable("REGISTRY_AUTH_FILE") {
            return Self::named(path);
        }
        let home = variable("HOME");
        let below_home = |name: &str| home.as_ref().map(|home| home.join(name));
        let paths = [
            variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
            variable("XDG_CONFIG_HOME")
                .or_else(|| below_home(".config"))
                .map(|dir| dir.join("containers/auth.json")),
            variable("DOCKER_CONFIG")
                .or_else(|| below_home(".docker"))
                .map(|dir| dir.join("config.json")),
        ];
        Self { paths: paths.into_iter().flatten().collect(), named: false }
    }

    /// Who we are to the registry of this reference; nobody where no file knows it.
    ///
    /// # Errors
    /// If a file is malformed or cannot be read, or a helper does not work.
    pub fn find(&self, reference: &Reference) -> Result<Option<Credentials>, CredentialsError> {
        for path in &self.paths {
            let bytes = match read(path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound && !self.named => continue,
                Err(source) => return Err(CredentialsError::Read { path: path.clone(), source }),
            };
            let malformed =
                |reason: String| CredentialsError::Malformed { path: path.clone(), reason };
            let file: AuthFile = serde_json::from_slice(&bytes).map_err(|error| {
                // serde's words may quote the value.
                malformed(format!("line {}, column {}", error.line(), error.column()))
            })?;
            if let Some(helper) = file.helper(&reference.registry)
                && let Some(known) = ask_helper(helper, server_key(&reference.registry))?
            {
                return Ok(Some(known));
            }
            match file.entry(&reference.registry, &reference.repository) {
                Ok(None) => {}
                Ok(known) => return Ok(known),
                Err(key) => {
                    return Err(malformed(format!("the entry `{key}` is not USER:PASSWORD")));
                }
            }
        }
        Ok(None)
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("it is larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(bytes)
}

/// What helpers are asked for.
fn server_key(registry: &str) -> &str {
    if is_hub(registry) { HUB_KEY } else { registry }
}

fn is_hub(registry: &str) -> bool {
    matches!(registry, "docker.io" | "index.docker.io" | "registry-1.docker.io")
}

/// The part of such a file that counts here; both tools' forms are the same.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

impl AuthFile {
    /// The helper to ask: the one of this very registry, else the general one.
    fn helper(&self, registry: &str) -> Option<&str> {
        let own = self.cred_helpers.iter().find(|(key, _)| same(key, registry));
        let general = Some(&self.creds_store).filter(|helper| !helper.is_empty());
        own.map(|(_, helper)| helper).or(general).map(String::as_str)
    }

    /// What the entry with the longest fitting key says; the key where it is malformed.
    fn entry(&self, registry: &str, repository: &str) -> Result<Option<Credentials>, String> {
        let whole = format!("{registry}/{repository}");
        let fitting = self.auths.iter().filter_map(|(key, entry)| {
            let plain = plain_key(key);
            let below = whole.strip_prefix(plain).is_some_and(|rest| rest.starts_with('/'));
            let fits = whole == plain || below || same(key, registry);
            fits.then_some((plain.len(), key, entry))
        });
        let longest = fitting.max_by_key(|(length, ..)| *length);
        longest.map_or(Ok(None), |(_, key, entry)| entry.credentials().ok_or_else(|| key.clone()))
    }
}

impl Entry {
    /// Nobody where the entry is empty; `None` where it is malformed.
    fn credentials(&self) -> Option<Option<Credentials>> {
        if !self.identitytoken.is_empty() {
            return Some(Some(Credentials::of_token(&self.identitytoken)));
        }
        if self.auth.is_empty() {
            let known = !self.username.is_empty();
            return Some(known.then(|| Credentials::new(&self.username, &self.password)));
        }
        let text = String::from_utf8(BASE64.decode(self.auth.trim()).ok()?).ok()?;
        let (user, password) = text.split_once(':')?;
        // Docker pads old entries with zero bytes.
        Some(Some(Credentials::new(user, password.trim_end_matches('\0'))))
    }
}

/// The key without scheme and trailing slash: `https://r.example/` is `r.example`.
fn plain_key(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    rest.unwrap_or(key).trim_end_matches('/')
}

/// Whether a key names this registry, as Docker's keys do: with a scheme or a path of the API.
fn same(key: &str, registry: &str) -> bool {
    let plain = plain_key(key);
    let host = plain.strip_suffix("/v1").or_else(|| plain.strip_suffix("/v2")).unwrap_or(plain);
    host == registry || (is_hub(host) && is_hub(registry))
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

fn ask_helper(helper: &str, registry: &str) -> Result<Option<Credentials>, CredentialsError> {
    let failed = |reason: String| CredentialsError::Helper {
        helper: helper.to_owned(),
        registry: registry.to_owned(),
        reason,
    };
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !helper.bytes().all(good) {
        return Err(failed("that is no name of a program".to_owned()));
    }
    let mut child = Command::new(format!("docker-credential-{helper}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|error| failed(format!("it cannot be started: {error}")))?;
    if let Some(mut input) = child.stdin.take() {
        // A helper that does not read its input says why by its exit.
        let _ = input.write_all(registry.as_bytes());
    }
    let mut bytes = Vec::new();
    let read = match child.stdout.take() {
        Some(output) => output.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map(drop),
        None => Ok(()),
    };
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    read.map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        // Its words are on stdout, as the protocol has it.
        let words = String::from_utf8_lossy(&bytes).trim().to_owned();
        if words.contains(NOT_FOUND) {
            return Ok(None);
        }
        return Err(failed(if words.is_empty() { status.to_string() } else { words }));
    }
    let answer: HelperAnswer = serde_json::from_slice(&bytes)
        .map_err(|_| failed("its answer is not what the protocol says".to_owned()))?;
    Ok(Some(match answer.username.as_str() {
        TOKEN_USER => Credentials::of_token(&answer.secret),
        user => Credentials::new(user, &answer.secret),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `user:password` of the registry, or what came instead.
    fn choose(file: &str, registry: &str, repository: &str) -> String {
        let file: AuthFile = serde_json::from_str(file).expect("file");
        if let Some(helper) = file.helper(registry) {
            return format!("helper {helper}");
        }
        match file.entry(registry, repository).expect("well-formed") {
            None => "nobody".to_owned(),
            Some(known) => format!("{}:{}", known.user, known.password),
        }
    }

    #[test]
    fn the_longest_fitting_key_counts() {
        // a:1, b:2, c:3 in base64.
        let file = r#"{"auths": {
            "r.example": {"auth": "YTox"}, "r.example:5000": {"auth": "Yjoy"},
            "r.example/team/app": {"auth": "Yzoz"}, "https://old.example/v1/": {"auth": "Yzoz"},
            "split.example": {"username": "d", "password": "4"}, "empty.example": {}
        }}"#;
        for (registry, repository, expected) in [
            ("r.example", "x", "a:1"),
            ("r.example", "team/application", "a:1"),
            ("r.example", "team/app", "c:3"),
            ("r.example", "team/app/more", "c:3"),
            ("r.example:5000", "x", "b:2"),
            ("old.example", "x", "c:3"),
            ("split.example", "x", "d:4"),
            ("empty.example", "x", "nobody"),
            ("example", "x", "nobody"),
        ] {
            assert_eq!(choose(file, registry, repository), expected, "{registry}/{repository}");
        }
    }

    #[test]
    fn dockers_hub_has_several_names() {
        let file = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "Yjoy"}}}"#;
        for registry in ["docker.io", "index.docker.io", "registry-1.docker.io"] {
            assert_eq!(choose(file, registry, "library/debian"), "b:2");
        }
        assert_eq!(choose(file, "r.example", "library/debian"), "nobody");
    }

    #[test]
    fn helpers_come_before_entries() {
        let file = r#"{"auths": {"r.example": {"auth": "Yjoy"}, "s.example": {}},
            "credHelpers": {"r.example": "pass"}}"#;
        assert_eq!(choose(file, "r.example", "x"), "helper pass");
        assert_eq!(choose(file, "s.example", "x"), "nobody");
        let file = r#"{"auths": {"r.example": {}}, "credsStore": "desktop"}"#;
        assert_eq!(choose(file, "r.example", "x"), "helper desktop");
    }

    #[test]
    fn a_malformed_entry_is_named_and_its_secret_is_not() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("auth.json");
        let reference: Reference = "r.example/a".parse().expect("reference");
        let find = |text: &str| {
            std::fs::write(&path, text).expect("write");
            AuthFiles::named(path.clone()).find(&reference).expect_err("malformed").to_string()
        };
        let error = find(r#"{"auths": {"r.example": {"auth": "c2VjcmV0"}}}"#);
        assert!(error.ends_with("the entry `r.example` is not USER:PASSWORD"), "{error}");
        let error = find(r#"{"auths": "secret"}"#);
        assert!(error.contains("line 1") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn a_file_that_was_named_must_be_there_and_others_need_not() {
        let dir = tempfile::tempdir().expect("dir");
        let missing = dir.path().join("missing.json");
        let reference: Reference = "r.example/a".parse().expect("reference");
        assert!(AuthFiles::named(missing.clone()).find(&reference).is_err());
        let home = |name: &str| (name == "HOME").then(|| dir.path().to_owned());
        let files = AuthFiles::from_variables(home);
        assert_eq!(files.paths.len(), 2);
        assert!(files.find(&reference).expect("nothing").is_none());
        let named = |name: &str| (name == "REGISTRY_AUTH_FILE").then(|| missing.clone());
        assert_eq!(AuthFiles::from_variables(named), AuthFiles::named(missing.clone()));
    }

    #[test]
    fn a_helper_that_is_missing_or_misnamed_is_an_error() {
        let error = ask_helper("no-such-helper", "r.example").expect_err("missing").to_string();
        assert!(error.contains("docker-credential-no-such-helper, asked for r.example"), "{error}");
        let error = ask_helper("../x", "r.example").expect_err("misnamed").to_string();
        assert!(error.contains("no name of a program"), "{error}");
    }
}
