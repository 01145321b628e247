//! The DHCP server against a client that we did not write (busybox udhcpc), in network namespaces of the test's own.
//!
//! Each test runs itself again below `unshare --net`; the namespaces are gone when that process is.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Ipv4Addr;
use std::process::{Child, ChildStdout, Command, Stdio};

use protocol::ids::Mac;
use server::dhcp::{self, BootFiles, DhcpConfig, DhcpError, DhcpSeen, Reservation};
use tokio::sync::{mpsc, watch};

const INNER: &str = "LAYERCAKE_TEST_INNER";
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);

/// True inside the namespace. Outside, runs the test of this name inside and checks that it passes.
fn is_inside(test: &str) -> bool {
    if std::env::var_os(INNER).is_some() {
        return true;
    }
    let status = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().expect("own path"))
        .args(["--exact", test, "--nocapture"])
        .env(INNER, "1")
        .status()
        .expect("unshare is missing: apt-get install util-linux");
    assert!(status.success(), "{test} failed inside its namespace (root is needed)");
    false
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .expect("ip is missing: apt-get install iproute2");
    assert!(status.success(), "ip {arguments}");
}

fn config() -> DhcpConfig {
    DhcpConfig {
        interface: "srv".to_owned(),
        server: SERVER,
        subnet: (Ipv4Addr::new(10, 9, 0, 0), 24),
        range: (Ipv4Addr::new(10, 9, 0, 100), Ipv4Addr::new(10, 9, 0, 120)),
        router: Some(SERVER),
        dns: vec![SERVER],
        ntp_servers: vec![SERVER],
        domain: Some("lab".to_owned()),
        lease_s: 3600,
        http_base: "http://10.9.0.1:8080".to_owned(),
        reservations: vec![Reservation {
            mac: Mac([0x52, 0x54, 0, 0, 0, 0x99]),
            address: Ipv4Addr::new(10, 9, 0, 50),
            node: Some("n99".parse().expect("id")),
        }],
        boot_files: BootFiles::default(),
    }
}

/// udhcpc in a namespace of its own at the other end of the cable; its script prints a line for every event.
struct Client {
    child: Child,
    script: std::path::PathBuf,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Client {
    fn start(mac: &str, options: &str) -> Self {
        let script = tempfile::NamedTempFile::new().expect("script");
        let (mut file, path) = script.keep().expect("keep");
        // The address is set, so that renewals can be unicast.
        file.write_all(
            b"#!/bin/sh\n\
              echo $1 $ip $router $dns $hostname $domain $lease $boot_file $siaddr $ntpsrv\n\
              if [ $1 = bound ]; then ip addr add $ip/$mask dev $interface; fi\n",
        )
        .expect("write");
        drop(file);
        let name = path.to_str().expect("utf-8").to_owned();
        let shell = format!(
            "chmod +x {name}; echo ready; read go; ip link set cli up; \
             exec busybox udhcpc -f -i cli -s {name} {options}"
        );
        let mut child = Command::new("unshare")
            .args(["--net", "--", "sh", "-c", &shell])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("unshare is missing: apt-get install util-linux");
        let mut lines = BufReader::new(child.stdout.take().expect("pipe")).lines();
        assert_eq!(lines.next().expect("line").expect("utf-8"), "ready");
        ip("link add srv type veth peer name cli");
        ip(&format!("link set cli address {mac} netns {}", child.id()));
        ip("addr add 10.9.0.1/24 dev srv");
        ip("link set srv up");
        Self { child, script: path, lines }
    }

    fn go(&mut self) {
        self.child.stdin.take().expect("pipe").write_all(b"go\n").expect("write");
    }

    /// The next line of the script for this event.
    fn event(&mut self, event: &str) -> String {
        self.lines
            .by_ref()
            .map(|line| line.expect("utf-8"))
            .find(|line| line.starts_with(event))
            .unwrap_or_else(|| {
                panic!("udhcpc ended without `{event}`; is busybox-static installed?")
            })
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(status.expect("kill").success());
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.script);
    }
}

/// Runs the server beside a conversation; returns what the server saw.
fn talk(client: &mut Client, with: impl FnOnce(&mut Client) + Send) -> Vec<DhcpSeen> {
    let server = dhcp::bind(config()).expect("bind");
    let (stop, stopped) = watch::channel(false);
    let (seen, mut log) = mpsc::unbounded_channel();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("runtime").block_on(server.run(seen, stopped))
        });
        client.go();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| with(client)));
        stop.send(true).expect("server is there");
        thread.join().expect("no panic").expect("served");
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    std::iter::from_fn(|| log.try_recv().ok()).collect()
}

#[test]
fn udhcpc_gets_renews_and_releases_a_lease() {
    if !is_inside("udhcpc_gets_renews_and_releases_a_lease") {
        return;
    }
    let mut client = Client::start("52:54:00:00:00:01", "-R -O ntpsrv");
    let seen = talk(&mut client, |client| {
        let bound = client.event("bound");
        assert_eq!(bound.trim(), "bound 10.9.0.100 10.9.0.1 10.9.0.1 lab 3600 10.9.0.1");
        for _ in 0..3 {
            client.signal("-USR1");
            assert!(client.event("renew").starts_with("renew 10.9.0.100 "));
        }
        client.signal("-TERM");
        client.event("deconfig");
    });
    let mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
    let leased = seen
        .iter()
        .filter(|seen| matches!(seen, DhcpSeen::Leased { mac: m, boot: false, .. } if *m == mac))
        .count();
    assert!(leased >= 4, "{seen:?}");
}

#[test]
fn udhcpc_as_firmware_gets_its_reserved_address_and_boot_file() {
    if !is_inside("udhcpc_as_firmware_gets_its_reserved_address_and_boot_file") {
        return;
    }
    let uuid = "0x61:0033221100554477668899aabbccddeeff";
    let options = format!("-V PXEClient -x 0x5d:0007 -x {uuid} -O hostname -O bootfile");
    let mut client = Client::start("52:54:00:00:00:99", &options);
    let seen = talk(&mut client, |client| {
        let bound = client.event("bound");
        assert!(bound.starts_with("bound 10.9.0.50 10.9.0.1 10.9.0.1 n99 lab 3600"), "{bound}");
        assert!(bound.contains("ipxe.efi"), "{bound}");
    });
    let first = seen.first().expect("discover");
    let DhcpSeen::Discover { uuid, arch, boot, .. } = first else { panic!("{first:?}") };
    assert_eq!(uuid.as_deref(), Some("00112233-4455-6677-8899-aabbccddeeff"));
    assert_eq!((*arch, *boot), (Some(7), true));
}

#[test]
fn a_taken_port_and_a_missing_interface_are_named() {
    if !is_inside("a_taken_port_and_a_missing_interface_are_named") {
        return;
    }
    ip("link add srv type veth peer name cli");
    let _first = dhcp::bind(config()).expect("free");
    let error = dhcp::bind(config()).expect_err("taken");
    assert!(matches!(error, DhcpError::PortInUse { .. }), "{error:?}");
    assert!(error.to_string().contains("udp port 67 (DHCP) on `srv` is in use"), "{error}");
    let error = dhcp::bind(DhcpConfig { interface: "nope0".to_owned(), ..config() });
    assert!(error.expect_err("missing").to_string().contains("no interface `nope0`"));
    let bad = DhcpConfig { range: (Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST), ..config() };
    assert!(dhcp::bind(bad).expect_err("bad").to_string().contains("not in the subnet"));
}

/// Router advertisements that this namespace has received.
fn advertisements() -> u64 {
    let counters = std::fs::read_to_string("/proc/thread-self/net/snmp6").expect("IPv6");
    let line = counters.lines().find(|line| line.starts_with("Icmp6InRouterAdvertisements"));
    line.and_then(|line| line.split_whitespace().last()).expect("counter").parse().expect("number")
}

#[test]
fn a_hosts_router_solicitation_is_answered() {
    if !is_inside("a_hosts_router_solicitation_is_answered") {
        return;
    }
    ip("link add srv type veth peer name cli");
    let (stop, stopped) = watch::channel(false);
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("runtime").block_on(dhcp::router::serve("srv", stopped))
    });
    ip("link set srv up");
    // The kernel solicits on `cli` by itself, several times; only its counter tells of the answer.
    ip("link set cli up");
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while advertisements() == 0 {
        assert!(std::time::Instant::now() < limit, "no advertisement came");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    stop.send(true).expect("server is there");
    thread.join().expect("no panic").expect("served");
}
