//! The codec against dhcproto's, both ways, and against bytes of nobody's.

use dhcproto::v6::{self, DhcpOption, MessageType};
use dhcproto::{Decodable as _, Decoder, Encodable as _, Encoder};

use super::*;

const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);

fn client() -> Client {
    Client::new(MAC, "eth0", MAC)
}

fn theirs(bytes: &[u8]) -> v6::Message {
    v6::Message::decode(&mut Decoder::new(bytes)).expect("dhcproto reads it")
}

fn encoded(message: &v6::Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).expect("dhcproto writes it");
    bytes
}

fn address(last: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, last)
}

#[test]
fn what_we_write_dhcproto_reads() {
    for (kind, code) in [
        (Kind::Solicit, MessageType::Solicit),
        (Kind::Request, MessageType::Request),
        (Kind::Confirm, MessageType::Confirm),
        (Kind::Renew, MessageType::Renew),
        (Kind::Rebind, MessageType::Rebind),
        (Kind::Decline, MessageType::Decline),
        (Kind::InformationRequest, MessageType::InformationRequest),
    ] {
        let outgoing = Outgoing {
            kind,
            xid: 0xaabb_ccdd,
            elapsed: Duration::from_millis(1500),
            server: Some(vec![0, 1, 2]),
            address: Some(address(5)),
        };
        let read = theirs(&outgoing.encode(&client()));
        assert_eq!((read.msg_type(), read.xid()), (code, [0xbb, 0xcc, 0xdd]));
        let options: Vec<&DhcpOption> = read.opts().iter().collect();
        let has = |wanted: &DhcpOption| options.contains(&wanted);
        assert!(has(&DhcpOption::ClientId(vec![0, 3, 0, 1, 0x52, 0x54, 0, 0, 0, 1])));
        assert!(has(&DhcpOption::ServerId(vec![0, 1, 2])) && has(&DhcpOption::ElapsedTime(150)));
        assert_eq!(has(&DhcpOption::RapidCommit), kind == Kind::Solicit);
        let association = options.iter().find_map(|option| match option {
            DhcpOption::IANA(association) => Some(association),
            _ => None,
        });
        assert_eq!(association.is_some(), kind != Kind::InformationRequest);
        if let Some(association) = association {
            let Some(DhcpOption::IAAddr(inner)) = association.opts.iter().next() else { panic!() };
            assert_eq!((association.id, inner.addr), (client().iaid, address(5)));
        }
    }
}

fn reply(lease: &[DhcpOption], t1: u32, t2: u32) -> v6::Message {
    let mut message = v6::Message::new_with_id(MessageType::Reply, [0, 0, 9]);
    let options = message.opts_mut();
    options.insert(DhcpOption::ClientId(client().duid));
    options.insert(DhcpOption::ServerId(vec![0, 3, 0, 1, 9]));
    options.insert(DhcpOption::IANA(v6::IANA {
        id: client().iaid,
        t1,
        t2,
        opts: lease.iter().cloned().collect(),
    }));
    options.insert(DhcpOption::DomainNameServers(vec![address(53)]));
    message
}

fn lease(address: Ipv6Addr, preferred: u32, valid: u32) -> DhcpOption {
    let opts = v6::DhcpOptions::new();
    DhcpOption::IAAddr(v6::IAAddr {
        addr: address,
        preferred_life: preferred,
        valid_life: valid,
        opts,
    })
}

#[test]
fn what_dhcproto_writes_we_read() {
    let message = reply(&[lease(address(0xff), 0, 0), lease(address(7), 80, 100)], 0, 0);
    let answer = decode(&encoded(&message), &client()).expect("an answer");
    let found = answer.lease.expect("the one that is good");
    assert_eq!((found.address, found.valid, found.renew, found.rebind), (address(7), 100, 40, 64));
    assert_eq!((answer.xid, answer.rapid, answer.status), (9, false, 0));
    assert_eq!(answer.servers, [address(53)]);
    let other = Client { iaid: 1, ..client() };
    assert_eq!(decode(&encoded(&message), &other).expect("an answer").lease, None);
    let other = Client::new(Mac([2; 6]), "eth0", MAC);
    assert_eq!(decode(&encoded(&message), &other), None, "an answer to somebody else");
}

#[test]
fn a_refusal_is_read_wherever_it_stands() {
    let none = DhcpOption::StatusCode(v6::StatusCode {
        status: v6::Status::NoAddrsAvail,
        msg: "none left".to_owned(),
    });
    let inner =
        decode(&encoded(&reply(std::slice::from_ref(&none), 0, 0)), &client()).expect("answer");
    assert_eq!((inner.status, inner.lease), (2, None));
    let mut message = reply(&[], 0, 0);
    message.opts_mut().insert(none);
    assert_eq!(decode(&encoded(&message), &client()).expect("answer").status, 2);
}

#[test]
fn times_that_make_no_sense_are_replaced() {
    for (given, expected) in [
        ((0, 0, 100, 200), (50, 80)),
        ((10, 500, 100, 200), (10, 80)),
        ((190, 150, 100, 200), (50, 150)),
        ((0, 0, u32::MAX, u32::MAX), (u32::MAX, u32::MAX)),
        ((0, 0, 0, 100), (50, 80)),
    ] {
        let (t1, t2, preferred, valid) = given;
        let message = reply(&[lease(address(7), preferred, valid)], t1, t2);
        let found = decode(&encoded(&message), &client()).and_then(|a| a.lease).expect("a lease");
        assert_eq!((found.renew, found.rebind), expected, "{given:?}");
    }
}

#[test]
fn vlans_on_one_interface_have_associations_of_their_own() {
    let one = Client::new(MAC, "eth0.5", MAC);
    let other = Client::new(MAC, "eth0.6", MAC);
    assert!(one.duid == other.duid && one.iaid != other.iaid);
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
        code in 0_u8..26,
        len in 0_u8..60,
    ) {
        fuzz_answer6(&bytes);
        let nested = [&[0, code, 0, len, 0, 0, 0, 7][..], &[0; 8], &[0, 5, 0, len], &bytes].concat();
        fuzz_answer6(&nested);
    }

    #[test]
    fn whatever_is_cut_off_the_rest_is_read_alike(cut in 0_usize..120) {
        let whole = encoded(&reply(&[lease(address(7), 80, 100)], 0, 0));
        let part = whole.get(..cut.min(whole.len())).expect("shorter");
        if let Some(answer) = decode(part, &client()) {
            proptest::prop_assert!(answer.lease.is_none_or(|lease| lease.address == address(7)));
        }
    }
}
