//! DHCP leases on file, so that one outlives the process that got it: what [`super::early`] is given the agent goes on with, and
//! what one agent is given the next.
//!
//! A file holds the moment of the server's ACK and the ACK as it came, which is read by the parser that reads it from the
//! network. It lies in memory: a boot's leases end with it.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::message::{self, Answer, Grant, Station, Times};
use crate::identity::uptime_ms;

/// Longest file that is read, in bytes: an Ethernet frame and the moment.
const MAX_FILE: u64 = 2048;

/// A lease that an earlier process was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Who granted it.
    pub server: Ipv4Addr,
    /// What.
    pub grant: Grant,
    /// For how long, from the ACK on.
    pub times: Times,
    /// Time since the ACK.
    pub age: Duration,
}

/// Where leases are kept, a file for each interface.
#[derive(Debug, Clone)]
pub struct Leases(PathBuf);

impl Leases {
    /// The leases in this directory.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    fn file(&self, index: u32) -> PathBuf {
        self.0.join(format!("dhcp-{index}"))
    }

    /// Keeps an ACK that has just come. A lease that cannot be kept is asked for again.
    pub fn keep(&self, index: u32, ack: &[u8]) {
        let path = self.file(index);
        let new = path.with_extension("new");
        let bytes = [&uptime_ms().to_be_bytes()[..], ack].concat();
        if let Err(error) = fs::write(&new, bytes).and_then(|()| fs::rename(&new, &path)) {
            log::debug!("network: cannot write {}: {error}", path.display());
        }
    }

    /// Forgets the lease of an interface.
    pub fn forget(&self, index: u32) {
        match fs::remove_file(self.file(index)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::debug!("network: cannot remove {}: {error}", self.file(index).display());
            }
            _ => {}
        }
    }

    /// What is kept for this interface.
    #[must_use]
    pub fn kept(&self, index: u32, station: &Station) -> Option<Kept> {
        let path = self.file(index);
        if fs::metadata(&path).ok()?.len() > MAX_FILE {
            return None;
        }
        read(&fs::read(path).ok()?, station, uptime_ms())
    }
}

fn read(bytes: &[u8], station: &Station, now_ms: u64) -> Option<Kept> {
    let (since, ack) = bytes.split_first_chunk()?;
    let age = Duration::from_millis(now_ms.checked_sub(u64::from_be_bytes(*since))?);
    match message::decode(ack, station)?.1 {
        Answer::Ack { server, grant, times } if age < times.lease => {
            Some(Kept { server, grant, times, age })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use dhcproto::v4::{DhcpOption, Message, MessageType, Opcode};
    use dhcproto::{Encodable, Encoder};
    use protocol::ids::Mac;

    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 101);

    fn answer(kind: MessageType) -> Vec<u8> {
        let mut message = Message::default();
        message.set_opcode(Opcode::BootReply).set_xid(7).set_chaddr(&MAC.0).set_yiaddr(ADDRESS);
        let options = message.opts_mut();
        options.insert(DhcpOption::MessageType(kind));
        options.insert(DhcpOption::ServerIdentifier(Ipv4Addr::new(10, 9, 0, 1)));
        options.insert(DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)));
        options.insert(DhcpOption::AddressLeaseTime(3600));
        let mut bytes = Vec::new();
        message.encode(&mut Encoder::new(&mut bytes)).expect("encode");
        bytes
    }

    #[test]
    fn a_lease_is_found_again_until_it_is_forgotten() {
        let dir = tempfile::tempdir().expect("directory");
        let (leases, station) = (Leases::new(dir.path()), Station::Ethernet(MAC));
        assert_eq!(leases.kept(2, &station), None);
        leases.keep(2, &answer(MessageType::Ack));
        let kept = leases.kept(2, &station).expect("kept");
        assert_eq!((kept.grant.address, kept.times.lease.as_secs()), (ADDRESS, 3600));
        assert!(kept.age < Duration::from_secs(600), "{:?}", kept.age);
        assert_eq!(leases.kept(3, &station), None, "another interface's");
        leases.forget(2);
        leases.forget(2);
        assert_eq!(leases.kept(2, &station), None);
    }

    #[test]
    fn what_is_over_or_of_another_card_or_torn_is_no_lease() {
        let station = Station::Ethernet(MAC);
        let file = |since: u64, kind| [&since.to_be_bytes()[..], &answer(kind)].concat();
        let good = file(1000, MessageType::Ack);
        let age = |now| read(&good, &station, now).map(|kept| kept.age.as_millis());
        assert_eq!(age(1500), Some(500));
        assert_eq!(age(1000 + 3_599_999), Some(3_599_999));
        assert_eq!(age(1000 + 3_600_000), None, "over");
        assert_eq!(age(999), None, "of the future");
        assert_eq!(read(&file(1000, MessageType::Nak), &station, 1500), None);
        let other = Station::Ethernet(Mac([2, 0, 0, 0, 0, 2]));
        assert_eq!(read(&good, &other, 1500), None);
        for end in [0, 7, 8, 100, 250] {
            assert_eq!(read(&good[..end], &station, 1500), None, "{end} bytes");
        }
    }
}
