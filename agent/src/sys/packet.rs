//! Packet sockets (`packet(7)`): their link-layer addresses, which nix cannot make safely, and waiting for them; and which
//! messages a raw ICMPv6 socket hears.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{LinkAddr, SockaddrLike as _};
use tokio::io::unix::AsyncFd;

/// Longest link-layer address, in bytes (InfiniBand).
const MAX_STATION: usize = 20;

/// A link-layer address with room for InfiniBand's, whose 20 bytes go beyond the end of `sockaddr_ll`; the kernel reads
/// `sll_halen` bytes of it.
#[repr(C)]
struct Station {
    family: u16,
    protocol: u16,
    index: i32,
    hardware: u16,
    kind: u8,
    len: u8,
    address: [u8; MAX_STATION],
}

/// What to bind a packet socket to for hearing the IPv4 packets of an interface. `None` if the index is out of range.
#[must_use]
pub fn ipv4_packets(index: u32) -> Option<LinkAddr> {
    let raw = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).ok()?,
        sll_protocol: u16::try_from(libc::ETH_P_IP).ok()?.to_be(),
        sll_ifindex: i32::try_from(index).ok()?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).ok()?;
    // SAFETY: the pointer is to a live, fully initialised sockaddr_ll and `len` is its size; it is only read.
    unsafe { LinkAddr::from_raw((&raw const raw).cast(), Some(len)) }
}

/// Sends an IPv4 packet to a station on an interface's link; the kernel writes the link-layer header (`SOCK_DGRAM`).
///
/// # Errors
/// `EINVAL` for an index or address out of range, else the kernel's.
pub fn send_ipv4(fd: BorrowedFd<'_>, index: u32, station: &[u8], packet: &[u8]) -> io::Result<()> {
    let address = link_address(index, station).ok_or(io::ErrorKind::InvalidInput)?;
    let len = libc::socklen_t::try_from(size_of::<Station>()).map_err(io::Error::other)?;
    // SAFETY: both pointers are to live, initialised memory of the lengths given with them, and are only read.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            libc::MSG_NOSIGNAL,
            (&raw const address).cast(),
            len,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn link_address(index: u32, station: &[u8]) -> Option<Station> {
    let mut address = [0; MAX_STATION];
    address.get_mut(..station.len())?.copy_from_slice(station);
    Some(Station {
        family: u16::try_from(libc::AF_PACKET).ok()?,
        protocol: u16::try_from(libc::ETH_P_IP).ok()?.to_be(),
        index: i32::try_from(index).ok()?,
        hardware: 0,
        kind: 0,
        len: u8::try_from(station.len()).ok()?,
        address,
    })
}

/// Lets a raw ICMPv6 socket hear messages of one type alone (RFC 3542 section 3.2).
///
/// # Errors
/// When the kernel refuses it.
pub fn hear_only(fd: BorrowedFd<'_>, kind: u8) -> io::Result<()> {
    /// `ICMP6_FILTER` of `linux/icmpv6.h`.
    const FILTER: libc::c_int = 1;
    // A bit that is set blocks its type.
    let mut blocked = [u32::MAX; 8];
    if let Some(word) = blocked.get_mut(usize::from(kind / 32)) {
        *word &= !(1 << (kind % 32));
    }
    let len = libc::socklen_t::try_from(size_of_val(&blocked)).map_err(io::Error::other)?;
    // SAFETY: the pointer is to a live array of `len` bytes, which is only read.
    let result = unsafe {
        let value = blocked.as_ptr().cast();
        libc::setsockopt(fd.as_raw_fd(), libc::IPPROTO_ICMPV6, FILTER, value, len)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers a socket with the runtime, so that it can be waited for.
///
/// # Errors
/// When epoll refuses it.
pub fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, always names the same descriptor and is closed only when the AsyncFd drops it.
    let registered = unsafe { AsyncFd::register(fd) };
    registered.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_infiniband_address_has_room_and_a_longer_one_has_not() {
        let station: Vec<u8> = (1..=20).collect();
        let address = link_address(3, &station).expect("fits");
        assert_eq!((address.len, address.address[19], address.index), (20, 20, 3));
        // As `sockaddr_ll` (packet(7)), with twelve more bytes of address.
        assert_eq!(std::mem::offset_of!(Station, address), 12);
        assert_eq!(std::mem::offset_of!(libc::sockaddr_ll, sll_addr), 12);
        assert_eq!(size_of::<Station>(), 32);
        assert!(link_address(3, &[0; 21]).is_none() && link_address(u32::MAX, &[0; 6]).is_none());
    }
}
