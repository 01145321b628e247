//! Tests: a layer comes out as it went in, entry by entry, and as GNU tar makes it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use super::testing::Tar;
use super::{Limits, Summary, apply};

fn applied(bytes: &[u8]) -> (tempfile::TempDir, Summary) {
    let root = tempfile::tempdir().expect("temporary directory");
    let summary = apply(bytes, root.path(), &Limits::default()).expect("apply");
    (root, summary)
}

/// Everything about one path that a layer carries. Hard links are told by the lowest path of their inode.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    size: u64,
    links: u64,
    content: Vec<u8>,
    xattrs: BTreeMap<String, Vec<u8>>,
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 4096];
    let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).ok()?;
    value.truncate(length);
    Some(value)
}

fn see(path: &Path) -> Seen {
    let meta = fs::symlink_metadata(path).expect("metadata");
    let kind = meta.file_type();
    let content = match (kind.is_file(), kind.is_symlink()) {
        (true, _) => fs::read(path).expect("read"),
        (_, true) => fs::read_link(path).expect("link").into_os_string().into_encoded_bytes(),
        _ => Vec::new(),
    };
    let names = ["user.note", "security.capability", "trusted.overlay.opaque"];
    let xattrs = names.iter().filter_map(|name| Some(((*name).to_owned(), xattr(path, name)?)));
    Seen {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        size: if kind.is_dir() { 0 } else { meta.len() },
        links: if kind.is_dir() { 0 } else { meta.nlink() },
        content,
        xattrs: xattrs.collect(),
    }
}

fn tree(root: &Path) -> BTreeMap<String, Seen> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let name = path.strip_prefix(root).expect("below").to_string_lossy().into_owned();
        if fs::symlink_metadata(&path).expect("metadata").is_dir() {
            todo.extend(
                fs::read_dir(&path).expect("list").map(|entry| entry.expect("entry").path()),
            );
        }
        found.insert(name, see(&path));
    }
    found
}

fn run(command: &mut Command) {
    let output = command.output().expect("start");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A tree with one of everything.
fn build(root: &Path) {
    let long = "a-very-long-component-of-a-name/".repeat(6);
    fs::create_dir_all(root.join(&long)).expect("long");
    fs::write(root.join(&long).join("n".repeat(200)), "long").expect("long file");
    fs::create_dir_all(root.join("usr/bin")).expect("bin");
    fs::write(root.join("usr/bin/su"), vec![7; 300_000]).expect("su");
    fs::set_permissions(root.join("usr/bin/su"), fs::Permissions::from_mode(0o4755)).expect("suid");
    fs::hard_link(root.join("usr/bin/su"), root.join("usr/bin/su2")).expect("hard link");
    symlink("usr/bin", root.join("bin")).expect("symlink");
    symlink("/nowhere/at/all", root.join("dangling")).expect("dangling");
    fs::create_dir(root.join("tmp")).expect("tmp");
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("sticky");
    fs::create_dir(root.join("sealed")).expect("sealed");
    fs::write(root.join("sealed/file"), "").expect("inside");
    fs::set_permissions(root.join("sealed"), fs::Permissions::from_mode(0o2500)).expect("sealed");
    std::os::unix::fs::chown(root.join("sealed/file"), Some(1234), Some(70_000)).expect("chown");
    std::os::unix::fs::lchown(root.join("dangling"), Some(5), Some(6)).expect("lchown");
    let pipe = root.join("pipe");
    let mode = rustix::fs::Mode::from_raw_mode(0o620);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).expect("fifo");
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(root.join("usr/bin"), "user.note", b"line\nline\0", flags).expect("user");
    // cap_net_raw=ep, version 2 (linux/capability.h, struct vfs_cap_data).
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    fs::write(root.join("usr/bin/ping"), "ping").expect("ping");
    rustix::fs::setxattr(root.join("usr/bin/ping"), "security.capability", &capability, flags)
        .expect("capability");
    fs::write(root.join("old"), "old").expect("old");
    let old = fs::File::open(root.join("old")).expect("old");
    let past = std::time::UNIX_EPOCH - std::time::Duration::from_millis(1500);
    old.set_modified(past).expect("before 1970");
}

#[test]
fn a_tree_of_everything_comes_out_as_it_went_in() {
    let source = tempfile::tempdir().expect("source");
    build(source.path());
    for format in ["pax", "gnu"] {
        let mut command = Command::new("tar");
        command.args(["--format", format, "--numeric-owner", "-cf", "-", "-C"]).arg(source.path());
        if format == "pax" {
            command.args(["--xattrs", "--xattrs-include=*"]);
        }
        let output = command.arg(".").output().expect("tar");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let (root, summary) = applied(&output.stdout);
        let (mut expected, found) = (tree(source.path()), tree(root.path()));
        for seen in expected.values_mut().filter(|_| format == "gnu") {
            seen.xattrs.clear();
            // GNU's own format has whole seconds, rounded down.
            seen.mtime.1 = 0;
        }
        for (path, seen) in &expected {
            assert_eq!(found.get(path), Some(seen), "{format}: {path}");
        }
        assert_eq!(found.len(), expected.len());
        assert_eq!(summary.bytes, 300_000 + 4 + 4 + 3);
        let inode = |name: &str| fs::metadata(root.path().join(name)).expect("inode").ino();
        assert_eq!(inode("usr/bin/su"), inode("usr/bin/su2"));
    }
}

#[test]
fn a_real_tree_comes_out_as_gnu_tar_makes_it() {
    let archive = Command::new("tar")
        .args(["-cf", "-", "-C", "/usr/share/doc", "."])
        .output()
        .expect("tar of /usr/share/doc");
    let (ours, _) = applied(&archive.stdout);
    let theirs = tempfile::tempdir().expect("directory");
    let file = theirs.path().join("archive.tar");
    fs::write(&file, &archive.stdout).expect("archive");
    let root = theirs.path().join("root");
    fs::create_dir(&root).expect("root");
    run(Command::new("tar").arg("-xpf").arg(&file).arg("-C").arg(&root));
    let (expected, found) = (tree(&root), tree(ours.path()));
    assert!(expected.len() > 100, "/usr/share/doc holds only {} paths", expected.len());
    for (path, seen) in &expected {
        assert_eq!(found.get(path), Some(seen), "{path}");
    }
    assert_eq!(found.len(), expected.len());
}

#[test]
fn whiteouts_become_what_overlayfs_understands() {
    let archive = Tar::default()
        .dir("d")
        .file("d/.wh.gone", b"")
        .file("d/.wh..wh..opq", b"")
        // A whiteout of something this layer has itself hides only what lies below.
        .file("both", b"kept")
        .file(".wh.both", b"")
        .dir("later")
        .file(".wh.later", b"")
        .file(".wh.earlier", b"")
        .dir("earlier")
        .end();
    let (root, summary) = applied(&archive);
    let gone = fs::symlink_metadata(root.path().join("d/gone")).expect("whiteout");
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    assert_eq!(fs::read(root.path().join("both")).expect("kept"), b"kept");
    for opaque in ["d", "later", "earlier"] {
        let value = xattr(&root.path().join(opaque), "trusted.overlay.opaque");
        assert_eq!(value.as_deref(), Some(&b"y"[..]), "{opaque}");
    }
    assert_eq!(summary.entries, 9);
}

#[test]
fn symlinked_parents_resolve_inside_the_layer() {
    let archive = Tar::default()
        .dir("usr/lib")
        .symlink("lib", "/usr/lib")
        .file("lib/x", b"x")
        .link("lib/y", "lib/x")
        .dir("lib/sub")
        .file("lib/sub/.wh.z", b"")
        .end();
    let (root, _) = applied(&archive);
    assert_eq!(fs::read(root.path().join("usr/lib/y")).expect("linked"), b"x");
    assert!(root.path().join("usr/lib/sub").is_dir());
    assert!(fs::symlink_metadata(root.path().join("usr/lib/sub/z")).is_ok());
}

#[test]
fn a_later_entry_replaces_an_earlier_one() {
    let archive = Tar::default()
        .file("a", b"first")
        .link("b", "a")
        .file("a", b"second")
        .symlink("c", "a")
        .dir("c")
        .file("c/x", b"x")
        .dir("d")
        .symlink("d", "c")
        .end();
    let (root, _) = applied(&archive);
    assert_eq!(fs::read(root.path().join("a")).expect("a"), b"second");
    assert_eq!(fs::read(root.path().join("b")).expect("b"), b"first");
    assert_eq!(fs::read(root.path().join("d/x")).expect("through the symlink"), b"x");
}

#[test]
fn missing_parents_are_made_and_foreign_attributes_counted() {
    let archive = Tar::default()
        .pax(&[("SCHILY.xattr.security.selinux", b"label"), ("SCHILY.xattr.user.note", b"n")])
        .file("a/b/c", b"x")
        .raw(b'3', b"dev/console", b"", 0o600, b"")
        .link("dev/copy", "dev/console")
        .end();
    let (root, summary) = applied(&archive);
    assert_eq!(fs::metadata(root.path().join("a/b")).expect("made").mode() & 0o777, 0o755);
    assert_eq!((summary.devices_skipped, summary.xattrs_skipped), (2, 1));
}

#[test]
fn sparse_files_come_out_with_their_holes_from_every_form_of_gnu_tar() {
    use std::os::unix::fs::FileExt;
    let source = tempfile::tempdir().expect("temporary directory");
    let file = fs::File::create(source.path().join("sparse")).expect("create");
    file.set_len(8 << 20).expect("length");
    // More pieces than a header has room for.
    for piece in 0..30_u64 {
        file.write_all_at(&[7; 4096], piece * (256 << 10)).expect("write");
    }
    for form in
        [&["--format=gnu"][..], &["--format=posix"], &["--format=posix", "--sparse-version=0.1"]]
    {
        let mut tar = Command::new("tar");
        tar.args(["--sparse", "-c", "-C"]).arg(source.path()).args(form).arg("sparse");
        let output = tar.output().expect("tar");
        assert!(output.status.success() && output.stdout.len() < 1 << 20, "{form:?}");
        let (root, summary) = applied(&output.stdout);
        let made = root.path().join("sparse");
        assert!(
            fs::read(&made).expect("read") == fs::read(source.path().join("sparse")).expect("read")
        );
        assert_eq!(summary.bytes, 8 << 20);
        assert!(fs::metadata(&made).expect("metadata").blocks() * 512 < 2 << 20, "{form:?}: holes");
        assert_eq!(fs::read_dir(root.path()).expect("list").count(), 1, "under its own name");
    }
}
