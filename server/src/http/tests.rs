//! The routes over a real listener: a whole server on 127.0.0.1, spoken to by an HTTP client.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::config::Config;
use crate::serve::Server;

const REPORT: &str = include_str!("../../../protocol/golden/v1/observed.json");
const NODE: &str = "node-525400000001";

/// A server in a thread of its own, stopped when dropped.
struct Lab {
    base: String,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    dir: TempDir,
}

impl Lab {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("vmlinuz"), b"kernel").expect("vmlinuz");
        std::fs::write(dir.path().join("initramfs.img"), vec![7; 3_000_000]).expect("initramfs");
        let path = dir.path().display();
        let text = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\nurl = \"http://127.0.0.1:1\"\n\
             data_dir = \"{path}/data\"\nlayer0_dir = \"{path}\"\n\
             [boot]\noverlays = [\"{path}/site.cpio\"]\n\
             [[node]]\nid = \"n1\"\nmac = \"52:54:00:00:00:02\"\n"
        );
        let config = Config::parse(&text, Path::new("test.toml")).expect("config");
        let (stop, stopping) = watch::channel(false);
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("runtime").block_on(async {
                let server = Server::open(config).await.expect("open");
                tell.send(server.address().expect("address")).expect("tell");
                server.run(stopping).await.expect("run");
            });
        });
        let base = format!("http://{}", told.recv().expect("address"));
        Self { base, stop, thread: Some(thread), dir }
    }

    /// Status, headers and body of a request; the body goes out as it is.
    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(20)))
            .build()
            .new_agent();
        let mut request =
            ureq::http::Request::builder().method(method).uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut answer = if body.is_empty() {
            agent.run(request.body(()).expect("request"))
        } else {
            agent.run(request.body(body.to_owned()).expect("request"))
        }
        .expect("answer");
        let header = |name: &str| {
            let value = answer.headers().get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or("").to_owned()
        };
        let (length, range) = (header("content-length"), header("content-range"));
        let status = answer.status().as_u16();
        let bytes = answer.body_mut().with_config().limit(1 << 30).read_to_vec().expect("body");
        Answer { status, length, range, bytes }
    }

    fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], "")
    }

    fn boot(&self) -> Vec<String> {
        let node = self.get(&format!("/v1/nodes/{NODE}")).json();
        let phases = node["boot"].as_array().expect("boot").iter();
        phases.map(|time| time["phase"].as_str().expect("phase").to_owned()).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Answer {
    status: u16,
    length: String,
    range: String,
    bytes: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).expect("JSON")
    }

    /// Status, code and message of an error body.
    #[track_caller]
    fn is_error(&self, status: u16, code: &str, message: &str) {
        let error = &self.json()["error"];
        assert_eq!((self.status, error["code"].as_str()), (status, Some(code)), "{error}");
        let found = error["message"].as_str().expect("message");
        assert!(found.contains(message), "{found}");
    }
}

#[test]
fn a_machine_boots_registers_and_its_phases_are_stamped() {
    let lab = Lab::start();
    let script = lab.get("/boot/ipxe?mac=52:54:00:00:00:01&uuid=4c4c4544");
    assert_eq!(script.status, 200);
    let text = String::from_utf8(script.bytes).expect("text");
    assert!(text.starts_with("#!ipxe\n") && text.contains(&format!("layercake.node={NODE}")));
    assert_eq!(lab.get("/boot/vmlinuz?mac=52:54:00:00:00:01").bytes, b"kernel");
    assert_eq!(lab.boot(), ["ipxe"]);

    let part = ("range", "bytes=0-9");
    let first = lab.ask("GET", "/boot/initramfs.img?mac=52:54:00:00:00:01", &[part], "");
    assert_eq!((first.status, first.range.as_str()), (206, "bytes 0-9/3000000"));
    assert_eq!((first.length.as_str(), first.bytes.len()), ("10", 10));
    assert_eq!(lab.boot(), ["ipxe"], "a part is not the whole");
    let whole = lab.get("/boot/initramfs.img?mac=52:54:00:00:00:01");
    assert_eq!((whole.length.as_str(), whole.bytes.len()), ("3000000", 3_000_000));
    assert_eq!(lab.boot(), ["ipxe", "kernel"]);

    let report = REPORT.replace("\"n1\"", &format!("\"{NODE}\""));
    let path = format!("/v1/nodes/{NODE}/observed");
    assert_eq!(lab.ask("PUT", &path, &[], &report).status, 204);
    assert_eq!(lab.boot(), ["ipxe", "kernel", "init", "running"]);
    let node = lab.get(&format!("/v1/nodes/{NODE}")).json();
    assert_eq!(node["uuid"], "4c4c4544-0043-3010-8052-b4c04f564231");
    assert_eq!(node["observed"]["imagesets"][0]["state"], "current");
    let why = lab.get(&format!("/v1/nodes/{NODE}/why")).json();
    let expected = "is on its way: hello:2 is not wanted any more";
    assert_eq!(why["answer"], format!("{NODE} {expected}"));
    let new = lab.get("/v1/nodes/n1/why").json();
    assert_eq!(new["state"], "never_seen", "{new}");

    // Its hardware comes with one report, and is kept beside the next ones.
    let hardware = format!("/v1/nodes/{NODE}/hardware");
    assert_eq!(lab.get(&hardware).json(), Value::Null);
    let mut full: Value = serde_json::from_str(&report).expect("golden");
    full["hardware"] = json!({"kernel": "6.1", "memory": 7});
    assert_eq!(lab.ask("PUT", &path, &[], &full.to_string()).status, 204);
    assert_eq!(lab.ask("PUT", &path, &[], &report).status, 204);
    let facts = lab.get(&hardware).json();
    assert_eq!((&facts["node"], &facts["hardware"]["memory"]), (&json!(NODE), &json!(7)));
    assert!(lab.get(&format!("/v1/nodes/{NODE}")).json()["observed"]["hardware"].is_null());
    lab.get("/v1/nodes/n9/hardware").is_error(404, "node_not_found", "there is no node n9");
}

#[test]
fn files_that_are_not_there_and_ranges_outside_are_errors() {
    let lab = Lab::start();
    let outside = lab.ask("GET", "/boot/vmlinuz", &[("range", "bytes=6-")], "");
    assert_eq!((outside.status, outside.range.as_str()), (416, "bytes */6"));
    std::fs::remove_file(lab.dir.path().join("vmlinuz")).expect("remove");
    lab.get("/boot/vmlinuz").is_error(404, "no_file", "vmlinuz does not exist");
    lab.get("/boot/ipxe.efi").is_error(404, "no_loader", "tftp.root");
    lab.get("/boot/overlays/site.cpio").is_error(404, "no_file", "site.cpio does not exist");
    std::fs::write(lab.dir.path().join("site.cpio"), b"070701").expect("overlay");
    assert_eq!(lab.get("/boot/overlays/site.cpio").bytes, b"070701");
    lab.get("/boot/overlays/site.cpio.sig").is_error(404, "no_file", "site.cpio.sig");
    std::fs::write(lab.dir.path().join("site.cpio.sig"), b"MEQ=").expect("signature");
    assert_eq!(lab.get("/boot/overlays/site.cpio.sig").bytes, b"MEQ=");
    lab.get("/boot/overlays/other.cpio.sig").is_error(404, "no_overlay", "boot.overlays");
    lab.get("/boot/overlays/vmlinuz").is_error(404, "no_overlay", "boot.overlays");
    lab.get("/boot/overlays/..%2Fsite.cpio").is_error(404, "no_overlay", "boot.overlays");
    let script = lab.get("/boot/ipxe?mac=52:54:00:00:00:02");
    let text = String::from_utf8_lossy(&script.bytes).into_owned();
    assert!(text.contains("initrd --name site.cpio http://127.0.0.1:1/boot/overlays/"), "{text}");
}

#[test]
fn what_is_unknown_or_malformed_is_said_in_the_form_of_the_api() {
    let lab = Lab::start();
    lab.get("/nothing").is_error(404, "no_route", "no such path: /nothing");
    lab.ask("DELETE", "/v1/nodes", &[], "").is_error(405, "no_method", "does not take DELETE");
    lab.get("/v1/nodes/n9").is_error(404, "node_not_found", "there is no node n9");
    lab.get("/v1/nodes/N_9").is_error(400, "malformed", "`N_9` is not a valid node id");
    lab.get("/v1/rolls/7").is_error(404, "roll_not_found", "there is no roll 7");
    lab.get("/v1/rolls/x").is_error(400, "malformed", "`x` is not the number of a roll");
    lab.get("/boot/ipxe").is_error(400, "malformed", "missing field `mac`");
    lab.get("/boot/ipxe?mac=zz").is_error(400, "malformed", "is not a valid MAC address");
    let observed = "/v1/nodes/n1/observed";
    lab.ask("PUT", observed, &[], "{").is_error(400, "malformed", "EOF while parsing");
    let deep = format!("{{\"x\":{}", "[".repeat(100_000));
    lab.ask("PUT", observed, &[], &deep).is_error(400, "malformed", "EOF while parsing a list");
    let report = REPORT.replace("\"n1\"", "\"n2\"");
    lab.ask("PUT", observed, &[], &report).is_error(400, "other_node", "of node n2, not of n1");
    let big = "x".repeat(super::MAX_BODY_BYTES + 1);
    lab.ask("PUT", observed, &[], &big).is_error(413, "too_large", "larger than the 1048576");
    let roll = json!({"nodes": ["n1", "a", "b"], "imageset": "hello:1"}).to_string();
    lab.ask("POST", "/v1/rolls", &[], &roll).is_error(404, "node_not_found", "no node a, b");
    let roll = json!({"nodes": ["n1"], "imageset": "hello"}).to_string();
    lab.ask("POST", "/v1/rolls", &[], &roll).is_error(400, "malformed", "expected NAME:VERSION");
    let roll = json!({"nodes": ["all"], "imageset": "hello:1"}).to_string();
    let missing = "there is no ImageSet hello:1";
    lab.ask("POST", "/v1/rolls", &[], &roll).is_error(404, "imageset_not_found", missing);
    assert_eq!(lab.get("/v1/nodes/n1/desired").json()["version"], 1, "nothing was changed");
}

#[test]
fn a_power_request_wakes_the_long_poll_and_names_the_boot() {
    let lab = Lab::start();
    let power = json!({"action": "reboot"}).to_string();
    let early = lab.ask("POST", "/v1/nodes/n1/power", &[], &power);
    early.is_error(409, "not_reported", "has not reported");
    assert_eq!(lab.ask("PUT", "/v1/nodes/n1/observed", &[], REPORT).status, 204);
    let poll = "/v1/nodes/n1/desired?after=1&wait=60";
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| lab.get(poll));
        assert_eq!(lab.ask("POST", "/v1/nodes/n1/power", &[], &power).status, 204);
        let woken = waiting.join().expect("poll").json();
        assert_eq!((&woken["version"], &woken["power"]["action"]), (&json!(2), &json!("reboot")));
        assert_eq!(woken["power"]["boot_id"], "0b9e6c3a-8c43-4c7e-9f4b-0d7f1f9d2a11");
    });
}

#[test]
fn a_long_poll_without_news_ends_in_time_and_with_the_server() {
    let lab = Lab::start();
    assert_eq!(lab.get("/v1/nodes/n1/desired?after=1&wait=0").status, 204);
    assert_eq!(lab.get("/v1/nodes/n1/desired?after=9").status, 200, "any other version is news");
    let seen = || lab.get("/v1/nodes/n1").json()["last_seen_ms"].as_u64();
    let (before, start) = (seen(), Instant::now());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| lab.get("/v1/nodes/n1/desired?after=1&wait=60").status);
        // The poll has arrived once the node's last_seen has moved.
        while seen() == before && start.elapsed() < Duration::from_secs(5) {
            std::thread::yield_now();
        }
        lab.stop.send_replace(true);
        assert_eq!(waiting.join().expect("poll"), 204);
    });
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}

#[test]
fn changes_from_web_pages_of_another_origin_are_refused() {
    let lab = Lab::start();
    let foreign = [("origin", "http://evil.example")];
    let power = json!({"action": "off"}).to_string();
    let refused = lab.ask("POST", "/v1/nodes/n1/power", &foreign, &power);
    refused.is_error(403, "foreign_origin", "another origin");
    let own = lab.base.clone();
    let same = lab.ask("POST", "/v1/nodes/n1/power", &[("origin", &own)], &power);
    same.is_error(409, "not_reported", "");
    assert_eq!(lab.ask("GET", "/v1/nodes", &foreign, "").status, 200);
}

#[test]
fn a_taken_port_is_named_with_what_to_do() {
    let lab = Lab::start();
    let address = lab.base.trim_start_matches("http://");
    let text = format!(
        "[server]\nlisten = \"{address}\"\nurl = \"http://h:1\"\ndata_dir = \"d\"\nlayer0_dir = \"d\"\n"
    );
    let config = Config::parse(&text, Path::new("test.toml")).expect("config");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let error = runtime.expect("runtime").block_on(Server::open(config)).expect_err("taken");
    let (_, port) = address.split_once(':').expect("port");
    let expected = format!(
        "TCP port {port} on 127.0.0.1 is in use; stop the program that has it (`ss -lnp` shows it) \
         or change server.listen in the config"
    );
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_pushed_imageset_is_listed_rolled_and_done_when_the_node_says_so() {
    let lab = Lab::start();
    let set = tempfile::tempdir().expect("dir");
    std::fs::create_dir(set.path().join("rootfs")).expect("rootfs");
    std::fs::write(set.path().join("rootfs/motd"), "hello").expect("file");
    let description = "name = \"hello\"\nversion = \"1\"\n[[image]]\nname = \"hello\"\n\
        source = \"dir:rootfs\"\nentrypoint = [\"/x\"]\n[[container]]\nname = \"hello\"\nimage = \"hello\"\n";
    let file = set.path().join("imageset.toml");
    std::fs::write(&file, description).expect("description");
    let source = imagebuilder::description::load(&file).expect("load");
    let out = set.path().join("layout");
    let built = imagebuilder::build::to_layout_blocking(&source, &out).expect("build");
    let reference = format!("{}/hello:1", lab.base).parse().expect("reference");
    let options = imagebuilder::client::Options::default();
    let quiet = std::sync::Arc::new(|_| ());
    let push = imagebuilder::push::push(&built, &reference, &options, quiet);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let digest = runtime.expect("runtime").block_on(push).expect("push").digest;

    let listed = lab.get("/v1/imagesets").json();
    assert_eq!(listed.as_array().expect("list").len(), 1, "image tags are no sets: {listed}");
    assert_eq!((&listed[0]["version"], &listed[0]["digest"]), (&json!("1"), &json!(digest)));
    for imageset in ["hello:1".to_owned(), reference.to_string()] {
        let roll = json!({"nodes": ["n1"], "imageset": imageset}).to_string();
        let roll = lab.ask("POST", "/v1/rolls", &[], &roll);
        assert_eq!(roll.status, 201, "{imageset}");
        assert_eq!(roll.json()["nodes"][0]["state"], "pending");
    }
    let desired = lab.get("/v1/nodes/n1/desired").json();
    assert_eq!(desired["version"], 3);
    let pinned = desired["imagesets"][0]["reference"].as_str().expect("reference").to_owned();
    assert!(pinned.ends_with(&format!("/hello:1@{digest}")), "{pinned}");

    let mut report: Value = serde_json::from_str(REPORT).expect("golden");
    report["desired_version"] = json!(3);
    report["imagesets"][0]["digest"] = json!(digest);
    assert_eq!(lab.ask("PUT", "/v1/nodes/n1/observed", &[], &report.to_string()).status, 204);
    let states: Vec<Value> = [1, 2]
        .map(|id| lab.get(&format!("/v1/rolls/{id}")).json()["nodes"][0]["state"].clone())
        .to_vec();
    assert_eq!(states, ["superseded", "done"]);
}

#[test]
fn a_report_with_any_byte_changed_is_taken_or_refused_but_breaks_nothing() {
    let lab = Lab::start();
    for (nth, at) in (0..REPORT.len()).step_by(5).enumerate() {
        let mut bytes = REPORT.as_bytes().to_vec();
        bytes[at] = b"\0\"9-}["[nth % 6];
        let body = String::from_utf8(bytes).expect("ASCII");
        let status = lab.ask("PUT", "/v1/nodes/n1/observed", &[], &body).status;
        assert!((200..500).contains(&status), "{status} to {body}");
    }
    assert_eq!(lab.ask("PUT", "/v1/nodes/n1/observed", &[], REPORT).status, 204);
    assert_eq!(lab.get("/v1/nodes").status, 200);
}

#[test]
fn hostile_paths_and_queries_of_the_boot_routes_are_refused() {
    let lab = Lab::start();
    for path in [
        "/boot/ipxe",
        "/boot/ipxe?mac=",
        "/boot/ipxe?mac=52:54:00:00:00:01%0Akernel",
        "/boot/ipxe?mac=%FF%FE",
        "/boot/initramfs.img?mac=x",
        "/boot/../etc/passwd",
        "/boot/%2e%2e/layercake.toml",
        "/boot/inventory.db",
        "/v1/nodes/..%2f..",
        "/v1/nodes/N_1/desired",
        "/v1/nodes/n1/desired?wait=-1",
        "/v1/nodes/n1/desired?after=99999999999999999999",
        "/v1/rolls/99999999999999999999",
        "/v2/../v1/nodes/manifests/x",
        "/v2/_uploads/blobs/uploads/",
    ] {
        let status = lab.get(path).status;
        assert!((400..500).contains(&status), "{status} to {path}");
    }
}

/// A report of n1 from this Layer0.
fn report_from(layer0: &protocol::ids::Digest) -> String {
    let mut report: Value = serde_json::from_str(REPORT).expect("golden");
    report["layer0"] = json!({"digest": layer0, "state": "current"});
    report.to_string()
}

#[test]
fn a_node_boots_the_layer0_that_is_wanted_of_it_and_is_told_so() {
    let lab = Lab::start();
    let script = || {
        let answer = lab.get("/boot/ipxe?mac=52:54:00:00:00:02");
        String::from_utf8(answer.bytes).expect("text")
    };
    assert!(!script().contains("layercake.layer0="), "server.layer0_dir has no manifest");
    let a = crate::layer0::tests::build(lab.dir.path(), "a");
    let names = |text: &str, digest: &protocol::ids::Digest| {
        text.contains(&format!("layercake.layer0={digest} "))
            && text.contains(&format!("/boot/layer0/{}/vmlinuz?mac=", digest.hex()))
    };
    assert!(names(&script(), &a));
    let file = |digest: &protocol::ids::Digest, name: &str| {
        lab.get(&format!("/boot/layer0/{}/{name}", digest.hex()))
    };
    assert_eq!(file(&a, "vmlinuz").bytes, b"vmlinuz a");
    file(&a, "passwd").is_error(404, "no_file", "has no file `passwd`");
    lab.get("/boot/layer0/x/vmlinuz").is_error(400, "malformed", "64 digits");

    // Another is uploaded, file by file.
    let from = lab.dir.path().join("b");
    let b = crate::layer0::tests::build(&from, "b");
    let read = |name: &str| std::fs::read_to_string(from.join(name)).expect("read");
    let begun = lab.ask("POST", "/v1/layer0?name=lab", &[], &read("manifest.json")).json();
    assert_eq!(begun["digest"], json!(b));
    for name in begun["missing"].as_array().expect("missing") {
        let name = name.as_str().expect("name");
        let path = format!("/v1/layer0/{}/{name}", b.hex());
        lab.ask("PUT", &path, &[], "other").is_error(400, "layer0_wrong", "names");
        assert_eq!(lab.ask("PUT", &path, &[], &read(name)).status, 204);
    }
    let start = |layer0: &str, how: &str| {
        let body = json!({"nodes": ["n1"], "layer0": layer0, "how": how}).to_string();
        lab.ask("POST", "/v1/layer0/start", &[], &body)
    };
    start("nothing", "auto").is_error(404, "layer0_not_found", "no Layer0 `nothing`");
    assert_eq!(lab.ask("PUT", "/v1/nodes/n1/observed", &[], &report_from(&a)).status, 204);
    let asked = start("lab", "kexec").json();
    assert_eq!(asked[0]["boot_id"], "0b9e6c3a-8c43-4c7e-9f4b-0d7f1f9d2a11");
    let desired = lab.get("/v1/nodes/n1/desired").json();
    assert_eq!((&desired["layer0"]["digest"], &desired["version"]), (&json!(b), &json!(2)));
    assert!(names(&script(), &b), "a reboot brings the same");
    let needed = lab.ask("DELETE", &format!("/v1/layer0/{}", b.hex()), &[], "");
    needed.is_error(409, "layer0_needed", "node n1 runs it, or shall");
    // It does not come up: three tries, then the one that did.
    for _ in 0..2 {
        assert!(names(&script(), &b));
    }
    assert!(names(&script(), &a));
    // It has it already, and only its agent is wanted: no boot ends.
    assert_eq!(lab.ask("PUT", "/v1/nodes/n1/observed", &[], &report_from(&b)).status, 204);
    assert_eq!(start(&b.hex()[..8], "auto").json()[0]["boot_id"], Value::Null);
    start("default", "agent");
    let layer0 = lab.get("/v1/nodes/n1/desired").json()["layer0"].clone();
    assert_eq!((&layer0["how"], &layer0["boot_id"]), (&json!("agent"), &Value::Null));
    assert_eq!(layer0["agent"], json!(protocol::ids::Digest::of(b"layercake-agent a")));
    // An agent that knows nothing of it cannot be asked.
    let mut old: Value = serde_json::from_str(REPORT).expect("golden");
    old["layer0"] = Value::Null;
    assert_eq!(lab.ask("PUT", "/v1/nodes/n1/observed", &[], &old.to_string()).status, 204);
    start("lab", "auto").is_error(409, "not_in_layer0", "does not say which Layer0 it runs");
}
