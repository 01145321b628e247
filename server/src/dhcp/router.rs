//! Answers IPv6 router solicitations with "there is no router here" (RFC 4861 section 4.2, lifetime 0, no prefix).
//!
//! iPXE waits 16 seconds for such an answer before it uses the IPv4 address that it already has. Nothing else is said
//! about IPv6, so hosts do not change how they are configured. Meant for networks with no IPv6 router of their own.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::watch;

use super::{DhcpError, RECEIVE_PAUSE, stopped};

/// ICMPv6 type of a router solicitation.
const SOLICITATION: u8 = 133;
/// A router advertisement: type 134, everything else unspecified; the kernel fills in the checksum.
const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Hop limit that makes neighbour discovery packets valid (RFC 4861 section 6.1.2).
const HOPS: u32 = 255;
/// `ff02::2`, all routers of the link.
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// `ff02::1`, all nodes of the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Pause before looking again for an IPv6 address on the interface.
const ADDRESS_PAUSE: Duration = Duration::from_millis(500);
/// The IPv6 addresses of this thread's network namespace: address, index, two numbers, flags, name (hexadecimal).
const ADDRESSES: &str = "/proc/thread-self/net/if_inet6";

fn index_of(addresses: &str, interface: &str) -> Option<u32> {
    let line = addresses.lines().find(|line| line.split_whitespace().last() == Some(interface))?;
    u32::from_str_radix(line.split_whitespace().nth(1)?, 16).ok()
}

/// `None` while the interface has no IPv6 address; a bridge has none before its first port is up.
fn open(interface: &str) -> io::Result<Option<(UdpSocket, u32)>> {
    // A kernel without IPv6 has no such file.
    let addresses = match std::fs::read_to_string(ADDRESSES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    let Some(index) = index_of(&addresses, interface) else { return Ok(None) };
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    socket.bind_device(Some(interface.as_bytes()))?;
    socket.set_multicast_hops_v6(HOPS)?;
    socket.set_unicast_hops_v6(HOPS)?;
    socket.set_multicast_if_v6(index)?;
    socket.join_multicast_v6(&ALL_ROUTERS, index)?;
    socket.set_nonblocking(true)?;
    // Only its send and receive calls are used, which are the same for a raw socket.
    Ok(Some((socket.into(), index)))
}

/// Answers solicitations on the interface until `shutdown` is true or its sender is gone.
///
/// # Errors
/// When raw sockets are not allowed. An interface with no IPv6 address is waited for, if need be for ever.
pub async fn serve(interface: &str, mut shutdown: watch::Receiver<bool>) -> Result<(), DhcpError> {
    let fail = |source| DhcpError::Socket {
        interface: interface.to_owned(),
        action: "cannot open the ICMPv6 socket that answers router solicitations",
        source,
    };
    let (socket, index) = loop {
        match open(interface).map_err(fail)? {
            Some(opened) => break opened,
            None => tokio::select! {
                () = tokio::time::sleep(ADDRESS_PAUSE) => {}
                () = stopped(&mut shutdown) => return Ok(()),
            },
        }
    };
    let socket = tokio::net::UdpSocket::from_std(socket).map_err(fail)?;
    let mut buffer = [0; 256];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = stopped(&mut shutdown) => return Ok(()),
        };
        let target = match (received, buffer) {
            (Ok((8.., SocketAddr::V6(from))), [SOLICITATION, 0, ..]) => from,
            (Ok(_), _) => continue,
            (Err(error), _) => {
                tracing::warn!(interface, %error, "cannot receive router solicitations");
                tokio::time::sleep(RECEIVE_PAUSE).await;
                continue;
            }
        };
        // A soliciting host without an address can only be reached by multicast.
        let ip = if target.ip().is_unspecified() { ALL_NODES } else { *target.ip() };
        let target = SocketAddrV6::new(ip, 0, 0, index);
        match socket.send_to(&ADVERTISEMENT, SocketAddr::V6(target)).await {
            Ok(_) => tracing::debug!(interface, %ip, "answered a router solicitation"),
            Err(error) => tracing::warn!(interface, %ip, %error, "cannot advertise"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_read_from_the_kernels_table() {
        let table = "00000000000000000000000000000001 01 80 10 80       lo\n\
                     fe80000000000000505400fffe000001 1f 40 20 80     lab0\n";
        assert_eq!(index_of(table, "lab0"), Some(31));
        assert_eq!(index_of(table, "lab"), None);
    }
}
