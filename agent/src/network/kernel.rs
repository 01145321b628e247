//! rtnetlink(7) for a process without a runtime: one request, one answer. And a socket that wakes up when a link changes.
//!
//! What is asked, `links` says; whoever has a runtime uses rtnetlink's.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use nix::libc;
use nix::sys::socket::{
    self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType,
};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};

use super::links;

/// The multicast group of links (`RTMGRP_LINK`, rtnetlink(7)).
const LINKS: u32 = 1;
/// Longest answer that is read, in bytes: an error repeats the request.
const MAX_ANSWER: usize = 4096;

/// A socket that speaks to the kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    fd: OwnedFd,
    sequence: u32,
}

impl Kernel {
    /// A socket.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { fd: netlink(0, SockFlag::empty())?, sequence: 0 })
    }

    /// Asks for a change, and waits until it is made.
    ///
    /// # Errors
    /// What the kernel refuses it with.
    pub(super) fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_ACK | flags)?;
        let mut buffer = [0; MAX_ANSWER];
        loop {
            let length = socket::recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let answer = buffer.get(..length).unwrap_or_default();
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(answer)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            match answer.payload {
                NetlinkPayload::Error(error) if answer.header.sequence_number == self.sequence => {
                    return error.code.map_or(Ok(()), |_| Err(error.to_io()));
                }
                _ => {}
            }
        }
    }
}

impl Kernel {
    /// Whether an interface that is up has its carrier now and packets can be sent: what is sent while the kernel has not yet
    /// acted upon the carrier is lost (`net/core/link_watch.c`). Sysfs speaks of the carrier as well, but turns in circles in the
    /// kernel while somebody else has the network's lock (`carrier_show`).
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn has_carrier(&mut self, index: u32) -> io::Result<bool> {
        /// Where `ifi_flags` is in an answer: behind the header and the first half of `struct ifinfomsg` (rtnetlink(7)).
        const FLAGS: std::ops::Range<usize> = 24..28;
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.send(RouteNetlinkMessage::GetLink(message), 0)?;
        let mut buffer = [0; MAX_ANSWER];
        let length = socket::recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let answer = buffer.get(..length).unwrap_or_default();
        let is_link = answer.get(4..6) == Some(&libc::RTM_NEWLINK.to_ne_bytes());
        match answer.get(FLAGS).and_then(|flags| flags.try_into().ok()).filter(|_| is_link) {
            Some(flags) => {
                let flags = LinkFlags::from_bits_retain(u32::from_ne_bytes(flags));
                Ok(flags.contains(links::CARRIER))
            }
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        socket::send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }
}

/// Hears that a link has changed, not which.
#[derive(Debug)]
pub(super) struct LinkNews(OwnedFd);

impl LinkNews {
    /// A socket.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self(netlink(LINKS, SockFlag::SOCK_NONBLOCK)?))
    }

    /// Takes what has come so far.
    pub(super) fn drain(&self) {
        let mut buffer = [0; MAX_ANSWER];
        // Too much news is news as well.
        while matches!(
            socket::recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()),
            Ok(1..) | Err(nix::errno::Errno::ENOBUFS)
        ) {}
    }
}

impl AsFd for LinkNews {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn netlink(groups: u32, flags: SockFlag) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | flags;
    let (family, route) = (AddressFamily::Netlink, SockProtocol::NetlinkRoute);
    let fd = socket::socket(family, SockType::Raw, flags, route)?;
    socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(fd)
}
