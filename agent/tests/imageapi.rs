//! The ImageAPI of the real program as `agent --standalone --imageapi`, asked by curl. Needs root, loop devices, busybox-static,
//! curl, squashfs-tools, erofs-utils, e2fsprogs, cpio, openssl, docker-registry, skopeo and umoci.

#[path = "imageapi/bench.rs"]
mod bench;
#[path = "imageapi/tls.rs"]
mod tls;

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use bench::{Bench, RUNS, tool, wait_until};

/// `mount` and `attach` definitions in short.
fn bind(path: &str) -> Value {
    json!({"kind": "bind", "bind": {"path": path, "base": "root"}})
}

fn loop_mount(file: &str, kind: &str) -> Value {
    json!({"kind": "attach", "attach": {"fs_type": kind, "attach":
        {"kind": "loopback", "loopback": {"path": file, "base": "root"}}}})
}

fn overlay(lower: &[Value]) -> Value {
    json!({"kind": "overlay", "overlay": {"lower": lower}})
}

#[test]
fn references_force_and_collection_follow_the_rules() {
    let bench = Bench::new();
    let root = bench.path("root");
    let image = bench.path("root.sqfs");
    tool("mksquashfs", &[&root, &image, "-quiet", "-no-progress"]);
    let loops = json!({"kind": "loopback", "loopback": {"path": image, "base": "root"}});
    let on = |id: i64| json!({"kind": "attach", "attach": {"fs_type": "squashfs", "attach": {"id": id}}});
    let text = |value: &Value| value.to_string();
    let container = json!({"name": "c", "command": RUNS, "mount": {"id": 3}});
    // Numbers: attachment 1, mount 2 on it, overlay 3 on 2, container 4 on 3.
    let steps: Vec<(&str, &str, String, u16, &str, Value)> = vec![
        ("POST", "/attach", text(&loops), 201, "/refs", json!(1)),
        ("POST", "/mount", text(&on(1)), 201, "/attach/attach/refs", json!(2)),
        (
            "DELETE",
            "/attach?id=1",
            String::new(),
            409,
            "/message",
            json!("object is busy: attachment 1 is held by mount 2"),
        ),
        (
            "DELETE",
            "/attach?id=1&force=true",
            String::new(),
            409,
            "/message",
            json!("object is busy: attachment 1 is used by mount 2"),
        ),
        ("GET", "/attach?id=1", String::new(), 200, "/0/refs", json!(2)),
        ("GET", "/attach?id=1", String::new(), 200, "/0/refs", json!(2)),
        (
            "POST",
            "/mount",
            text(&overlay(&[json!({"id": 2})])),
            201,
            "/overlay/lower/0/refs",
            json!(2),
        ),
        ("POST", "/container", text(&container), 201, "/mount/refs", json!(2)),
        ("POST", "/container", text(&container), 409, "/code", json!(409)),
        (
            "DELETE",
            "/mount?id=3",
            String::new(),
            409,
            "/message",
            json!("object is busy: mount 3 is held by container 4"),
        ),
        (
            "PATCH",
            "/container?name=c&state=running",
            String::new(),
            200,
            "/state",
            json!("running"),
        ),
        (
            "PATCH",
            "/container?name=c&state=running",
            String::new(),
            200,
            "/state",
            json!("running"),
        ),
        (
            "DELETE",
            "/container?name=c",
            String::new(),
            409,
            "/message",
            json!("object is busy: container 4 is running"),
        ),
        (
            "DELETE",
            "/mount?id=3&force=true",
            String::new(),
            409,
            "/message",
            json!("object is busy: mount 3 is used by container 4"),
        ),
        ("GET", "/container?state=running", String::new(), 200, "/0/id", json!(4)),
        ("GET", "/container?state=dead", String::new(), 200, "", json!([])),
        ("DELETE", "/container?id=4&force=true", String::new(), 200, "/state", json!("exited")),
        ("GET", "/container?id=4", String::new(), 404, "/code", json!(404)),
        ("GET", "/mount?id=3", String::new(), 200, "/0/refs", json!(1)),
        ("DELETE", "/mount?id=3", String::new(), 200, "/id", json!(3)),
        ("DELETE", "/mount?id=3", String::new(), 404, "/message", json!("not found: mount 3")),
        ("GET", "/mount?id=2", String::new(), 200, "/0/refs", json!(1)),
        ("DELETE", "/attach?id=2", String::new(), 404, "/code", json!(404)),
        ("DELETE", "/mount?id=2", String::new(), 200, "/id", json!(2)),
        ("DELETE", "/attach?id=1", String::new(), 200, "/id", json!(1)),
    ];
    for (method, target, body, status, pointer, expected) in steps {
        let answer = bench.ask(method, target, &body, status);
        assert_eq!(answer.pointer(pointer), Some(&expected), "{method} {target} {body}: {answer}");
    }
    bench.assert_clean();
}

#[test]
fn what_was_described_with_its_parent_goes_with_it_and_force_takes_a_mount_from_an_ended_container()
{
    let bench = Bench::new();
    let image = bench.path("root.sqfs");
    tool("mksquashfs", &[&bench.path("root"), &image, "-quiet", "-no-progress"]);
    let inner = json!({"kind": "attach", "attach": {"fs_type": "squashfs", "attach": {"kind": "loopback",
        "loopback": {"path": "/root.sqfs", "base": "mount", "mount": bind(&bench.path(""))}}}});
    let nested = json!({"name": "c-29", "command": "sh -c 'echo hello from $0; exit 3'", "state": "running",
        "mount": overlay(&[inner, bind(&bench.path("root"))])});
    let made = bench.ask("POST", "/container", &nested.to_string(), 201);
    let lower = &made["mount"]["overlay"]["lower"];
    assert_eq!(lower[0]["attach"]["attach"]["loopback"]["mount"]["refs"], 1, "{made}");
    assert!(
        lower[0]["attach"]["attach"]["device_file"]
            .as_str()
            .is_some_and(|it| it.starts_with("/dev/loop"))
    );
    assert_eq!(made["namespaces"], Value::Null);
    assert_eq!(bench.ask("GET", "/mount", "", 200).as_array().map(Vec::len), Some(4));
    assert_eq!(bench.ask("GET", "/mount?kind=bind", "", 200).as_array().map(Vec::len), Some(2));
    wait_until("it has ended", || bench.state("c-29") == "dead");
    let log = fs::read_to_string(made["logfile"].as_str().expect("logfile")).expect("log");
    assert_eq!(log, "hello from sh\n");

    let held = made["mount"]["id"].as_i64().expect("id");
    bench.ask("DELETE", &format!("/mount?id={held}"), "", 409);
    bench.ask("DELETE", &format!("/mount?id={held}&force=true"), "", 200);
    let start = bench.ask("PATCH", "/container?name=c-29&state=running", "", 500);
    assert!(start["message"].as_str().is_some_and(|it| it.contains("was taken away")), "{start}");
    let gone = bench.ask("DELETE", "/container?name=c-29", "", 200);
    assert_eq!(gone["mount"], json!({"id": held}));
    bench.assert_clean();
}

#[test]
fn every_kind_of_image_is_mounted_with_its_content_and_its_rights() {
    let mut bench = Bench::new();
    let root = bench.path("root");
    let (squashfs, erofs, ext4) =
        (bench.path("i.sqfs"), bench.path("i.erofs"), bench.path("i.ext4"));
    tool("mksquashfs", &[&root, &squashfs, "-quiet", "-no-progress"]);
    tool("mkfs.erofs", &[&erofs, &root]);
    tool("truncate", &["-s", "16M", &ext4]);
    tool("mkfs.ext4", &["-q", "-d", &root, &ext4]);
    for (file, kind, writable) in
        [(&squashfs, "squashfs", false), (&erofs, "erofs", false), (&ext4, "ext4", true)]
    {
        let (id, point) = bench.mount(&loop_mount(file, kind).to_string());
        assert_eq!(fs::read_to_string(point.join("etc/release")).expect(kind), "tested\n");
        assert_eq!(fs::write(point.join("x"), "x").is_ok(), writable, "{kind}");
        bench.unmount(id);
    }
    // A block device that is there already, and options.
    let made = json!({"kind": "loopback", "loopback": {"path": ext4, "base": "root"}});
    let made = bench.ask("POST", "/attach", &made.to_string(), 201);
    let local = json!({"kind": "attach", "attach": {"fs_type": "ext4", "mount_options": ["ro", "noatime"],
        "attach": {"kind": "local", "local": {"path": made["device_file"]}}}});
    let (id, point) = bench.mount(&local.to_string());
    assert!(fs::write(point.join("y"), "y").is_err());
    // The system uses what no object of ours holds.
    bench.ask("DELETE", &format!("/attach?id={}&force=true", made["id"]), "", 409);
    bench.unmount(id);
    bench.ask("DELETE", &format!("/attach?id={}", made["id"]), "", 200);

    // Binds: read-only ones are, and links do not lead out of a mount.
    let mut read_only = bind(&root);
    read_only["bind"]["ro"] = true.into();
    let (base, point) = bench.mount(&read_only.to_string());
    assert!(fs::write(point.join("x"), "x").is_err());
    std::os::unix::fs::symlink("/", format!("{root}/out")).expect("link");
    let inner = json!({"kind": "bind", "bind": {"path": "out/etc", "base": "mount", "mount": {"id": base}}});
    let (id, point) = bench.mount(&inner.to_string());
    assert_eq!(fs::read_dir(&point).expect("list").count(), 1);
    bench.unmount(id);
    bench.unmount(base);

    // An overlay has room for as much as it may write.
    let mut small = overlay(&[bind(&root)]);
    small["overlay"]["size"] = (1 << 20).into();
    let (id, point) = bench.mount(&small.to_string());
    fs::write(point.join("small"), vec![0; 64 << 10]).expect("fits");
    let full = fs::write(point.join("large"), vec![0; 2 << 20]).expect_err("does not fit");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    bench.unmount(id);
    bench.assert_clean();
    bench.kill();
}

#[test]
fn files_by_http_are_mounted_when_their_digest_is_right() {
    let mut bench = Bench::new();
    let root = bench.path("root");
    let files = bench.path("files");
    fs::create_dir(&files).expect("files");
    let file = |name: &str| format!("{files}/{name}");
    tool("tar", &["-C", &root, "-cf", &file("r.tar"), "."]);
    tool("tar", &["-C", &root, "-czf", &file("r.tar.gz"), "."]);
    let script =
        format!("cd {root} && find . | cpio --quiet -o -H newc | gzip > {}", file("r.cpio.gz"));
    tool("sh", &["-c", &script]);
    tool("mkfs.erofs", &[&file("r.erofs"), &root]);
    tool("mksquashfs", &[&root, &file("r.sqfs"), "-quiet", "-no-progress"]);
    fs::write(file("junk"), "no archive at all").expect("junk");
    let server = ["httpd", "-f", "-p", "127.0.0.1:8088", "-h", &files];
    bench.helper(Command::new("/bin/busybox").args(server));
    wait_until("the server listens", || std::net::TcpStream::connect("127.0.0.1:8088").is_ok());
    let of = |name: &str| {
        let sum = tool("sha256sum", &[&file(name)]);
        let digest = format!("sha256:{}", sum.split(' ').next().expect("sum"));
        json!({"kind": "uri", "uri": {"uri": format!("http://127.0.0.1:8088/{name}"), "digest": digest}})
    };
    for (name, writable) in [
        ("r.tar", true),
        ("r.tar.gz", true),
        ("r.cpio.gz", true),
        ("r.erofs", false),
        ("r.sqfs", false),
    ] {
        let (id, point) = bench.mount(&of(name).to_string());
        assert_eq!(fs::read_to_string(point.join("etc/release")).expect(name), "tested\n");
        assert_eq!(fs::write(point.join("x"), "x").is_ok(), writable, "{name}");
        bench.unmount(id);
    }
    let mut wrong = of("r.tar");
    wrong["uri"]["digest"] = format!("sha256:{}", "0".repeat(64)).into();
    let mut format = of("r.erofs");
    format["uri"]["format"] = "tar".into();
    let mut missing = of("r.tar");
    missing["uri"]["uri"] = "http://127.0.0.1:8088/missing".into();
    missing["uri"]["digest"] = format!("sha256:{}", "1".repeat(64)).into();
    let mut scheme = of("r.tar");
    scheme["uri"]["uri"] = "file:///etc/passwd".into();
    for (body, status, expected) in [
        (wrong, 500, "the blob's digest is sha256:"),
        (of("junk"), 500, "it is no tar, cpio, EROFS or squashfs file"),
        (format, 400, "is of another format"),
        (missing, 500, "status 404"),
        (scheme, 400, "neither http:// nor https://"),
    ] {
        let refused = bench.ask("POST", "/mount", &body.to_string(), status);
        assert!(refused["message"].as_str().is_some_and(|it| it.contains(expected)), "{refused}");
    }
    // A container on a file, which a new agent finds again in its store.
    let container =
        json!({"name": "w", "command": RUNS, "state": "running", "mount": of("r.tar.gz")});
    bench.ask("POST", "/container", &container.to_string(), 201);
    bench.restart();
    assert_eq!(bench.state("w"), "running");
    bench.ask("DELETE", "/container?name=w&force=1", "", 200);
    bench.assert_clean();
}

#[test]
fn an_image_of_a_registry_runs_with_its_own_environment_and_command() {
    let mut bench = Bench::new();
    let (layout, store) = (bench.path("oci"), bench.path("registry"));
    let image = format!("{layout}:one");
    tool("umoci", &["init", "--layout", &layout]);
    tool("umoci", &["new", "--image", &image]);
    tool("umoci", &["insert", "--image", &image, &bench.path("root"), "/"]);
    tool(
        "umoci",
        &["config", "--image", &image, "--config.env", "COLOUR=blue", "--config.cmd", "env"],
    );
    let config = format!(
        "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {store}}}}}\nhttp: {{addr: 127.0.0.1:5099}}\n"
    );
    fs::write(bench.path("registry.yml"), config).expect("config");
    let config = bench.path("registry.yml");
    bench.helper(Command::new("docker-registry").args(["serve", &config]));
    wait_until("the registry listens", || std::net::TcpStream::connect("127.0.0.1:5099").is_ok());
    let to = "docker://127.0.0.1:5099/site/one:1";
    tool("skopeo", &["copy", "-q", "--dest-tls-verify=false", &format!("oci:{image}"), to]);

    let oci = json!({"kind": "oci", "oci": {"image": "http://127.0.0.1:5099/site/one:1"}});
    let container = json!({"name": "one", "command": "", "state": "running", "mount": oci});
    let made = bench.ask("POST", "/container", &container.to_string(), 201);
    assert!(made["mount"]["oci"]["digest"].as_str().is_some_and(|it| it.starts_with("sha256:")));
    wait_until("it has ended", || bench.state("one") == "exited");
    let log = fs::read_to_string(made["logfile"].as_str().expect("logfile")).expect("log");
    assert!(log.lines().any(|line| line == "COLOUR=blue"), "{log}");
    bench.ask("DELETE", "/container?name=one", "", 200);

    let mut missing = oci.clone();
    missing["oci"]["image"] = "http://127.0.0.1:5099/site/two:1".into();
    let refused = bench.ask("POST", "/mount", &missing.to_string(), 500);
    assert!(refused["message"].as_str().is_some_and(|it| it.contains("404")), "{refused}");
    missing["oci"]["image"] = "No//Reference".into();
    bench.ask("POST", "/mount", &missing.to_string(), 400);
    // Read-only, and below an overlay, whose container has the image's environment all the same.
    let mut read_only = oci;
    read_only["oci"]["ro"] = true.into();
    let (id, point) = bench.mount(&read_only.to_string());
    assert!(fs::write(point.join("x"), "x").is_err());
    let over = json!({"name": "two", "command": "env", "state": "running", "mount": overlay(&[json!({"id": id})])});
    let made = bench.ask("POST", "/container", &over.to_string(), 201);
    wait_until("it has ended", || bench.state("two") == "exited");
    let log = fs::read_to_string(made["logfile"].as_str().expect("logfile")).expect("log");
    assert!(log.contains("COLOUR=blue"), "{log}");
    bench.ask("DELETE", "/container?name=two", "", 200);
    bench.unmount(id);
    bench.assert_clean();
}

#[test]
fn containers_and_mounts_survive_the_agent_and_what_no_note_knows_is_taken_away() {
    let mut bench = Bench::new();
    let image = bench.path("root.sqfs");
    tool("mksquashfs", &[&bench.path("root"), &image, "-quiet", "-no-progress"]);
    let mount = overlay(&[loop_mount(&image, "squashfs")]);
    let run = |name: &str, command: &str| {
        json!({"name": name, "command": command, "state": "running", "mount": mount}).to_string()
    };
    bench.ask("POST", "/container", &run("lives", RUNS), 201);
    bench.ask("POST", "/container", &run("ends", "sh -c 'cat /gate'"), 201);
    wait_until("one has ended", || bench.state("ends") == "dead");
    let before = (bench.ask("GET", "/container", "", 200), bench.ask("GET", "/mount", "", 200));
    bench.restart();
    let after = (bench.ask("GET", "/container", "", 200), bench.ask("GET", "/mount", "", 200));
    assert_eq!(before, after);
    assert_eq!(bench.loops().len(), 2);

    // One that ends while nobody looks.
    bench.ask("POST", "/container", &run("later", "sleep 0.3"), 201);
    bench.kill();
    let instances = bench.run_dir().join("imageapi/containers");
    wait_until("its record is there", || {
        let dirs = fs::read_dir(&instances).expect("list").flatten();
        dirs.filter(|dir| dir.path().join("exit.json").exists()).count() == 2
    });
    bench.start(&[]);
    assert_eq!(
        (bench.state("lives"), bench.state("later")),
        ("running".to_owned(), "exited".to_owned())
    );

    // Stopped by this agent although an earlier one started it.
    let stopped = bench.ask("PATCH", "/container?name=lives&state=exited", "", 200);
    assert_eq!(stopped["state"], "exited");
    bench.ask("PATCH", "/container?name=lives&state=running", "", 200);

    // An agent that knows nothing of all this takes it away.
    bench.kill();
    fs::write(bench.run_dir().join("imageapi/objects.json"), "{").expect("damage");
    bench.start(&[]);
    bench.assert_clean();
}

#[test]
fn a_container_that_cannot_start_is_dead_and_says_why() {
    let bench = Bench::new();
    let on_root = |name: &str, command: &str, state: &str| {
        json!({"name": name, "command": command, "state": state, "mount": overlay(&[bind(&bench.path("root"))])})
            .to_string()
    };
    let refused = bench.ask("POST", "/container", &on_root("no", "/bin/nothing", "running"), 500);
    assert!(refused["message"].as_str().is_some_and(|it| it.contains("/bin/nothing")), "{refused}");
    assert_eq!(bench.state("no"), "dead");
    let refused = bench.ask("PATCH", "/container?name=no&state=running", "", 500);
    assert!(refused["message"].as_str().is_some_and(|it| it.starts_with("operation failed")));
    bench.ask("POST", "/container", &on_root("x", "sh 'open", "created"), 400);
    bench.ask("POST", "/container", &on_root("x", "sh", "exited"), 400);
    bench.ask("DELETE", "/container?name=no", "", 200);

    // Namespaces are those that were asked for; users of its own a container on a mount cannot have.
    let spaces = |namespaces: &[&str]| {
        json!({"name": "n", "command": "cat /proc/net/dev", "state": "running", "namespaces": namespaces,
            "mount": overlay(&[bind(&bench.path("root"))])})
    };
    bench.ask("POST", "/container", &spaces(&["user"]).to_string(), 400);
    let made = bench.ask("POST", "/container", &spaces(&["net", "pid"]).to_string(), 201);
    assert_eq!(made["namespaces"], json!(["net", "pid"]));
    wait_until("it has ended", || bench.state("n") == "exited");
    let log = fs::read_to_string(made["logfile"].as_str().expect("logfile")).expect("log");
    let links: Vec<_> = log.lines().filter(|line| line.contains(':')).collect();
    assert!(links.len() == 1 && links[0].trim_start().starts_with("lo:"), "{log}");
    bench.ask("DELETE", "/container?name=n", "", 200);

    // Nothing of what was made for it is left when a part fails.
    let nested = overlay(&[bind(&bench.path("root")), bind("/nonexistent/place")]);
    let refused = bench.ask("POST", "/mount", &nested.to_string(), 500);
    assert!(refused["message"].as_str().is_some_and(|it| it.contains("/nonexistent/place")));
    for (body, status) in [
        (json!({"kind": "bind"}), 400),
        (json!({}), 501),
        (json!({"id": 7, "kind": "bind", "bind": {"path": "/", "base": "root"}}), 500),
        (overlay(&[json!({"id": 99})]), 404),
        (overlay(&[]), 400),
        (loop_mount("/bin", "ext4"), 400),
        (loop_mount(&bench.path("root/bin/busybox"), "squashfs"), 500),
        (json!({"kind": "nfs", "nfs": {"host": "127.0.0.1", "path": "/x", "version": "3"}}), 400),
    ] {
        let answer = bench.ask("POST", "/mount", &body.to_string(), status);
        assert_eq!(answer["code"], status, "{answer}");
    }
    let rbd = json!({"kind": "rbd", "rbd": {"monitors": ["127.0.0.1"], "pool": "p", "image": "i",
        "options": {"name": "admin", "secret": "hush-hush"}}});
    let refused = bench.ask("POST", "/attach", &rbd.to_string(), 500).to_string();
    assert!(refused.contains("rbd p/i") && !refused.contains("hush"), "{refused}");
    bench.ask("POST", "/attach", "{}", 500);
    bench.assert_clean();
}
