//! A whole build out of small fake files: what is in the archive, that two builds are the same, and what is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use initramfs::archive::{self, Entry};
use initramfs::compress::{self, Compression};
use initramfs::elf::fake;
use initramfs::image::forms::{Form, FormOptions};
use initramfs::image::hardware::{FirmwareSource, Hardware};
use initramfs::image::{self, BuildError, Config, Report};
use initramfs::kernel::{Source, bzimage, kconfig};
use initramfs::modules::wanted;
use initramfs::pe;
use protocol::facts::NodeFacts;
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
            with: Vec::new(),
            hardware: Hardware::default(),
            required: Vec::new(),
            ca: Vec::new(),
            imageset_keys: Vec::new(),
            registries: None,
            overlays: Vec::new(),
            archives: Vec::new(),
            compression: Compression::default(),
            mtime: 7,
            forms: BTreeSet::new(),
            options: FormOptions::default(),
            maker: "test".to_owned(),
            crates: Vec::new(),
            cache: at("cache"),
            packed: at("cache"),
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
        let plain = compress::unpack(&self.out("initramfs.img"), 1 << 24).unwrap();
        let entries = archive::read_all(&plain).unwrap();
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
fn one_efi_program_holds_this_kernel_and_this_initramfs_and_goes_when_it_is_not_asked_for() {
    let mut fixture = Fixture::new();
    fs::write(fixture.dir.path().join("stub"), pe::fake()).unwrap();
    fixture.config.forms = BTreeSet::from([Form::Uki]);
    fixture.config.options.stub = Some(fixture.dir.path().join("stub"));
    fixture.config.options.command_line = "console=ttyS0".to_owned();
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

/// A build with every form, out of a kernel and a stub that are none: what is made of them boots nowhere.
fn with_every_form() -> Fixture {
    let mut fixture = Fixture::new();
    fs::write(fixture.dir.path().join("stub"), pe::fake()).unwrap();
    fixture.config.forms = BTreeSet::from([Form::Uki, Form::Iso, Form::Usb, Form::Bundle]);
    fixture.config.options.stub = Some(fixture.dir.path().join("stub"));
    fixture.config.options.command_line = "console=ttyS0".to_owned();
    // As it is where nobody says otherwise; some tools take it for no time.
    fixture.config.mtime = 0;
    fixture
}

#[test]
fn every_form_is_the_same_wherever_and_whenever_it_is_made() {
    let (first, second) = (with_every_form(), with_every_form());
    let report = first.build().unwrap();
    // Tools that take the time take it by the second, and FAT has one for two of them.
    let later = std::time::Instant::now() + std::time::Duration::from_millis(2100);
    while std::time::Instant::now() < later {
        std::thread::yield_now();
    }
    second.build().unwrap();
    let names = [
        "layer0.efi",
        "layer0.iso",
        "layer0-usb.img",
        "layer0-bundle.tar",
        "sbom.cdx.json",
        "SHA256SUMS",
        "manifest.json",
    ];
    for name in names {
        assert!(first.out(name) == second.out(name), "{name}");
    }
    let inputs = report.manifest.inputs.unwrap();
    assert_eq!(inputs.forms, ["uki", "iso", "usb", "bundle"]);
    assert_eq!((inputs.compression.as_str(), inputs.mtime), ("zstd:18", 0));
    assert!(first.build().unwrap().unchanged);
}

#[test]
fn the_checksums_hold_in_the_directory_and_in_the_bundle() {
    let fixture = with_every_form();
    fixture.build().unwrap();
    let unpacked = fixture.dir.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    run(&fixture.config.out, "tar", &["-xf", "layer0-bundle.tar", "-C", "../unpacked"]);
    for dir in [fixture.config.out.clone(), unpacked.join("layer0")] {
        let said = run(&dir, "sha256sum", &["--strict", "-c", "SHA256SUMS"]);
        assert_eq!(said.lines().filter(|line| line.ends_with(": OK")).count(), 8, "{said}");
    }
    fs::write(fixture.config.out.join("vmlinuz"), "spoilt").unwrap();
    let verdict = Command::new("sha256sum")
        .args(["-c", "SHA256SUMS"])
        .current_dir(&fixture.config.out)
        .output();
    assert!(!verdict.unwrap().status.success());
}

fn run(dir: &Path, program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_disk_and_the_cd_hold_the_program_the_kernel_and_the_initramfs() {
    let fixture = with_every_form();
    fixture.build().unwrap();
    let out = &fixture.config.out;
    let files = [
        ("EFI/BOOT/BOOTX64.EFI", "layer0.efi"),
        ("VMLINUZ", "vmlinuz"),
        ("INITRD.IMG", "initramfs.img"),
    ];
    for (inside, outside) in files {
        run(
            out,
            "mcopy",
            &["-n", "-o", "-i", "layer0-usb.img@@1M", &format!("::{inside}"), "../file"],
        );
        assert!(
            fs::read(fixture.dir.path().join("file")).unwrap() == fixture.out(outside),
            "{inside}"
        );
    }
    run(out, "sfdisk", &["--verify", "layer0-usb.img"]);
    let files = [
        ("/boot/vmlinuz", "vmlinuz"),
        ("/boot/initrd.img", "initramfs.img"),
        ("/boot/efi.img", "efi.img"),
    ];
    for (inside, outside) in files {
        let to = fixture.dir.path().join("file");
        fs::remove_file(&to).unwrap();
        run(
            out,
            "xorriso",
            &["-indev", "layer0.iso", "-osirrox", "on", "-extract", inside, to.to_str().unwrap()],
        );
        if outside == "efi.img" {
            run(
                out,
                "mcopy",
                &["-n", "-o", "-i", to.to_str().unwrap(), "::EFI/BOOT/BOOTX64.EFI", "../program"],
            );
            assert!(
                fs::read(fixture.dir.path().join("program")).unwrap() == fixture.out("layer0.efi")
            );
        } else {
            assert!(fs::read(&to).unwrap() == fixture.out(outside), "{inside}");
        }
    }
    let catalogue = run(out, "xorriso", &["-indev", "layer0.iso", "-report_el_torito", "plain"]);
    for word in ["BIOS", "UEFI"] {
        assert!(catalogue.contains(word), "{catalogue}");
    }
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

#[test]
fn the_initramfs_is_linked_into_kernels_of_ours_alone() {
    let mut fixture = Fixture::new();
    fixture.config.forms = BTreeSet::from([Form::Efi]);
    let error = fixture.error();
    assert!(error.contains(RELEASE) && error.contains("--flavour virt"), "{error}");
}

#[test]
fn a_missing_stub_names_the_package_that_has_it() {
    let mut fixture = Fixture::new();
    fixture.config.forms = BTreeSet::from([Form::Uki]);
    fixture.config.options.stub = Some(fixture.dir.path().join("nowhere"));
    let error = fixture.error();
    assert!(
        error.contains("nowhere: apt-get install") && error.contains("systemd-boot-efi"),
        "{error}"
    );
}

/// Facts of a node with one NIC, which asks for its driver by this alias.
fn facts(modalias: &str) -> Vec<NodeFacts> {
    let text = format!(
        "{{\"node\": \"n7\", \"hardware\": {{\"kernel\": \"6.1\", \"devices\": [{{\"modalias\": \"{modalias}\", \
         \"place\": \"0000:01:00.0\", \"driver\": \"nic\", \"class\": \"nic\"}}]}}}}"
    );
    protocol::facts::parse(&text).unwrap()
}

#[test]
fn an_image_for_machines_has_their_drivers_and_no_others_and_says_whose_are_missing() {
    let mut fixture = Fixture::new();
    let dir = fixture.dir.path().join(RELEASE);
    let driver = fake::module(&[("alias", "pci:v0000ABCDd00000001sv*sd*bc*sc*i*")]);
    fs::write(dir.join("kernel/card.ko"), driver).unwrap();
    let alias = |device: u8| format!("pci:v0000ABCDd0000000{device}sv0sd0bc02sc00i00");
    fixture.config.hardware.nodes = Some(facts(&alias(1)));
    let report = fixture.build().unwrap();
    assert!(report.manifest.modules.iter().any(|name| name == "card"));
    assert!(!report.manifest.modules.iter().any(|name| name == "other"));
    fixture.config.hardware.nodes = Some(facts(&alias(2)));
    let error = fixture.build().unwrap_err().to_string();
    let expected = "node n7 would lose its NIC abcd:0002 at 0000:01:00.0, which nic drives there";
    assert!(error.contains(expected), "{error}");
}

#[test]
fn all_modules_are_in_where_that_is_asked_for() {
    let mut fixture = Fixture::new();
    assert!(!fixture.build().unwrap().manifest.modules.iter().any(|name| name == "other"));
    fixture.config.hardware.all_modules = true;
    assert!(fixture.build().unwrap().manifest.modules.iter().any(|name| name == "other"));
}

#[test]
fn firmware_that_modules_ask_for_is_in_the_image_and_in_the_manifest() {
    let mut fixture = Fixture::new();
    let dir = fixture.dir.path().join(RELEASE);
    let overlay = fake::module(&[("firmware", "card/one.bin"), ("firmware", "card/two.bin")]);
    fs::write(dir.join("kernel/fs/overlay.ko"), overlay).unwrap();
    let firmware = fixture.dir.path().join("firmware");
    fs::create_dir_all(firmware.join("card")).unwrap();
    fs::write(firmware.join("card/one.bin"), b"microcode").unwrap();
    assert!(fixture.build().unwrap().manifest.firmware.is_empty());
    fixture.config.hardware.firmware = vec![FirmwareSource::Dir(firmware)];
    let manifest = fixture.build().unwrap().manifest;
    let sizes: Vec<_> = manifest.firmware.iter().map(|it| (it.file.as_str(), it.size)).collect();
    assert_eq!(sizes, [("card/one.bin", Some(9)), ("card/two.bin", None)]);
    assert_eq!(manifest.firmware[0].modules, ["overlay"]);
    let entries = fixture.entries();
    assert_eq!(entries["lib/firmware/card/one.bin"].contents, b"microcode");
}

/// A Debian package with these entries: path, and contents or where a link leads.
fn deb(entries: &[(&str, Result<&str, &str>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, body) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        match body {
            Ok(text) => {
                header.set_size(u64::try_from(text.len()).unwrap());
                tar.append_data(&mut header, path, text.as_bytes()).unwrap();
            }
            Err(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                tar.append_link(&mut header, path, target).unwrap();
            }
        }
    }
    let mut deb = ar::Builder::new(Vec::new());
    let data = tar.into_inner().unwrap();
    for (name, bytes) in [("debian-binary", b"2.0\n".to_vec()), ("data.tar", data)] {
        let size = u64::try_from(bytes.len()).unwrap();
        deb.append(&ar::Header::new(name.into(), size), bytes.as_slice()).unwrap();
    }
    deb.into_inner().unwrap()
}

#[test]
fn a_firmware_package_is_read_through_its_links_and_writes_through_none() {
    let mut fixture = Fixture::new();
    let module = fake::module(&[("firmware", "card/alias.bin")]);
    fs::write(fixture.dir.path().join(RELEASE).join("kernel/fs/overlay.ko"), module).unwrap();
    let outside = fixture.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let file = fixture.dir.path().join("firmware.deb");
    let good = [
        ("lib/firmware/card/one.bin", Ok("microcode")),
        ("lib/firmware/card/alias.bin", Err("one.bin")),
    ];
    fs::write(&file, deb(&good)).unwrap();
    fixture.config.hardware.firmware = vec![FirmwareSource::Deb(file.clone())];
    assert_eq!(fixture.build().unwrap().manifest.firmware[0].size, Some(9));
    let evil = [
        ("lib/firmware/card", Err(outside.to_str().unwrap())),
        ("lib/firmware/card/evil", Ok("written")),
    ];
    fs::write(&file, deb(&evil)).unwrap();
    assert!(fixture.build().is_err());
    assert_eq!(fs::read_dir(outside).unwrap().count(), 0);
}
