//! One DHCP exchange's messages (RFC 2131, RFC 2132): made and read. Pure; no renewal, no options but those a lease needs.

/// A fixed header and room for options: the least that a BOOTP relay passes on (RFC 1542 section 2.1).
const LENGTH: usize = 300;
/// Where the options begin, after the magic cookie.
const OPTIONS: usize = 240;
/// RFC 2132 section 2.
const COOKIE: [u8; 4] = [99, 130, 83, 99];

/// Message types, option 53.
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;

/// What a server offers or grants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// The client's address.
    pub address: [u8; 4],
    /// Who offers it.
    pub server: [u8; 4],
    /// Bits of the network's prefix.
    pub prefix: u8,
    /// Whether it is granted, not only offered.
    pub granted: bool,
}

/// A DISCOVER, or with an offer the REQUEST for it.
#[must_use]
pub fn message(xid: [u8; 4], mac: [u8; 6], offer: Option<&Lease>) -> Vec<u8> {
    let mut bytes = vec![1, 1, 6, 0];
    bytes.extend(xid);
    // Seconds, then the broadcast flag: there is no address yet that an answer could be sent to.
    bytes.extend([0, 0, 0x80, 0]);
    bytes.extend([0; 16]);
    bytes.extend(mac);
    bytes.resize(OPTIONS - COOKIE.len(), 0);
    bytes.extend(COOKIE);
    bytes.extend([53, 1, if offer.is_some() { REQUEST } else { DISCOVER }]);
    if let Some(offer) = offer {
        bytes.extend([50, 4]);
        bytes.extend(offer.address);
        bytes.extend([54, 4]);
        bytes.extend(offer.server);
    }
    bytes.extend([55, 2, 1, 3, 255]);
    bytes.resize(bytes.len().max(LENGTH), 0);
    bytes
}

/// The offer or grant in an answer to this exchange; `None` for everything else.
#[must_use]
pub fn answer(bytes: &[u8], xid: [u8; 4]) -> Option<Lease> {
    if bytes.first() != Some(&2)
        || bytes.get(4..8)? != xid
        || bytes.get(OPTIONS - 4..OPTIONS)? != COOKIE
    {
        return None;
    }
    let kind = option(bytes, 53)?;
    let granted = match *kind.first()? {
        OFFER => false,
        ACK => true,
        _ => return None,
    };
    let mask: [u8; 4] = option(bytes, 1)?.try_into().ok()?;
    Some(Lease {
        address: bytes.get(16..20)?.try_into().ok()?,
        server: option(bytes, 54)?.try_into().ok()?,
        prefix: u8::try_from(u32::from_be_bytes(mask).leading_ones()).ok()?,
        granted,
    })
}

fn option(bytes: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut rest = bytes.get(OPTIONS..)?;
    loop {
        match rest {
            [255, ..] | [] => return None,
            [0, tail @ ..] => rest = tail,
            [code, length, tail @ ..] => {
                let value = tail.get(..usize::from(*length))?;
                if *code == wanted {
                    return Some(value);
                }
                rest = tail.get(usize::from(*length)..)?;
            }
            [_] => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const XID: [u8; 4] = [1, 2, 3, 4];

    fn granted() -> Vec<u8> {
        let mut bytes = message(XID, [2, 0, 0, 0, 0, 1], None);
        bytes[0] = 2;
        bytes[16..20].copy_from_slice(&[10, 9, 0, 101]);
        bytes.truncate(OPTIONS);
        bytes.extend([0, 53, 1, ACK, 54, 4, 10, 9, 0, 1, 1, 4, 255, 255, 255, 0, 255]);
        bytes
    }

    #[test]
    fn an_answer_says_who_grants_what() {
        let lease = answer(&granted(), XID).expect("a lease");
        let expected =
            Lease { address: [10, 9, 0, 101], server: [10, 9, 0, 1], prefix: 24, granted: true };
        assert_eq!(lease, expected);
        assert_eq!(answer(&granted(), [4, 3, 2, 1]), None);
    }

    #[test]
    fn a_request_names_the_offer() {
        let lease = answer(&granted(), XID).expect("a lease");
        let bytes = message(XID, [2, 0, 0, 0, 0, 1], Some(&lease));
        assert_eq!(option(&bytes, 53), Some(&[REQUEST][..]));
        assert_eq!(option(&bytes, 50), Some(&[10, 9, 0, 101][..]));
        assert!(bytes.len() >= LENGTH);
    }

    #[test]
    fn what_is_cut_off_anywhere_is_no_answer_and_no_panic() {
        let whole = granted();
        for length in 0..whole.len() - 1 {
            assert_eq!(answer(&whole[..length], XID).is_some(), length >= whole.len() - 1);
        }
    }
}
