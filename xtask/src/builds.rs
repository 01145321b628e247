//! Everything that runs in the lab, built: Layer0, the server and the example's program. For the demo and the cases.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use initramfs::site::{Config, packages};
use tests::artifacts::{
    Artifacts, CHRONYD, EFI_COMMAND_LINE, EFI_DIR, FLOOR_DIR, FORMS_COMMAND_LINE, FORMS_DIR,
    GENERIC_DIR, KERNEL_FORM_DIR, SITE_DIR, SITE_KEYS, SITE_OVERLAY, STORAGE_DIR, VIRT_DIR,
    workspace_root,
};
use tests::qemu::ovmf;

use crate::children::{self, STATIC_TARGET, run, static_build};

/// Where the builds put things.
///
/// # Errors
/// What was not built.
pub(crate) fn artifacts(release: bool) -> Result<Artifacts> {
    let root = workspace_root();
    let profile = if release { "release" } else { "debug" };
    let made = Artifacts {
        bin: target_dir().join(profile).join("layercake"),
        layer0: root.join("out/layer0"),
        examples: root.join("target/examples"),
    };
    for file in [made.bin.clone(), made.kernel(), made.initramfs(), made.hello()] {
        if !file.exists() {
            bail!("{} should have been built, but is not there", file.display());
        }
    }
    Ok(made)
}

/// Builds everything, with progress on stderr.
///
/// # Errors
/// What does not build.
pub(crate) fn everything(release: bool) -> Result<()> {
    server(release)?;
    eprintln!("building the example");
    static_program("hello")?;
    // Our own subcommand, as a user would run it.
    let mut layer0 = Command::new(std::env::current_exe().context("cannot find our own file")?);
    layer0.arg("build-image").stdout(std::io::stderr());
    run(&mut layer0)
}

/// The firmware's test key without its passphrase, in [`EFI_DIR`].
const TEST_KEY: &str = "test.key";

/// Builds Layer0 as one EFI program for the cases with UEFI firmware, as it is and signed with the firmware's test key.
///
/// # Errors
/// What does not build.
pub(crate) fn efi() -> Result<()> {
    let dir = workspace_root().join(EFI_DIR);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // sbsign takes no passphrase but from a terminal.
    let key = dir.join(TEST_KEY);
    let mut openssl = Command::new("openssl");
    openssl.args(["rsa", "-passin", "pass:snakeoil", "-in", ovmf::TEST_KEY, "-out"]).arg(&key);
    run(openssl.stderr(std::process::Stdio::null()))?;
    for name in ["plain", "signed"] {
        let mut layer0 = Command::new(std::env::current_exe().context("cannot find our own file")?);
        layer0.args(["build-image", "--format", "uki", "--cmdline", EFI_COMMAND_LINE, "--out"]);
        layer0.arg(dir.join(name)).stdout(std::io::stderr());
        if name == "signed" {
            layer0.arg("--secure-boot-key").arg(&key);
            layer0.args(["--secure-boot-cert", ovmf::TEST_CERTIFICATE]);
        }
        run(&mut layer0)?;
    }
    Ok(())
}

/// Builds the forms of Layer0 that boot from disks and CDs, and the one that is a kernel alone. After [`efi`], which makes the key.
///
/// # Errors
/// What does not build.
pub(crate) fn forms() -> Result<()> {
    let sign = |layer0: &mut Command| {
        layer0.arg("--secure-boot-key").arg(workspace_root().join(EFI_DIR).join(TEST_KEY));
        layer0.args(["--secure-boot-cert", ovmf::TEST_CERTIFICATE]);
    };
    for name in ["plain", "signed"] {
        let mut layer0 = Command::new(std::env::current_exe().context("cannot find our own file")?);
        layer0.args(["build-image", "--flavour", "virt", "--format", "efi"]);
        layer0.args(["--cmdline", FORMS_COMMAND_LINE, "--out"]);
        layer0.arg(workspace_root().join(KERNEL_FORM_DIR).join(name)).stdout(std::io::stderr());
        if name == "signed" {
            sign(&mut layer0);
        }
        run(&mut layer0)?;
    }
    let mut layer0 = Command::new(std::env::current_exe().context("cannot find our own file")?);
    layer0.args(["build-image", "--format", "iso,usb", "--cmdline", FORMS_COMMAND_LINE, "--out"]);
    layer0.arg(workspace_root().join(FORMS_DIR)).stdout(std::io::stderr());
    sign(&mut layer0);
    run(&mut layer0)
}

/// Builds Layer0 with our own kernel for virtual machines, and with Debian's for real ones.
///
/// # Errors
/// What does not build.
pub(crate) fn kernels() -> Result<()> {
    for (flavour, out) in [("virt", VIRT_DIR), ("generic", GENERIC_DIR)] {
        let mut layer0 = Command::new(std::env::current_exe().context("cannot find our own file")?);
        layer0.args(["build-image", "--flavour", flavour, "--out"]);
        layer0.arg(workspace_root().join(out)).stdout(std::io::stderr());
        run(&mut layer0)?;
    }
    Ok(())
}

/// Builds Layer0 with the modules of network storage, for the cases that mount from NFS and iSCSI.
///
/// # Errors
/// What does not build.
pub(crate) fn storage() -> Result<()> {
    let mut layer0 = Command::new(std::env::current_exe().context("cannot find our own file")?);
    layer0.args(["build-image", "--with", "storage", "--out"]);
    layer0.arg(workspace_root().join(STORAGE_DIR)).stdout(std::io::stderr());
    run(&mut layer0)
}

/// Builds Layer0 with the oldest kernel that is tested, for the machine of the cases about hardware.
///
/// # Errors
/// What does not build.
pub(crate) fn floor() -> Result<()> {
    let mut layer0 = Command::new(std::env::current_exe().context("cannot find our own file")?);
    layer0.args(["build-image", "--flavour", "generic", "--kernel-version", "6.1"]);
    layer0.arg("--for").arg(workspace_root().join("tests/facts/floor.json"));
    layer0.args(["--with", "zram", "--out"]);
    layer0.arg(workspace_root().join(FLOOR_DIR)).stdout(std::io::stderr());
    run(&mut layer0)
}

/// Builds the site's archive with a rescue shell and ssh, for the cases that rescue a node, and the keys for it.
///
/// # Errors
/// What does not build.
pub(crate) fn site() -> Result<()> {
    let dir = workspace_root().join(SITE_DIR);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for name in SITE_KEYS {
        let key = dir.join(name);
        if !key.exists() {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"]).arg(&key);
            run(&mut keygen)?;
        }
    }
    let mut overlay = Command::new(std::env::current_exe().context("cannot find our own file")?);
    overlay.args(["overlay", "--rescue-shell", "--ssh", "always", "--out"]);
    overlay.arg(dir.join(SITE_OVERLAY)).arg("--authorized-key");
    overlay.arg(dir.join(format!("{}.pub", SITE_KEYS[0])));
    run(overlay.stdout(std::io::stderr()))
}

/// Takes a time server that is not ours out of its package. Installed, it would replace the one that keeps this machine's clock.
///
/// # Errors
/// That it cannot be fetched.
pub(crate) fn time_server() -> Result<()> {
    let config = Config { cache: target_dir().join("layer0-cache"), ..Config::default() };
    let files = packages::get("chrony", 0, &config, &|text| eprintln!("{text}"))?;
    let program = files.get("chronyd").context("the package chrony has no chronyd")?;
    let to = workspace_root().join(CHRONYD);
    let dir = to.parent().context("a file without a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    fs::write(&to, program).with_context(|| format!("cannot write {}", to.display()))?;
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&to, mode).with_context(|| format!("cannot write {}", to.display()))
}

/// Builds the server and gives its file.
///
/// # Errors
/// That it does not build.
pub(crate) fn server(release: bool) -> Result<PathBuf> {
    eprintln!("building the server");
    let mut server = cargo();
    // As part of the workspace, so that its dependencies have the features that the tests built them with.
    server.args(["build", "--workspace", "--exclude", "tests", "--bin", "layercake"]);
    if release {
        server.arg("--release");
    }
    run(&mut server)?;
    Ok(target_dir().join(if release { "release" } else { "debug" }).join("layercake"))
}

/// Builds the program of `examples/hello`.
///
/// # Errors
/// When it does not build.
pub(crate) fn hello() -> Result<()> {
    static_program("hello")
}

/// Builds an example's program without any library that an image would have to bring.
fn static_program(name: &str) -> Result<()> {
    let mut build = static_build(name);
    build.stdout(std::io::stderr());
    run(&mut build)?;
    let examples = workspace_root().join("target/examples");
    let built = target_dir().join(STATIC_TARGET).join("agent").join(name);
    copy(&built, &examples.join(name))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let dir = to.parent().context("a file without a directory")?;
    fs::create_dir_all(dir)
        .and_then(|()| fs::copy(from, to).map(drop))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// cargo with its output on our stderr: stdout is for results.
fn cargo() -> Command {
    let mut command = children::cargo();
    command.stdout(std::io::stderr());
    command
}

fn target_dir() -> PathBuf {
    let set = std::env::var_os("CARGO_TARGET_DIR");
    set.map_or_else(|| workspace_root().join("target"), |dir| workspace_root().join(dir))
}
