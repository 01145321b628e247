//! Containers that hold real systems: Debian's systemd beside a second container, limits and the lack of memory. Limits need
//! a machine whose control groups are ours.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use protocol::node::{Observed, ObservedContainer};
use tests::artifacts::Artifacts;
use tests::examples;
use tests::lab::{Lab, SERVER_URL, case};
use tests::overlay::with_rescue_shell;
use tests::prerequisites::{self, CASES};
use tests::qemu::MachineSpec;
use tests::server_peer::{CONSOLE, ServerSpec};
use tests::story::{ACT, BOOT, Story};
use tests::wait;

/// Memory of a machine that holds a Debian unpacked, in MB.
const MEMORY_MB: u32 = 1536;

/// A server whose nodes have a rescue shell on the console.
fn with_shell(lab: &Lab) -> Result<ServerSpec> {
    let artifacts = with_rescue_shell(&Artifacts::find()?, &lab.dir().join("layer0"))?;
    let mut spec = ServerSpec::new(artifacts, 1);
    spec.cmdline = format!("{CONSOLE} layercake.rescue=always");
    Ok(spec)
}

fn container(observed: &Observed, set: &str, name: &str) -> Option<ObservedContainer> {
    let set = observed.imagesets.iter().find(|it| it.name.as_str() == set)?;
    set.containers.iter().find(|it| it.name.as_str() == name).cloned()
}

/// A set of busybox with one container for each limit.
fn limited(lab: &Lab) -> Result<std::path::PathBuf> {
    let busybox = prerequisites::find_program("busybox").context("busybox is missing")?;
    let file = lab.dir().join("limited.toml");
    let text = format!(
        r#"
name = "limited"
version = "1"

[[image]]
name = "busybox"
source = ["binary:{}"]
entrypoint = ["/busybox"]

[[container]]
name = "shown"
image = "busybox"
command = ["/busybox", "sh", "-c", "cd /sys/fs/cgroup; for f in memory.max memory.high memory.swap.max cpu.max cpu.weight pids.max cpuset.cpus memory.oom.group; do echo $f=$(/busybox cat $f); done; exec /busybox sleep 100000"]
[container.limits]
memory = "48MiB"
memory_high = "40MiB"
swap = 0
cpus = 0.25
cpu_weight = 50
pids = 20
cpuset = "0"
required = true

[[container]]
name = "apart"
image = "busybox"
command = ["/busybox", "sh", "-c", "echo user $(/busybox id -u); /busybox cat /proc/self/uid_map; /busybox ip route; exec /busybox sleep 100000"]
namespaces = {{ user = true, net = "private", time = true }}
network = {{ address = "10.88.0.2/24", host_address = "10.88.0.1/24" }}

[[container]]
name = "loader"
image = "busybox"
profile = "system"
capabilities = ["CAP_SYS_ADMIN"]
command = ["/busybox", "sh", "-c", "/busybox mount -t squashfs none /run; /busybox grep squashfs /proc/filesystems; exec /busybox sleep 100000"]

[[container]]
name = "hungry"
image = "busybox"
restart = "never"
command = ["/busybox", "sh", "-c", "/busybox sleep 100000 & /busybox tail /dev/zero; /busybox sleep 100000"]
[container.limits]
memory = "16MiB"
swap = 0
"#,
        busybox.display()
    );
    std::fs::write(&file, text).context("cannot write the description")?;
    Ok(file)
}

#[test]
fn debian_s_systemd_comes_up_without_a_failed_unit_beside_a_second_container_and_is_stopped()
-> Result<()> {
    case("systemd-node", CASES, |lab| {
        let spec = with_shell(lab)?;
        let layout = examples::debian(&spec.artifacts.bin, "systemd-node")?;
        let mut story = Story::begin(lab, &spec)?;
        let (from, to) = (layout.display().to_string(), format!("{SERVER_URL}/systemd-node"));
        story.server.layercake(lab, &["imageset", "copy", &from, &to])?;
        story.roll_all("systemd-node:1")?;
        story.switch_on_with(&MachineSpec { memory_mb: MEMORY_MB, ..MachineSpec::netboot(1) })?;
        let (_, set) = story.wait_running(1, "systemd-node", "1")?;
        ensure!(set.containers.len() == 2, "{set:?}");
        let url = format!("http://{}:8080/", story.machine(1)?.address);
        let client = lab.client();
        let page = wait::until(&format!("{url} to answer"), ACT, || {
            Ok(client.get_text(&url, Duration::from_secs(2)).ok())
        })?;
        let node = story.machine(1)?.id.clone();
        ensure!(page == format!("{node} runs systemd-node:1\n"), "{page}");

        let said = wait::until("systemd to be up", BOOT, || {
            // Not the whole log: what systemd paints on its console would be taken for the shell's words.
            let log = "/run/layercake/log/systemd-node/system.log";
            let said = story.machine(1)?.shell(&format!("grep -a 'node example:' {log}; true"))?;
            wait::pause(Duration::from_secs(1))?;
            Ok(said.contains("units failed").then_some(said))
        })?;
        ensure!(said.contains("the system is running, 0 units failed"), "{said}");
        let journal =
            story.machine(1)?.shell("ls /run/layercake/persistent/systemd-node/journal")?;
        ensure!(
            journal.trim().lines().any(|line| line.trim().len() == 32),
            "no journal: {journal}"
        );

        limits(&mut story, lab)?;

        // SIGTERM tells the monitor to stop its container, which is SIGRTMIN+3 for systemd: it powers its system off.
        let monitor = "kill -TERM $(cat /run/layercake/containers/systemd-node.system.*/lock)";
        story.machine(1)?.shell(monitor)?;
        let system = story.wait(1, "to have systemd ended", BOOT, |observed| {
            container(observed, "systemd-node", "system").filter(|it| it.exit.is_some())
        })?;
        let exit = system.exit.context("an exit")?;
        // As PID 1 of a namespace it ends by SIGINT, its way to say halt or power off (reboot(2)).
        ensure!(exit.signal == Some(2) || exit.code == Some(0), "{exit:?}");
        Ok(())
    })
}

/// Limits are the kernel's, and what lacks memory dies as a whole.
fn limits(story: &mut Story<'_>, lab: &Lab) -> Result<()> {
    story.push(&limited(lab)?)?;
    story.roll_all("limited:1")?;
    let hungry = story.wait(1, "to run out of memory", BOOT, |observed| {
        container(observed, "limited", "hungry").filter(|it| it.exit.is_some())
    })?;
    ensure!(hungry.exit.as_ref().and_then(|exit| exit.signal) == Some(9), "{hungry:?}");
    let log = story.machine(1)?.shell("cat /run/layercake/log/limited/shown.log")?;
    for expected in [
        "memory.max=50331648",
        "memory.high=41943040",
        "memory.swap.max=0",
        "cpu.max=25000 100000",
        "cpu.weight=50",
        "pids.max=20",
        "cpuset.cpus=0",
        "memory.oom.group=1",
    ] {
        ensure!(log.contains(expected), "{expected}: {log}");
    }
    let log = story.machine(1)?.shell("cat /run/layercake/log/limited/apart.log")?;
    for expected in ["user 0", "65536", "default via 10.88.0.1 dev eth0"] {
        ensure!(log.contains(expected), "{expected}: {log}");
    }
    // It has no CAP_SYS_MODULE: the kernel asked the agent's program for the module.
    let log = story.machine(1)?.shell("cat /run/layercake/log/limited/loader.log")?;
    ensure!(log.lines().any(|line| line.trim() == "squashfs"), "{log}");
    story.wait(1, "to report what its containers use", ACT, |observed| {
        let usage = container(observed, "systemd-node", "system")?.usage?;
        (usage.memory_bytes > Some(0) && usage.cpu_us > Some(0) && usage.pids > Some(1))
            .then_some(())
    })
}
