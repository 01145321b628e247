//! What happens inside a node: the agent dies and its containers do not, a set takes the whole machine, a node needs no
//! server. The cases type at the rescue shell on the serial console.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use protocol::node::{ContainerState, Observed, ObservedContainer, SetState};
use tests::artifacts::{Artifacts, example, workspace_root};
use tests::lab::{Lab, case};
use tests::overlay::with_rescue_shell;
use tests::prerequisites::CASES;
use tests::qemu::{Boot, Machine, MachineSpec};
use tests::registry_peer::Registry;
use tests::server_peer::{CONSOLE, ServerSpec, layercake};
use tests::story::{ACT, BOOT, Story, hello_version, make_pivot_base, mortal_hello};
use tests::wait;

/// Prints the process id of the agent.
const AGENT: &str = "for d in /proc/[0-9]*; do set -- $(tr '\\000' ' ' < $d/cmdline 2>/dev/null); \
                     [ \"$2\" = agent ] && echo ${d#/proc/}; done; true";
/// Lines that are written as fast as can be, for some seconds on an emulated machine; the ring holds them all (32 MiB).
const LINES: u32 = 500_000;

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
    case("agent-killed", CASES, |lab| {
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
        ensure!(story.hello(1)? == "1");
        operators_look_inside(lab, &story)
    })
}

/// Logs and commands by the new agent, of the container that the old one started.
fn operators_look_inside(lab: &Lab, story: &Story<'_>) -> Result<()> {
    let layercake = |line: &str| story.server.layercake(lab, &line.split(' ').collect::<Vec<_>>());
    let log = layercake("logs n1 hello -n 1")?;
    ensure!(log.starts_with("hello 1 listening on "), "{log}");
    let kernel = layercake("logs n1 --agent")?;
    ensure!(kernel.contains("Linux version ") && kernel.contains("layercake"), "{kernel}");
    // The image has one program, which complains of this and exits with 2.
    let complaint = layercake("exec n1 hello -- /hello --port cake").expect_err("exit status 2");
    let complaint = format!("{complaint:#}");
    let expected = "exit status: 2: hello: `cake` is not a port";
    ensure!(complaint.ends_with(expected), "{complaint}");
    let error = layercake("exec n1 other -- /hello").expect_err("no such container");
    ensure!(error.to_string().contains("it has hello/hello"), "{error:#}");
    Ok(())
}

#[test]
fn an_agent_killed_in_the_middle_of_a_roll_leaves_exactly_the_new_set() -> Result<()> {
    case("agent-killed-rolling", CASES, |lab| {
        let mut story = Story::begin(lab, &with_shell(lab)?)?;
        story.push(&example("hello", "v1"))?;
        story.push(&example("hello", "v2"))?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (before, set) = story.wait_running(1, "hello", "1")?;
        let pid = set.containers.first().and_then(|container| container.pid);
        let pid = pid.context("the container has no pid")?;
        let agent = number(&story.machine(1)?.shell(AGENT)?)?;
        // A program that does not run cannot end when it is asked to: the cut-over has to wait for it.
        story.machine(1)?.shell(&format!("kill -STOP {pid}"))?;
        story.roll_all("hello:2")?;
        story.wait(1, "to be cutting over", ACT, |observed| {
            let reason = observed.imagesets.first()?.reason.as_ref()?;
            reason.contains("cutting over").then_some(())
        })?;
        story.machine(1)?.shell(&format!("kill -9 {agent}"))?;
        let after = story.wait(1, "to run hello:2 by a new agent", ACT, |observed| {
            let set = observed.imagesets.first()?;
            let rolled = set.version.as_str() == "2" && set.state == SetState::Current;
            let renewed = observed.agent_starts == before.agent_starts + 1;
            (rolled && renewed).then(|| observed.clone())
        })?;
        ensure!(before.boot_id == after.boot_id, "the node was rebooted");
        ensure!(story.hello(1)? == "2");
        // The old set's mount is kept for an undo, and nothing else of it.
        for (dir, expected) in [("containers", 1), ("mounts", 2)] {
            let said = story.machine(1)?.shell(&format!("ls /run/layercake/{dir} | wc -l"))?;
            ensure!(number(&said)? == expected, "{said} in {dir}");
        }
        Ok(())
    })
}

#[test]
fn no_line_of_a_full_rate_log_is_lost_and_the_exit_code_is_right_without_an_agent() -> Result<()> {
    case("agent-away", CASES, |lab| {
        let spec = with_shell(lab)?;
        let mut story = Story::begin(lab, &spec)?;
        story.push(&mortal_hello(lab.dir(), &spec.artifacts)?)?;
        story.roll_all("mortal:1")?;
        story.switch_on(1)?;
        story.wait_running(1, "mortal", "1")?;
        let base = format!("http://{}:8080", story.machine(1)?.address);

        // The agent is killed while the program writes as fast as it can.
        let client = story.server.client.clone();
        let lines = format!("{base}/log?lines={LINES}");
        let machine = story.machine(1)?;
        let first = number(&machine.shell(AGENT)?)?;
        let second = std::thread::scope(|scope| {
            let written = scope.spawn(|| client.get_text(&lines, ACT));
            machine.shell(&format!("kill -9 {first}"))?;
            ensure!(!written.is_finished(), "the log was written too soon: ask for more lines");
            let second = wait::until("another agent", ACT, || {
                Ok(number(&machine.shell(AGENT)?).ok().filter(|pid| *pid != first))
            })?;
            written.join().map_err(|_| anyhow!("the request panicked"))??;
            Ok(second)
        })?;
        // It is kept from running while the program ends, and killed before it can have noticed.
        machine.shell(&format!("kill -STOP {second}"))?;
        client.get_text(&format!("{base}/exit?code=7"), ACT)?;
        let gone = "ls /run/layercake/containers/*/exit.json; true";
        wait::until("the program's end", ACT, || {
            Ok(machine.shell(gone)?.contains("/exit.json\n").then_some(()))
        })?;
        machine.shell(&format!("kill -9 {second}"))?;

        let container = story.wait(1, "to report how the program ended", ACT, |observed| {
            only_container(observed).filter(|container| container.exit.is_some()).cloned()
        })?;
        let code = container.exit.as_ref().and_then(|exit| exit.code);
        ensure!(code == Some(7) && container.restarts == 0, "{container:?}");
        // Every line is there, and there once.
        let read = "cat /run/layercake/log/mortal/hello.log*";
        let machine = story.machine(1)?;
        for count in ["wc -l", "sort -u | wc -l"] {
            let counted = number(&machine.shell(&format!("{read} | grep '^line ' | {count}"))?)?;
            ensure!(counted == LINES, "{count} says {counted} of {LINES} lines");
        }
        Ok(())
    })
}

#[test]
fn a_set_in_pivot_mode_takes_the_machine_and_its_agent_still_reports() -> Result<()> {
    case("pivot", CASES, |lab| {
        let artifacts = Artifacts::find()?;
        make_pivot_base(&workspace_root().join("target/examples/pivot"))?;
        let mut story = Story::begin(lab, &ServerSpec::new(artifacts, 1))?;
        // As a file system: it has to come along when the machine's root changes.
        story.push_mounted(&workspace_root().join("examples/pivot/imageset.toml"), "erofs")?;
        story.roll_all("pivot:1")?;
        story.switch_on(1)?;
        let (observed, _) = story.wait_running(1, "pivot", "1")?;
        ensure!(observed.pivoted, "{observed:?}");
        story.machine(1)?.console.wait_for("pivot example: init runs as pid 1", ACT)?;
        // It goes on reporting from the new root.
        let id = story.machine(1)?.id.clone();
        let client = story.server.client.clone();
        let seen = || anyhow::Ok(client.node(&id)?.context("the node is unknown")?.last_seen_ms);
        let then = seen()?;
        wait::until("the pivoted node to be heard of again", ACT, || {
            Ok((seen()? > then).then_some(()))
        })
    })
}

#[test]
fn a_kernel_and_an_initramfs_run_an_imageset_without_any_server() -> Result<()> {
    case("standalone", CASES, |lab| {
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
        ensure!(hello_version(&answer)? == "1", "{answer}");
        Ok(())
    })
}

#[test]
fn images_that_come_as_file_systems_are_mounted_in_layer0_and_roll() -> Result<()> {
    case("mount", CASES, |lab| {
        let mut story = Story::begin(lab, &with_shell(lab)?)?;
        story.push_mounted(&example("hello", "v1"), "squashfs")?;
        story.push_mounted(&example("hello", "v2"), "erofs")?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (before, _) = story.wait_running(1, "hello", "1")?;
        ensure!(story.hello(1)? == "1");
        let count = |story: &mut Story<'_>, what: &str| {
            number(&story.machine(1)?.shell(&format!("{what} | wc -l"))?)
        };
        let mounts = |kind: &str| format!("grep '/lowers/.* {kind} ro' /proc/mounts");
        ensure!(count(&mut story, &mounts("squashfs"))? == 1, "v1 is not mounted as squashfs");
        ensure!(count(&mut story, "ls /run/layercake/layers")? == 0, "v1 was unpacked");

        // An agent that was killed finds it mounted.
        let agent = number(&story.machine(1)?.shell(AGENT)?)?;
        story.machine(1)?.shell(&format!("kill -9 {agent}"))?;
        story.wait(1, "to report from a new agent", ACT, |observed| {
            (observed.agent_starts == before.agent_starts + 1).then_some(())
        })?;
        story.roll_all("hello:2")?;
        story.wait_running(1, "hello", "2")?;
        ensure!(story.hello(1)? == "2");
        ensure!(count(&mut story, &mounts("erofs"))? == 1, "v2 is not mounted as EROFS");
        // The old set is kept with its file system for an undo; it goes, loop device and all, when the node rolls on.
        ensure!(count(&mut story, &mounts("squashfs"))? == 1, "v1 is not kept");
        story.push_mounted(&third_hello(lab.dir())?, "erofs")?;
        story.roll_all("hello:3")?;
        story.wait_running(1, "hello", "3")?;
        wait::until("the first file system to go", ACT, || {
            let left = count(&mut story, &mounts("squashfs"))?;
            let loops = count(&mut story, "ls -d /sys/block/loop*/loop")?;
            Ok((left == 0 && loops <= 1).then_some(()))
        })?;
        ensure!(count(&mut story, "ls /run/layercake/lowers")? == 1);
        ensure!(count(&mut story, "ls /run/layercake/layers")? == 0, "v2 was unpacked");
        Ok(())
    })
}

/// A third version of the hello example, with the images of the second.
fn third_hello(dir: &Path) -> Result<PathBuf> {
    let second = example("hello", "v2");
    let text = fs::read_to_string(&second)?;
    let here = second.parent().context("a directory")?.to_string_lossy().into_owned();
    let text = text
        .replace("version = \"2\"", "version = \"3\"")
        .replace("binary:../", &format!("binary:{here}/../"))
        .replace("dir:rootfs", &format!("dir:{here}/rootfs"));
    let file = dir.join("third.toml");
    fs::write(&file, text)?;
    Ok(file)
}

fn push(lab: &Lab, artifacts: &Artifacts, imageset: &Path) -> Result<()> {
    let file = imageset.to_string_lossy();
    let args = ["imageset", "push", &*file, "--to", &Registry::base()];
    layercake(lab, &artifacts.bin, &args).map(drop)
}
