//! Two hundred containers come and go, and the agent is killed in a fifth of them: nothing is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use agent::containers::{Adopted, HeldSockets, Spec, adopt, create_with, remove};
use agent::mounts::{mount_overlay, unmount_overlay};
use agent::paths::RunDirs;

use super::bench::{Bench, PROGRAM, SIGKILL, processes, wait_until};
use super::{mount, private_mounts};

const CYCLES: usize = 200;
/// Set for a process of this test that plays an agent, with the directory of the test.
const PLAY: &str = "LAYERCAKE_TEST_PLAY_DYING_AGENT";
/// How far a dying agent comes: it is killed when the file of this name is there.
const STEPS: [&str; 4] = ["begun", "mounted", "created", "released"];

#[test]
fn two_hundred_cycles_with_killed_agents_leave_nothing_behind() {
    if let Some(base) = std::env::var_os(PLAY).map(PathBuf::from) {
        return play(&base);
    }
    private_mounts();
    let bench = Bench::new();
    let base = bench.dir.path();
    mount("tmpfs", base_dir(base, "over").as_path(), "");
    let (mounts_before, loops_before) = (mounts(), loops());
    for number in 0..CYCLES {
        let mut spec =
            bench.spec(&format!("leak{number}"), &["sh", "-c", "sleep 1000 & sleep 1000"]);
        let over = base.join("over/instance");
        spec.root = over.join("root");
        if number % 5 == 4 {
            die(base, &spec, STEPS[number / 5 % STEPS.len()]);
        } else {
            mount_overlay(&[base.join("root")], &over).expect("mount");
            let handle = bench.create(&spec).expect("create");
            if number % 3 > 0 {
                handle.release().expect("release");
            }
            drop(handle);
        }
        // Whoever comes next finds what there is and ends it.
        for adopted in adopt(&bench.dirs, &bench.on_end).expect("adopt") {
            match adopted {
                Adopted::Live(handle) => {
                    handle.stop_with(SIGKILL, Duration::ZERO).expect("stop");
                    handle.remove().expect("remove");
                }
                Adopted::Ended { spec, .. } => remove(&bench.dirs, &spec.id).expect("remove"),
            }
        }
        unmount_overlay(&over).expect("unmount");
        assert!(agent::containers::cgroup::Cgroup::find(&spec.id).is_none(), "a group is left");
    }
    let here = base.to_str().expect("utf-8").to_owned();
    wait_until("every monitor is gone", || !processes().contains(&here));
    assert_eq!(fs::read_dir(bench.dirs.containers()).expect("containers").count(), 0);
    assert_eq!(mounts(), mounts_before);
    assert_eq!(loops(), loops_before);
    rustix::mount::unmount(base.join("over"), rustix::mount::UnmountFlags::empty())
        .expect("unmount");
}

fn base_dir(base: &Path, name: &str) -> PathBuf {
    fs::create_dir_all(base.join(name)).expect("mkdir");
    base.join(name)
}

/// Lets another agent make the container and kills it at a step.
fn die(base: &Path, spec: &Spec, step: &str) {
    let steps = base_dir(base, "steps");
    for name in STEPS {
        drop(fs::remove_file(steps.join(name)));
    }
    fs::write(base.join("play.json"), serde_json::to_vec(spec).expect("json")).expect("write");
    let mut child = Command::new(std::env::current_exe().expect("exe"))
        .args(["leaks::two_hundred_cycles_with_killed_agents_leave_nothing_behind", "--exact"])
        .env(PLAY, base)
        .stdout(Stdio::null())
        .spawn()
        .expect("another agent");
    wait_until(step, || steps.join(step).exists());
    child.kill().expect("kill");
    child.wait().expect("reap");
}

/// The other agent.
fn play(base: &Path) {
    let done = |step: &str| fs::write(base.join("steps").join(step), "").expect("tell the test");
    let spec: Spec =
        serde_json::from_slice(&fs::read(base.join("play.json")).expect("spec")).expect("spec");
    done("begun");
    mount_overlay(&[base.join("root")], &base.join("over/instance")).expect("mount");
    done("mounted");
    let dirs = RunDirs::new(base.join("run"));
    let handle =
        create_with(Path::new(PROGRAM), &dirs, &spec, &HeldSockets::default(), Arc::new(|_, _| {}))
            .expect("create");
    done("created");
    handle.release().expect("release");
    done("released");
    loop {
        std::thread::park();
    }
}

fn mounts() -> usize {
    fs::read_to_string("/proc/thread-self/mountinfo").expect("mountinfo").lines().count()
}

/// Loop devices that have a file.
fn loops() -> BTreeSet<PathBuf> {
    let devices = fs::read_dir("/sys/block").map(|list| list.flatten().map(|entry| entry.path()));
    devices
        .into_iter()
        .flatten()
        .filter(|device| device.join("loop/backing_file").exists())
        .collect()
}
