//! Small fake files that an image is built of.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use initramfs::archive::{self, Entry};
use initramfs::compress::{self, Compression};
use initramfs::elf::fake;
use initramfs::image::forms::FormOptions;
use initramfs::image::hardware::Hardware;
use initramfs::image::{self, BuildError, Config, Report};
use initramfs::kernel::{Source, bzimage};
use initramfs::modules::wanted;

/// The release of the kernel that is none.
pub(super) const RELEASE: &str = "6.12.1-test";
/// Its modules, as the lists of `kernel-config` want them.
pub(super) const LISTS: &str = "
    module = [
      { name = 'overlay', need = 'required', load = true, reason = 'roots' },
      { name = 'packet', need = 'required', reason = 'DHCP' },
      { name = 'e1000', need = 'optional', reason = 'old machines' },
    ]";

/// Files of a build in a directory of their own.
pub(super) struct Fixture {
    pub(super) dir: tempfile::TempDir,
    pub(super) config: Config,
}

impl Fixture {
    pub(super) fn new() -> Self {
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

    pub(super) fn build(&self) -> Result<Report, BuildError> {
        image::build(&self.config, &|_| ())
    }

    pub(super) fn error(&self) -> String {
        let error = self.build().unwrap_err();
        assert!(!self.config.out.join("initramfs.img").exists(), "nothing is left half done");
        error.to_string()
    }

    pub(super) fn out(&self, name: &str) -> Vec<u8> {
        fs::read(self.config.out.join(name)).unwrap()
    }

    pub(super) fn entries(&self) -> BTreeMap<String, Entry> {
        let plain = compress::unpack(&self.out("initramfs.img"), 1 << 24).unwrap();
        let entries = archive::read_all(&plain).unwrap();
        entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect()
    }
}

/// Runs a program that must succeed; what it prints.
pub(super) fn run(dir: &Path, program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
