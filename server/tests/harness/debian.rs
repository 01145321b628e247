//! Debian's docker-registry on a loopback port of its own, plain or with TLS and a password. Shared by the tests that need
//! a registry which is not ours; not every one of them uses every part.

#![allow(dead_code)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

const INSTALL: &str = "apt-get install docker-registry openssl apache2-utils";
const PATIENCE: Duration = Duration::from_secs(60);

/// A running registry, until it is dropped.
pub(crate) struct DebianRegistry {
    pub(crate) address: SocketAddr,
    /// The CA of its certificate, where it speaks TLS.
    pub(crate) ca: PathBuf,
    child: Child,
    _dir: TempDir,
}

fn run(program: &str, args: &[&str], dir: &Path) -> Vec<u8> {
    let output = Command::new(program).args(args).current_dir(dir).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; {INSTALL}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    output.stdout
}

/// A CA, and a certificate of 127.0.0.1 signed by it.
fn certificates(dir: &Path) {
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    let request = |name: &str, more: &[&str]| {
        let (key_file, out) = (format!("{name}.key"), format!("{name}.pem"));
        let begin = ["req", "-x509", "-keyout", &key_file, "-out", &out, "-subj"];
        let subject = format!("/CN={name}");
        run("openssl", &[&begin[..], &[subject.as_str()], &key, more].concat(), dir);
    };
    request("ca", &[]);
    let leaf = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1"];
    request("registry", &[&leaf[..], &["-addext", "basicConstraints=critical,CA:FALSE"]].concat());
}

impl DebianRegistry {
    /// Everybody may do everything, over plain HTTP.
    pub(crate) fn open() -> Self {
        Self::start(tempfile::tempdir().expect("dir"), "", "")
    }

    /// TLS with a CA of its own, and one user.
    pub(crate) fn guarded(user: &str, password: &str) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        certificates(dir.path());
        let users = run("htpasswd", &["-Bbn", user, password], dir.path());
        fs::write(dir.path().join("htpasswd"), users).expect("users");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let tls = format!(
            "  tls:\n    certificate: {}\n    key: {}\n",
            at("registry.pem"),
            at("registry.key")
        );
        let auth = format!("auth:\n  htpasswd:\n    realm: lab\n    path: {}\n", at("htpasswd"));
        Self::start(dir, &tls, &auth)
    }

    fn start(dir: TempDir, tls: &str, auth: &str) -> Self {
        let config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:0\n{tls}{auth}",
            dir.path().join("data").display()
        );
        fs::write(dir.path().join("config.yml"), config).expect("config");
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("docker-registry: {error}; {INSTALL}"));
        let log = child.stderr.take().expect("stderr");
        let (tell, told) = std::sync::mpsc::channel();
        // Reads on to the end, so that the registry never writes into a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                let address = line.split("listening on ").nth(1);
                let end = |c: char| !(c.is_ascii_digit() || c == '.' || c == ':');
                if let Some(address) = address.and_then(|rest| rest.split(end).next()) {
                    let _ = tell.send(address.to_owned());
                }
            }
        });
        let address = told.recv_timeout(PATIENCE).expect("docker-registry tells its address");
        let ca = dir.path().join("ca.pem");
        Self { address: address.parse().expect("address"), ca, child, _dir: dir }
    }
}

impl Drop for DebianRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
