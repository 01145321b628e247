//! File systems for tests, made by the tools that the imagebuilder uses.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use protocol::oci::mount::MountForm;

use super::lower;

/// A file system with these files. Fails with what is missing where the tools or the kernel lack it.
#[track_caller]
pub(crate) fn file_system(form: MountForm, files: &[(&str, &[u8])]) -> Vec<u8> {
    lower::usable(form).unwrap_or_else(|reason| {
        panic!("{reason}; these tests mount {form}; the QEMU case `mount` covers it in Layer0")
    });
    let dir = tempfile::tempdir().expect("directory");
    let tree = dir.path().join("tree");
    fs::create_dir_all(&tree).expect("tree");
    for (name, content) in files {
        let path = tree.join(name);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        fs::write(path, content).expect("file");
    }
    let out = dir.path().join("out");
    let (program, args): (_, [PathBuf; 2]) = match form {
        MountForm::Erofs => ("mkfs.erofs", [out.clone(), tree]),
        MountForm::Squashfs => ("mksquashfs", [tree, out.clone()]),
    };
    let done = Command::new(program).args(args).output();
    let done = done.unwrap_or_else(|error| {
        panic!("{program}: {error}: apt-get install erofs-utils squashfs-tools")
    });
    assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
    fs::read(out).expect("file system")
}
