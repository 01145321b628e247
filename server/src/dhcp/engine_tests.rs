//! Conversations with the engine, as a client would have them.

use std::net::{Ipv4Addr, SocketAddrV4};

use dhcproto::v4::relay::{RelayAgentInformation, RelayInfo};
use dhcproto::v4::{Flags, Message, OptionCode, UnknownOption};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};

use super::*;
use crate::dhcp::BootFiles;

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const TIME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);

fn config() -> DhcpConfig {
    DhcpConfig {
        interface: "lab0".to_owned(),
        server: SERVER,
        subnet: (Ipv4Addr::new(10, 9, 0, 0), 24),
        range: (Ipv4Addr::new(10, 9, 0, 100), Ipv4Addr::new(10, 9, 0, 109)),
        router: Some(SERVER),
        dns: vec![SERVER],
        ntp_servers: vec![TIME_SERVER],
        domain: Some("lab".to_owned()),
        lease_s: 600,
        http_base: "http://10.9.0.1:8080".to_owned(),
        reservations: vec![Reservation {
            mac: Mac([0x52, 0x54, 0, 0, 0, 0x99]),
            address: Ipv4Addr::new(10, 9, 0, 50),
            node: Some("n99".parse().expect("id")),
        }],
        boot_files: BootFiles::default(),
    }
}

struct Client {
    config: DhcpConfig,
    leases: Leases,
    now: Instant,
    mac: Mac,
}

impl Client {
    fn new() -> Self {
        Self { config: config(), leases: Leases::default(), now: Instant::now(), mac: MAC }
    }

    fn send(
        &mut self,
        kind: MessageType,
        edit: impl FnOnce(&mut Message),
    ) -> (Decision, Option<Message>) {
        let mut message = Message::default();
        message.set_xid(7).set_chaddr(&self.mac.0);
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        edit(&mut message);
        let mut bytes = Vec::new();
        message.encode(&mut Encoder::new(&mut bytes)).expect("encode");
        let decision = decide(&mut self.leases, &self.config, &bytes, self.now);
        let reply = decision.reply.as_ref().map(|reply| {
            assert!(reply.bytes.len() >= 300, "padded");
            Message::decode(&mut Decoder::new(&reply.bytes)).expect("decode")
        });
        if let Some(reply) = &reply {
            assert_eq!((reply.xid(), reply.chaddr()), (7, &self.mac.0[..]));
        }
        (decision, reply)
    }

    fn lease(&mut self) -> Ipv4Addr {
        let offer = self.send(MessageType::Discover, |_| {}).1.expect("offer");
        self.select(offer.yiaddr()).expect("ack").yiaddr()
    }

    fn select(&mut self, address: Ipv4Addr) -> Option<Message> {
        self.send(MessageType::Request, |message| {
            message.opts_mut().insert(DhcpOption::RequestedIpAddress(address));
            message.opts_mut().insert(DhcpOption::ServerIdentifier(SERVER));
        })
        .1
    }

    fn renew(&mut self, address: Ipv4Addr) -> (Decision, Option<Message>) {
        self.send(MessageType::Request, |message| {
            message.set_ciaddr(address);
        })
    }
}

#[track_caller]
fn kind(message: &Option<Message>) -> Option<MessageType> {
    message.as_ref().and_then(|message| message.opts().msg_type())
}

#[test]
fn a_client_gets_an_address_with_everything_it_needs() {
    let mut client = Client::new();
    let (decision, offer) = client.send(MessageType::Discover, |_| {});
    assert_eq!(kind(&offer), Some(MessageType::Offer));
    assert_eq!(
        decision.reply.expect("reply").destination,
        SocketAddrV4::new(Ipv4Addr::BROADCAST, 68)
    );
    let address = offer.expect("offer").yiaddr();
    let ack = client.select(address).expect("ack");
    assert_eq!((ack.yiaddr(), ack.siaddr()), (address, Ipv4Addr::UNSPECIFIED));
    for option in [
        DhcpOption::MessageType(MessageType::Ack),
        DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
        DhcpOption::Router(vec![SERVER]),
        DhcpOption::DomainNameServer(vec![SERVER]),
        DhcpOption::NtpServers(vec![TIME_SERVER]),
        DhcpOption::DomainName("lab".to_owned()),
        DhcpOption::BroadcastAddr(Ipv4Addr::new(10, 9, 0, 255)),
        DhcpOption::AddressLeaseTime(600),
        DhcpOption::ServerIdentifier(SERVER),
        DhcpOption::Renewal(300),
        DhcpOption::Rebinding(525),
    ] {
        assert_eq!(ack.opts().get(OptionCode::from(&option)), Some(&option));
    }
    assert_eq!(ack.opts().get(OptionCode::BootfileName), None);
}

#[test]
fn fifty_renewals_keep_the_address_by_unicast() {
    let mut client = Client::new();
    let address = client.lease();
    for round in 0..50 {
        client.now += Duration::from_secs(300);
        let (decision, ack) = client.renew(address);
        let ack = ack.expect("ack");
        assert_eq!((ack.yiaddr(), ack.ciaddr()), (address, address), "round {round}");
        let destination = decision.reply.expect("reply").destination;
        assert_eq!(destination, SocketAddrV4::new(address, 68));
        let (_, other) = Client::new().renew(address);
        assert_eq!(kind(&other), Some(MessageType::Ack), "a fresh server adopts it");
    }
}

#[test]
fn an_address_sticks_after_release_and_expiry() {
    let mut client = Client::new();
    let address = client.lease();
    client.send(MessageType::Release, |message| {
        message.set_ciaddr(address);
    });
    client.mac = Mac([2, 0, 0, 0, 0, 9]);
    assert_ne!(client.lease(), address, "a newcomer takes a fresh one");
    client.mac = MAC;
    assert_eq!(client.lease(), address);
    client.now += Duration::from_secs(10_000);
    assert_eq!(client.lease(), address);
}

#[test]
fn wrong_requests_are_refused_by_broadcast() {
    let mut client = Client::new();
    let address = client.lease();
    client.mac = Mac([2, 0, 0, 0, 0, 9]);
    for wrong in [address, Ipv4Addr::new(10, 9, 0, 99), Ipv4Addr::new(192, 168, 1, 1), SERVER] {
        assert_eq!(kind(&client.select(wrong)), Some(MessageType::Nak), "{wrong}");
        let (decision, nak) = client.renew(wrong);
        assert_eq!(kind(&nak), Some(MessageType::Nak), "{wrong}");
        let destination = decision.reply.expect("reply").destination;
        assert_eq!(*destination.ip(), Ipv4Addr::BROADCAST);
    }
}

#[test]
fn a_client_that_chose_another_server_gets_no_reply_and_frees_its_offer() {
    let mut client = Client::new();
    let address = client.send(MessageType::Discover, |_| {}).1.expect("offer").yiaddr();
    let (decision, reply) = client.send(MessageType::Request, |message| {
        message.opts_mut().insert(DhcpOption::RequestedIpAddress(address));
        message.opts_mut().insert(DhcpOption::ServerIdentifier(Ipv4Addr::new(10, 9, 0, 2)));
    });
    assert!(reply.is_none() && decision.seen.is_none());
    let other = ClientKey::Mac(Mac([2, 0, 0, 0, 0, 9]));
    assert!(client.leases.is_free_for(address, &other, client.now));
}

#[test]
fn a_reservation_gives_its_address_and_the_node_id_and_nobody_else_gets_it() {
    let mut client = Client::new();
    client.config.range.0 = Ipv4Addr::new(10, 9, 0, 50);
    client.config.range.1 = Ipv4Addr::new(10, 9, 0, 51);
    assert_eq!(client.lease(), Ipv4Addr::new(10, 9, 0, 51));
    client.mac = Mac([0x52, 0x54, 0, 0, 0, 0x99]);
    let offer = client.send(MessageType::Discover, |_| {}).1.expect("offer");
    assert_eq!(offer.yiaddr(), Ipv4Addr::new(10, 9, 0, 50));
    let name = DhcpOption::Hostname("n99".to_owned());
    assert_eq!(offer.opts().get(OptionCode::Hostname), Some(&name));
    client.mac = Mac([2, 0, 0, 0, 0, 9]);
    let (decision, offer) = client.send(MessageType::Discover, |_| {});
    assert!(offer.is_none());
    let Some(Note::Warn(text)) = decision.note else { panic!("{decision:?}") };
    assert!(text.contains("no free address") && text.contains("widen"), "{text}");
}

#[test]
fn a_declined_address_is_not_offered_again_soon() {
    let mut client = Client::new();
    let address = client.lease();
    let (decision, _) = client.send(MessageType::Decline, |message| {
        message.opts_mut().insert(DhcpOption::RequestedIpAddress(address));
        message.opts_mut().insert(DhcpOption::ServerIdentifier(SERVER));
    });
    assert!(matches!(decision.note, Some(Note::Warn(_))));
    assert_ne!(client.lease(), address);
}

#[test]
fn inform_gets_options_and_no_lease() {
    let mut client = Client::new();
    let own = Ipv4Addr::new(10, 9, 0, 7);
    let (decision, ack) = client.send(MessageType::Inform, |message| {
        message.set_ciaddr(own);
    });
    let ack = ack.expect("ack");
    assert_eq!(ack.yiaddr(), Ipv4Addr::UNSPECIFIED);
    assert_eq!(ack.opts().get(OptionCode::AddressLeaseTime), None);
    assert!(ack.opts().get(OptionCode::DomainNameServer).is_some());
    assert_eq!(*decision.reply.expect("reply").destination.ip(), own);
}

#[test]
fn a_relay_of_the_subnet_is_answered_and_its_option_echoed_others_are_ignored() {
    let mut client = Client::new();
    let relay = Ipv4Addr::new(10, 9, 0, 2);
    let (decision, offer) = client.send(MessageType::Discover, |message| {
        message.set_giaddr(relay);
        let mut info = RelayAgentInformation::default();
        info.insert(RelayInfo::AgentCircuitId(vec![65, 66]));
        message.opts_mut().insert(DhcpOption::RelayAgentInformation(info));
    });
    assert!(offer.is_some());
    let reply = decision.reply.expect("reply");
    assert_eq!(reply.destination, SocketAddrV4::new(relay, 67));
    let echoes = reply.bytes.windows(7).filter(|part| *part == [82, 4, 1, 2, 65, 66, 255]);
    assert_eq!(echoes.count(), 1, "option 82 stands last, once");
    let (_, offer) = client.send(MessageType::Discover, |message| {
        message.set_giaddr(Ipv4Addr::new(10, 8, 0, 2));
    });
    assert!(offer.is_none());
}

#[test]
fn the_broadcast_flag_is_echoed() {
    let offer = Client::new().send(MessageType::Discover, |message| {
        message.set_flags(Flags::default().set_broadcast());
    });
    assert!(offer.1.expect("offer").flags().broadcast());
}

#[track_caller]
fn boot(class: &str, arch: Option<u16>, user_class: Option<&str>) -> (Message, bool) {
    let (decision, offer) = Client::new().send(MessageType::Discover, |message| {
        let options = message.opts_mut();
        options.insert(DhcpOption::ClassIdentifier(class.as_bytes().to_vec()));
        if let Some(arch) = arch {
            let data = arch.to_be_bytes().to_vec();
            options.insert(DhcpOption::Unknown(UnknownOption::new(93.into(), data)));
        }
        if let Some(user_class) = user_class {
            options.insert(DhcpOption::UserClass(user_class.as_bytes().to_vec()));
        }
    });
    let Some(DhcpSeen::Discover { boot, .. }) = decision.seen else { panic!("{decision:?}") };
    (offer.expect("offer"), boot)
}

#[test]
fn each_firmware_gets_its_boot_file_and_ipxe_never_gets_ipxe() {
    let pxe = "PXEClient:Arch:00000:UNDI:002001";
    for (class, arch, user_class, file) in [
        (pxe, Some(0), None, "undionly.kpxe"),
        (pxe, None, None, "undionly.kpxe"),
        (pxe, Some(7), None, "ipxe.efi"),
        (pxe, Some(9), None, "ipxe.efi"),
        (pxe, Some(6), None, "ipxe.efi"),
        (pxe, Some(0), Some("iPXE"), "boot.ipxe"),
        (pxe, Some(7), Some("\u{4}iPXE"), "boot.ipxe"),
        ("HTTPClient:Arch:00016", Some(16), None, "http://10.9.0.1:8080/boot/ipxe.efi"),
    ] {
        let (offer, boot) = boot(class, arch, user_class);
        assert!(boot);
        let name = offer.fname_str().expect("file").expect("utf-8");
        assert_eq!(name.trim_end_matches('\0'), file, "{arch:?}");
        let option = DhcpOption::BootfileName(file.as_bytes().to_vec());
        assert_eq!(offer.opts().get(OptionCode::BootfileName), Some(&option));
        let by_http = file.starts_with("http");
        assert_eq!(offer.siaddr(), if by_http { Ipv4Addr::UNSPECIFIED } else { SERVER });
        let class = offer.opts().get(OptionCode::ClassIdentifier);
        assert_eq!(class.is_some(), by_http, "class is echoed to HTTPClient only");
    }
}

#[test]
fn a_firmware_without_a_boot_file_and_an_os_get_none() {
    for (class, arch, is_boot) in
        [("PXEClient:Arch:00011", Some(11), true), ("layercake", None, false)]
    {
        let (offer, boot) = boot(class, arch, None);
        assert_eq!(boot, is_boot);
        assert_eq!(offer.fname(), None);
    }
}

#[test]
fn firmware_and_agent_of_one_machine_share_an_address() {
    let mut client = Client::new();
    let (_, offer) = client.send(MessageType::Discover, |message| {
        message.opts_mut().insert(DhcpOption::ClassIdentifier(b"PXEClient".to_vec()));
        message.opts_mut().insert(DhcpOption::ClientIdentifier(vec![0; 17]));
    });
    let address = offer.expect("offer").yiaddr();
    let (_, offer) = client.send(MessageType::Discover, |message| {
        let id = [&[1][..], &MAC.0].concat();
        message.opts_mut().insert(DhcpOption::ClientIdentifier(id));
    });
    assert_eq!(offer.expect("offer").yiaddr(), address);
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_engine_panic_or_lease_outside_the_range(
        mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..500),
        kind in 0_u8..10,
    ) {
        if bytes.len() > 243 {
            bytes[..3].copy_from_slice(&[1, 1, 6]);
            bytes[24..28].fill(0);
            bytes[236..243].copy_from_slice(&[99, 130, 83, 99, 53, 1, kind]);
        }
        let mut leases = Leases::default();
        let config = config();
        decide(&mut leases, &config, &bytes, Instant::now());
        for (address, _) in leases.iter() {
            assert!(config.in_range(address) || config.reservations[0].address == address);
        }
    }
}
