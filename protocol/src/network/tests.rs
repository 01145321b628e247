//! What operators write, on the command line and in the file, and what becomes of it.

use proptest::prelude::*;

use super::tables::{Table, Value};
use super::*;
use crate::boot_args::BootArgs;

#[track_caller]
fn line(text: &str) -> Network {
    let args = BootArgs::parse(text);
    assert_eq!(args.problems, Vec::<String>::new());
    assert_eq!(BootArgs::parse(&args.to_string()), args, "{args}");
    args.network
}

#[track_caller]
fn good_file(text: &str) -> Network {
    let (network, problems) = Network::parse_file(text);
    assert_eq!(problems, Vec::<String>::new());
    network
}

fn looks(name: &str) -> Looks<'_> {
    Looks { name, mac: Mac([2, 0, 0, 0, 0, 9]), driver: None, is_virtual: false, is_boot: false }
}

#[track_caller]
fn addressing(network: &Network, name: &str) -> Addressing {
    match network.role(&looks(name), false) {
        Role::Address { ip, .. } => ip,
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn the_forms_of_the_kernel_and_of_dracut_mean_the_same() {
    for (one, other) in [
        ("ip=:::::eth1:dhcp", "ip=eth1:dhcp"),
        ("ip=eth1:dhcp:9000", "ip=:::::eth1:dhcp:9000"),
        ("ip=10.0.0.5::10.0.0.1:24::eth0:none", "ip=10.0.0.5::10.0.0.1:255.255.255.0::eth0:off"),
        ("ip=eth1:auto6", "ip=:::::eth1:link6"),
        (
            "ip=[fd00::5]::[fd00::1]:64::eth0:none:[fd00::2]",
            "ip=[fd00::5]::[fd00::1]:64::eth0::fd00--2",
        ),
    ] {
        if other.ends_with("fd00--2") {
            assert_eq!(
                line(one).interfaces[0].ip.dns,
                [IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 2])]
            );
        } else {
            assert_eq!(line(one), line(other), "{one}");
        }
    }
}

#[test]
fn the_command_line_names_bonds_and_vlans_as_dracut_does() {
    let network = line(
        "bond=bond0:eth0,52-54-00-00-00-02:mode=802.3ad,lacp_rate=fast,xmit_hash_policy=layer3+4:9000 \
         vlan=bond0.0005:bond0 ip=bond0.0005:dhcp nameserver=[fd00::53] layercake.mtu=1400",
    );
    assert_eq!(network.vlans[0].id, 5);
    let bond = &network.bonds[0];
    assert_eq!((bond.mtu, bond.slaves[1].mac), (Some(9000), Some(Mac([0x52, 0x54, 0, 0, 0, 2]))));
    let options: Vec<String> = bond.options.iter().map(ToString::to_string).collect();
    assert_eq!(
        options,
        ["mode=802.3ad", "miimon=100", "xmit_hash_policy=layer3+4", "lacp_rate=fast"]
    );
    assert_eq!(bond.options[0].value, 4);
    assert_eq!(network.role(&looks("eth0"), false), Role::Slave("bond0".to_owned()));
    assert_eq!(network.role(&looks("bond0"), false), Role::Carry { mtu: Some(9000) });
    assert_eq!(network.role(&looks("eth1"), false), Role::Leave);
    assert_eq!(addressing(&network, "bond0.0005").mtu, Some(1400));
    let standard = line("bond=");
    assert_eq!((standard.bonds[0].name.as_str(), standard.bonds[0].slaves.len()), ("bond0", 2));
    assert_eq!(standard.bonds[0].options[0].to_string(), "mode=balance-rr");
}

#[test]
fn without_a_word_every_real_interface_gets_what_the_network_offers() {
    let network = line("");
    assert_eq!(addressing(&network, "eth0"), Addressing::automatic());
    assert_eq!(network.role(&Looks { is_virtual: true, ..looks("br0") }, false), Role::Leave);
    let boot = Looks { is_virtual: true, is_boot: true, ..looks("veth0") };
    assert!(matches!(network.role(&boot, true), Role::Address { .. }));
    assert_eq!(line("ip=off").role(&looks("eth0"), false), Role::Leave);
    // With a bond, its slaves have nothing of their own; the bond is like any interface.
    let network = line("bond=b:eth0:mode=1");
    assert_eq!(addressing(&network, "b"), Addressing::automatic());
    assert_eq!(
        network.role(&Looks { is_boot: true, ..looks("eth0") }, true),
        Role::Slave("b".into())
    );
}

#[test]
fn an_address_for_no_interface_is_for_the_one_that_boots() {
    let network = line("ip=10.0.0.5:::255.255.255.0");
    let role = |is_boot, has_boot| network.role(&Looks { is_boot, ..looks("eth0") }, has_boot);
    assert!(matches!(role(true, true), Role::Address { shared: true, .. }));
    assert_eq!(role(false, true), Role::Leave);
    assert!(matches!(role(false, false), Role::Address { shared: true, .. }));
}

#[test]
fn several_interfaces_have_their_own_words() {
    let network = line("ip=eth0:dhcp ip=10.1.0.5:::24::eth1:none ip=eth2:auto6");
    assert!(addressing(&network, "eth0").dhcp4);
    assert!(!addressing(&network, "eth1").dhcp4);
    let third = addressing(&network, "eth2");
    assert_eq!((third.dhcp4, third.dhcp6, third.slaac), (false, false, true));
    assert_eq!(network.role(&looks("eth3"), false), Role::Leave);
}

const FILE: &str = r#"
# The site.
others = "off"
dns = ["10.0.0.2", "fd00::2"]  # ours
search = [
  "lab.example",  # first
  'Example.',
]
mtu = 1400
[[interface]]
mac = "52:54:00:00:00:01"
addresses = ["10.0.0.5/24"]
gateways = ["10.0.0.1"]
hostname = "n5"
[[interface]]
driver = "mlx5_core"
dhcp4 = false
[[bond]]
name = "bond0"
slaves = ["ens*", "52:54:00:00:00:02"]
mode = "active-backup"
primary = "ens1"
miimon = 50
mtu = 9000
[[vlan]]
name = "store"
parent = "bond0"
id = 7
slaac = false
"#;

#[test]
fn the_file_says_it_all() {
    let network = good_file(FILE);
    assert_eq!((network.others, network.dns.len(), network.mtu), (Some(false), 2, Some(1400)));
    assert_eq!(network.search, ["lab.example", "example"]);
    let first = Looks { mac: Mac([0x52, 0x54, 0, 0, 0, 1]), ..looks("eth0") };
    let Role::Address { ip, shared: false } = network.role(&first, true) else { panic!() };
    assert_eq!((ip.dhcp4, ip.slaac, ip.dhcp6, ip.mtu), (false, true, true, Some(1400)));
    let fast = Looks { driver: Some("mlx5_core"), ..looks("ib0") };
    let Role::Address { ip, .. } = network.role(&fast, true) else { panic!() };
    assert_eq!((ip.dhcp4, ip.slaac), (false, true));
    assert_eq!(network.role(&looks("ens3"), true), Role::Slave("bond0".to_owned()));
    assert_eq!(addressing(&network, "bond0").mtu, Some(9000));
    let store = addressing(&network, "store");
    assert_eq!((store.dhcp4, store.slaac, store.dhcp6), (true, false, true));
    assert_eq!(network.role(&looks("eth7"), true), Role::Leave);
    assert!(network.asks_for_drivers());
    assert_eq!(network.bonds[0].primary.as_deref(), Some("ens1"));
}

#[test]
fn the_command_line_goes_before_the_file() {
    let file = good_file(
        "[[interface]]\nname = \"eth0\"\ndhcp4 = false\n[[vlan]]\nname = \"vlan5\"\nparent = \"eth0\"\n",
    );
    let network = line("ip=eth0:dhcp vlan=vlan5:eth1").before(file.clone());
    assert!(addressing(&network, "eth0").dhcp4);
    assert_eq!((network.vlans.len(), network.vlans[0].parent.as_str()), (1, "eth1"));
    assert_eq!(network.role(&looks("eth2"), false), Role::Leave, "others are off by ip=");
    assert!(!addressing(&line("").before(file), "eth0").dhcp4);
}

#[test]
fn what_is_wrong_is_said_with_its_line_and_the_rest_goes_on() {
    for (text, expected) in [
        ("colour = \"red\"", "line 1: unknown key `colour`"),
        ("mtu = 12", "line 1: `12` is no MTU"),
        ("\n[interface]", "line 2: expected [[interface]]"),
        ("[[team]]", "line 1: [[team]]: unknown"),
        ("[[interface]]\ndhcp4 = true", "line 1: [[interface]]: expected name, mac or driver"),
        ("[[bond]]\nname = \"b\"", "line 1: [[bond]]: it has no slaves"),
        (
            "[[bond]]\nname = \"b\"\nslaves = [\"eth0\"]\nmode = \"fast\"",
            "line 4: mode: `fast` is none of balance-rr",
        ),
        ("[[vlan]]\nname = \"lan\"\nparent = \"eth0\"", "has no number"),
        ("[[vlan]]\nname = \"a/b\"\nparent = \"eth0\"", "line 2: `a/b` cannot be an interface"),
        (
            "[[interface]]\nname = \"eth0\"\naddresses = [\"10.0.0.5\"]",
            "line 3: addresses: `10.0.0.5` is no",
        ),
        ("dns = [\"10.0.0.2\",", "line 1: expected a text in quotes"),
        ("mtu = 1400\nmtu = 1500", "line 2: `mtu` stands here twice"),
        ("search = [\"a b\"]", "line 1: search: `a b` is no domain"),
    ] {
        let (network, problems) =
            Network::parse_file(&format!("{text}\n[[interface]]\nname = \"ok\"\n"));
        assert!(problems.join(";").contains(expected), "{text}: {problems:?}");
        let unfinished = text.starts_with("dns");
        assert!(
            unfinished || network.interfaces.iter().any(|i| i.which.name.as_deref() == Some("ok"))
        );
    }
    assert_eq!(Network::parse_file("dns = [").1, ["line 1: this array does not end"]);
    for (text, expected) in [
        ("vlan=eth0.0:eth0", "has no number"),
        ("bond=b:eth0:speed=1", "`speed` is no option"),
        ("bond=b:eth0:lacp_rate=3", "none of slow, fast"),
        ("ip=eth0:sometimes", "expected dhcp"),
        ("ip=eth0:dhcp:1400:52-54-00-00-00-01", "cannot be set"),
        ("nameserver=dns", "not an IP address"),
    ] {
        let problems = BootArgs::parse(text).problems.join(";");
        assert!(problems.contains(expected), "{text}: {problems}");
    }
}

fn as_toml(tables: &[Table]) -> toml::Table {
    let mut whole = toml::Table::new();
    for table in tables {
        let mut entries = toml::Table::new();
        for entry in &table.entries {
            let value = match &entry.value {
                Value::Text(text) => toml::Value::from(text.as_str()),
                Value::Number(number) => toml::Value::Integer((*number).try_into().expect("small")),
                Value::Flag(flag) => toml::Value::from(*flag),
                Value::List(items) => toml::Value::from(items.clone()),
            };
            entries.insert(entry.key.clone(), value);
        }
        if table.name.is_empty() {
            whole.extend(entries);
            continue;
        }
        let list = whole.entry(table.name.clone()).or_insert_with(|| toml::Value::Array(vec![]));
        list.as_array_mut().expect("an array").push(toml::Value::Table(entries));
    }
    whole
}

#[track_caller]
fn same_as_toml(text: &str) {
    let mut problems = Vec::new();
    let tables = tables::parse(text, &mut problems);
    if problems.is_empty() && !clashes(&tables) {
        let theirs: toml::Table = toml::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert_eq!(as_toml(&tables), theirs, "{text:?}");
    }
}

/// Names that are a key and a table at once, which TOML refuses and we find out later by their meaning.
fn clashes(tables: &[Table]) -> bool {
    tables.iter().skip(1).any(|t| tables[0].entries.iter().any(|entry| entry.key == t.name))
}

#[test]
fn the_example_is_toml() {
    same_as_toml(FILE);
    let mut problems = Vec::new();
    assert_eq!(tables::parse(FILE, &mut problems).len(), 5);
}

proptest! {
    #[test]
    fn what_is_read_means_the_same_to_every_reader_of_toml(
        lines in proptest::collection::vec(
            "( ?[ab] ?= ?(\"[a#\\\\\\\\\"']{0,3}\"|'[a\"#]{0,3}'|[0-9]{1,3}|true|\\[ ?(\"a\"|'b')?,? ?\\]|\\[\"a\",))|\\[\\[[xy]\\]\\] ?(#.)?|#.?|\"a\"\\]|",
            0..6,
        ),
    ) {
        same_as_toml(&lines.join("\n"));
    }

    #[test]
    fn no_file_makes_the_reader_panic(text in "([\\[\\]a-z=\"' #,\\\\\n0-9]|\\PC){0,80}") {
        fuzz_network_file(text.as_bytes());
        fuzz_network_file(format!("[[bond]]\n{text}").as_bytes());
        same_as_toml(&text);
    }
}
