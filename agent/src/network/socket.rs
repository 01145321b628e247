//! The sockets of the DHCP client: a packet socket while the interface has no address that servers can be asked from,
//! a UDP socket for renewals.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockType};
use tokio::io::unix::AsyncFd;
use tokio::net::UdpSocket;

use super::frame;
use crate::sys::packet::{ipv4_packets, register, send_ipv4};

/// Longest packet that is read, in bytes; longer ones are cut and then fail to parse.
const MAX_PACKET: usize = 2048;

/// A packet socket on one interface. Hears every IPv4 packet of it, so it is closed as soon as it is not needed.
#[derive(Debug)]
pub(super) struct PacketSocket {
    fd: AsyncFd<OwnedFd>,
    index: u32,
    everyone: Vec<u8>,
}

impl PacketSocket {
    /// A socket on this interface, whose stations all hear what is sent to `everyone`.
    pub(super) fn open(index: u32, everyone: &[u8]) -> io::Result<Self> {
        Ok(Self { fd: register(open(index)?)?, index, everyone: everyone.to_vec() })
    }

    /// Sends a DHCP message to every station.
    pub(super) fn broadcast(&self, payload: &[u8], source: Ipv4Addr) -> io::Result<()> {
        broadcast(self.fd.get_ref().as_fd(), (self.index, &self.everyone), payload, source)
    }

    /// The next DHCP message from a server. Safe to cancel.
    pub(super) async fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            let mut ready = self.fd.readable().await?;
            // Not ready after all: wait again.
            let Ok(received) = ready.try_io(|fd| receive(fd.as_fd(), &mut buffer)) else {
                continue;
            };
            if let Some(message) = received? {
                return Ok(message);
            }
        }
    }
}

/// The same for a process without a runtime.
#[derive(Debug)]
pub(super) struct EarlySocket {
    fd: OwnedFd,
    index: u32,
    everyone: Vec<u8>,
}

impl EarlySocket {
    /// As [`PacketSocket::open`].
    pub(super) fn open(index: u32, everyone: &[u8]) -> io::Result<Self> {
        Ok(Self { fd: open(index)?, index, everyone: everyone.to_vec() })
    }

    /// As [`PacketSocket::broadcast`].
    pub(super) fn broadcast(&self, payload: &[u8], source: Ipv4Addr) -> io::Result<()> {
        broadcast(self.fd.as_fd(), (self.index, &self.everyone), payload, source)
    }

    /// The next packet, where it is a DHCP message from a server. Does not wait.
    pub(super) fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        match receive(self.fd.as_fd(), &mut [0; MAX_PACKET]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            received => received,
        }
    }
}

impl AsFd for EarlySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open(index: u32) -> io::Result<OwnedFd> {
    let packets = ipv4_packets(index).ok_or(Errno::ENODEV)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    // No protocol until it is bound: packets of other interfaces never get in.
    let fd = socket::socket(AddressFamily::Packet, SockType::Datagram, flags, None).map_err(
        |error| match error {
            Errno::EAFNOSUPPORT => {
                io::Error::other("the kernel has no packet sockets: load the module af_packet")
            }
            other => other.into(),
        },
    )?;
    socket::bind(fd.as_raw_fd(), &packets)?;
    Ok(fd)
}

fn broadcast(
    fd: BorrowedFd<'_>,
    (index, everyone): (u32, &[u8]),
    payload: &[u8],
    source: Ipv4Addr,
) -> io::Result<()> {
    let packet = frame::wrap(payload, source, Ipv4Addr::BROADCAST).ok_or(Errno::EMSGSIZE)?;
    send_ipv4(fd, index, everyone, &packet)
}

/// A packet, if it is a DHCP message from a server.
fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<Vec<u8>>> {
    let len = socket::recv(fd.as_raw_fd(), buffer, MsgFlags::empty())?;
    Ok(frame::unwrap(buffer.get(..len).unwrap_or_default()).map(<[u8]>::to_vec))
}

/// The socket of a renewal: ordinary UDP from our address.
#[derive(Debug)]
pub(super) struct RenewSocket {
    socket: UdpSocket,
    address: Ipv4Addr,
}

impl RenewSocket {
    pub(super) async fn open(address: Ipv4Addr) -> io::Result<Self> {
        let socket = UdpSocket::bind((address, frame::CLIENT_PORT)).await?;
        Ok(Self { socket, address })
    }

    pub(super) fn address(&self) -> Ipv4Addr {
        self.address
    }

    pub(super) async fn send(&self, payload: &[u8], server: Ipv4Addr) -> io::Result<()> {
        self.socket.send_to(payload, (server, frame::SERVER_PORT)).await?;
        Ok(())
    }

    /// The next datagram. Safe to cancel.
    pub(super) async fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; MAX_PACKET];
        let (len, _) = self.socket.recv_from(&mut buffer).await?;
        buffer.truncate(len);
        Ok(buffer)
    }
}
