//! chronyd in the lab: the time server that is not ours.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::artifacts::workspace_root;
use crate::lab::{ADDRESS, Lab, SUBNET};
use crate::prerequisites::find_program;
use crate::process::Process;

/// The program, as Debian's package has it and as others have it in `PATH`.
const PROGRAM: &str = "chronyd";

/// Makes sure that the program is here. A package of a time server takes the place of the one that keeps this machine's clock, so
/// it is fetched and unpacked, and not installed.
///
/// # Errors
/// When it is not and cannot be had, with what to do.
pub fn ensure() -> Result<()> {
    program().map(drop)
}

fn program() -> Result<PathBuf> {
    let unpacked = workspace_root().join("target/peers/chrony");
    let own = unpacked.join("usr/sbin").join(PROGRAM);
    if let Some(program) = find_program(PROGRAM).or_else(|| own.is_file().then(|| own.clone())) {
        return Ok(program);
    }
    let advice = "chronyd is missing, and could not be fetched. Install it with one of\n  \
                  Debian, Ubuntu: sudo apt-get update && sudo apt-get install chrony (replaces other time daemons)\n  \
                  Fedora: sudo dnf install chrony\n  Arch: sudo pacman -S --needed chrony";
    fetch(&unpacked).context(advice)?;
    Ok(own)
}

/// Downloads the package and unpacks it into `to`.
fn fetch(to: &Path) -> Result<()> {
    let from = to.with_extension("deb");
    fs::create_dir_all(&from).with_context(|| format!("cannot make {}", from.display()))?;
    let download =
        || run("apt-get", &["-q", "-o", "APT::Sandbox::User=", "download", "chrony"], &from);
    if download().is_err() {
        // A fresh machine knows no packages yet.
        run("apt-get", &["-q", "update"], &from)?;
        download()?;
    }
    let entries = fs::read_dir(&from)?.flatten().map(|entry| entry.path());
    let package = entries.filter(|path| path.extension().is_some_and(|it| it == "deb")).max();
    let package = package.context("apt-get download left no package")?.display().to_string();
    // Under its name it is whole.
    let partial = to.with_extension("partial").display().to_string();
    run("dpkg-deb", &["-x", &package, &partial], &from)?;
    fs::rename(&partial, to).with_context(|| format!("cannot make {}", to.display()))
}

fn run(program: &str, args: &[&str], dir: &Path) -> Result<()> {
    let found = find_program(program).with_context(|| format!("{program} is missing"))?;
    let output = Command::new(found).args(args).current_dir(dir).output()?;
    if !output.status.success() {
        bail!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Starts one on the lab's address that says it is right, and never touches this machine's clock.
///
/// # Errors
/// When it cannot be had or started.
pub fn start(lab: &Lab) -> Result<Process> {
    let (config, pid) = (lab.dir().join("chrony.conf"), lab.dir().join("chrony.pid"));
    let text = format!(
        "local stratum 3\nallow {SUBNET}\nbindaddress {ADDRESS}\ncmdport 0\nbindcmdaddress /\nuser root\npidfile {}\n",
        pid.display()
    );
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let config = config.display().to_string();
    let log = lab.dir().join("chrony.log");
    Process::start(lab.namespace(), &program()?, ["-d", "-x", "-f", &config], &log)
}
