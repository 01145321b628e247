//! DHCPv4 messages as the client writes and reads them (RFC 2131, RFC 2132). Pure.
//!
//! A server's answer is a hint from an untrusted network: addresses are checked for sense, names for their alphabet,
//! and static routes (options 33, 121 and 249) are not read at all, so that nobody can pull traffic aside with them.

use std::net::Ipv4Addr;
use std::time::Duration;

use dhcproto::v4::{Flags, HType, MAGIC, MessageType, Opcode, OptionCode, borrowed};
use protocol::ids::Mac;

/// Length of an Ethernet address.
const ETHERNET_LEN: u8 = 6;
/// Shortest message that old relays pass on, in bytes (RFC 1542 section 2.1).
const MIN_MESSAGE: usize = 300;
/// Longest answer that we take, in bytes: one Ethernet frame.
const MAX_MESSAGE: u16 = 1472;
/// Smallest MTU that is believed, in bytes (RFC 791: every host takes 576).
const MIN_MTU: u16 = 576;
/// Most addresses read from one option.
const MAX_ADDRESSES: usize = 8;
/// What we call ourselves (option 60).
const VENDOR_CLASS: &[u8] = b"layercake";

/// What the server is asked to tell (option 55).
const WANTED: [OptionCode; 11] = [
    OptionCode::SubnetMask,
    OptionCode::Router,
    OptionCode::DomainNameServer,
    OptionCode::Hostname,
    OptionCode::DomainName,
    OptionCode::InterfaceMtu,
    OptionCode::NtpServers,
    OptionCode::AddressLeaseTime,
    OptionCode::ServerIdentifier,
    OptionCode::Renewal,
    OptionCode::Rebinding,
];

/// What an interface is on its link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Station {
    /// Ethernet.
    Ethernet(Mac),
    /// IP over InfiniBand (RFC 4391): flags, queue pair and GID; and the address of every station, which holds the partition.
    Infiniband {
        /// Its own address.
        address: [u8; 20],
        /// That of all.
        everyone: [u8; 20],
    },
}

impl Station {
    /// The Ethernet address; for InfiniBand the one that is made of the port's GUID by leaving its middle out, as drivers do.
    #[must_use]
    pub fn mac(&self) -> Mac {
        match self {
            Self::Ethernet(mac) => *mac,
            Self::Infiniband { address: [.., a, b, c, _, _, d, e, f], .. } => {
                Mac([*a, *b, *c, *d, *e, *f])
            }
        }
    }

    /// The address of every station on the link.
    #[must_use]
    pub fn everyone(&self) -> &[u8] {
        match self {
            Self::Ethernet(_) => &[0xff; 6],
            Self::Infiniband { everyone, .. } => everyone,
        }
    }

    /// Option 61: type and address (RFC 2132 section 9.14). On InfiniBand an identifier of RFC 4361, as RFC 4390 wants it:
    /// the low bytes of the port's GUID for the interface, and a DUID of the GUID, which unlike the queue pair lasts.
    fn client_id(&self) -> Vec<u8> {
        match self {
            Self::Ethernet(mac) => [&[1][..], &mac.0].concat(),
            Self::Infiniband { address: [.., a, b, c, d, e, f, g, h], .. } => {
                let guid = [*a, *b, *c, *d, *e, *f, *g, *h];
                [&[255, *e, *f, *g, *h][..], &[0, 3, 0, 32], &guid].concat()
            }
        }
    }
}

/// What is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// DISCOVER, REQUEST or RELEASE.
    pub kind: MessageType,
    /// Transaction.
    pub xid: u32,
    /// Since this transaction began.
    pub elapsed: Duration,
    /// Our address, when renewing or rebinding.
    pub ciaddr: Ipv4Addr,
    /// Option 50.
    pub requested: Option<Ipv4Addr>,
    /// Option 54.
    pub server: Option<Ipv4Addr>,
}

impl Outgoing {
    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self, station: &Station) -> Vec<u8> {
        let mut bytes = self.header(station);
        bytes.extend(MAGIC);
        put(&mut bytes, OptionCode::MessageType, &[self.kind.into()]);
        if let Some(address) = self.requested {
            put(&mut bytes, OptionCode::RequestedIpAddress, &address.octets());
        }
        if let Some(server) = self.server {
            put(&mut bytes, OptionCode::ServerIdentifier, &server.octets());
        }
        put(&mut bytes, OptionCode::ParameterRequestList, &WANTED.map(u8::from));
        put(&mut bytes, OptionCode::MaxMessageSize, &MAX_MESSAGE.to_be_bytes());
        put(&mut bytes, OptionCode::ClassIdentifier, VENDOR_CLASS);
        put(&mut bytes, OptionCode::ClientIdentifier, &station.client_id());
        bytes.push(OptionCode::End.into());
        if bytes.len() < MIN_MESSAGE {
            bytes.resize(MIN_MESSAGE, 0);
        }
        bytes
    }

    /// All before the options (RFC 2131 section 2). The codec's own message begins with a random number for a transaction that
    /// is not this one, which costs a boot more than the rest of the message; its options cost as much once more.
    fn header(&self, station: &Station) -> Vec<u8> {
        /// `yiaddr`, `siaddr` and `giaddr`.
        const OTHER_ADDRESSES: usize = 12;
        /// `chaddr`, `sname` and `file`.
        const NAMES: usize = 16 + 64 + 128;
        // RFC 4390 section 2.1: InfiniBand has no hardware address here, and wants answers to everyone while there is no address
        // to answer to.
        let (htype, address): (_, &[u8]) = match station {
            Station::Ethernet(mac) => (HType::Eth, &mac.0),
            Station::Infiniband { .. } => (HType::Infiniband, &[]),
        };
        let flags = match address.is_empty() && self.ciaddr.is_unspecified() {
            true => Flags::default().set_broadcast(),
            false => Flags::default(),
        };
        let secs = u16::try_from(self.elapsed.as_secs()).unwrap_or(u16::MAX);
        let hlen = if address.is_empty() { 0 } else { ETHERNET_LEN };
        let mut bytes = Vec::with_capacity(MIN_MESSAGE);
        bytes.extend([Opcode::BootRequest.into(), htype.into(), hlen, 0]);
        bytes.extend(self.xid.to_be_bytes());
        bytes.extend(secs.to_be_bytes());
        bytes.extend(u16::from(flags).to_be_bytes());
        bytes.extend(self.ciaddr.octets());
        bytes.extend([0; OTHER_ADDRESSES]);
        bytes.extend(address);
        bytes.resize(bytes.len() + NAMES - address.len(), 0);
        bytes
    }
}

/// Adds an option of less than 256 bytes (RFC 2132 section 2).
fn put(bytes: &mut Vec<u8>, code: OptionCode, data: &[u8]) {
    let length = u8::try_from(data.len()).unwrap_or(u8::MAX);
    bytes.extend([code.into(), length]);
    bytes.extend(data.iter().take(length.into()));
}

/// What an interface is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The address.
    pub address: Ipv4Addr,
    /// Length of the network prefix in bits.
    pub prefix_len: u8,
    /// The default gateway.
    pub router: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Time servers.
    pub ntp: Vec<Ipv4Addr>,
    /// The search domain.
    pub domain: Option<String>,
    /// The host name.
    pub hostname: Option<String>,
    /// The MTU in bytes, at least 576.
    pub mtu: Option<u16>,
}

/// How long a grant is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// T1: when to ask the same server again.
    pub renew: Duration,
    /// T2: when to ask any server.
    pub rebind: Duration,
    /// When the address must not be used any more.
    pub lease: Duration,
}

/// A server's answer, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// OFFER.
    Offer {
        /// Who offers.
        server: Ipv4Addr,
        /// The address.
        address: Ipv4Addr,
    },
    /// ACK.
    Ack {
        /// Who grants.
        server: Ipv4Addr,
        /// What.
        grant: Grant,
        /// For how long.
        times: Times,
    },
    /// NAK.
    Nak {
        /// Who refuses, if it says so.
        server: Option<Ipv4Addr>,
        /// Why, if it says so: printable, shortened.
        reason: String,
    },
}

/// Reads an answer to this interface. Returns its transaction too; `None` for everything else.
#[must_use]
pub fn decode(bytes: &[u8], station: &Station) -> Option<(u32, Answer)> {
    let (htype, address): (_, &[u8]) = match station {
        Station::Ethernet(mac) => (HType::Eth, &mac.0),
        // Whose it is only the transaction says.
        Station::Infiniband { .. } => (HType::Infiniband, &[]),
    };
    // The parser slices chaddr by hlen unchecked, so hlen is looked at before anything else.
    let hlen = *bytes.get(2)?;
    if usize::from(hlen) != address.len() || hlen > ETHERNET_LEN {
        return None;
    }
    let message = borrowed::Message::new(bytes).ok()?;
    if message.opcode() != Opcode::BootReply
        || message.htype() != htype
        || message.chaddr() != address
    {
        return None;
    }
    let options = Options::collect(&message);
    let address = message.yiaddr();
    let answer = match options.kind? {
        MessageType::Offer => Answer::Offer { server: options.server?, address: host(address)? },
        MessageType::Ack => Answer::Ack {
            server: options.server?,
            times: options.times()?,
            grant: options.into_grant(host(address)?)?,
        },
        MessageType::Nak => {
            Answer::Nak { server: options.server, reason: options.reason.unwrap_or_default() }
        }
        _ => return None,
    };
    Some((message.xid(), answer))
}

#[derive(Default)]
struct Options {
    kind: Option<MessageType>,
    server: Option<Ipv4Addr>,
    mask: Option<Ipv4Addr>,
    router: Option<Ipv4Addr>,
    dns: Vec<Ipv4Addr>,
    ntp: Vec<Ipv4Addr>,
    domain: Option<String>,
    hostname: Option<String>,
    mtu: Option<u16>,
    lease: Option<u32>,
    renew: Option<u32>,
    rebind: Option<u32>,
    reason: Option<String>,
}

impl Options {
    fn collect(message: &borrowed::Message<'_>) -> Self {
        let mut options = Self::default();
        for option in message.opts() {
            let data = option.data();
            match u8::from(option.code()) {
                1 => options.mask = addresses(data).first().copied(),
                3 => options.router = addresses(data).into_iter().find_map(host),
                6 => options.dns = addresses(data).into_iter().filter_map(host).collect(),
                12 => options.hostname = host_name(data),
                15 => options.domain = host_name(data),
                26 => {
                    options.mtu = <[u8; 2]>::try_from(data)
                        .ok()
                        .map(u16::from_be_bytes)
                        .filter(|mtu| *mtu >= MIN_MTU);
                }
                42 => options.ntp = addresses(data).into_iter().filter_map(host).collect(),
                51 => options.lease = seconds(data),
                53 => {
                    options.kind =
                        data.first().filter(|_| data.len() == 1).map(|b| MessageType::from(*b));
                }
                54 => options.server = addresses(data).first().copied().and_then(host),
                56 => {
                    let text = String::from_utf8_lossy(data);
                    options.reason =
                        Some(text.chars().filter(|c| !c.is_control()).take(80).collect());
                }
                58 => options.renew = seconds(data),
                59 => options.rebind = seconds(data),
                _ => {}
            }
        }
        options
    }

    /// RFC 2131 section 4.4.5: T1 is half of the lease and T2 seven eighths, unless sensible values are given.
    fn times(&self) -> Option<Times> {
        let lease = self.lease.filter(|lease| *lease > 0)?;
        let rebind = self.rebind.filter(|t2| *t2 > 0 && *t2 < lease).unwrap_or(lease - lease / 8);
        let renew =
            self.renew.filter(|t1| *t1 > 0 && *t1 < rebind).unwrap_or(lease / 2).min(rebind);
        let duration = |seconds: u32| Duration::from_secs(u64::from(seconds));
        Some(Times { renew: duration(renew), rebind: duration(rebind), lease: duration(lease) })
    }

    fn into_grant(self, address: Ipv4Addr) -> Option<Grant> {
        let prefix_len = match self.mask {
            Some(mask) => {
                let bits = u32::from(mask);
                let ones = bits.leading_ones();
                if ones == 0 || bits.checked_shl(ones).unwrap_or(0) != 0 {
                    return None;
                }
                u8::try_from(ones).ok()?
            }
            // Without option 1 the class decides (RFC 950).
            None => match address.octets() {
                [0..=127, ..] => 8,
                [128..=191, ..] => 16,
                _ => 24,
            },
        };
        Some(Grant {
            address,
            prefix_len,
            router: self.router.filter(|router| *router != address),
            dns: self.dns,
            ntp: self.ntp,
            domain: self.domain,
            hostname: self.hostname,
            mtu: self.mtu,
        })
    }
}

fn seconds(data: &[u8]) -> Option<u32> {
    <[u8; 4]>::try_from(data).ok().map(u32::from_be_bytes)
}

fn addresses(data: &[u8]) -> Vec<Ipv4Addr> {
    data.chunks_exact(4)
        .filter_map(|chunk| <[u8; 4]>::try_from(chunk).ok())
        .map(Ipv4Addr::from)
        .take(MAX_ADDRESSES)
        .collect()
}

/// An address that a host can have.
fn host(address: Ipv4Addr) -> Option<Ipv4Addr> {
    let [first, ..] = address.octets();
    (first != 0 && first != 127 && first < 224).then_some(address)
}

/// A name that is safe in `/etc/hosts` and `/etc/resolv.conf`: RFC 1123 letters only, lower case.
pub(super) fn host_name(data: &[u8]) -> Option<String> {
    let end = data.iter().rposition(|byte| *byte != 0 && *byte != b'.')?;
    let name = data.get(..=end)?.to_ascii_lowercase();
    let label = |part: &[u8]| {
        (1..=63).contains(&part.len())
            && part.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
            && part.first() != Some(&b'-')
            && part.last() != Some(&b'-')
    };
    if name.len() > 253 || !name.split(|byte| *byte == b'.').all(label) {
        return None;
    }
    String::from_utf8(name).ok()
}

/// For fuzzers: reads arbitrary bytes as an answer.
pub fn fuzz_answer(bytes: &[u8]) {
    let mac = bytes.get(28..34).and_then(|mac| mac.try_into().ok()).unwrap_or([0; 6]);
    let _ = decode(bytes, &Station::Ethernet(Mac(mac)));
    let _ = decode(bytes, &Station::Infiniband { address: [0; 20], everyone: [0; 20] });
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

    fn ack(options: &[(u8, &[u8])]) -> Option<(u32, Answer)> {
        let mut bytes = vec![0; 236];
        bytes[..8].copy_from_slice(&[2, 1, 6, 0, 0, 0, 0, 9]);
        bytes[16..20].copy_from_slice(&[10, 9, 0, 5]);
        bytes[28..34].copy_from_slice(&MAC.0);
        bytes.extend([99, 130, 83, 99, 53, 1, 5, 54, 4, 10, 9, 0, 1]);
        for (code, data) in options {
            bytes.extend([*code, u8::try_from(data.len()).expect("short")]);
            bytes.extend_from_slice(data);
        }
        bytes.push(255);
        decode(&bytes, &Station::Ethernet(MAC))
    }

    #[test]
    fn an_ack_is_read_and_bad_parts_are_left_out() {
        let (xid, answer) = ack(&[
            (51, &[0, 0, 0, 80]),
            (1, &[255, 255, 255, 0]),
            (3, &[10, 9, 0, 1]),
            (6, &[0, 0, 0, 0, 10, 9, 0, 2]),
            (12, b"n1\nevil"),
            (15, b"Lab.Example."),
            (26, &[1, 0]),
            (121, &[0, 10, 9, 0, 66]),
        ])
        .expect("an ack");
        let Answer::Ack { server, grant, times } = answer else { panic!("{answer:?}") };
        assert_eq!((xid, server), (9, Ipv4Addr::new(10, 9, 0, 1)));
        assert_eq!((grant.prefix_len, grant.router), (24, Some(server)));
        assert_eq!(grant.dns, [Ipv4Addr::new(10, 9, 0, 2)]);
        assert_eq!((grant.hostname, grant.mtu), (None, None));
        assert_eq!(grant.domain.as_deref(), Some("lab.example"));
        let seconds = [times.renew, times.rebind, times.lease].map(|t| t.as_secs());
        assert_eq!(seconds, [40, 70, 80]);
    }

    #[test]
    fn infiniband_has_no_hardware_address_and_an_identifier_of_its_own() {
        let mut address = [0; 20];
        address[12..].copy_from_slice(&[0, 2, 0xc9, 3, 0, 0x11, 0x22, 0x33]);
        let station = Station::Infiniband { address, everyone: [0xff; 20] };
        assert_eq!(station.mac(), Mac([0, 2, 0xc9, 0x11, 0x22, 0x33]));
        let mut outgoing = Outgoing {
            kind: MessageType::Discover,
            xid: 9,
            elapsed: Duration::ZERO,
            ciaddr: Ipv4Addr::UNSPECIFIED,
            requested: None,
            server: None,
        };
        let bytes = outgoing.encode(&station);
        assert_eq!(bytes[..4], [1, 32, 0, 0]);
        assert_eq!((bytes[10], &bytes[28..44]), (0x80, &[0; 16][..]), "broadcast, no chaddr");
        let message = borrowed::Message::new(&bytes).expect("readable");
        let id = message.opts().find(|option| u8::from(option.code()) == 61).expect("option 61");
        let expected = [255, 0, 0x11, 0x22, 0x33, 0, 3, 0, 32, 0, 2, 0xc9, 3, 0, 0x11, 0x22, 0x33];
        assert_eq!(id.data(), expected);
        outgoing.ciaddr = Ipv4Addr::new(10, 9, 0, 5);
        assert_eq!(outgoing.encode(&station)[10], 0, "renewals are answered to the address");

        let mut answer = bytes;
        (answer[0], answer[242]) = (2, 6);
        assert_eq!(answer[240..243], [53, 1, 6]);
        let (xid, nak) = decode(&answer, &station).expect("a NAK");
        assert_eq!(xid, 9);
        assert!(matches!(nak, Answer::Nak { .. }));
        assert_eq!(decode(&answer, &Station::Ethernet(MAC)), None);
        answer[2] = 20;
        assert_eq!(decode(&answer, &station), None, "no such length");
    }

    #[test]
    fn an_ack_without_lease_time_or_with_a_torn_mask_is_dropped() {
        assert_eq!(ack(&[]), None);
        assert_eq!(ack(&[(51, &[0, 0, 0, 0])]), None);
        assert_eq!(ack(&[(51, &[0, 0, 0, 9]), (1, &[255, 0, 255, 0])]), None);
    }

    #[test]
    fn silly_timers_are_replaced() {
        let (_, answer) =
            ack(&[(51, &[0, 0, 0, 8]), (58, &[0, 0, 1, 0]), (59, &[0, 0, 2, 0])]).expect("ack");
        let Answer::Ack { times, .. } = answer else { panic!("{answer:?}") };
        let seconds = [times.renew, times.rebind, times.lease].map(|t| t.as_secs());
        assert_eq!(seconds, [4, 7, 8]);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(
            mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600),
            kind in 0_u8..10,
        ) {
            fuzz_answer(&bytes);
            if bytes.len() > 243 {
                bytes[..3].copy_from_slice(&[2, 1, 6]);
                bytes[236..243].copy_from_slice(&[99, 130, 83, 99, 53, 1, kind]);
            }
            fuzz_answer(&bytes);
        }
    }
}
