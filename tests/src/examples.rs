//! Example ImageSets that take long to make, made once for all cases and kept in OCI layouts under `target/examples/`.
//!
//! `debian-systemd` is made by an ordinary user, because it must need no root: as root its build runs as a user who exists
//! in a mount namespace of its own only, with an entry in /etc/passwd and a range of subordinate ids there.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use protocol::ids::Digest;

use crate::artifacts::workspace_root;
use crate::prerequisites::{self, Need};

/// What is needed to make `debian-systemd`.
pub const DEBIAN: [Need; 3] = [Need::UtilLinux, Need::Mmdebstrap, Need::Uidmap];
/// The user that exists for a build only, and the first of its subordinate ids.
const USER: &str = "layercake-test";
const ID: u32 = 54_321;
const FIRST_SUBORDINATE: u32 = 1_000_000;
/// Every file of the system is dated this, seconds since 1970.
const EPOCH: u32 = 1_700_000_000;

/// Becomes the user and builds. Arguments: directory with the user's files, the example's, the `layercake` program.
const AS_USER: &str = r#"
set -e
mount -t overlay -o "lowerdir=$1/etc:/etc" overlay /etc
mount --bind "$2" "$1/home/example"
touch "$1/home/layercake"
mount --bind "$3" "$1/home/layercake"
cd "$1/home"
export HOME="$1/home" TMPDIR="$1/home/tmp"
exec setpriv --reuid "$4" --regid "$4" --clear-groups \
    ./layercake imageset build example/imageset.toml --out layout
"#;

/// The ImageSet of `examples/debian-systemd` in an OCI layout, made by this `layercake` unless it was made before. It
/// takes a quarter of a minute and Debian's mirror.
///
/// # Errors
/// When it cannot be made, with what the program said.
pub fn debian_systemd(layercake: &Path) -> Result<PathBuf> {
    debian(layercake, "debian-systemd")
}

/// As [`debian_systemd`], of another example that is made of Debian's packages.
///
/// # Errors
/// As [`debian_systemd`].
pub fn debian(layercake: &Path, name: &str) -> Result<PathBuf> {
    prerequisites::ensure(&DEBIAN)?;
    let example = workspace_root().join("examples").join(name);
    let place = workspace_root().join("target/examples").join(name);
    fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
    let lock = File::create(place.join("lock")).context("cannot make the lock")?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("cannot lock the examples")?;
    let layout = place.join(format!("layout-{}", key(&example)?));
    if layout.exists() {
        return Ok(layout);
    }
    let scratch = tempfile::Builder::new().prefix("layercake-example.").tempdir()?;
    let root = nix::unistd::geteuid().is_root();
    let mut build = if root {
        as_user(scratch.path(), &example, layercake)?
    } else {
        let mut build = Command::new(layercake);
        build.args(["imageset", "build"]).arg(example.join("imageset.toml"));
        build.arg("--out").arg(scratch.path().join("home/layout"));
        build
    };
    build.env("SOURCE_DATE_EPOCH", EPOCH.to_string()).stdin(Stdio::null());
    let output = build.output().context("cannot run the build")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("building {} failed ({}): {}", example.display(), output.status, said.trim());
    }
    // Another file system, perhaps: a copy that is there only whole.
    let beside = place.join("new");
    let made = scratch.path().join("home/layout");
    let copy: [OsString; 5] =
        ["-r".into(), "--no-preserve=ownership".into(), "-T".into(), made.into(), (&beside).into()];
    if beside.exists() {
        fs::remove_dir_all(&beside).context("cannot remove what was left")?;
    }
    let copied = Command::new("cp").args(copy).status().context("cannot run cp")?;
    if !copied.success() {
        bail!("cannot copy the layout to {}", beside.display());
    }
    fs::rename(&beside, &layout).context("cannot keep the layout")?;
    Ok(layout)
}

/// The command that builds as a user of its own, and the files that it needs.
fn as_user(scratch: &Path, example: &Path, layercake: &Path) -> Result<Command> {
    let write = || -> std::io::Result<()> {
        fs::set_permissions(scratch, Permissions::from_mode(0o755))?;
        let etc = scratch.join("etc");
        fs::create_dir(&etc)?;
        let (passwd, group) =
            (fs::read_to_string("/etc/passwd")?, fs::read_to_string("/etc/group")?);
        let user = format!("{USER}:x:{ID}:{ID}::{}:/bin/sh\n", scratch.join("home").display());
        fs::write(etc.join("passwd"), passwd + &user)?;
        fs::write(etc.join("group"), format!("{group}{USER}:x:{ID}:\n"))?;
        for file in ["subuid", "subgid"] {
            fs::write(etc.join(file), format!("{USER}:{FIRST_SUBORDINATE}:65536\n"))?;
        }
        for dir in ["home", "home/example", "home/tmp"] {
            let dir = scratch.join(dir);
            fs::create_dir(&dir)?;
            chown(&dir, Some(ID), Some(ID))?;
        }
        Ok(())
    };
    write().with_context(|| format!("cannot write below {}", scratch.display()))?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--", "sh", "-c", AS_USER, "sh"]);
    command.arg(scratch).arg(example).arg(layercake).arg(ID.to_string());
    Ok(command)
}

/// What the set is made of, as a few characters: another description is another set.
fn key(example: &Path) -> Result<String> {
    let mut all = Vec::new();
    let mut dirs = vec![example.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        let list = fs::read_dir(&dir).with_context(|| dir.display().to_string())?;
        let mut paths: Vec<PathBuf> = list.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let name = path.strip_prefix(example).unwrap_or(&path).display().to_string();
            all.extend_from_slice(name.as_bytes());
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                dirs.push(path);
            } else if !name.ends_with(".md") {
                all.extend(fs::read(&path).with_context(|| path.display().to_string())?);
            }
        }
    }
    Ok(Digest::of(&all).hex().chars().take(12).collect())
}
