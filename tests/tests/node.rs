//! What happens inside a node: the agent dies and its containers do not, a set takes the whole machine, a node needs no
//! server. The cases type at the rescue shell on the serial console.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use protocol::node::{ContainerState, Observed, ObservedContainer};
use tests::artifacts::{Artifacts, example};
use tests::lab::{Lab, case};
use tests::overlay::with_rescue_shell;
use tests::prerequisites::CASES;
use tests::qemu::{Boot, Machine, MachineSpec};
use tests::registry_peer::Registry;
use tests::server_peer::{CONSOLE, ServerSpec, layercake};
use tests::story::{ACT, BOOT, Story, busybox_set};
use tests::wait;

/// Prints the process id of the agent.
const AGENT: &str = "for d in /proc/[0-9]*; do set -- $(tr '\\000' ' ' < $d/cmdline 2>/dev/null); \
                     [ \"$2\" = agent ] && echo ${d#/proc/}; done";
/// Lines that the counter writes as fast as it can, for some ten seconds on an emulated machine.
const LINES: u32 = 100_000;

/// A server whose nodes have a rescue shell on the console.
fn with_shell(lab: &Lab) -> Result<ServerSpec> {
    let artifacts = with_rescue_shell(&Artifacts::find()?, &lab.dir().join("layer0"))?;
    let mut spec = ServerSpec::new(artifacts, 1);
    spec.cmdline = format!("{CONSOLE} layercake.rescue=always");
    Ok(spec)
}

/// The first line that is a number and nothing else: kernel messages come between.
fn number(said: &str) -> Result<u32> {
    let found = said.lines().find_map(|line| line.trim().parse().ok());
    found.with_context(|| format!("no number in `{said}`"))
}

fn only_container(observed: &Observed) -> Option<&ObservedContainer> {
    observed.imagesets.first()?.containers.first()
}

#[test]
fn an_agent_killed_with_sigkill_comes_back_and_finds_its_container_running() -> Result<()> {
    case("agent-killed", &CASES, |lab| {
        let mut story = Story::begin(lab, &with_shell(lab)?)?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (before, set) = story.wait_running(1, "hello", "1")?;
        let pid = set.containers.first().and_then(|container| container.pid);
        ensure!(pid.is_some(), "{set:?}");
        let agent = number(&story.machine(1)?.shell(AGENT)?)?;
        story.machine(1)?.shell(&format!("kill -9 {agent}"))?;
        let after = story.wait(1, "to report from a new agent", ACT, |observed| {
            (observed.agent_starts == before.agent_starts + 1
                && only_container(observed)?.state == ContainerState::Running)
                .then(|| observed.clone())
        })?;
        ensure!(only_container(&after).and_then(|container| container.pid) == pid, "{after:?}");
        ensure!(only_container(&after).is_some_and(|container| container.restarts == 0));
        ensure!(before.boot_id == after.boot_id, "the node was rebooted");
        ensure!(story.answer(1)?.contains('1'));
        Ok(())
    })
}

/// An ImageSet that writes [`LINES`] lines at full rate and exits with 7.
fn counter(lab: &Lab) -> Result<std::path::PathBuf> {
    let script = format!(
        "i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo line $i; done; echo the end; exit 7"
    );
    let container = format!(
        "[[container]]\nname = \"counter\"\nimage = \"busybox\"\nrestart = \"never\"\n\
         command = [\"/bin/sh\", \"-c\", \"{script}\"]\n"
    );
    busybox_set(lab.dir(), "steady", "", &container)
}

#[test]
fn no_line_of_a_full_rate_log_is_lost_and_the_exit_code_is_right_without_an_agent() -> Result<()> {
    case("agent-away", &CASES, |lab| {
        let mut story = Story::begin(lab, &with_shell(lab)?)?;
        story.push(&counter(lab)?)?;
        story.roll_all("steady:1")?;
        story.switch_on(1)?;
        story.wait(1, "to start the counter", BOOT, |observed| only_container(observed)?.pid)?;
        let machine = story.machine(1)?;
        let logs = "/run/layercake/log/steady/counter.log*";
        // Killed in the middle once, and then kept from running until the program has ended.
        let agent = number(&machine.shell(AGENT)?)?;
        machine.shell(&format!("kill -9 {agent}"))?;
        let again = wait::until("another agent", ACT, || {
            let said = machine.shell(AGENT)?;
            Ok(number(&said).ok().filter(|pid| *pid != agent))
        })?;
        machine.shell(&format!("kill -STOP {again}"))?;
        let done = number(&machine.shell(&format!("cat {logs} | grep -c '^the end'; true"))?)?;
        ensure!(done == 0, "the counter ended before the agent was stopped: write more lines");
        let all_said = format!("cat {logs} | grep -c '^the end'; true");
        wait::until("the counter's last line", ACT, || {
            Ok((number(&machine.shell(&all_said)?)? == 1).then_some(()))
        })?;
        wait::pause(Duration::from_secs(1))?; // For the program's exit after its last line.
        machine.shell(&format!("kill -9 {again}"))?;

        let container = story.wait(1, "to report how the counter ended", ACT, |observed| {
            only_container(observed).filter(|container| container.exit.is_some()).cloned()
        })?;
        let code = container.exit.as_ref().and_then(|exit| exit.code);
        ensure!(code == Some(7) && container.restarts == 0, "{container:?}");
        let machine = story.machine(1)?;
        let count = format!("cat {logs} | grep '^line ' | sort -u | wc -l");
        ensure!(number(&machine.shell(&count)?)? == LINES);
        let count = format!("cat {logs} | grep -c '^line '");
        ensure!(number(&machine.shell(&count)?)? == LINES);
        Ok(())
    })
}

#[test]
fn a_set_in_pivot_mode_takes_the_machine_and_its_agent_still_reports() -> Result<()> {
    case("pivot", &CASES, |lab| {
        let init = "echo the cake is the plate; while true; do sleep 1; done";
        let head = format!("mode = \"pivot\"\ninit = [\"/bin/sh\", \"-c\", \"{init}\"]\n");
        let set = busybox_set(lab.dir(), "plate", &head, "")?;
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 1))?;
        story.push(&set)?;
        story.roll_all("plate:1")?;
        story.switch_on(1)?;
        let (observed, _) = story.wait_running(1, "plate", "1")?;
        ensure!(observed.pivoted, "{observed:?}");
        story.machine(1)?.console.wait_for("the cake is the plate", ACT)?;
        // It goes on reporting from the new root.
        let id = story.machine(1)?.id.clone();
        let seen = |story: &Story<'_>| {
            anyhow::Ok(story.server.client.node(&id)?.context("the node is unknown")?.last_seen_ms)
        };
        let then = seen(&story)?;
        wait::until("the pivoted node to be heard of again", ACT, || {
            Ok((seen(&story)? > then).then_some(()))
        })
    })
}

#[test]
fn a_kernel_and_an_initramfs_run_an_imageset_without_any_server() -> Result<()> {
    case("standalone", &CASES, |lab| {
        let artifacts = Artifacts::find()?;
        let _registry = Registry::start(lab)?;
        push(lab, &artifacts, &example("hello", "v1"))?;
        let mut spec = MachineSpec::netboot(1);
        spec.boot = Boot::Direct {
            kernel: artifacts.kernel(),
            initramfs: artifacts.initramfs(),
            append: format!(
                "{CONSOLE} layercake.imageset={}/hello:1 ip=10.9.0.101::10.9.0.1:255.255.255.0:n1::off",
                Registry::base()
            ),
        };
        let mut machine = Machine::start(lab, &spec)?;
        let url = format!("http://{}:8080/", machine.address);
        let client = lab.client();
        let answer = wait::until(&format!("{url} to answer"), BOOT, || {
            machine.check_alive()?;
            Ok(client.get_text(&url, Duration::from_secs(2)).ok())
        });
        let answer = answer.with_context(|| machine.console.situation())?;
        ensure!(answer.contains('1'), "{answer}");
        Ok(())
    })
}

fn push(lab: &Lab, artifacts: &Artifacts, imageset: &Path) -> Result<()> {
    let file = imageset.to_string_lossy();
    let args = ["imageset", "push", &*file, "--to", &Registry::base()];
    layercake(lab, &artifacts.bin, &args).map(drop)
}
