//! Everything that runs in the lab, built: Layer0, the server and the example's program. For the demo and the cases.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tests::artifacts::{Artifacts, workspace_root};
use tests::wait;

/// The target of static programs, named so that the flags below miss procedural macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Cargo's variable for the flags of that target alone.
const FLAGS: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS";
/// How long one build may take: the server from nothing, on two slow cores.
const BUILD: Duration = Duration::from_secs(40 * 60);

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
    eprintln!("building the server");
    let mut server = cargo();
    server.args(["build", "--package", "server", "--bin", "layercake"]);
    if release {
        server.arg("--release");
    }
    run("the server", server)?;
    eprintln!("building the example");
    static_program("hello")?;
    // Our own subcommand, as a user would run it.
    let mut layer0 = Command::new(std::env::current_exe().context("cannot find our own file")?);
    layer0.arg("build-image").stdout(std::io::stderr());
    run("Layer0", layer0)
}

/// Builds the server's binary, and says where it is.
///
/// # Errors
/// When it does not build.
pub(crate) fn layercake() -> Result<PathBuf> {
    let mut server = cargo();
    server.args(["build", "--package", "server", "--bin", "layercake"]);
    run("the server", server)?;
    Ok(target_dir().join("debug/layercake"))
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
    let mut build = cargo();
    build.args(["build", "--package", name, "--profile", "agent", "--target", TARGET]);
    build.env(FLAGS, "-C target-feature=+crt-static");
    // These would take the place of the flags above.
    build.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    run(name, build)?;
    let examples = workspace_root().join("target/examples");
    let built = target_dir().join(TARGET).join("agent").join(name);
    copy(&built, &examples.join(name))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let dir = to.parent().context("a file without a directory")?;
    fs::create_dir_all(dir)
        .and_then(|()| fs::copy(from, to).map(drop))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace_root()).stdout(std::io::stderr());
    command
}

fn target_dir() -> PathBuf {
    let set = std::env::var_os("CARGO_TARGET_DIR");
    set.map_or_else(|| workspace_root().join("target"), |dir| workspace_root().join(dir))
}

/// Runs a build in a process group of its own, which Ctrl-C ends with all its compilers.
fn run(what: &str, mut command: Command) -> Result<()> {
    command.stdin(Stdio::null()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot start building {what}"))?;
    let ended = wait::until(&format!("{what} to be built"), BUILD, || Ok(child.try_wait()?));
    if ended.is_err() {
        let group = i32::try_from(child.id()).context("a pid beyond the kernel's")?;
        killpg(Pid::from_raw(group), Signal::SIGTERM)
            .with_context(|| format!("cannot end the build of {what}"))?;
        child.wait().with_context(|| format!("cannot wait for the build of {what}"))?;
    }
    let status = ended?;
    if !status.success() {
        bail!("building {what} failed ({status})");
    }
    Ok(())
}
