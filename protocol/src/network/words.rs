//! The network's words of the kernel command line: `ip=` (kernel `Documentation/admin-guide/nfs/nfsroot.rst` and
//! `dracut.cmdline(7)`), `vlan=`, `bond=`, `nameserver=` (`dracut.cmdline(7)`) and `layercake.mtu=`.
//!
//! `ip=` takes the kernel's form, `CLIENT:SERVER:GATEWAY:NETMASK:HOSTNAME:DEVICE:METHOD[:DNS0[:DNS1]]`, dracut's, where
//! `:MTU` stands in the place of the name servers, dracut's `DEVICE:METHOD[:MTU]`, and a lone METHOD. IPv6 addresses are
//! in brackets, with the length of the prefix as NETMASK.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use super::bond::Options;
use super::{
    Addressing, Bond, Interface, Match, Network, Vlan, address, interface_name, matching, mtu,
};

/// What is said of an `ip=` that makes no sense.
const EXPECTED: &str =
    "expected dhcp, off, DEVICE:METHOD or CLIENT:SERVER:GATEWAY:NETMASK:HOSTNAME:DEVICE:METHOD";
/// Largest number of a VLAN (IEEE 802.1Q: 4095 is reserved).
pub(crate) const MAX_VLAN: u16 = 4094;

impl Network {
    /// Takes a word of the command line; false if the key is not the network's.
    ///
    /// # Errors
    /// What is wrong with the value, which is left out then.
    pub(crate) fn word(&mut self, key: &str, value: &str) -> Result<bool, String> {
        match key {
            "ip" => self.ip(value)?,
            "vlan" => {
                let (name, parent) = value.split_once(':').ok_or("expected NAME:PARENT")?;
                let (name, parent) = (interface_name(name)?, interface_name(parent)?);
                let id = vlan_id(&name)?;
                self.vlans.push(Vlan { name, parent, id });
            }
            "bond" => self.bonds.push(bond(value)?),
            "nameserver" => self.dns.push(address(value)?),
            "layercake.mtu" => self.mtu = Some(mtu(value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn ip(&mut self, value: &str) -> Result<(), String> {
        let fields = split(value);
        let field = |at: usize| fields.get(at).copied().filter(|text| !text.is_empty());
        if let [only] = fields.as_slice() {
            match method(only)? {
                None => self.is_off = true,
                // What the node does by itself.
                Some(ip) if ip == Addressing::automatic() => self.others = Some(true),
                Some(ip) => self.add(None, ip),
            }
            return Ok(());
        }
        // DEVICE:METHOD[:MTU]
        if let [device, how, ..] = fields.as_slice()
            && !device.is_empty()
            && let Ok(found) = method(how)
        {
            let mut ip = found.unwrap_or_else(Addressing::none);
            ip.mtu = field(2).map(mtu).transpose()?;
            if field(3).is_some() {
                return Err("an interface's MAC address cannot be set".to_owned());
            }
            self.add(Some(interface_name(device)?), ip);
            return Ok(());
        }
        if fields.len() < 4 {
            return Err(EXPECTED.to_owned());
        }
        let device = field(5).map(interface_name).transpose()?;
        let how = field(6).map(method).transpose()?;
        let mut ip = match (field(0), how) {
            (None, Some(None)) if device.is_none() => {
                self.is_off = true;
                return Ok(());
            }
            (None, None) if device.is_none() => return Err(EXPECTED.to_owned()),
            (None, None) => Addressing::automatic(),
            (None, Some(how)) => how.unwrap_or_else(Addressing::none),
            (Some(client), _) => fixed(client, field(3))?,
        };
        ip.gateways = field(2).map(address).transpose()?.into_iter().collect();
        ip.hostname = field(4).map(str::to_owned);
        match field(7) {
            Some(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => {
                ip.mtu = Some(mtu(text)?);
            }
            first => {
                for text in [first, field(8)].into_iter().flatten() {
                    ip.dns.push(address(text)?);
                }
            }
        }
        if device.is_none() && ip == Addressing::automatic() {
            self.others = Some(true);
        } else {
            self.add(device, ip);
        }
        Ok(())
    }

    fn add(&mut self, device: Option<String>, ip: Addressing) {
        self.others = self.others.or(Some(false));
        let which = device
            .map_or_else(Match::default, |name| Match { name: Some(name), ..Match::default() });
        self.interfaces.push(Interface { which, ip });
    }

    /// The words of the command line that say this, in a fixed order.
    pub(crate) fn words(&self, words: &mut Vec<String>) {
        for bond in &self.bonds {
            let slaves: Vec<String> = bond.slaves.iter().map(slave).collect();
            let mut options: Vec<String> = bond.options.iter().map(ToString::to_string).collect();
            options.extend(bond.primary.iter().map(|name| format!("primary={name}")));
            let mtu = bond.mtu.map_or_else(String::new, |mtu| format!(":{mtu}"));
            words.push(format!(
                "bond={}:{}:{}{mtu}",
                bond.name,
                slaves.join(","),
                options.join(",")
            ));
        }
        words.extend(self.vlans.iter().map(|vlan| format!("vlan={}:{}", vlan.name, vlan.parent)));
        if self.is_off {
            words.push("ip=off".to_owned());
        }
        if self.others == Some(true) {
            words.push("ip=dhcp".to_owned());
        }
        words.extend(self.interfaces.iter().map(render));
        words.extend(self.dns.iter().map(|server| format!("nameserver={}", bracketed(server))));
        words.extend(self.mtu.map(|mtu| format!("layercake.mtu={mtu}")));
    }
}

/// At colons that are not in brackets.
fn split(value: &str) -> Vec<&str> {
    let mut fields = Vec::new();
    let (mut start, mut depth) = (0, 0_u32);
    for (at, byte) in value.bytes().enumerate() {
        match byte {
            b'[' => depth = 1,
            b']' => depth = 0,
            b':' if depth == 0 => {
                fields.push(value.get(start..at).unwrap_or_default());
                start = at + 1;
            }
            _ => {}
        }
    }
    fields.push(value.get(start..).unwrap_or_default());
    fields
}

/// How addresses are got; none for not at all.
fn method(text: &str) -> Result<Option<Addressing>, String> {
    let all = Addressing::automatic();
    Ok(match text {
        "dhcp" | "on" | "any" | "both" | "single-dhcp" => Some(all),
        "dhcp4" => Some(Addressing { dhcp6: false, slaac: false, ..all }),
        "dhcp6" | "either6" => Some(Addressing { dhcp4: false, ..all }),
        "auto6" | "link6" => Some(Addressing { dhcp4: false, dhcp6: false, ..all }),
        "off" | "none" => None,
        _ => return Err(EXPECTED.to_owned()),
    })
}

/// A fixed address. Routers may announce prefixes beside it, as the kernel has it.
fn fixed(client: &str, mask: Option<&str>) -> Result<Addressing, String> {
    let client = address(client)?;
    let mask = mask.ok_or("a fixed address needs a netmask in the fourth field")?;
    let prefix_len = match (mask.parse::<u8>(), client) {
        (Ok(bits), IpAddr::V4(_)) if bits <= 32 => bits,
        (Ok(bits), IpAddr::V6(_)) if bits <= 128 => bits,
        (_, IpAddr::V6(_)) => {
            return Err(format!("netmask `{mask}` is no prefix length of 0 to 128"));
        }
        (_, IpAddr::V4(_)) => {
            let mask: Ipv4Addr =
                mask.parse().map_err(|_| format!("netmask `{mask}` is not an IPv4 address"))?;
            mask_len(mask).ok_or_else(|| format!("netmask {mask} is not contiguous"))?
        }
    };
    let addresses = vec![(client, prefix_len)];
    Ok(Addressing { slaac: true, addresses, ..Addressing::none() })
}

fn mask_len(mask: Ipv4Addr) -> Option<u8> {
    let bits = u32::from(mask);
    let ones = bits.leading_ones();
    (bits.checked_shl(ones).unwrap_or(0) == 0).then(|| u8::try_from(ones).unwrap_or(32))
}

/// The number in a VLAN's name: `vlan5`, `vlan0005`, `eth0.5`, `eth0.0005`.
pub(crate) fn vlan_id(name: &str) -> Result<u16, String> {
    let digits = match name.rsplit_once('.') {
        Some((_, digits)) => digits,
        None => name.strip_prefix("vlan").unwrap_or_default(),
    };
    let id = digits.parse().ok().filter(|id| (1..=MAX_VLAN).contains(id));
    id.ok_or_else(|| format!("`{name}` has no number of 1 to {MAX_VLAN}: vlan5, eth0.5"))
}

/// `NAME[:SLAVES[:OPTIONS[:MTU]]]`; dracut's defaults are `bond0`, `eth0,eth1` and `mode=balance-rr`.
fn bond(value: &str) -> Result<Bond, String> {
    let mut fields = value.split(':').map(|text| Some(text).filter(|text| !text.is_empty()));
    let mut next = || fields.next().flatten();
    let (name, slaves, words, size) = (next(), next(), next(), next());
    let name = interface_name(name.unwrap_or("bond0"))?;
    let slaves = slaves.unwrap_or("eth0,eth1").split(',').map(matching);
    let mut options = Options::default();
    for word in words.unwrap_or_default().split(',').filter(|word| !word.is_empty()) {
        let (name, value) = word.split_once('=').ok_or_else(|| format!("`{word}`: no value"))?;
        options.set(name, value)?;
    }
    Ok(options.into_bond(name, slaves.collect::<Result<_, _>>()?, size.map(mtu).transpose()?))
}

fn slave(which: &Match) -> String {
    match (&which.name, which.mac) {
        (Some(name), _) => name.clone(),
        (None, Some(mac)) => mac.to_string().replace(':', "-"),
        (None, None) => String::new(),
    }
}

fn bracketed(address: &IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

fn render(interface: &Interface) -> String {
    let Interface { which, ip } = interface;
    let (client, mask) = match ip.addresses.first() {
        None => (String::new(), String::new()),
        Some((IpAddr::V4(address), bits)) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub((*bits).into())).unwrap_or(0);
            (address.to_string(), Ipv4Addr::from(mask).to_string())
        }
        Some((address, bits)) => (bracketed(address), bits.to_string()),
    };
    let how = match (ip.dhcp4, ip.dhcp6, ip.slaac) {
        _ if !ip.addresses.is_empty() => "off",
        (true, true, _) => "dhcp",
        (true, false, _) => "dhcp4",
        (false, true, _) => "dhcp6",
        (false, false, true) => "auto6",
        (false, false, false) => "off",
    };
    let gateway = ip.gateways.first().map(bracketed).unwrap_or_default();
    let host = ip.hostname.as_deref().unwrap_or_default();
    let device = which.name.as_deref().unwrap_or_default();
    let mut text = format!("ip={client}::{gateway}:{mask}:{host}:{device}:{how}");
    if let Some(mtu) = ip.mtu {
        let _infallible = write!(text, ":{mtu}");
    }
    for server in ip.dns.iter().take(2) {
        let _infallible = write!(text, ":{}", bracketed(server));
    }
    text
}
