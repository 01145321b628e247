//! The sockets of the DHCP client: a packet socket while the interface has no address that servers can be asked from,
//! a UDP socket for renewals.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

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
        Ok(Self { fd: register(fd)?, index, everyone: everyone.to_vec() })
    }

    /// Sends a DHCP message to every station.
    pub(super) fn broadcast(&self, payload: &[u8], source: Ipv4Addr) -> io::Result<()> {
        let packet = frame::wrap(payload, source, Ipv4Addr::BROADCAST).ok_or(Errno::EMSGSIZE)?;
        send_ipv4(self.fd.get_ref().as_fd(), self.index, &self.everyone, &packet)
    }

    /// The next DHCP message from a server. Safe to cancel.
    pub(super) async fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            let mut ready = self.fd.readable().await?;
            let received = ready.try_io(|fd| {
                let len = socket::recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
                Ok(len)
            });
            // Not ready after all: wait again.
            let Ok(len) = received else { continue };
            if let Some(message) = frame::unwrap(buffer.get(..len?).unwrap_or_default()) {
                return Ok(message.to_vec());
            }
        }
    }
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
