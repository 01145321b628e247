//! Names as the agent resolves them, by the C library's resolver (`resolver(3)`), with the files that we write for it; against
//! dnsmasq. The same resolver is in the static binary.

use std::net::ToSocketAddrs as _;
use std::time::Instant;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// So many addresses do not go into one UDP answer.
const MANY: u8 = 120;

/// Starts the far end's name server.
fn name_server(cable: &Cable) -> Running {
    let hosts = cable.dir.path().join("names");
    let many = (1..=MANY).map(|n| format!("10.44.0.{n} many.lab\n")).collect::<String>();
    std::fs::write(
        &hosts,
        format!("10.9.0.7 both.lab\nfd00:9::7 both.lab\n10.9.0.8 four.lab\n{many}"),
    )
    .expect("names");
    let mut command = cable.far_command(
        "dnsmasq -k -C /dev/null -i srv -u root -R -h --local=/lab/ --local=/nowhere/ --log-facility=- --pid-file= --bind-interfaces",
    );
    command.arg(format!("--addn-hosts={}", hosts.display()));
    let mut child = command.stderr(Stdio::piped()).spawn().expect("nsenter");
    let mut lines = BufReader::new(child.stderr.take().expect("pipe")).lines();
    let started = lines.by_ref().any(|line| line.expect("utf-8").contains("read "));
    assert!(started, "is dnsmasq there? apt-get install dnsmasq-base");
    std::thread::spawn(move || lines.count());
    Running(child)
}

/// Puts our files in the place of the machine's, for this thread alone.
fn use_files(cable: &Cable) {
    unshare(CloneFlags::CLONE_NEWNS).expect("root is needed");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    std::fs::write(cable.dir.path().join("nsswitch"), "hosts: files dns\n").expect("file");
    for (ours, theirs) in [
        (cable.dir.path().join("etc/resolv.conf"), "/etc/resolv.conf"),
        (cable.dir.path().join("etc/hosts"), "/etc/hosts"),
        (cable.dir.path().join("nsswitch"), "/etc/nsswitch.conf"),
    ] {
        if std::path::Path::new(theirs).exists() {
            mount(Some(&ours), theirs, none, MsFlags::MS_BIND, none).expect(theirs);
        }
    }
}

fn addresses(name: &str) -> Vec<String> {
    let found = (name, 80).to_socket_addrs().unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut all: Vec<String> = found.map(|address| address.ip().to_string()).collect();
    all.sort();
    all
}

#[test]
fn names_are_found_through_domains_dead_servers_and_answers_too_long_for_a_datagram() {
    let cable = Cable::new();
    cable.far("link set srv up");
    cable.far("addr add 10.9.0.3/24 dev srv");
    let _server = name_server(&cable);
    // 10.9.0.2 is nobody: what is sent to it is lost.
    let events = cable
        .start("ip=10.9.0.77:::255.255.255.0:n7:cli:off nameserver=10.9.0.2 nameserver=10.9.0.1");
    assert_eq!(configured(&events), "10.9.0.77");
    let resolv = cable.dir.path().join("etc/resolv.conf");
    let text = std::fs::read_to_string(&resolv).expect("resolv.conf");
    std::fs::write(&resolv, format!("search nowhere lab\n{text}")).expect("resolv.conf");
    use_files(&cable);

    assert_eq!(addresses("n7"), ["10.9.0.77"], "of /etc/hosts");
    let began = Instant::now();
    assert_eq!(addresses("four.lab"), ["10.9.0.8"]);
    assert!(began.elapsed() < Duration::from_secs(4), "a dead server costs {:?}", began.elapsed());
    assert_eq!(addresses("four"), ["10.9.0.8"], "the second search domain has it");
    assert_eq!(addresses("both.lab"), ["10.9.0.7", "fd00:9::7"]);
    assert_eq!(addresses("many.lab").len(), usize::from(MANY), "by TCP");
    assert!(("none.lab", 80).to_socket_addrs().is_err());
}
