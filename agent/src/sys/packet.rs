//! Packet sockets (`packet(7)`): their link-layer addresses, which nix cannot make safely, and waiting for them.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use nix::libc;
use nix::sys::socket::{LinkAddr, SockaddrLike as _};
use tokio::io::unix::AsyncFd;

/// The address of every station on an interface's link, for IPv4 packets; also what to bind to for hearing them.
/// `None` if the index is out of range.
#[must_use]
pub fn ipv4_broadcast(index: u32) -> Option<LinkAddr> {
    let raw = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).ok()?,
        sll_protocol: u16::try_from(libc::ETH_P_IP).ok()?.to_be(),
        sll_ifindex: i32::try_from(index).ok()?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    };
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).ok()?;
    // SAFETY: the pointer is to a live, fully initialised sockaddr_ll and `len` is its size; it is only read.
    unsafe { LinkAddr::from_raw((&raw const raw).cast(), Some(len)) }
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
