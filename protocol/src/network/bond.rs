//! Bonds and their options, as the kernel's `Documentation/networking/bonding.rst` names them, with the numbers that
//! netlink has for them (`include/uapi/linux/if_link.h`, `IFLA_BOND_*`).

use std::fmt;

use super::Match;

/// Most options of one bond.
const MAX_OPTIONS: usize = 32;
/// How often the kernel looks whether slaves have a carrier, in milliseconds, where nothing is said. The kernel's own
/// default, never, leaves a bond with a dead cable.
const MIIMON_MS: u32 = 100;

/// Several interfaces as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bond {
    /// The name of the new interface.
    pub name: String,
    /// Which interfaces are parts of it. They are taken as they appear.
    pub slaves: Vec<Match>,
    /// Its options, `mode` first. Never empty.
    pub options: Vec<BondOption>,
    /// The slave that is used when it can be (`primary=`).
    pub primary: Option<String>,
    /// Its MTU in bytes, and that of its slaves.
    pub mtu: Option<u32>,
}

/// One option: a number of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BondOption {
    /// What it is.
    pub kind: &'static Kind,
    /// Its value.
    pub value: u32,
}

/// What an option can be.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// As people call it.
    pub name: &'static str,
    /// As netlink calls it.
    pub attribute: u16,
    /// Bytes of its value in netlink: 1 or 4.
    pub width: usize,
    /// Names of its values, from 0; none for a plain number.
    words: &'static [&'static str],
}

const fn kind(
    name: &'static str,
    attribute: u16,
    width: usize,
    words: &'static [&'static str],
) -> Kind {
    Kind { name, attribute, width, words }
}

/// Every option that is known; the mode comes first, because the kernel checks the others against it.
static KINDS: [Kind; 13] = [
    kind(
        "mode",
        1,
        1,
        &[
            "balance-rr",
            "active-backup",
            "balance-xor",
            "broadcast",
            "802.3ad",
            "balance-tlb",
            "balance-alb",
        ],
    ),
    kind("miimon", 3, 4, &[]),
    kind("updelay", 4, 4, &[]),
    kind("downdelay", 5, 4, &[]),
    kind("primary_reselect", 12, 1, &["always", "better", "failure"]),
    kind("fail_over_mac", 13, 1, &["none", "active", "follow"]),
    kind(
        "xmit_hash_policy",
        14,
        1,
        &["layer2", "layer3+4", "layer2+3", "encap2+3", "encap3+4", "vlan+srcmac"],
    ),
    kind("resend_igmp", 15, 4, &[]),
    kind("num_grat_arp", 16, 1, &[]),
    kind("min_links", 18, 4, &[]),
    kind("lp_interval", 19, 4, &[]),
    kind("lacp_rate", 21, 1, &["slow", "fast"]),
    kind("ad_select", 22, 1, &["stable", "bandwidth", "count"]),
];

impl Kind {
    /// # Errors
    /// What was expected.
    fn value(&'static self, text: &str) -> Result<u32, String> {
        if let Some(at) = self.words.iter().position(|word| *word == text) {
            return u32::try_from(at).map_err(|error| error.to_string());
        }
        let number = text.parse().ok().filter(|number: &u32| {
            let fits = self.words.is_empty() || (*number as usize) < self.words.len();
            fits && (self.width == 4 || *number <= u32::from(u8::MAX))
        });
        number.ok_or_else(|| match self.words {
            [] => format!("{}: `{text}` is not a number that fits", self.name),
            words => format!("{}: `{text}` is none of {}", self.name, words.join(", ")),
        })
    }
}

impl fmt::Display for BondOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind.words.get(self.value as usize) {
            Some(word) => write!(f, "{}={word}", self.kind.name),
            None => write!(f, "{}={}", self.kind.name, self.value),
        }
    }
}

/// The options of a bond while they are read.
#[derive(Debug, Default)]
pub(crate) struct Options {
    found: Vec<BondOption>,
    primary: Option<String>,
}

impl Options {
    /// Takes an option.
    ///
    /// # Errors
    /// What is wrong with it; it is left out then.
    pub(crate) fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        if name == "primary" {
            self.primary = Some(super::interface_name(value)?);
            return Ok(());
        }
        let Some(kind) = KINDS.iter().find(|kind| kind.name == name) else {
            let known: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
            return Err(format!("`{name}` is no option of a bond: primary, {}", known.join(", ")));
        };
        let value = kind.value(value)?;
        self.found.retain(|option| option.kind.name != name);
        if self.found.len() < MAX_OPTIONS {
            self.found.push(BondOption { kind, value });
        }
        Ok(())
    }

    /// Whether there is an option of this name.
    pub(crate) fn knows(name: &str) -> bool {
        name == "primary" || KINDS.iter().any(|kind| kind.name == name)
    }

    /// The bond with these options, in the order in which the kernel wants them.
    pub(crate) fn into_bond(mut self, name: String, slaves: Vec<Match>, mtu: Option<u32>) -> Bond {
        for (name, value) in [("mode", 0), ("miimon", MIIMON_MS)] {
            let kind = KINDS.iter().find(|kind| kind.name == name);
            if let Some(kind) = kind.filter(|_| self.found.iter().all(|o| o.kind.name != name)) {
                self.found.push(BondOption { kind, value });
            }
        }
        self.found.sort_by_key(|option| KINDS.iter().position(|kind| kind == option.kind));
        Bond { name, slaves, options: self.found, primary: self.primary, mtu }
    }
}
