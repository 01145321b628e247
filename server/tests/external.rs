//! A server whose ImageSets lie in a registry of the site's own, with a CA certificate and a password, and what it tells its
//! nodes of it and of the site's files. Needs docker-registry, openssl and htpasswd; loopback only.

#[path = "harness/debian.rs"]
mod debian;
#[path = "external/files.rs"]
mod files;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use debian::DebianRegistry;
use serde_json::{Value, json};
use server::config;
use server::serve::Server;
use tokio::sync::watch;

const NODE: &str = "/v1/nodes/n1";

/// A whole server; it ends with the process.
fn serve(dir: &Path, more: &str) -> (String, watch::Sender<bool>) {
    let path = dir.join("layercake.toml");
    let text = format!(
        "[server]\nlisten = \"127.0.0.1:0\"\nurl = \"http://127.0.0.1:1\"\ndata_dir = \"data\"\n\
         layer0_dir = \"l0\"\n{more}[[node]]\nid = \"n1\"\nmac = \"52:54:00:00:00:02\"\n"
    );
    fs::write(&path, text).expect("config");
    let config = config::load(&path).expect("config");
    let (stop, stopping) = watch::channel(false);
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("runtime").block_on(async {
            let server = Server::open(config).await.expect("open");
            tell.send(server.address().expect("address")).expect("tell");
            server.run(stopping).await.expect("run");
        });
    });
    (format!("http://{}", told.recv().expect("address")), stop)
}

/// Status and body.
fn get(url: &str) -> (u16, String) {
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(20)))
        .build()
        .new_agent();
    let mut answer = agent.get(url).call().expect("answer");
    (answer.status().as_u16(), answer.body_mut().read_to_string().expect("text"))
}

fn layercake(dir: &Path, line: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_layercake"));
    command.args(line.split(' ')).current_dir(dir).env("HOME", dir);
    command.env_remove("REGISTRY_AUTH_FILE").env_remove("XDG_RUNTIME_DIR");
    let done = command.output().expect("layercake");
    assert!(done.status.success(), "{line}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("text")
}

#[test]
fn an_external_registry_is_asked_with_the_config_s_credentials_and_nodes_are_told_them_alone() {
    let registry = DebianRegistry::guarded("ann", "s3cret-word");
    let at = registry.address;
    let dir = tempfile::tempdir().expect("dir");
    fs::copy(&registry.ca, dir.path().join("site-ca.pem")).expect("ca");
    fs::create_dir_all(dir.path().join("rootfs/etc")).expect("rootfs");
    let auth =
        json!({ "auths": { at.to_string(): { "username": "ann", "password": "s3cret-word" } } });
    fs::write(dir.path().join("auth.json"), auth.to_string()).expect("auth");
    for version in ["1", "2"] {
        let set = format!(
            "name = \"demo\"\nversion = \"{version}\"\n[[image]]\nname = \"app\"\nsource = \"dir:rootfs\"\n\
             cmd = [\"/app\"]\n[[container]]\nname = \"app\"\nimage = \"app\"\n"
        );
        fs::write(dir.path().join("imageset.toml"), set).expect("set");
        let push = "imageset push imageset.toml --ca site-ca.pem --authfile auth.json --to";
        layercake(dir.path(), &format!("{push} https://{at}/team"));
    }
    fs::write(dir.path().join("password"), "s3cret-word\n").expect("password");
    let more = format!(
        "[registry]\nurl = \"https://{at}/team\"\n[[registries]]\nhost = \"{at}\"\nca = [\"site-ca.pem\"]\n\
         username = \"ann\"\npassword_file = \"password\"\nmirrors = [\"http://127.0.0.1:9/cache\"]\n"
    );
    let (base, stop) = serve(dir.path(), &more);

    let listed: Value =
        serde_json::from_str(&get(&format!("{base}/v1/imagesets")).1).expect("JSON");
    let versions: Vec<&str> =
        listed.as_array().expect("sets").iter().filter_map(|set| set["version"].as_str()).collect();
    assert_eq!(versions, ["1", "2"], "{listed}");
    assert!(
        listed[0]["reference"]
            .as_str()
            .expect("reference")
            .starts_with(&format!("{at}/team/demo:1@"))
    );
    let list = layercake(dir.path(), &format!("--server {base} imageset list"));
    assert!(list.contains("demo  2"), "{list}");
    layercake(dir.path(), &format!("--server {base} roll start --imageset demo:2 all --no-wait"));

    let (status, desired) = get(&format!("{base}{NODE}/desired"));
    let desired: Value = serde_json::from_str(&desired).expect("JSON");
    assert_eq!(status, 200);
    assert_eq!(desired["imagesets"][0]["version"], "2");
    let told = &desired["registries"][0];
    assert_eq!((&told["host"], &told["password"]), (&json!(at.to_string()), &json!("s3cret-word")));
    assert!(told["ca"][0].as_str().expect("ca").contains("BEGIN CERTIFICATE"));
    // Who has this table waits; who has another one, or none although it knows of tables, does not.
    let (version, tag) = (&desired["version"], desired["registries_tag"].as_str().expect("tag"));
    let poll = |tag: &str| get(&format!("{base}{NODE}/desired?after={version}&wait=0{tag}")).0;
    assert_eq!(poll(&format!("&registries={tag}")), 204);
    assert_eq!(poll("&registries=other"), 200);
    assert_eq!(poll("&registries="), 200);
    assert_eq!(poll(""), 204, "an agent that knows of no tables");
    // Nobody else is told.
    for path in ["/v1/nodes", NODE, "/v1/imagesets", "/v1/rolls"] {
        assert!(!get(&format!("{base}{path}")).1.contains("s3cret-word"), "{path}");
    }
    let shown = layercake(dir.path(), &format!("--server {base} node show n1"));
    assert!(!shown.contains("s3cret-word"), "{shown}");
    for entry in fs::read_dir(dir.path().join("data")).expect("data").flatten() {
        let kept = fs::read(entry.path()).unwrap_or_default();
        assert!(!kept.windows(11).any(|part| part == b"s3cret-word"), "{}", entry.path().display());
    }
    stop.send_replace(true);
}

#[test]
fn a_registry_table_that_cannot_be_used_is_named_with_its_file_and_without_its_secret() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("layercake.toml");
    let text = "[server]\nurl = \"http://127.0.0.1:1\"\ndata_dir = \"d\"\nlayer0_dir = \"l\"\n\
                [[registries]]\nhost = \"r:1\"\nca = [\"none.pem\"]\n\
                [[registries]]\nhost = \"*\"\ntoken = \"s3cret-word\"\n";
    fs::write(&path, text).expect("config");
    let error = config::load(&path).expect_err("wrong").to_string();
    assert!(error.contains("section [[registries]]: registry r:1: "), "{error}");
    assert!(error.contains("none.pem: No such file"), "{error}");
    assert!(error.contains("registry *: credentials for all registries"), "{error}");
    assert!(!error.contains("s3cret-word"), "{error}");
}
