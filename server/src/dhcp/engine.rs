//! What the server answers to a client's message (RFC 2131 section 4.3). Pure: bytes, lease table and time in, a
//! decision out; [`super::Server`] sends it.
//!
//! The server is authoritative for its subnet: a request for an address that cannot be right there is refused, and one
//! for a free address in the range is granted even if this server never offered it, so that a restart goes unnoticed.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use dhcproto::v4::{DhcpOption, MessageType};
use protocol::ids::Mac;

use super::leases::{ClientKey, LeaseState, Leases, OFFER_TIME};
use super::packet::{BootKind, Reply, ReplyBuilder, Request};
use super::{DhcpConfig, DhcpSeen, Reservation};

/// iPXE's encapsulated option `no-pxedhcp` (0xb0) = 1: do not wait two seconds for a proxyDHCP server.
const IPXE_NO_PXEDHCP: [u8; 3] = [0xb0, 1, 1];

/// What is to be done about one message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// The reply, if any.
    pub reply: Option<Reply>,
    /// What was learned about a machine.
    pub seen: Option<DhcpSeen>,
    /// One line for the log.
    pub note: Option<Note>,
}

/// A line for the log and how loud it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// Something happened.
    Info(String),
    /// Something an operator should look at.
    Warn(String),
    /// Detail.
    Debug(String),
}

impl Decision {
    fn silent(why: String) -> Self {
        Self { note: Some(Note::Debug(why)), ..Self::default() }
    }
}

/// Decides about one packet. Anything that is not a well-formed request, or comes by a relay of another subnet, is
/// ignored.
pub fn decide(leases: &mut Leases, config: &DhcpConfig, packet: &[u8], now: Instant) -> Decision {
    let Some(request) = Request::parse(packet) else {
        return Decision::default();
    };
    if !request.giaddr.is_unspecified() && !config.contains(request.giaddr) {
        return Decision::silent(format!(
            "{}: ignored: its relay {} is not in the served subnet",
            request.mac, request.giaddr
        ));
    }
    let client = client_key(&request);
    let engine = Engine { config, request: &request, client, now };
    match request.kind {
        MessageType::Discover => engine.discover(leases),
        MessageType::Request => engine.request(leases),
        MessageType::Release => engine.release(leases),
        MessageType::Decline => engine.decline(leases),
        MessageType::Inform => engine.inform(),
        _ => Decision::default(),
    }
}

/// Booting clients are known by MAC, so that firmware, iPXE and agent get one address; others by their identifier.
fn client_key(request: &Request) -> ClientKey {
    match &request.client_id {
        Some(id) if request.boot == BootKind::None => match id.as_slice() {
            [1, mac @ ..] if *mac == request.mac.0 => ClientKey::Mac(request.mac),
            _ => ClientKey::Id(id.clone()),
        },
        _ => ClientKey::Mac(request.mac),
    }
}

struct Engine<'a> {
    config: &'a DhcpConfig,
    request: &'a Request,
    client: ClientKey,
    now: Instant,
}

impl Engine<'_> {
    fn mac(&self) -> Mac {
        self.request.mac
    }

    fn reservation(&self) -> Option<&Reservation> {
        self.config.reservations.iter().find(|entry| entry.mac == self.mac())
    }

    fn reserved_for_other(&self, address: Ipv4Addr) -> bool {
        self.config
            .reservations
            .iter()
            .any(|entry| entry.address == address && entry.mac != self.mac())
            || address == self.config.server
            || self.config.router == Some(address)
    }

    fn lease_time(&self) -> Duration {
        Duration::from_secs(u64::from(self.config.lease_s))
    }

    /// Whether this client may have this address: its reservation, or one of the range that nobody else has.
    fn may_have(&self, leases: &Leases, address: Ipv4Addr) -> bool {
        match self.reservation() {
            Some(entry) => entry.address == address,
            None => {
                self.config.in_range(address)
                    && !self.reserved_for_other(address)
                    && leases.is_free_for(address, &self.client, self.now)
            }
        }
    }

    fn discover(&self, leases: &mut Leases) -> Decision {
        let seen = Some(DhcpSeen::Discover {
            mac: self.mac(),
            uuid: self.request.uuid.clone(),
            arch: self.request.arch,
            boot: self.request.boot != BootKind::None,
        });
        let address = match self.reservation() {
            Some(entry) => entry.address,
            None => {
                let choice = leases.choose(
                    &self.client,
                    self.request.requested,
                    self.config.range,
                    |address| self.reserved_for_other(address),
                    self.now,
                );
                match choice {
                    Ok(address) => address,
                    Err(error) => {
                        let note = Some(Note::Warn(format!("{}: {error}", self.mac())));
                        return Decision { reply: None, seen, note };
                    }
                }
            }
        };
        let until = self.now + OFFER_TIME;
        leases.hold(address, self.client.clone(), self.mac(), LeaseState::Offered, until);
        let reply = self.grant(MessageType::Offer, address).finish(None);
        Decision { reply, seen, note: Some(self.offer_note(address)) }
    }

    fn offer_note(&self, address: Ipv4Addr) -> Note {
        match self.request.boot {
            BootKind::Unserved(arch) => Note::Warn(format!(
                "{}: offered {address} with no boot file: there is none for architecture {arch}",
                self.mac()
            )),
            boot => Note::Info(format!("{}: offered {address} ({boot:?})", self.mac())),
        }
    }

    fn request(&self, leases: &mut Leases) -> Decision {
        let request = self.request;
        if let Some(server) = request.server_id
            && server != self.config.server
        {
            leases.withdraw_offer(&self.client, self.now);
            return Decision::silent(format!("{}: chose the server {server}", self.mac()));
        }
        // SELECTING and INIT-REBOOT name the address in option 50, RENEWING and REBINDING in ciaddr.
        let renews = !request.ciaddr.is_unspecified();
        let Some(address) = request.requested.or(renews.then_some(request.ciaddr)) else {
            return Decision::silent(format!("{}: a REQUEST without an address", self.mac()));
        };
        if !self.may_have(leases, address) {
            return self.refuse(address);
        }
        let until = self.now + self.lease_time();
        leases.hold(address, self.client.clone(), self.mac(), LeaseState::Bound, until);
        let mut reply = self.grant(MessageType::Ack, address);
        if renews {
            reply = reply.client_address(request.ciaddr);
        }
        Decision {
            reply: reply.finish(renews.then_some(request.ciaddr)),
            seen: Some(DhcpSeen::Leased {
                mac: self.mac(),
                address,
                boot: request.boot != BootKind::None,
            }),
            note: Some(Note::Info(format!("{}: leased {address}", self.mac()))),
        }
    }

    fn refuse(&self, address: Ipv4Addr) -> Decision {
        let why = if self.config.contains(address) {
            "the address is not available to this client"
        } else {
            "the address is not of this subnet"
        };
        let reply = ReplyBuilder::new(self.request, MessageType::Nak, self.config.server)
            .option(DhcpOption::Message(why.to_owned()))
            .finish(None);
        let note = Some(Note::Info(format!("{}: refused {address}: {why}", self.mac())));
        Decision { reply, seen: None, note }
    }

    fn is_for_us(&self) -> bool {
        self.request.server_id.is_none_or(|server| server == self.config.server)
    }

    fn release(&self, leases: &mut Leases) -> Decision {
        let address = self.request.ciaddr;
        if self.is_for_us() && leases.release(address, &self.client, self.now) {
            let note = Some(Note::Info(format!("{}: released {address}", self.mac())));
            return Decision { note, ..Decision::default() };
        }
        Decision::silent(format!("{}: RELEASE of {address}, which it does not have", self.mac()))
    }

    fn decline(&self, leases: &mut Leases) -> Decision {
        let Some(address) = self.request.requested.filter(|_| self.is_for_us()) else {
            return Decision::default();
        };
        if !leases.decline(address, &self.client, self.now) {
            return Decision::silent(format!("{}: DECLINE of {address}, not its own", self.mac()));
        }
        let note = Some(Note::Warn(format!(
            "{}: says {address} is in use by another machine; look for a fixed address or a second DHCP server",
            self.mac()
        )));
        Decision { note, ..Decision::default() }
    }

    fn inform(&self) -> Decision {
        let address = self.request.ciaddr;
        if !self.config.contains(address) {
            return Decision::default();
        }
        let reply = ReplyBuilder::new(self.request, MessageType::Ack, self.config.server)
            .client_address(address);
        Decision {
            reply: self.boot_options(self.network_options(reply)).finish(Some(address)),
            ..Decision::default()
        }
    }

    fn grant(&self, kind: MessageType, address: Ipv4Addr) -> ReplyBuilder {
        let lease = self.config.lease_s;
        let reply = ReplyBuilder::new(self.request, kind, self.config.server)
            .your_address(address)
            .option(DhcpOption::AddressLeaseTime(lease))
            .option(DhcpOption::Renewal(lease / 2))
            // RFC 2131 section 4.4.5: T2 is 0.875 of the lease.
            .option(DhcpOption::Rebinding(lease - lease / 8));
        self.boot_options(self.network_options(reply))
    }

    fn network_options(&self, reply: ReplyBuilder) -> ReplyBuilder {
        let config = self.config;
        let mut reply = reply
            .option(DhcpOption::SubnetMask(config.mask()))
            .option(DhcpOption::BroadcastAddr(config.broadcast()));
        if let Some(router) = config.router {
            reply = reply.option(DhcpOption::Router(vec![router]));
        }
        if !config.dns.is_empty() {
            reply = reply.option(DhcpOption::DomainNameServer(config.dns.clone()));
        }
        if !config.ntp_servers.is_empty() {
            reply = reply.option(DhcpOption::NtpServers(config.ntp_servers.clone()));
        }
        if let Some(domain) = &config.domain {
            reply = reply.option(DhcpOption::DomainName(domain.clone()));
        }
        if let Some(node) = self.reservation().and_then(|entry| entry.node.as_ref()) {
            reply = reply.option(DhcpOption::Hostname(node.to_string()));
        }
        reply
    }

    fn boot_options(&self, reply: ReplyBuilder) -> ReplyBuilder {
        let files = &self.config.boot_files;
        let server = Some(self.config.server);
        match self.request.boot {
            BootKind::None | BootKind::Unserved(_) => reply,
            BootKind::Ipxe => {
                reply.raw(175, &IPXE_NO_PXEDHCP).boot_file(server, &files.ipxe_script)
            }
            BootKind::Bios => reply.boot_file(server, &files.bios),
            BootKind::Efi => reply.boot_file(server, &files.efi),
            // UEFI 2.10 section 24.7.3: the class is echoed and the boot file is a URL.
            BootKind::HttpEfi => {
                let url = format!("{}/boot/{}", self.config.http_base, files.efi);
                reply
                    .option(DhcpOption::ClassIdentifier(b"HTTPClient".to_vec()))
                    .boot_file(None, &url)
            }
        }
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
