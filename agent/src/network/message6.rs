//! DHCPv6 messages as the client writes and reads them (RFC 8415, RFC 3646 for name servers). Pure.
//!
//! One address in one IA_NA is all that is asked for. A codec of our own, because dhcproto's, which the tests hold this
//! one against, reads every option there is and would be several times as large in the image; as in IPv4, an option that
//! makes no sense is left out and hides no other.

use std::net::Ipv6Addr;
use std::time::Duration;

use protocol::ids::Mac;

use super::advertisement::{domains, servers};

/// Longest identifier of a server that is read, in bytes (section 11.1: 128 and the type).
const MAX_DUID: usize = 130;
/// Options that are asked for: name servers and search domains.
const WISHES: [u16; 2] = [DNS_SERVERS, DOMAINS];

const CLIENT_ID: u16 = 1;
const SERVER_ID: u16 = 2;
const IA_NA: u16 = 3;
const IA_ADDRESS: u16 = 5;
const WISH_LIST: u16 = 6;
const ELAPSED: u16 = 8;
const STATUS: u16 = 13;
const RAPID_COMMIT: u16 = 14;
const DNS_SERVERS: u16 = 23;
const DOMAINS: u16 = 24;

/// Kinds of messages (section 7.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Who has addresses?
    Solicit = 1,
    /// I have.
    Advertise = 2,
    /// Give me this one.
    Request = 3,
    /// Is this address right for this link?
    Confirm = 4,
    /// Let me keep it, to the server that gave it.
    Renew = 5,
    /// Let me keep it, to every server.
    Rebind = 6,
    /// A server's answer to all but Solicit, and to that one with rapid commit.
    Reply = 7,
    /// Somebody else has this address.
    Decline = 9,
    /// No address; what else is there?
    InformationRequest = 11,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    /// What names the node (section 11).
    pub duid: Vec<u8>,
    /// What names the interface on it.
    pub iaid: u32,
}

impl Client {
    /// The client on this interface: a DUID of the link-layer address (type 3), which lasts over reboots without a disk.
    #[must_use]
    pub fn new(node: Mac, interface: &str, mac: Mac) -> Self {
        let duid = [&[0, 3, 0, 1][..], &node.0].concat();
        // FNV-1a, 32 bits: the VLANs on one interface have its address.
        let step = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        let iaid = mac.0.into_iter().chain(interface.bytes()).fold(0x811c_9dc5, step);
        Self { duid, iaid }
    }
}

/// What is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// What it is.
    pub kind: Kind,
    /// Transaction; three bytes go out.
    pub xid: u32,
    /// Since this transaction began.
    pub elapsed: Duration,
    /// The server, where the message is for one.
    pub server: Option<Vec<u8>>,
    /// The address that it is about.
    pub address: Option<Ipv6Addr>,
}

impl Outgoing {
    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self, client: &Client) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(96);
        let [_, xid @ ..] = self.xid.to_be_bytes();
        bytes.push(self.kind as u8);
        bytes.extend(xid);
        option(&mut bytes, CLIENT_ID, &client.duid);
        if let Some(server) = &self.server {
            option(&mut bytes, SERVER_ID, server);
        }
        // In hundredths of a second.
        let elapsed = u16::try_from(self.elapsed.as_millis() / 10).unwrap_or(u16::MAX);
        option(&mut bytes, ELAPSED, &elapsed.to_be_bytes());
        if self.kind == Kind::Solicit {
            option(&mut bytes, RAPID_COMMIT, &[]);
        }
        if self.kind != Kind::InformationRequest {
            // T1, T2 and the lifetimes are the server's to say.
            let mut association = [&client.iaid.to_be_bytes()[..], &[0; 8]].concat();
            if let Some(address) = self.address {
                let wanted = [&address.octets()[..], &[0; 8]].concat();
                option(&mut association, IA_ADDRESS, &wanted);
            }
            option(&mut bytes, IA_NA, &association);
        }
        if !matches!(self.kind, Kind::Decline | Kind::Confirm) {
            let wishes: Vec<u8> = WISHES.iter().flat_map(|wish| wish.to_be_bytes()).collect();
            option(&mut bytes, WISH_LIST, &wishes);
        }
        bytes
    }
}

fn option(bytes: &mut Vec<u8>, code: u16, data: &[u8]) {
    // Nothing that we send comes near this length.
    let len = u16::try_from(data.len()).unwrap_or(u16::MAX);
    bytes.extend(code.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(data.iter().take(len.into()));
}

/// An address and how long it is good; times of `u32::MAX` seconds never end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: Ipv6Addr,
    /// How long new connections may use it, in seconds.
    pub preferred: u32,
    /// How long it may be used, in seconds.
    pub valid: u32,
    /// T1: when to ask the same server again, in seconds.
    pub renew: u32,
    /// T2: when to ask any server, in seconds.
    pub rebind: u32,
}

/// A server's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// [`Kind::Advertise`] or [`Kind::Reply`].
    pub kind: Kind,
    /// Transaction.
    pub xid: u32,
    /// Who says it.
    pub server: Vec<u8>,
    /// It is final, although only advertisements were asked for.
    pub rapid: bool,
    /// The address, if there is one that is good.
    pub lease: Option<Lease>,
    /// Why not (section 21.13): the message's or the association's status, 0 for success.
    pub status: u16,
    /// Name servers.
    pub servers: Vec<Ipv6Addr>,
    /// Search domains.
    pub domains: Vec<String>,
}

/// Reads an answer to this client; `None` for everything else.
#[must_use]
pub fn decode(bytes: &[u8], client: &Client) -> Option<Answer> {
    let ([kind, xid @ ..], rest) = bytes.split_first_chunk::<4>()?;
    let kind = match kind {
        2 => Kind::Advertise,
        7 => Kind::Reply,
        _ => return None,
    };
    let [a, b, c] = *xid;
    let mut answer = Answer {
        kind,
        xid: u32::from_be_bytes([0, a, b, c]),
        server: Vec::new(),
        rapid: false,
        lease: None,
        status: 0,
        servers: Vec::new(),
        domains: Vec::new(),
    };
    let mut is_ours = false;
    for (code, data) in Options(rest) {
        match code {
            CLIENT_ID => is_ours = data == client.duid,
            SERVER_ID if data.len() <= MAX_DUID => answer.server = data.to_vec(),
            IA_NA => association(data, client.iaid, &mut answer),
            STATUS => answer.status = status(data),
            RAPID_COMMIT => answer.rapid = true,
            DNS_SERVERS => answer.servers = servers(data).collect(),
            DOMAINS => answer.domains = domains(data),
            _ => {}
        }
    }
    (is_ours && !answer.server.is_empty()).then_some(answer)
}

fn status(data: &[u8]) -> u16 {
    data.first_chunk().map_or(0, |code| u16::from_be_bytes(*code))
}

fn association(data: &[u8], iaid: u32, answer: &mut Answer) {
    let Some(([id, renew, rebind], options)) = words(data) else { return };
    if id != iaid {
        return;
    }
    for (code, data) in Options(options) {
        match code {
            STATUS if status(data) != 0 => answer.status = status(data),
            IA_ADDRESS if answer.lease.is_none() => {
                let Some((octets, rest)) = data.split_first_chunk::<16>() else { continue };
                let Some(([preferred, valid], _)) = words(rest) else { continue };
                let address = Ipv6Addr::from(*octets);
                let unusable = address.is_multicast()
                    || address.is_unspecified()
                    || address.is_loopback()
                    || address.is_unicast_link_local();
                if valid == 0 || preferred > valid || unusable {
                    continue;
                }
                answer.lease = Some(times(Lease { address, preferred, valid, renew, rebind }));
            }
            _ => {}
        }
    }
}

/// Section 14.2: where the server leaves T1 and T2 to the client, half and four fifths of the preferred lifetime.
fn times(mut lease: Lease) -> Lease {
    let base = if lease.preferred == 0 { lease.valid } else { lease.preferred };
    if base == u32::MAX {
        (lease.renew, lease.rebind) = (u32::MAX, u32::MAX);
        return lease;
    }
    if lease.rebind == 0 || lease.rebind >= lease.valid {
        lease.rebind = base - base / 5;
    }
    if lease.renew == 0 || lease.renew > lease.rebind {
        lease.renew = (base / 2).min(lease.rebind);
    }
    lease
}

/// Numbers of four bytes, and what follows them.
fn words<const N: usize>(bytes: &[u8]) -> Option<([u32; N], &[u8])> {
    let (head, rest) = bytes.split_at_checked(N * 4)?;
    let (chunks, _) = head.as_chunks::<4>();
    let mut found = [0; N];
    for (word, chunk) in found.iter_mut().zip(chunks) {
        *word = u32::from_be_bytes(*chunk);
    }
    Some((found, rest))
}

/// Options one after the other, up to the first that is cut.
struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let ([a, b, c, d], rest) = self.0.split_first_chunk::<4>()?;
        let len = usize::from(u16::from_be_bytes([*c, *d]));
        let (data, after) = rest.split_at_checked(len)?;
        self.0 = after;
        Some((u16::from_be_bytes([*a, *b]), data))
    }
}

/// For fuzzers: reads arbitrary bytes as an answer; the first six are the client's.
pub fn fuzz_answer6(bytes: &[u8]) {
    let mac = Mac(bytes.first_chunk().copied().unwrap_or_default());
    let client = Client { iaid: 7, ..Client::new(mac, "eth0", mac) };
    let _ = decode(bytes, &client);
    let ours = [&[7, 0, 0, 1, 0, 1, 0, 10][..], &client.duid, bytes].concat();
    let _ = decode(&ours, &client);
}

#[cfg(test)]
#[path = "message6_tests.rs"]
mod tests;
