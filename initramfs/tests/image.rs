//! A whole build out of small fake files: what is in the archive, that two builds are the same, and what is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use initramfs::archive::{self, Compression, Entry};
use initramfs::elf::fake;
use initramfs::image::forms::{EfiOptions, Form};
use initramfs::image::{self, BuildError, Config, Report};
use initramfs::kernel::{Source, bzimage, kconfig};
use initramfs::modules::wanted;
use initramfs::pe;
use protocol::ids::Digest;

const RELEASE: &str = "6.12.1-test";
const LISTS: &str = "
    module = [
      { name = 'overlay', need = 'required', load = true, reason = 'roots' },
      { name = 'packet', need = 'required', reason = 'DHCP' },
      { name = 'e1000', need = 'optional', reason = 'old machines' },
    ]";

/// Files of a build in a directory of their own.
struct Fixture {
    dir: tempfile::TempDir,
    config: Config,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let modules = at(RELEASE);
        fs::create_dir_all(modules.join("kernel/fs")).unwrap();
        let overlay = fake::module(&[("depends", "cipher"), ("alias", "fs-overlay")]);
        fs::write(modules.join("kernel/fs/overlay.ko"), overlay).unwrap();
        let cipher = fake::module(&[("softdep", "pre: hash")]);
        let cipher = zstd::encode_all(cipher.as_slice(), 1).unwrap();
        fs::write(modules.join("kernel/cipher.ko.zst"), cipher).unwrap();
        fs::write(modules.join("kernel/other.ko"), fake::module(&[])).unwrap();
        fs::write(modules.join("modules.builtin"), "kernel/net/packet.ko\n").unwrap();
        fs::write(at("agent"), fake::program(None, &[])).unwrap();
        fs::write(at("vmlinuz"), bzimage::fake(&format!("{RELEASE} (x) #1"))).unwrap();
        let config = Config {
            agent: at("agent"),
            agent_version: "1.2.3".to_owned(),
            version: "1.2.3".to_owned(),
            kernel: Source::Files { image: at("vmlinuz"), modules, config: None },
            lists: wanted::parse(LISTS).unwrap(),
            required: Vec::new(),
            ca: Vec::new(),
            imageset_keys: Vec::new(),
            registries: None,
            overlays: Vec::new(),
            compression: Compression::Zstd,
            mtime: 7,
            forms: BTreeSet::new(),
            efi: EfiOptions::default(),
            cache: at("cache"),
            out: at("out"),
        };
        Self { dir, config }
    }

    fn build(&self) -> Result<Report, BuildError> {
        image::build(&self.config, &|_| ())
    }

    fn error(&self) -> String {
        let error = self.build().unwrap_err();
        assert!(!self.config.out.join("initramfs.img").exists(), "nothing is left half done");
        error.to_string()
    }

    fn out(&self, name: &str) -> Vec<u8> {
        fs::read(self.config.out.join(name)).unwrap()
    }

    fn entries(&self) -> BTreeMap<String, Entry> {
        let plain = zstd::decode_all(self.out("initramfs.img").as_slice()).unwrap();
        let entries = archive::read(&plain).unwrap();
        entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect()
    }
}

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
    let cipher = &entries[&format!("{base}/kernel/cipher.ko")].contents;
    assert_eq!(*cipher, fake::module(&[("softdep", "pre: hash")]), "it is not compressed twice");
    assert!(!entries.contains_key(&format!("{base}/kernel/other.ko")));
    let dep = "kernel/cipher.ko:\nkernel/fs/overlay.ko: kernel/cipher.ko\n";
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
    let plain = zstd::decode_all(fixture.out("initramfs.img").as_slice()).unwrap();
    let mut seen = vec![".".to_owned()];
    for (index, entry) in archive::read(&plain).unwrap().into_iter().enumerate() {
        let parent = entry.path.rsplit_once('/').map_or(".", |(parent, _)| parent);
        assert!(seen.contains(&parent.to_owned()), "{}", entry.path);
        assert_eq!(usize::try_from(entry.ino).unwrap(), index + 1);
        seen.push(entry.path);
    }
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
fn one_efi_program_holds_this_kernel_and_this_initramfs_and_goes_when_it_is_not_asked_for() {
    let mut fixture = Fixture::new();
    fs::write(fixture.dir.path().join("stub"), pe::fake()).unwrap();
    fixture.config.forms = BTreeSet::from([Form::Uki]);
    fixture.config.efi.stub = Some(fixture.dir.path().join("stub"));
    fixture.config.efi.command_line = "console=ttyS0".to_owned();
    let report = fixture.build().unwrap();
    let image = fixture.out("layer0.efi");
    let artifact = report.manifest.artifacts.iter().find(|it| it.name == "layer0.efi").unwrap();
    assert_eq!(artifact.digest, Digest::of(&image));
    let sections = pe::sections(&image).unwrap();
    for (name, file) in [(".linux", "vmlinuz"), (".initrd", "initramfs.img")] {
        let section = sections.iter().find(|it| it.name == name).unwrap();
        assert_eq!(section.contents(&image).unwrap(), fixture.out(file), "{name}");
    }
    assert!(fixture.build().unwrap().unchanged);
    fixture.config.forms.clear();
    assert_eq!(fixture.build().unwrap().manifest.artifacts.len(), 3);
    assert!(!fixture.config.out.join("layer0.efi").exists());
}

#[test]
fn a_missing_stub_names_the_package_that_has_it() {
    let mut fixture = Fixture::new();
    fixture.config.forms = BTreeSet::from([Form::Uki]);
    fixture.config.efi.stub = Some(fixture.dir.path().join("nowhere"));
    let error = fixture.error();
    assert!(
        error.contains("nowhere: apt-get install") && error.contains("systemd-boot-efi"),
        "{error}"
    );
}
