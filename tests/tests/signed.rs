//! A node with a key in Layer0: what the key signed runs, what it did not sign never does, and the node says which key it
//! asked.

use anyhow::{Context, Result, ensure};
use tests::artifacts::{Artifacts, example};
use tests::lab::case;
use tests::overlay::with_imageset_key;
use tests::prerequisites::CASES;
use tests::server_peer::{ServerSpec, layercake};
use tests::story::{ACT, Story};

#[test]
fn a_signed_set_runs_and_an_unsigned_one_is_refused_by_the_key_s_name_until_it_is_signed()
-> Result<()> {
    case("signed", CASES, |lab| {
        let built = Artifacts::find()?;
        let prefix = lab.dir().join("site").display().to_string();
        let keygen = layercake(lab, &built.bin, &["imageset", "keygen", &prefix, "--json"])?;
        let keygen: serde_json::Value = serde_json::from_str(&keygen)?;
        let fingerprint = keygen["fingerprint"].as_str().context("no fingerprint")?;
        let short: String = fingerprint.chars().take(19).collect();
        let (private, public) = (format!("{prefix}.key"), format!("{prefix}.pem"));
        let artifacts = with_imageset_key(&built, &lab.dir().join("layer0"), public.as_ref())?;

        let mut story = Story::begin(lab, &ServerSpec::new(artifacts, 1))?;
        let sign = |story: &Story<'_>, set: &str| {
            story.server.layercake(lab, &["imageset", "sign", set, "--key", &private]).map(drop)
        };
        story.push(&example("hello", "v1"))?;
        story.push(&example("hello", "v2"))?;
        sign(&story, "hello:1")?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        story.wait_running(1, "hello", "1")?;

        story.roll_all("hello:2")?;
        let reason = story.wait(1, "to refuse hello:2", ACT, |observed| {
            let reasons = observed.imagesets.iter().filter_map(|set| set.reason.clone());
            reasons.into_iter().find(|reason| reason.contains("is not signed"))
        })?;
        let asked = format!("a signature by key site.pem ({short}) is asked for");
        ensure!(reason.contains(&asked), "{reason}");
        ensure!(story.hello(1)? == "1", "the signed version does not run any more");
        let why = story.server.layercake(lab, &["why", "n1"])?;
        for text in [
            "hello:1 goes on running meanwhile",
            &asked,
            "sign it: layercake imageset sign hello:2",
        ] {
            ensure!(why.contains(text), "`{text}` is not in\n{why}");
        }

        // The node asks again by itself.
        sign(&story, "hello:2")?;
        story.wait_running(1, "hello", "2")?;
        ensure!(story.hello(1)? == "2");
        Ok(())
    })
}
