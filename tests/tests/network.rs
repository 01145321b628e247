//! The network of a node beyond one cable: bonds and VLANs, an IPv6-only network, and names. The kernel that runs the tests
//! may know neither bonds nor VLANs, so the node plays its own peer, in a network namespace that the case makes in it.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use tests::artifacts::{Artifacts, example};
use tests::lab::case;
use tests::overlay::with_network_peers;
use tests::prerequisites::{CASES, find_program};
use tests::process::Process;
use tests::qemu::{Boot, Machine, MachineSpec};
use tests::server_peer::{CONSOLE, ServerSpec};
use tests::story::{ACT, BOOT, Story};
use tests::wait;

/// The site's file: a bond that has a fixed address and prefers one of its slaves.
const WISHES: &str = r#"
[[bond]]
name = "bond1"
slaves = ["s*"]
mode = "active-backup"
primary = "s1"
miimon = 50
addresses = ["10.8.0.5/24"]
"#;
/// The command line's: a VLAN on a bond by LACP, whose slave that boots is not the first that comes.
const WORDS: &str = "bond=bond0:p0,p1:mode=802.3ad,lacp_rate=fast,xmit_hash_policy=layer3+4,miimon=50:1450 \
                     vlan=bond0.5:bond0 ip=bond0.5:dhcp BOOTIF=01-52-54-00-00-00-a1";
/// The peer: the far ends of four cables, bonded as the node's are, and a DHCP server on the VLAN.
const PEER: &[&str] = &[
    "busybox unshare -n sleep 9999 & echo $! > /peer; sleep 1; cat /peer",
    "for i in 0 1; do /tools/ip link add s$i type veth peer name t$i netns $(cat /peer); done",
    "for i in 0 1; do /tools/ip link add p$i address 52:54:00:00:00:a$i type veth peer name q$i netns $(cat /peer); done",
    "echo 'busybox nsenter -t $(cat /peer) -n \"$@\"' > /far",
    "sh /far /tools/ip link add bond9 mtu 1450 type bond mode 802.3ad miimon 50 lacp_rate fast",
    "sh /far /tools/ip link add bond8 type bond mode broadcast miimon 50",
    "for i in 0 1; do sh /far /tools/ip link set q$i master bond9; sh /far /tools/ip link set t$i master bond8; done",
    "sh /far /tools/ip link add link bond9 name bond9.5 type vlan id 5",
    "for i in lo bond9 bond9.5 bond8; do sh /far /tools/ip link set $i up; done",
    "sh /far /tools/ip addr add 10.9.5.1/24 dev bond9.5",
    "sh /far /tools/ip addr add fd00:95::1/64 dev bond9.5 nodad",
    "sh /far /tools/ip addr add 10.8.0.1/24 dev bond8",
    "sh /far /tools/dnsmasq -p 0 -C /dev/null -i bond9.5 -u root --no-ping --dhcp-leasefile=/leases --pid-file=/pid \
     -F 10.9.5.100,10.9.5.109,2m --enable-ra --dhcp-range=fd00:95::100,fd00:95::1ff,64,2m",
];

/// Runs a command in the node until what it says has all of these texts in it.
fn until_said(machine: &mut Machine, command: &str, texts: &[&str]) -> Result<String> {
    wait::until(&format!("`{command}` to say {texts:?}"), ACT, || {
        let said = machine.shell(&format!("{command} 2>&1 || true"))?;
        Ok(texts.iter().all(|text| said.contains(text)).then_some(said))
    })
}

#[test]
fn a_vlan_on_a_bond_by_lacp_gets_its_address_and_a_bond_survives_its_slave() -> Result<()> {
    case("bond-vlan", CASES, |lab| {
        let artifacts = with_network_peers(&Artifacts::find()?, &lab.dir().join("layer0"), WISHES)?;
        let mut spec = MachineSpec::netboot(1);
        spec.boot = Boot::Direct {
            kernel: artifacts.kernel(),
            initramfs: artifacts.initramfs(),
            append: format!("{CONSOLE} layercake.rescue=always {WORDS}"),
        };
        let mut machine = Machine::start(lab, &spec)?;
        machine.console.wait_for("bond1: none of its slaves is there yet", BOOT)?;
        for command in PEER {
            machine.shell(command).with_context(|| format!("in the node: {command}"))?;
        }
        let vlan = "/tools/ip addr show bond0.5";
        // From the peer by DHCP and by DHCPv6, through the VLAN.
        until_said(&mut machine, vlan, &["inet 10.9.5.10", "inet6 fd00:95::1"])?;
        let said = machine.shell(vlan)?;
        ensure!(said.contains("mtu 1450") && said.contains("52:54:00:00:00:a1"), "{said}");
        until_said(&mut machine, "ip route", &["default via 10.9.5.1 dev bond0.5"])?;
        let bond = "cat /proc/net/bonding/bond0";
        let both = [
            "802.3ad",
            "layer3+4",
            "LACP rate: fast",
            "Interface: p0",
            "Interface: p1",
            "Number of ports: 2",
        ];
        until_said(&mut machine, bond, &both)?;
        let said = machine.shell("ip link show eth0; /tools/ip -6 addr show dev p0")?;
        ensure!(
            !said.contains("LOWER_UP> mtu 1500 qdisc pfifo_fast"),
            "named by nobody, left alone: {said}"
        );
        ensure!(!said.contains("inet6"), "a slave has no address: {said}");
        machine.shell("sh /far /tools/ip link set q0 down")?;
        until_said(&mut machine, bond, &["Number of ports: 1"])?;
        until_said(&mut machine, "busybox ping -c 1 -w 2 10.9.5.1", &[" 0% packet loss"])?;

        let bond = "cat /proc/net/bonding/bond1";
        until_said(&mut machine, bond, &["Currently Active Slave: s1", "Primary Slave: s1"])?;
        let ping = "busybox ping -c 1 -w 2 10.8.0.1";
        until_said(&mut machine, ping, &[" 0% packet loss"])?;
        machine.shell("sh /far /tools/ip link set t1 down")?;
        until_said(&mut machine, bond, &["Currently Active Slave: s0"])?;
        until_said(&mut machine, ping, &[" 0% packet loss"])?;
        // A slave that goes and comes again is taken again.
        machine.shell("/tools/ip link del s1; sleep 1; /tools/ip link add s1 type veth peer name t1 netns $(cat /peer)")?;
        machine.shell("sh /far /tools/ip link set t1 master bond8")?;
        until_said(&mut machine, bond, &["Currently Active Slave: s1"])?;
        Ok(())
    })
}

/// A name for the server that only IPv6 leads to.
const NAME: &str = "boot.six.lab";

#[test]
fn a_node_without_ipv4_finds_its_server_by_name_and_runs_an_imageset() -> Result<()> {
    case("ipv6-only", CASES, |lab| {
        let dnsmasq = find_program("dnsmasq").context("dnsmasq is missing")?;
        let record = format!("--host-record={NAME},fd00:9::1");
        let args = [
            "--keep-in-foreground",
            "--log-facility=-",
            "--conf-file=/dev/null",
            "--bind-interfaces",
            "--listen-address=fd00:9::1",
            "--no-resolv",
            "--no-hosts",
            "--local=/lab/",
            "--user=root",
            "--pid-file=",
            &record,
        ];
        let log = lab.dir().join("dnsmasq.log");
        let _names = Process::start(lab.namespace(), &dnsmasq, args, &log)?;
        let artifacts = Artifacts::find()?;
        let mut spec = ServerSpec::new(artifacts.clone(), 1);
        let url = format!("http://{NAME}:8080");
        spec.url = Some(url.clone());
        let mut story = Story::begin(lab, &spec)?;
        story.push(&example("hello", "v1"))?;
        story.roll_all("hello:1")?;
        let mut machine = MachineSpec::netboot(1);
        machine.boot = Boot::Direct {
            kernel: artifacts.kernel(),
            initramfs: artifacts.initramfs(),
            append: format!(
                "{CONSOLE} layercake.server={url} layercake.node=n1 ip=eth0:auto6 nameserver=[fd00:9::1]"
            ),
        };
        story.switch_on_as(&machine)?;
        let (observed, _) = story.wait_running(1, "hello", "1")?;
        let mut addresses = observed.links.iter().flat_map(|link| &link.addresses);
        ensure!(addresses.clone().all(|address| address.is_ipv6()), "{:?}", observed.links);
        let own: IpAddr = "fd00:9::5054:ff:fe00:1".parse()?;
        ensure!(addresses.any(|address| *address == own), "{:?}", observed.links);
        Ok(())
    })
}
