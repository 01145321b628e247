//! Images between us and others: what buildah, umoci and mmdebstrap make runs on a node; what we push is run by podman
//! and unpacked by umoci. Also the one example that no other case builds.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::artifacts::Artifacts;
use tests::examples;
use tests::lab::{Lab, case};
use tests::prerequisites::{self, CASES};
use tests::registry_peer::Registry;
use tests::server_peer::{ServerSpec, layercake};
use tests::story::{ACT, Story};
use tests::wait;

/// The tools whose images one node runs beside each other, each with the port that its image serves on.
const MAKERS: [(&str, u16); 3] = [("buildah", 8081), ("umoci", 8082), ("mmdebstrap", 8083)];
/// Podman for machines whose limits may not be raised: they are named, and below what is allowed anywhere.
const ULIMITS: [&str; 4] = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"];

/// Runs a shell script in the lab, with `$DIR` and `$BUSYBOX` set.
fn script(lab: &Lab, text: &str) -> Result<String> {
    let busybox = prerequisites::find_program("busybox").context("busybox is missing")?;
    let head = format!("set -e\nDIR={:?}\nBUSYBOX={busybox:?}\ncd $DIR\n", lab.dir());
    lab.namespace().run("sh", &["-c", &(head + text)])
}

/// What all three images are told to run.
fn serve(port: u16) -> String {
    format!("/bin/busybox httpd -f -p {port} -h /srv")
}

fn make_with_buildah(lab: &Lab, port: u16) -> Result<()> {
    let to = format!("{}/made-by-buildah:1", Registry::base().trim_start_matches("http://"));
    let words = serve(port);
    script(
        lab,
        &format!(
            "echo 'made by buildah' > index.html\n\
             b() {{ buildah --root $DIR/buildah --runroot $DIR/buildah.run --storage-driver vfs \"$@\"; }}\n\
             c=$(b from scratch)\n\
             b copy $c $BUSYBOX /bin/busybox\n\
             b copy $c index.html /srv/index.html\n\
             b config --entrypoint '[\"/bin/busybox\"]' --cmd '{}' $c\n\
             i=$(b commit --quiet $c)\n\
             b push --quiet --tls-verify=false $i docker://{to}\n\
             b rm $c; b rmi $i",
            words.trim_start_matches("/bin/busybox ")
        ),
    )
    .map(drop)
}

fn make_with_umoci(lab: &Lab, port: u16) -> Result<()> {
    let words: Vec<String> =
        serve(port).split(' ').map(|word| format!("--config.cmd {word}")).collect();
    script(
        lab,
        &format!(
            "umoci init --layout umoci\n\
             umoci new --image umoci:1\n\
             umoci unpack --image umoci:1 bundle\n\
             mkdir bundle/rootfs/bin bundle/rootfs/srv\n\
             cp $BUSYBOX bundle/rootfs/bin/busybox\n\
             echo 'made by umoci' > bundle/rootfs/srv/index.html\n\
             umoci repack --image umoci:1 bundle\n\
             umoci config --image umoci:1 {}",
            words.join(" ")
        ),
    )
    .map(drop)
}

/// One package, unpacked: the smallest of mmdebstrap's variants. Outside the lab, because Debian's mirror is there.
fn make_with_mmdebstrap(lab: &Lab) -> Result<()> {
    fs::write(lab.dir().join("index.html"), "made by mmdebstrap\n").context("index.html")?;
    let mut make = Command::new("mmdebstrap");
    make.args(["--quiet", "--variant=extract", "--include=busybox-static"]);
    make.arg("--extract-hook=mkdir -p \"$1/srv\" && cp index.html \"$1/srv\"");
    let output = make.args(["bookworm", "mmdebstrap.tar"]).current_dir(lab.dir()).output();
    let output = output.context("cannot run mmdebstrap")?;
    ensure!(output.status.success(), "mmdebstrap: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The three as images of one set.
fn describe(lab: &Lab) -> Result<std::path::PathBuf> {
    let file = lab.dir().join("imageset.toml");
    let mut text = String::from("name = \"foreign\"\nversion = \"1\"\n");
    for (maker, port) in MAKERS {
        let source = match maker {
            "buildah" => format!("registry:{}/made-by-buildah:1", Registry::base()),
            "umoci" => "oci:umoci:1".to_owned(),
            _ => "tar:mmdebstrap.tar".to_owned(),
        };
        text += &format!("\n[[image]]\nname = \"{maker}\"\nsource = \"{source}\"\n");
        if maker == "mmdebstrap" {
            let words: Vec<String> = serve(port).split(' ').map(str::to_owned).collect();
            text += &format!("cmd = {words:?}\n");
        }
        text += &format!("\n[[container]]\nname = \"{maker}\"\nimage = \"{maker}\"\n");
    }
    fs::write(&file, text).with_context(|| file.display().to_string())?;
    Ok(file)
}

#[test]
fn images_of_buildah_umoci_and_mmdebstrap_run_beside_each_other_on_a_node() -> Result<()> {
    case("foreign-images", CASES, |lab| {
        let artifacts = Artifacts::find()?;
        make_with_mmdebstrap(lab)?;
        let _registry = Registry::start(lab)?;
        make_with_buildah(lab, MAKERS[0].1)?;
        make_with_umoci(lab, MAKERS[1].1)?;
        let mut story = Story::begin(lab, &ServerSpec::new(artifacts, 1))?;
        story.push(&describe(lab)?)?;
        story.roll_all("foreign:1")?;
        story.switch_on(1)?;
        story.wait_running(1, "foreign", "1")?;
        let client = lab.client();
        for (maker, port) in MAKERS {
            let machine = story.machine(1)?;
            let url = format!("http://{}:{port}/", machine.address);
            let said = wait::until(&format!("{url} to answer"), ACT, || {
                machine.check_alive()?;
                Ok(client.get_text(&url, Duration::from_secs(5)).ok())
            });
            let said = said.with_context(|| machine.console.situation())?;
            ensure!(said == format!("made by {maker}\n"), "{maker}: {said}");
        }
        Ok(())
    })
}

#[test]
fn a_debian_system_is_made_without_root_and_run_by_podman_and_unpacked_by_umoci() -> Result<()> {
    case("debian-image", CASES, |lab| {
        let artifacts = Artifacts::find()?;
        let layout = examples::debian_systemd(&artifacts.bin)?;
        unpacked_by_umoci(lab, &layout)?;
        let _registry = Registry::start(lab)?;
        let from = layout.display().to_string();
        let to = format!("{}/debian-systemd", Registry::base());
        layercake(lab, &artifacts.bin, &["imageset", "copy", &from, &to])?;
        let said = podman_run(lab, "debian-systemd:1-system", "dpkg-query -W systemd-sysv dbus")?;
        let packages: Vec<&str> = said.lines().filter_map(|line| line.split('\t').next()).collect();
        ensure!(packages == ["dbus", "systemd-sysv"], "{said}");
        Ok(())
    })
}

/// What umoci makes of the set's image.
fn unpacked_by_umoci(lab: &Lab, layout: &Path) -> Result<()> {
    let image = format!("{}:1-system", layout.display());
    script(lab, &format!("umoci unpack --image {image} system"))?;
    let rootfs = lab.dir().join("system/rootfs");
    let su = fs::metadata(rootfs.join("usr/bin/su")).context("su")?;
    ensure!(su.permissions().mode() & 0o7777 == 0o4755, "setuid is lost: {su:?}");
    ensure!(rootfs.join("usr/lib/systemd/systemd").exists());
    let unit = "etc/systemd/system/multi-user.target.wants/layercake-example.service";
    ensure!(rootfs.join(unit).exists(), "the upper layer is not there");
    for of_the_builder in ["etc/hostname", "etc/resolv.conf"] {
        ensure!(
            !rootfs.join(of_the_builder).exists(),
            "{of_the_builder} is the building machine's"
        );
    }
    Ok(())
}

/// What a command says in a container that podman makes of an image in the lab's registry. The lab's own /sys has no
/// control groups in it: the machine's is below.
fn podman_run(lab: &Lab, image: &str, command: &str) -> Result<String> {
    let address = Registry::base().trim_start_matches("http://").to_owned();
    let podman = "podman --root podman --runroot podman.run --storage-driver vfs \
                  --cgroup-manager cgroupfs --runtime runc --events-backend none";
    let run = format!(
        "{podman} run --rm --quiet --tls-verify=false --network none {} {address}/{image} {command}",
        ULIMITS.join(" ")
    );
    let clean = format!("{podman} rmi --all --force > /dev/null");
    script(
        lab,
        &format!("unshare --mount sh -e <<'END'\numount /sys || true\n{run}\n{clean}\nEND\n"),
    )
}
