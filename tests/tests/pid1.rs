//! PID 1 of a real node: its child dies in every way there is, it crashes itself, orphans come by the thousand, the machine
//! hangs or its kernel panics.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use protocol::node::Observed;
use tests::artifacts::{Artifacts, example, workspace_root};
use tests::lab::case;
use tests::overlay::with_rescue_shell;
use tests::prerequisites::CASES;
use tests::qemu::{Boot, Machine, MachineSpec};
use tests::server_peer::{CONSOLE, ServerSpec};
use tests::story::{ACT, BOOT, Story};
use tests::wait;

/// Kills the agent with the signal in front of it.
const KILL_AGENT: &str = "$(cat /run/layercake/state/init | cut -d' ' -f1)";
const AGENT_CGROUP: &str = "/sys/fs/cgroup/layercake-agent";
/// Memory that the crashed kernel's last words lie in, which nobody else uses.
const KEPT: &str = "memmap=1M$0x18000000 ramoops.mem_address=0x18000000 ramoops.mem_size=0x100000 \
                    ramoops.record_size=0x20000";
/// Most memory of PID 1's own, in KiB.
const MOST_KIB: u32 = 512;
const ORPHANS: u32 = 2_000;

fn number(said: &str) -> Result<u32> {
    let found = said.lines().find_map(|line| line.trim().parse().ok());
    found.with_context(|| format!("no number in `{said}`"))
}

/// The process id of the only container.
fn container(observed: &Observed) -> Option<u32> {
    observed.imagesets.first()?.containers.first()?.pid
}

/// PID 1's own memory in KiB, and its threads.
fn weigh(machine: &mut Machine) -> Result<(u32, u32)> {
    let sum = "awk '/^Pss_(Anon|Shmem):/ { kib += $2 } END { print kib }' /proc/1/smaps_rollup";
    let memory = number(&machine.shell(sum)?)?;
    let threads = number(&machine.shell("awk '/^Threads/ { print $2 }' /proc/1/status")?)?;
    Ok((memory, threads))
}

#[test]
fn whatever_happens_to_the_agent_pid_1_goes_on_and_so_do_the_containers() -> Result<()> {
    case("pid-1", CASES, |lab| {
        let artifacts = with_rescue_shell(&Artifacts::find()?, &lab.dir().join("layer0"))?;
        let mut spec = ServerSpec::new(artifacts, 1);
        spec.cmdline = format!("{CONSOLE} layercake.rescue=always layercake.watchdog=10");
        let mut story = Story::begin(lab, &spec)?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (before, _) = story.wait_running(1, "hello", "1")?;
        let pid = container(&before);
        ensure!(pid.is_some(), "{before:?}");
        // Idle: it has looked around once since it last started something.
        wait::pause(Duration::from_secs(6))?;
        let (memory, threads) = weigh(story.machine(1)?)?;

        let oom = format!(
            "echo 1M > {AGENT_CGROUP}/memory.max; echo 0 > {AGENT_CGROUP}/memory.swap.max; sleep 1; \
             echo max > {AGENT_CGROUP}/memory.max; true"
        );
        // The first one ends at Rust's handler, which knows a fault that does not repeat for none.
        let segv = format!("set -- {KILL_AGENT}; kill -SEGV $1; sleep 1; kill -SEGV $1");
        let abort = format!("kill -ABRT {KILL_AGENT}");
        let mut starts = before.agent_starts;
        for death in [&segv, &abort, &oom] {
            story.machine(1)?.shell(death)?;
            starts = again(&mut story, &before, starts)?;
        }

        // PID 1 itself: nobody notices.
        for signal in ["SEGV", "ABRT"] {
            story.machine(1)?.shell(&format!("kill -{signal} 1; sleep 2"))?;
            let said = story.machine(1)?.console.text();
            ensure!(said.contains("PID 1 has crashed and goes on"), "{signal}");
        }

        // An agent that hangs; meanwhile its node makes orphans.
        story.machine(1)?.shell(&format!("kill -STOP {KILL_AGENT}"))?;
        // A shell that ends leaves its children to PID 1.
        let storm = format!(
            "(i=0; while [ $i -lt {ORPHANS} ]; do (j=0; while [ $j -lt 100 ]; do : & j=$((j+1)); done); \
             i=$((i+100)); done; cut -d. -f1 /proc/uptime > /run/storm) > /dev/null 2>&1 & true"
        );
        story.machine(1)?.shell(&storm)?;
        wait::until("the last orphan", ACT, || {
            wait::pause(Duration::from_secs(1))?;
            Ok(number(&story.machine(1)?.shell("cat /run/storm; true")?).ok())
        })?;
        let zombies = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z 1 '; true";
        wait::until("the last orphan to be reaped", Duration::from_secs(10), || {
            Ok((number(&story.machine(1)?.shell(zombies)?)? == 0).then_some(()))
        })?;
        let after = again(&mut story, &before, starts)?;
        let said = story.machine(1)?.console.text();
        ensure!(said.contains("gives no sign of life: it is killed"), "start {after}: {said}");

        let (later, _) = weigh(story.machine(1)?)?;
        ensure!(threads == 1, "PID 1 has {threads} threads");
        ensure!(memory <= MOST_KIB && later <= MOST_KIB, "PID 1 has {memory} KiB, then {later}");
        ensure!(story.hello(1)? == "1");
        Ok(())
    })
}

/// Waits for the next agent, in the same boot and with the same container.
fn again(story: &mut Story<'_>, before: &Observed, starts: u32) -> Result<u32> {
    let next = starts + 1;
    let after = story.wait(1, &format!("to report from agent {next}"), ACT, |observed| {
        (observed.agent_starts == next && container(observed).is_some()).then(|| observed.clone())
    })?;
    ensure!(after.boot_id == before.boot_id, "the node was rebooted");
    ensure!(container(&after) == container(before), "another container: {after:?}");
    Ok(next)
}

#[test]
fn a_panic_is_told_by_the_next_boot_and_a_machine_that_hangs_is_reset() -> Result<()> {
    case("watchdog", CASES, |lab| {
        let mut found = Artifacts::find()?;
        found.layer0 = workspace_root().join("target/virt");
        let artifacts = with_rescue_shell(&found, &lab.dir().join("layer0"))?;
        let append = format!(
            "{CONSOLE} panic=1 layercake.server=http://10.9.0.1:8080 layercake.node=n1 \
             layercake.rescue=always layercake.watchdog=10 {KEPT}"
        );
        let (kernel, initramfs) = (artifacts.kernel(), artifacts.initramfs());
        let extra = ["-device", "i6300esb", "-action", "watchdog=reset"].map(str::to_owned);
        let machine = MachineSpec {
            boot: Boot::Direct { kernel, initramfs, append },
            extra: extra.to_vec(),
            ..MachineSpec::netboot(1)
        };
        let mut story = Story::begin(lab, &ServerSpec::new(artifacts, 1))?;
        story.switch_on_with(&machine)?;
        let first = story.wait(1, "to report", BOOT, |observed| Some(observed.clone()))?;
        ensure!(first.last_crash.is_none(), "{first:?}");
        let said = story.machine(1)?.console.text();
        ensure!(said.contains("resets after 10 s"), "no watchdog: {said}");

        story.machine(1)?.shell("(sleep 1; echo c > /proc/sysrq-trigger) & true")?;
        let second = next_boot(&mut story, &first)?;
        ensure!(second.last_crash.as_deref() == Some("sysrq triggered crash"), "{second:?}");
        // A new agent of the same boot knows it, too.
        story.machine(1)?.shell(&format!("kill -9 {KILL_AGENT}"))?;
        story.wait(1, "to report the crash again", ACT, |observed| {
            (observed.agent_starts > second.agent_starts && observed.last_crash.is_some())
                .then_some(())
        })?;

        // PID 1 stands still, as it would where the kernel hangs; the agent goes on.
        let ice = "/sys/fs/cgroup/ice";
        story.machine(1)?.shell(&format!(
            "mkdir {ice}; echo 1 > {ice}/cgroup.procs; (sleep 1; echo 1 > {ice}/cgroup.freeze) & true"
        ))?;
        let third = next_boot(&mut story, &second)?;
        ensure!(third.last_crash.is_none(), "{third:?}");
        Ok(())
    })
}

fn next_boot(story: &mut Story<'_>, before: &Observed) -> Result<Observed> {
    story.wait(1, "to boot again", BOOT, |observed| {
        (observed.boot_id != before.boot_id).then(|| observed.clone())
    })
}
