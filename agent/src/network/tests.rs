//! The whole network room against DHCP servers that we did not write (dnsmasq, busybox udhcpd), in network namespaces
//! of the test's own: the test's thread moves into one, the servers run in another at the far end of a cable.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::*;

mod names;
mod six;

/// Longer than anything here takes on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);
const ARGS: &str = "BOOTIF=01-52-54-00-00-00-01";

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap_or_else(|_| panic!("{program} is missing: apt-get install iproute2 util-linux"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {error} (root is needed)");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A child that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A cable: `cli` in this thread's new namespace, `srv` with 10.9.0.1/24 in another one.
struct Cable {
    holder: Running,
    dir: tempfile::TempDir,
}

impl Cable {
    fn new() -> Self {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root is needed");
        let mut holder = Command::new("unshare")
            .args(["--net", "--", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare is missing: apt-get install util-linux");
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("pipe");
        BufReader::new(stdout).read_line(&mut line).expect("ready");
        let cable = Self { holder: Running(holder), dir: tempfile::tempdir().expect("dir") };
        let pid = cable.holder.0.id();
        run(
            "ip",
            &format!("link add cli address 52:54:00:00:00:01 type veth peer srv netns {pid}"),
        );
        cable.far("addr add 10.9.0.1/24 dev srv");
        cable
    }

    fn far(&self, arguments: &str) {
        run("nsenter", &format!("-t {} -n ip {arguments}", self.holder.0.id()));
    }

    fn far_command(&self, arguments: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.holder.0.id().to_string(), "-n"]).args(arguments.split(' '));
        command
    }

    /// dnsmasq for a range of ten addresses.
    fn dnsmasq(&self, first: u8) -> Running {
        let lease_file = self.dir.path().join(format!("leases-{first}"));
        let mut command = self.far_command(&format!(
            "dnsmasq -k -p 0 -C /dev/null -i srv --no-ping -u root --dhcp-authoritative --domain=lab \
             --log-facility=- -F 10.9.0.{first},10.9.0.{},255.255.255.0,2m --dhcp-option=6,10.9.0.1 --pid-file= \
             --dhcp-option=26,1400 --dhcp-option=121,10.66.0.0/16,10.9.0.66",
            first + 9
        ));
        command.arg(format!("--dhcp-leasefile={}", lease_file.display()));
        // It is ready when it has said that it has; before that a DISCOVER is lost and sent again.
        let mut child = command.stderr(Stdio::piped()).spawn().expect("nsenter");
        let mut lines = BufReader::new(child.stderr.take().expect("pipe")).lines();
        let started = lines.by_ref().any(|line| line.expect("utf-8").contains("DHCP, IP range"));
        assert!(started, "is dnsmasq there? apt-get install dnsmasq-base");
        std::thread::spawn(move || lines.count());
        Running(child)
    }

    fn start(&self, args: &str) -> Receiver<NetworkEvent> {
        let (sender, receiver) = channel();
        let args = BootArgs::parse(args);
        assert_eq!(args.problems, Vec::<String>::new());
        let settings = Settings {
            etc: self.dir.path().join("etc"),
            set_hostname: false,
            node: args.node.clone(),
            wishes: self.dir.path().join("network.toml"),
            state: self.dir.path().to_owned(),
        };
        start(&args, settings, move |event| {
            let _ = sender.send(event);
        })
        .expect("start");
        receiver
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join("etc").join(name)).expect(name)
    }
}

#[track_caller]
fn until<T>(
    events: &Receiver<NetworkEvent>,
    mut found: impl FnMut(&NetworkEvent) -> Option<T>,
) -> T {
    let mut seen = Vec::new();
    loop {
        let Ok(event) = events.recv_timeout(LIMIT) else { panic!("waited; saw {seen:#?}") };
        if let Some(found) = found(&event) {
            return found;
        }
        seen.push(event);
    }
}

#[track_caller]
fn configured(events: &Receiver<NetworkEvent>) -> String {
    until(events, |event| match event {
        NetworkEvent::Configured { addresses, .. } => Some(addresses[0].to_string()),
        _ => None,
    })
}

#[track_caller]
fn waiting(events: &Receiver<NetworkEvent>, text: &str) {
    until(events, |event| (*event == NetworkEvent::Waiting(text.to_owned())).then_some(()));
}

#[test]
fn dnsmasq_sets_everything_up_and_its_refusal_after_a_move_leads_to_a_new_address() {
    let cable = Cable::new();
    cable.far("link set srv up");
    let first = cable.dnsmasq(100);
    let events = cable.start(&format!("{ARGS} layercake.node=n1"));
    let address = configured(&events);
    assert!(address.starts_with("10.9.0.10"), "{address}");
    let shown = run("ip", "-4 addr show dev cli");
    assert!(shown.contains(&format!("inet {address}/24")) && shown.contains("mtu 1400"), "{shown}");
    let routes = run("ip", "-4 route show");
    let default = format!("default via 10.9.0.1 dev cli proto dhcp src {address} metric 100");
    assert!(routes.contains(&default), "{routes}");
    assert!(!routes.contains("10.66"), "option 121 is ignored: {routes}");
    assert!(cable.file("resolv.conf").contains("search lab\nnameserver 10.9.0.1\n"));
    assert!(cable.file("hosts").contains(&format!("{address} n1\n")));
    assert_eq!(cable.file("hostname"), "n1\n");

    drop(first);
    let _second = cable.dnsmasq(200);
    cable.far("link set srv down");
    waiting(&events, "cli: no carrier");
    assert!(run("ip", "-4 addr show dev cli").contains(&address), "the lease is kept");
    cable.far("link set srv up");
    until(&events, |event| matches!(event, NetworkEvent::Lost { .. }).then_some(()));
    let moved = configured(&events);
    assert!(moved.starts_with("10.9.0.20"), "{moved}");
    let shown = run("ip", "-4 addr show dev cli");
    assert!(shown.contains(&moved) && !shown.contains(&address), "{shown}");
}

#[test]
fn an_agent_that_starts_again_keeps_the_address_that_it_finds() {
    let cable = Cable::new();
    cable.far("link set srv up");
    run("ip", "addr add 10.9.0.107/24 dev cli");
    let _server = cable.dnsmasq(100);
    let events = cable.start(ARGS);
    assert_eq!(configured(&events), "10.9.0.107");
    assert_eq!(cable.file("hostname"), "node-525400000001\n", "named after its interface");
}

#[test]
fn the_first_address_is_there_before_the_agent_which_goes_on_with_its_lease() {
    let cable = Cable::new();
    cable.far("link set srv up");
    let server = cable.dnsmasq(100);
    let mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
    early::testing::first_address("cli", mac, cable.dir.path()).expect("an address");
    let shown = run("ip", "-4 addr show dev cli");
    assert!(shown.contains("inet 10.9.0.10") && shown.contains("mtu 1400"), "{shown}");
    let routes = run("ip", "-4 route show");
    assert!(routes.contains("default via 10.9.0.1 dev cli proto dhcp"), "{routes}");

    // Nobody could give another one.
    drop(server);
    let events = cable.start(ARGS);
    let address = configured(&events);
    assert!(shown.contains(&format!("inet {address}/24")), "{address}: {shown}");
    assert!(cable.file("resolv.conf").contains("nameserver 10.9.0.1\n"));
}

#[test]
fn the_first_address_comes_also_where_the_carrier_comes_late() {
    let cable = Cable::new();
    let _server = cable.dnsmasq(100);
    let mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // What is sent until then is lost.
            std::thread::sleep(Duration::from_millis(100));
            cable.far("link set srv up");
        });
        early::testing::first_address("cli", mac, cable.dir.path()).expect("an address");
    });
    let shown = run("ip", "-4 addr show dev cli");
    assert!(shown.contains("inet 10.9.0.10"), "{shown}");
}

#[test]
fn an_agent_waits_for_who_asks_for_the_first_address_and_says_so() {
    let cable = Cable::new();
    cable.far("link set srv up");
    let _server = cable.dnsmasq(100);
    let lock = early::testing::lock(cable.dir.path());
    let events = cable.start(ARGS);
    waiting(&events, "the first address is being asked for");
    assert!(!run("ip", "link show dev cli").contains(",UP"), "it is not touched meanwhile");
    drop(lock);
    assert!(configured(&events).starts_with("10.9.0.10"));
}

#[test]
fn a_lease_of_seconds_is_renewed_again_and_again_and_ends_when_its_server_is_gone() {
    let cable = Cable::new();
    cable.far("link set srv up");
    let config = cable.dir.path().join("udhcpd.conf");
    let dir = cable.dir.path().display();
    std::fs::write(
        &config,
        format!(
            "start 10.9.0.100\nend 10.9.0.105\nmax_leases 6\ninterface srv\nmin_lease 1\n\
             lease_file {dir}/leases\npidfile {dir}/pid\nopt subnet 255.255.255.0\nopt lease 4\n"
        ),
    )
    .expect("config");
    std::fs::write(cable.dir.path().join("leases"), "").expect("leases");
    let mut child = cable
        .far_command(&format!("busybox udhcpd -f {}", config.display()))
        .stderr(Stdio::piped())
        .spawn()
        .expect("nsenter");
    let mut lines = BufReader::new(child.stderr.take().expect("pipe")).lines();
    let server = Running(child);
    let events = cable.start(ARGS);
    let address = configured(&events);
    let acks = lines.by_ref().filter(|line| {
        let line = line.as_ref().expect("utf-8");
        line.contains("sending ACK")
    });
    assert_eq!(
        acks.take(5).count(),
        5,
        "is busybox with udhcpd there? apt-get install busybox-static"
    );
    assert!(run("ip", "-4 addr show dev cli").contains(&address));
    assert_eq!(events.try_iter().filter(|e| matches!(e, NetworkEvent::Lost { .. })).count(), 0);
    drop(server);
    until(&events, |event| matches!(event, NetworkEvent::Lost { .. }).then_some(()));
    assert!(!run("ip", "-4 addr show dev cli").contains("inet "));
}

#[test]
fn what_is_waited_for_is_said() {
    let cable = Cable::new();
    let events = cable.start(ARGS);
    waiting(&events, "cli: no carrier");
    cable.far("link set srv up");
    until(&events, |event| {
        matches!(event, NetworkEvent::LinkUp { link, .. } if link == "cli").then_some(())
    });
    until(&events, |event| match event {
        NetworkEvent::LinkWaits { link, why: Some(why), .. } => {
            (link == "cli" && why.starts_with("waiting for DHCP, no answer for ")).then_some(())
        }
        _ => None,
    });
    assert!(cable.file("hosts").contains("localhost"), "written before there is an address");
}

#[test]
fn an_interface_that_comes_later_is_taken_on_and_one_that_goes_is_told() {
    let cable = Cable::new();
    let pid = cable.holder.0.id();
    let events = cable.start("ip=:::::late:dhcp");
    waiting(&events, "late: there is no such interface yet");
    run("ip", &format!("link add late type veth peer far netns {pid}"));
    waiting(&events, "late: no carrier");
    assert!(!run("ip", "link show dev cli").contains("UP,"), "others are left alone");
}

#[test]
fn a_fixed_address_needs_no_server_and_off_touches_only_loopback() {
    let cable = Cable::new();
    cable.far("link set srv up");
    let events =
        cable.start("ip=10.9.0.77::10.9.0.1:255.255.255.0:n7:cli:off:10.9.0.1 layercake.log=info");
    assert_eq!(configured(&events), "10.9.0.77");
    assert!(run("ip", "-4 route show").contains("default via 10.9.0.1 dev cli"));
    assert_eq!(cable.file("hostname"), "n7\n");
    run("ip", "link delete cli");
    until(&events, |event| {
        (*event
            == NetworkEvent::Lost { link: "cli".to_owned(), address: IpAddr::from([10, 9, 0, 77]) })
        .then_some(())
    });
    until(&events, |event| (*event == NetworkEvent::Gone("cli".to_owned())).then_some(()));

    let cable = Cable::new();
    cable.far("link set srv up");
    cable.start("ip=off");
    assert!(run("ip", "link show dev lo").contains("LOOPBACK,UP"));
    assert!(!run("ip", "link show dev cli").contains("UP,"));
}
