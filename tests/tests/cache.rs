//! A node with a disk labelled LAYERCAKE: the first boot fills it, the second fetches nothing, and a byte that rotted there in
//! between is found and mended.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use protocol::node::Observed;
use tests::artifacts::{Artifacts, example};
use tests::lab::case;
use tests::prerequisites::{CASES, Need, ensure as have};
use tests::qemu::MachineSpec;
use tests::server_peer::ServerSpec;
use tests::story::{ACT, BOOT, Story};

/// Size of the disk.
const DISK_BYTES: u64 = 64 << 20;
/// How much of a blob finds it on the disk: a block of the file system.
const BLOCK: usize = 1024;

fn format(disk: &Path) -> Result<()> {
    File::create(disk).and_then(|file| file.set_len(DISK_BYTES)).context("cannot make the disk")?;
    let program =
        tests::prerequisites::find_program("mkfs.ext4").context("mkfs.ext4 is missing")?;
    let made = Command::new(program).args(["-q", "-F", "-L", "LAYERCAKE"]).arg(disk).status()?;
    ensure!(made.success(), "mkfs.ext4: {made}");
    Ok(())
}

/// Spoils a byte of a blob where it lies on the disk.
fn spoil(disk: &Path, blob: &Path) -> Result<()> {
    let blob = fs::read(blob)?;
    let middle = blob.len() / 2 / BLOCK * BLOCK;
    let block = blob.get(middle..middle + BLOCK).context("the blob is too small")?;
    let bytes = fs::read(disk)?;
    let at =
        bytes.chunks(BLOCK).position(|chunk| chunk == block).context("it is not on the disk")?;
    let place = u64::try_from(at * BLOCK)? + 77;
    let spoilt = block.get(77).context("a byte")? ^ 0x10;
    OpenOptions::new().write(true).open(disk)?.write_all_at(&[spoilt], place)?;
    Ok(())
}

/// The largest blob of the server's registry.
fn largest(dir: &Path) -> Result<PathBuf> {
    let blobs = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let blobs = blobs.flatten().map(|entry| entry.path());
    blobs.max_by_key(|path| fs::metadata(path).map_or(0, |about| about.len())).context("no blob")
}

/// Compressed bytes that the node fetched for what it runs.
fn fetched(observed: &Observed) -> Option<u64> {
    observed.imagesets.first()?.last_roll.as_ref().map(|roll| roll.bytes)
}

#[test]
fn a_disk_spares_the_second_boot_the_network_and_what_rotted_on_it_is_fetched_anew() -> Result<()> {
    have(&[Need::MkfsExt4])?;
    case("cache", CASES, |lab| {
        let disk = lab.dir().join("cache.raw");
        format(&disk)?;
        let mut spec = MachineSpec::netboot(1);
        let drive = format!("if=virtio,format=raw,file={}", disk.display());
        spec.extra = vec!["-drive".to_owned(), drive];
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 1))?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;

        story.switch_on_as(&spec)?;
        let (first, _) = story.wait_running(1, "hello", "1")?;
        let whole = fetched(&first).context("no roll was reported")?;
        ensure!(whole > 0);
        let kept = story.wait(1, "to keep the blobs", ACT, |observed| {
            observed.cache.clone().filter(|cache| cache.used >= whole)
        })?;
        ensure!(kept.place.starts_with("/dev/vd") && kept.problem.is_none(), "{kept:?}");
        story.machine(1)?.pull_the_plug()?;

        story.switch_on_as(&spec)?;
        let second = wait_for_boot(&mut story, &first)?;
        ensure!(fetched(&second) == Some(0), "{second:?}");
        ensure!(story.hello(1)? == "1");
        story.machine(1)?.pull_the_plug()?;

        let blob = largest(&lab.dir().join("server/registry/blobs/sha256"))?;
        spoil(&disk, &blob)?;
        story.switch_on_as(&spec)?;
        let third = wait_for_boot(&mut story, &second)?;
        ensure!(fetched(&third) == Some(fs::metadata(&blob)?.len()), "{third:?}");
        ensure!(story.hello(1)? == "1");
        Ok(())
    })
}

/// Waits until the node runs hello:1 in another boot than this one.
fn wait_for_boot(story: &mut Story<'_>, before: &Observed) -> Result<Observed> {
    story.wait(1, "to run hello:1 in another boot", BOOT, |observed| {
        let runs = observed.imagesets.first()?.state == protocol::node::SetState::Current;
        (runs && observed.boot_id != before.boot_id).then(|| observed.clone())
    })
}
