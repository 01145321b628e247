//! The site's archive, without a package from anywhere: what goes in, what is refused, and that it is always the same.

use proptest::prelude::*;

use super::packages::Files;
use super::*;

const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJq0Yx0Zs0Wj0R4gkQ2n8Qe0z6YxVgqv5k9w8m3b7n1d me@site\n";

fn config(dir: &Path) -> Config {
    fs::write(dir.join("me.pub"), KEY).unwrap();
    Config {
        authorized_keys: vec![dir.join("me.pub")],
        cache: dir.join("cache"),
        out: dir.join("out/site.cpio"),
        ..Config::default()
    }
}

#[test]
fn the_same_inputs_give_the_same_archive_and_nothing_of_the_machine_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    fs::write(dir.path().join("network.toml"), "[[interface]]\nname = \"eth0\"\nmtu = 9000\n")
        .unwrap();
    config.network = Some(dir.path().join("network.toml"));
    let first = build(&config, &|_| ()).unwrap();
    let bytes = fs::read(&config.out).unwrap();
    assert_eq!((first.digest, first.size), (Digest::of(&bytes), size(&bytes)));
    assert_eq!(first, build(&config, &|_| ()).unwrap());
    let entries = archive::read(&bytes).unwrap();
    let lines: Vec<_> =
        entries.iter().map(|it| format!("{} {:o} {:?}", it.path, it.mode, it.owner)).collect();
    assert_eq!(
        lines,
        [
            ". 40755 (0, 0)",
            "etc 40755 (0, 0)",
            "etc/layercake 40755 (0, 0)",
            "etc/layercake/authorized_keys 100600 (0, 0)",
            "etc/layercake/network.toml 100644 (0, 0)",
        ]
    );
    config.out = dir.path().join("site.cpio.zst");
    let packed = build(&config, &|_| ()).unwrap();
    let unpacked = zstd::stream::decode_all(&*fs::read(&config.out).unwrap()).unwrap();
    assert_eq!((unpacked, packed.plain_size), (bytes, first.size));
}

#[test]
fn an_archive_with_a_secret_in_it_is_for_root_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    let mode = |config: &Config| fs::metadata(&config.out).unwrap().permissions().mode() & 0o777;
    assert!(!build(&config, &|_| ()).unwrap().secret);
    assert_eq!(mode(&config), 0o644);
    config.ssh_host_key = Some(dir.path().join("me.pub"));
    assert!(build(&config, &|_| ()).unwrap().secret);
    assert_eq!(mode(&config), 0o600);
}

#[test]
fn what_is_empty_or_wrong_is_said_and_leaves_no_archive() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("site.cpio");
    let empty = Config { out: out.clone(), ..Config::default() };
    assert!(matches!(build(&empty, &|_| ()), Err(SiteError::Empty)));
    let nobody = Config { ssh: Some(Ssh::Rescue), ..empty.clone() };
    assert!(matches!(build(&nobody, &|_| ()), Err(SiteError::NobodyIn)));
    fs::write(dir.path().join("n.toml"), "colour = \"red\"\n").unwrap();
    let network = Config { network: Some(dir.path().join("n.toml")), ..empty.clone() };
    let error = build(&network, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("n.toml: ") && error.contains("colour"), "{error}");
    let gone = Config { authorized_keys: vec![dir.path().join("gone")], ..empty };
    assert!(build(&gone, &|_| ()).is_err() && !out.exists());
}

#[track_caller]
fn refused(text: &str, expected: &str) {
    let error = authorized_keys(text).unwrap_err();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn only_public_keys_may_log_in() {
    let commented = format!("# people\n\n{KEY}command=\"x\" {KEY}");
    assert_eq!(authorized_keys(&commented).unwrap().lines().count(), 2);
    refused("", "no key in it");
    refused("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "private key");
    refused("ssh-ed25519 me@site\n", "line 1 is no public key");
    refused(&format!("{KEY}hello\n"), "line 2 is no public key");
}

#[test]
fn the_shell_is_busybox_by_all_its_names_and_what_pid_1_starts() {
    let mut files = Files::default();
    let mut tree = Tree::new();
    assert!(matches!(rescue::add_shell(&mut tree, &files), Err(RescueError::Missing(_))));
    files.add("busybox", crate::elf::fake::program(None, &["libc.so.6"]));
    assert!(matches!(rescue::add_shell(&mut tree, &files), Err(RescueError::Dynamic(_))));
    files.add("busybox", crate::elf::fake::program(None, &[]));
    rescue::add_shell(&mut tree, &files).unwrap();
    for link in ["bin/sh", "bin/ip", "bin/dmesg", "bin/["] {
        assert_eq!(tree.get(link).unwrap().kind, Kind::Symlink("busybox".to_owned()), "{link}");
    }
    assert_eq!(tree.get("etc/layercake/rescue").unwrap().mode, 0o755);
    assert!(tree.get("bin/init").is_none() && tree.get("etc/layercake/ssh").is_none());
}

#[test]
fn ssh_brings_every_library_that_it_asks_for_or_is_refused() {
    use crate::elf::fake::program;
    const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
    let mut files = Files::default();
    for name in ["dropbear", "dropbearkey", "dropbearconvert"] {
        files.add(name, program(Some(LOADER), &["libz.so.1"]));
    }
    files.add("ld-linux-x86-64.so.2", program(None, &[]));
    files.add("libz.so.1", program(None, &["libc.so.6", "ld-linux-x86-64.so.2"]));
    assert_eq!(rescue::missing(&files), ["libc.so.6"]);
    let error = rescue::add_ssh(&mut Tree::new(), &files, Ssh::Rescue).unwrap_err();
    assert_eq!(error.to_string(), "none of the packages has libc.so.6");
    files.add("libc.so.6", program(None, &[]));
    let mut tree = Tree::new();
    rescue::add_ssh(&mut tree, &files, Ssh::Always).unwrap();
    for path in
        ["lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6", "usr/sbin/dropbear"]
    {
        assert!(tree.get(path).is_some(), "{path}");
    }
    assert!(tree.get("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2").is_none());
    assert_eq!(tree.get("root/.ssh").unwrap().mode, 0o700);
    assert!(tree.get("etc/layercake/ssh.always").is_some());
}

proptest! {
    #[test]
    fn no_file_of_keys_makes_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        fuzz_authorized_keys(&bytes);
    }
}
