//! A rescue shell and ssh out of Debian's packages: busybox-static, dropbear with the libraries it asks for. Pure.

use crate::elf::{self, ElfError};
use crate::tree::{Tree, TreeError};

use super::Ssh;
use super::packages::Files;

/// Most packages that ssh's libraries may come from.
pub const MAX_LIBRARIES: usize = 16;
/// What busybox is called by, one name a line: all that it can do in Layer0. Programs that would speak to services which are
/// not there, or that PID 1 is, are left out.
const APPLETS: &str = include_str!("applets.txt");
/// Where libraries go: Debian's loader looks there without a configuration.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
/// Deepest chain of libraries.
const MAX_NEEDED: usize = 64;

/// Why shell or ssh could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum RescueError {
    /// No package has it.
    #[error("none of the packages has {0}")]
    Missing(String),
    /// It is no program.
    #[error("{name} is no program")]
    Elf {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: ElfError,
    },
    /// It does not run without libraries.
    #[error("busybox is not static: it needs {0}")]
    Dynamic(String),
    /// It does not fit to what is in the overlay already.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// Adds busybox with its names, and what PID 1 starts in rescue.
///
/// # Errors
/// The package has no busybox, or it is not static.
pub fn add_shell(tree: &mut Tree, files: &Files) -> Result<(), RescueError> {
    let busybox = find(files, "busybox")?;
    let linkage = linkage("busybox", busybox)?;
    if !linkage.is_static() {
        return Err(RescueError::Dynamic(linkage.needed.join(", ")));
    }
    tree.file("bin/busybox", 0o755, busybox.to_vec())?;
    for name in APPLETS.lines() {
        tree.symlink(&format!("bin/{name}"), "busybox")?;
    }
    tree.symlink("bin/layercake-agent", "/init")?;
    tree.file("etc/layercake/rescue", 0o755, include_bytes!("rescue.sh").to_vec())?;
    common(tree)
}

/// Adds dropbear, which lets in who has a key.
///
/// # Errors
/// The packages lack a program or a library of it.
pub fn add_ssh(tree: &mut Tree, files: &Files, when: Ssh) -> Result<(), RescueError> {
    let (mut needed, mut loaders) = (Vec::new(), Vec::new());
    for (program, place) in [
        ("dropbear", "usr/sbin/dropbear"),
        ("dropbearkey", "usr/bin/dropbearkey"),
        ("dropbearconvert", "usr/bin/dropbearconvert"),
    ] {
        let bytes = find(files, program)?;
        let linkage = linkage(program, bytes)?;
        if let Some(loader) = &linkage.interpreter {
            let name = loader.rsplit('/').next().unwrap_or_default();
            let place = loader.trim_start_matches('/');
            tree.file(place, 0o755, find(files, name)?.to_vec())?;
            loaders.push(name.to_owned());
        }
        tree.file(place, 0o755, bytes.to_vec())?;
        needed.extend(linkage.needed);
    }
    let mut at = 0;
    while let Some(name) = needed.get(at).filter(|_| at < MAX_NEEDED).cloned() {
        at += 1;
        let place = format!("{LIBRARIES}/{name}");
        // A library may ask for the loader, which is there already.
        if tree.get(&place).is_some() || loaders.contains(&name) {
            continue;
        }
        let bytes = find(files, &name)?;
        needed.extend(linkage(&name, bytes)?.needed);
        tree.file(&place, 0o755, bytes.to_vec())?;
    }
    tree.file("etc/layercake/ssh", 0o755, include_bytes!("ssh.sh").to_vec())?;
    if when == Ssh::Always {
        tree.file("etc/layercake/ssh.always", 0o644, Vec::new())?;
    }
    // dropbear looks at who may write to these.
    tree.directory("root", 0o700)?;
    tree.directory("root/.ssh", 0o700)?;
    tree.symlink("root/.ssh/authorized_keys", "/etc/layercake/authorized_keys")?;
    common(tree)
}

/// Who there is, and what shells may be logged into.
fn common(tree: &mut Tree) -> Result<(), RescueError> {
    tree.file("etc/profile", 0o644, include_bytes!("profile.sh").to_vec())?;
    tree.file("etc/passwd", 0o644, b"root:*:0:0:root:/root:/bin/sh\n".to_vec())?;
    tree.file("etc/group", 0o644, b"root:x:0:\n".to_vec())?;
    tree.file("etc/shells", 0o644, b"/bin/sh\n".to_vec())?;
    Ok(())
}

/// The libraries that these files ask for and that are not among them.
#[must_use]
pub fn missing(files: &Files) -> Vec<String> {
    let mut missing: Vec<String> = Vec::new();
    for bytes in files.contents() {
        let Ok(linkage) = elf::linkage(bytes) else { continue };
        for name in linkage.needed {
            if files.get(&name).is_none() && !missing.contains(&name) {
                missing.push(name);
            }
        }
    }
    missing
}

fn find<'a>(files: &'a Files, name: &str) -> Result<&'a [u8], RescueError> {
    files.get(name).ok_or_else(|| RescueError::Missing(name.to_owned()))
}

fn linkage(name: &str, bytes: &[u8]) -> Result<elf::Linkage, RescueError> {
    elf::linkage(bytes).map_err(|source| RescueError::Elf { name: name.to_owned(), source })
}
