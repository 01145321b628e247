//! DHCPv4 messages: hostile bytes in, a small typed [`Request`] out, and replies back to bytes. No sockets, no decisions.

use std::net::{Ipv4Addr, SocketAddrV4};

use dhcproto::v4::{
    DhcpOption, Flags, HType, Message, MessageType, Opcode, OptionCode, UnknownOption, borrowed,
};
use dhcproto::{Encodable, Encoder};
use protocol::ids::Mac;

/// Length of an Ethernet address: the only `hlen` that is served (RFC 2131 section 2).
const ETHERNET_LEN: usize = 6;
/// Shortest message that old clients and relays accept, in bytes (RFC 1542 section 2.1).
const MIN_REPLY: usize = 300;
/// Longest text that fits into the `file` field with its terminating zero, in bytes (RFC 2131 section 2).
const MAX_FILE: usize = 127;
/// The option that ends all (RFC 2132 section 3.2).
const END: u8 = 255;
/// Port of DHCP servers and relays (RFC 2131 section 4.1).
pub const SERVER_PORT: u16 = 67;
/// Port of DHCP clients (RFC 2131 section 4.1).
pub const CLIENT_PORT: u16 = 68;

/// What kind of client asks, as far as its boot file goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootKind {
    /// Not booting: an operating system or the agent.
    None,
    /// iPXE, whatever started it: user class `iPXE` or option 175.
    Ipxe,
    /// A BIOS PXE ROM, architecture 0 (RFC 4578 section 2.1).
    Bios,
    /// A UEFI firmware that boots x86 by TFTP.
    Efi,
    /// A UEFI firmware that boots x86 by HTTP (vendor class `HTTPClient`).
    HttpEfi,
    /// A firmware for an architecture that there is no boot file for.
    Unserved(u16),
}

/// One client message, checked: what [`super::engine::decide`] reads of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Option 53.
    pub kind: MessageType,
    /// `xid`.
    pub xid: u32,
    /// `secs`, echoed by nobody but kept for logs.
    pub secs: u16,
    /// The broadcast flag.
    pub broadcast: bool,
    /// `ciaddr`: the address that the client already uses.
    pub ciaddr: Ipv4Addr,
    /// `giaddr`: the relay, unspecified when there is none.
    pub giaddr: Ipv4Addr,
    /// `chaddr`.
    pub mac: Mac,
    /// Option 61.
    pub client_id: Option<Vec<u8>>,
    /// Option 50.
    pub requested: Option<Ipv4Addr>,
    /// Option 54.
    pub server_id: Option<Ipv4Addr>,
    /// Option 97 as text, in the form of `${uuid}` in iPXE and of `/sys/class/dmi/id/product_uuid`.
    pub uuid: Option<String>,
    /// Option 93: the first architecture.
    pub arch: Option<u16>,
    /// What boot file it wants.
    pub boot: BootKind,
    /// Option 82, to be echoed as it is (RFC 3046 section 2.2).
    pub relay_info: Option<Vec<u8>>,
}

impl Request {
    /// Reads a message. `None` for everything that is not a well-formed DHCP request from an Ethernet client.
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        // The parser slices chaddr by hlen unchecked, so hlen is looked at before anything else.
        if packet.get(2).copied().map(usize::from) != Some(ETHERNET_LEN) {
            return None;
        }
        let message = borrowed::Message::new(packet).ok()?;
        if message.opcode() != Opcode::BootRequest || message.htype() != HType::Eth {
            return None;
        }
        let mac = Mac(message.chaddr().try_into().ok()?);
        let options = Options::collect(&message);
        Some(Self {
            kind: options.kind?,
            xid: message.xid(),
            secs: message.secs(),
            broadcast: message.flags().broadcast(),
            ciaddr: message.ciaddr(),
            giaddr: message.giaddr(),
            mac,
            boot: options.boot_kind(),
            client_id: options.client_id,
            requested: options.requested,
            server_id: options.server_id,
            uuid: options.uuid,
            arch: options.archs.first().copied(),
            relay_info: options.relay_info,
        })
    }
}

#[derive(Default)]
struct Options {
    kind: Option<MessageType>,
    client_id: Option<Vec<u8>>,
    requested: Option<Ipv4Addr>,
    server_id: Option<Ipv4Addr>,
    uuid: Option<String>,
    archs: Vec<u16>,
    class: Vec<u8>,
    is_ipxe: bool,
    relay_info: Option<Vec<u8>>,
}

impl Options {
    fn collect(message: &borrowed::Message<'_>) -> Self {
        let mut options = Self::default();
        for option in message.opts() {
            let data = option.data();
            match u8::from(option.code()) {
                50 => options.requested = address(data),
                53 => {
                    options.kind =
                        data.first().filter(|_| data.len() == 1).map(|b| MessageType::from(*b));
                }
                54 => options.server_id = address(data),
                60 => options.class = data.to_vec(),
                61 if data.len() >= 2 => options.client_id = Some(data.to_vec()),
                77 => options.is_ipxe |= is_ipxe_class(data),
                82 => options.relay_info = Some(data.to_vec()),
                93 => {
                    options.archs = data
                        .chunks_exact(2)
                        .filter_map(|pair| <[u8; 2]>::try_from(pair).ok())
                        .map(u16::from_be_bytes)
                        .collect();
                }
                97 => options.uuid = uuid_text(data),
                175 => options.is_ipxe = true,
                _ => {}
            }
        }
        options
    }

    fn boot_kind(&self) -> BootKind {
        if self.is_ipxe {
            return BootKind::Ipxe;
        }
        let by_http = self.class.starts_with(b"HTTPClient");
        if !by_http && !self.class.starts_with(b"PXEClient") {
            return BootKind::None;
        }
        // Architectures: IANA "Processor Architecture Types". A PXE ROM that names none is an old BIOS one.
        let arch = self.archs.first().copied().unwrap_or(0);
        match arch {
            15 | 16 if by_http => BootKind::HttpEfi,
            0 if !by_http => BootKind::Bios,
            6 | 7 | 9 if !by_http => BootKind::Efi,
            other => BootKind::Unserved(other),
        }
    }
}

fn address(data: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from)
}

/// iPXE sends the bare text; RFC 3004 wants each class behind its length.
fn is_ipxe_class(data: &[u8]) -> bool {
    let name = match data {
        [len, rest @ ..] if usize::from(*len) == rest.len() => rest,
        bare => bare,
    };
    name == b"iPXE" || name == b"gPXE"
}

/// Option 97 (RFC 4578 section 2.3): a zero byte and the SMBIOS bytes, whose first three fields are little-endian.
fn uuid_text(data: &[u8]) -> Option<String> {
    let bytes: &[u8; 16] = data.strip_prefix(&[0])?.try_into().ok()?;
    if bytes.iter().all(|b| *b == 0) || bytes.iter().all(|b| *b == 0xff) {
        return None;
    }
    let [a0, a1, a2, a3, b0, b1, c0, c1, d @ ..] = *bytes;
    let [d0, d1, e0, e1, e2, e3, e4, e5] = d;
    Some(format!(
        "{a3:02x}{a2:02x}{a1:02x}{a0:02x}-{b1:02x}{b0:02x}-{c1:02x}{c0:02x}-{d0:02x}{d1:02x}-\
         {e0:02x}{e1:02x}{e2:02x}{e3:02x}{e4:02x}{e5:02x}"
    ))
}

/// A reply on its way: the bytes and where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The DHCP message, padded to 300 bytes.
    pub bytes: Vec<u8>,
    /// Where it goes; the limited broadcast address leaves by the served interface.
    pub destination: SocketAddrV4,
}

/// A reply under construction.
#[derive(Debug)]
pub(super) struct ReplyBuilder {
    message: Message,
    to_relay: bool,
    relay_info: Option<Vec<u8>>,
}

impl ReplyBuilder {
    /// Begins a reply of this kind from this server.
    pub(super) fn new(request: &Request, kind: MessageType, server: Ipv4Addr) -> Self {
        let mut message = Message::default();
        message
            .set_opcode(Opcode::BootReply)
            .set_xid(request.xid)
            .set_giaddr(request.giaddr)
            .set_chaddr(&request.mac.0);
        // A NAK through a relay must be broadcast there (RFC 2131 section 4.1).
        if request.broadcast || kind == MessageType::Nak {
            message.set_flags(Flags::default().set_broadcast());
        }
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        message.opts_mut().insert(DhcpOption::ServerIdentifier(server));
        Self {
            message,
            to_relay: !request.giaddr.is_unspecified(),
            relay_info: request.relay_info.clone(),
        }
    }

    /// Sets `yiaddr`.
    pub(super) fn your_address(mut self, address: Ipv4Addr) -> Self {
        self.message.set_yiaddr(address);
        self
    }

    /// Sets `ciaddr`, as an ACK to a renewal echoes it.
    pub(super) fn client_address(mut self, address: Ipv4Addr) -> Self {
        self.message.set_ciaddr(address);
        self
    }

    /// Adds an option.
    pub(super) fn option(mut self, option: DhcpOption) -> Self {
        self.message.opts_mut().insert(option);
        self
    }

    /// Adds an option as bytes.
    pub(super) fn raw(self, code: u8, data: &[u8]) -> Self {
        let option = UnknownOption::new(OptionCode::from(code), data.to_vec());
        self.option(DhcpOption::Unknown(option))
    }

    /// Names the boot file, in the header where firmware looks and in options 66 and 67 where RFC 2132 puts it.
    pub(super) fn boot_file(mut self, next_server: Option<Ipv4Addr>, file: &str) -> Self {
        if let Some(server) = next_server {
            self.message.set_siaddr(server);
            let text = server.to_string().into_bytes();
            self.message.opts_mut().insert(DhcpOption::TFTPServerName(text));
        }
        if file.len() <= MAX_FILE {
            self.message.set_fname_str(file);
        }
        self.option(DhcpOption::BootfileName(file.as_bytes().to_vec()))
    }

    /// The bytes and the destination. `unicast` is where a client that already has an address hears.
    pub(super) fn finish(mut self, unicast: Option<Ipv4Addr>) -> Option<Reply> {
        let mut bytes = Vec::with_capacity(MIN_REPLY);
        self.message.encode(&mut Encoder::new(&mut bytes)).ok()?;
        if let Some(info) = self.relay_info.take() {
            append_relay_info(&mut bytes, &info);
        }
        if bytes.len() < MIN_REPLY {
            bytes.resize(MIN_REPLY, 0);
        }
        let destination = if self.to_relay {
            SocketAddrV4::new(self.message.giaddr(), SERVER_PORT)
        } else {
            SocketAddrV4::new(unicast.unwrap_or(Ipv4Addr::BROADCAST), CLIENT_PORT)
        };
        Some(Reply { bytes, destination })
    }
}

/// Puts option 82 before the end mark. By hand, because the encoder writes it twice when it is given as raw bytes.
fn append_relay_info(bytes: &mut Vec<u8>, info: &[u8]) {
    if bytes.last() != Some(&END) {
        return;
    }
    bytes.pop();
    for chunk in info.chunks(usize::from(u8::MAX)) {
        bytes.extend([82, u8::try_from(chunk.len()).unwrap_or(u8::MAX)]);
        bytes.extend_from_slice(chunk);
    }
    bytes.push(END);
}

/// For fuzzers: reads arbitrary bytes as a request.
pub fn fuzz_request(bytes: &[u8]) {
    let _ = Request::parse(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_reads_as_ipxe_and_linux_write_it() {
        // What QEMU's `-uuid 00112233-4455-6677-8899-aabbccddeeff` puts on the wire.
        let wire = [
            0, 0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd,
            0xee, 0xff,
        ];
        assert_eq!(uuid_text(&wire).expect("uuid"), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(uuid_text(&wire[..16]), None);
        assert_eq!(uuid_text(&[0; 17]), None);
    }

    #[test]
    fn user_class_ipxe_is_known_in_both_forms() {
        assert!(is_ipxe_class(b"iPXE"));
        assert!(is_ipxe_class(b"\x04iPXE"));
        assert!(!is_ipxe_class(b"iPXE2"));
        assert!(!is_ipxe_class(b""));
    }

    #[test]
    fn a_foreign_hardware_address_length_is_dropped_before_parsing() {
        for hlen in [0, 5, 7, 16, 17, 255] {
            let mut packet = vec![1, 1, hlen, 0];
            packet.resize(300, 0);
            assert_eq!(Request::parse(&packet), None, "hlen {hlen}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600),
            fix in proptest::prelude::any::<bool>(),
        ) {
            // Half of the cases get a good header, so that the options are reached.
            if fix && bytes.len() > 243 {
                bytes[..3].copy_from_slice(&[1, 1, 6]);
                bytes[236..243].copy_from_slice(&[99, 130, 83, 99, 53, 1, 1]);
            }
            fuzz_request(&bytes);
        }
    }
}
