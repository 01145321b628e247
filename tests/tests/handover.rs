//! The zero-downtime-roll example on a node: its clients notice nothing of a roll, nor of a crash.

use anyhow::{Context, Result, ensure};
use protocol::node::RollOutcome;
use tests::artifacts::{Artifacts, example};
use tests::lab::case;
use tests::prerequisites::CASES;
use tests::probe::Probe;
use tests::server_peer::ServerSpec;
use tests::story::{ACT, Story};

/// The ImageSet of the example.
const SET: &str = "zero-downtime";

#[test]
fn a_service_is_handed_over_without_a_failed_request() -> Result<()> {
    case("handover", CASES, |lab| {
        let mut story = Story::begin(lab, &ServerSpec::new(Artifacts::find()?, 1))?;
        for version in ["v1", "v2"] {
            story.push(&example("zero-downtime-roll", version))?;
        }
        story.roll_all(&format!("{SET}:1"))?;
        story.switch_on(1)?;
        story.wait_running(1, SET, "1")?;
        ensure!(story.hello(1)? == "1");
        let url = format!("http://{}:8080/", story.machine(1)?.address);
        let probe = Probe::start(story.server.client.entrance().clone(), url)?;
        story.roll_all(&format!("{SET}:2"))?;
        let report = story.wait(1, "to commit the roll", ACT, |observed| {
            let set = observed.imagesets.iter().find(|set| set.name.as_str() == SET)?;
            let roll = set.last_roll.clone().filter(|_| set.version.as_str() == "2")?;
            (roll.outcome == Some(RollOutcome::Committed)).then_some(roll)
        })?;
        ensure!(story.hello(1)? == "2");
        let seen = probe.stop()?;
        ensure!(seen.failures == 0 && seen.answers > 0, "{seen:?}");
        ensure!(report.blackout_us.context("no blackout in the report")? == 0, "{report:?}");
        Ok(())
    })
}
