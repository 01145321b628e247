//! A whole build out of small fake files: what is in the archive, that two builds are the same, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use initramfs::archive::{self, Entry};
use initramfs::compress::{self, Compression};
use initramfs::elf::fake;
use initramfs::image::Config;
use initramfs::kernel::{Source, kconfig};
use initramfs::modules::wanted;
use protocol::ids::Digest;

use fixture::{Fixture, LISTS, RELEASE, run};

#[path = "image/fixture.rs"]
mod fixture;
#[path = "image/forms.rs"]
mod forms;
#[path = "image/hardware.rs"]
mod hardware;

fn text(entries: &BTreeMap<String, Entry>, path: &str) -> String {
    String::from_utf8(entries[path].contents.clone()).unwrap()
}

#[test]
fn the_archive_holds_the_agent_the_modules_and_their_index() {
    let fixture = Fixture::new();
    let report = fixture.build().unwrap();
    let entries = fixture.entries();
    let base = format!("lib/modules/{RELEASE}");
    assert_eq!(entries["init"].mode, 0o100_755);
    assert_eq!(entries["init"].contents, fake::program(None, &[]));
    assert_eq!((entries["dev/console"].mode, entries["dev/console"].device), (0o020_600, (5, 1)));
    assert_eq!((entries["dev/null"].mode, entries["dev/null"].device), (0o020_666, (1, 3)));
    assert_eq!(entries["tmp"].mode, 0o041_777);
    let cipher = &entries[&format!("{base}/kernel/cipher.ko.zst")].contents;
    let cipher = zstd::decode_all(cipher.as_slice()).unwrap();
    assert_eq!(cipher, fake::module(&[("softdep", "pre: hash")]), "it is not compressed twice");
    assert!(!entries.keys().any(|path| path.contains("kernel/other.ko")));
    let dep = "kernel/cipher.ko.zst:\nkernel/fs/overlay.ko.zst: kernel/cipher.ko.zst\n";
    assert_eq!(text(&entries, &format!("{base}/modules.dep")), dep);
    let alias = text(&entries, &format!("{base}/modules.alias"));
    assert!(alias.ends_with("\nalias fs-overlay overlay\n"));
    let softdep = text(&entries, &format!("{base}/modules.softdep"));
    assert!(softdep.ends_with("\nsoftdep cipher pre: hash\n"));
    assert_eq!(text(&entries, &format!("{base}/modules.builtin")), "kernel/net/packet.ko\n");
    assert!(text(&entries, "etc/layercake/modules").ends_with("\noverlay\n"));
    assert!(entries.values().all(|entry| entry.mtime == 7 && entry.owner == (0, 0)));
    assert_eq!(report.manifest.modules, ["cipher", "overlay"]);
    assert_eq!(report.absent, ["e1000"]);
}

#[test]
fn every_parent_comes_before_its_children_and_inode_numbers_are_unique() {
    let fixture = Fixture::new();
    fixture.build().unwrap();
    let plain = compress::unpack(&fixture.out("initramfs.img"), 1 << 24).unwrap();
    let mut seen = vec![".".to_owned()];
    let mut number = 0;
    for entry in archive::read_all(&plain).unwrap() {
        let parent = entry.path.rsplit_once('/').map_or(".", |(parent, _)| parent);
        assert!(seen.contains(&parent.to_owned()), "{}", entry.path);
        // Each archive counts for itself.
        number = if entry.path == "." { 1 } else { number + 1 };
        assert_eq!(entry.ino, number);
        seen.push(entry.path);
    }
}

#[test]
fn a_module_that_an_overlay_brings_is_the_one_that_is_loaded() {
    let mut fixture = Fixture::new();
    let base = format!("lib/modules/{RELEASE}");
    let dir = fixture.dir.path().join("overlay");
    fs::create_dir_all(dir.join(&base).join("kernel/fs")).unwrap();
    fs::write(dir.join(&base).join("kernel/fs/overlay.ko"), "patched").unwrap();
    fixture.config.overlays = vec![dir.clone()];
    fixture.build().unwrap();
    let entries = fixture.entries();
    let dep = format!("{base}/modules.dep");
    let expected = "kernel/cipher.ko.zst:\nkernel/fs/overlay.ko: kernel/cipher.ko.zst\n";
    assert_eq!(text(&entries, &dep), expected);
    assert_eq!(text(&entries, &format!("{base}/kernel/fs/overlay.ko")), "patched");
    assert!(!entries.contains_key(&format!("{base}/kernel/fs/overlay.ko.zst")));
    fs::write(dir.join(&dep), "kernel/fs/overlay.ko:\n").unwrap();
    fixture.build().unwrap();
    assert_eq!(text(&fixture.entries(), &dep), "kernel/fs/overlay.ko:\n", "their own index stays");
}

#[test]
fn cpio_and_zstd_find_the_archives_where_a_kernel_does() {
    let mut fixture = Fixture::new();
    let lists = LISTS
        .replace("need = 'required', reason = 'DHCP'", "need = 'optional', reason = 'x'")
        + "\n[flavour.custom]\nmodule = [{ name = 'cipher', need = 'required', plain = true, reason = 'early' }]";
    fixture.config.lists = wanted::parse(&lists).unwrap();
    let report = fixture.build().unwrap();
    assert_eq!((report.manifest.modules.len(), report.modules_compressed), (2, 1));
    let image = fixture.out("initramfs.img");
    let first = archive::length(&image).unwrap().next_multiple_of(4);
    let dir = fixture.dir.path();
    fs::write(dir.join("first"), &image[..first]).unwrap();
    fs::write(dir.join("second"), &image[first..]).unwrap();
    let base = format!("lib/modules/{RELEASE}/kernel");
    let listed = run(dir, "sh", &["-c", "cpio -it --quiet < first"]);
    assert!(listed.ends_with(&format!("{base}/fs/overlay.ko.zst\n")), "{listed}");
    let listed = run(dir, "sh", &["-c", "zstd -dc < second | cpio -it --quiet"]);
    assert!(listed.contains(&format!("\n{base}/cipher.ko\n")), "{listed}");
    assert!(listed.lines().any(|line| line == "init"), "{listed}");
    // Smallest of all: xz, with nothing compressed in it.
    fixture.config.compression = Compression::XZ;
    assert_eq!(fixture.build().unwrap().modules_compressed, 0);
}

#[test]
fn two_builds_give_the_same_bytes_wherever_they_are_made() {
    let mut first = Fixture::new();
    first.config.overlays = vec![overlay(&first, &["b", "a", "c"])];
    let mut second = Fixture::new();
    second.config.overlays = vec![overlay(&second, &["c", "b", "a"])];
    first.build().unwrap();
    second.build().unwrap();
    for name in ["vmlinuz", "initramfs.img", "manifest.json"] {
        assert!(first.out(name) == second.out(name), "{name}");
    }
    let again = first.out("manifest.json");
    assert!(first.build().unwrap().unchanged);
    assert_eq!(first.out("manifest.json"), again);
}

fn overlay(fixture: &Fixture, names: &[&str]) -> std::path::PathBuf {
    let dir = fixture.dir.path().join("overlay");
    fs::create_dir(&dir).unwrap();
    names.iter().for_each(|name| fs::write(dir.join(name), name).unwrap());
    dir
}

#[test]
fn the_manifest_says_what_the_files_are() {
    let fixture = Fixture::new();
    let report = fixture.build().unwrap();
    let manifest: protocol::layer0::Manifest =
        serde_json::from_slice(&fixture.out("manifest.json")).unwrap();
    assert_eq!(manifest, report.manifest);
    assert_eq!((manifest.kernel.as_str(), manifest.flavour.as_str()), (RELEASE, "custom"));
    assert_eq!(manifest.agent_digest, Digest::of(&fake::program(None, &[])));
    for artifact in &manifest.artifacts {
        assert_eq!(artifact.digest, Digest::of(&fixture.out(&artifact.name)));
        let mode = fs::metadata(fixture.config.out.join(&artifact.name)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o644, "a server of another user reads it");
    }
    let names: Vec<_> = manifest.artifacts.iter().map(|artifact| artifact.name.as_str()).collect();
    assert_eq!(names, ["vmlinuz", "initramfs.img", "layercake-agent"]);
}

#[test]
fn a_dynamic_agent_is_refused_with_what_it_asks_for() {
    let fixture = Fixture::new();
    let agent = fake::program(Some("/lib64/ld-linux-x86-64.so.2"), &["libc.so.6"]);
    fs::write(&fixture.config.agent, agent).unwrap();
    let error = fixture.error();
    for word in ["/agent is dynamically", "interpreter /lib64/ld-linux", "library libc.so.6"] {
        assert!(error.contains(word), "{error}");
    }
    fs::write(&fixture.config.agent, "#!/bin/sh\n").unwrap();
    assert!(fixture.error().contains("/agent cannot be the agent"));
}

#[test]
fn a_missing_module_and_a_missing_symbol_are_named() {
    let mut fixture = Fixture::new();
    let lists = "module = [{ name = 'erofs', need = 'required', reason = 'mounted layers' }]";
    fixture.config.lists = wanted::parse(lists).unwrap();
    let error = fixture.error();
    assert!(error.contains("no module erofs") && error.ends_with("mounted layers"), "{error}");
    let config = fixture.dir.path().join("config");
    fs::write(&config, "CONFIG_A=y\n").unwrap();
    let symbols = "[[symbol]]\nname = 'CONFIG_B'\nvalue = 'y'\nreason = 'containers'\n";
    fixture.config.required = kconfig::parse_required(symbols).unwrap();
    set_kernel_config(&mut fixture.config, &config);
    let error = fixture.error();
    assert!(error.ends_with("CONFIG_B is n, wanted y: containers"), "{error}");
}

fn set_kernel_config(build: &mut Config, path: &Path) {
    if let Source::Files { config, .. } = &mut build.kernel {
        *config = Some(path.to_owned());
    }
}

#[test]
fn overlays_and_certificates_are_in_the_image() {
    let mut fixture = Fixture::new();
    let dir = overlay(&fixture, &["motd"]);
    fixture.config.overlays = vec![dir];
    let pem = fixture.dir.path().join("site.crt");
    fs::write(&pem, "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n").unwrap();
    fixture.config.ca = vec![pem];
    fixture.config.compression = Compression::None;
    fixture.build().unwrap();
    let entries = archive::read(&fixture.out("initramfs.img")).unwrap();
    let find = |path: &str| entries.iter().find(|entry| entry.path == path).unwrap();
    assert_eq!(find("motd").contents, b"motd");
    assert!(find("etc/layercake/ca/site.pem").contents.starts_with(b"-----BEGIN"));
}

#[test]
fn archives_are_appended_as_they_are_and_what_is_none_is_refused() {
    let mut fixture = Fixture::new();
    let archive = |name: &str, path: &str| {
        let mut tree = initramfs::tree::Tree::new();
        tree.file(path, 0o600, b"site".to_vec()).unwrap();
        let bytes = Compression::XZ.compress(archive::write(&tree, 0).unwrap()).unwrap();
        let file = fixture.dir.path().join(name);
        fs::write(&file, &bytes).unwrap();
        (file, bytes)
    };
    let (one, bytes) = archive("one.cpio.xz", "etc/layercake/one");
    let (two, last) = archive("two.cpio.xz", "etc/layercake/two");
    fixture.config.archives = vec![one, two.clone()];
    let report = fixture.build().unwrap();
    let image = fixture.out("initramfs.img");
    assert!(image.ends_with(&last));
    let entries = archive::read_all(&compress::unpack(&image, 1 << 20).unwrap()).unwrap();
    for path in ["init", "etc/layercake/one", "etc/layercake/two"] {
        assert!(entries.iter().any(|entry| entry.path == path), "{path}");
    }
    let given = report.manifest.inputs.unwrap().files;
    assert_eq!((given[0].option.as_str(), given[0].digest), ("archive", Digest::of(&bytes)));
    fs::remove_dir_all(&fixture.config.out).unwrap();
    for (contents, said) in [
        (b"PK\x03\x04".as_slice(), "is not a newc cpio"),
        (&bytes[..bytes.len() - 20], "does not unpack"),
        (b"070701", "cannot read entry 0"),
    ] {
        fs::write(&two, contents).unwrap();
        let error = fixture.error();
        assert!(
            error.contains("two.cpio.xz cannot be appended") && error.contains(said),
            "{error}"
        );
    }
}

#[test]
fn a_kernel_that_cannot_unpack_the_initramfs_is_refused() {
    let mut fixture = Fixture::new();
    let config = fixture.dir.path().join("config");
    fs::write(&config, "CONFIG_RD_ZSTD=y\n").unwrap();
    set_kernel_config(&mut fixture.config, &config);
    fixture.config.compression = Compression::XZ;
    let error = fixture.error();
    assert!(error.contains("CONFIG_RD_XZ is n, wanted y: unpacks the initramfs"), "{error}");
    fs::write(&config, "CONFIG_RD_ZSTD=y\nCONFIG_RD_XZ=y\nCONFIG_XZ_DEC_X86=y\n").unwrap();
    assert_eq!(fixture.build().unwrap().compression, Compression::XZ);
}
