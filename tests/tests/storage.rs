//! The ImageAPI of a node in Layer0 with storage that comes over the network: NFS of nfs-ganesha, a partition of a disk image on
//! it, and iSCSI of tgt. Asked by curl with mutual TLS; once at the rescue shell, by `/init api`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::artifacts::Artifacts;
use tests::lab::{ADDRESS, Lab, case};
use tests::overlay::with_imageapi;
use tests::prerequisites::{CASES, STORAGE_CASES, find_program};
use tests::process::Process;
use tests::qemu::address;
use tests::server_peer::{CONSOLE, ServerSpec};
use tests::story::{ACT, BOOT, Story};
use tests::wait;

/// Where the node's ImageAPI listens.
const API_PORT: u16 = 7443;
/// Where the partition begins in the disk image, in sectors of 512 bytes.
const PARTITION_START: u32 = 2048;
/// The iSCSI target's name.
const TARGET: &str = "iqn.2026-11.lab:disk";
/// Size of the file system, in bytes.
const FILE_SYSTEM: u64 = 8 << 20;

/// How long switching off may take: the sum of its limits is 45 s (agent::init::shutdown), of the node's clock.
const OFF: Duration = Duration::from_secs(120);

/// An NFS server with one export, `/export`.
fn ganesha(lab: &Lab, export: &Path) -> Result<Process> {
    let recovery = lab.dir().join("ganesha");
    fs::create_dir_all(&recovery)?;
    let config = lab.dir().join("ganesha.conf");
    let text = format!(
        "NFS_CORE_PARAM {{ Protocols = 4; Enable_NLM = false; Enable_RQUOTA = false; }}\n\
         NFSv4 {{ Minor_Versions = 1, 2; Graceless = true; Only_Numeric_Owners = true; \
         UseGetpwnam = true; RecoveryRoot = {recovery}; }}\n\
         EXPORT {{ Export_Id = 1; Path = {export}; Pseudo = /export; Access_Type = RW; \
         Squash = No_Root_Squash; SecType = sys; Protocols = 4; Transports = TCP; \
         FSAL {{ Name = VFS; }} }}\n",
        recovery = recovery.display(),
        export = export.display(),
    );
    fs::write(&config, text)?;
    let program = find_program("ganesha.nfsd").context("nfs-ganesha is missing")?;
    let log = lab.dir().join("ganesha.log").display().to_string();
    let pid = lab.dir().join("ganesha.pid").display().to_string();
    let config = config.display().to_string();
    let args = ["-F", "-f", &config, "-L", &log, "-p", &pid, "-N", "NIV_EVENT"];
    let mut server =
        Process::start(lab.namespace(), &program, args, &lab.dir().join("ganesha.out"))?;
    listening(lab, &mut server, 2049)?;
    Ok(server)
}

/// An iSCSI target with this file as LUN 1.
fn tgt(lab: &Lab, disk: &Path) -> Result<Process> {
    let ipc = format!("TGT_IPC_SOCKET={}", lab.dir().join("tgt").display());
    let program = find_program("tgtd").context("tgt is missing")?.display().to_string();
    let portal = format!("portal={ADDRESS}:3260");
    let args = [&*ipc, &program, "-f", "--iscsi", &portal];
    let env = find_program("env").context("env is missing")?;
    let mut server = Process::start(lab.namespace(), &env, args, &lab.dir().join("tgtd.log"))?;
    listening(lab, &mut server, 3260)?;
    let disk = disk.display().to_string();
    for order in [
        &["--op", "new", "--mode", "target", "--tid", "1", "-T", TARGET][..],
        &["--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", &disk],
        &["--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"],
    ] {
        let order = [&[&*ipc, "tgtadm", "--lld", "iscsi"], order].concat();
        lab.namespace().run("env", &order)?;
    }
    Ok(server)
}

fn listening(lab: &Lab, server: &mut Process, port: u16) -> Result<()> {
    let entrance = lab.entrance();
    wait::until(&format!("port {port} to listen"), Duration::from_secs(30), || {
        server.check_alive()?;
        let connected =
            entrance.inside(|| std::net::TcpStream::connect((ADDRESS, port)).is_ok())?;
        Ok(connected.then_some(()))
    })
}

/// What the node mounts: a root with busybox, and a disk image with one partition of ext4 that holds the same.
fn make_export(export: &Path) -> Result<()> {
    let bin = export.join("bin");
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(export.join("etc"))?;
    fs::write(export.join("etc/release"), "exported\n")?;
    let busybox = find_program("busybox").context("busybox is missing")?;
    fs::copy(busybox, bin.join("busybox"))?;
    for name in ["sh", "cat", "sleep"] {
        std::os::unix::fs::symlink("busybox", bin.join(name))?;
    }
    let system = export.with_extension("ext4");
    File::create(&system)?.set_len(FILE_SYSTEM)?;
    let made = Command::new(find_program("mkfs.ext4").context("e2fsprogs is missing")?)
        .args(["-q", "-d"])
        .args([export, system.as_path()])
        .status()?;
    ensure!(made.success(), "mkfs.ext4 failed");
    let disk = File::create(export.join("disk.img"))?;
    let sectors = u32::try_from(FILE_SYSTEM / 512)?;
    disk.write_all_at(&fs::read(&system)?, u64::from(PARTITION_START) * 512)?;
    // A partition table of one entry (type 0x83, LBA addresses).
    let mut entry = vec![0, 0, 2, 0, 0x83, 0xff, 0xff, 0xff];
    entry.extend(PARTITION_START.to_le_bytes());
    entry.extend(sectors.to_le_bytes());
    disk.write_all_at(&entry, 446)?;
    disk.write_all_at(&[0x55, 0xaa], 510)?;
    Ok(())
}

/// A client of the node's ImageAPI, by curl and mutual TLS.
struct Api<'l> {
    lab: &'l Lab,
    tls: PathBuf,
    story: Story<'l>,
}

impl Api<'_> {
    /// One request; its answer.
    fn ask(&self, method: &str, target: &str, body: &Value) -> Result<Value> {
        let url = format!("https://{}:{API_PORT}/imageapi/v1{target}", address(1));
        let file = |name: &str| self.tls.join(name).display().to_string();
        let (ca, cert, key) = (file("ca.crt"), file("client.crt"), file("client.key"));
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let mut args = vec!["-s", "-S", "--max-time", "60", "-X", method, "--cacert", &ca];
        args.extend(["--cert", &cert, "--key", &key, &url]);
        if !text.is_empty() {
            args.extend(["-d", &text]);
        }
        let said = self.lab.namespace().run("curl", &args)?;
        serde_json::from_str(&said).with_context(|| format!("{method} {target} {text}: `{said}`"))
    }

    fn shell(&mut self, command: &str) -> Result<String> {
        self.story.machine(1)?.shell(command)
    }
}

/// Certificates of the node and of its client, both of one authority.
fn make_certificates(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let openssl = find_program("openssl").context("openssl is missing")?;
    let name = |name: &str, ext: &str| dir.join(format!("{name}.{ext}"));
    for who in ["ca", "node", "client"] {
        let mut command = Command::new(&openssl);
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
        command.args(["-nodes", "-days", "3650", "-subj", &format!("/CN={who}")]);
        command.arg("-keyout").arg(name(who, "key")).arg("-out").arg(name(who, "crt"));
        if who != "ca" {
            command.arg("-CA").arg(name("ca", "crt")).arg("-CAkey").arg(name("ca", "key"));
            command.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
            command.args(["-addext", &format!("subjectAltName=IP:{}", address(1))]);
        }
        let output = command.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    for (from, to) in [("node.crt", "cert.pem"), ("node.key", "key.pem"), ("ca.crt", "clients.pem")]
    {
        fs::copy(dir.join(from), dir.join(to))?;
    }
    Ok(())
}

fn lun(target: &str, lun: u32) -> Value {
    let (host, initiator) = (ADDRESS.to_string(), "iqn.2026-11.lab:node1");
    json!({"kind": "iscsi", "iscsi": {"host": host, "initiator": initiator, "target": target, "lun": lun}})
}

fn id(answer: &Value) -> Result<i64> {
    answer["id"].as_i64().with_context(|| format!("no id in {answer}"))
}

#[test]
fn a_node_mounts_nfs_a_partition_of_a_disk_image_on_it_and_a_disk_of_an_iscsi_target() -> Result<()>
{
    let needs = [CASES, STORAGE_CASES].concat();
    case("storage", &needs, |lab| {
        let artifacts = Artifacts::find()?.with_storage()?;
        let tls = lab.dir().join("tls");
        make_certificates(&tls)?;
        let listen = format!("0.0.0.0:{API_PORT}");
        let artifacts = with_imageapi(&artifacts, &lab.dir().join("layer0"), &listen, &tls)?;
        let mut spec = ServerSpec::new(artifacts, 1);
        spec.cmdline = format!("{CONSOLE} layercake.rescue=always");
        let export = lab.dir().join("export");
        make_export(&export)?;
        let nfs = ganesha(lab, &export)?;
        let mut target = tgt(lab, &export.with_extension("ext4"))?;
        let mut story = Story::begin(lab, &spec)?;
        story.switch_on(1)?;
        story.wait(1, "to report", BOOT, |_| Some(()))?;
        let mut api = Api { lab, tls, story };

        nfs_and_a_partition(&mut api)?;
        iscsi(&mut api)?;
        rbd(&api)?;
        let left = api.shell("grep -c imageapi /proc/mounts; ls /sys/block")?;
        ensure!(left.lines().any(|line| line.trim() == "0"), "{left}");
        ensure!(!left.contains("sda"), "{left}");
        a_node_goes_off_though_its_storage_hangs(&mut api, &[&nfs, &target])?;
        // It ends by SIGKILL alone while it has targets.
        target.kill()
    })
}

/// A container on NFS, and a file system on a partition of a disk image that lies there.
fn nfs_and_a_partition(api: &mut Api<'_>) -> Result<()> {
    let export = |version: &str| {
        let host = ADDRESS.to_string();
        json!({"kind": "nfs", "nfs": {"host": host, "path": "/export", "ro": true, "version": version}})
    };
    let newest = api.ask("POST", "/mount", &export(""))?;
    let point = newest["mountpoint"].as_str().with_context(|| format!("{newest}"))?;
    let said = api.shell(&format!("ls {point}/etc; grep vers= /proc/mounts"))?;
    ensure!(said.contains("release") && said.contains("vers=4.2"), "{said}");
    api.ask("DELETE", &format!("/mount?id={}", id(&newest)?), &Value::Null)?;
    // What nfs-ganesha 4.3 answers to READ_PLUS of NFS 4.2, Linux 6.12 reads as zeros or as an I/O error.
    let nfs = id(&api.ask("POST", "/mount", &export("4.1"))?)?;
    let container = json!({"name": "web", "state": "running", "command": "cat /etc/release",
        "mount": {"kind": "overlay", "overlay": {"lower": [{"id": nfs}]}}});
    let made = api.ask("POST", "/container", &container)?;
    let log = made["logfile"].as_str().with_context(|| format!("{made}"))?.to_owned();
    wait::until("the container on NFS to end", ACT, || {
        let found = api.ask("GET", "/container?name=web", &Value::Null)?;
        Ok((found[0]["state"] == "exited").then_some(()))
    })?;
    let said = api.shell(&format!("cat {log}"))?;
    ensure!(said.contains("exported"), "{said}");

    let partition = json!({"kind": "attach", "attach": {"fs_type": "ext4", "mount_options": ["ro"],
        "attach": {"kind": "loopback", "loopback": {"base": "mount", "path": "disk.img", "partition": 1,
            "mount": {"id": nfs}}}}});
    let mount = api.ask("POST", "/mount", &partition)?;
    let device = &mount["attach"]["attach"]["device_file"];
    ensure!(device.as_str().is_some_and(|it| it.ends_with("p1")), "{mount}");
    let point = mount["mountpoint"].as_str().with_context(|| format!("{mount}"))?;
    let said = api.shell(&format!("cat {point}/etc/release"))?;
    ensure!(said.contains("exported"), "{said}");

    let refused = api.ask("DELETE", &format!("/mount?id={nfs}"), &Value::Null)?;
    ensure!(refused["code"] == 409, "{refused}");
    for target in [
        "/container?name=web".to_owned(),
        format!("/mount?id={}", id(&mount)?),
        format!("/mount?id={nfs}"),
    ] {
        let gone = api.ask("DELETE", &target, &Value::Null)?;
        ensure!(gone.get("code").is_none(), "{target}: {gone}");
    }
    let missing =
        json!({"kind": "nfs", "nfs": {"host": ADDRESS.to_string(), "path": "/elsewhere"}});
    let refused = api.ask("POST", "/mount", &missing)?;
    ensure!(refused["code"] == 500, "{refused}");
    Ok(())
}

/// A file system on a LUN, which the agent's death does not disturb, and what is said when there is none.
fn iscsi(api: &mut Api<'_>) -> Result<()> {
    let mount = json!({"kind": "attach", "attach": {"fs_type": "ext4", "attach": lun(TARGET, 1)}});
    let mount = api.ask("POST", "/mount", &mount)?;
    let point = mount["mountpoint"].as_str().with_context(|| format!("{mount}"))?;
    let device = mount["attach"]["attach"]["device_file"].as_str().unwrap_or_default();
    ensure!(device.starts_with("/dev/sd"), "{mount}");
    let read = format!("cat {point}/etc/release; echo written > {point}/new; cat {point}/new");
    let said = api.shell(&read)?;
    ensure!(said.contains("exported") && said.contains("written"), "{said}");
    // Another agent finds it again and ends it.
    api.shell(
        "for d in /proc/[0-9]*; do set -- $(tr '\\000' ' ' < $d/cmdline 2>/dev/null); \
         [ \"$2\" = agent ] && kill -9 ${d#/proc/}; done; true",
    )?;
    let target = format!("/mount?id={}", id(&mount)?);
    wait::until("another agent to answer", ACT, || Ok(api.ask("GET", &target, &Value::Null).ok()))?;
    let gone = api.ask("DELETE", &target, &Value::Null)?;
    ensure!(gone.get("code").is_none(), "{gone}");
    let left = api.shell("/init api GET /attach")?;
    ensure!(left.lines().any(|line| line.trim() == "[]"), "{left}");
    for (definition, expected) in [
        (lun("iqn.2026-11.lab:nothing", 1), "there is no such target"),
        (lun(TARGET, 7), "it has no disk at LUN 7"),
    ] {
        let refused = api.ask("POST", "/attach", &definition)?;
        let message = refused["message"].as_str().unwrap_or_default();
        ensure!(refused["code"] == 500 && message.contains(expected), "{refused}");
    }
    Ok(())
}

/// Servers that are there and answer nothing more, while processes on the node write to them: what the kernel waits for longest.
fn a_node_goes_off_though_its_storage_hangs(api: &mut Api<'_>, servers: &[&Process]) -> Result<()> {
    let nfs = json!({"kind": "nfs", "nfs": {"host": ADDRESS.to_string(), "path": "/export", "version": "4.1"}});
    let lun = lun(TARGET, 1);
    let disk = json!({"kind": "attach", "attach": {"fs_type": "ext4", "attach": lun}});
    for mount in [nfs, disk] {
        let mount = api.ask("POST", "/mount", &mount)?;
        let point = mount["mountpoint"].as_str().with_context(|| format!("{mount}"))?;
        api.shell(&format!("(cd {point}; while :; do date > new; busybox sync; done) & true"))?;
    }
    for server in servers {
        let pid = Pid::from_raw(i32::try_from(server.pid())?);
        nix::sys::signal::kill(pid, Signal::SIGSTOP)?;
    }
    // Both are in the kernel now, and not to be killed.
    let stuck = "cat /proc/[0-9]*/stat | grep -c ' D '";
    wait::until("processes to hang", ACT, || {
        let said = api.shell(&format!("{stuck} || true"))?;
        Ok(said
            .lines()
            .any(|line| line.trim().parse::<u32>().is_ok_and(|it| it >= 2))
            .then_some(()))
    })?;
    api.story.server.layercake(api.lab, &["node", "power", "n1", "off"])?;
    api.story.machine(1)?.wait_off(OFF)?;
    let said = api.story.machine(1)?.console.text();
    ensure!(said.contains("processes hang in the kernel"), "they did not hang");
    Ok(())
}

/// The kernel's client is asked, and where there is no Ceph cluster its error comes back, with nothing secret in it.
fn rbd(api: &Api<'_>) -> Result<()> {
    let secret = "QVFCbm90YXNlY3JldGF0YWxsYnV0bG9uZw==";
    let image = json!({"kind": "rbd", "rbd": {"monitors": [ADDRESS.to_string()], "pool": "cakes", "image": "layer",
        "options": {"name": "admin", "secret": secret, "mount_timeout": 3}}});
    let refused = api.ask("POST", "/attach", &image)?;
    let message = refused["message"].as_str().unwrap_or_default();
    let named = message.contains("rbd cakes/layer") && message.contains(&ADDRESS.to_string());
    ensure!(refused["code"] == 500 && named, "{refused}");
    ensure!(!message.contains("this kernel has no rbd"), "{refused}");
    ensure!(!refused.to_string().contains(secret), "{refused}");
    let there = api.ask("GET", "/attach?kind=rbd", &Value::Null)?;
    ensure!(there == json!([]), "{there}");
    Ok(())
}
