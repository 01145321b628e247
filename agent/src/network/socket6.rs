//! The sockets of IPv6: one for the words of all routers, one per interface for DHCPv6.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket as StdUdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType,
    SockaddrIn6, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::net::UdpSocket;

use super::advertisement::{ADVERTISEMENT, SOLICITATION};
use crate::sys::packet::{hear_only, register};

/// UDP port of DHCPv6 servers (RFC 8415 section 7.2).
const SERVER_PORT: u16 = 547;
/// UDP port of DHCPv6 clients.
const CLIENT_PORT: u16 = 546;
/// All DHCPv6 servers and relays on a link (RFC 8415 section 7.1).
const ALL_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
/// All routers on a link (RFC 4291 section 2.7.1).
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// Hops of what routers say: what has been forwarded has less (RFC 4861 section 6.1.2).
const HOPS: i32 = 255;
/// Longest packet that is read, in bytes; longer ones are cut.
const MAX_PACKET: usize = 2048;

fn open(kind: SockType, protocol: SockProtocol) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket::socket(AddressFamily::Inet6, kind, flags, protocol)?)
}

/// Hears the advertisements of routers on every interface.
#[derive(Debug)]
pub(super) struct RouterSocket(AsyncFd<OwnedFd>);

impl RouterSocket {
    pub(super) fn open() -> io::Result<Self> {
        let fd = open(SockType::Raw, SockProtocol::IcmpV6)?;
        hear_only(fd.as_fd(), ADVERTISEMENT)?;
        socket::setsockopt(&fd, sockopt::Ipv6RecvHopLimit, &true)?;
        socket::setsockopt(&fd, sockopt::Ipv6MulticastHops, &HOPS)?;
        Ok(Self(register(fd)?))
    }

    /// Asks the routers of a link to speak.
    pub(super) fn solicit(&self, index: u32) -> io::Result<()> {
        let to = SockaddrIn6::from(SocketAddrV6::new(ALL_ROUTERS, 0, 0, index));
        let fd = self.0.get_ref().as_raw_fd();
        socket::sendto(fd, &SOLICITATION, &to, MsgFlags::empty())?;
        Ok(())
    }

    /// The next advertisement and the interface that it came by. Safe to cancel.
    pub(super) async fn receive(&self) -> io::Result<(u32, Vec<u8>)> {
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            let mut ready = self.0.readable().await?;
            let received = ready.try_io(|fd| Ok(receive(fd.as_raw_fd(), &mut buffer)?));
            // Not ready after all: wait again. What no router on the link said is not for us.
            let Ok(received) = received else { continue };
            if let Some((index, len)) = received? {
                buffer.truncate(len);
                return Ok((index, buffer));
            }
        }
    }
}

fn receive(fd: i32, buffer: &mut [u8]) -> Result<Option<(u32, usize)>, Errno> {
    let mut control = nix::cmsg_space!(i32);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let flags = MsgFlags::empty();
    let message = socket::recvmsg::<SockaddrIn6>(fd, &mut parts, Some(&mut control), flags)?;
    let near = ControlMessageOwned::Ipv6HopLimit(HOPS);
    let is_near = message.cmsgs()?.any(|control| control == near);
    let from = message.address.filter(|from| is_near && from.ip().is_unicast_link_local());
    Ok(from.map(|from| (from.scope_id(), message.bytes)))
}

/// A DHCPv6 client's port on one interface.
#[derive(Debug)]
pub(super) struct ServerSocket {
    socket: UdpSocket,
    servers: SocketAddrV6,
}

impl ServerSocket {
    pub(super) fn open(name: &str, index: u32) -> io::Result<Self> {
        let fd = open(SockType::Datagram, SockProtocol::Udp)?;
        socket::setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
        // Other interfaces have sockets of their own on this port.
        socket::setsockopt(&fd, sockopt::BindToDevice, &name.into())?;
        let here = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, CLIENT_PORT, 0, 0);
        socket::bind(fd.as_raw_fd(), &SockaddrIn6::from(here))?;
        let socket = UdpSocket::from_std(StdUdpSocket::from(fd))?;
        Ok(Self { socket, servers: SocketAddrV6::new(ALL_SERVERS, SERVER_PORT, 0, index) })
    }

    /// Sends to all servers and relays on the link.
    pub(super) async fn send(&self, message: &[u8]) -> io::Result<()> {
        self.socket.send_to(message, self.servers).await?;
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
