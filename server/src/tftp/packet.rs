//! TFTP packets (RFC 1350) and option negotiation (RFC 2347, 2348, 2349, 7440): bytes in, checked values out. Pure.

use std::time::Duration;

/// Block size without the `blksize` option, in bytes (RFC 1350 section 2).
pub const DEFAULT_BLOCK: u16 = 512;
/// Largest block that is granted, in bytes: what fits an Ethernet frame with its IPv4, UDP and TFTP headers, because
/// firmware is bad at fragments. A client that wishes for more gets this (RFC 2348 allows the server to go lower).
pub const MAX_BLOCK: u16 = 1468;
/// Largest window that is granted, in blocks (RFC 7440).
pub const MAX_WINDOW: u16 = 64;
/// Retransmission interval without the `timeout` option.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest retransmission interval that is granted, in seconds (RFC 2349 allows 255).
const MAX_TIMEOUT_S: u64 = 30;
/// Longest file name that is looked at, in bytes.
const MAX_NAME: usize = 255;

/// Error codes (RFC 1350 appendix, RFC 2347).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// See the text.
    Undefined = 0,
    /// No such file.
    NotFound = 1,
    /// Not allowed.
    AccessViolation = 2,
    /// Not understood.
    IllegalOperation = 4,
    /// From an address that is not part of the transfer.
    UnknownTransfer = 5,
}

/// What a client wishes: the options of a read request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    /// `blksize`, 8 to 65464 bytes.
    pub block: Option<u16>,
    /// `tsize`: it wants to know the size.
    pub size: bool,
    /// `timeout`, in seconds.
    pub timeout_s: Option<u64>,
    /// `windowsize`, in blocks, from 1.
    pub window: Option<u16>,
}

/// A packet that opens a transfer or ends one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opening {
    /// A read request with its file name as sent.
    Read {
        /// The file's name.
        name: String,
        /// The options.
        wishes: Wishes,
    },
    /// Something to be refused.
    Refused(ErrorCode, &'static str),
    /// Something to be ignored: answering it could only make noise.
    Ignored,
}

/// Reads the first packet of a transfer.
#[must_use]
pub fn parse_opening(packet: &[u8]) -> Opening {
    let Some((opcode, body)) = packet.split_first_chunk::<2>() else {
        return Opening::Ignored;
    };
    match u16::from_be_bytes(*opcode) {
        1 => parse_read(body),
        2 => Opening::Refused(ErrorCode::AccessViolation, "writing is not allowed"),
        // Stray DATA, ACK, OACK or ERROR.
        3..=6 => Opening::Ignored,
        _ => Opening::Refused(ErrorCode::IllegalOperation, "unknown operation"),
    }
}

fn parse_read(body: &[u8]) -> Opening {
    let malformed = Opening::Refused(ErrorCode::IllegalOperation, "malformed read request");
    // Every text ends with a zero byte, so that splitting leaves an empty rest (or what firmware pads with).
    let mut texts = body.split(|byte| *byte == 0);
    let (Some(name), Some(mode), Some(mut next)) = (texts.next(), texts.next(), texts.next())
    else {
        return malformed;
    };
    let Ok(name) = std::str::from_utf8(name) else {
        return Opening::Refused(ErrorCode::NotFound, "the file name is not UTF-8");
    };
    if name.is_empty() || name.len() > MAX_NAME {
        return malformed;
    }
    if !mode.eq_ignore_ascii_case(b"octet") {
        return Opening::Refused(
            ErrorCode::IllegalOperation,
            "only octet mode is served: ask for binary",
        );
    }
    let mut wishes = Wishes::default();
    while let (false, Some(value)) = (next.is_empty(), texts.next()) {
        wishes.note(next, value);
        next = texts.next().unwrap_or_default();
    }
    Opening::Read { name: name.to_owned(), wishes }
}

impl Wishes {
    /// Unknown options and bad values are ignored, as RFC 2347 says.
    fn note(&mut self, option: &[u8], value: &[u8]) {
        let number = std::str::from_utf8(value)
            .ok()
            .filter(|text| text.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|text| text.parse::<u64>().ok());
        let Some(number) = number else { return };
        match option.to_ascii_lowercase().as_slice() {
            b"blksize" if (8..=65464).contains(&number) => self.block = u16::try_from(number).ok(),
            b"tsize" => self.size = true,
            b"timeout" if (1..=MAX_TIMEOUT_S).contains(&number) => self.timeout_s = Some(number),
            b"windowsize" if number >= 1 => {
                self.window = Some(u16::try_from(number).unwrap_or(u16::MAX));
            }
            _ => {}
        }
    }
}

/// How a transfer is done, after negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Bytes in a block.
    pub block: u16,
    /// Blocks sent ahead of their acknowledgement.
    pub window: u16,
    /// Time until a window is sent again.
    pub timeout: Duration,
}

/// Grants what can be granted: the terms, and the OACK to send first if any option was taken up.
#[must_use]
pub fn negotiate(wishes: Wishes, size: u64) -> (Terms, Option<Vec<u8>>) {
    let terms = Terms {
        block: wishes.block.unwrap_or(DEFAULT_BLOCK).min(MAX_BLOCK),
        window: wishes.window.unwrap_or(1).min(MAX_WINDOW),
        timeout: wishes.timeout_s.map_or(DEFAULT_TIMEOUT, Duration::from_secs),
    };
    let granted = [
        ("blksize", wishes.block.map(|_| u64::from(terms.block))),
        ("tsize", wishes.size.then_some(size)),
        ("timeout", wishes.timeout_s),
        ("windowsize", wishes.window.map(|_| u64::from(terms.window))),
    ];
    let mut oack = vec![0, 6];
    for (name, value) in granted {
        if let Some(value) = value {
            oack.extend_from_slice(name.as_bytes());
            oack.push(0);
            oack.extend_from_slice(value.to_string().as_bytes());
            oack.push(0);
        }
    }
    let any = oack.len() > 2;
    (terms, any.then_some(oack))
}

/// An ERROR packet.
#[must_use]
pub fn error_packet(code: ErrorCode, text: &str) -> Vec<u8> {
    let mut packet = vec![0, 5, 0, code as u8];
    packet.extend_from_slice(text.as_bytes());
    packet.push(0);
    packet
}

/// A DATA packet. `number` is the block's, counted from 1; on the wire it wraps to 0 after 65535.
#[must_use]
pub fn data_packet(number: u64, data: &[u8]) -> Vec<u8> {
    let [.., high, low] = number.to_be_bytes();
    let mut packet = Vec::with_capacity(data.len() + 4);
    packet.extend_from_slice(&[0, 3, high, low]);
    packet.extend_from_slice(data);
    packet
}

/// What a client says during a transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Feedback {
    /// It has this block and all before, by the number on the wire.
    Ack(u16),
    /// It gives up, for this reason.
    Abort(String),
    /// Nothing of meaning.
    Other,
}

/// Reads a packet of a running transfer.
#[must_use]
pub fn parse_feedback(packet: &[u8]) -> Feedback {
    match packet {
        [0, 4, high, low, ..] => Feedback::Ack(u16::from_be_bytes([*high, *low])),
        [0, 5, high, low, text @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
            let text = String::from_utf8_lossy(text.get(..end.min(MAX_NAME)).unwrap_or_default());
            Feedback::Abort(format!("error {code}: {}", text.escape_debug()))
        }
        _ => Feedback::Other,
    }
}

/// A requested name as a relative path below the root, or `None` if it could lead out of it. A leading `/` is
/// dropped, as firmware sends it.
#[must_use]
pub fn safe_name(name: &str) -> Option<&str> {
    let name = name.trim_start_matches('/');
    let good = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && !part.chars().any(|c| c == '\\' || c.is_control())
    };
    (!name.is_empty() && name.split('/').all(good)).then_some(name)
}

/// For fuzzers: reads arbitrary bytes as each kind of packet.
pub fn fuzz_packet(bytes: &[u8]) {
    if let Opening::Read { name, wishes } = parse_opening(bytes) {
        let _ = (safe_name(&name), negotiate(wishes, 1));
    }
    let _ = parse_feedback(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn read(text: &str) -> (String, Wishes) {
        let text = text.replace('|', "\0");
        match parse_opening(&[b"\x00\x01", text.as_bytes()].concat()) {
            Opening::Read { name, wishes } => (name, wishes),
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn options_are_granted_within_bounds() {
        let (name, wishes) = read("boot/x|OCTET|BLKSIZE|9000|tsize|0|timeout|2|windowsize|999|");
        assert_eq!(name, "boot/x");
        let (terms, oack) = negotiate(wishes, 4711);
        assert_eq!(terms, Terms { block: 1468, window: 64, timeout: Duration::from_secs(2) });
        let text =
            b"\x00\x06blksize\x001468\x00tsize\x004711\x00timeout\x002\x00windowsize\x0064\x00";
        assert_eq!(oack.as_deref(), Some(&text[..]));
    }

    #[test]
    fn without_options_or_with_bad_ones_there_is_no_oack() {
        for text in ["x|octet|", "x|octet|blksize|7|", "x|octet|multicast||", "x|octet|tsize|"] {
            let (_, oack) = negotiate(read(text).1, 1);
            assert_eq!(oack, None, "{text:?}");
        }
        let (terms, _) = negotiate(read("x|octet|").1, 1);
        assert_eq!((terms.block, terms.window), (512, 1));
    }

    #[test]
    fn what_is_not_served_is_refused_with_its_code() {
        for (packet, code) in [
            (&b"\x00\x02x\x00octet\x00"[..], ErrorCode::AccessViolation),
            (b"\x00\x01x\x00netascii\x00", ErrorCode::IllegalOperation),
            (b"\x00\x01x\x00octet", ErrorCode::IllegalOperation),
            (b"\x00\x01\x00octet\x00", ErrorCode::IllegalOperation),
            (b"\x00\x09", ErrorCode::IllegalOperation),
            (b"\x00\x01\xff\x00octet\x00", ErrorCode::NotFound),
        ] {
            let Opening::Refused(got, _) = parse_opening(packet) else { panic!("{packet:?}") };
            assert_eq!(got, code, "{packet:?}");
        }
        assert_eq!(parse_opening(b"\x00\x04\x00\x01"), Opening::Ignored);
    }

    #[test]
    fn names_cannot_leave_the_root() {
        for good in ["a", "a/b.c", "a..b"] {
            assert_eq!(safe_name(good), Some(good));
        }
        assert_eq!(safe_name("//a"), Some("a"));
        for bad in ["", "/", "..", "../a", "a/../b", "a/..", "a//b", "./a", "a\\b", "a\n", "a/"] {
            assert_eq!(safe_name(bad), None, "{bad:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(
            mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            opcode in 0_u8..8,
        ) {
            if let [a, b, ..] = bytes.as_mut_slice() {
                (*a, *b) = (0, opcode);
            }
            fuzz_packet(&bytes);
        }
    }
}
