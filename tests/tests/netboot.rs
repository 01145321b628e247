//! Nodes that boot from the network and run what they are told, from our own registry and from Debian's.

use anyhow::{Context, Result, ensure};
use protocol::node::{Phase, RollOutcome, SetState};
use tests::artifacts::{Artifacts, example};
use tests::lab::case;
use tests::prerequisites::CASES;
use tests::registry_peer::Registry;
use tests::server_peer::ServerSpec;
use tests::story::{ACT, BOOT, Story};

#[test]
fn a_node_netboots_and_runs_hello() -> Result<()> {
    case("netboot", CASES, |lab| {
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 1))?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (_, set) = story.wait_running(1, "hello", "1")?;
        ensure!(set.last_roll.is_some_and(|roll| roll.from.is_none() && roll.bytes > 0));
        ensure!(story.hello(1)? == "1");

        // The server saw every phase, in order.
        let id = story.machine(1)?.id.clone();
        let boot = story.server.client.node(&id)?.map(|record| record.boot).unwrap_or_default();
        let phases: Vec<Phase> = boot.iter().map(|time| time.phase).collect();
        ensure!(phases == Phase::NETBOOT, "{phases:?}");
        ensure!(boot.is_sorted_by_key(|time| time.at_ms), "{boot:?}");
        Ok(())
    })
}

#[test]
fn a_roll_changes_the_version_and_keeps_the_node_up() -> Result<()> {
    case("roll", CASES, |lab| {
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 1))?;
        story.push(&example("hello", "v1"))?;
        story.push(&example("hello", "v2"))?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (before, first) = story.wait_running(1, "hello", "1")?;
        story.roll_all("hello:2")?;
        let (after, second) = story.wait_running(1, "hello", "2")?;
        ensure!(story.hello(1)? == "2");
        ensure!(before.boot_id == after.boot_id, "the node was rebooted");
        ensure!(after.agent_starts == 1, "the agent started {} times", after.agent_starts);
        let roll = second.last_roll.context("the roll was not reported")?;
        ensure!(roll.from == Some(first.digest) && roll.to == second.digest, "{roll:?}");
        ensure!(roll.blackout_us.is_some(), "the blackout was not measured");
        ensure!(second.previous.is_some_and(|kept| kept.version.as_str() == "1"));

        // An operator's undo: what is kept is staged, so nothing is fetched.
        story.server.layercake(lab, &["roll", "undo", "hello", "--all", "--timeout", "60"])?;
        let (after, third) = story.wait_running(1, "hello", "1")?;
        ensure!(story.hello(1)? == "1");
        ensure!(before.boot_id == after.boot_id, "the node was rebooted");
        let undo = third.last_roll.context("the undo was not reported")?;
        ensure!((undo.outcome, undo.bytes) == (Some(RollOutcome::Undone), 0), "{undo:?}");
        Ok(())
    })
}

#[test]
fn a_node_that_is_asked_to_reboot_comes_back_with_another_boot_and_the_same_imageset() -> Result<()>
{
    case("reboot", CASES, |lab| {
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 1))?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (before, first) = story.wait_running(1, "hello", "1")?;
        let id = story.machine(1)?.id.to_string();
        story.server.layercake(lab, &["node", "power", &id, "reboot"])?;
        let (after, second) = story.wait(1, "to come back from its reboot", BOOT, |observed| {
            let set = observed.imagesets.first()?;
            let back = observed.boot_id != before.boot_id && set.state == SetState::Current;
            back.then(|| (observed.clone(), set.clone()))
        })?;
        // In order: what ran was stopped before the machine went down.
        story.machine(1)?.console.wait_for("every container has stopped", ACT)?;
        ensure!((after.agent_starts, second.digest) == (1, first.digest), "{after:?}");
        ensure!(story.hello(1)? == "1");
        Ok(())
    })
}

#[test]
fn a_node_runs_and_rolls_hello_from_docker_registry() -> Result<()> {
    case("docker-registry", CASES, |lab| {
        let _registry = Registry::start(lab)?;
        let mut spec = ServerSpec::new(Artifacts::find()?, 1);
        spec.registry = Some(Registry::base());
        let mut story = Story::begin(lab, &spec)?;
        story.push_to(&example("hello", "v1"), &Registry::base())?;
        story.push_to(&example("hello", "v2"), &Registry::base())?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (before, _) = story.wait_running(1, "hello", "1")?;
        story.roll_all("hello:2")?;
        let (after, _) = story.wait_running(1, "hello", "2")?;
        ensure!(story.hello(1)? == "2");
        ensure!(before.boot_id == after.boot_id, "the node was rebooted");
        Ok(())
    })
}

#[test]
fn a_node_whose_registry_is_down_waits_says_so_and_converges() -> Result<()> {
    case("registry-down", CASES, |lab| {
        let registry = Registry::start(lab)?;
        let mut spec = ServerSpec::new(Artifacts::find()?, 1);
        spec.registry = Some(Registry::base());
        let mut story = Story::begin(lab, &spec)?;
        story.push_to(&example("hello", "v1"), &Registry::base())?;
        story.roll_all("hello:1")?;
        registry.stop()?;

        story.switch_on(1)?;
        let said = story.wait(1, "to say that it waits for its registry", BOOT, |observed| {
            let reasons = observed.imagesets.iter().filter_map(|set| set.reason.clone());
            reasons.chain(observed.waiting.clone()).find(|said| said.contains("10.9.0.1:5000"))
        })?;
        // The console says so, too.
        story.machine(1)?.console.wait_for("10.9.0.1:5000", ACT)?;
        ensure!(!story.answers(1)?, "a service runs that could not be fetched; {said}");

        let _registry = Registry::start(lab)?;
        story.wait_running(1, "hello", "1")?;
        ensure!(story.hello(1)? == "1");
        Ok(())
    })
}

#[test]
fn an_image_with_a_corrupted_blob_never_runs_and_the_error_names_the_digest() -> Result<()> {
    case("corrupted-blob", CASES, |lab| {
        let registry = Registry::start(lab)?;
        let mut spec = ServerSpec::new(Artifacts::find()?, 1);
        spec.registry = Some(Registry::base());
        let mut story = Story::begin(lab, &spec)?;
        story.push_to(&example("hello", "v1"), &Registry::base())?;
        story.roll_all("hello:1")?;
        let spoilt = registry.spoil_largest_blob()?;
        story.switch_on(1)?;
        let set = story.wait(1, "to name the spoilt digest", BOOT, |observed| {
            let names = |said: &Option<String>| {
                said.as_ref().is_some_and(|said| said.contains(&spoilt[..12]))
            };
            let set = observed.imagesets.first()?;
            (names(&set.reason) || names(&observed.waiting)).then(|| set.clone())
        })?;
        ensure!(!matches!(set.state, SetState::Current | SetState::Staged), "{set:?}");
        ensure!(set.containers.iter().all(|container| container.pid.is_none()), "{set:?}");
        ensure!(!story.answers(1)?, "the spoilt image runs");
        Ok(())
    })
}
