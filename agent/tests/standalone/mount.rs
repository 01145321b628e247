//! Images that come as file systems: mounted once for all containers, through rolls, deaths of the agent and ends, with nothing
//! left of them. Needs mkfs.erofs and mksquashfs.

use std::fs;
use std::path::Path;
use std::process::Command;

use agent::mounts::{FileSystem, ImageRoot, lower, mount_image};
use protocol::ids::Digest;
use protocol::oci::mount::MountForm;
use serde_json::{Value, json};

use super::site::Published;
use super::{Bench, ask, base, busybox, layer, server, version, wait_until};

/// The same files as the layers of [`version`], as a file system.
fn file_system(form: MountForm, version: &str) -> Vec<u8> {
    lower::usable(form).unwrap_or_else(|reason| {
        panic!("{reason}: this test mounts {form}; the QEMU case `mount` does so in Layer0")
    });
    let dir = tempfile::tempdir().expect("directory");
    let (tree, out) = (dir.path().join("tree"), dir.path().join("out"));
    let (sh, busybox) = (tree.join("bin/sh"), busybox());
    for below in ["bin", "www"] {
        fs::create_dir_all(tree.join(below)).expect("directory");
    }
    fs::write(&sh, &busybox).expect("sh");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&sh, executable).expect("mode");
    fs::hard_link(&sh, tree.join("bin/httpd")).expect("link");
    fs::write(tree.join("www/version"), version).expect("version");
    let (program, args) = match form {
        MountForm::Erofs => ("mkfs.erofs", [&out, &tree]),
        MountForm::Squashfs => ("mksquashfs", [&tree, &out]),
    };
    let done = Command::new(program).args(args).output();
    let done = done.unwrap_or_else(|error| {
        panic!("{program}: {error}: apt-get install erofs-utils squashfs-tools")
    });
    assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
    fs::read(out).expect("file system")
}

/// The web server and two containers of the same image that do nothing.
fn three() -> Value {
    let mut containers = server();
    for name in ["idle-a", "idle-b"] {
        let script = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";
        let idle = json!({"name": name, "image": "web", "command": ["/bin/sh", "-c", script]});
        containers.as_array_mut().expect("list").push(idle);
    }
    containers
}

fn publish(bench: &Bench, text: &str, form: MountForm) -> Published {
    let layers = [base(), layer(&[("www/version", text.as_bytes())])];
    bench.site.publish_forms(text, &layers, &[(form, file_system(form, text))], &three())
}

/// What is mounted and kept below the run directory.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    squashfs: usize,
    erofs: usize,
    overlays: usize,
    loops: usize,
    layers: usize,
}

fn seen(bench: &Bench) -> Seen {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("mountinfo");
    let here = bench.dir.path().to_str().expect("utf-8");
    let mounts = |kind: &str| {
        let kind = format!(" - {kind} ");
        table.lines().filter(|line| line.contains(here) && line.contains(&kind)).count()
    };
    let devices = fs::read_dir("/sys/block").expect("sysfs").flatten();
    let files = devices.map(|device| device.path().join("loop/backing_file"));
    let files = files.map(|file| fs::read_to_string(file).unwrap_or_default());
    Seen {
        squashfs: mounts("squashfs"),
        erofs: mounts("erofs"),
        overlays: mounts("overlay"),
        loops: files.filter(|file| file.contains(here)).count(),
        layers: count(&bench.run_dir().join("layers")),
    }
}

fn count(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

#[test]
fn a_mounted_image_is_shared_rolled_and_adopted_and_leaves_nothing() {
    let mut bench = Bench::new();
    let one = publish(&bench, "1", MountForm::Squashfs);
    let two = publish(&bench, "2", MountForm::Erofs);
    bench.site.want(&[&one]);
    bench.start_with_server();
    bench.runs(&one);
    assert_eq!(ask(), "1");
    let running = || Seen { overlays: 3, loops: 1, ..Seen::default() };
    assert_eq!(seen(&bench), Seen { squashfs: 1, ..running() });

    // It is not the agent's.
    let before = bench.instances();
    bench.kill_agent();
    assert_eq!(ask(), "1");
    bench.start_with_server();
    bench.site.wait("a second agent reports", |observed| observed.agent_starts == 2);
    bench.runs(&one);
    assert_eq!(bench.instances(), before, "the same instances go on");
    assert_eq!(seen(&bench), Seen { squashfs: 1, ..running() });

    bench.site.want(&[&two]);
    bench.runs(&two);
    assert_eq!(ask(), "2");
    // The version before is kept with its mounts, so that going back takes no time.
    let both = || Seen { squashfs: 1, erofs: 1, overlays: 6, loops: 2, layers: 0 };
    assert_eq!(seen(&bench), both());

    // As after a kill in the middle of staging: another overlay of the same file system, and one of another.
    bench.kill_agent();
    let run = bench.run_dir();
    let stray = |form: MountForm, bytes: &[u8], name: &str| {
        let hex = Digest::of(bytes).hex();
        let blob = run.join("filesystems").join(&hex);
        fs::write(&blob, bytes).expect("blob");
        let place = run.join("lowers").join(hex);
        let image = ImageRoot::FileSystem(FileSystem { form, blob, place });
        mount_image(&image, &run.join("mounts").join(name)).expect("mount");
    };
    stray(MountForm::Erofs, &file_system(MountForm::Erofs, "2"), "hello.web.0123456789ab");
    stray(MountForm::Squashfs, &file_system(MountForm::Squashfs, "3"), "hello.web.ba9876543210");
    assert!(seen(&bench).overlays == 8 && seen(&bench).squashfs == 2);
    bench.start_with_server();
    wait_until("what was begun is cleared away", || seen(&bench) == both());
    assert_eq!(ask(), "2");

    bench.site.want(&[]);
    bench.site.wait("nothing runs", |observed| observed.imagesets.is_empty());
    wait_until("nothing is mounted", || seen(&bench) == Seen::default());
    assert_eq!(count(&run.join("lowers")), 0);
    wait_until("the blobs are collected", || count(&run.join("filesystems")) == 0);
}

#[test]
fn an_image_is_unpacked_where_no_mount_form_is_wanted_or_it_has_none() {
    let mut bench = Bench::new();
    let one = publish(&bench, "1", MountForm::Squashfs);
    bench.site.want(&[&one]);
    let url = bench.site.url();
    bench.start(&["--server", &url, "--node", "n1", "--mount-forms", "none"]);
    bench.runs(&one);
    assert_eq!(ask(), "1");
    assert_eq!(seen(&bench), Seen { overlays: 3, layers: 2, ..Seen::default() });
    let two = version(&bench.site, "2", &base());
    bench.site.want(&[&two]);
    bench.runs(&two);
    assert_eq!(ask(), "2");
    assert_eq!(seen(&bench).squashfs, 0);
}
