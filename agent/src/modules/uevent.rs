//! The kernel's device events (`NETLINK_KOBJECT_UEVENT`): parser and socket.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, setsockopt,
    socket, sockopt,
};

/// Longest event; the kernel's are at most 2 KiB of variables and a path (`UEVENT_BUFFER_SIZE`).
const MAX_EVENT: usize = 8 * 1024;
/// Room for events that wait, in bytes: a machine with thousands of devices sends them in one burst.
const BUFFER: usize = 16 * 1024 * 1024;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Event {
    /// `ACTION`: add, remove, change, move, bind, unbind.
    pub action: String,
    /// `DEVPATH`: the device's path below `/sys`.
    pub devpath: String,
    /// `SUBSYSTEM`.
    pub subsystem: String,
    /// `MODALIAS`: what the device asks a module for.
    pub modalias: Option<String>,
}

impl Event {
    /// Whether it may change what hardware there is: of a device that asks for a driver, or of an interface or disk; not of those
    /// that are made of nothing, as containers have them.
    #[must_use]
    pub fn is_hardware(&self) -> bool {
        let asks = self.modalias.is_some() || matches!(self.subsystem.as_str(), "net" | "block");
        asks && !self.devpath.contains("/virtual/")
    }
}

/// Reads an event as the kernel sends it: `ACTION@DEVPATH` and `KEY=VALUE` strings, each ended by a zero byte.
/// `None` for what has no action or path, as udev's own messages.
#[must_use]
pub fn parse(bytes: &[u8]) -> Option<Event> {
    let mut fields = bytes.split(|byte| *byte == 0);
    if !fields.next()?.contains(&b'@') {
        return None;
    }
    let mut event = Event::default();
    for field in fields {
        let Ok(field) = std::str::from_utf8(field) else { continue };
        let Some((key, value)) = field.split_once('=') else { continue };
        match key {
            "ACTION" => value.clone_into(&mut event.action),
            "DEVPATH" => value.clone_into(&mut event.devpath),
            "SUBSYSTEM" => value.clone_into(&mut event.subsystem),
            "MODALIAS" => event.modalias = Some(value.to_owned()),
            _ => {}
        }
    }
    (!event.action.is_empty() && !event.devpath.is_empty()).then_some(event)
}

/// The socket that events come from.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Begins to listen: from here on nothing is lost that fits the buffer.
    ///
    /// # Errors
    /// What socket or bind say.
    pub fn bind() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        if let Err(error) = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER) {
            log::debug!("buffer of kernel events: {error}");
        }
        // Group 1 is the kernel's own; udev sends in group 2.
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
        Ok(Self { socket })
    }

    /// Waits for the next message. `None` if it is not an event of the kernel: other processes with privilege can send too.
    ///
    /// # Errors
    /// What recvfrom says; `ENOBUFS` means that events were lost.
    pub fn next(&self) -> io::Result<Option<Event>> {
        let mut buffer = [0_u8; MAX_EVENT];
        loop {
            match recvfrom::<NetlinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((length, sender)) => {
                    let kernel = sender.is_some_and(|sender| sender.pid() == 0);
                    let bytes = buffer.get(..length).filter(|_| kernel);
                    return Ok(bytes.and_then(parse));
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_with_its_alias() {
        let bytes = b"add@/devices/pci0/virtio0\0ACTION=add\0DEVPATH=/devices/pci0/virtio0\0\
            SUBSYSTEM=virtio\0MODALIAS=virtio:d00000001v00001AF4\0SEQNUM=7\0";
        let event = parse(bytes).unwrap();
        assert_eq!((event.action.as_str(), event.subsystem.as_str()), ("add", "virtio"));
        assert_eq!(event.devpath, "/devices/pci0/virtio0");
        assert_eq!(event.modalias.as_deref(), Some("virtio:d00000001v00001AF4"));
        assert!(event.is_hardware());
        let veth = b"add@/x\0ACTION=add\0DEVPATH=/devices/virtual/net/veth0\0SUBSYSTEM=net\0";
        assert!(!parse(veth).unwrap().is_hardware());
    }

    #[test]
    fn what_is_no_kernel_event_is_none() {
        for bytes in [&b""[..], b"libudev\0\xfe\xed", b"add@/x", b"add@/x\0ACTION=add\0", b"\0\0"] {
            assert_eq!(parse(bytes), None, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn the_kernel_can_be_listened_to() {
        assert!(Listener::bind().is_ok());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_an_event_or_none(bytes in proptest::collection::vec(0_u8.., 0..300)) {
            if let Some(event) = parse(&bytes) {
                assert!(!event.action.is_empty() && !event.devpath.is_empty());
            }
        }
    }
}
