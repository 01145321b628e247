//! Layer0 changes under its node: by kexec, only its agent and under load, and by a reboot where the kernel refuses the kexec.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use protocol::ids::Digest;
use protocol::node::{Layer0State, ObservedLayer0, Phase};
use tests::artifacts::{Artifacts, example};
use tests::lab::{Lab, case};
use tests::overlay::{broken_agent, imageset_key, with_agent, with_file};
use tests::prerequisites::CASES;
use tests::probe::Probe;
use tests::server_peer::{CONSOLE, ServerSpec, layercake};
use tests::story::{ACT, BOOT, Story};

/// How long the command that changes a Layer0 may wait.
const PATIENCE: &str = "110";

/// Adds a build to the server and gives its digest.
fn add(lab: &Lab, story: &Story<'_>, build: &Artifacts, name: &str) -> Result<Digest> {
    let dir = build.layer0.display().to_string();
    let args = ["layer0", "add", &dir, "--name", name, "--json"];
    let added: serde_json::Value = serde_json::from_str(&story.server.layercake(lab, &args)?)?;
    Ok(added["digest"].as_str().context("no digest")?.parse()?)
}

/// `layercake layer0 start n1`, until it is done.
fn start(lab: &Lab, story: &Story<'_>, layer0: &str, how: &str) -> Result<()> {
    let args = ["layer0", "start", "n1", "--layer0", layer0, "--how", how, "--timeout", PATIENCE];
    story.server.layercake(lab, &args).map(drop)
}

fn layer0(story: &mut Story<'_>) -> Result<ObservedLayer0> {
    story.wait(1, "to say which Layer0 it runs", BOOT, |observed| observed.layer0.clone())
}

/// The phases of the node's latest boot.
fn phases(story: &mut Story<'_>) -> Result<Vec<Phase>> {
    let id = story.machine(1)?.id.clone();
    let node = story.server.client.node(&id)?.context("no node n1")?;
    Ok(node.boot.iter().map(|time| time.phase).collect())
}

#[test]
fn a_node_goes_to_another_layer0_by_kexec_and_its_agent_is_replaced_under_load() -> Result<()> {
    case("layer0-kexec", CASES, |lab| {
        let built = Artifacts::find()?;
        let mut story = Story::begin(lab, &ServerSpec::new(built.clone(), 1))?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        let (before, _) = story.wait_running(1, "hello", "1")?;
        let first = layer0(&mut story)?;
        ensure!(first.state == Layer0State::Current && !first.kexec, "{first:?}");
        let wanted = Digest::of(&std::fs::read(built.layer0.join("manifest.json"))?);
        ensure!(first.digest == Some(wanted), "iPXE's script named another: {first:?}");

        let other = with_file(&built, &lab.dir().join("b"), "motd", b"b")?;
        let b = add(lab, &story, &other, "b")?;
        start(lab, &story, "b", "kexec")?;
        let second = layer0(&mut story)?;
        ensure!(second.digest == Some(b) && second.kexec, "{second:?}");
        let (after, set) = story.wait_running(1, "hello", "1")?;
        ensure!(story.hello(1)? == "1");
        ensure!(after.boot_id != before.boot_id && after.node == before.node);
        let phases = phases(&mut story)?;
        ensure!(phases.first() == Some(&Phase::Kexec), "firmware had a part in it: {phases:?}");
        let pid = set.containers.first().and_then(|it| it.pid);

        replace_the_agent(lab, &mut story, &other, pid)
    })
}

/// On the Layer0 that runs: a good agent and a broken one, with clients that notice neither.
fn replace_the_agent(
    lab: &Lab,
    story: &mut Story<'_>,
    build: &Artifacts,
    pid: Option<u32>,
) -> Result<()> {
    let mut program = std::fs::read(build.layer0.join("layercake-agent"))?;
    let own = Digest::of(&program);
    program.push(0);
    let good = with_agent(build, &lab.dir().join("good"), &program)?;
    add(lab, story, &good, "good")?;
    let broken = with_agent(build, &lab.dir().join("broken"), &broken_agent())?;
    add(lab, story, &broken, "broken")?;

    let address = story.machine(1)?.address;
    let entrance = story.server.client.entrance().clone();
    let probe = Probe::start(entrance.clone(), format!("http://{address}:8080/"))?;
    // Half a request before, the rest after.
    let mut connection = entrance.inside(|| TcpStream::connect((address, 8080)))??;
    connection.set_read_timeout(Some(Duration::from_secs(30)))?;
    connection.write_all(b"GET / HTTP/1.1\r\n")?;
    let args = ["layer0", "start", "n1", "--layer0", "good", "--how", "agent", "--no-wait"];
    story.server.layercake(lab, &args)?;
    let program = Digest::of(&program);
    story.wait(1, "to have another agent", BOOT, |observed| {
        // A line now and then: the service waits no longer for a client that says nothing.
        let alive = (&connection).write_all(b"A: b\r\n").is_ok();
        let new = observed.layer0.as_ref().filter(|layer0| layer0.agent == Some(program));
        new.filter(|_| alive).map(drop)
    })?;
    connection.write_all(b"Host: n1\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    ensure!(answer.contains("200 OK"), "the connection was lost: {answer}");

    let failed = start(lab, story, "broken", "agent").expect_err("it does not stay up");
    ensure!(format!("{failed:#}").contains("did not stay up"), "{failed:#}");
    let back = layer0(story)?;
    ensure!(back.agent == Some(own) && back.state == Layer0State::Failed, "{back:?}");

    let seen = probe.stop()?;
    ensure!(seen.failures == 0 && seen.answers > 0, "{seen:?}");
    let (observed, set) = story.wait_running(1, "hello", "1")?;
    ensure!(set.containers.first().and_then(|it| it.pid) == pid, "{set:?}");
    // Layer0's own, the good one, Layer0's own again; the broken one came to nothing.
    ensure!(observed.agent_starts == 3, "{observed:?}");
    let back = "back to Layer0's own";
    story.machine(1)?.console.wait_for(back, Duration::from_secs(5)).map(drop)?;
    Ok(())
}

#[test]
fn a_kernel_that_refuses_a_kexec_is_left_by_a_reboot_that_says_why() -> Result<()> {
    case("layer0-reboot", CASES, |lab| {
        let built = Artifacts::find()?;
        let mut spec = ServerSpec::new(built.clone(), 1);
        spec.cmdline = format!("{CONSOLE} sysctl.kernel.kexec_load_disabled=1");
        let mut story = Story::begin(lab, &spec)?;
        story.switch_on(1)?;
        layer0(&mut story)?;
        let other = with_file(&built, &lab.dir().join("b"), "motd", b"b")?;
        let b = add(lab, &story, &other, "b")?;
        // By kexec or not at all: the node stays as it is and says why.
        let failed = start(lab, &story, "b", "kexec").expect_err("it is refused");
        ensure!(format!("{failed:#}").contains("kexec_load_disabled"), "{failed:#}");
        start(lab, &story, "b", "auto")?;
        let after = layer0(&mut story)?;
        ensure!(after.digest == Some(b) && !after.kexec, "{after:?}");
        let why = "the node will reboot instead";
        story.machine(1)?.console.wait_for(why, Duration::from_secs(5))?;
        ensure!(phases(&mut story)?.starts_with(&[Phase::Dhcp, Phase::Ipxe, Phase::Kernel]));
        Ok(())
    })
}

#[test]
fn a_node_with_a_key_goes_by_kexec_where_build_and_archive_are_signed_and_keeps_its_key()
-> Result<()> {
    case("layer0-signed", CASES, |lab| {
        let built = Artifacts::find()?;
        let prefix = lab.dir().join("site").display().to_string();
        layercake(lab, &built.bin, &["imageset", "keygen", &prefix])?;
        let (private, public) = (format!("{prefix}.key"), format!("{prefix}.pem"));
        let archive = lab.dir().join("site.cpio");
        std::fs::write(&archive, imageset_key(public.as_ref())?)?;
        let mut spec = ServerSpec::new(built.clone(), 1);
        spec.overlays = vec![archive.clone()];
        let mut story = Story::begin(lab, &spec)?;
        story.switch_on(1)?;
        layer0(&mut story)?;

        let other = with_file(&built, &lab.dir().join("b"), "motd", b"b")?;
        let refuses = |story: &Story<'_>, part: &str| -> Result<()> {
            let failed = start(lab, story, "b", "kexec").expect_err(part);
            ensure!(format!("{failed:#}").contains(part), "`{part}` is not in {failed:#}");
            Ok(())
        };
        let sign = |story: &Story<'_>, what: &std::path::Path| {
            let what = what.display().to_string();
            story.server.layercake(lab, &["layer0", "sign", &what, "--key", &private]).map(drop)
        };
        sign(&story, &other.layer0)?;
        let b = add(lab, &story, &other, "b")?;
        refuses(&story, "no key of this node has signed the archive site.cpio")?;
        sign(&story, &archive)?;
        start(lab, &story, "b", "kexec")?;
        let after = layer0(&mut story)?;
        ensure!(after.digest == Some(b) && after.kexec, "{after:?}");

        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        story.wait(1, "to want hello:1 signed", ACT, |observed| {
            let mut reasons = observed.imagesets.iter().filter_map(|set| set.reason.as_deref());
            reasons.find(|reason| reason.contains("a signature by key site.pem")).map(drop)
        })
    })
}
