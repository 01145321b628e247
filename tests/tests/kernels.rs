//! Other kernels than Debian's for clouds: our own for virtual machines, which has no modules, and one whose drivers all are modules,
//! on a machine without anything of virtio.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use protocol::layer0::{MANIFEST, Manifest};
use tests::artifacts::{Artifacts, GENERIC_DIR, VIRT_DIR, example};
use tests::lab::case;
use tests::overlay::with_rescue_shell;
use tests::prerequisites::CASES;
use tests::qemu::{Boot, Devices, MachineSpec};
use tests::server_peer::{CONSOLE, ServerSpec};
use tests::story::Story;

/// Room for a kernel whose modules are unpacked from the initramfs.
const MEMORY_MB: u32 = 768;

fn manifest(artifacts: &Artifacts) -> Result<Manifest> {
    let path = artifacts.layer0.join(MANIFEST);
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[test]
fn our_own_kernel_boots_from_the_network_without_a_module_and_runs_an_imageset() -> Result<()> {
    case("kernel-virt", CASES, |lab| {
        let artifacts = Artifacts::find()?.with_layer0(VIRT_DIR)?;
        ensure!(manifest(&artifacts)?.modules.is_empty(), "it has modules");
        let mut story = Story::begin(lab, &ServerSpec::new(artifacts, 1))?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (observed, _) = story.wait_running(1, "hello", "1")?;
        ensure!(observed.kernel.ends_with("-layercake-virt"), "{}", observed.kernel);
        ensure!(story.hello(1)? == "1");
        Ok(())
    })
}

#[test]
fn a_machine_without_virtio_loads_the_drivers_it_needs_and_no_others() -> Result<()> {
    case("kernel-generic", CASES, |lab| {
        let artifacts = Artifacts::find()?.with_layer0(GENERIC_DIR)?;
        let modules: BTreeSet<String> = manifest(&artifacts)?.modules.into_iter().collect();
        let artifacts = with_rescue_shell(&artifacts, &lab.dir().join("layer0"))?;
        let boot = Boot::Direct {
            kernel: artifacts.kernel(),
            initramfs: artifacts.initramfs(),
            append: format!(
                "{CONSOLE} layercake.rescue=always layercake.server=http://10.9.0.1:8080 layercake.node=n1"
            ),
        };
        let mut story = Story::begin(lab, &ServerSpec::new(artifacts, 1))?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        let devices = Devices::Emulated;
        let spec = MachineSpec { memory_mb: MEMORY_MB, boot, devices, ..MachineSpec::netboot(1) };
        story.switch_on_as(&spec)?;
        story.wait_running(1, "hello", "1")?;
        let said = story.machine(1)?.shell("cut -d ' ' -f 1 /proc/modules; ls /sys/block")?;
        let there: BTreeSet<&str> = said.split_whitespace().collect();
        ensure!(there.contains("nvme0n1"), "no disk: {said}");
        for (name, wanted) in [
            ("e1000e", true),
            ("nvme", true),
            ("ahci", true),
            ("virtio_net", false),
            ("virtio_blk", false),
            ("e1000", false),
            ("igb", false),
            ("ixgbe", false),
            ("mlx5_core", false),
            ("bnxt_en", false),
            ("megaraid_sas", false),
            ("mpt3sas", false),
        ] {
            ensure!(modules.contains(name), "the image has no {name}");
            ensure!(there.contains(name) == wanted, "{name}: wanted {wanted}; there is {said}");
        }
        Ok(())
    })
}
