//! Orders to the kernel's iSCSI transport by netlink (linux `include/scsi/iscsi_if.h`, `drivers/scsi/scsi_transport_iscsi.c`).
//!
//! ```text
//! nlmsghdr | type, error: u32 | transport: u64 | the order, 24 bytes | the reply, 16 bytes | a parameter's text
//! ```
//! Every order is answered with the same message and the reply filled in. All numbers are in the machine's own byte order.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::login::Agreed;

/// Longest that the kernel may take for an order: stopping a connection waits for what is under way.
const TIMEOUT_S: i64 = 30;
/// Size of a message's own header.
const MESSAGE_HEADER: usize = 16;
/// Where the order and the reply stand behind it.
const ORDER: usize = 16;
const REPLY: usize = 40;
/// Size of the event.
const EVENT: usize = 56;
/// Largest answer.
const MAX_ANSWER: usize = 4096;

/// Orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(in crate::imageapi) enum Order {
    CreateSession = 11,
    DestroySession = 12,
    CreateConnection = 13,
    DestroyConnection = 14,
    BindConnection = 15,
    SetParameter = 16,
    StartConnection = 17,
    StopConnection = 18,
}

/// A message: the event, and a parameter's text behind it. Pure.
pub(in crate::imageapi) fn message(
    order: Order,
    transport: u64,
    words: &[u32],
    text: &str,
) -> Vec<u8> {
    let mut event = vec![0; EVENT];
    let kind = u32::from(order as u16).to_ne_bytes();
    let words: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    for (at, bytes) in [(0, &kind[..]), (8, &transport.to_ne_bytes()), (ORDER, &words)] {
        event.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    }
    if !text.is_empty() {
        event.extend(text.as_bytes());
        event.push(0);
    }
    let length = u32::try_from(MESSAGE_HEADER + event.len()).unwrap_or_default();
    let mut message = length.to_ne_bytes().to_vec();
    message.extend((order as u16).to_ne_bytes());
    // NLM_F_REQUEST; no sequence number, the kernel fills in our port.
    message.extend(1_u16.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(event);
    message.resize(message.len().next_multiple_of(4), 0);
    message
}

/// The reply's first two numbers, if this is the answer to the order. Pure.
pub(in crate::imageapi) fn reply(order: Order, bytes: &[u8]) -> Option<io::Result<[u32; 2]>> {
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let event = bytes.get(MESSAGE_HEADER..)?;
    if kind != order as u16 || event.len() < EVENT {
        return None;
    }
    let word = |at: usize| event.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word));
    let error = word(4)?.cast_signed();
    if error != 0 {
        return Some(Err(io::Error::from_raw_os_error(error.saturating_abs())));
    }
    Some(Ok([word(REPLY)?, word(REPLY + 4)?]))
}

/// The parameters of a session that is logged in: number in `enum iscsi_param`, name for errors, value.
pub(in crate::imageapi) fn parameters(
    agreed: &Agreed,
    target: &str,
    initiator: &str,
) -> Vec<(u32, &'static str, String)> {
    let flag = |value: bool| u8::from(value).to_string();
    vec![
        (0, "MaxRecvDataSegmentLength", agreed.our_segment.to_string()),
        (1, "MaxXmitDataSegmentLength", agreed.their_segment.to_string()),
        (2, "HeaderDigest", flag(false)),
        (3, "DataDigest", flag(false)),
        (4, "InitialR2T", flag(agreed.initial_r2t)),
        (5, "MaxOutstandingR2T", agreed.max_r2t.to_string()),
        (6, "ImmediateData", flag(agreed.immediate_data)),
        (7, "FirstBurstLength", agreed.first_burst.to_string()),
        (8, "MaxBurstLength", agreed.max_burst.to_string()),
        (9, "DataPDUInOrder", flag(true)),
        (10, "DataSequenceInOrder", flag(true)),
        (11, "ErrorRecoveryLevel", flag(false)),
        (14, "ExpStatSN", agreed.next_status.to_string()),
        (15, "TargetName", target.to_owned()),
        (16, "TargetPortalGroupTag", agreed.portal_group.to_string()),
        (19, "recovery time", RECOVERY_S.to_string()),
        (30, "ping timeout", PING_S.to_string()),
        (31, "ping interval", PING_S.to_string()),
        (INITIATOR_NAME, "InitiatorName", initiator.to_owned()),
    ]
}

/// Seconds that the kernel waits for a broken connection to come back before it fails what is read and written.
const RECOVERY_S: u32 = 20;
/// Seconds between two pings of an idle target, and until a missing answer means that it is gone.
const PING_S: u32 = 10;
/// `ISCSI_PARAM_INITIATOR_NAME`.
const INITIATOR_NAME: u32 = 34;

/// The way to the kernel's transport.
#[derive(Debug)]
pub(in crate::imageapi) struct Socket {
    socket: OwnedFd,
    transport: u64,
}

impl Socket {
    /// Opens it for the transport with this handle.
    pub(in crate::imageapi) fn open(transport: u64) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let kind = SockProtocol::NetlinkISCSI;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, kind)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(TIMEOUT_S, 0))?;
        Ok(Self { socket, transport })
    }

    /// Gives an order and waits for its answer.
    pub(in crate::imageapi) fn order(
        &self,
        order: Order,
        words: &[u32],
        text: &str,
    ) -> io::Result<[u32; 2]> {
        let message = message(order, self.transport, words, text);
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), &message, &kernel, MsgFlags::empty())?;
        let mut buffer = [0; MAX_ANSWER];
        loop {
            let received = recvfrom::<NetlinkAddr>(self.socket.as_raw_fd(), &mut buffer);
            let (length, sender) = match received {
                Err(nix::errno::Errno::EINTR) => continue,
                Err(nix::errno::Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                received => received?,
            };
            let bytes = buffer.get(..length).unwrap_or_default();
            if sender.is_some_and(|sender| sender.pid() == 0)
                && let Some(answer) = reply(order, bytes)
            {
                return answer;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_laid_out_as_the_kernel_has_it() {
        let bytes = message(Order::SetParameter, 0x1122, &[5, 0, 15, 4], "iqn");
        assert_eq!(bytes.len(), 76);
        assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().expect("length")), 76);
        assert_eq!(&bytes[4..6], &16_u16.to_ne_bytes());
        assert_eq!(&bytes[16..20], &16_u32.to_ne_bytes());
        assert_eq!(&bytes[24..32], &0x1122_u64.to_ne_bytes());
        assert_eq!(&bytes[32..36], &5_u32.to_ne_bytes());
        assert_eq!(&bytes[40..44], &15_u32.to_ne_bytes());
        assert_eq!(&bytes[72..], b"iqn\0");
    }

    #[test]
    fn only_the_answer_to_the_order_is_one() {
        let mut bytes = message(Order::CreateSession, 1, &[], "");
        bytes[56..60].copy_from_slice(&9_u32.to_ne_bytes());
        bytes[60..64].copy_from_slice(&2_u32.to_ne_bytes());
        let answer = reply(Order::CreateSession, &bytes).expect("an answer").expect("no error");
        assert_eq!(answer, [9, 2]);
        assert!(reply(Order::CreateConnection, &bytes).is_none());
        bytes[20..24].copy_from_slice(&(-22_i32).to_ne_bytes());
        let error = reply(Order::CreateSession, &bytes).expect("an answer").expect_err("error");
        assert_eq!(error.raw_os_error(), Some(22));
        for cut in 0..bytes.len() {
            assert!(reply(Order::CreateSession, &bytes[..cut]).is_none());
        }
    }
}
