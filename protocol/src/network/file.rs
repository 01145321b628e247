//! `/etc/layercake/network.toml`, the site's network, which an overlay brings:
//!
//! ```toml
//! others = "dhcp"                     # or "off": interfaces that nothing here names
//! dns = ["10.0.0.2"]                  # before all that are learned; also search = [...] and mtu
//! [[interface]]                       # name (may end in *), mac, driver: all that are given must hold
//! mac = "52:54:00:00:00:01"
//! addresses = ["10.0.0.5/24", "fd00::5/64"]
//! gateways = ["10.0.0.1", "fd00::1"]
//! [[bond]]
//! name = "bond0"
//! slaves = ["eth0", "52:54:00:00:00:02"]
//! mode = "802.3ad"                    # and the kernel's other options, by their names
//! [[vlan]]
//! name = "bond0.5"
//! parent = "bond0"
//! mtu = 1400
//! ```
//!
//! The keys of addresses (`dhcp4`, `dhcp6`, `slaac`, `addresses`, `gateways`, `dns`, `search`, `mtu`, `hostname`) stand
//! in all three kinds of tables. Without them a bond and a VLAN are as any other interface. `dhcp4`, `dhcp6` and `slaac`
//! are on unless the interface has a fixed address of the family.

use std::net::IpAddr;

use super::bond::Options;
use super::tables::{self, Entry, Table, Value};
use super::words::{MAX_VLAN, vlan_id};
use super::{
    Addressing, Interface, Match, Network, Vlan, address, domain, interface_name, matching, mtu,
};

/// Reads the file; what is wrong is left out and noted.
pub(super) fn parse(text: &str) -> (Network, Vec<String>) {
    let mut problems = Vec::new();
    let mut network = Network::default();
    for table in tables::parse(text, &mut problems) {
        let mut part = Part::default();
        for entry in &table.entries {
            let result = match table.name.as_str() {
                "" => top(&mut network, entry),
                "interface" | "vlan" | "bond" => part.set(&table.name, entry),
                _ => Ok(()),
            };
            if let Err(problem) = result {
                problems.push(format!("line {}: {problem}", entry.line));
            }
        }
        let name = table.name.clone();
        if let Err(problem) = part.finish(&mut network, &table) {
            problems.push(format!("line {}: [[{name}]]: {problem}", table.line));
        }
    }
    (network, problems)
}

fn top(network: &mut Network, Entry { key, value, .. }: &Entry) -> Result<(), String> {
    match (key.as_str(), value) {
        ("others", Value::Text(text)) if text == "dhcp" => network.others = Some(true),
        ("others", Value::Text(text)) if text == "off" => network.others = Some(false),
        ("others", _) => return Err("others: expected \"dhcp\" or \"off\"".to_owned()),
        ("dns", _) => network.dns = each(key, value, address)?,
        ("search", _) => network.search = each(key, value, domain)?,
        ("mtu", _) => network.mtu = Some(mtu(&plain(key, value)?)?),
        _ => return Err(format!("unknown key `{key}`")),
    }
    Ok(())
}

/// A table on its way.
#[derive(Default)]
struct Part {
    which: Match,
    parent: Option<String>,
    id: Option<u16>,
    slaves: Vec<Match>,
    options: Options,
    switches: [Option<bool>; 3],
    ip: Option<Addressing>,
}

impl Part {
    fn set(&mut self, table: &str, Entry { key, value, .. }: &Entry) -> Result<(), String> {
        match (key.as_str(), table) {
            ("name", "interface") => self.which.name = matching(text(key, value)?)?.name,
            ("name", _) => self.which.name = Some(interface_name(text(key, value)?)?),
            ("mac", "interface") => {
                self.which.mac = Some(text(key, value)?.parse().map_err(|e| format!("mac: {e}"))?);
            }
            ("driver", "interface") => self.which.driver = Some(text(key, value)?.to_owned()),
            ("parent", "vlan") => self.parent = Some(interface_name(text(key, value)?)?),
            ("id", "vlan") => {
                let id = plain(key, value)?.parse().ok().filter(|id| (1..=MAX_VLAN).contains(id));
                self.id = Some(id.ok_or_else(|| format!("id: expected 1 to {MAX_VLAN}"))?);
            }
            ("slaves", "bond") => self.slaves = each(key, value, matching)?,
            (option, "bond") if Options::knows(option) => {
                self.options.set(option, &plain(key, value)?)?;
            }
            _ => self.address(key, value)?,
        }
        Ok(())
    }

    fn address(&mut self, key: &str, value: &Value) -> Result<(), String> {
        if let Some(at) = ["dhcp4", "dhcp6", "slaac"].iter().position(|name| *name == key) {
            let Value::Flag(flag) = value else {
                return Err(format!("{key}: expected true or false"));
            };
            if let Some(switch) = self.switches.get_mut(at) {
                *switch = Some(*flag);
            }
            self.ip.get_or_insert_with(Addressing::none);
            return Ok(());
        }
        let mut ip = self.ip.take().unwrap_or_else(Addressing::none);
        let done = set_address(&mut ip, key, value);
        if done.is_ok() || ip != Addressing::none() {
            self.ip = Some(ip);
        }
        done
    }

    /// # Errors
    /// What the table lacks.
    fn finish(self, network: &mut Network, table: &Table) -> Result<(), String> {
        let Self { mut which, parent, id, slaves, options, switches, ip } = self;
        let size = ip.as_ref().and_then(|ip| ip.mtu);
        let name = which.name.clone().ok_or("it has no name");
        match table.name.as_str() {
            "" => return Ok(()),
            "interface" if which == Match::default() => {
                return Err("expected name, mac or driver".to_owned());
            }
            "interface" => {}
            "vlan" => {
                let name = name?;
                let parent = parent.ok_or("it has no parent")?;
                let id = id.map_or_else(|| vlan_id(&name), Ok)?;
                which = Match::name(&name);
                network.vlans.push(Vlan { name, parent, id });
            }
            "bond" => {
                if slaves.is_empty() {
                    return Err("it has no slaves".to_owned());
                }
                network.bonds.push(options.into_bond(name?, slaves, size));
            }
            _ => return Err("unknown: expected interface, vlan or bond".to_owned()),
        }
        if let Some(mut ip) = ip.or_else(|| (table.name == "interface").then(Addressing::none)) {
            let has = |v6: bool| ip.addresses.iter().any(|(address, _)| address.is_ipv6() == v6);
            let [dhcp4, dhcp6, slaac] = switches;
            let (by_v4, by_v6) = (!has(false), !has(true));
            ip.dhcp4 = dhcp4.unwrap_or(by_v4);
            ip.dhcp6 = dhcp6.unwrap_or(by_v6);
            ip.slaac = slaac.unwrap_or(by_v6);
            network.interfaces.push(Interface { which, ip });
        }
        Ok(())
    }
}

fn set_address(ip: &mut Addressing, key: &str, value: &Value) -> Result<(), String> {
    match key {
        "addresses" => ip.addresses = each(key, value, prefixed)?,
        "gateways" => ip.gateways = each(key, value, address)?,
        "dns" => ip.dns = each(key, value, address)?,
        "search" => ip.search = each(key, value, domain)?,
        "mtu" => ip.mtu = Some(mtu(&plain(key, value)?)?),
        "hostname" => ip.hostname = Some(domain(text(key, value)?)?),
        _ => return Err(format!("unknown key `{key}`")),
    }
    Ok(())
}

/// `ADDRESS/LENGTH`.
fn prefixed(text: &str) -> Result<(IpAddr, u8), String> {
    let wrong = || format!("`{text}` is no address with the length of its prefix, as 10.0.0.5/24");
    let (host, bits) = text.split_once('/').ok_or_else(wrong)?;
    let host = address(host)?;
    let most = if host.is_ipv4() { 32 } else { 128 };
    let bits = bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(wrong)?;
    Ok((host, bits))
}

fn text<'a>(key: &str, value: &'a Value) -> Result<&'a str, String> {
    match value {
        Value::Text(text) => Ok(text),
        _ => Err(format!("{key}: expected a text in quotes")),
    }
}

/// A text or a number.
fn plain(key: &str, value: &Value) -> Result<String, String> {
    match value {
        Value::Text(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        _ => Err(format!("{key}: expected a number or a text in quotes")),
    }
}

fn each<T>(
    key: &str,
    value: &Value,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    match value {
        Value::List(items) => {
            items.iter().map(|item| read(item).map_err(|e| format!("{key}: {e}"))).collect()
        }
        _ => Err(format!("{key}: expected [\"text\", ...]")),
    }
}

/// For fuzzers: reads arbitrary bytes as the file.
pub fn fuzz_network_file(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = parse(text);
    }
}
