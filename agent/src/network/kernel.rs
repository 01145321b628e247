//! rtnetlink(7) for a process without a runtime: one request, one answer.
//!
//! What is asked, `links` says; whoever has a runtime uses rtnetlink's.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, OwnedFd};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use nix::libc;
use nix::sys::socket::{
    self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType,
};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage};

use super::links;

/// Longest answer that is read, in bytes: an error repeats the request.
const MAX_ANSWER: usize = 4096;

// Where the few things are that are read of an answer. The codec reads all of it, which is too slow for a boot's first second.

/// `nlmsg_type` (netlink(7)).
const KIND: Range<usize> = 4..6;
/// `nlmsg_seq`.
const SEQUENCE: Range<usize> = 8..12;
/// `error` of `struct nlmsgerr`, behind the header: 0 for a change that is made, or an errno below 0.
const ERROR: Range<usize> = 16..20;
/// `ifi_flags`, behind the header and the first half of `struct ifinfomsg` (rtnetlink(7)).
const FLAGS: Range<usize> = 24..28;

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
        Ok(Self { fd: netlink()?, sequence: 0 })
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
            if field(answer, SEQUENCE).map(u32::from_ne_bytes) == Some(self.sequence)
                && let Some(code) = refusal(answer)
            {
                return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
        }
    }

    /// Whether an interface that is up has its carrier now and packets can be sent: what is sent while the kernel has not yet
    /// acted upon the carrier is lost (`net/core/link_watch.c`). Sysfs speaks of the carrier as well, but turns in circles in the
    /// kernel while somebody else has the network's lock (`carrier_show`).
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn has_carrier(&mut self, index: u32) -> io::Result<bool> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.send(RouteNetlinkMessage::GetLink(message), 0)?;
        let mut buffer = [0; MAX_ANSWER];
        let length = socket::recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let answer = buffer.get(..length).unwrap_or_default();
        let is_link = kind(answer) == Some(libc::RTM_NEWLINK);
        match field(answer, FLAGS).map(u32::from_ne_bytes).filter(|_| is_link) {
            Some(flags) => Ok(LinkFlags::from_bits_retain(flags).contains(links::CARRIER)),
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

fn field<const N: usize>(answer: &[u8], at: Range<usize>) -> Option<[u8; N]> {
    answer.get(at)?.try_into().ok()
}

fn kind(answer: &[u8]) -> Option<u16> {
    field(answer, KIND).map(u16::from_ne_bytes)
}

/// What the kernel refuses a change with, 0 for one that is made; none for what is no answer to a change.
fn refusal(answer: &[u8]) -> Option<i32> {
    let is_it = kind(answer).map(i32::from) == Some(libc::NLMSG_ERROR);
    field(answer, ERROR).filter(|_| is_it).map(i32::from_ne_bytes)
}

fn netlink() -> io::Result<OwnedFd> {
    let (family, route) = (AddressFamily::Netlink, SockProtocol::NetlinkRoute);
    let fd = socket::socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, route)?;
    socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_says_what_the_kernel_refuses_a_change_with() {
        let mut answer = vec![0; 36];
        assert_eq!(refusal(&answer), None, "no error");
        answer[KIND].copy_from_slice(&2_u16.to_ne_bytes());
        assert_eq!(refusal(&answer), Some(0));
        answer[ERROR].copy_from_slice(&(-17_i32).to_ne_bytes());
        assert_eq!(refusal(&answer), Some(-17));
        assert_eq!(refusal(&answer[..19]), None, "cut");
    }

    #[test]
    fn the_kernel_is_asked_and_its_refusal_is_an_errno() {
        let mut kernel = Kernel::open().expect("socket");
        let refused = kernel.ask(links::up_message(i32::MAX as u32), 0).expect_err("no such link");
        assert_eq!(refused.raw_os_error(), Some(libc::ENODEV), "{refused}");
        assert!(kernel.has_carrier(i32::MAX as u32).is_err());
    }
}
