//! Containers that hold real systems: Debian's systemd beside a second container, limits and the lack of memory. Limits need
//! a machine whose control groups are ours.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use protocol::node::{Observed, ObservedContainer, RollOutcome, RollReport, SetState};
use tests::artifacts::{Artifacts, workspace_root};
use tests::examples;
use tests::lab::{Lab, case};
use tests::overlay::with_rescue_shell;
use tests::prerequisites::{self, CASES};
use tests::qemu::MachineSpec;
use tests::server_peer::{CONSOLE, ServerSpec};
use tests::story::{ACT, BOOT, Story};
use tests::wait;

/// Memory of a machine that holds a Debian unpacked, in MB.
const MEMORY_MB: u32 = 1536;
/// The example set and its container that is a whole system.
const SET: &str = "systemd-node";
const SYSTEM: &str = "systemd-node/system";
/// What its second version has and the first lacks, and with it a place for SSH host keys.
const ADDED: &str = "etc/ssh/moduli";
const HOST_KEY: &str = "/etc/ssh/ssh_host_ed25519_key";
/// Most compressed bytes that the second version may move: its one layer, image config and description.
const SMALL: u64 = 64 << 10;

/// Prints the process id of the agent.
const AGENT: &str = "for d in /proc/[0-9]*; do set -- $(tr '\\000' ' ' < $d/cmdline 2>/dev/null); \
                     [ \"$2\" = agent ] && echo ${d#/proc/}; done; true";

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
fn limited(lab: &Lab) -> Result<PathBuf> {
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
fn debian_s_systemd_comes_up_beside_a_second_container_is_rolled_undone_and_stopped() -> Result<()>
{
    case("systemd-node", CASES, |lab| {
        let spec = with_shell(lab)?;
        let layout = examples::debian(&spec.artifacts.bin, "systemd-node")?;
        let mut story = Story::begin(lab, &spec)?;
        story.push_layout(&layout, SET)?;
        story.push(&second_version(lab, &layout)?)?;
        story.roll_all("systemd-node:1")?;
        story.switch_on_with(&MachineSpec { memory_mb: MEMORY_MB, ..MachineSpec::netboot(1) })?;
        let (_, set) = story.wait_running(1, SET, "1")?;
        ensure!(set.containers.len() == 2, "{set:?}");
        page_is_of(&mut story, "1")?;
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

        rolls(&mut story, lab)?;
        limits(&mut story, lab)?;

        // SIGTERM tells the monitor to stop its container, which is SIGRTMIN+3 for systemd: it powers its system off.
        let monitor = "kill -TERM $(cat /run/layercake/containers/systemd-node.system.*/lock)";
        story.machine(1)?.shell(monitor)?;
        let system = story.wait(1, "to have systemd ended", BOOT, |observed| {
            container(observed, SET, "system").filter(|it| it.exit.is_some())
        })?;
        let exit = system.exit.context("an exit")?;
        // As PID 1 of a namespace it ends by SIGINT, its way to say halt or power off (reboot(2)).
        ensure!(exit.signal == Some(2) || exit.code == Some(0), "{exit:?}");
        Ok(())
    })
}

/// The example's second version: the same Debian, and one small layer over it.
fn second_version(lab: &Lab, layout: &Path) -> Result<PathBuf> {
    let first = workspace_root().join("examples/systemd-node/imageset.toml");
    let mut text = std::fs::read_to_string(&first).context("cannot read the example")?;
    let source = format!("source = [\"oci:{}:1-system\", \"dir:added\"]", layout.display());
    for (line, other) in [
        // Watched for a short while only: a test has no time.
        ("version = \"1\"", "version = \"2\"\nwatch_s = 1"),
        ("source = [\"debian:bookworm\", \"dir:rootfs\"]", source.as_str()),
        ("variant = \"minbase\"", ""),
        ("packages = [\"systemd-sysv\", \"dbus\", \"udev\", \"busybox\"]", ""),
    ] {
        ensure!(text.contains(line), "the example has no `{line}` any more");
        text = text.replacen(line, other, 1);
    }
    let dir = lab.dir().join("second");
    let added = dir.join("added").join(ADDED);
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(added.parent().unwrap_or(&dir))?;
        std::fs::write(&added, "# added by version 2\n")?;
        std::fs::write(dir.join("imageset.toml"), text)
    };
    write().with_context(|| format!("cannot write below {}", dir.display()))?;
    Ok(dir.join("imageset.toml"))
}

/// The second container serves the page of this version.
fn page_is_of(story: &mut Story<'_>, version: &str) -> Result<()> {
    let machine = story.machine(1)?;
    let (url, node) = (format!("http://{}:8080/", machine.address), machine.id.clone());
    let client = story.server.client.clone();
    let page = wait::until(&format!("{url} to answer"), ACT, || {
        Ok(client.get_text(&url, Duration::from_secs(2)).ok())
    })?;
    ensure!(page == format!("{node} runs systemd-node:{version}\n"), "{page}");
    Ok(())
}

/// What a command says that an operator runs in the system.
fn in_system(story: &Story<'_>, lab: &Lab, command: &str) -> Result<String> {
    let args = ["exec", "n1", SYSTEM, "--", "sh", "-c", command];
    Ok(story.server.layercake(lab, &args)?.trim().to_owned())
}

/// Waits until systemd says that it is up, without a failed unit.
fn system_is_up(story: &Story<'_>, lab: &Lab) -> Result<()> {
    wait::until("systemd to be up again", BOOT, || {
        // It cannot be asked at first, and says then that it is starting.
        let said = in_system(story, lab, "systemctl is-system-running; true").unwrap_or_default();
        ensure!(said != "degraded", "{}", in_system(story, lab, "systemctl --failed")?);
        Ok((said == "running").then_some(()))
    })
}

/// The set as the node reports it, once it has nothing left to do.
fn settled(story: &mut Story<'_>, version: &str) -> Result<(Observed, RollReport)> {
    story.wait(1, &format!("to have settled on {SET}:{version}"), ACT, |observed| {
        let set = observed.imagesets.iter().find(|set| set.name.as_str() == SET)?;
        let there = set.version.as_str() == version && set.state == SetState::Current;
        let report = set.last_roll.clone().filter(|it| it.outcome != Some(RollOutcome::Watching));
        report.filter(|_| there && set.reason.is_none()).map(|report| (observed.clone(), report))
    })
}

/// The set is rolled, undone, and rolled again by an agent that is killed at it.
fn rolls(story: &mut Story<'_>, lab: &Lab) -> Result<()> {
    let identity = in_system(story, lab, "cat /etc/machine-id")?;
    ensure!(identity.len() == 32, "{identity}");
    let roll = ["roll", "start", "n1", "--imageset", "systemd-node:2"];

    story.server.layercake(lab, &roll)?;
    let (_, report) = settled(story, "2")?;
    ensure!(report.outcome == Some(RollOutcome::Committed), "{report:?}");
    ensure!((1..SMALL).contains(&report.bytes), "{} bytes were moved", report.bytes);
    page_is_of(story, "2")?;
    system_is_up(story, lab)?;
    ensure!(in_system(story, lab, "cat /etc/machine-id")? == identity, "another machine-id");
    // As an SSH server's package would.
    in_system(story, lab, &format!("cat /{ADDED} && echo secret > {HOST_KEY}"))?;

    story.server.layercake(lab, &["roll", "undo", SET, "--node", "n1"])?;
    let (_, report) = settled(story, "1")?;
    ensure!(report.outcome == Some(RollOutcome::Undone) && report.bytes == 0, "{report:?}");
    page_is_of(story, "1")?;
    system_is_up(story, lab)?;
    ensure!(in_system(story, lab, "cat /etc/machine-id")? == identity, "another machine-id");
    ensure!(in_system(story, lab, &format!("cat /{ADDED}")).is_err(), "this is version 2");

    killed_in_mid_roll(story, &roll, lab)?;
    page_is_of(story, "2")?;
    system_is_up(story, lab)?;
    let kept = in_system(story, lab, &format!("cat /etc/machine-id {HOST_KEY}"))?;
    ensure!(kept == format!("{identity}\nsecret"), "{kept}");
    Ok(())
}

/// Rolls to version 2 with an agent that is killed while the old system stops, and checks that the next one ends it.
fn killed_in_mid_roll(story: &mut Story<'_>, roll: &[&str], lab: &Lab) -> Result<()> {
    let (before, pid) = story.wait(1, "to run a system", ACT, |observed| {
        Some((observed.clone(), container(observed, SET, "system")?.pid?))
    })?;
    // A system that does not run cannot end when it is asked to: the cut-over has to wait for it.
    story.machine(1)?.shell(&format!("kill -STOP {pid}"))?;
    story.server.layercake(lab, &[roll, &["--no-wait"]].concat())?;
    story.wait(1, "to be cutting over", ACT, |observed| {
        let set = observed.imagesets.iter().find(|set| set.name.as_str() == SET)?;
        set.reason.as_ref()?.contains("cutting over").then_some(())
    })?;
    let kill = format!("kill -9 $({AGENT}) && kill -CONT {pid}");
    story.machine(1)?.shell(&kill)?;
    let (after, _) = settled(story, "2")?;
    ensure!(after.agent_starts == before.agent_starts + 1, "{after:?}");
    ensure!(after.boot_id == before.boot_id, "the node was rebooted");
    let counted =
        story.machine(1)?.shell("echo $(ls /run/layercake/containers | wc -l) instances")?;
    ensure!(counted.lines().any(|line| line.trim() == "2 instances"), "{counted}");
    Ok(())
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
        let usage = container(observed, SET, "system")?.usage?;
        // Whatever the agent saw when it started: it looks again after a minute at the earliest.
        (usage.memory_bytes > Some(0) && usage.cpu_us > Some(0) && usage.pids > Some(0))
            .then_some(())
    })
}
