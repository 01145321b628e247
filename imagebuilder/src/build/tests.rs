//! Tests of `build`: real layouts in temporary directories; no registry.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::description;

const TOML: &str = r#"name = "tiny"
version = "1"
[[image]]
name = "app"
source = "dir:rootfs"
entrypoint = ["/app"]
env = { B = "2", A = "1" }
user = "1000"
labels = { "org.example" = "x" }
[[container]]
name = "app"
image = "app"
"#;

fn source(dir: &Path, toml: &str) -> SetSource {
    let etc = dir.join("rootfs/etc");
    fs::create_dir_all(&etc).expect("rootfs");
    fs::write(etc.join("version"), "1\n").expect("file");
    for (path, mode) in [(etc.join("version"), 0o644), (etc, 0o755)] {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
    }
    description::parse(toml, &dir.join("imageset.toml"), 0).expect("description")
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(next).expect("list") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                todo.push(path);
            } else {
                let inside = path.strip_prefix(dir).expect("inside").to_owned();
                found.insert(inside, fs::read(path).expect("read"));
            }
        }
    }
    found
}

/// Changes only when the format of layers, configs, manifests or the index does, or a codec: nodes then fetch every
/// image again, so it belongs in the changelog.
#[test]
fn the_digest_of_a_small_set_is_the_pinned_one() {
    let dir = tempfile::tempdir().expect("dir");
    let built = to_layout_blocking(&source(dir.path(), TOML), &dir.path().join("out"));
    let built = built.expect("build");
    assert_eq!(
        (built.index.digest.to_string(), built.images.values().next().expect("image").digest.hex()),
        (GOLDEN_INDEX.to_owned(), GOLDEN_IMAGE.to_owned())
    );
}

const GOLDEN_INDEX: &str =
    "sha256:8791e7677dd7bc3bef3021b267cfbc504da7ae5d108fcc4eeee0760161ac94c8";
const GOLDEN_IMAGE: &str = "b0d0b53bb27501a8d0cec87505fc0eae99e753c795cd7af6c99dd23c10b035df";

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let (one, two) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    for compression in ["gzip", "zstd"] {
        let toml = TOML.replace("user", &format!("compression = \"{compression}\"\nuser"));
        let out = |dir: &tempfile::TempDir| dir.path().join(compression);
        let first = to_layout_blocking(&source(one.path(), &toml), &out(&one)).expect("build");
        let second = to_layout_blocking(&source(two.path(), &toml), &out(&two)).expect("build");
        assert_eq!(first.index, second.index);
        assert_eq!(files(&out(&one)), files(&out(&two)));
        to_layout_blocking(&source(one.path(), &toml), &out(&one)).expect("again");
        assert_eq!(files(&out(&one)), files(&out(&two)));
    }
}

#[test]
fn a_built_set_resolves_as_nodes_do_it() {
    let dir = tempfile::tempdir().expect("dir");
    let out = dir.path().join("out");
    let built = to_layout_blocking(&source(dir.path(), TOML), &out).expect("build");
    let index = oci::parse_index(&built.document(&built.index).expect("index")).expect("index");
    let entries = oci::resolve_set(&index, "amd64").expect("an ImageSet");
    assert_eq!(entries.images, built.images);
    let image = entries.images.values().next().expect("image");
    let manifest =
        oci::parse_manifest(&built.document(image).expect("manifest")).expect("manifest");
    let config = built.document(&manifest.config).expect("config");
    let config = oci::parse_image_config(&config).expect("config");
    assert_eq!(config.config.env, ["A=1", "B=2"]);
    assert_eq!(config.config.entrypoint, ["/app"]);
    assert_eq!(config.created.as_deref(), Some("1970-01-01T00:00:00Z"));
    assert_eq!(BuiltSet::open(&out, None).expect("open"), built);
    assert_eq!(BuiltSet::open(&out, Some("1")).expect("open"), built);
    let error = BuiltSet::open(&out, Some("2")).expect_err("version").to_string();
    assert!(error.contains("expected one ImageSet of version 2"), "{error}");
}

#[test]
fn a_layout_keeps_its_other_versions() {
    let dir = tempfile::tempdir().expect("dir");
    let out = dir.path().join("out");
    to_layout_blocking(&source(dir.path(), TOML), &out).expect("1");
    let toml = TOML.replace("version = \"1\"", "version = \"2\"");
    to_layout_blocking(&source(dir.path(), &toml), &out).expect("2");
    for version in ["1", "2"] {
        let built = BuiltSet::open(&out, Some(version)).expect(version);
        assert_eq!(built.set.version.as_str(), version);
        built.blobs().expect("blobs");
    }
}

#[test]
fn an_image_of_a_layout_keeps_its_digest_until_it_is_changed() {
    let dir = tempfile::tempdir().expect("dir");
    let out = dir.path().join("out");
    let first = to_layout_blocking(&source(dir.path(), TOML), &out).expect("build");
    let app: Name = "app".parse().expect("name");
    let again = |keys: &str| {
        let toml = format!(
            "name = \"b\"\nversion = \"1\"\n[[image]]\nname = \"app\"\n{keys}\n[[container]]\nname = \"app\"\nimage = \"app\"\n"
        );
        let source = source(dir.path(), &toml);
        let other = tempfile::tempdir().expect("dir");
        to_layout_blocking(&source, &other.path().join("out"))
            .map(|built| (built.images[&app].digest, built.blobs().expect("blobs").len()))
    };
    let (digest, blobs) = again("source = \"oci:out:1-app\"").expect("as it is");
    assert_eq!((digest, blobs), (first.images[&app].digest, 4));
    let (digest, blobs) =
        again("source = [\"oci:out:1\", \"dir:rootfs\"]").expect("one more layer");
    assert_ne!(digest, first.images[&app].digest);
    assert_eq!(blobs, 4, "the second layer has the bytes of the first");
    let error = again("source = \"oci:out\"").expect_err("several");
    let BuildError::Source { source, .. } = error else { panic!("{error}") };
    assert!(source.to_string().contains("several images"), "{source}");
    let error = again("source = \"oci:out:9\"").expect_err("no tag");
    let BuildError::Source { source, .. } = error else { panic!("{error}") };
    assert!(source.to_string().contains("the tags are: 1, 1-app"), "{source}");
}

#[test]
fn a_docker_archive_gives_its_layers_and_config() {
    let dir = tempfile::tempdir().expect("dir");
    let mut layer = Vec::new();
    source(dir.path(), TOML);
    let rootfs = dir.path().join("rootfs");
    crate::layer::write_dir(&rootfs, 0, crate::layer::Owners::Root, &mut layer).expect("layer");
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/run"],"Env":["A=0"]}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        Digest::of(&layer)
    );
    let manifest = br#"[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l/layer.tar"]}]"#;
    let archive = |layer: &[u8]| {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, content) in
            [("l/layer.tar", layer), ("c.json", config.as_bytes()), ("manifest.json", manifest)]
        {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, content).expect("append");
        }
        fs::write(dir.path().join("x.tar"), archive.into_inner().expect("tar")).expect("write");
    };
    archive(&layer);
    let toml = TOML.replace("dir:rootfs", "docker-archive:x.tar").replace("entrypoint", "#");
    let set = source(dir.path(), &toml);
    let built = to_layout_blocking(&set, &dir.path().join("out")).expect("build");
    let image = built.images.values().next().expect("image");
    let manifest = oci::parse_manifest(&built.document(image).expect("manifest")).expect("parse");
    let config = built.document(&manifest.config).expect("config");
    let config = oci::parse_image_config(&config).expect("config");
    assert_eq!(config.config.cmd, ["/run"]);
    assert_eq!(config.config.env, ["A=1", "B=2"]);
    layer[1024] ^= 1;
    archive(&layer);
    let error = to_layout_blocking(&set, &dir.path().join("bad")).expect_err("other layer");
    let BuildError::Source { source, .. } = error else { panic!("{error}") };
    assert!(source.to_string().contains("x.tar: layer `l/layer.tar` is sha256:"), "{source}");
}

#[test]
fn a_failed_build_leaves_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let toml = TOML.replace("\"dir:rootfs\"", "[\"dir:rootfs\", \"tar:missing.tar\"]");
    let out = dir.path().join("out");
    let error = to_layout_blocking(&source(dir.path(), &toml), &out).expect_err("missing");
    let BuildError::Source { image, source } = error else { panic!("{error}") };
    assert_eq!(image.as_str(), "app");
    assert!(source.to_string().ends_with("missing.tar"), "{source}");
    let left: Vec<_> = fs::read_dir(dir.path()).expect("list").flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn a_directory_that_is_no_layout_is_left_alone() {
    let dir = tempfile::tempdir().expect("dir");
    let set = source(dir.path(), TOML);
    let error = to_layout_blocking(&set, &dir.path().join("rootfs")).expect_err("not a layout");
    assert!(error.to_string().ends_with("rootfs exists and is not an OCI layout"), "{error}");
    assert!(dir.path().join("rootfs/etc/version").is_file());
}

#[test]
fn dates_are_rfc_3339() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_399, "2000-02-28T23:59:59Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (1_767_225_599, "2025-12-31T23:59:59Z"),
    ] {
        assert_eq!(rfc3339(seconds), text);
    }
}
