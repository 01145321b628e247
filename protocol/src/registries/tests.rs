//! Tests: what a table says of a reference, and that it says its secrets to nobody.

use super::*;

const CA: &str = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n";

fn entry(host: &str) -> RegistryEntry {
    RegistryEntry { host: host.to_owned(), ..RegistryEntry::default() }
}

fn with_password(host: &str) -> RegistryEntry {
    let (username, password) = (Some("ann".to_owned()), Some(Secret::new("hunter2")));
    RegistryEntry { username, password, ..entry(host) }
}

/// Each endpoint's base URL, and `!` where credentials go along.
fn bases(table: &[RegistryEntry], reference: &str) -> Vec<String> {
    let table = RegistryTable { registries: table.to_vec() };
    assert_eq!(table.problems(), Vec::<String>::new());
    let endpoints = table.endpoints(&reference.parse().expect("reference"));
    let known = |it: &Endpoint| if it.credentials.is_some() { "!" } else { "" };
    endpoints.iter().map(|it| format!("{}{}", it.reference.api_base(), known(it))).collect()
}

#[test]
fn mirrors_come_first_and_have_what_is_known_of_their_own_hosts() {
    let mirrors = ["http://m:5000".to_owned(), "n.example/cache/hub/".to_owned()].to_vec();
    let table = [
        RegistryEntry { mirrors, ..with_password("r.example") },
        RegistryEntry {
            mirrors: vec!["never".to_owned()],
            ca: vec![CA.to_owned()],
            ..entry("n.example")
        },
    ];
    assert_eq!(
        bases(&table, "r.example/a/b:1"),
        ["http://m:5000/v2/a/b", "https://n.example/v2/cache/hub/a/b", "https://r.example/v2/a/b!"]
    );
    let table = RegistryTable { registries: table.to_vec() };
    let endpoints = table.endpoints(&"r.example/a/b:1".parse().expect("reference"));
    assert_eq!(endpoints.iter().map(|it| it.ca.len()).collect::<Vec<_>>(), [0, 1, 0]);
    assert_eq!(endpoints.iter().map(|it| it.is_mirror).collect::<Vec<_>>(), [true, true, false]);
    assert!(endpoints.iter().all(|it| it.reference.tag.as_deref() == Some("1")));
}

#[test]
fn the_default_counts_only_where_there_is_no_entry() {
    let mirrors = vec!["m.example".to_owned()];
    let table = [RegistryEntry { mirrors, ..entry("*") }, entry("r.example")];
    assert_eq!(bases(&table, "r.example/a"), ["https://r.example/v2/a"]);
    let other = ["https://m.example/v2/a", "https://other:5000/v2/a"];
    assert_eq!(bases(&table, "other:5000/a"), other);
}

#[test]
fn credentials_travel_over_plain_http_only_where_the_table_says_so() {
    let plain = RegistryEntry { plain_http: true, ..with_password("p:1") };
    let table = [with_password("r:1"), plain, RegistryEntry { plain_http: true, ..entry("q:1") }];
    assert_eq!(bases(&table, "r:1/a"), ["https://r:1/v2/a!"]);
    assert_eq!(bases(&table, "http://r:1/a"), ["http://r:1/v2/a"]);
    assert_eq!(bases(&table, "p:1/a"), ["http://p:1/v2/a!"]);
    assert_eq!(bases(&table, "q:1/a"), ["http://q:1/v2/a"]);
}

#[test]
fn entries_of_the_desired_document_go_before_those_of_the_node_host_by_host() {
    let own = RegistryTable { registries: vec![with_password("a:1"), entry("b:1")] };
    let merged = own.overridden_by(&[entry("a:1"), entry("c:1")]);
    let hosts: Vec<&str> = merged.registries.iter().map(|it| it.host.as_str()).collect();
    assert_eq!(hosts, ["b:1", "a:1", "c:1"]);
    assert!(merged.find("a:1").expect("a").credentials().is_none());
}

#[test]
fn authorization_is_as_the_rfcs_say() {
    let value = |entry: &RegistryEntry| {
        let known = entry.credentials().expect("credentials");
        known.authorization().map(|value| value.reveal().to_owned())
    };
    assert_eq!(value(&with_password("r")).as_deref(), Some("Basic YW5uOmh1bnRlcjI="));
    let token = Some(Secret::new("abc"));
    let bearer = RegistryEntry { token: token.clone(), ..entry("r") };
    assert_eq!(value(&bearer).as_deref(), Some("Bearer abc"));
    let identity = RegistryEntry { identity_token: token, ..entry("r") };
    assert_eq!(value(&identity), None);
}

#[test]
fn what_is_wrong_is_named_by_host_and_never_by_secret() {
    let token = Some(Secret::new("hunter2 "));
    let half = RegistryEntry { password: None, ..with_password("h:1") };
    let twice = RegistryEntry { identity_token: Some(Secret::new("x")), ..with_password("d:1") };
    let ca = |text: &str| RegistryEntry { ca: vec![text.to_owned()], ..entry("c:1") };
    let mirror = |text: &str| RegistryEntry { mirrors: vec![text.to_owned()], ..entry("m:1") };
    let newline = RegistryEntry { username: Some("a\r\nb".to_owned()), ..with_password("n:1") };
    for (wrong, expected) in [
        (entry("http://r"), "registry http://r: the host is not HOST[:PORT]"),
        (entry("r/a"), "registry r/a: the host is not HOST[:PORT]"),
        (entry(""), "the host is not HOST[:PORT]"),
        (half, "username and password come together"),
        (twice, "more than one of password, token and identity_token"),
        (with_password("*"), "would be told to any"),
        (RegistryEntry { token, ..entry("t:1") }, "a token is empty or has other characters"),
        (ca("no"), "not PEM"),
        (ca(&format!("{CA}-----BEGIN PRIVATE KEY-----")), "a private key"),
        (mirror("ftp://x"), "mirror `ftp://x` is not"),
        (mirror("m.example:x"), "mirror `m.example:x` is not"),
        (newline, "control character"),
    ] {
        let problems = RegistryTable { registries: vec![wrong] }.problems().join("; ");
        assert!(problems.contains(expected), "{problems}");
        assert!(!problems.contains("hunter2"), "{problems}");
    }
    let twice = RegistryTable { registries: vec![entry("a"), entry("a")] };
    assert_eq!(twice.problems(), ["registry a is described twice"]);
}

#[test]
fn secrets_show_in_no_debug_output_and_in_no_error() {
    let table = RegistryTable { registries: vec![with_password("r:1")] };
    let shown = format!("{table:?} {:?}", table.endpoints(&"r:1/a".parse().expect("reference")));
    assert!(shown.contains("ann") && !shown.contains("hunter2"), "{shown}");
    let text = serde_json::to_string(&table).expect("json");
    assert_eq!(RegistryTable::parse(text.as_bytes()).expect("table"), table);
    for wrong in [
        text.replace("\"hunter2\"", "[\"hunter2\"]"),
        text.replace("\"ann\"", "7").replace("\"hunter2\"", "424242"),
        text.replace("[{", "\"hunter2 424242\",[{"),
    ] {
        let error = RegistryTable::parse(wrong.as_bytes()).expect_err("wrong").to_string();
        assert!(!error.contains("hunter2") && !error.contains("4242"), "{error}");
        assert!(error.contains("line 1"), "{error}");
    }
}

#[test]
fn an_operator_s_entry_is_loaded_with_its_files() {
    let json = r#"{"host":"r:1","ca":["ca.pem"],"username":"ann","password_file":"pw"}"#;
    let source: RegistrySource = serde_json::from_str(json).expect("source");
    assert!(source.nodes);
    let mut read = |path: &str| match path {
        "ca.pem" => Ok(CA.to_owned()),
        "pw" => Ok("hunter2\n".to_owned()),
        _ => Err("no such file".to_owned()),
    };
    let loaded = source.load(&mut read).expect("entry");
    assert_eq!(loaded, RegistryEntry { ca: vec![CA.to_owned()], ..with_password("r:1") });
    let missing = RegistrySource { ca: vec!["x.pem".to_owned()], ..source.clone() };
    assert_eq!(missing.load(&mut read).expect_err("missing"), "registry r:1: x.pem: no such file");
    let both = RegistrySource { password: Some(Secret::new("hunter2")), ..source };
    let error = both.load(&mut read).expect_err("both");
    assert!(error.contains("a secret is given, and pw too"), "{error}");
    serde_json::from_str::<RegistrySource>(r#"{"host":"r","colour":1}"#).expect_err("unknown key");
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(
        host in "\\PC{0,20}", mirror in "\\PC{0,30}", secret in "\\PC{0,20}", at: usize, byte: u8,
    ) {
        let password = Some(Secret::new(secret));
        let wild = RegistryEntry { mirrors: vec![mirror], password, ..entry(&host) };
        let table = RegistryTable { registries: vec![wild] };
        let mut bytes = serde_json::to_vec(&table).expect("json");
        fuzz_registries(&bytes);
        let at = at % bytes.len();
        bytes[at] = byte;
        fuzz_registries(&bytes);
    }
}
