//! Kernels out of RPM packages that rpm's own rpmbuild made, in every compression, compared with what rpm's own tools take out of them;
//! and out of an installed system's tree.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use initramfs::elf::fake;
use initramfs::kernel::{self, Kernel, Source, bzimage, newc};

const RELEASE: &str = "6.17.1-300.test.x86_64";
const SPEC: &str = "
Name: kernel-core
Version: 6.17.1
Release: 300.test
Summary: A kernel
License: GPL
BuildArch: x86_64
AutoReqProv: no
%description
A kernel.
%package -n kernel-modules
Summary: Its modules
%description -n kernel-modules
Modules.
%install
mkdir -p %{buildroot}/lib
cp -a %{tree}/lib/modules %{buildroot}/lib/
%files
/lib/modules/%{rel}/vmlinuz
/lib/modules/%{rel}/config
/lib/modules/%{rel}/modules.builtin
%files -n kernel-modules
/lib/modules/%{rel}/kernel
";

/// A tree as Fedora has it: `lib/modules/RELEASE` with the kernel in it, and two names of one module.
fn tree(dir: &Path) -> PathBuf {
    let modules = dir.join("tree/lib/modules").join(RELEASE);
    fs::create_dir_all(modules.join("kernel/net")).unwrap();
    fs::write(modules.join("vmlinuz"), bzimage::fake(&format!("{RELEASE} (x) #1"))).unwrap();
    fs::write(modules.join("config"), "CONFIG_INET=y\n").unwrap();
    fs::write(modules.join("modules.builtin"), "kernel/net/packet.ko\n").unwrap();
    let module = fake::module(&[("alias", "pci:*"), ("firmware", "x/y.bin")]);
    fs::write(modules.join("kernel/net/one.ko"), &module).unwrap();
    fs::hard_link(modules.join("kernel/net/one.ko"), modules.join("kernel/net/two.ko")).unwrap();
    let large: String = (0..200_000).map(|number| number.to_string()).collect();
    let large = fake::module(&[("description", &large)]);
    fs::write(modules.join("kernel/large.ko.zst"), zstd::encode_all(large.as_slice(), 1).unwrap())
        .unwrap();
    modules
}

/// The packages rpmbuild makes of the tree, with this payload (`w3.zstdio`).
fn rpms(dir: &Path, payload: &str) -> Vec<PathBuf> {
    let top = dir.join(payload);
    fs::create_dir_all(&top).unwrap();
    fs::write(top.join("kernel.spec"), SPEC).unwrap();
    let built = Command::new("rpmbuild")
        .args(["-bb", "--quiet", "--target", "x86_64"])
        .args(["--define", &format!("_topdir {}", top.display())])
        .args(["--define", &format!("_binary_payload {payload}")])
        .args(["--define", &format!("tree {}", dir.join("tree").display())])
        .args(["--define", &format!("rel {RELEASE}")])
        .args(["--define", "__os_install_post %{nil}", "--define", "_build_id_links none"])
        .arg(top.join("kernel.spec"))
        .output()
        .expect("rpmbuild is missing: apt-get install rpm");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let dir = fs::read_dir(top.join("RPMS/x86_64")).unwrap();
    let mut files: Vec<_> = dir.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 2, "{files:?}");
    files
}

fn get(source: &Source, cache: &Path) -> Result<Kernel, String> {
    kernel::get(source, cache, &|_| ()).map_err(|error| error.to_string())
}

/// The names of regular files that rpm's own tool takes out of a package.
fn names_by_rpm2cpio(package: &Path) -> BTreeSet<String> {
    let output = Command::new("rpm2cpio").arg(package).output().unwrap();
    assert!(output.status.success());
    let mut names = BTreeSet::new();
    let count = |entry: &newc::Entry, _: &mut dyn std::io::Read| {
        names.extend(entry.regular.then(|| entry.name.clone()));
        Ok(())
    };
    newc::each(output.stdout.as_slice(), count).unwrap();
    // The list of names by a third: rpm's database of the package itself.
    let list = Command::new("rpm").args(["-qlp", "--nosignature"]).arg(package).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    for name in &names {
        assert!(list.contains(name.trim_start_matches('.')), "{name} is not in {list}");
    }
    names
}

#[test]
fn packages_of_rpmbuild_make_a_kernel_whatever_they_are_compressed_by() {
    let dir = tempfile::tempdir().unwrap();
    let modules = tree(dir.path());
    for payload in ["w3.zstdio", "w6.xzdio", "w9.gzdio", "w.ufdio"] {
        let files = rpms(dir.path(), payload);
        let names = files.iter().flat_map(|file| names_by_rpm2cpio(file));
        assert_eq!(names.count(), 6, "{payload}");
        let cache = dir.path().join(format!("cache-{payload}"));
        let kernel = get(&Source::PackageFiles(files), &cache).unwrap();
        assert_eq!(kernel.release, RELEASE, "{payload}");
        assert_eq!(kernel.config.as_deref(), Some("CONFIG_INET=y\n"));
        for file in ["kernel/net/one.ko", "kernel/net/two.ko", "kernel/large.ko.zst"] {
            let ours = fs::read(kernel.modules_dir.join(file)).unwrap();
            assert!(ours == fs::read(modules.join(file)).unwrap(), "{payload}: {file}");
        }
        assert_eq!(kernel.catalogue.get("one").unwrap().firmware, ["x/y.bin"]);
        assert!(kernel.catalogue.is_builtin("packet"));
    }
}

#[test]
fn a_package_alone_says_what_is_missing_and_a_spoilt_one_that_it_is() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let mut files = rpms(dir.path(), "w3.zstdio");
    let alone = Source::PackageFiles(vec![files[0].clone()]);
    let error = get(&alone, &dir.path().join("cache")).unwrap_err();
    assert!(
        error.contains("kernel-core-6.17.1-300.test.x86_64.rpm cannot be the kernel"),
        "{error}"
    );
    assert!(error.contains("packages of their own"), "{error}");
    let mut bytes = fs::read(&files[1]).unwrap();
    let last = bytes.len() - 20;
    bytes[last] ^= 1;
    files[1] = dir.path().join("spoilt.rpm");
    fs::write(&files[1], bytes).unwrap();
    let error = get(&Source::PackageFiles(files), &dir.path().join("cache")).unwrap_err();
    assert!(error.ends_with("its payload is damaged"), "{error}");
}

#[test]
fn an_installed_kernel_is_taken_from_any_root() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let root = dir.path().join("tree");
    let source = Source::Installed { root, release: None, running: None };
    let kernel = get(&source, &dir.path().join("cache")).unwrap();
    assert_eq!((kernel.release.as_str(), kernel.flavour.as_str()), (RELEASE, "custom"));
    assert_eq!(kernel.catalogue.len(), 3);
    assert!(kernel.source.starts_with("vmlinuz sha256:"), "{}", kernel.source);
}
