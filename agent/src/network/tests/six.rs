//! IPv6 against routers and servers that we did not write: dnsmasq for both, Kea beside a router of the test's own.

use std::net::SocketAddrV6;
use std::os::fd::{AsFd as _, AsRawFd as _};

use nix::sys::socket::{
    self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sockopt,
};

use super::*;
use crate::sys::packet::hear_only;

/// dnsmasq that also announces a prefix: `range` is its IPv6 half.
fn dnsmasq6(cable: &Cable, range: &str) -> Running {
    cable.far("addr add fd00:9::1/64 dev srv nodad");
    cable.far("link set srv up");
    let leases = cable.dir.path().join("leases6");
    let mut command = cable.far_command(&format!(
        "dnsmasq -k -p 0 -C /dev/null -i srv --no-ping -u root --log-dhcp --log-facility=- --pid-file= --enable-ra \
         --ra-param=srv,4 --dhcp-option=option6:dns-server,[fd00:9::53] --dhcp-option=option6:domain-search,six.lab \
         --dhcp-range={range}"
    ));
    command.arg(format!("--dhcp-leasefile={}", leases.display()));
    let mut child = command.stderr(Stdio::piped()).spawn().expect("nsenter");
    let mut lines = BufReader::new(child.stderr.take().expect("pipe")).lines();
    let started = lines.by_ref().any(|line| line.expect("utf-8").contains("router advertisement"));
    assert!(started, "is dnsmasq there? apt-get install dnsmasq-base");
    std::thread::spawn(move || lines.count());
    Running(child)
}

/// Waits for an address that begins like this, and for a `resolv.conf` with this line.
#[track_caller]
fn six(cable: &Cable, events: &Receiver<NetworkEvent>, start: &str, line: &str) -> IpAddr {
    let found = until(events, |event| match event {
        NetworkEvent::Configured { addresses, .. } => {
            addresses.iter().find(|address| address.to_string().starts_with(start)).copied()
        }
        _ => None,
    });
    let end = std::time::Instant::now() + LIMIT;
    while !cable.file("resolv.conf").lines().any(|found| found == line) {
        assert!(std::time::Instant::now() < end, "{}", cable.file("resolv.conf"));
        // No event says that name servers have come.
        std::thread::yield_now();
    }
    found
}

#[test]
fn a_router_that_announces_a_prefix_gives_address_name_servers_and_domains() {
    let cable = Cable::new();
    let _router = dnsmasq6(&cable, "fd00:9::,ra-only,64,10m");
    let events = cable.start(ARGS);
    let address = six(&cable, &events, "fd00:9:", "nameserver fd00:9::53");
    assert_eq!(address.to_string(), "fd00:9::5054:ff:fe00:1");
    assert!(
        cable.file("resolv.conf").contains("search six.lab\n"),
        "{}",
        cable.file("resolv.conf")
    );
    assert!(cable.file("hosts").contains("fd00:9::5054:ff:fe00:1 node-525400000001\n"));
    assert!(run("ip", "-6 route show default").contains("proto ra"));
    // An agent that starts again hears it again, without waiting for the next advertisement.
    let events = cable.start(ARGS);
    six(&cable, &events, "fd00:9:", "nameserver fd00:9::53");
    // And one that is told not to make an address makes none.
    let cable = Cable::new();
    let _router = dnsmasq6(&cable, "fd00:9::,ra-only,64,10m");
    std::fs::write(
        cable.dir.path().join("network.toml"),
        "[[interface]]\nname = \"cli\"\nslaac = false\naddresses = [\"fd00:9::77/64\"]\nmtu = 1380\n",
    )
    .expect("file");
    let events = cable.start("");
    let address = six(&cable, &events, "fd00:9::77", "# Written by layercake-agent.");
    assert_eq!(address.to_string(), "fd00:9::77");
    let shown = run("ip", "-6 addr show dev cli scope global");
    assert!(
        !shown.contains("5054") && run("ip", "link show dev cli").contains("mtu 1380"),
        "{shown}"
    );
}

#[test]
fn dnsmasq_gives_an_address_by_dhcpv6_and_only_names_where_only_they_are_offered() {
    let cable = Cable::new();
    let _router = dnsmasq6(&cable, "fd00:9::100,fd00:9::1ff,64,2m");
    let events = cable.start(ARGS);
    let address = six(&cable, &events, "fd00:9::1", "nameserver fd00:9::53");
    let shown = run("ip", "-6 addr show dev cli scope global");
    assert!(
        shown.contains(&format!("inet6 {address}/128 ")) && !shown.contains("forever"),
        "{shown}"
    );
    run("ip", "link delete cli");
    until(&events, |event| {
        (*event == NetworkEvent::Lost { link: "cli".to_owned(), address }).then_some(())
    });

    let cable = Cable::new();
    let _router = dnsmasq6(&cable, "fd00:9::,ra-stateless,64,10m");
    let events = cable.start(ARGS);
    six(&cable, &events, "fd00:9::5054", "nameserver fd00:9::53");
    assert!(!run("ip", "-6 addr show dev cli").contains("/128"));
}

/// Answers every router solicitation at the far end: DHCPv6 has addresses and all else, no prefix is announced.
fn managed_router(cable: &Cable) {
    const SOLICITATION: u8 = 133;
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", cable.holder.0.id()));
    let namespace = namespace.expect("the far namespace");
    // Ends with the process; its interface is gone long before.
    std::thread::spawn(move || {
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
        let flags = SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::IcmpV6;
        let fd = socket::socket(AddressFamily::Inet6, SockType::Raw, flags, protocol).expect("raw");
        hear_only(fd.as_fd(), SOLICITATION).expect("filter");
        socket::setsockopt(&fd, sockopt::Ipv6MulticastHops, &255).expect("hops");
        let fd = std::net::UdpSocket::from(fd);
        let index = nix::net::if_::if_nametoindex("srv").expect("srv");
        fd.join_multicast_v6(&"ff02::2".parse().expect("address"), index).expect("all routers");
        let mut buffer = [0; 64];
        while let Ok((_, Some(from))) = socket::recvfrom::<SockaddrIn6>(fd.as_raw_fd(), &mut buffer)
        {
            let everyone = "ff02::1".parse().expect("address");
            let to = SockaddrIn6::from(SocketAddrV6::new(everyone, 0, 0, from.scope_id()));
            let said = [134, 0, 0, 0, 64, 0xc0, 0, 30, 0, 0, 0, 0, 0, 0, 0, 0];
            let _ = socket::sendto(fd.as_raw_fd(), &said, &to, MsgFlags::empty());
        }
    });
}

#[test]
fn kea_gives_an_address_of_seconds_that_is_renewed_and_ends_with_it() {
    let cable = Cable::new();
    let dir = cable.dir.path().display().to_string();
    let config = cable.dir.path().join("kea.json");
    std::fs::write(
        &config,
        r#"{"Dhcp6": {
            "interfaces-config": {"interfaces": ["srv"]}, "server-id": {"type": "LL", "persist": false},
            "lease-database": {"type": "memfile", "persist": false},
            "valid-lifetime": 6, "preferred-lifetime": 5, "renew-timer": 1, "rebind-timer": 3,
            "subnet6": [{"subnet": "fd00:9::/64", "interface": "srv", "pools": [{"pool": "fd00:9::200-fd00:9::2ff"}]}],
            "option-data": [{"name": "dns-servers", "data": "fd00:9::54"}, {"name": "domain-search", "data": "kea.lab"}],
            "loggers": [{"name": "kea-dhcp6", "severity": "DEBUG", "debuglevel": 99,
                         "output_options": [{"output": "stdout", "flush": true}]}]}}"#,
    )
    .expect("config");
    // Kea listens on no interface without a link-local address, which it has no sooner than a carrier.
    run("ip", "link set cli up");
    let sysctl = "/proc/sys/net/ipv6/conf/srv/accept_dad";
    let shell = format!(
        "echo 0 > {sysctl}; ip link set srv up; ip addr add fd00:9::1/64 dev srv nodad; \
                         KEA_PIDFILE_DIR={dir} KEA_LOCKFILE_DIR={dir} exec kea-dhcp6 -c {}",
        config.display()
    );
    let mut command = cable.far_command("sh -c");
    let mut child = command.arg(shell).stdout(Stdio::piped()).spawn().expect("nsenter");
    let mut lines = BufReader::new(child.stdout.take().expect("pipe")).lines();
    let started = lines.by_ref().any(|line| line.expect("utf-8").contains("DHCP6_STARTED"));
    assert!(started, "is Kea there? apt-get install kea-dhcp6-server");
    let server = Running(child);
    // Read all the time: a server whose pipe is full answers no more.
    let (renewal, renewals) = channel();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            if line.contains("DHCP6_PACKET_RECEIVED") && line.contains("RENEW") {
                let _ = renewal.send(());
            }
        }
    });
    managed_router(&cable);
    let events = cable.start("BOOTIF=01-52-54-00-00-00-01 ip=cli:dhcp6");
    let address = six(&cable, &events, "fd00:9::2", "nameserver fd00:9::54");
    assert!(cable.file("resolv.conf").contains("search kea.lab\n"));
    for _ in 0..3 {
        renewals.recv_timeout(LIMIT).expect("a renewal");
    }
    assert_eq!(events.try_iter().filter(|e| matches!(e, NetworkEvent::Lost { .. })).count(), 0);
    assert!(run("ip", "-6 addr show dev cli").contains(&format!("inet6 {address}/128")));
    drop(server);
    until(&events, |event| {
        (*event == NetworkEvent::Lost { link: "cli".to_owned(), address }).then_some(())
    });
    until(&events, |event| match event {
        NetworkEvent::Waiting(why) => why.contains("DHCPv6").then_some(()),
        _ => None,
    });
}
