//! What `build-image` costs: with nothing changed, and with another agent, everything else as it was.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::images::{Contestant, build_layer0, read, write};
use super::size;
use crate::bench::figures::Samples;
use crate::build_image::{Flavour, Format};

/// How often each is timed.
const ROUNDS: u8 = 3;

/// Sizes and times of builds.
#[derive(Debug, Default)]
pub(super) struct Builds {
    /// Sizes in bytes, by name.
    pub(super) sizes: Vec<(String, u64)>,
    /// Seconds that a peer took.
    pub(super) peers: Vec<(Contestant, f64)>,
    /// `cargo xtask build-image` with nothing changed, cargo and all, seconds.
    pub(super) unchanged_s: Samples,
    /// With another agent of the same size: what comes after cargo's time, seconds; own kernel.
    pub(super) changed_s: Samples,
    /// The same with Debian's kernel and its modules, as the peers have it.
    pub(super) changed_cloud_s: Samples,
}

/// Builds Layer0 in its flavours and times that.
///
/// # Errors
/// What does not build.
pub(super) fn measure(dir: &Path, agent: &Path, hw: bool, builds: &mut Builds) -> Result<()> {
    let flavours = [
        (true, "virt", Flavour::Virt),
        (true, "generic (Debian's kernel)", Flavour::Generic),
        (hw, "hw", Flavour::Hw),
    ];
    for (_, name, flavour) in flavours.into_iter().filter(|(wanted, ..)| *wanted) {
        let out = build_layer0(dir, agent, flavour, None)?;
        builds.sizes.push((format!("initramfs, {name}"), size(&out.join("initramfs.img"))?));
        builds.sizes.push((format!("kernel, {name}"), size(&out.join("vmlinuz"))?));
    }
    let out = build_layer0(&dir.join("forms"), agent, Flavour::Virt, Some(Format::Efi))?;
    builds.sizes.push(("efi form, virt".to_owned(), size(&out.join("layer0-kernel.efi"))?));
    let own = std::env::current_exe().context("cannot find our own file")?;
    let other = dir.join("agent-other");
    let mut bytes = read(agent)?;
    // Once for the caches: what is measured is the second time.
    unchanged(&own, dir)?;
    for round in 0..ROUNDS {
        eprintln!("build-image: round {} of {ROUNDS}", round + 1);
        builds.unchanged_s.0.push(unchanged(&own, dir)?);
        // Behind the last section, where no program reads.
        bytes.extend(nonce()?);
        write(&other, &bytes)?;
        let mut permissions = fs::metadata(&other).context("the other agent")?.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
        fs::set_permissions(&other, permissions).context("the other agent")?;
        builds.changed_s.0.push(with_agent(&own, dir, &other, "virt")?);
        builds.changed_cloud_s.0.push(with_agent(&own, dir, &other, "cloud")?);
    }
    Ok(())
}

/// Bytes that no image was built of before.
fn nonce() -> Result<Vec<u8>> {
    let text = fs::read("/proc/sys/kernel/random/uuid").context("a random name")?;
    Ok(text)
}

fn unchanged(own: &Path, dir: &Path) -> Result<f64> {
    let out = dir.join("unchanged");
    time(Command::new(own).args(["build-image", "--flavour", "virt", "--out"]).arg(out))
}

fn with_agent(own: &Path, dir: &Path, agent: &Path, flavour: &str) -> Result<f64> {
    let out = dir.join("changed").join(flavour);
    let mut command = Command::new(own);
    command.args(["build-image", "--flavour", flavour, "--agent"]).arg(agent);
    time(command.arg("--out").arg(out))
}

/// Runs it and says how many seconds that took.
fn time(command: &mut Command) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let begun = Instant::now();
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let took = begun.elapsed().as_secs_f64();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed ({}): {said}", output.status);
    Ok(took)
}
