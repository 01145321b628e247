//! A node never goes dark: whatever is away or bad, what ran goes on, the reason stands on the console and in `layercake why`,
//! and somebody with a key, or at the console, finds a shell. The consoles here show the status screen, as they do at home.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use protocol::node::SetState;
use tests::artifacts::{Artifacts, example};
use tests::lab::{Lab, case};
use tests::overlay::with_archive;
use tests::prerequisites::CASES;
use tests::qemu::{Boot, MachineSpec};
use tests::registry_peer::Registry;
use tests::server_peer::{Server, ServerSpec};
use tests::ssh::Ssh;
use tests::story::{ACT, BOOT, Story};
use tests::wait;

/// The consoles of these cases: the status screen, which is the default.
const SCREEN: &str = "console=ttyS0,115200n8 quiet";
/// Names the process id of the agent in `$p`; empty while there is none.
const AGENT: &str = "p=; for d in /proc/[0-9]*; do set -- $(tr '\\000' ' ' < $d/cmdline 2>/dev/null); \
                     [ \"$2\" = agent ] && p=${d#/proc/}; done";

/// A server whose nodes have a rescue shell and ssh out of the site's archive, which iPXE fetches beside the initramfs.
fn with_site() -> Result<(ServerSpec, [PathBuf; 2])> {
    let (overlay, keys) = Artifacts::site()?;
    let mut spec = ServerSpec::new(Artifacts::find()?, 1);
    spec.cmdline = SCREEN.to_owned();
    spec.overlays = vec![overlay];
    Ok((spec, keys))
}

fn ensure_says(said: &str, texts: &[&str]) -> Result<()> {
    for text in texts {
        ensure!(said.contains(text), "`{text}` is not in\n{said}");
    }
    Ok(())
}

/// Asks the server why node 1 is as it is, until the answer has all of these texts.
fn why(lab: &Lab, story: &Story<'_>, texts: &[&str]) -> Result<String> {
    let mut last = String::new();
    let found = wait::until(&format!("`layercake why n1` to say {texts:?}"), ACT, || {
        last = story.server.layercake(lab, &["why", "n1"])?;
        Ok(texts.iter().all(|text| last.contains(text)).then_some(()))
    });
    found.with_context(|| format!("it says\n{last}"))?;
    Ok(last)
}

#[test]
fn a_node_in_trouble_keeps_its_last_good_set_and_says_what_it_waits_for() -> Result<()> {
    case("last-good", CASES, |lab| {
        let registry = Registry::start(lab)?;
        let (mut spec, keys) = with_site()?;
        spec.registry = Some(Registry::base());
        let mut story = Story::begin(lab, &spec)?;
        for version in ["v1", "v2"] {
            story.push_to(&example("hello", version), &Registry::base())?;
        }
        story.roll_all("hello:1")?;
        story.switch_on(1)?;
        story.wait_running(1, "hello", "1")?;
        let machine = story.machine(1)?;
        machine.console.wait_for("node       n1", ACT)?;
        machine.console.wait_for("hello      1 runs", ACT)?;
        let ssh = Ssh::new(lab, &keys[0], machine.address);
        why(lab, &story, &["n1 is as wanted: it runs hello:1"])?;

        // The registry is away when the node wants to fetch: its agent sleeps meanwhile.
        ssh.run(&format!("{AGENT}; kill -STOP $p"))?;
        story.roll_all("hello:2")?;
        registry.stop()?;
        ssh.run(&format!("{AGENT}; kill -CONT $p"))?;
        why(lab, &story, &["hello:2 does not run, hello:1 does", "10.9.0.1:5000", "tries again"])?;
        story.machine(1)?.console.wait_for("10.9.0.1:5000", ACT)?;
        ensure_says(&ssh.run("layercake-agent why")?, &["waits for", "10.9.0.1:5000"])?;
        ensure!(story.hello(1)? == "1", "the last good set does not run any more");
        let registry = Registry::start(lab)?;
        story.wait_running(1, "hello", "2")?;

        // A set whose blob is not what was pushed.
        story.push_to(&third_hello(lab.dir())?, &Registry::base())?;
        let spoilt = registry.spoil_largest_blob()?;
        story.roll_all("hello:3")?;
        why(lab, &story, &["hello:2 goes on running", &spoilt[..12], "push it again"])?;
        story.machine(1)?.console.wait_for(&spoilt[..12], ACT)?;
        ensure!(story.hello(1)? == "2", "the last good set does not run any more");

        // The server is away, and comes back.
        story.server.kill()?;
        story.machine(1)?.console.wait_for("waits for  boot server: ", ACT)?;
        ensure_says(
            &ssh.run("layercake-agent why")?,
            &["server     http://10.9.0.1:8080: ", "refused"],
        )?;
        story.server = Server::start(lab, &spec)?;
        story.machine(1)?.console.wait_for("http://10.9.0.1:8080 answers", ACT)?;
        story.roll_all("hello:2")?;
        story.wait(1, "to be content again", ACT, |observed| {
            let set = observed.imagesets.first()?;
            (set.state == SetState::Current && observed.waiting.is_none()).then_some(())
        })?;
        why(lab, &story, &["n1 is as wanted: it runs hello:2"])?;
        Ok(())
    })
}

#[test]
fn a_key_opens_ssh_another_does_not_and_a_failing_agent_leaves_a_shell_where_it_is_allowed()
-> Result<()> {
    case("rescue", CASES, |lab| {
        let (mut spec, keys) = with_site()?;
        spec.nodes = 2;
        let mut story = Story::begin(lab, &spec)?;
        story.switch_on(1)?;
        // The same without a rescue shell, handed over directly.
        let built = with_archive(&spec.artifacts, &lab.dir().join("layer0"), &spec.overlays[0])?;
        let mut never = MachineSpec::netboot(2);
        let (kernel, initramfs) = (built.kernel(), built.initramfs());
        let append = format!(
            "{SCREEN} layercake.rescue=never layercake.node=n2 layercake.server=http://10.9.0.1:8080"
        );
        never.boot = Boot::Direct { kernel, initramfs, append };
        story.switch_on_with(&never)?;
        for number in [1, 2] {
            story.wait(number, "to report", BOOT, |_| Some(()))?;
        }
        let machines = [story.machine(1)?.address, story.machine(2)?.address];
        let [first, second] = machines.map(|address| Ssh::new(lab, &keys[0], address));
        let host_key = wait::until("ssh to let in who has the key", ACT, || {
            Ok(first.run("dropbearkey -y -f /run/ssh/host_key").ok())
        })?;
        ensure_says(&host_key, &["ssh-ed25519"])?;
        let refused = Ssh::new(lab, &keys[1], machines[0]).run("true").expect_err("another key");
        ensure!(format!("{refused:#}").contains("Permission denied"), "{refused:#}");
        wait::until("the node to say that it waits for nothing", ACT, || {
            let said = first.run("layercake-agent why")?;
            Ok(ensure_says(&said, &["node       n1", "waits for  nothing"]).ok())
        })?;

        // Both agents die as often as they are started, until PID 1 has seen enough.
        let kill = format!(
            "n=0; last=; while [ $n -lt 10 ]; do {AGENT}; if [ -n \"$p\" ] && [ \"$p\" != \"$last\" ]; \
             then kill -9 $p; last=$p; n=$((n+1)); fi; usleep 20000; done"
        );
        let killed = std::thread::scope(|scope| {
            let other = scope.spawn(|| second.run(&kill));
            (first.run(&kill), other.join())
        });
        killed.0?;
        killed.1.map_err(|_| anyhow::anyhow!("the second killer panicked"))??;
        let machine = story.machine(1)?;
        machine.console.wait_for("This is the rescue shell.", ACT)?;
        ensure_says(&machine.shell("layercake-agent why")?, &["The last things that went wrong"])?;
        ensure!(machine.shell("echo $((6 * 7))")?.contains("42"));
        let shells = "ps | grep -c '[/]etc/layercake/rescue\\|[-]l$'; true";
        ensure!(second.run(shells)?.trim() == "0", "a shell where there should be none");
        why(lab, &story, &["its agent was started", "logs n1 --agent"])?;
        Ok(())
    })
}

/// A third version of the hello example, with a file in it that no other version has.
fn third_hello(dir: &Path) -> Result<PathBuf> {
    let second = example("hello", "v2");
    let text = fs::read_to_string(&second)?;
    let here = second.parent().context("a directory")?.to_string_lossy().into_owned();
    let more = dir.join("more");
    fs::create_dir_all(&more)?;
    // Not to be compressed, so that it is the largest blob: each byte is a step of a generator (Knuth's MMIX).
    let mut state = 1_u64;
    let noise = std::iter::repeat_with(|| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    });
    fs::write(more.join("noise"), noise.take(4 << 20).collect::<Vec<u8>>())?;
    let text = text
        .replace("version = \"2\"", "version = \"3\"")
        .replace("binary:../", &format!("binary:{here}/../"))
        .replace("\"dir:rootfs\"", &format!("\"dir:{here}/rootfs\", \"dir:{}\"", more.display()));
    ensure!(text.contains("more"), "the example has changed: {text}");
    let file = dir.join("third.toml");
    fs::write(&file, text)?;
    Ok(file)
}
