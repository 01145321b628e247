//! The `layercake imageset` commands against registries: Debian's docker-registry, plain and with TLS and a password,
//! and ours, also behind a token service. Loopback only.
//!
//! Needs docker-registry, skopeo, openssl, htpasswd, mmdebstrap, mksquashfs and mkfs.erofs; says how to install them where they are missing.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use protocol::ids::Digest;
use serde_json::{Value, json};
use server::registry::{RegistryStore, router};

#[path = "imageset/cutting_proxy.rs"]
mod cutting_proxy;
#[path = "harness/debian.rs"]
mod debian_registry;
#[path = "imageset/sources.rs"]
mod sources;

use cutting_proxy::CuttingProxy;
use debian_registry::DebianRegistry;

/// Bytes of the file that makes a set's layer large; not compressible.
const NOISE: usize = 3 << 20;

/// A directory with a set in it, and no credentials of the machine's.
struct Desk {
    dir: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Self { dir: tempfile::tempdir().expect("dir") };
        fs::create_dir_all(desk.path("rootfs/etc")).expect("rootfs");
        let mut seed = 1_u64;
        let noise = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed.to_be_bytes()[0]
        });
        fs::write(desk.path("rootfs/noise"), noise.take(NOISE).collect::<Vec<u8>>()).expect("file");
        desk.version("1");
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn version(&self, version: &str) {
        fs::create_dir_all(self.path("etc/etc")).expect("etc");
        fs::write(self.path("etc/etc/version"), version).expect("file");
        let toml = format!(
            "name = \"demo\"\nversion = \"{version}\"\n[[image]]\nname = \"app\"\nsource = [\"dir:rootfs\", \"dir:etc\"]\n\
             cmd = [\"/app\"]\n[[container]]\nname = \"app\"\nimage = \"app\"\n"
        );
        fs::write(self.path("imageset.toml"), toml).expect("file");
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_layercake"));
        command.arg("imageset").args(line.split(' ')).current_dir(self.dir.path());
        command.env("HOME", self.dir.path()).env_remove("REGISTRY_AUTH_FILE");
        command.env_remove("XDG_RUNTIME_DIR").env_remove("XDG_CONFIG_HOME");
        command.env_remove("DOCKER_CONFIG");
        command
    }

    #[track_caller]
    fn json(&self, line: &str) -> Value {
        ok(&mut self.command(&format!("{line} --json")))
    }

    #[track_caller]
    fn refused(&self, line: &str) -> String {
        failed(&mut self.command(line))
    }
}

#[track_caller]
fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

#[track_caller]
fn ok(command: &mut Command) -> Value {
    let done = output(command);
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).expect("JSON")
}

#[track_caller]
fn failed(command: &mut Command) -> String {
    let done = output(command);
    assert_eq!(done.status.code(), Some(1), "{command:?}");
    String::from_utf8(done.stderr).expect("text")
}

/// Our registry on a port of its own; it ends with the process.
fn embedded(dir: &Path, guard: Option<SocketAddr>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    listener.set_nonblocking(true).expect("nonblocking");
    let address = listener.local_addr().expect("address");
    let mut app = router(RegistryStore::open(dir).expect("store"));
    if let Some(tokens) = guard {
        app = app.layer(axum::middleware::from_fn(move |request, next| ask(tokens, request, next)));
    }
    serve(listener, app);
    address
}

fn serve(listener: TcpListener, app: axum::Router) {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("runtime").block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            axum::serve(listener, app).await.expect("serve");
        });
    });
}

async fn ask(tokens: SocketAddr, request: Request, next: Next) -> Response {
    if request.headers().get(AUTHORIZATION).is_some_and(|value| value == "Bearer of-ann") {
        return next.run(request).await;
    }
    let challenge = format!(
        "Bearer realm=\"http://{tokens}/token\",service=\"lab\",scope=\"repository:demo:pull,push\""
    );
    (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, challenge)]).into_response()
}

/// Gives a token to ann, whose password is `secret`.
fn token_service() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    listener.set_nonblocking(true).expect("nonblocking");
    let address = listener.local_addr().expect("address");
    let give = async |headers: HeaderMap| match headers.get(AUTHORIZATION) {
        Some(value) if value == "Basic YW5uOnNlY3JldA==" => {
            axum::Json(json!({ "token": "of-ann" })).into_response()
        }
        _ => StatusCode::UNAUTHORIZED.into_response(),
    };
    serve(listener, axum::Router::new().route("/token", axum::routing::get(give)));
    address
}

#[test]
fn a_registry_with_its_own_ca_and_a_password_is_used_with_credentials_from_anywhere() {
    let desk = Desk::new();
    let registry = DebianRegistry::guarded("ann", "secret");
    let (at, ca) = (registry.address, registry.ca.display().to_string());
    let entry = json!({ "auths": { at.to_string(): { "auth": "YW5uOnNlY3JldA==" } } });
    let place = |file: &str, content: &Value| {
        let file = desk.path(file);
        fs::create_dir_all(file.parent().expect("parent")).expect("dir");
        fs::write(file, content.to_string()).expect("write");
    };
    place("auth.json", &entry);
    place("run/containers/auth.json", &entry);
    place("docker/config.json", &entry);
    place("wrong.json", &json!({ "auths": { at.to_string(): { "auth": "YW5uOndyb25n" } } }));
    place("helped/config.json", &json!({ "credHelpers": { at.to_string(): "lab" } }));
    let helper = desk.path("bin/docker-credential-lab");
    fs::create_dir_all(desk.path("bin")).expect("bin");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = get ] && read -r server || [ \"$server\" = {at} ] || exit 1\n\
         echo '{{\"ServerURL\":\"{at}\",\"Username\":\"ann\",\"Secret\":\"secret\"}}'\n"
    );
    fs::write(&helper, script).expect("helper");
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).expect("mode");

    let push = format!("push imageset.toml --to {at} --ca {ca}");
    let pushed = desk.json(&format!("{push} --authfile auth.json"));
    assert!(pushed["bytes_sent"].as_u64().expect("number") > NOISE as u64);
    let list = format!("list {at}/demo --ca {ca} --json");
    for (variable, value) in [
        ("REGISTRY_AUTH_FILE", "auth.json"),
        ("XDG_RUNTIME_DIR", "run"),
        ("DOCKER_CONFIG", "docker"),
        ("DOCKER_CONFIG", "helped"),
    ] {
        let mut command = desk.command(&list);
        let path =
            format!("{}:{}", desk.path("bin").display(), std::env::var("PATH").expect("PATH"));
        let listed = ok(command.env(variable, desk.path(value)).env("PATH", path));
        assert_eq!(listed[0]["digest"], pushed["digest"], "{variable}={value}");
    }
    let error = desk.refused(&format!("{push} --authfile wrong.json"));
    assert!(error.contains(&format!("registry https://{at}/v2/demo")), "{error}");
    assert!(error.contains("refuses access"), "{error}");
    let error = desk.refused(&push);
    assert!(error.contains("refuses access"), "{error}");
    let error = desk.refused(&format!("list {at}/demo --authfile auth.json"));
    assert!(error.contains("cannot be reached") && error.contains("ertificate"), "{error}");

    let access = format!("--ca {ca} --authfile auth.json");
    desk.json("keygen site");
    let signed = desk.json(&format!("sign {at}/demo:1 --key site.key {access}"));
    assert_eq!(signed["added"].as_array().expect("added").len(), 3);
    let verify = format!("verify {at}/demo:1 --key site.pem");
    assert_eq!(desk.json(&format!("{verify} {access}"))["signed"], true);
    let error = desk.refused(&format!("{verify} --ca {ca} --authfile wrong.json"));
    assert!(error.contains("refuses access"), "{error}");
    let error = desk.refused(&format!("{verify} --authfile auth.json"));
    assert!(error.contains("cannot be reached") && error.contains("ertificate"), "{error}");

    let pulled = desk.json(&format!("pull {at}/demo:1 layout {access}"));
    assert_eq!(pulled["digest"], pushed["digest"]);
    let seen = desk.json("inspect layout");
    assert_eq!(seen["digest"], pushed["digest"]);
    assert_eq!(seen["images"][0]["config"]["Cmd"][0], "/app");
    assert_eq!(seen["images"][0]["platform"], "linux/amd64");
    assert_eq!(seen["images"][0]["layers"].as_array().expect("layers").len(), 2);
}

#[test]
fn a_registry_with_a_token_service_gives_and_takes() {
    let (desk, store) = (Desk::new(), tempfile::tempdir().expect("dir"));
    let at = embedded(store.path(), Some(token_service()));
    let auth = json!({ "auths": { at.to_string(): { "username": "ann", "password": "secret" } } });
    fs::write(desk.path("auth.json"), auth.to_string()).expect("write");
    let options = "--plain-http --authfile auth.json";
    let pushed = desk.json(&format!("push imageset.toml --to {at} {options}"));
    let pulled = desk.json(&format!("pull {at}/demo:1 layout {options}"));
    assert_eq!(pulled["digest"], pushed["digest"]);
    desk.json("keygen site");
    desk.json(&format!("sign {at}/demo:1 --key site.key {options}"));
    let verified = desk.json(&format!("verify {at}/demo:1 --key site.pem {options}"));
    assert_eq!(verified["signed"], true);
    let error = desk.refused(&format!("push imageset.toml --to {at} --plain-http"));
    assert!(error.contains("refuses access"), "{error}");
    let error = desk.refused(&format!("sign {at}/demo:1 --key site.key --plain-http"));
    assert!(error.contains("refuses access"), "{error}");
}

#[test]
fn a_copy_is_the_same_byte_for_byte_with_its_signatures() {
    let desk = Desk::new();
    let registry = DebianRegistry::open();
    let at = registry.address;
    let built = desk.json("build imageset.toml --out layout");
    let digest = built["digest"].as_str().expect("digest").to_owned();
    let signature_tag = sign(&desk.path("layout"), &digest);

    let copied = desk.json(&format!("copy layout http://{at}/demo"));
    assert_eq!(copied["signatures"], 1);
    assert_eq!(copied["bytes_there"], 0);
    let moved = copied["bytes_moved"].as_u64().expect("number");
    let again = desk.json(&format!("copy oci:layout:1 {at}/demo:latest --plain-http"));
    assert_eq!((&again["bytes_moved"], &again["bytes_there"]), (&json!(0), &json!(moved)));
    // Docker's registry takes blobs over from its other repositories: nothing moves.
    let mounted = desk.json(&format!("copy {at}/demo:latest {at}/team/demo:new --plain-http"));
    assert_eq!((&mounted["bytes_moved"], &mounted["bytes_there"]), (&json!(0), &json!(moved)));

    let layout = desk.path("layout");
    for tag in ["1", "new", "1-app", &signature_tag] {
        let remote = format!("docker://{at}/team/demo:{tag}");
        let mut skopeo = Command::new("skopeo");
        let raw = output(skopeo.args(["inspect", "--raw", "--tls-verify=false", &remote])).stdout;
        let name = Digest::of(&raw).hex();
        let original = fs::read(layout.join("blobs/sha256").join(name));
        assert_eq!(original.expect("the layout has it"), raw, "{tag}");
    }
    let back = desk.json(&format!("pull {at}/team/demo:new back --plain-http"));
    assert_eq!((&back["digest"], &back["signatures"]), (&json!(digest), &json!(1)));
    let names = |dir: &Path| -> Vec<String> {
        let list = fs::read_dir(dir.join("blobs/sha256")).expect("list");
        let mut names: Vec<String> = list
            .map(|entry| entry.expect("entry").file_name().into_string().expect("name"))
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&desk.path("back")), names(&layout));
    assert_eq!(desk.json("inspect back")["signed"], true);
    let nothing = desk.json(&format!("pull {at}/team/demo:new back --plain-http"));
    assert_eq!(nothing["bytes_moved"], 0);
}

/// Puts an object of cosign's layout beside the index of a layout. Nobody verifies it here.
fn sign(layout: &Path, digest: &str) -> String {
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).expect("blob");
        json!({ "digest": digest, "size": bytes.len() })
    };
    let with = |mut descriptor: Value, media_type: &str| {
        descriptor["mediaType"] = media_type.into();
        descriptor
    };
    let config = with(put(b"{\"x\":1}"), "application/vnd.oci.image.config.v1+json");
    let payload = with(put(b"payload"), "application/vnd.dev.cosign.simplesigning.v1+json");
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [payload],
    });
    let tag = format!("{}.sig", digest.replace(':', "-"));
    let mut entry = with(put(manifest.to_string().as_bytes()), media_type);
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    let path = layout.join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).expect("index")).expect("JSON");
    index["manifests"].as_array_mut().expect("manifests").push(entry);
    fs::write(path, index.to_string()).expect("index");
    tag
}

#[test]
fn a_diff_names_the_files_that_changed_between_versions() {
    let desk = Desk::new();
    let registry = DebianRegistry::open();
    let at = registry.address;
    desk.json(&format!("push imageset.toml --to http://{at}"));
    desk.version("2.0");
    fs::write(desk.path("etc/etc/new"), "fresh").expect("file");
    let second = desk.json(&format!("push imageset.toml --to http://{at}"));
    assert!(second["bytes_skipped"].as_u64().expect("number") > NOISE as u64);
    let diff = desk.json(&format!("diff {at}/demo:1 {at}/demo:2.0 --plain-http"));
    let image = &diff["images"][0];
    assert_eq!((&image["layers_kept"], &image["change"]), (&json!(1), &json!("changed")));
    assert_eq!(
        image["entries"],
        json!([
            { "path": "/etc/new", "change": "added", "after": 5 },
            { "path": "/etc/version", "change": "changed", "before": 1, "after": 3 },
        ])
    );
    assert!(diff["bytes_to_fetch"].as_u64().expect("number") < 10_000);
    assert_eq!(diff["description_changed"], false);
    let text = output(&mut desk.command(&format!("diff http://{at}/demo:1 http://{at}/demo:2.0")));
    let text = String::from_utf8(text.stdout).expect("text");
    assert!(text.contains("  ~ /etc/version  1 B -> 3 B\n"), "{text}");
}

#[test]
fn mount_forms_are_made_shown_signed_and_copied_like_everything_else() {
    let desk = Desk::new();
    let forms = "--mount squashfs --mount erofs-plain";
    let built = desk.json(&format!("build imageset.toml --out layout {forms}"));
    let again = desk.json(&format!("build imageset.toml --out again {forms}"));
    assert_eq!(built["digest"], again["digest"], "two builds are the same");
    let plain = desk.json("build imageset.toml --out plain");
    assert_ne!(built["digest"], plain["digest"]);
    let (with, without) = (desk.json("inspect layout"), desk.json("inspect plain"));
    let image = |seen: &Value| seen["images"][0].clone();
    assert_eq!(image(&with)["digest"], image(&without)["digest"], "the tar form is the same");
    assert_eq!(image(&without).get("mounts"), None);
    let mounts = image(&with)["mounts"].clone();
    assert_eq!((&mounts[0]["form"], &mounts[1]["form"]), (&json!("squashfs"), &json!("erofs")));
    let bytes = mounts[0]["bytes"].as_u64().expect("number");
    assert!(bytes > NOISE as u64 && bytes < 2 * NOISE as u64, "{mounts}");
    let text = String::from_utf8(output(&mut desk.command("inspect layout")).stdout).expect("text");
    assert!(text.contains("mount: squashfs") && text.contains("mount: erofs"), "{text}");

    let dir = desk.path("registry");
    let at = embedded(&dir, None);
    let pushed = desk.json(&format!("push imageset.toml --to http://{at} {forms}"));
    assert_eq!(pushed["digest"], built["digest"]);
    desk.json("keygen site");
    let signed = desk.json(&format!("sign http://{at}/demo:1 --key site.key"));
    // The description's, the image's, two forms', and the index.
    assert_eq!(signed["added"].as_array().map(Vec::len), Some(5), "{signed}");
    desk.json(&format!("verify http://{at}/demo:1 --key site.pem"));
    let copied = desk.json(&format!("pull {at}/demo:1 back --plain-http"));
    assert_eq!((&copied["digest"], &copied["signatures"]), (&built["digest"], &json!(5)));
    assert_eq!(desk.json("inspect back")["images"], with["images"]);

    desk.version("2");
    desk.json(&format!("build imageset.toml --out two {forms}"));
    let diff = desk.json("diff layout two");
    assert!(diff["bytes_to_fetch"].as_u64().expect("number") < 100_000, "{diff}");
    for form in ["squashfs", "erofs"] {
        let bytes = diff["mount_bytes_to_fetch"][form].as_u64().expect("number");
        assert!(bytes > NOISE as u64, "a mount form is fetched whole: {diff}");
    }
    let error = desk.refused("build imageset.toml --out x --mount ext4");
    assert!(error.contains("`ext4` is not a mount form"), "{error}");
    let error = desk.refused("build imageset.toml --out x --mount erofs --mount erofs-plain");
    assert!(error.contains("there can be one erofs"), "{error}");
    let path = desk.path("nothing").display().to_string();
    let mut command = desk.command("build imageset.toml --out x --mount erofs");
    let error = failed(command.env("PATH", path));
    assert!(error.contains("apt-get install erofs-utils"), "{error}");
    assert!(!desk.path("x").exists());
}

#[test]
fn a_push_that_was_cut_goes_on_where_it_broke_off() {
    let (desk, store) = (Desk::new(), tempfile::tempdir().expect("dir"));
    let half = NOISE as u64 / 2;
    let proxy = CuttingProxy::start(embedded(store.path(), None), half);
    let pushed = desk.json(&format!("push imageset.toml --to http://{}", proxy.address));
    assert!(proxy.has_cut());
    let sent = pushed["bytes_sent"].as_u64().expect("number");
    // A blob that began anew would have crossed one and a half times.
    assert!(proxy.sent() < sent + half / 2, "{} bytes for {sent}", proxy.sent());
    let pulled = desk.json(&format!("pull http://{}/demo:1 layout", proxy.address));
    assert_eq!(pulled["digest"], pushed["digest"]);
}

/// The uploads of a registry: those that clients have asked for, and those of them that it has forgotten.
#[derive(Clone, Default)]
struct Uploads(Arc<Mutex<(BTreeSet<String>, BTreeSet<String>)>>);

impl Uploads {
    fn forget(&self) {
        let (seen, forgotten) = &mut *self.0.lock().expect("lock");
        forgotten.append(seen);
    }

    async fn ask(self, request: Request, next: Next) -> Response {
        let path = request.uri().path().to_owned();
        if path.contains("/blobs/uploads/") && request.method() != Method::POST {
            let (seen, forgotten) = &mut *self.0.lock().expect("lock");
            if forgotten.contains(&path) {
                let error = json!({ "errors": [{ "code": "BLOB_UPLOAD_UNKNOWN", "message": "" }] });
                return (StatusCode::NOT_FOUND, axum::Json(error)).into_response();
            }
            seen.insert(path);
        }
        next.run(request).await
    }
}

#[test]
fn a_registry_that_forgets_a_cut_upload_gets_it_anew() {
    let (desk, store) = (Desk::new(), tempfile::tempdir().expect("dir"));
    let half = NOISE as u64 / 2;
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    listener.set_nonblocking(true).expect("nonblocking");
    let address = listener.local_addr().expect("address");
    let uploads = Uploads::default();
    let guard = uploads.clone();
    let app = router(RegistryStore::open(store.path()).expect("store"))
        .layer(axum::middleware::from_fn(move |request, next| guard.clone().ask(request, next)));
    serve(listener, app);
    let forgetful = uploads.clone();
    // Before the client can notice the cut.
    let proxy = CuttingProxy::start_and(address, half, move || forgetful.forget());
    let pushed = desk.json(&format!("push imageset.toml --to http://{}", proxy.address));
    assert!(proxy.has_cut());
    assert!(!uploads.0.lock().expect("lock").1.is_empty(), "no upload was under way");
    let sent = pushed["bytes_sent"].as_u64().expect("number");
    // The half that was forgotten crossed again.
    assert!(proxy.sent() >= sent + half * 9 / 10, "{} bytes for {sent}", proxy.sent());
    let pulled = desk.json(&format!("pull http://{}/demo:1 layout", proxy.address));
    assert_eq!(pulled["digest"], pushed["digest"]);
}
