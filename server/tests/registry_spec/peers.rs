//! skopeo and podman against our registry.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::{Embedded, run};
use crate::{get, json};

/// An image of one small layer as an OCI layout in this directory; what skopeo calls it.
pub(crate) fn layout(dir: &Path) -> String {
    let rootfs = dir.join("rootfs");
    fs::create_dir_all(&rootfs).expect("rootfs");
    fs::write(rootfs.join("hello"), "hello").expect("file");
    let text = "name = \"peer\"\nversion = \"1\"\n[[image]]\nname = \"a\"\nsource = \"dir:rootfs\"\ncmd = [\"/hello\"]\n[[container]]\nname = \"a\"\nimage = \"a\"\n";
    let set = imagebuilder::description::parse(text, &dir.join("imageset.toml"), 0).expect("set");
    let layout = dir.join("layout");
    imagebuilder::build::to_layout_blocking(&set, &layout).expect("build");
    format!("oci:{}:1-a", layout.display())
}

#[test]
fn skopeo_copies_inspects_lists_and_deletes() {
    let registry = Embedded::start();
    let dir = tempfile::tempdir().expect("dir");
    let (source, remote) = (layout(dir.path()), format!("docker://{}/a/b:1", registry.address));
    let skopeo = |args: &[&str]| run(Command::new("skopeo").args(args));
    skopeo(&["copy", "--quiet", "--dest-tls-verify=false", &source, &remote]);
    let other = format!("docker://{}/c:1", registry.address);
    let both = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    skopeo(&["copy", "--quiet", both[0], both[1], &remote, &other]);
    let raw = |remote: &str| skopeo(&["inspect", "--raw", "--tls-verify=false", remote]);
    assert_eq!(raw(&remote), raw(&other));
    let tags = skopeo(&["list-tags", "--tls-verify=false", &remote.replace(":1", "")]);
    assert!(tags.contains("\"1\""), "{tags}");
    skopeo(&["delete", "--tls-verify=false", &remote]);
    assert_eq!(get(registry.address, "/v2/a/b/manifests/1").code(), "MANIFEST_UNKNOWN");
    assert_eq!(get(registry.address, "/v2/c/manifests/1").status, 200);
}

#[test]
fn podman_pulls_tags_and_pushes() {
    let registry = Embedded::start();
    let dir = tempfile::tempdir().expect("dir");
    let source = layout(dir.path());
    let base = registry.address.to_string();
    let target = format!("docker://{base}/a:1");
    run(Command::new("skopeo").args([
        "copy",
        "--quiet",
        "--dest-tls-verify=false",
        &source,
        &target,
    ]));
    let podman = |args: &[&str]| {
        let mut podman = Command::new("podman");
        podman.arg("--root").arg(dir.path().join("root"));
        podman.arg("--runroot").arg(dir.path().join("run"));
        podman.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]);
        run(podman.args(args))
    };
    podman(&["pull", "--quiet", "--tls-verify=false", &format!("{base}/a:1")]);
    podman(&["tag", &format!("{base}/a:1"), &format!("{base}/b/c:2")]);
    podman(&["push", "--quiet", "--tls-verify=false", &format!("{base}/b/c:2")]);
    let manifest = json(&get(registry.address, "/v2/b/c/manifests/2"));
    assert_eq!(manifest["layers"].as_array().map(Vec::len), Some(1));
    podman(&["rmi", "--all", "--force"]);
    podman(&["pull", "--quiet", "--tls-verify=false", &format!("{base}/b/c:2")]);
    let listed = podman(&["images", "--format", "{{.Repository}}:{{.Tag}}"]);
    assert_eq!(listed.trim(), format!("{base}/b/c:2"));
}
