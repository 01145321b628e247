//! Three rtnetlink(7) messages by hand: an interface up, an address added, and the news of either. No library of ours or of
//! others: the floor must not pay for one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

/// `RTMGRP_IPV4_IFADDR`.
const ADDRESS_NEWS: u32 = 0x10;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
/// `NLMSG_ERROR`, which is the acknowledgement as well.
const ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const ASK: u16 = 0x5;
/// `NLM_F_CREATE | NLM_F_REPLACE`.
const MAKE: u16 = 0x500;
/// `IFF_UP`.
const UP: u32 = 1;
/// `IFA_LOCAL`.
const LOCAL: u16 = 2;
/// `struct nlmsghdr`.
const HEADER: usize = 16;

/// A socket to the kernel's routing tables.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    /// Opens one; with `news` it hears of every IPv4 address that is added.
    ///
    /// # Errors
    /// What socket(2) and bind(2) say.
    pub fn open(news: bool) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, if news { ADDRESS_NEWS } else { 0 }))?;
        Ok(Self(socket))
    }

    /// Takes an interface up.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn up(&self, index: u32) -> io::Result<()> {
        // struct ifinfomsg: family, pad, type, index, flags, change.
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend(UP.to_ne_bytes());
        body.extend(UP.to_ne_bytes());
        self.ask(RTM_NEWLINK, ASK, &body)
    }

    /// Gives an interface an address.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_address(&self, index: u32, address: [u8; 4], prefix: u8) -> io::Result<()> {
        // struct ifaddrmsg: family (AF_INET), prefix, flags, scope, index; then one attribute.
        let mut body = vec![2, prefix, 0, 0];
        body.extend(index.to_ne_bytes());
        body.extend(8_u16.to_ne_bytes());
        body.extend(LOCAL.to_ne_bytes());
        body.extend(address);
        self.ask(RTM_NEWADDR, ASK | MAKE, &body)
    }

    /// Waits for an address that is not of 127.0.0.0/8, and gives it.
    ///
    /// # Errors
    /// What recv(2) says.
    pub fn wait_for_address(&self) -> io::Result<[u8; 4]> {
        loop {
            if let Some(address) = address_in(&self.receive()?) {
                return Ok(address);
            }
        }
    }

    fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        let answer = self.receive()?;
        match (word(&answer, 4), answer.get(HEADER..HEADER + 4)) {
            (Some(ERROR), Some(&[a, b, c, d])) => match i32::from_ne_bytes([a, b, c, d]) {
                0 => Ok(()),
                code => Err(io::Error::from_raw_os_error(-code)),
            },
            _ => Err(io::Error::other("no acknowledgement")),
        }
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; 8192];
        let length = recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::empty())?;
        bytes.truncate(length);
        Ok(bytes)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The address in the first message of a datagram, when it is the news of one.
fn address_in(datagram: &[u8]) -> Option<[u8; 4]> {
    if word(datagram, 4)? != RTM_NEWADDR {
        return None;
    }
    let mut rest = datagram.get(HEADER + 8..)?;
    loop {
        let (length, kind) = (usize::from(word(rest, 0)?), word(rest, 2)?);
        let value = rest.get(4..length)?;
        if kind == LOCAL {
            let address: [u8; 4] = value.try_into().ok()?;
            return (address[0] != 127).then_some(address);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_news_of_an_address_gives_it_and_that_of_the_loopback_does_not() {
        let news = |address: [u8; 4]| {
            let mut bytes = vec![0; HEADER + 8];
            bytes[4..6].copy_from_slice(&RTM_NEWADDR.to_ne_bytes());
            // IFA_LABEL first, of six bytes and two of padding.
            bytes.extend([10, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0]);
            bytes.extend([8, 0, 2, 0]);
            bytes.extend(address);
            bytes
        };
        assert_eq!(address_in(&news([10, 9, 0, 101])), Some([10, 9, 0, 101]));
        assert_eq!(address_in(&news([127, 0, 0, 1])), None);
        for length in 0..news([1, 2, 3, 4]).len() {
            assert_eq!(address_in(&news([1, 2, 3, 4])[..length]), None);
        }
    }
}
