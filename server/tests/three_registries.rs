//! One ImageSet through three registries: the embedded one, Debian's docker-registry, and docker-registry behind TLS with a
//! CA of its own and a password. Each takes a push by `layercake`, gives every byte back to skopeo, and a node's agent runs
//! the set from it.
//!
//! Needs root, docker-registry, openssl, htpasswd, skopeo and busybox-static, and the agent's program beside ours. Loopback
//! only.

#[path = "harness/debian.rs"]
mod debian;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use debian::DebianRegistry;
use protocol::ids::Digest;
use protocol::oci;
use protocol::oci::unpacked::Unpacked;
use protocol::registries::{RegistryEntry, RegistryTable, Secret};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use server::registry::{RegistryStore, router};

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);
/// What the set's program says.
const WORDS: &str = "the set runs";

/// Where a registry is, and how one gets in.
struct Way {
    address: String,
    /// CA and `USER:PASSWORD`; plain HTTP and nobody without.
    guarded: Option<(PathBuf, String)>,
}

/// The agent of a node that has only ever heard of this registry, in a mount namespace of its own.
struct Node {
    agent: Child,
    run_dir: PathBuf,
}

impl Node {
    fn start(dir: &Path, way: &Way, reference: &str) -> Self {
        let (run_dir, config_dir) = (dir.join("run"), dir.join("config"));
        fs::create_dir_all(&config_dir).expect("config");
        let mut entry = RegistryEntry { host: way.address.clone(), ..RegistryEntry::default() };
        match &way.guarded {
            None => entry.plain_http = true,
            Some((ca, who)) => {
                let (user, password) = who.split_once(':').expect("user");
                entry.ca = vec![fs::read_to_string(ca).expect("ca")];
                entry.username = Some(user.to_owned());
                entry.password = Some(Secret::new(password));
            }
        }
        let table = RegistryTable { registries: vec![entry] };
        let table = serde_json::to_vec(&table).expect("json");
        fs::write(config_dir.join("registries.json"), table).expect("table");
        let agent = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(program())
            .args(["agent", "--standalone", "--log", "warn", "--imageset", reference, "--run-dir"])
            .arg(&run_dir)
            .arg("--config-dir")
            .arg(&config_dir)
            .spawn()
            .expect("unshare: apt-get install util-linux");
        Self { agent, run_dir }
    }

    #[track_caller]
    fn runs(&self) {
        let log = self.run_dir.join("log/three/app.log");
        let until = Instant::now() + LONG;
        while !fs::read_to_string(&log).is_ok_and(|log| log.contains(WORDS)) {
            assert!(Instant::now() < until, "nothing in {}", log.display());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Node {
    /// The agent first, so that nothing is started again; then what it started, each by its own id.
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let instances = fs::read_dir(self.run_dir.join("containers"));
        for instance in instances.into_iter().flatten().flatten() {
            let monitor = fs::read_to_string(instance.path().join("lock")).unwrap_or_default();
            let monitor = monitor.trim();
            let children = format!("/proc/{monitor}/task/{monitor}/children");
            let children = fs::read_to_string(children).unwrap_or_default();
            for pid in children.split_whitespace().chain([monitor]) {
                if let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
        }
    }
}

/// The agent's program: beside ours, where the whole workspace was built; built here where it was not.
fn program() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_layercake")).with_file_name("layercake-agent");
    if !path.exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "agent"]).stdout(Stdio::null());
        assert!(build.status().expect("cargo").success(), "the agent does not build");
    }
    path
}

fn layercake(dir: &Path, args: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_layercake"));
    command.args(args).arg("--json").current_dir(dir).env("HOME", dir);
    command.env_remove("REGISTRY_AUTH_FILE").env_remove("XDG_RUNTIME_DIR");
    let done = command.output().expect("layercake");
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).expect("JSON")
}

/// Writes the set: a shell that says its words and stays.
fn describe(dir: &Path) {
    fs::create_dir_all(dir.join("rootfs/bin")).expect("rootfs");
    fs::copy("/bin/busybox", dir.join("rootfs/bin/sh")).expect("apt-get install busybox-static");
    let script = format!("echo {WORDS}; while :; do sleep 1; done");
    let set = format!(
        "name = \"three\"\nversion = \"1\"\n[[image]]\nname = \"app\"\nsource = \"dir:rootfs\"\n\
         [[container]]\nname = \"app\"\nimage = \"app\"\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]\n"
    );
    fs::write(dir.join("imageset.toml"), set).expect("set");
}

#[track_caller]
fn push_pull_and_run(way: &Way) {
    let dir = tempfile::tempdir().expect("dir");
    let dir = dir.path();
    describe(dir);
    let at = &way.address;
    let to = match way.guarded {
        Some(_) => format!("https://{at}/site"),
        None => format!("http://{at}/site"),
    };
    let mut push = vec!["imageset", "push", "imageset.toml", "--to", &to];
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "--quiet", "--all"]);
    let ca_text;
    match &way.guarded {
        Some((ca, who)) => {
            let (user, password) = who.split_once(':').expect("user");
            let auth =
                json!({ "auths": { at.as_str(): { "username": user, "password": password } } });
            fs::write(dir.join("auth.json"), auth.to_string()).expect("auth");
            ca_text = ca.display().to_string();
            push.extend(["--ca", &ca_text, "--authfile", "auth.json"]);
            let certificates = dir.join("certs");
            fs::create_dir_all(&certificates).expect("certs");
            fs::copy(ca, certificates.join("ca.crt")).expect("ca");
            skopeo.arg("--src-cert-dir").arg(certificates).arg("--src-creds").arg(who);
        }
        None => drop(skopeo.arg("--src-tls-verify=false")),
    }
    let pushed = layercake(dir, &push);
    let digest: Digest = pushed["digest"].as_str().expect("digest").parse().expect("digest");

    skopeo.arg(format!("docker://{at}/site/three:1"));
    let done = skopeo.arg(format!("oci:{}/copy:1", dir.display())).output();
    let done = done.expect("skopeo: apt-get install skopeo");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let blob = |digest: &Digest| {
        let bytes = fs::read(dir.join("copy/blobs/sha256").join(digest.hex())).expect("blob");
        assert_eq!(Digest::of(&bytes), *digest);
        bytes
    };
    let index = oci::parse_index(&blob(&digest)).expect("index");
    for entry in &index.manifests {
        let manifest = oci::parse_manifest(&blob(&entry.digest)).expect("manifest");
        blob(&manifest.config.digest);
        for layer in &manifest.layers {
            blob(&layer.digest);
        }
    }
    let image = oci::parse_manifest(&blob(&index.manifests[1].digest)).expect("manifest");
    let unpacked = Unpacked::of(&image.layers[0]).expect("what it takes unpacked");
    let busybox = fs::metadata("/bin/busybox").expect("busybox").len();
    let expected = Unpacked { bytes: busybox.next_multiple_of(4096), entries: 2 };
    assert_eq!(unpacked, expected, "bin and bin/sh");

    // No scheme: how it is spoken to, the table says.
    let node = Node::start(dir, way, &format!("{at}/site/three:1@{digest}"));
    node.runs();
}

#[test]
fn the_embedded_registry_takes_gives_and_feeds_a_node() {
    let store = tempfile::tempdir().expect("dir");
    let app = router(RegistryStore::open(store.path()).expect("store"));
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    listener.set_nonblocking(true).expect("nonblocking");
    let address = listener.local_addr().expect("address").to_string();
    // It ends with the process.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("runtime").block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            axum::serve(listener, app).await.expect("serve");
        });
    });
    push_pull_and_run(&Way { address, guarded: None });
}

#[test]
fn docker_registry_takes_gives_and_feeds_a_node() {
    let registry = DebianRegistry::open();
    push_pull_and_run(&Way { address: registry.address.to_string(), guarded: None });
}

#[test]
fn docker_registry_with_tls_a_ca_and_a_password_takes_gives_and_feeds_a_node() {
    let registry = DebianRegistry::guarded("ann", "s3cret-word");
    let guarded = Some((registry.ca.clone(), "ann:s3cret-word".to_owned()));
    push_pull_and_run(&Way { address: registry.address.to_string(), guarded });
}
