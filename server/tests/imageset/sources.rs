//! Sources of images that other tools make: registries, `skopeo copy … docker-archive:`, and mmdebstrap.
//!
//! mmdebstrap fetches one package from where this machine's apt does; everything else is loopback only.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use imagebuilder::build::{self, BuiltSet};
use imagebuilder::client::Options;
use imagebuilder::inspect::{self, Inspection};
use imagebuilder::place::Place;
use imagebuilder::{description, push};
use protocol::ids::Name;
use protocol::reference::Reference;

use crate::debian_registry::DebianRegistry;

fn wait<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("runtime").block_on(work)
}

#[track_caller]
fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{command:?}: {error}; apt-get install skopeo docker-registry mmdebstrap")
    });
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    output.stdout
}

/// Builds a set of these images, `(name, keys)`, into `dir/NAME`.
#[track_caller]
fn set(dir: &Path, name: &str, epoch: u64, images: &[(&str, &str)]) -> BuiltSet {
    let mut text = format!("name = \"{name}\"\nversion = \"1\"\n");
    for (image, keys) in images {
        text.push_str(&format!("[[image]]\nname = \"{image}\"\n{keys}\n"));
    }
    let (first, _) = images[0];
    text.push_str(&format!("[[container]]\nname = \"c\"\nimage = \"{first}\"\n"));
    let source = description::parse(&text, &dir.join("imageset.toml"), epoch).expect("description");
    build::to_layout_blocking(&source, &dir.join(name)).expect("build")
}

fn look(built: &BuiltSet) -> Inspection {
    let place = Place::Layout { path: built.layout.clone(), tag: None };
    wait(inspect::inspect(&place, &Options::default())).expect("inspect")
}

/// A layout with images for two architectures.
fn two_platforms(dir: &Path) -> BuiltSet {
    fs::create_dir_all(dir.join("rootfs")).expect("rootfs");
    fs::write(dir.join("rootfs/file"), "content").expect("file");
    let arm = "source = \"dir:rootfs\"\ncmd = [\"/arm\"]\narchitecture = \"arm64\"";
    let amd = "source = \"dir:rootfs\"\ncmd = [\"/amd\"]";
    set(dir, "multi", 0, &[("amd", amd), ("arm", arm)])
}

fn push_to(registry: &DebianRegistry, built: &BuiltSet) -> String {
    let name = format!("http://{}/{}", registry.address, built.set.name);
    let reference: Reference = name.parse().expect("reference");
    let options = Options::default();
    wait(push::push(built, &reference, &options, Arc::new(|_| {}))).expect("push");
    name
}

#[test]
fn every_platform_of_an_image_in_a_registry_is_kept_and_its_digest_recorded() {
    let dir = tempfile::tempdir().expect("dir");
    let registry = DebianRegistry::open();
    let multi = two_platforms(dir.path());
    let name = push_to(&registry, &multi);
    let base = format!("source = \"registry:{name}:1\"");

    let kept = set(dir.path(), "kept", 0, &[("app", &base)]);
    let seen = look(&kept);
    let platforms: Vec<&str> = seen.images.iter().map(|image| image.platform.as_str()).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64"]);
    for (image, original) in seen.images.iter().zip(["amd", "arm"]) {
        let original: Name = original.parse().expect("name");
        assert_eq!(image.digest, multi.images[&original].digest, "byte for byte as it was");
        assert_eq!(image.base, Some(format!("{name}:1@{}", multi.index.digest)));
    }
    assert_eq!(BuiltSet::open(&kept.layout, None).expect("open"), kept);

    // Other tools find the platform that they want under the image's tag.
    push_to(&registry, &kept);
    for (architecture, cmd) in [("amd64", "/amd"), ("arm64", "/arm")] {
        let remote = format!("docker://{}/kept:1-app", registry.address);
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--override-arch", architecture, "inspect", "--config", "--tls-verify=false"]);
        let config: serde_json::Value =
            serde_json::from_slice(&run(skopeo.arg(remote))).expect("JSON");
        assert_eq!(config["config"]["Cmd"][0], cmd);
    }

    let changed = format!("{base}\nenv = {{ A = \"1\" }}");
    let changed = look(&set(dir.path(), "changed", 0, &[("app", &changed)]));
    for image in &changed.images {
        assert_eq!(image.config.env, ["A=1"], "{}", image.platform);
    }
    assert_eq!(changed.images.len(), 2);
    let one = format!("{base}\narchitecture = \"arm64\"");
    let one = look(&set(dir.path(), "one", 0, &[("app", &one)]));
    assert_eq!(one.images.len(), 1);
    assert_eq!(one.images[0].config.cmd, ["/arm"]);
    let more = format!("source = [\"registry:{name}:1\", \"dir:rootfs\"]");
    let more = look(&set(dir.path(), "more", 0, &[("app", &more)]));
    assert_eq!(more.images.len(), 1, "what is added is for one platform");
    assert_eq!(more.images[0].platform, "linux/amd64");
}

#[test]
fn the_platforms_of_a_layout_are_kept_too() {
    let dir = tempfile::tempdir().expect("dir");
    two_platforms(dir.path());
    let kept = look(&set(dir.path(), "kept", 0, &[("app", "source = \"oci:multi:1\"")]));
    let platforms: Vec<&str> = kept.images.iter().map(|image| image.platform.as_str()).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64"]);
    assert_eq!(kept.images[0].base, None);
}

#[test]
fn a_reference_that_is_not_there_is_an_error_that_names_it() {
    let registry = DebianRegistry::open();
    let dir = tempfile::tempdir().expect("dir");
    let at = registry.address;
    let text = format!(
        "name = \"x\"\nversion = \"1\"\n[[image]]\nname = \"a\"\nsource = \"registry:http://{at}/no:1\"\n\
         [[container]]\nname = \"a\"\nimage = \"a\"\n"
    );
    let source = description::parse(&text, &dir.path().join("i.toml"), 0).expect("description");
    let error = build::to_layout_blocking(&source, &dir.path().join("out")).expect_err("missing");
    let error = std::error::Error::source(&error).expect("source").to_string();
    assert_eq!(error, format!("registry http://{at}/v2/no/manifests/1 does not have it"));
    assert!(!dir.path().join("out").exists());
}

#[test]
fn what_skopeo_saves_as_a_docker_archive_is_read() {
    let dir = tempfile::tempdir().expect("dir");
    let multi = two_platforms(dir.path());
    run(Command::new("skopeo")
        .arg("copy")
        .arg(format!("oci:{}:1-amd", multi.layout.display()))
        .arg(format!("docker-archive:{}:demo:1", dir.path().join("saved.tar").display())));
    let built = set(dir.path(), "loaded", 0, &[("app", "source = \"docker-archive:saved.tar\"")]);
    let seen = look(&built);
    assert_eq!(seen.images[0].config.cmd, ["/amd"]);
    let original = look(&multi);
    // The bytes inside are the same, and so is what is made of them.
    assert_eq!(seen.images[0].layers[0].digest, original.images[0].layers[0].digest);
}

#[test]
fn debian_packages_become_the_same_layer_every_time() {
    let dir = tempfile::tempdir().expect("dir");
    // The smallest of its variants: one package, unpacked. The mechanism is the same for all.
    let keys =
        "source = \"debian:bookworm\"\nvariant = \"extract\"\npackages = [\"busybox-static\"]";
    let first = look(&set(dir.path(), "first", 1_700_000_000, &[("app", keys)]));
    let second = look(&set(dir.path(), "second", 1_700_000_000, &[("app", keys)]));
    assert_eq!(first.images[0].layers[0].digest, second.images[0].layers[0].digest);
    let blob = dir.path().join("first/blobs/sha256").join(first.images[0].layers[0].digest.hex());
    let list = run(Command::new("tar").args(["--list", "--gzip", "--file"]).arg(blob));
    assert!(String::from_utf8_lossy(&list).lines().any(|path| path == "./bin/busybox"));
}

/// Everything that an image can say of a tree: types, modes, owners, times and links of all entries in words, and with their
/// attributes and contents as one digest. Without `/dev`, which nodes make themselves: umoci makes its devices.
fn tree(root: &Path) -> Vec<String> {
    let script = "tar --create --sort=name --numeric-owner --format=posix --xattrs --xattrs-include='*' \
                  --exclude='./dev/*' --pax-option=exthdr.name=%d/%f,delete=atime,delete=ctime --file=- . | tee \"$1\" | sha256sum; \
                  tar --list --verbose --full-time --numeric-owner --file=\"$1\"";
    let archive = tempfile::NamedTempFile::new().expect("archive");
    let mut shell = Command::new("sh");
    shell.args(["-e", "-c", script, "sh"]).arg(archive.path()).current_dir(root);
    String::from_utf8(run(&mut shell)).expect("text").lines().map(str::to_owned).collect()
}

#[test]
fn a_mounted_debian_image_is_entry_by_entry_what_umoci_unpacks() {
    let dir = tempfile::tempdir().expect("dir");
    // A layer above the packages': changed, new, removed and linked files, a directory that was and is another.
    let add = |path: &str, content: &str| {
        let path = dir.path().join("rootfs").join(path);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        fs::write(path, content).expect("file");
    };
    add("usr/share/doc/busybox-static/copyright", "changed");
    add("usr/share/doc/busybox-static/.wh.changelog.Debian.gz", "");
    add("etc/new/.wh..wh..opq", "");
    add("etc/new/file", "new");
    let (file, link) = (dir.path().join("rootfs/etc/new/file"), dir.path().join("rootfs/linked"));
    fs::hard_link(file, link).expect("link");
    let keys = "source = [\"debian:bookworm\", \"dir:rootfs\"]\nvariant = \"extract\"\n\
                packages = [\"busybox-static\"]\nmount = [\"squashfs\", \"erofs\"]";
    let built = set(dir.path(), "mounted", 1_700_000_000, &[("app", keys)]);
    let layout = format!("{}:1-app", built.layout.display());
    let bundle = dir.path().join("bundle");
    run(Command::new("umoci").args(["unpack", "--image", &layout]).arg(&bundle));
    let unpacked = tree(&bundle.join("rootfs"));
    let seen = look(&built);
    assert_eq!(seen.images[0].mounts.len(), 2);
    for mount in &seen.images[0].mounts {
        let place = tempfile::tempdir().expect("place");
        let blob = built.blob_path(&mount.digest);
        let options = ["-t", mount.form.as_str(), "-o", "loop,ro"];
        run(Command::new("mount").args(options).arg(blob).arg(place.path()));
        let mounted = tree(place.path());
        run(Command::new("umount").arg(place.path()));
        let both = mounted.iter().zip(&unpacked).skip(1);
        for (ours, theirs) in both {
            assert_eq!(ours, theirs, "{}", mount.form);
        }
        assert_eq!(mounted, unpacked, "{}", mount.form);
    }
}
