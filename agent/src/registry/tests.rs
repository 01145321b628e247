//! Tests: who is shown what credentials, and what a table file may be.

use std::path::Path;

use protocol::ids::Digest;
use protocol::reference::Reference;
use protocol::registries::{RegistryEntry, Secret};

use super::table::Registries;
use crate::pull::fake::{Answer, Fake};
use crate::transport::Transport;

fn registries() -> Registries {
    Registries::new(Transport::new(Path::new("/nonexistent")).expect("transport"))
}

fn entry(fake: &Fake) -> RegistryEntry {
    RegistryEntry { host: fake.host(), plain_http: true, ..RegistryEntry::default() }
}

fn ann(fake: &Fake) -> RegistryEntry {
    let (username, password) = (Some("ann".to_owned()), Some(Secret::new("hunter2")));
    RegistryEntry { username, password, ..entry(fake) }
}

/// `ann:hunter2`.
const ANN: &str = "Basic YW5uOmh1bnRlcjI=";

/// A registry with one blob, `content`, for who shows this, and 401 with this challenge for others.
fn guarded(shown: &str, challenge: impl Fn(&Fake) -> String) -> Fake {
    let fake = Fake::start();
    let headers = vec![("WWW-Authenticate".to_owned(), challenge(&fake))];
    let token = Some(shown.to_owned());
    let path = format!("/v2/a/blobs/{}", Digest::of(b"content"));
    fake.add(&path, Answer { headers, token, ..Answer::ok(b"content".to_vec()) });
    fake
}

fn bearer(fake: &Fake) -> String {
    format!(r#"Bearer realm="{}/token",service="s",scope="repository:a:pull""#, fake.url())
}

/// What comes of asking for the blob with these entries.
fn ask(fake: &Fake, entries: &[RegistryEntry]) -> Result<Vec<u8>, String> {
    let registries = registries();
    assert_eq!(registries.set_desired(entries), Vec::<String>::new());
    let reference: Reference = format!("{}/a:1", fake.host()).parse().expect("reference");
    let registry = registries.open(&reference).map_err(|error| crate::agent::chain(&error))?;
    let answer = registry.small_blob(&Digest::of(b"content"));
    answer.map_err(|error| crate::agent::chain(&error))
}

#[test]
fn a_password_is_shown_to_who_asks_for_it() {
    let fake = guarded(ANN, |_| "Basic realm=\"x\"".to_owned());
    assert_eq!(ask(&fake, &[ann(&fake)]).expect("blob"), b"content");
    let refused = ask(&fake, &[entry(&fake)]).expect_err("nobody");
    assert!(refused.contains("needs a login: it asks for a password"), "{refused}");
    let wrong = RegistryEntry { password: Some(Secret::new("wrong-word")), ..ann(&fake) };
    let refused = ask(&fake, &[wrong]).expect_err("wrong");
    assert!(refused.contains("does not take the credentials for 127.0.0.1:"), "{refused}");
    assert!(!refused.contains("wrong-word"), "{refused}");
}

#[test]
fn a_password_is_never_shown_over_plain_http_that_only_the_reference_asks_for() {
    let fake = guarded(ANN, |_| "Basic realm=\"x\"".to_owned());
    let registries = registries();
    let careful = RegistryEntry { plain_http: false, ..ann(&fake) };
    assert_eq!(registries.set_desired(&[careful]), Vec::<String>::new());
    let reference: Reference = format!("{}/a:1", fake.url()).parse().expect("reference");
    let registry = registries.open(&reference).expect("registry");
    let refused = registry.small_blob(&Digest::of(b"content")).expect_err("refused").to_string();
    assert!(refused.contains("only where the registry table says plain_http"), "{refused}");
    assert_eq!(fake.requests("").len(), 1, "nothing was shown");
}

#[test]
fn a_token_server_is_shown_the_password_and_the_registry_its_token() {
    let fake = guarded("Bearer t0ken", bearer);
    let answer = Answer::ok(br#"{"token":"t0ken"}"#.to_vec());
    fake.add("/token", Answer { token: Some(ANN.to_owned()), ..answer });
    assert_eq!(ask(&fake, &[ann(&fake)]).expect("blob"), b"content");
    assert_eq!(fake.requests("/token")[0].0, "/token?service=s&scope=repository%3Aa%3Apull");
    let refused = ask(&fake, &[entry(&fake)]).expect_err("anonymous");
    assert!(refused.contains("status 401"), "{refused}");
    let wrong = RegistryEntry { password: Some(Secret::new("no")), ..ann(&fake) };
    let refused = ask(&fake, &[wrong]).expect_err("wrong");
    assert!(refused.contains("its token server does not take the credentials"), "{refused}");
}

#[test]
fn an_identity_token_is_exchanged_and_a_bearer_token_shown_as_it_is() {
    let fake = guarded("Bearer t0ken", bearer);
    fake.add("/token", Answer::ok(br#"{"access_token":"t0ken"}"#.to_vec()));
    let identity = RegistryEntry { identity_token: Some(Secret::new("refresh")), ..entry(&fake) };
    assert_eq!(ask(&fake, &[identity]).expect("blob"), b"content");
    assert_eq!(fake.requests("/token")[0].0, "/token", "the token travels in the body");
    let fake = guarded("Bearer own", bearer);
    let token = |text: &str| RegistryEntry { token: Some(Secret::new(text)), ..entry(&fake) };
    assert_eq!(ask(&fake, &[token("own")]).expect("blob"), b"content");
    assert_eq!(fake.requests("").len(), 1, "at once");
    let refused = ask(&fake, &[token("other")]).expect_err("wrong");
    assert!(refused.contains("does not take the token for"), "{refused}");
}

#[test]
fn a_table_file_is_read_and_the_server_s_entries_go_before_it() {
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("registries.json");
    let fake = guarded(ANN, |_| "Basic realm=\"x\"".to_owned());
    let registries = registries();
    registries.read_file(&file).expect("no file, no table");
    let ask = || {
        let reference: Reference = format!("{}/a:1", fake.host()).parse().expect("reference");
        let registry = registries.open(&reference).expect("registry");
        registry.small_blob(&Digest::of(b"content")).map_err(|error| crate::agent::chain(&error))
    };
    let table = serde_json::json!({ "registries": [ann(&fake)] });
    std::fs::write(&file, table.to_string()).expect("write");
    registries.read_file(&file).expect("table");
    ask().expect("by the file");
    let problems = registries.set_desired(&[entry(&fake), entry(&fake)]);
    assert_eq!(problems, Vec::<String>::new(), "the last one of a host counts");
    ask().expect_err("the server's entry has no password");
    assert_eq!(registries.set_desired(&[]), Vec::<String>::new());
    ask().expect("by the file again");
    let wrong = RegistryEntry { username: None, ..ann(&fake) };
    let problems = registries.set_desired(&[wrong]).join(" ");
    assert!(problems.contains("come together") && !problems.contains("hunter2"), "{problems}");
    ask().expect("what is wrong does not count");
    for bad in ["", "[", r#"{"registries":[{"host":"hunter2/x"}]}"#] {
        std::fs::write(&file, bad).expect("write");
        let error = registries.read_file(&file).expect_err("bad");
        assert!(error.contains("registries.json: "), "{error}");
    }
    ask().expect("what was known stays");
}

#[test]
fn ca_certificates_that_are_none_are_an_error_of_their_registry() {
    let fake = Fake::start();
    let ca = vec!["-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n".to_owned()];
    let error = ask(&fake, &[RegistryEntry { ca, ..entry(&fake) }]).expect_err("no certificate");
    assert!(error.contains(&format!("the CA certificates of registry {}", fake.host())), "{error}");
}
