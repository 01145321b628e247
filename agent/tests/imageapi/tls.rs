//! Who may speak to the API: root by the socket, and by TCP those with a certificate.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use serde_json::json;

use super::bench::{Bench, PROGRAM, answer_of, tool};

#[test]
fn the_socket_is_roots_alone_and_tcp_wants_a_certificate_of_the_clients_authority() {
    let mut bench = Bench::new();
    let socket = bench.run_dir().join("imageapi.sock");
    let mode = fs::metadata(&socket).expect("socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (status, head, _) = bench.curl("POST", "/mount", r#"{"colour":1}"#);
    assert_eq!(status, 501, "a warning is only for what was done: {head}");
    let unknown = json!({"kind": "bind", "colour": 1, "bind": {"path": "/", "base": "root"}});
    let (status, head, mount) = bench.curl("POST", "/mount", &unknown.to_string());
    assert_eq!(status, 201);
    assert!(
        head.contains("warning: 299 layercake \"unknown fields were ignored: colour\""),
        "{head}"
    );
    bench.unmount(mount["id"].as_i64().expect("id"));
    // Our own client, and a body that is too large.
    let api = |args: &[&str]| Command::new(PROGRAM).arg("api").args(args).output().expect("api");
    let run_dir = bench.path("run");
    let output = api(&["--run-dir", &run_dir, "GET", "/mount"]);
    assert!(output.status.success() && output.stdout == b"[]\n", "{output:?}");
    let output = api(&["--run-dir", &run_dir, "GET", "/mount?id=1"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    fs::write(bench.path("large"), vec![b' '; 2 << 20]).expect("large");
    bench.ask("POST", "/mount", &format!("@{}", bench.path("large")), 413);

    let tls = bench.path("tls");
    fs::create_dir(&tls).expect("tls");
    for (name, authority) in [
        ("ours", None),
        ("theirs", None),
        ("cert", Some("ours")),
        ("client", Some("ours")),
        ("thief", Some("theirs")),
    ] {
        certificate(&tls, name, authority);
    }
    for (from, to) in
        [("ours.crt", "clients.pem"), ("cert.crt", "cert.pem"), ("cert.key", "key.pem")]
    {
        fs::copy(format!("{tls}/{from}"), format!("{tls}/{to}")).expect("copy");
    }
    bench.kill();
    bench.start(&["--imageapi-listen", "127.0.0.1:7443", "--imageapi-tls", &tls]);
    let curl = |client: Option<&str>| {
        let mut command = Command::new("curl");
        command.args([
            "-s",
            "-S",
            "-D",
            "-",
            "--max-time",
            "20",
            "--cacert",
            &format!("{tls}/ours.crt"),
        ]);
        if let Some(client) = client {
            command.args([
                "--cert",
                &format!("{tls}/{client}.crt"),
                "--key",
                &format!("{tls}/{client}.key"),
            ]);
        }
        command.arg("https://127.0.0.1:7443/imageapi/v1/mount");
        command
    };
    let (status, _, body) = answer_of(&mut curl(Some("client")));
    assert_eq!((status, body), (200, json!([])));
    for client in [None, Some("thief")] {
        let output = curl(client).output().expect("curl");
        assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    }
    bench.assert_clean();
}

/// A key and a certificate, signed by an authority or by itself.
fn certificate(dir: &str, name: &str, authority: Option<&str>) {
    let file = |name: &str, ext: &str| format!("{dir}/{name}.{ext}");
    let (key, crt) = (file(name, "key"), file(name, "crt"));
    let subject = format!("/CN={name}");
    let mut args = vec![
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "30",
    ];
    args.extend(["-subj", &subject, "-keyout", &key, "-out", &crt]);
    let (ca, ca_key);
    if let Some(authority) = authority {
        (ca, ca_key) = (file(authority, "crt"), file(authority, "key"));
        args.extend(["-CA", &ca, "-CAkey", &ca_key, "-addext", "subjectAltName=IP:127.0.0.1"]);
        args.extend(["-addext", "basicConstraints=critical,CA:FALSE"]);
    }
    tool("openssl", &args);
}
