//! IPv4 and UDP headers around a DHCP message, for a node that has no address yet. Pure.

use std::net::Ipv4Addr;

/// UDP port of DHCP servers.
pub const SERVER_PORT: u16 = 67;
/// UDP port of DHCP clients.
pub const CLIENT_PORT: u16 = 68;
/// Length of an IPv4 header without options, in bytes.
const IP_HEADER: usize = 20;
/// Length of a UDP header, in bytes.
const UDP_HEADER: usize = 8;
/// Protocol number of UDP.
const UDP: u8 = 17;
/// Time to live of what we send, in hops.
const TTL: u8 = 64;

/// The one's complement sum of RFC 1071, folded.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut total: u32 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            let high = pair.first().copied().unwrap_or(0);
            let low = pair.get(1).copied().unwrap_or(0);
            total += u32::from(u16::from_be_bytes([high, low]));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap_or(u16::MAX)
}

/// Puts a DHCP message from a client into a datagram to a server. `None` if it is too long for one.
#[must_use]
pub fn wrap(payload: &[u8], source: Ipv4Addr, destination: Ipv4Addr) -> Option<Vec<u8>> {
    let udp_len = u16::try_from(payload.len() + UDP_HEADER).ok()?;
    let total = u16::try_from(payload.len() + UDP_HEADER + IP_HEADER).ok()?;
    let (s, d) = (source.octets(), destination.octets());
    let [len_high, len_low] = total.to_be_bytes();
    let mut ip = vec![0x45, 0, len_high, len_low, 0, 0, 0x40, 0, TTL, UDP, 0, 0];
    ip.extend_from_slice(&s);
    ip.extend_from_slice(&d);
    let check = (!sum(&[&ip])).to_be_bytes();
    if let Some(field) = ip.get_mut(10..12) {
        field.copy_from_slice(&check);
    }
    let mut udp = Vec::with_capacity(UDP_HEADER);
    for field in [CLIENT_PORT, SERVER_PORT, udp_len] {
        udp.extend_from_slice(&field.to_be_bytes());
    }
    let [udp_high, udp_low] = udp_len.to_be_bytes();
    let pseudo = [0, UDP, udp_high, udp_low];
    // The whole ends on the payload, the only part that may have odd length.
    let check = match !sum(&[&s, &d, &pseudo, &udp, payload]) {
        0 => 0xffff_u16,
        other => other,
    };
    udp.extend_from_slice(&check.to_be_bytes());
    Some([ip.as_slice(), &udp, payload].concat())
}

/// The DHCP message in a received IPv4 packet, if it is one from a server to a client. UDP's checksum is not looked at:
/// with offloading it is not filled in yet on virtual links.
#[must_use]
pub fn unwrap(packet: &[u8]) -> Option<&[u8]> {
    let first = *packet.first()?;
    let header = usize::from(first & 0x0f) * 4;
    if first >> 4 != 4 || header < IP_HEADER {
        return None;
    }
    let word =
        |bytes: &[u8], at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let fragment = word(packet, 6)?;
    if *packet.get(9)? != UDP || fragment & 0x3fff != 0 {
        return None;
    }
    let datagram = packet.get(header..usize::from(word(packet, 2)?))?;
    if word(datagram, 0)? != SERVER_PORT || word(datagram, 2)? != CLIENT_PORT {
        return None;
    }
    datagram.get(UDP_HEADER..usize::from(word(datagram, 4)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn swapped_ports(mut packet: Vec<u8>) -> Vec<u8> {
        packet.swap(21, 23);
        packet
    }

    #[test]
    fn what_is_wrapped_has_good_checksums_and_unwraps() {
        for payload in [&b"even"[..], b"odd"] {
            let packet = wrap(payload, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST).expect("short");
            assert_eq!(sum(&[&packet[..20]]), 0xffff);
            let len = u16::try_from(payload.len() + 8).expect("short").to_be_bytes();
            let pseudo = [0, 17, len[0], len[1]];
            assert_eq!(sum(&[&packet[12..20], &pseudo, &packet[20..]]), 0xffff);
            assert_eq!(unwrap(&packet), None, "not from a server");
            let mut padded = swapped_ports(packet);
            padded.extend([0; 9]);
            assert_eq!(unwrap(&padded), Some(payload));
        }
    }

    #[test]
    fn fragments_and_cut_packets_are_dropped() {
        let packet =
            swapped_ports(wrap(b"abc", Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST).expect("short"));
        for len in 0..packet.len() {
            assert_eq!(unwrap(&packet[..len]), None, "{len}");
        }
        let mut fragment = packet;
        fragment[7] = 1;
        assert_eq!(unwrap(&fragment), None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_unwrap_panic(
            mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80),
        ) {
            let _ = unwrap(&bytes);
            if bytes.len() > 10 {
                (bytes[0], bytes[2], bytes[6], bytes[7], bytes[9]) = (0x45, 0, 0, 0, 17);
            }
            let _ = unwrap(&bytes);
        }
    }
}
