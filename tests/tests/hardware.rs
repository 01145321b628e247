//! A node with Debian's generic kernel 6.1, the oldest that is tested, in an image built for that machine (`--for`): it runs ImageSets, unpacked and mounted; what is plugged into it
//! while it runs gets its driver; and it says what hardware it has, and which firmware it lacks.

use std::fs::File;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use protocol::facts::{DeviceClass, Hardware, NodeFacts};
use serde_json::{Value, json};
use tests::artifacts::{Artifacts, example};
use tests::lab::{Lab, case};
use tests::prerequisites::{CASES, Need, ensure as have, find_program};
use tests::qemu::MachineSpec;
use tests::server_peer::{CONSOLE, ServerSpec};
use tests::story::{ACT, Story};
use tests::wait;

/// The Ethernet address of the NIC that is plugged in.
const MAC: &str = "52:54:00:00:01:01";
/// Size of the disks that are plugged in.
const DISK_BYTES: u64 = 16 << 20;
/// The file that the kernel's e100 asks for on behalf of an 82559ER.
const MICROCODE: &str = "e100/d101s_ucode.bin";

/// A machine with three empty PCI Express slots, and a NIC whose driver wants firmware that no image has.
fn spec(lab: &Lab) -> Result<MachineSpec> {
    let mut spec = MachineSpec::netboot(1);
    let mut add = |option: &str, value: String| spec.extra.extend([option.to_owned(), value]);
    for slot in 1..=3 {
        add("-device", format!("pcie-root-port,id=slot{slot},chassis={slot},slot={slot}"));
    }
    for nic in ["plugged", "old"] {
        // QEMU's own DHCP server answers there, and there is no way out.
        add("-netdev", format!("user,id={nic},restrict=on"));
    }
    add("-device", "i82559er,netdev=old,romfile=".to_owned());
    for disk in ["one", "two"] {
        let file = lab.dir().join(format!("{disk}.raw"));
        File::create(&file).and_then(|file| file.set_len(DISK_BYTES)).context("a disk")?;
        add("-drive", format!("if=none,id={disk},format=raw,file={}", file.display()));
    }
    let mkfs = find_program("mkfs.ext4").context("mkfs.ext4 is missing")?;
    let disk = lab.dir().join("one.raw");
    let made = Command::new(mkfs).args(["-q", "-F", "-L", "LAYERCAKE"]).arg(disk).status()?;
    ensure!(made.success(), "mkfs.ext4: {made}");
    Ok(spec)
}

/// What the operator's command shows of node 1; None before its agent has said.
fn facts(lab: &Lab, story: &Story<'_>) -> Option<Hardware> {
    let text = story.server.layercake(lab, &["node", "facts", "n1", "--json"]).ok()?;
    let facts: Vec<NodeFacts> = protocol::facts::parse(&text).ok()?;
    facts.into_iter().next().map(|node| node.hardware)
}

fn wait_facts(
    lab: &Lab,
    story: &mut Story<'_>,
    what: &str,
    wanted: impl Fn(&Hardware) -> bool,
) -> Result<Hardware> {
    let mut last = None;
    let found = wait::until(what, ACT, || {
        story.server.check_alive()?;
        story.machine(1)?.check_alive()?;
        last = facts(lab, story);
        Ok(last.clone().filter(|hardware| wanted(hardware)))
    });
    let console = story.machine(1)?.console.situation();
    found.with_context(|| format!("the last facts are {last:#?}\n{console}"))
}

fn driver<'a>(hardware: &'a Hardware, class: DeviceClass, name: &str) -> Option<&'a str> {
    let mut devices = hardware.devices.iter();
    let device =
        devices.find(|it| it.class == Some(class) && it.driver.as_deref() == Some(name))?;
    device.module.as_deref()
}

#[test]
fn the_oldest_kernel_runs_imagesets_and_takes_what_is_plugged_into_it() -> Result<()> {
    have(&[Need::MkfsExt4])?;
    case("hardware", CASES, |lab| {
        let mut server = ServerSpec::new(Artifacts::find()?.with_floor()?, 1);
        server.cmdline = format!("{CONSOLE} layercake.zram=25% layercake.store=200M");
        let mut story = Story::begin(lab, &server)?;
        story.push(&example("hello", "v1"))?;
        story.push_mounted(&example("hello", "v2"), "erofs")?;
        story.roll_all("hello:1")?;
        story.switch_on_as(&spec(lab)?)?;
        let (observed, _) = story.wait_running(1, "hello", "1")?;
        ensure!(observed.kernel.starts_with("6.1."), "{}", observed.kernel);
        ensure!(story.hello(1)? == "1");
        // This kernel mounts no EROFS straight from its file: it goes through a loop device.
        story.roll_all("hello:2")?;
        story.wait_running(1, "hello", "2")?;
        ensure!(story.hello(1)? == "2");

        let before = wait_facts(lab, &mut story, "the first facts", |_| true)?;
        ensure!(driver(&before, DeviceClass::Nic, "virtio_net") == Some("virtio_net"));
        ensure!(driver(&before, DeviceClass::Disk, "virtio_blk") == Some("virtio_blk"));
        ensure!(!before.modules.iter().any(|name| name == "e1000e" || name == "nvme"));
        let quarter = before.memory / 4;
        ensure!(before.zram > quarter - quarter / 50 && before.zram <= quarter, "{before:#?}");
        ensure!(before.store == 200 << 20, "{before:#?}");
        let missing = before.firmware_missing.iter().find(|it| it.file == MICROCODE);
        ensure!(missing.is_some_and(|it| it.asked_by.starts_with("e100 ")), "{before:#?}");
        let text = story.server.layercake(lab, &["node", "facts", "all"])?;
        ensure!(text.contains(&format!("firmware   {MICROCODE} is missing")), "{text}");

        plug(&mut story)?;
        story.wait(1, "to have an address on the NIC that was plugged in", ACT, |observed| {
            let link = observed.links.iter().find(|link| link.mac.to_string() == MAC)?;
            (!link.addresses.is_empty()).then_some(())
        })?;
        let after = wait_facts(lab, &mut story, "what was plugged in", |hardware| {
            hardware.disks.len() == before.disks.len() + 2
                && hardware.nics.len() > before.nics.len()
        })?;
        ensure!(driver(&after, DeviceClass::Nic, "e1000e") == Some("e1000e"), "{after:#?}");
        ensure!(driver(&after, DeviceClass::Disk, "nvme") == Some("nvme"), "{after:#?}");
        let nvme = after.disks.iter().find(|disk| disk.name.starts_with("nvme"));
        ensure!(nvme.is_some_and(|disk| disk.size == DISK_BYTES), "{after:#?}");
        ensure!(story.hello(1)? == "2", "and nothing of it disturbed the service");
        a_disk_that_comes_is_the_cache_until_it_goes(&mut story)
    })
}

/// One of the disks that were plugged in has the cache's label.
fn a_disk_that_comes_is_the_cache_until_it_goes(story: &mut Story<'_>) -> Result<()> {
    story.wait(1, "to find the disk for blobs", ACT, |observed| {
        let cache = observed.cache.as_ref()?;
        (cache.place == "/dev/nvme0n1" && cache.problem.is_none()).then_some(())
    })?;
    let mut qmp = story.machine(1)?.qmp()?;
    for id in ["nic", "one"] {
        qmp.execute("device_del", &json!({ "id": id }))?;
    }
    story.wait(1, "to see NIC and disk go", ACT, |observed| {
        let problem = observed.cache.as_ref()?.problem.as_deref()?;
        let link = observed.links.iter().any(|link| link.mac.to_string() == MAC);
        (problem == "/dev/nvme0n1 is gone" && !link).then_some(())
    })?;
    // What was kept there is fetched again, by the NIC that stayed.
    story.roll_all("hello:1")?;
    story.wait_running(1, "hello", "1")?;
    ensure!(story.hello(1)? == "1");
    Ok(())
}

/// Plugs a NIC and two disks into the running machine, whose drivers nothing has needed so far but one.
fn plug(story: &mut Story<'_>) -> Result<()> {
    let mut qmp = story.machine(1)?.qmp()?;
    let mut add = |device: Value| qmp.execute("device_add", &device);
    add(
        json!({"driver": "e1000e", "netdev": "plugged", "mac": MAC, "bus": "slot1", "romfile": "", "id": "nic"}),
    )?;
    add(json!({"driver": "nvme", "drive": "one", "serial": "one", "bus": "slot2", "id": "one"}))?;
    add(json!({"driver": "virtio-blk-pci", "drive": "two", "bus": "slot3"}))?;
    Ok(())
}
