//! The network of a node as its command line and its site file want it: interfaces, VLANs, bonds, addresses. Pure.
//!
//! | module | what it holds |
//! |---|---|
//! | `words` | `ip=`, `vlan=`, `bond=`, `nameserver=`: parse and render |
//! | `file` | `/etc/layercake/network.toml` |
//! | `tables` | the part of TOML that the file is written in |
//! | [`bond`] | options of bonds |
//!
//! Reading cannot fail: what is not understood is said as a sentence and the rest goes on, because a node with half a
//! network can still be mended. Where command line and file both name an interface, the command line wins.

use std::net::IpAddr;

use crate::ids::Mac;

pub mod bond;
mod file;
mod tables;
pub(crate) mod words;

pub use bond::Bond;
pub use file::fuzz_network_file;

/// Longest name of an interface, in bytes (Linux `IFNAMSIZ` less the final zero).
pub const MAX_NAME: usize = 15;
/// Smallest MTU that can be asked for, in bytes (RFC 791: the least that every link carries).
pub const MIN_MTU: u32 = 68;
/// Largest MTU, in bytes: that of an IP packet.
pub const MAX_MTU: u32 = 65_535;

/// Which interface something is about. Every part that is given must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// Its name; a final `*` stands for any end.
    pub name: Option<String>,
    /// Its own Ethernet address, which it has before it is in a bond.
    pub mac: Option<Mac>,
    /// Its driver as sysfs calls it (`mlx5_core`).
    pub driver: Option<String>,
}

/// What an interface is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Looks<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its own address.
    pub mac: Mac,
    /// Its driver, where it has one.
    pub driver: Option<&'a str>,
    /// It is not hardware: a bridge, a veth, a tunnel.
    pub is_virtual: bool,
    /// It is the interface of `BOOTIF=`.
    pub is_boot: bool,
}

impl Match {
    /// The interface of this name.
    #[must_use]
    pub fn name(name: &str) -> Self {
        Self { name: Some(name.to_owned()), ..Self::default() }
    }

    /// Whether it is this interface.
    #[must_use]
    pub fn is(&self, looks: &Looks<'_>) -> bool {
        let name = self.name.as_ref().is_none_or(|name| match name.strip_suffix('*') {
            Some(start) => looks.name.starts_with(start),
            None => name == looks.name,
        });
        let driver = self.driver.is_none() || self.driver.as_deref() == looks.driver;
        name && driver && self.mac.is_none_or(|mac| mac == looks.mac)
    }
}

/// How an interface gets its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addressing {
    /// Ask for an IPv4 address by DHCP.
    pub dhcp4: bool,
    /// Ask by DHCPv6 for what routers say is to be had by it.
    pub dhcp6: bool,
    /// Make IPv6 addresses of the prefixes that routers announce.
    pub slaac: bool,
    /// Fixed addresses, each with the length of its prefix in bits.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default gateways, one of each family.
    pub gateways: Vec<IpAddr>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Search domains.
    pub search: Vec<String>,
    /// The MTU in bytes; it goes before what DHCP and routers say.
    pub mtu: Option<u32>,
    /// The host name.
    pub hostname: Option<String>,
}

impl Addressing {
    /// Whatever the network offers.
    #[must_use]
    pub fn automatic() -> Self {
        Self { dhcp4: true, dhcp6: true, slaac: true, ..Self::none() }
    }

    /// Nothing.
    #[must_use]
    pub fn none() -> Self {
        Self {
            dhcp4: false,
            dhcp6: false,
            slaac: false,
            addresses: Vec::new(),
            gateways: Vec::new(),
            dns: Vec::new(),
            search: Vec::new(),
            mtu: None,
            hostname: None,
        }
    }

    /// Whether IPv6 is wanted at all.
    #[must_use]
    pub fn has_v6(&self) -> bool {
        self.slaac || self.dhcp6 || self.addresses.iter().any(|(address, _)| address.is_ipv6())
    }
}

/// An interface and its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Which one. One that says nothing is the boot interface, or without `BOOTIF=` the first that has a carrier.
    pub which: Match,
    /// How it gets its addresses.
    pub ip: Addressing,
}

/// A VLAN (IEEE 802.1Q) on an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vlan {
    /// The name of the new interface.
    pub name: String,
    /// The interface that carries it.
    pub parent: String,
    /// Its number, 1 to 4094.
    pub id: u16,
}

/// The whole wish.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Network {
    /// `ip=off`: only loopback.
    pub is_off: bool,
    /// Whether interfaces that nothing names get what the network offers; unsaid: yes.
    pub others: Option<bool>,
    /// Interfaces, the first that matches holds.
    pub interfaces: Vec<Interface>,
    /// VLANs.
    pub vlans: Vec<Vlan>,
    /// Bonds.
    pub bonds: Vec<Bond>,
    /// Name servers, before all that are learned.
    pub dns: Vec<IpAddr>,
    /// Search domains, before all that are learned.
    pub search: Vec<String>,
    /// MTU of every interface that has none of its own, in bytes.
    pub mtu: Option<u32>,
}

/// What an interface is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Nothing: it is not ours to touch.
    Leave,
    /// Carry VLANs, without addresses of its own.
    Carry {
        /// Its MTU in bytes.
        mtu: Option<u32>,
    },
    /// Be part of this bond.
    Slave(String),
    /// Have addresses. `shared` when several interfaces may take them, the first with a carrier does.
    Address {
        /// How it gets them.
        ip: Addressing,
        /// Whether the wish named no interface.
        shared: bool,
    },
}

impl Network {
    /// Reads `/etc/layercake/network.toml`. Returns what is wrong as well, each a sentence with its line.
    #[must_use]
    pub fn parse_file(text: &str) -> (Self, Vec<String>) {
        file::parse(text)
    }

    /// This wish (the command line's) before another one (the file's).
    #[must_use]
    pub fn before(mut self, file: Self) -> Self {
        // An address without an interface is for the one that boots, whatever the file says of it.
        self.interfaces.extend(file.interfaces);
        let names: Vec<String> = self.vlans.iter().map(|vlan| vlan.name.clone()).collect();
        self.vlans.extend(file.vlans.into_iter().filter(|vlan| !names.contains(&vlan.name)));
        let names: Vec<String> = self.bonds.iter().map(|bond| bond.name.clone()).collect();
        self.bonds.extend(file.bonds.into_iter().filter(|bond| !names.contains(&bond.name)));
        self.dns.extend(file.dns);
        self.search.extend(file.search);
        Self {
            is_off: self.is_off,
            others: self.others.or(file.others),
            mtu: self.mtu.or(file.mtu),
            ..self
        }
    }

    /// Whether a driver's name decides anything, so that it must be known.
    #[must_use]
    pub fn asks_for_drivers(&self) -> bool {
        let of_interfaces = self.interfaces.iter().map(|interface| &interface.which);
        let of_bonds = self.bonds.iter().flat_map(|bond| &bond.slaves);
        of_interfaces.chain(of_bonds).any(|which| which.driver.is_some())
    }

    /// What this interface is to do. `has_boot`: whether the command line says which one booted.
    #[must_use]
    pub fn role(&self, looks: &Looks<'_>, has_boot: bool) -> Role {
        if self.is_off {
            return Role::Leave;
        }
        let is_ours = self.bonds.iter().any(|bond| bond.name == looks.name)
            || self.vlans.iter().any(|vlan| vlan.name == looks.name);
        let bond = self.bonds.iter().find(|bond| bond.slaves.iter().any(|which| which.is(looks)));
        if let Some(bond) = bond.filter(|_| !is_ours) {
            return Role::Slave(bond.name.clone());
        }
        let wanted = |interface: &&Interface| {
            if interface.which != Match::default() {
                interface.which.is(looks)
            } else if has_boot {
                looks.is_boot
            } else {
                is_ours || !looks.is_virtual
            }
        };
        if let Some(interface) = self.interfaces.iter().find(wanted) {
            let mut ip = interface.ip.clone();
            ip.mtu = ip.mtu.or(self.own_mtu(looks.name));
            return Role::Address { ip, shared: interface.which == Match::default() };
        }
        let mtu = self.own_mtu(looks.name);
        if self.others != Some(false) && (is_ours || looks.is_boot || !looks.is_virtual) {
            return Role::Address {
                ip: Addressing { mtu, ..Addressing::automatic() },
                shared: false,
            };
        }
        match self.vlans.iter().any(|vlan| vlan.parent == looks.name) {
            true => Role::Carry { mtu },
            false => Role::Leave,
        }
    }

    fn own_mtu(&self, name: &str) -> Option<u32> {
        let bond = self.bonds.iter().find(|bond| bond.name == name);
        bond.and_then(|bond| bond.mtu).or(self.mtu)
    }
}

/// A name that Linux takes for an interface.
///
/// # Errors
/// A sentence that quotes it.
pub(crate) fn interface_name(name: &str) -> Result<String, String> {
    let good = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%' | b'*');
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.bytes().all(good)
    {
        return Err(format!(
            "`{name}` cannot be an interface: 1 to {MAX_NAME} letters, no / : % *"
        ));
    }
    Ok(name.to_owned())
}

/// An MTU in bytes.
///
/// # Errors
/// A sentence that quotes it.
pub(crate) fn mtu(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|mtu| (MIN_MTU..=MAX_MTU).contains(mtu));
    number.ok_or_else(|| format!("`{text}` is no MTU: {MIN_MTU} to {MAX_MTU} bytes"))
}

/// A search domain: labels of letters, digits and hyphens (RFC 1123 section 2.1), at most 253 bytes.
///
/// # Errors
/// A sentence that quotes it.
pub(crate) fn domain(text: &str) -> Result<String, String> {
    let label = |part: &str| {
        (1..=63).contains(&part.len())
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let name = text.trim_end_matches('.').to_ascii_lowercase();
    match name.len() <= 253 && name.split('.').all(label) {
        true => Ok(name),
        false => Err(format!("`{text}` is no domain")),
    }
}

/// An IPv4 or IPv6 address, the latter with or without brackets.
///
/// # Errors
/// A sentence that quotes it.
pub(crate) fn address(text: &str) -> Result<IpAddr, String> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    bare.parse().map_err(|_| format!("`{text}` is not an IP address"))
}

/// A way to name an interface: by its address if it is one, else by its name.
///
/// # Errors
/// A sentence that quotes it.
pub(crate) fn matching(text: &str) -> Result<Match, String> {
    if let Ok(mac) = text.parse() {
        return Ok(Match { mac: Some(mac), ..Match::default() });
    }
    let name = interface_name(text.strip_suffix('*').unwrap_or(text))?;
    Ok(Match::name(if text.ends_with('*') { text } else { &name }))
}

#[cfg(test)]
mod tests;
