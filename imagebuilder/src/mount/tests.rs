//! Tests: file systems made by the real tools, read back by the kernel.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::*;

/// What a walk sees of a path: type and mode, owner, seconds, attributes, content or target.
type Seen = (u32, (u32, u32), i64, Vec<(String, Vec<u8>)>, Vec<u8>);

fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut found = Vec::new();
    for name in names {
        let name = String::from_utf8(name.to_vec()).expect("name");
        let mut value = vec![0; 4096];
        let length = rustix::fs::lgetxattr(path, name.as_str(), &mut value[..]).expect("value");
        found.push((name, value[..length].to_vec()));
    }
    found.sort();
    found
}

fn walk(root: &Path, path: &Path, seen: &mut BTreeMap<PathBuf, Seen>) {
    let meta = fs::symlink_metadata(path).expect("meta");
    let content = if meta.is_file() {
        fs::read(path).expect("content")
    } else if meta.is_symlink() {
        fs::read_link(path).expect("target").as_os_str().as_bytes().to_vec()
    } else {
        Vec::new()
    };
    let inside = path.strip_prefix(root).expect("inside").to_owned();
    let one = (meta.mode(), (meta.uid(), meta.gid()), meta.mtime(), xattrs(path), content);
    seen.insert(inside, one);
    if meta.is_dir() {
        for entry in fs::read_dir(path).expect("list") {
            walk(root, &entry.expect("entry").path(), seen);
        }
    }
}

/// Mounts a file system for a moment and walks it.
fn mounted(form: MountForm, blob: &Path) -> BTreeMap<PathBuf, Seen> {
    let dir = tempfile::tempdir().expect("dir");
    let run = |program: &str, args: &[&str]| {
        let done = Command::new(program).args(args).output().expect(program);
        assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
    };
    let (blob, place) = (blob.to_str().expect("path"), dir.path().to_str().expect("path"));
    run("mount", &["-t", form.as_str(), "-o", "loop,ro", blob, place]);
    let mut seen = BTreeMap::new();
    walk(dir.path(), dir.path(), &mut seen);
    run("umount", &[place]);
    seen
}

/// A layer of what an image can hold: every kind of entry, set-user-ID, capabilities, attributes, odd names and owners.
fn layer(dir: &Path) -> PathBuf {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |kind: tar::EntryType, path: &str, mode, rest: &str, pax: &[(&str, &[u8])]| {
        tar.append_pax_extensions(pax.iter().copied()).expect("pax");
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(70_000);
        header.set_mtime(1_234_567_890);
        let link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
        let content = if link { &b""[..] } else { rest.as_bytes() };
        header.set_size(content.len() as u64);
        match link {
            true => tar.append_link(&mut header, path, rest).expect("link"),
            false => tar.append_data(&mut header, path, content).expect("entry"),
        }
    };
    use tar::EntryType as Kind;
    // cap_net_raw+ep, as setcap(8) writes it.
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    add(Kind::Directory, "./", 0o751, "", &[]);
    add(Kind::Directory, "d/", 0o1777, "", &[]);
    add(Kind::Regular, "d/file", 0o640, "content", &[("SCHILY.xattr.user.note", b"kept")]);
    add(Kind::Regular, "suid", 0o4755, "x", &[("SCHILY.xattr.security.capability", &capability)]);
    add(Kind::Link, "hard", 0o640, "d/file", &[]);
    add(Kind::Symlink, "sym", 0o777, "../gr\u{fc}n b", &[]);
    add(Kind::Fifo, "pipe", 0o600, "", &[]);
    add(Kind::Regular, "d/gr\u{fc}n b\n", 0o644, &"much ".repeat(100_000), &[]);
    add(Kind::Regular, &format!("d/{}", "long".repeat(60)), 0o644, "", &[]);
    add(Kind::Regular, "other", 0o644, "x", &[("SCHILY.xattr.trusted.other", b"left out")]);
    let path = dir.join("layer");
    fs::write(&path, tar.into_inner().expect("tar")).expect("layer");
    path
}

#[test]
fn every_form_has_what_the_layers_have_and_two_builds_are_the_same_bytes() {
    let dir = tempfile::tempdir().expect("dir");
    let flat = Flat::of(vec![layer(dir.path())]).expect("flat");
    for kind in [MountKind::Squashfs, MountKind::Erofs, MountKind::ErofsPlain] {
        let outs = ["one", "two"].map(|name| dir.path().join(format!("{kind:?}-{name}")));
        for (out, pause) in outs.iter().zip([0, 1100]) {
            // The clock that tools might take times from goes on by more than a second.
            std::thread::sleep(std::time::Duration::from_millis(pause));
            make(kind, &flat, 5, out).expect("a file system");
        }
        assert!(fs::read(&outs[0]).expect("one") == fs::read(&outs[1]).expect("two"), "{kind:?}");
        let seen = mounted(kind.form(), &outs[0]);
        let at = |path: &str| seen.get(Path::new(path)).unwrap_or_else(|| panic!("{path}"));
        assert_eq!(seen.len(), 10, "{:?}", seen.keys());
        assert!(
            seen.values().all(|it| it.2 == 1_234_567_890 && it.1 == (1000, 70_000)),
            "{kind:?}"
        );
        for (path, mode) in
            [("", 0o040_751), ("d", 0o041_777), ("suid", 0o104_755), ("pipe", 0o010_600)]
        {
            assert_eq!(at(path).0, mode, "{kind:?} {path}");
        }
        assert_eq!(at("hard"), at("d/file"));
        assert_eq!(at("d/file").3, [("user.note".to_owned(), b"kept".to_vec())]);
        assert_eq!(at("suid").3[0].0, "security.capability");
        assert_eq!(at("other").3, []);
        assert_eq!(at("sym").4, "../gr\u{fc}n b".as_bytes());
        assert_eq!(at("d/gr\u{fc}n b\n").4.len(), 500_000);
    }
}

#[test]
fn a_tool_that_fails_is_named_with_its_last_words() {
    let mut command = Command::new("sh");
    command.args(["-c", "cat >/dev/null; echo no space >&2; exit 3"]);
    let error = feed(command, "mkfs.erofs", |_| Ok(())).expect_err("fails");
    assert_eq!(error.to_string(), "mkfs.erofs failed: no space");
    let source = io::ErrorKind::NotFound.into();
    let missing = MountError::Missing { program: "mksquashfs", package: "squashfs-tools", source };
    assert!(missing.to_string().ends_with("apt-get install squashfs-tools"), "{missing}");
}
