//! Router advertisements (RFC 4861 section 4.2) with name servers and search domains (RFC 8106). Pure.
//!
//! Addresses, routes and the MTU are the kernel's work; this reads what it leaves to others: whether DHCPv6 is to be
//! had, and who resolves names. As with DHCP, it is a hint from an untrusted network.

use std::net::Ipv6Addr;

use super::message::host_name;

/// ICMPv6's type of a router advertisement.
pub const ADVERTISEMENT: u8 = 134;
/// A router solicitation without options; the kernel fills in the checksum of raw ICMPv6 sockets (RFC 3542 section 3.1).
pub const SOLICITATION: [u8; 8] = [133, 0, 0, 0, 0, 0, 0, 0];
/// Length of an advertisement's fixed part, in bytes.
const HEADER: usize = 16;
/// Options come in units of so many bytes.
const UNIT: usize = 8;
/// Most name servers, and most domains, that are read from one advertisement.
const MAX_NAMES: usize = 8;
/// Recursive DNS servers.
const RDNSS: u8 = 25;
/// DNS search list.
const DNSSL: u8 = 31;

/// What a router says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Advertisement {
    /// Addresses are to be had by DHCPv6 (M).
    pub managed: bool,
    /// Other things are to be had by DHCPv6 (O).
    pub other: bool,
    /// Name servers, each with how long it may be used, in seconds.
    pub servers: Vec<(Ipv6Addr, u32)>,
    /// Search domains, each with how long it may be used, in seconds.
    pub domains: Vec<(String, u32)>,
}

/// Reads an ICMPv6 message; `None` if it is no advertisement. Options that make no sense are left out.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Advertisement> {
    let (header, mut rest) = bytes.split_at_checked(HEADER)?;
    let [ADVERTISEMENT, 0, _, _, _, flags, ..] = *header else { return None };
    let mut found = Advertisement {
        managed: flags & 0x80 != 0,
        other: flags & 0x40 != 0,
        ..Advertisement::default()
    };
    while let [kind, units, ..] = *rest {
        let Some((option, after)) = rest.split_at_checked(usize::from(units) * UNIT) else { break };
        // Of no length: no option can follow (section 4.6).
        if units == 0 {
            break;
        }
        rest = after;
        let [_, _, _, _, a, b, c, d, names @ ..] = option else { continue };
        let lifetime = u32::from_be_bytes([*a, *b, *c, *d]);
        match kind {
            RDNSS => found.servers.extend(servers(names).map(|server| (server, lifetime))),
            DNSSL => found.domains.extend(domains(names).into_iter().map(|name| (name, lifetime))),
            _ => {}
        }
    }
    found.servers.truncate(MAX_NAMES);
    found.domains.truncate(MAX_NAMES);
    Some(found)
}

/// IPv6 addresses one after the other, those that a host can have.
pub(super) fn servers(bytes: &[u8]) -> impl Iterator<Item = Ipv6Addr> + '_ {
    let (chunks, _) = bytes.as_chunks::<16>();
    let addresses = chunks.iter().map(|chunk| Ipv6Addr::from(*chunk)).take(MAX_NAMES);
    addresses.filter(|a| !a.is_multicast() && !a.is_unspecified() && !a.is_loopback())
}

/// Names one after the other as DNS writes them (RFC 1035 section 3.1), without compression, padded with zeros.
pub(super) fn domains(mut bytes: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let mut name: Vec<u8> = Vec::new();
    while let [len, rest @ ..] = bytes {
        let Some((label, after)) = rest.split_at_checked(usize::from(*len)) else { break };
        bytes = after;
        if *len > 0 {
            name.extend_from_slice(label);
            name.push(b'.');
            continue;
        }
        // Dots in labels would make other names of them; `host_name` has no way to tell, but no way to be hurt either.
        if found.len() < MAX_NAMES
            && let Some(good) = host_name(&name)
        {
            found.push(good);
        }
        name.clear();
    }
    found
}

/// For fuzzers: reads arbitrary bytes as an advertisement.
pub fn fuzz_advertisement(bytes: &[u8]) {
    let _ = decode(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advertisement(flags: u8, options: &[&[u8]]) -> Option<Advertisement> {
        let mut bytes = vec![134, 0, 0, 0, 64, flags, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(options.concat());
        decode(&bytes)
    }

    fn server(last: u8) -> [u8; 16] {
        [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]
    }

    #[test]
    fn flags_name_servers_and_domains_are_read() {
        let rdnss = [&[25, 5, 0, 0, 0, 0, 1, 44][..], &server(1), &server(2)].concat();
        let dnssl = b"\x1f\x03\0\0\0\0\0\x3c\x03lab\x01x\0\x02a\n\0\0\0\0\0\0";
        let found = advertisement(0xc0, &[&[5, 1, 0, 0, 0, 0, 5, 220], &rdnss, dnssl]).expect("ra");
        assert!(found.managed && found.other);
        let addresses: Vec<_> = found.servers.iter().map(|(a, t)| (a.to_string(), *t)).collect();
        assert_eq!(addresses, [("fd00::1".to_owned(), 300), ("fd00::2".to_owned(), 300)]);
        assert_eq!(found.domains, [("lab.x".to_owned(), 60)], "a name with a line end is left out");
    }

    #[test]
    fn torn_options_end_the_reading_and_others_are_no_advertisement() {
        let rdnss = [&[25, 3, 0, 0, 0, 0, 1, 44][..], &server(1)].concat();
        let found = advertisement(0x40, &[&rdnss, &[25, 9, 0, 0, 0, 0, 0, 1]]).expect("ra");
        assert_eq!((found.managed, found.other, found.servers.len()), (false, true, 1));
        assert_eq!(advertisement(0, &[&[25, 0], &rdnss]), Some(Advertisement::default()));
        assert_eq!(decode(&SOLICITATION), None);
        assert_eq!(decode(&[135; 40]), None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(
            mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
            kind in proptest::sample::select(&[25_u8, 31, 3][..]),
        ) {
            fuzz_advertisement(&bytes);
            if bytes.len() > 18 {
                (bytes[0], bytes[1], bytes[16], bytes[17]) = (134, 0, kind, bytes[17] % 8);
            }
            fuzz_advertisement(&bytes);
        }
    }
}
