//! Pivot: the staged image becomes the machine's root and its init becomes PID 1.
//!
//! ```text
//! ROOT -> /newroot;  /dev /proc /sys /run -> /newroot/...;  pivot_root(/newroot, /newroot/run/layercake/layer0);  exec
//! ```
//! `pivot_root(2)` moves every process whose root was the old one, the agent too; `/run/layercake` keeps its path. The old
//! root stays mounted until the exec has worked (the agent detaches it then), so every failure goes back, step by step.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::mount_move;

use super::control::OLD_ROOT;

const NEW_ROOT: &str = "/newroot";
/// In their order; each with all that is mounted below it.
const MOVED: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];

/// A step that has been done, to be undone in reverse.
#[derive(Debug)]
enum Done {
    Moved { from: PathBuf, to: PathBuf },
    Pivoted,
}

/// Pivots and executes. Comes back only on failure, with everything where it was.
///
/// `before_exec` runs last, when nothing but the exec itself is left to do; `after_failure` undoes it.
#[must_use]
pub fn run(
    root: &Path,
    argv: &[String],
    env: &[String],
    before_exec: impl FnOnce(),
    after_failure: impl FnOnce(),
) -> String {
    let mut done = Vec::new();
    let failure = match prepare(root, argv, env, &mut done) {
        Err(reason) => reason,
        Ok(image) => {
            before_exec();
            let Err(error) = nix::unistd::execve(&image.program, &image.argv, &image.env);
            after_failure();
            format!("exec {}: {error}", image.program.to_string_lossy())
        }
    };
    match undo(done) {
        Ok(()) => failure,
        Err(second) => format!("{failure}; and the way back failed: {second}"),
    }
}

#[derive(Debug)]
struct Image {
    program: CString,
    argv: Vec<CString>,
    env: Vec<CString>,
}

fn prepare(
    root: &Path,
    argv: &[String],
    env: &[String],
    done: &mut Vec<Done>,
) -> Result<Image, String> {
    let image = Image {
        program: find_program(root, argv, env)?,
        argv: c_strings(argv)?,
        env: c_strings(env)?,
    };
    fs::create_dir_all(NEW_ROOT).map_err(|e| format!("mkdir {NEW_ROOT}: {e}"))?;
    move_tree(root, Path::new(NEW_ROOT), done)?;
    for from in MOVED {
        let to = PathBuf::from(format!("{NEW_ROOT}{from}"));
        directory(&to)?;
        move_tree(Path::new(from), &to, done)?;
    }
    let old = format!("{NEW_ROOT}{OLD_ROOT}");
    fs::create_dir_all(&old).map_err(|e| format!("mkdir {old}: {e}"))?;
    std::env::set_current_dir(NEW_ROOT).map_err(|e| format!("chdir {NEW_ROOT}: {e}"))?;
    rustix::process::pivot_root(NEW_ROOT, &old).map_err(|e| format!("pivot_root: {e}"))?;
    done.push(Done::Pivoted);
    std::env::set_current_dir("/").map_err(|e| format!("chdir /: {e}"))?;
    Ok(image)
}

fn move_tree(from: &Path, to: &Path, done: &mut Vec<Done>) -> Result<(), String> {
    mount_move(from, to)
        .map_err(|e| format!("move mount {} to {}: {e}", from.display(), to.display()))?;
    done.push(Done::Moved { from: from.to_owned(), to: to.to_owned() });
    Ok(())
}

/// A real directory, made if it is missing: a symlink in the image would lead a mount elsewhere.
fn directory(path: &Path) -> Result<(), String> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(format!("{} in the image is not a directory", path.display())),
        Err(_) => fs::create_dir(path).map_err(|e| format!("mkdir {}: {e}", path.display())),
    }
}

fn undo(done: Vec<Done>) -> Result<(), String> {
    for step in done.into_iter().rev() {
        match step {
            Done::Moved { from, to } => mount_move(&to, &from).map_err(|e| {
                format!("move mount {} back to {}: {e}", to.display(), from.display())
            })?,
            Done::Pivoted => {
                let put = format!("{OLD_ROOT}{NEW_ROOT}");
                rustix::process::pivot_root(OLD_ROOT, &put)
                    .map_err(|e| format!("pivot_root back: {e}"))?;
                std::env::set_current_dir("/").map_err(|e| format!("chdir /: {e}"))?;
            }
        }
    }
    Ok(())
}

/// The program's path in the new root: as given if it has a slash, else the first along the image's `PATH`. It is looked up
/// inside that root (links too) and must be an executable file, before anything is moved.
fn find_program(root: &Path, argv: &[String], env: &[String]) -> Result<CString, String> {
    const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let name = argv.first().filter(|name| !name.is_empty()).ok_or("no program was named")?;
    let candidates: Vec<PathBuf> = if name.contains('/') {
        vec![Path::new("/").join(name)]
    } else {
        let path = env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(PATH);
        path.split(':').map(|dir| Path::new("/").join(dir).join(name)).collect()
    };
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
    let dir = rustix::fs::openat(CWD, root, flags, Mode::empty())
        .map_err(|e| format!("{}: {e}", root.display()))?;
    for candidate in candidates {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let found =
            rustix::fs::openat2(&dir, &candidate, flags, Mode::empty(), ResolveFlags::IN_ROOT);
        let stat = found.and_then(|fd| rustix::fs::fstat(&fd));
        if stat.is_ok_and(|stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                && stat.st_mode & 0o111 != 0
        }) {
            return CString::new(candidate.as_os_str().as_bytes()).map_err(|e| e.to_string());
        }
    }
    Err(format!("the image has no executable `{name}`"))
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, String> {
    let convert = |text: &String| CString::new(text.as_str());
    texts.iter().map(convert).collect::<Result<_, _>>().map_err(|e| format!("{e} in an argument"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn image() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        for (name, mode) in [("usr/bin/real", 0o755), ("usr/bin/plain", 0o644)] {
            fs::write(root.join(name), b"#!").unwrap();
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("/usr/bin/real", root.join("init")).unwrap();
        symlink("/bin/sh", root.join("outside")).unwrap();
        dir
    }

    #[track_caller]
    fn check(program: &str, env: &[&str], expect: Result<&str, &str>) {
        let dir = image();
        let env: Vec<String> = env.iter().map(ToString::to_string).collect();
        let argv = [program.to_owned()];
        let found = find_program(dir.path(), &argv, &env);
        match (found, expect) {
            (Ok(path), Ok(expect)) => assert_eq!(path.to_str(), Ok(expect)),
            (Err(error), Err(expect)) => assert!(error.contains(expect), "{error}"),
            (found, expect) => panic!("{program}: {found:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn the_program_is_looked_up_inside_the_image() {
        check("/init", &[], Ok("/init"));
        check("init", &["PATH=/sbin:/"], Ok("/init"));
        check("real", &[], Ok("/usr/bin/real"));
        check("usr/bin/real", &[], Ok("/usr/bin/real"));
        check("/outside", &[], Err("`/outside`"));
        check("/usr/bin/plain", &[], Err("`/usr/bin/plain`"));
        check("/usr/bin", &[], Err("no executable"));
        check("/../../../../bin/sh", &[], Err("no executable"));
        check("", &[], Err("no program"));
    }

    #[test]
    fn a_link_in_the_place_of_a_mount_point_is_an_error() {
        let dir = image();
        symlink("/tmp", dir.path().join("run")).unwrap();
        assert!(directory(&dir.path().join("run")).unwrap_err().contains("not a directory"));
        assert!(directory(&dir.path().join("proc")).is_ok() && dir.path().join("proc").is_dir());
    }
}
