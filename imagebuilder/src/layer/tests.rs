//! Tests of `layer`: the tar that comes out of real directories, and tars that are refused.

use std::ffi::CString;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::*;

/// What `tar -tv` would show: path, type, mode, link target and the PAX records.
fn listing(bytes: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(bytes);
    let mut lines = Vec::new();
    for entry in archive.entries().expect("entries") {
        let mut entry = entry.expect("entry");
        let mut line = format!(
            "{} {:?} {:o}",
            entry.path().expect("path").display(),
            entry.header().entry_type(),
            entry.header().mode().expect("mode")
        );
        if let Some(target) = entry.link_name().expect("link") {
            line += &format!(" -> {}", target.display());
        }
        assert_eq!(entry.header().mtime().expect("mtime"), 7);
        if let Some(records) = entry.pax_extensions().expect("pax") {
            for record in records {
                let record = record.expect("record");
                let key = record.key().expect("key");
                if key.starts_with("SCHILY") {
                    line += &format!(" {key}={:?}", record.value_bytes());
                }
            }
        }
        lines.push(line);
    }
    lines
}

fn layer_of(dir: &Path) -> Result<Vec<u8>, LayerError> {
    let mut bytes = Vec::new();
    write_dir(dir, 7, Owners::Root, &mut bytes)?;
    Ok(bytes)
}

#[test]
fn a_directory_becomes_a_sorted_layer_with_links_long_names_and_attributes() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    let long = "n".repeat(120);
    fs::create_dir(at("b")).expect("b");
    fs::write(at("b").join(&long), "long").expect("long");
    fs::write(at("a"), "text").expect("a");
    fs::hard_link(at("a"), at("c")).expect("c");
    symlink("x".repeat(150), at("l")).expect("l");
    let value = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::lsetxattr(at("a"), "security.capability", &value, flags).expect("needs root");
    for (name, mode) in [("a", 0o4755), ("b", 0o700)] {
        fs::set_permissions(at(name), std::os::unix::fs::PermissionsExt::from_mode(mode))
            .expect("chmod");
    }
    fs::set_permissions(at("b").join(&long), std::os::unix::fs::PermissionsExt::from_mode(0o640))
        .expect("chmod");

    let capability = format!("SCHILY.xattr.security.capability={value:?}");
    let target = "x".repeat(150);
    assert_eq!(
        listing(&layer_of(dir.path()).expect("layer")),
        [
            format!("a Regular 4755 {capability}"),
            "b/ Directory 700".to_owned(),
            format!("b/{long} Regular 640"),
            format!("c Link 4755 -> a {capability}"),
            format!("l Symlink 777 -> {target}"),
        ]
    );
}

#[test]
fn owners_are_root_unless_they_are_kept() {
    let dir = tempfile::tempdir().expect("dir");
    fs::write(dir.path().join("a"), "").expect("a");
    std::os::unix::fs::chown(dir.path().join("a"), Some(5), Some(6)).expect("needs root");
    for (owners, expected) in [(Owners::Root, (0, 0)), (Owners::Keep, (5, 6))] {
        let mut bytes = Vec::new();
        write_dir(dir.path(), 0, owners, &mut bytes).expect("layer");
        let header = tar::Header::from_byte_slice(&bytes[..512]);
        assert_eq!((header.uid().expect("uid"), header.gid().expect("gid")), expected);
    }
}

#[test]
fn devices_and_sockets_are_errors_that_name_the_path() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("null");
    let device = rustix::fs::makedev(1, 3);
    let name = CString::new(path.as_os_str().as_bytes()).expect("name");
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(rustix::fs::CWD, &name, kind, rustix::fs::Mode::empty(), device)
        .expect("needs root");
    let error = layer_of(dir.path()).expect_err("device").to_string();
    assert_eq!(
        error,
        format!("{} is a character device, which a layer cannot hold", path.display())
    );
    fs::remove_file(&path).expect("remove");
    let _socket = UnixListener::bind(&path).expect("socket");
    assert!(layer_of(dir.path()).expect_err("socket").to_string().contains("is a socket"));
}

#[test]
fn what_is_no_directory_is_an_error() {
    let error = layer_of(Path::new("/nowhere")).expect_err("missing").to_string();
    assert_eq!(error, "cannot read /nowhere");
    let file = tempfile::NamedTempFile::new().expect("file");
    assert!(layer_of(file.path()).expect_err("file").to_string().contains("not a directory"));
}

fn tar_with(path: &[u8], kind: tar::EntryType) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_ustar_mut().expect("ustar").name[..path.len()].copy_from_slice(path);
    header.set_entry_type(kind);
    header.set_size(3);
    header.set_mode(0o644);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(b"abc");
    bytes.resize(512 * 4, 0);
    bytes
}

fn copied(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    copy_checked(Path::new("x.tar"), bytes, &mut out).map_err(|error| error.to_string())?;
    Ok(out)
}

#[test]
fn a_tar_is_copied_unchanged_whatever_its_compression() {
    let plain = tar_with(b"./a", tar::EntryType::Regular);
    let mut gzip = GzBuilder::new().write(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).expect("gzip");
    let gzip = gzip.finish().expect("gzip");
    let zstd = zstd::encode_all(&plain[..], 1).expect("zstd");
    for bytes in [&plain, &gzip, &zstd] {
        assert_eq!(copied(bytes).expect("tar"), plain);
    }
    assert!(copied(&gzip[..gzip.len() / 2]).is_err(), "half a gzip file was taken");
}

#[test]
fn a_tar_that_no_layer_may_be_is_refused_with_the_entry() {
    use tar::EntryType::{Char, Regular};
    for (bytes, expected) in [
        (tar_with(b"a/../../b", Regular), "entry `a/../../b` has `..`"),
        (tar_with(b"etc/null", Char), "entry `etc/null` is a device outside /dev"),
        (tar_with(b"a", Regular)[..514].to_vec(), "not a whole tar"),
        (b"no tar at all".repeat(99), "not a whole tar"),
        (Vec::new(), "it is empty"),
    ] {
        let error = copied(&bytes).expect_err(expected);
        assert!(error.starts_with("x.tar: ") && error.contains(expected), "{error}");
    }
    assert!(copied(&tar_with(b"./dev/null", Char)).is_ok());
}

proptest::proptest! {
    #[test]
    fn damaged_tars_never_panic(at in 0..2048_usize, byte: u8, cut in 0..2048_usize) {
        let mut bytes = tar_with(b"dir/file", tar::EntryType::Regular);
        bytes[at] = byte;
        fuzz_tar(&bytes);
        fuzz_tar(&bytes[..cut]);
    }
}
